"""The command line: thin, and quick to answer. Exit codes: 0 good, 1 target missed, 2 wrong input, 70 our bug, 130 interrupted.

`run` and `reproduce` do their work in a child process, so that the parent, which never imports torch, can answer Ctrl-C at once.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from blockwright import __version__, registry
from blockwright.errors import BlockwrightError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Efficient deep learning, block by block: a model in, a cheaper one out.",
)
console = Console()
CHILD = "BLOCKWRIGHT_CHILD"  # in the process that does the work: the end of a pipe whose other end the parent holds
MISSED, MISTAKE, BUG, INTERRUPTED = 1, 2, 70, 130
PATIENCE = 0.6  # seconds that a child has to tidy up after Ctrl-C


@app.command("list")
def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="Everything known of each method, as JSON.")] = False,
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also what is on the roadmap.")] = False,
) -> None:
    """The methods by room: what each buys, its claim, its last measured value."""
    if room is not None and room not in registry.ROOMS:
        raise BlockwrightError(f"room {room!r}: unknown", allowed=", ".join(registry.ROOMS), do=registry.nearest(room, registry.ROOMS))
    built = registry.methods()
    found = [m for m in built.values() if room in (None, m.card["room"])]
    planned = {slug: p for slug, p in registry.roadmap().items() if slug not in built and room in (None, p["room"])}
    if as_json:
        keys = ("slug", "room", "kind", "title", "arxiv", "summary", "claim")
        rows = [{key: m.card[key] for key in keys} | {"built": True, "results": registry.results(m.slug)} for m in found]
        if every:
            rows += [dict.fromkeys(keys) | {"slug": slug} | p | {"built": False, "results": {}} for slug, p in planned.items()]
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, header_style="bold")
    for column in ("room", "method", "what it buys", "claim", "measured here"):
        table.add_column(column)
    for m in found:
        claim = f"{m.card['claim']['figure']} vs {m.card['claim']['against']}"
        table.add_row(m.card["room"], m.slug, m.card["saves"], claim, _measured(m.slug))
    for slug, p in planned.items() if every else ():
        table.add_row(p["room"], f"[dim]{slug}[/]", f"[dim]{p['title']}[/]", "", "[dim]not built yet[/]")
    console.print(table)
    if planned and not every:
        console.print(f"\n{len(planned)} more are planned: blockwright list --all", highlight=False)


@app.command()
def show(method: Annotated[str, typer.Argument(help="A slug; see `blockwright list`.")]) -> None:
    """What a method does, when to use it, its options, its claim, its files."""
    m = registry.method(method)
    claim = m.card["claim"]
    console.print(f"[bold]{m.slug}[/]  {m.card['title']}  (arXiv {m.card['arxiv']})\n", highlight=False)
    for text in (m.docstring, m.function):
        console.print(text + "\n", markup=False, highlight=False)
    table = Table(box=None, header_style="bold")
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column)
    for o in m.options:
        table.add_row(*(_plain(cell) for cell in (o.name, o.annotation, "required" if o.required else repr(o.default), o.help)))
    console.print(table)
    facts = {
        "saves": m.card["saves"],
        "needs": ", ".join(m.card["needs"]) or "nothing",
        "writes": m.card["writes"],
        "claim": f"{claim['figure']}, against {claim['against']} ({claim['where']})",
        "measured": f"{_measured(m.slug)}; again with: blockwright reproduce {m.slug}",
        "files": ", ".join(str(path) for path in (m.path, m.claim_path) if path is not None),
    }
    console.print()
    for name, text in facts.items():
        console.print(f"{name:9}{text}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see examples/.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the plan: memory, time, bytes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    out: Annotated[Path | None, typer.Option(help="The output folder, instead of the recipe's.")] = None,
) -> None:
    """The main job: a model in, stages, a cheaper model out, with its report."""
    from blockwright.recipes.recipe import load_recipe

    again = ["run", str(recipe), *(["--out", str(out)] if out else []), *(["--overwrite"] if overwrite else []), "--resume"]
    _do(load_recipe(recipe, out=out), again, dry_run=dry_run, resume=resume, overwrite=overwrite)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or a name of the zoo.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    size: Annotated[str | None, typer.Option(help='Of the weights, such as "120MB".')] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="The size as bits a weight, embeddings included, instead.")] = None,
    allow: Annotated[str, typer.Option(help="What may happen: quantise,low-rank,prune,drop.")] = "quantise",
    keep: Annotated[str, typer.Option(help="Linears that stay dense, by name or its end, commas between; also: embedding.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Estimates, hardly measured: minutes less, a little worse.")] = False,
    cure: Annotated[int, typer.Option(help="Steps a block of learning how to round, such as 100.")] = 0,
    table: Annotated[Path | None, typer.Option(help="Measurements to use again, or to keep; default: OUT.fit.json.")] = None,
    calibration: Annotated[str, typer.Option(help="Text to measure on: a file, or a name of the zoo.")] = "pydoc",
    evaluation: Annotated[str, typer.Option(help="Text to judge by, likewise.")] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows of either text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the plan: memory, time, bytes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
) -> None:
    """The best model within a size: every linear gets its bits by one exact program over measured losses."""
    from blockwright.recipes.recipe import load_recipe

    def words(text: str) -> list[str]:
        return [word.strip() for word in text.split(",") if word.strip()]

    kept = table or Path(f"{out}.fit.json")
    options: dict[str, Any] = {"size": size, "bits_per_weight": bits_per_weight, "allow": words(allow), "keep": words(keep)}
    options |= {"cure_steps": cure, "table": str(kept), "front": 12} | ({"samples": 0, "refine": 0, "score_windows": 2} if quick else {})
    recipe: dict[str, Any] = {"model": model, "stages": [{"fit": options}], "out": str(out)}
    recipe |= {"calibration": {"text": calibration, "num": windows, "length": length}}
    recipe |= {"evaluation": {"text": evaluation, "num": windows, "length": length}}
    again = [*(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    _do(load_recipe(recipe), again, dry_run=dry_run, resume=resume, overwrite=overwrite)
    if not dry_run:
        console.print(f"table   {kept} (another size: add --table {kept}, and nothing is measured again)", highlight=False, soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that blockwright wrote, or a plain model folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; for gguf it gets model.gguf, export.json and the licence.")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf: for llama.cpp and Ollama. standard: for plain transformers. unrolled: the same, shared blocks as copies, adapters "
            "merged. w8a8: int8 weights and activations of dgq, for vLLM. dense: plain weights. blockwright: our own layout."
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
) -> None:
    """A model in another form, with what that costs in bytes and accuracy."""
    if CHILD not in os.environ:
        _in_child(resume_with=None)
    from blockwright.recipes import convert

    made = convert.convert(folder, out, to=to, overwrite=overwrite)
    for line in convert.summary(made, out):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A folder that blockwright wrote.")]) -> None:
    """What was done to a model, block by block."""
    from blockwright.blocks import folders

    folders.settle(folder)
    if not (folder / "report.json").is_file():
        raise BlockwrightError(f"{folder}: no report.json", allowed="a folder that `blockwright run` wrote", do="Check the path")
    folders.verify(folder)
    from blockwright.recipes import report

    made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    console.print(report.table(made))
    console.print(report.block_table(made))


@app.command()
def reproduce(
    method: Annotated[str | None, typer.Argument(help="A slug; see `blockwright list`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method that can run here.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of every random number.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where results go; default: results/ of this checkout.")] = None,
) -> None:
    """Re-measure a paper's claim at a size this machine can do: claimed, measured, baseline, plot."""
    if (method is None) == (not every):
        raise BlockwrightError("reproduce: name one method, or --all", do="See `blockwright list`")
    if device not in ("cpu", "cuda"):
        raise BlockwrightError(f"reproduce: device={device!r}", allowed="cpu, cuda")
    slugs = _claims(method, device)
    if CHILD not in os.environ:
        _in_child(resume_with=sys.argv[1:])
    from blockwright.claims import runner

    raise typer.Exit(0 if runner.reproduce_all(slugs, device=device, seed=seed, out=out, console=console) else MISSED)


