"""The report of a run: one HTML file that opens offline, the same as JSON, and a table for the terminal. Needs no torch."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.table import Table

Report = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(report: Report, folder: Path) -> None:
    """Write report.html and report.json into the folder. The same report gives the same bytes."""
    (folder / "report.json").write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")


def html(report: Report) -> str:
    """The report as one self-contained page; everything that comes from a model or a recipe is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "number": number, "share": share, "ratio": ratio, "duration": duration}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    clean = _finite(report)
    return template.render(
        r=clean,
        picture=_picture(clean["blocks"]),
        tradeoff=_tradeoff(clean),
        curves=[(s["name"], name, _curve(values)) for s in clean["stages"] for name, values in (s["curves"] or {}).items() if len(values) > 1],
        where=_where_bytes_go(clean["blocks"]),
        options=lambda values: yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10**6).strip().strip("{}"),
        legend=[(name, colour) for name, colour in COLOURS.items() if any(_kind(p) == name for b in clean["blocks"] for p in b["parts"])],
    )


def table(report: Report) -> Table:
    """Before and after, for the terminal."""
    out = Table(title=report["title"], title_style="bold", header_style="bold", box=None)
    for column in ("", "dense", "now", "ratio"):
        out.add_column(column, justify="left" if not column else "right")
    before, now = report["dense"], report["result"]
    out.add_row("bytes", size(before["bytes"]), size(now["bytes"]), ratio(now["bytes"], before["bytes"]))
    out.add_row("perplexity", number(before["perplexity"]), number(now["perplexity"]), ratio(now["perplexity"], before["perplexity"]))
    out.add_row("KL to dense (nats a token)", "0", number(now["kl"]), "")
    out.add_row("top-1 agreement with dense", "100 %", share(now["top1"]), "")
    speed = ratio(now["tokens_per_second"], before["tokens_per_second"])
    out.add_row("decoding (tokens/s)", number(before["tokens_per_second"]), number(now["tokens_per_second"]), speed)
    out.add_row("peak memory", size(before["peak_memory"]), size(now["peak_memory"]), ratio(now["peak_memory"], before["peak_memory"]))
    return out


def block_table(report: Report) -> Table:
    """Every block: what happened to it, its bytes, the error it added."""
    out = Table(header_style="bold", box=None)
    for column in ("block", "treatment", "before", "now", "bits", "zeros", "error"):
        out.add_column(column, justify="left" if column in ("block", "treatment") else "right")
    for b in report["blocks"]:
        out.add_row(
            b["name"], ", ".join(b["treatment"]), size(b["bytes_before"]), size(b["bytes_after"]), number(b["bits"]), share(b["sparsity"]),
            number(b["error"]),
        )  # fmt: skip
    return out


