"""The report of a run: one HTML file that opens offline, the same as JSON, and a table for the terminal. Needs no torch."""

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blockwright.recipes import chosen
from blockwright.recipes.drawing import BITS, MISSING, Number, Report, bits_class, draw, number, size

TEMPLATE = Path(__file__).with_name("report.html.j2")
TEXTURES = {"holes": "zeros (holes: their share)", "shared": "shared, stored elsewhere", "dropped": "dropped"}
ZEROS = 0.2  # from this share of zeros on a part counts as sparse: rounding to few bits alone leaves up to a sixth
SLAB = 12  # a block that is larger than a layer is drawn higher, at most this many times as high


def write(report: Report, folder: Path) -> None:
    """Write report.html and report.json into the folder. The same report gives the same bytes; NaN and infinities become null.

    report : JSON values; what is null or missing shows as a dash. folder : exists already.
    """
    text = json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"
    (folder / "report.json").write_bytes(text.encode("utf-8"))
    (folder / "report.html").write_bytes(html(report).encode("utf-8", "replace"))


def html(report: Report) -> str:
    """The report as one self-contained page. Whatever comes from a model, a prompt or a recipe is escaped."""
    return _template().render(_view(_finite(report)))


def table(report: Report) -> RenderableType:
    """Before and after, and what each stage did, for the terminal."""
    report = _finite(report)
    dense, now = report.get("dense") or {}, report.get("result") or {}
    both = Table(title=_plain(report.get("title") or "Result"), title_style="bold", header_style="bold", box=None)
    for column in ("", "dense", "now", ""):
        both.add_column(column, justify="right" if column else "left")
    for name, key, form, up, down in (
        ("size", "bytes", size, "larger", "smaller"),
        ("perplexity", "perplexity", number, "higher", "lower"),
        ("decoding, tokens/s", "tokens_per_second", speed, "faster", "slower"),
        ("peak memory", "peak_memory", size, "more", "less"),
    ):
        both.add_row(name, *(_plain(v) for v in (form(dense.get(key)), form(now.get(key)), change(now.get(key), dense.get(key), up, down))))
    both.add_row("same top choice as dense", "", _plain(share(now.get("top1"))), "")
    both.add_row("KL to dense, nats a token", "", _plain(number(now.get("kl"), 3)), "")
    stages = _items(report, "stages")
    if len(stages) < 2:
        return both
    each = Table(header_style="bold", box=None)
    for column in ("after stage", "time", "size", "perplexity", "KL", "top-1"):
        each.add_column(column, justify="left" if column == "after stage" else "right")
    for s in stages:
        quality = number(s.get("perplexity")), number(s.get("kl"), 3), share(s.get("top1"))
        each.add_row(*map(_plain, (s.get("name"), duration(s.get("seconds")), size(s.get("bytes")), *quality)))
    return Group(both, "", each)


def block_table(report: Report) -> RenderableType:
    """Every block, for the terminal: what happened to it, its bytes, the error it added."""
    out = Table(header_style="bold", box=None)
    for column in ("block", "treatment", "before", "now", "bits", "zeros", "error"):
        out.add_column(column, justify="left" if column in ("block", "treatment") else "right")
    for b in _items(_finite(report), "blocks"):
        n = _numbers(b)
        out.add_row(*(_plain(n[key]) for key in ("name", "treatment", "before", "after", "bits", "zeros", "error")))
    return out


def speed(value: Number | None) -> str:
    return number(value, 3)


def share(value: Number | None) -> str:
    """A part of one, in percent."""
    return MISSING if value is None else f"{100 * value:.1g} %" if 0 < abs(value) < 0.0005 else f"{100 * value:.1f} %"


def change(now: Number | None, before: Number | None, more: str, less: str) -> str:
    """How many times more or less: `2.72x smaller`."""
    if now is None or before is None or now <= 0 or before <= 0:
        return MISSING
    times = number(max(now / before, before / now), 3)
    return "the same" if times == "1.00" else f"{times}x {more if now > before else less}"


