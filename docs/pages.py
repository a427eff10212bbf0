"""The generated pages of the site: methods from their cards and docstrings, their results, the roadmap, the recipe's keys. No torch."""

import html
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from blockwright import registry
from blockwright.recipes.recipe import Recipe, option_model

ROOT = Path(__file__).parents[1]
SOURCE = "https://arxiv.org/abs/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: adds what no hand writes."""
    pages: dict[str, str | bytes] = {
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changes.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "recipes.md": recipes(),
        "roadmap.md": roadmap(),
        "compose.md": compose(registry.results("composition").get("cpu")),
        "compare.md": compare(registry.results("comparison").get("cpu")),
        "methods/index.md": methods(),
    }
    for m in registry.methods().values():
        results = registry.results(m.slug)
        pages[f"methods/{m.slug}.md"] = method(m, results)
        for device in results:
            plot = registry.results_folder() / device / f"{m.slug}.svg"
            if plot.is_file():
                pages[f"methods/{device}-{m.slug}.svg"] = plot.read_bytes()
    drawn = registry.results_folder() / "cpu" / "comparison.svg"
    if drawn.is_file():
        pages["cpu-comparison.svg"] = drawn.read_bytes()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def method(m: registry.Method, results: dict[str, dict[str, Any]]) -> str:
    """The page of one method."""
    claim, arxiv = m.card["claim"], m.card["arxiv"]
    lines = [
        f"# {m.slug}",
        "",
        f"**{m.card['title']}**" + (f" ([arXiv {arxiv}]({SOURCE}{arxiv}))" if arxiv else ""),
        "",
        m.docstring,
        "",
        f"- **saves**: {m.card['saves']}",
        f"- **needs**: {', '.join(m.card['needs']) or 'nothing'}",
        f"- **writes**: {m.card['writes']}",
        f"- **the paper's claim**: {claim['figure']}, against {claim['against']} ({claim['where']})",
        f"- **room and kind**: {m.card['room']}, {m.card['kind']}",
        "",
        "## Use",
        "",
        *example(m),
        "",
        "## Options",
        "",
        *table(
            ["option", "type", "default", "meaning"],
            [[f"`{o.name}`", f"`{o.annotation}`", "required" if o.required else f"`{o.default!r}`", o.help] for o in m.options],
        ),
        "",
        "## In full",
        "",
        "```text",
        textwrap.dedent(m.function),
        "```",
        "",
        "## Measured",
        "",
    ]
    for device, result in results.items():
        lines += measured(m.slug, device, result)
    if not results:
        lines += [f"Not yet: `blockwright reproduce {m.slug}`.", ""]
    return "\n".join(lines)


def example(m: registry.Method) -> list[str]:
    """How to call a method: a stage in a recipe and in Python."""
    if m.card["kind"] != "stage":
        return ["```python", f"import blockwright as bw\n\nbw.{m.name}", "```"]
    ids = "calibration=ids, " if "calibration" in m.card["needs"] else ""
    shown = [o for o in m.options if o.name not in ("targets", "ignore", "overrides")][:2]
    in_yaml = ", ".join(f"{o.name}: {str(o.default).lower() if isinstance(o.default, bool) else o.default}" for o in shown)
    in_python = ", ".join(f"{o.name}={o.default!r}" for o in shown)
    return [
        "```yaml",
        "model: smollm2",
        "stages:",
        f"  - {m.slug}: {{{in_yaml}}}",
        "out: out/cheaper",
        "```",
        "",
        "```python",
        "import blockwright as bw",
        "",
        f"cheaper = bw.{m.name}(model, {ids}{in_python})  # a transformers model; it stays as it was",
        "```",
    ]