def size(value: float | None) -> str:
    """Bytes in decimal units: 113.2 MB."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def number(value: float | None) -> str:
    """Four digits that matter."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def ratio(now: float | None, before: float | None) -> str:
    return "-" if now is None or not before else f"{now / before:.2f}x"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _finite(value: Any) -> Any:
    """The same value with NaN and infinities as None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What a part can be now, and its colour (light enough for dark text, saturated enough on black).
COLOURS = {
    "kept": "#9aa5b1", "8 bits": "#4f9cd9", "5-7 bits": "#3fb3a3", "4 bits": "#58b368", "2-3 bits": "#c9b037", "sparse": "#d98c4f", "shared": "#a078d1",
    "dropped": "#00000000", "other": "#cf6f93",
}  # fmt: skip


def _kind(part: dict[str, Any]) -> str:
    treatment, bits = part["treatment"], part["bits"]
    if treatment in ("dropped", "shared"):
        return str(treatment)
    if treatment.startswith("int"):
        stored = int(treatment[3:].split()[0])
        return "8 bits" if stored == 8 else "5-7 bits" if stored > 4 else "4 bits" if stored == 4 else "2-3 bits"
    if treatment.endswith("zeros"):
        return "sparse"
    return "kept" if treatment in ("", "dense", "kept") or bits is None else "other"


def _picture(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """One row a block: its parts as cells, width by bytes before, filled by bytes now; a bar for the error it added."""
    widest = max((b["bytes_before"] for b in blocks), default=1) or 1
    layers = [b["bytes_before"] for b in blocks if b["name"].startswith("layers.")]
    scale = 700 / max(layers or [widest])
    worst = max((b["error"] or 0 for b in blocks), default=0) or 1
    rows = []
    for b in blocks:
        x, cells = 0.0, []
        squeeze = min(1.0, 700 / (b["bytes_before"] * scale or 1))  # an embedding is wider than the page: drawn to the edge
        for p in (p for p in b["parts"] if p["bytes_before"] >= 0.002 * b["bytes_before"]):
            width = p["bytes_before"] * scale * squeeze
            filled = min(1.0, p["bytes_after"] / p["bytes_before"])
            said = f"{b['name']} {p['name']}: {p['treatment'] or 'kept'}, {size(p['bytes_before'])} -> {size(p['bytes_after'])}"
            cells.append({"x": round(x, 1), "w": round(max(width - 1, 0.5), 1), "fill": round(max(width - 1, 0.5) * filled, 1),
                          "colour": COLOURS[_kind(p)], "said": said})  # fmt: skip
            x += width
        error = b["error"]
        rows.append({"name": b["name"], "cells": cells, "squeezed": squeeze < 0.999, "treatment": ", ".join(b["treatment"]),
                     "error": None if error is None else round(150 * min(error / worst, 1), 1), "error_value": error,
                     "before": b["bytes_before"], "after": b["bytes_after"]})  # fmt: skip
    return {"rows": rows, "height": 17 * len(rows) + 6, "any_error": any(r["error"] is not None for r in rows)}


def _tradeoff(r: Report) -> dict[str, Any] | None:
    """Points of size against perplexity, scaled into a 640 x 300 plot; None with fewer than two points."""
    points = [{"name": "dense, bf16", "bytes": r["dense"]["bytes"], "perplexity": r["dense"]["perplexity"], "kind": "dense"}]
    points += [{"name": f"after {s['name']}", "bytes": s["bytes"], "perplexity": s["perplexity"], "kind": "stage"} for s in r["stages"]]
    points += [{**p, "kind": "reference"} for p in r["reference_points"]]
    points.append({"name": "result", "bytes": r["result"]["bytes"], "perplexity": r["result"]["perplexity"], "kind": "result"})
    points = [p for p in points if p["bytes"] and p["perplexity"]]
    if len(points) < 2:
        return None
    left, right, top, bottom = 70, 620, 20, 250
    max_bytes = 1.08 * max(p["bytes"] for p in points)
    low, high = math.log(min(p["perplexity"] for p in points) * 0.96), math.log(max(p["perplexity"] for p in points) * 1.06)
    for p in points:
        p["x"] = round(left + (right - left) * p["bytes"] / max_bytes, 1)
        p["y"] = round(bottom - (bottom - top) * (math.log(p["perplexity"]) - low) / (high - low), 1)
        p["said"] = f"{p['name']}: {size(p['bytes'])}, perplexity {number(p['perplexity'])}"
        p["anchor"] = "end" if p["x"] > 480 else "start"
        p["tx"] = p["x"] - 10 if p["anchor"] == "end" else p["x"] + 10
    ticks_y = [(round(bottom - (bottom - top) * i / 4, 1), number(math.exp(low + (high - low) * i / 4))) for i in range(5)]
    ticks_x = [(round(left + (right - left) * i / 4, 1), size(max_bytes * i / 4)) for i in range(5)]
    return {"points": points, "ticks_x": ticks_x, "ticks_y": ticks_y}


def _curve(values: list[float]) -> dict[str, Any]:
    """A loss curve as the points of a 120 x 40 polyline, from its smallest to its largest value."""
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    points = " ".join(f"{120 * i / (len(values) - 1):.1f},{38 - 36 * (v - low) / spread:.1f}" for i, v in enumerate(values))
    return {"points": points, "first": values[0], "last": values[-1]}


def _where_bytes_go(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes before and now by kind of part: attention, MLP, embedding, the rest."""
    groups: dict[str, list[int]] = {}
    for b in blocks:
        for p in b["parts"]:
            name = p["name"].lower()
            kind = (
                "embedding and head" if "embed" in name or "head" in name or "wte" in name
                else "attention" if "att" in name
                else "MLP" if "mlp" in name or name.startswith("fc")
                else "norms and the rest"
            )  # fmt: skip
            before, after = groups.setdefault(kind, [0, 0])
            groups[kind] = [before + p["bytes_before"], after + p["bytes_after"]]
    total = sum(before for before, _ in groups.values()) or 1
    return [
        {"kind": kind, "before": before, "after": after, "w_before": round(100 * before / total, 2), "w_after": round(100 * after / total, 2)}
        for kind, (before, after) in sorted(groups.items(), key=lambda kv: -kv[1][0])
    ]
