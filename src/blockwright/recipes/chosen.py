"""What `fit` chose, for the report: what each part got and of what, the sizes that were solved for, three sentences. Needs no torch."""

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NamedTuple

from blockwright.recipes.drawing import BITS, MISSING, Number, Report, bits_class, draw, size

LOW_RANK = "low rank, coloured as bits of the same bytes"
GONE = "no longer there"
SMALLEST = 1e-7  # nats: less is written with an exponent


class Offer(NamedTuple):
    """What a linear or the embedding could become: its name, what that adds to the loss in nats a token, its bytes."""

    label: str
    cost: Number
    bytes: Number


class Round(NamedTuple):
    """What was predicted and measured of a choice, in nats a token; its bytes; by how much a better one might be missed."""

    predicted: Number | None
    measured: Number | None
    bytes: Number | None
    gap: Number | None


def view(stage: Report) -> dict[str, Any] | None:
    """All that the template shows of a stage's details, as text and coordinates. None where they are not those of `fit`.

    Whatever is missing in them, or is not what it should be, is left out.
    """
    details = _dict(stage.get("details"))
    rounds = [Round(*(_number(r.get(key)) for key in Round._fields)) for r in map(_dict, _list(details.get("rounds")))]
    kept = min((r for r in rounds if r.measured is not None), key=lambda r: r.measured or 0, default=next(iter(rounds), None))
    front = sorted((b, cost) for cost, b in _tuples(details.get("front"), 0))
    uniform = [Offer(*found) for found in _tuples(details.get("uniform"), 1)]
    shown = {
        "grid": _grid(_list(details.get("blocks")), _dict(details.get("embedding"))),
        "said": _said(rounds, kept, _number(details.get("megabyte")), _dict(stage.get("options"))),
        "plot": _plot(front, uniform, kept) if front or uniform else None,
        "numbers": [(f"best of {size(b)}", size(b), nats(cost)) for b, cost in front]
        + [(f"{o.label} everywhere", size(o.bytes), nats(o.cost)) for o in uniform],
    }
    return shown if any(shown.values()) else None


def nats(value: Number | None) -> str:
    """Three digits that matter, without an exponent where that can be read: 0.0000123."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{Decimal(f'{value:.2e}'):f}" if SMALLEST <= abs(value) < 1e6 else f"{value:.2e}"


# what each part got


def _grid(blocks: list[Any], embedding: Report) -> dict[str, Any] | None:
    """A row a block, from output (top) to input, the embedding below; a column a kind of linear."""
    named = [{_place(name): _dict(about) for name, about in _dict(_dict(b).get("linears")).items()} for b in blocks]
    kinds = list(dict.fromkeys(kind for linears in named for _, kind in linears))
    if not kinds:
        return None
    path = next(path for linears in named for path, _ in linears)
    rows: list[dict[str, Any]] = []
    every: list[list[dict[str, Any]]] = []
    for i, (block, linears) in enumerate(zip(blocks, named, strict=True)):
        found = {kind: _cell(f"{path}.{i} {kind}", about) for (_, kind), about in linears.items()}
        cells = [found.get(kind) or _gone(f"{path}.{i} {kind}") for kind in kinds]
        every.append(cells)
        words = "; ".join(filter(None, map(_option, _list(_dict(block).get("options")))))
        rows.append({"label": f"{path}.", "index": i, "cells": cells, "bytes": size(_sum(found.values())), "words": words})
    head = _cell("embedding", embedding) if embedding else None
    shown = [cell for cells in every for cell in cells] + ([head] if head else [])
    low = any(cell["css"].endswith(" low") for cell in shown)
    known = {cell["words"] for cell in shown}
    return {
        "kinds": [_short(kind, kinds) for kind in kinds],
        "rows": rows[::-1],
        "embedding": head,
        "legend": [(css, words) for _, css, words in BITS[::-1] if words in known]
        + ([("b16 low", LOW_RANK)] if low else [])
        + ([("dropped", GONE)] if GONE in known else []),
        "low": low,
        "words": any(row["words"] for row in rows),
    }


def _place(name: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj -> layers, mlp.up_proj."""
    found = re.fullmatch(r"(?:.*?\.)?([^.]+)\.\d+\.(.+)", str(name))
    return (found[1], found[2]) if found else ("block", str(name))


def _short(kind: str, kinds: list[str]) -> str:
    """The last part of a kind's name, where no other kind has the same."""
    last = kind.rpartition(".")[2]
    return last.removesuffix("_proj") if sum(k.rpartition(".")[2] == last for k in kinds) == 1 else kind


def _cell(name: str, about: Report) -> dict[str, Any]:
    """What a linear became, coloured by its bits; `said` lists what it was offered, a line each, the chosen one marked."""
    chosen = _text(about.get("chosen"))
    offers = [Offer(*found) for found in _tuples(about.get("offers"), 1)]
    mine = next((o for o in offers if o.label == chosen), None)
    largest = max((o.bytes for o in offers), default=0)  # the dense one, which is always offered
    low = chosen.startswith("rank ")
    _, css, words = bits_class({"bits": 16 * mine.bytes / largest if mine else None} if low else {"treatment": chosen})
    lines = [f"{'▸' if o is mine else '·'} {o.label}: {nats(o.cost)} nats, {size(o.bytes)}" for o in _worth(offers, mine)]
    return {
        "text": _brief(chosen),
        "css": f"{css} low" if low else css,
        "said": "\n".join([f"{name}: {chosen or MISSING}", *lines]),
        "words": words,
        "bytes": mine.bytes if mine else None,
        "taken": size(mine.bytes if mine else None),
    }