def measured(slug: str, device: str, result: dict[str, Any]) -> list[str]:
    """One result: claimed and measured, the plot, the rows behind it."""
    lines = [f"### {device}", "", f"> {result['paper']}", ""]
    numbers = []
    for number in (result, *result["parts"]):
        sign = ">=" if number["better"] == "higher" else "<="
        met = number["measured"] >= number["target"] if number["better"] == "higher" else number["measured"] <= number["target"]
        baseline = "" if number["baseline"] is None else f"{number['baseline']:.4g}"
        spread = "" if number["spread"] is None else "{:.4g} to {:.4g}".format(*number["spread"])
        name = f"{number['name']} ({number['unit']})" if number["name"] else number["unit"]
        numbers.append([name, f"{sign} {number['target']:.4g}", f"{number['measured']:.4g}", baseline, spread, "met" if met else "missed"])
    lines += [*table(["number", "target", "measured", "baseline", "spread", ""], numbers), ""]
    if (registry.results_folder() / device / f"{slug}.svg").is_file():
        lines += [f"![{slug} on {device}]({device}-{slug}.svg)", ""]
    if result["rows"]:
        keys = list(dict.fromkeys(key for row in result["rows"] for key in row))
        lines += [*table(keys, [[shown(row.get(key)) for key in keys] for row in result["rows"]]), ""]
    lines += [f"- {note}" for note in result["notes"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [*lines, "", f"Seed {result['seed']}, {result['seconds']:.0f} s, commit {result['commit']}; {versions}.", ""]


def methods() -> str:
    """The table of what is built."""
    rows = []
    for m in registry.methods().values():
        results = registry.results(m.slug)
        said = ", ".join(f"{r['measured']:.3g} {r['unit']} ({d}, {'met' if r['met'] else 'missed'})" for d, r in results.items())
        rows.append([m.card["room"], f"[{m.slug}]({m.slug}.md)", m.card["summary"], m.card["saves"], said or "-"])
    head = ["room", "method", "what it does", "what it saves", "measured"]
    return "\n".join(["# Methods", "", *table(head, rows), "", "What is planned: [roadmap](../roadmap.md)."])


def roadmap() -> str:
    """All planned methods by room, with what is built."""
    built, plan = registry.methods(), registry.roadmap()
    done = sum(slug in built for slug in plan)
    lines = ["# Roadmap", "", f"{done} of {len(plan)} methods are built.", ""]
    for room in registry.ROOMS:
        rows = []
        for slug, p in plan.items():
            if p["room"] == room:
                paper = f"[{p['arxiv']}]({SOURCE}{p['arxiv']})" if p["arxiv"] else "-"
                rows.append(
                    [
                        f"[{slug}](methods/{slug}.md)" if slug in built else slug,
                        p["title"],
                        paper,
                        "built" if slug in built else "not built yet",
                    ]
                )
        lines += [f"## {room}", "", *table(["method", "title", "arXiv", ""], rows), ""]
    return "\n".join(lines)


def compose(result: dict[str, Any] | None) -> str:
    """Which stage may follow which: a matrix, and below it the reasons."""
    lines = [
        "# Which stage may follow which",
        "",
        "Every pair of stages was run on a small model, the folder written and opened again: `blockwright reproduce composition`.",
        "A row is the stage that comes first, a column the one after it.",
        "",
    ]
    if result is None:
        return "\n".join([*lines, "Not measured yet."])
    found = {(row["first"], row["then"]): row["outcome"] for row in result["rows"]}
    names = list(dict.fromkeys(first for first, _ in found))
    word = {pair: outcome.partition(":")[0] for pair, outcome in found.items()}
    lines += table(["", *names], [[f"**{a}**", *(word[a, b] for b in names)] for a in names])
    lines += ["", "## Reasons", ""]
    lines += [f"- {a}, {b}: {html.escape(outcome)}" for (a, b), outcome in found.items() if word[a, b] != outcome]
    return "\n".join([*lines, ""])


def compare(result: dict[str, Any] | None) -> str:
    """Perplexity against size: our stages, pairs of them, and peers; each stage's time on the same model."""
    lines = [
        "# Methods side by side",
        "",
        "SmolLM2-135M made as small in several ways, by our stages, pairs of them, and llm-compressor, on the same text:",
        "`make peers`, then `blockwright reproduce comparison`.",
        "",
    ]
    if result is None:
        return "\n".join([*lines, "Not measured yet."])
    return "\n".join([*lines, *measured("comparison", "cpu", result)])


def recipes() -> str:
    """What a recipe may say, from the model that checks it."""
    schema = Recipe.model_json_schema()
    lines = ["# Recipes", "", "A recipe is a YAML file; `blockwright run recipe.yaml --dry-run` says what it would cost.", ""]
    lines += keys(schema)
    for name, title in (("Text", "`calibration`, `evaluation`"), ("Measure", "`measure`")):
        lines += [f"## {title}", "", *keys(schema["$defs"][name])]
    lines += [
        "## Stages",
        "",
        "Each is a name, or a name with its options; they run in order. `overrides` sets options for some layers,",
        "by name, by the end of a name, or by `re:<regex>`.",
        "",
    ]
    stages = [m for m in registry.methods().values() if m.card["kind"] == "stage"]
    rows = [
        [f"[{m.slug}](methods/{m.slug}.md)", ", ".join(f"`{name}`" for name in option_model(m).model_fields), m.card["leaves"]]
        for m in stages
    ]
    lines += [*table(["stage", "options", "leaves weights"], rows), "", "## Examples", ""]
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        lines += [f"`examples/{path.name}`", "", "```yaml", path.read_text(encoding="utf-8").strip(), "```", ""]
    return "\n".join(lines)


def keys(schema: dict[str, Any]) -> list[str]:
    """The keys of a mapping with their defaults and meanings."""
    rows = []
    for name, about in schema["properties"].items():
        if name != "source_text":
            default = "required" if name in schema.get("required", []) else f"`{about.get('default')!r}`"
            rows.append([f"`{name}`", default, about.get("description", "")])
    return [*table(["key", "default", "meaning"], rows), ""]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; cells that hold a bar or a line break stay in their column."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]


def shown(value: Any) -> str:
    """A value of a result's row."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else html.escape(str(value))