@app.command()
def new(
    room: Annotated[str, typer.Argument(help="Where the method belongs; see `blockwright list`.")],
    method: Annotated[str, typer.Argument(help="Its slug: small letters, digits and hyphens.")],
) -> None:
    """The files of a new method: the method, its claim, its test. They run as they are; make them yours."""
    from blockwright import new as new_method

    for path in new_method.create(room, method, Path.cwd()):
        console.print(str(path), highlight=False, soft_wrap=True)
    console.print(
        f"\nNext: blockwright show {method}; pytest tests/{room}/test_{method.replace('-', '_')}.py", highlight=False, soft_wrap=True
    )


@app.command()
def version() -> None:
    """The version."""
    print(__version__)


def main() -> None:
    """Entry point: runs the command line and turns errors into exit codes."""
    if CHILD in os.environ:
        _obey_parent()
    try:
        code = app(standalone_mode=False)
    except BlockwrightError as error:
        sys.exit(_mistake(str(error)))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone (`blockwright list | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong command or option: click's and typer's own
            sys.exit(_mistake(error.format_message()))
        sys.exit(_report_bug())
    sys.exit(code if isinstance(code, int) else 0)


def _do(recipe: Any, again: list[str], *, dry_run: bool, resume: bool, overwrite: bool) -> None:
    """Do what a recipe says, in a child, and show the table; with dry_run show the plan. again : the command line that resumes."""
    if CHILD not in os.environ:
        _in_child(resume_with=None if dry_run else again)
    from blockwright.recipes import execute, plan, report

    if dry_run:
        _print_plan(plan.plan(recipe))
        return
    with _bar() as progress:
        made = execute.execute(recipe, resume=resume, overwrite=overwrite, progress=progress)
    console.print(report.table(made))
    for warning in made["warnings"]:
        console.print(f"note    {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"model   {recipe.out}\nreport  {recipe.out / 'report.html'}", highlight=False, soft_wrap=True)


def _in_child(*, resume_with: list[str] | None) -> None:
    """Do this command in a child and exit as it does. Ctrl-C ends it within a second and says how to go on; a second one ends at once.

    The child leads a process group of its own. When this process ends, however it ends, a pipe closes and the watchman ends the group.
    """
    go_on = f" Go on with: {shlex.join(['blockwright', *resume_with])}" if resume_with else ""
    end, _ = os.pipe()  # the other end stays open as long as this process lives
    child = subprocess.Popen(
        [sys.executable, "-m", "blockwright.cli", *sys.argv[1:]],
        env=os.environ | {CHILD: str(end)},
        pass_fds=[end],
        start_new_session=True,
    )
    os.close(end)

    def interrupted(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        child.terminate()  # it alone, to tidy up; the watchman ends the rest
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.02)
        print(f"\nblockwright: interrupted.{go_on}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    code = child.wait()
    if code < 0:
        why = "memory ran out, or someone ended it" if code == -signal.SIGKILL else signal.Signals(-code).name
        print(f"blockwright: the work was killed ({why}).{go_on}", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


def _obey_parent() -> None:
    """In the child: tidy up and end on SIGTERM. When the parent is gone, a watchman ends the whole group, also inside a long call."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(INTERRUPTED)

    signal.signal(signal.SIGTERM, stop)
    pipe = int(os.environ[CHILD])
    subprocess.Popen(["/bin/sh", "-c", "read _; kill -KILL 0"], stdin=pipe)  # reads until the parent's end closes
    os.close(pipe)


def _mistake(message: str) -> int:
    if message:
        print(f"blockwright: {message}", file=sys.stderr)
    return MISTAKE


def _report_bug() -> int:
    """Write the traceback to a file and say where. Returns the exit code of our own bugs."""
    trace = traceback.format_exc()
    with tempfile.NamedTemporaryFile("w", prefix="blockwright-bug-", suffix=".txt", delete=False, encoding="utf-8") as f:
        f.write(f"blockwright {__version__}, Python {sys.version}\n{shlex.join(sys.argv)}\n\n{trace}")
    last = trace.strip().splitlines()[-1]
    print(f"blockwright: a bug of ours ({last}). The details are in {f.name}; please report them.", file=sys.stderr)
    return BUG


class _bar:
    """A rich progress bar as a `Progress`: what is being done, how far, time left."""

    def __enter__(self) -> Any:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        words = TextColumn("{task.description:<32}")
        self.bar = Progress(words, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done, total=total)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def _print_plan(plan: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("step", "memory", "time", "bits a weight"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for s in plan["stages"]:
        table.add_row(s["name"], f"{s['memory'] / 1e9:.2f} GB", f"{s['seconds']:.0f} s", f"{s['bits']:.2f}")
    table.add_row("measuring", f"{plan['measuring']['memory'] / 1e9:.2f} GB", f"{plan['measuring']['seconds']:.0f} s", "")
    console.print(table)
    share = plan["bytes"] / plan["bf16_bytes"]
    console.print(
        f"in all: {plan['memory'] / 1e9:.2f} GB of memory, about {plan['seconds']:.0f} s; {plan['bytes'] / 1e6:.1f} MB of weights, "
        f"{share:.0%} of bf16, in {plan['out']}",
        highlight=False,
    )


def _claims(method: str | None, device: str) -> list[str]:
    """The slugs to reproduce: one, or all that have a claim and can run on the device."""
    if method is not None:
        slug = method.replace("_", "-")
        return [slug if slug in registry.other_claims() else registry.method(method).slug]
    return [m.slug for m in registry.methods().values() if m.claim_path is not None and (device == "cuda" or "gpu" not in m.card["needs"])]


def _measured(slug: str) -> str:
    found = [f"{r['measured']:.3g} {r['unit']} ({name}, {'met' if r['met'] else 'missed'})" for name, r in registry.results(slug).items()]
    return ", ".join(found) or "-"


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
