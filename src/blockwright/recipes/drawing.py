"""What the parts of a report are drawn with: numbers in words, colours by bits, points and a line with labels that do not collide."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Report = dict[str, Any]  # JSON, format 1: what recipes/execute.py gathers. Any value may be null, and any key may be missing
Number = int | float
MISSING = "–"

# Colour says how many bits a weight takes now: the smallest class that holds them. Names of CSS classes and words for the legend.
BITS = (
    (2, "b2", "2 bits or less"),
    (3, "b3", "3 bits"),
    (4, "b4", "4 bits"),
    (5, "b5", "5 bits"),
    (7, "b6", "6 or 7 bits"),
    (8, "b8", "8 bits"),
    (15, "b9", "9 to 15 bits"),
    (math.inf, "b16", "16 bits or more"),
)
PLOT_WIDTH, PLOT_HEIGHT = 760, 300  # px; labels are placed for this width, the drawing itself stretches


def size(value: Number | None) -> str:
    """Bytes in decimal units, three digits that matter: 113 MB, 7.08 MB."""
    if value is None:
        return MISSING
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{number(float(value), 3)} {units[0]}"


def number(value: Number | None, digits: int = 4) -> str:
    """As many digits as matter, the zeros among them too: 22.30; all digits before the point, and all of an integer: 1,024."""
    if value is None:
        return MISSING
    if abs(value) >= 1e15:
        return f"{value:.{digits}g}"
    if isinstance(value, int) or value == 0 or abs(value) >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{value:#,.{digits}g}".removesuffix(".")


def bits_class(thing: Report) -> tuple[Number, str, str]:
    """The colour of a part: the bits that its treatment names (`int4 g64`), else the average bits it stores."""
    named = re.search(r"\bint(\d+)\b", thing.get("treatment") or "")
    bits = float(named[1]) if named else thing.get("bits")
    return BITS[-1] if bits is None else next(c for c in BITS if round(bits) <= c[0])


def draw(
    points: list[Report], value: str, *, path: tuple[str, ...], form: Callable[[Number | None], str], start: Number = 0
) -> dict[str, Any] | None:
    """Size against a value (log): x in percent, so that it stretches, y in pixels. None with fewer than two points.

    points : each with kind, name (its label), said (pointed at), bytes, value. value : in words. path : kinds that a line joins. form : of
    values. start : bytes at the left edge.
    A reference far above all else is drawn at the upper edge with its value, so that it does not flatten the rest.
    """
    points = [p for p in points if (p.get("bytes") or 0) > 0 and 1e-99 < (p.get("value") or 0) < 1e99]
    if len(points) < 2:
        return None
    widest = max(p["bytes"] for p in points)
    widest += 0.06 * (widest - start)
    logs = [math.log(p["value"]) for p in points]
    edge = max((v for v, p in zip(logs, points, strict=True) if p["kind"] != "reference"), default=math.inf) + math.log(1.4)
    low, high = min(logs), max(v for v in logs if v <= edge)
    margin = max(0.12 * (high - low), 0.02)
    low, high = low - margin, high + margin * (1 if max(logs) <= edge else 2)

    def x(size: Number) -> float:
        return round(100 * (size - start) / (widest - start), 2)

    def y(value: Number) -> float:
        return round(PLOT_HEIGHT * (high - math.log(value)) / (high - low), 1)

    shown = [
        {
            "kind": p["kind"],
            "mark": p.get("mark") or "",
            "x": x(p["bytes"]),
            "y": y(p["value"]) if v <= edge else 8,
            "name": p["name"] if v <= edge else f"{p['name']} ↑ {form(p['value'])}",
            "said": f"{p['said']}: {size(p['bytes'])}, {value.format(form(p['value']))}",
        }
        for p, v in zip(points, logs, strict=True)
    ]
    line = list(pairwise(p for p in shown if p["kind"] in path))
    floor = next((p["y"] for p in shown if p["kind"] == "dense"), None)
    _place_labels(shown, line, floor)
    drawn_last = ("front", "reference", "dense", "stage", "result", "predicted")
    return {
        "points": sorted(shown, key=lambda p: drawn_last.index(p["kind"])),
        "path": line,
        "x": [(x(v), re.sub(r"\.0+ ", " ", size(v))) for v in _round_values(start, widest, 6)],
        "y": [(y(v), f"{v:,g}") for v in _log_values(math.exp(low), math.exp(high))],
        "floor": floor,
        "height": PLOT_HEIGHT,
    }


def _place_labels(points: list[dict[str, Any]], path: list[tuple[dict[str, Any], dict[str, Any]]], floor: Number | None) -> None:
    """Give each point a label beside it that covers nothing, or none: the table below names them all."""

    def around(x: Number, y: Number, reach: Number) -> tuple[Number, Number, Number, Number]:
        return x * PLOT_WIDTH / 100 - reach, y - reach, x * PLOT_WIDTH / 100 + reach, y + reach

    taken = [around(p["x"], p["y"], 9) for p in points] + ([(0, floor, PLOT_WIDTH, floor)] if floor is not None else [])
    for a, b in path:
        taken += [around(a["x"] + (b["x"] - a["x"]) * i / 40, a["y"] + (b["y"] - a["y"]) * i / 40, 1) for i in range(41)]
    for p in sorted(points, key=lambda p: ("result", "predicted", "dense", "stage", "reference", "front").index(p["kind"])):
        label = p["name"] if len(p["name"]) <= 34 else p["name"][:33] + "…"
        x, y, width = p["x"] * PLOT_WIDTH / 100, p["y"], 7.2 * len(label)
        p["label"] = ""
        right, left, middle = x + 14, x - 14 - width, x - width / 2
        for anchor, dx, dy, start in (
            ("start", 14, 4, right),
            ("end", -14, 4, left),
            ("middle", 0, -14, middle),
            ("middle", 0, 23, middle),
            ("start", 10, -16, x + 10),
            ("end", -10, 22, x - 10 - width),
            ("start", 10, 22, x + 10),
            ("end", -10, -16, x - 10 - width),
        ):
            box = (start, y + dy - 10, start + width, y + dy + 3)
            clear = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
            if clear and box[0] >= 0 and box[2] <= PLOT_WIDTH and box[1] >= -12 and box[3] <= PLOT_HEIGHT:
                taken.append(box)
                p |= {"label": label, "anchor": anchor, "dx": dx, "dy": dy}
                break


def _round_values(low: Number, high: Number, count: int) -> list[Number]:
    """At most `count` + 1 round values in [low, high], evenly spaced."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_values(low: Number, high: Number) -> list[Number]:
    """Round values for a logarithmic axis: 1, 2, 5 times powers of ten where at least three fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    if len(values) > 9:
        values = [10.0**k for k in powers if low <= 10.0**k <= high]
        values = values[:: -(-len(values) // 9)]
    return values if len(values) >= 3 else _round_values(low, high, 6)