def _gone(name: str) -> dict[str, Any]:
    return {"text": "", "css": "dropped", "said": f"{name}: {GONE}", "words": GONE, "bytes": 0}


def _sum(cells: Iterable[dict[str, Any]]) -> Number | None:
    """The bytes of all, where they are known."""
    taken = [cell["bytes"] for cell in cells]
    return None if None in taken else sum(taken)


def _worth(offers: list[Offer], chosen: Offer | None) -> list[Offer]:
    """The offers that no other one beats in both bytes and loss, and the chosen one: from the largest down."""
    kept: list[Offer] = []
    least = math.inf
    for offer in sorted(offers, key=lambda o: (o.bytes, o.cost)):
        if offer.cost < least or offer is chosen:
            kept.append(offer)
        least = min(least, offer.cost)
    return kept[::-1]


def _brief(treatment: str) -> str:
    """int4 g64 -> 4·64, rank 192 int8 g64 -> r192·8."""
    if found := re.fullmatch(r"int(\d+) g(\d+)", treatment):
        return f"{found[1]}·{found[2]}"
    if found := re.fullmatch(r"rank (\d+)(?: int(\d+) g\d+)?", treatment):
        return f"r{found[1]}" + (f"·{found[2]}" if found[2] else "")
    return (treatment if len(treatment) <= 9 else treatment[:8] + "…") or MISSING


def _option(option: Any) -> str:
    """`ffn: width 1152` in words."""
    found = re.fullmatch(r"(attention|ffn): (heads|width|linear|none) ?(\d*)", _text(option))
    if found is None:
        return _text(option)
    part = {"attention": "attention", "ffn": "feed-forward"}[found[1]]
    count, unit = int(found[3] or 0), {"heads": "key head", "width": "channel"}.get(found[2])
    if unit is None:
        return f"{part}: {'one linear' if found[2] == 'linear' else 'none'}"
    return f"{part}: {count:,} {unit}{'' if count == 1 else 's'}"


# in words


def _said(rounds: list[Round], kept: Round | None, megabyte: Number | None, options: Report) -> list[str]:
    """What was predicted and measured, what one more megabyte would save, and how near to the best the choice is, a sentence each."""
    said = []
    if kept is not None and kept.predicted is not None:
        learnt = ", before its rounding was learnt" if options.get("cure_steps") else ""
        measured = "" if kept.measured is None else f"; measured on the calibration text{learnt}, it adds {nats(kept.measured)}"
        others = [(i, r) for i, r in enumerate(rounds, 1) if r is not kept and None not in (r.predicted, r.measured)]
        rest = "".join(f" Round {i}: {nats(r.predicted)} predicted, {nats(r.measured)} measured." for i, r in others)
        which = f"Round {rounds.index(kept) + 1} was kept: it" if others else "The choice"
        said.append(f"{which} was predicted to add {nats(kept.predicted)} nats a token{measured}.{rest}")
    if megabyte is not None and megabyte >= 0:
        said.append(f"One more megabyte would save {f'{nats(megabyte)} nats a token' if megabyte else 'nothing'}, as predicted.")
    if kept is not None and kept.gap is not None and kept.gap >= 0:
        best = "No other choice of this size is predicted to add less"
        part = f", {100 * kept.gap / kept.predicted:.2g} % of it" if kept.predicted and kept.predicted > 0 else ""
        said.append(f"{best} by more than {nats(kept.gap)} nats{part}." if kept.gap else f"{best}: that is proven.")
    return said


# the front


def _plot(front: list[tuple[Number, Number]], uniform: list[Offer], kept: Round | None) -> dict[str, Any] | None:
    """The best choice of each size as a line, single settings as dots, the choice as predicted and as measured."""
    points: list[Report] = [{"kind": "front", "name": "", "said": "best choice", "bytes": b, "value": cost} for b, cost in front]
    points += [{"kind": "reference", "name": o.label, "said": f"{o.label} everywhere", "bytes": o.bytes, "value": o.cost} for o in uniform]
    if kept is not None:
        for kind, name, value in (("result", "measured", kept.measured), ("predicted", "predicted", kept.predicted)):
            points.append({"kind": kind, "name": name, "said": f"the choice, {name}", "bytes": kept.bytes, "value": value})
    smallest = min(p["bytes"] for p in points if (p["bytes"] or 0) > 0)
    return draw(points, "{} nats", path=("front",), form=nats, start=0.9 * smallest)


# what may be anything


def _dict(value: Any) -> Report:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _text(value: Any) -> str:
    return " ".join(value.split())[:60] if isinstance(value, str) else ""


def _number(value: Any) -> Number | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e99 else None


def _tuples(value: Any, names: int) -> list[Any]:
    """The entries that are so many names, then a loss and bytes."""
    found = []
    for entry in map(_list, _list(value)):
        texts, numbers = [_text(t) for t in entry[:names]], [_number(v) for v in entry[names:]]
        if all(texts) and len(numbers) == 2 and None not in numbers and (numbers[1] or 0) > 0:
            found.append((*texts, *numbers))
    return found