def duration(seconds: Number | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 119.5 else f"{seconds / 60:.1f} min" if seconds < 7170 else f"{seconds / 3600:.1f} h"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _finite(value: Any) -> Any:
    """The same value with NaN and infinities as None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _items(thing: Report, key: str) -> list[Any]:
    """A list of the report without what is null in it."""
    return [value for value in thing.get(key) or [] if value is not None]


def _plain(value: Any) -> Text:
    """Text for a terminal: no markup, no control characters; ASCII where we chose the character."""
    return Text(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", "-" if value in (None, MISSING) else str(value)))


def _view(r: Report) -> dict[str, Any]:
    """All that the template shows, as text and coordinates."""
    blocks = _in_order(_items(r, "blocks"))
    numbers = [_numbers(b) for b in blocks]
    dense, now, model, machine = (r.get(key) or {} for key in ("dense", "result", "model", "machine"))
    part = share(_over(now.get("bytes"), dense.get("bytes")))
    return {
        "title": r.get("title") or "Result",
        "about": _known([model.get("name"), model.get("architecture"), _said("{} parameters", number(model.get("parameters")))]),
        "opens_with": now.get("opens_with"),
        "warnings": _items(r, "warnings"),
        "headline": [
            _headline("Size", "bytes", size, dense, now, "larger", "smaller", f"{part} of dense"),
            _headline("Perplexity", "perplexity", number, dense, now, "higher", "lower", "on held-out text; lower is better"),
            _headline("Tokens per second", "tokens_per_second", speed, dense, now, "faster", "slower", "one sequence at a time"),
        ],
        "facts": [
            ("Same top choice", share(now.get("top1"))),
            ("KL to dense", _said("{} nats a token", number(now.get("kl"), 3)) or MISSING),
            ("Peak memory", f"{size(dense.get('peak_memory'))} → {size(now.get('peak_memory'))}"),
            ("Bits a weight, on average", number(_over(8 * (now.get("bytes") or 0), model.get("parameters")), 3)),
            ("Made in", duration(r.get("seconds"))),
        ],
        "numbers": numbers,
        "tower": _tower(blocks, numbers),
        "plot": _plot(r),
        "rows": _rows(r),
        "chosen": [shown for s in _items(r, "stages") if (shown := chosen.view(s))],
        "curves": [(s.get("name") or MISSING, found) for s in _items(r, "stages") if (found := _curves(s.get("curves") or {}))],
        "bytes": _where_bytes_go(blocks),
        "samples": [_sample(s) for s in _items(r, "samples")],
        "scripts": _known([r.get("command"), r.get("recipe")]),
        "repeat": [
            (name, value)
            for name, value in (
                ("seed", r.get("seed")),
                ("processor", machine.get("cpu")),
                ("cores", machine.get("cores")),
                ("threads used", machine.get("threads")),
                ("memory", machine.get("memory") and size(machine["memory"])),
                ("model on disk", model.get("source_bytes") and size(model["source_bytes"])),
                ("model in bf16", model.get("bf16_bytes") and size(model["bf16_bytes"])),
                ("written to", now.get("folder")),
                ("layout", now.get("layout")),
                *(r.get("versions") or {}).items(),
            )
            if value is not None
        ],
        "format": r.get("format"),
    }


def _known(values: list[Any]) -> list[Any]:
    return [value for value in values if value not in (None, "")]


def _said(sentence: str, value: str) -> str:
    return "" if value == MISSING else sentence.format(value)


def _over(value: Number | None, whole: Number | None) -> float | None:
    return value / whole if value and whole else None


def _headline(name: str, key: str, form: Any, dense: Report, now: Report, more: str, less: str, beside: str) -> dict[str, Any]:
    """One of the three big numbers; bars are percent of the larger of the two."""
    before, after = dense.get(key), now.get(key)
    largest = max(before or 0, after or 0)
    value, _, unit = form(after).partition(" ")
    times = change(after, before, more, less)
    return {
        "name": name,
        "before": form(before),
        "value": value,
        "unit": unit,
        "change": "" if times == MISSING else times.replace("x ", "× "),
        "beside": beside,
        "bars": [round(100 * (v or 0) / largest, 2) if largest > 0 else 0 for v in (before, after)],
    }


def _in_order(blocks: list[Report]) -> list[Report]:
    """From input to output: embeddings, layers, the rest."""

    def place(block: Report) -> int:
        name = (block.get("name") or "").lower()
        return 0 if re.search(r"embed|wte|wpe", name) else 1 if re.search(r"\d$", name) else 2

    return sorted(blocks, key=place)


def _treatment(block: Report) -> str:
    return ", ".join(_items(block, "treatment")) or "kept"


def _numbers(b: Report) -> dict[str, Any]:
    """A block as rows of text: itself, then its parts."""

    def row(name: str, treatment: str, thing: Report) -> dict[str, Any]:
        return {
            "name": name,
            "treatment": treatment,
            "shape": " × ".join(map(str, _items(thing, "shape"))),
            "before": size(thing.get("bytes_before")),
            "after": size(thing.get("bytes_after")),
            "bits": number(thing.get("bits"), 3),
            "zeros": share(thing.get("sparsity")),
            "error": number(thing.get("error"), 3),
        }

    parts = [row(p.get("name") or MISSING, p.get("treatment") or "kept", p) for p in _items(b, "parts")]
    return row(b.get("label") or b.get("name") or MISSING, _treatment(b), b) | {"parts": parts}


def _texture(treatment: str, sparsity: Number | None) -> str:
    said = treatment.lower()
    return "dropped" if "dropped" in said else "shared" if "shared" in said else "holes" if (sparsity or 0) >= ZEROS else ""


def _whole(block: Report) -> str:
    """dropped or shared, where that is all that happened to a block."""
    looks = {_texture(t, None) for t in _items(block, "treatment")}
    return looks.pop() if len(looks) == 1 else ""


def _tower(blocks: list[Report], numbers: list[dict[str, Any]]) -> dict[str, Any]:
    """The model as rows of cells, from output (top) to input. Area is bytes before, its solid part bytes now.

    A row is as wide as its block is large beside the largest layer; a block larger than that (an embedding) is as much higher, up to SLAB.
    Error bars are scaled to the worst block that is still there: one that was dropped may go beyond.
    """
    weights = [b.get("bytes_before") or sum(p.get("bytes_before") or 0 for p in _items(b, "parts")) for b in blocks]
    unit = max([w for w, b in zip(weights, blocks, strict=True) if re.search(r"\d$", b.get("name") or "")] or weights, default=0) or 1
    height = 26 if len(blocks) <= 8 else 22 if len(blocks) <= 20 else 17 if len(blocks) <= 48 else 13
    errors = [b.get("error") or 0 for b in blocks if not _whole(b)] or [0]
    worst = max(errors) or max((b.get("error") or 0 for b in blocks), default=0) or 1
    rows, seen, heads = [], set(), Counter[tuple[tuple[str, Number], ...]]()
    for i, (b, w, n) in enumerate(zip(blocks, weights, numbers, strict=True)):
        whole, stretch = _whole(b), w / unit
        parts = [(j, p) for j, p in enumerate(_items(b, "parts")) if (p.get("bytes_before") or 0) >= 0.002 * w]
        cells = [_cell(j, p, whole) for j, p in parts or [(0, b | {"treatment": _treatment(b)})]]
        seen |= {c["words"] for c in cells}
        if w == unit:
            heads[tuple((_short_part(p.get("name") or ""), p.get("bytes_before") or 0) for _, p in parts)] += 1
        beyond_scale = f"{SLAB} rows high here, {stretch:.0f} to scale" if stretch > SLAB else ""
        rows.append(
            {
                "index": i,
                "label": _tail(n["name"], 15),
                "cells": cells,
                "width": round(max(100 * min(stretch, 1), 0.4), 2),
                "height": round(height * min(max(stretch, 1), SLAB)),
                "note": _treatment(b) if whole else beyond_scale,
                "after": n["after"],
                "error": "" if n["error"] == MISSING else n["error"],
                "bar": round(min((b.get("error") or 0) / worst, 1), 3),
                "beyond": (b.get("error") or 0) > worst,
            }
        )
    columns = heads.most_common(1)[0][0] if heads else ()
    total = sum(width for _, width in columns) or 1
    return {
        "rows": rows[::-1],
        "columns": [(name if width >= 0.025 * total else "", width) for name, width in columns] if len(columns) > 1 else [],
        "legend": [(css, words) for _, css, words in BITS[::-1] if words in seen]
        + [(f"{css} b16", words) for css, words in TEXTURES.items() if words in seen],
        "errors": any(b.get("error") is not None for b in blocks),
        "first": max(range(len(blocks)), key=lambda i: (not _whole(blocks[i]), blocks[i].get("error") or 0), default=0),
    }


def _cell(index: int, part: Report, whole: str) -> dict[str, Any]:
    """A part as a cell; `words` is its line in the legend (a sparse part's colour needs none: it is that of what is not sparse)."""
    before, after, sparsity = part.get("bytes_before") or 0, part.get("bytes_after") or 0, part.get("sparsity") or 0
    texture = whole or _texture(part.get("treatment") or "", sparsity)
    _, colour, words = bits_class(part)
    return {
        "part": index,
        "weight": before or 1,
        "css": texture if texture in ("dropped", "shared") else f"{colour} {texture}".strip(),
        "solid": round(min(100 * after / before, 100), 1) if before else 0,
        "hole": round(5 * math.sqrt(min(sparsity, 1)), 2),
        "words": TEXTURES.get(texture, words),
    }


def _short_part(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _points(r: Report) -> list[dict[str, Any]]:
    """What the plot and the table of stages tell of: dense, after each stage, as written, and others to compare with."""
    dense, now = r.get("dense") or {}, r.get("result") or {}
    points = [{**dense, "kind": "dense", "mark": "", "name": "dense, bf16"}]
    points += [{**s, "kind": "stage", "mark": str(i), "name": s.get("name") or MISSING} for i, s in enumerate(_items(r, "stages"), 1)]
    points.append({**now, "kind": "result", "mark": "", "name": "as written"})
    return points + [{**p, "kind": "reference", "mark": "", "name": p.get("name") or MISSING} for p in _items(r, "reference_points")]


def _rows(r: Report) -> list[dict[str, Any]]:
    """The table of stages."""
    return [
        {
            "kind": p["kind"],
            "mark": p["mark"],
            "name": p["name"],
            "options": [_option(name, value) for name, value in (p.get("options") or {}).items() if value not in (None, [], {})],
            "seconds": duration(p.get("seconds")),
            "bytes": size(p.get("bytes")),
            "perplexity": number(p.get("perplexity")),
            "kl": number(p.get("kl"), 3),
            "top1": share(p.get("top1")),
        }
        for p in _points(r)
    ]


def _option(name: str, value: Any) -> str:
    return f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _plot(r: Report) -> dict[str, Any] | None:
    """Size (from 0) against perplexity."""
    points = [{**p, "value": p.get("perplexity"), "said": p["name"]} for p in _points(r)]
    return draw(points, "perplexity {}", path=("dense", "stage", "result"), form=number)


def _curves(curves: dict[str, list[Number | None] | None]) -> list[dict[str, Any]]:
    """Loss curves, each as the points of a 100 x 40 drawing whose floor is 0, or the smallest value where that is negative."""
    drawn = []
    for name, values in curves.items():
        known = [v for v in values or [] if v is not None]
        if len(known) < 2:
            continue
        run = -(-len(known) // 100)  # long curves as means of runs
        means = [sum(known[i : i + run]) / len(known[i : i + run]) for i in range(0, len(known), run)]
        floor, top = min(0.0, *means), max(means)
        spread = (top - floor) or 1.0
        points = " ".join(f"{100 * i / max(len(means) - 1, 1):.1f},{39 - 38 * (v - floor) / spread:.2f}" for i, v in enumerate(means))
        less = f"{100 * (known[-1] / known[0] - 1):+.0f} %".replace("-", "−") if 0 < known[0] >= known[-1] / 10 else ""
        drawn.append({"name": name, "points": points, "first": number(known[0], 3), "last": number(known[-1], 3), "change": less})
    return drawn


def _where_bytes_go(blocks: list[Report]) -> dict[str, Any]:
    """Bytes by kind of part, before and now; bars in percent of the larger of the two sums."""
    groups: dict[str, list[Number]] = {kind: [0, 0] for kind in ("embedding and head", "attention", "MLP", "norms and the rest")}
    for b in blocks:
        for p in _items(b, "parts"):
            group = groups[_kind(f"{b.get('name') or ''}.{p.get('name') or ''}".lower())]
            group[0] += p.get("bytes_before") or 0
            group[1] += p.get("bytes_after") or 0
    before, after = (sum(g[i] for g in groups.values()) for i in (0, 1))
    whole = max(before, after)
    return {
        "rows": [
            {
                "kind": kind,
                "before": size(b),
                "after": size(a),
                "part_before": share(_over(b, before)),
                "part_after": share(_over(a, after)),
                "widths": (round(100 * b / whole, 3), round(100 * a / whole, 3)),
            }
            for kind, (b, a) in groups.items()
            if b or a
        ],
        "before": size(before),
        "after": size(after),
    }


def _kind(name: str) -> str:
    if re.search(r"norm|ln_|\.ln", name):
        return "norms and the rest"
    if "att" in name:
        return "attention"
    if re.search(r"embed|wte|wpe|head", name):
        return "embedding and head"
    return "MLP" if re.search(r"mlp|ffn|feed|expert|\bfc|intermediate|output", name) else "norms and the rest"


def _sample(s: Report) -> dict[str, Any]:
    """A prompt with both answers, cut where they part (at a word)."""
    dense, result = s.get("dense") or MISSING, s.get("result") or MISSING
    same = next((i for i, (a, b) in enumerate(zip(dense, result, strict=False)) if a != b), min(len(dense), len(result)))
    if dense != result:
        same = max(dense.rfind(" ", 0, same), dense.rfind("\n", 0, same)) + 1
    return {
        "prompt": s.get("prompt") or MISSING,
        "same": dense[:same],
        "dense": dense[same:],
        "result": result[same:],
        "equal": dense == result != MISSING,
    }
