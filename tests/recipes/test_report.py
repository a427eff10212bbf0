"""The report: what it says, drawn to scale, of any report that a run can make; nothing in it is code or fetches anything."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, Decimal
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from blockwright import registry
from blockwright.recipes import drawing, outcome, report
from blockwright.recipes.recipe import load_recipe

MATRICES = {"q": [576, 576], "k": [192, 576], "v": [192, 576], "o": [576, 576], "gate": [1536, 576], "up": [1536, 576], "down": [576, 1536]}
SHAPES = {f"{'self_attn' if n in 'qkvo' else 'mlp'}.{n}_proj": shape for n, shape in MATRICES.items()}
SHAPES |= {"input_layernorm": [576], "post_attention_layernorm": [576]}
OWNERS = {8: 7, 16: 15, 22: 21}
GONE = (10, 24)


def part(name: str, shape: list[int], treatment: str, bits: float, sparsity: float | None = None) -> dict[str, Any]:
    weights = math.prod(shape)
    return {
        "name": name,
        "treatment": treatment,
        "bytes_before": 2 * weights,
        "bytes_after": round(weights * bits / 8),
        "bits": bits,
        "sparsity": sparsity,
        "shape": [*shape],
    }


def block(name: str, treatment: list[str], error: float | None, parts: list[dict[str, Any]]) -> dict[str, Any]:
    before, after = sum(p["bytes_before"] for p in parts), sum(p["bytes_after"] for p in parts)
    return {
        "name": name,
        "label": name,
        "treatment": treatment,
        "bytes_before": before,
        "bytes_after": after,
        "bits": 16 * after / before if before else None,
        "sparsity": sum((p["sparsity"] or 0) * p["bytes_before"] for p in parts) / before if before else None,
        "error": error,
        "parts": parts,
    }


def layer(i: int) -> dict[str, Any]:
    if i in GONE:
        return block(f"layers.{i}", ["dropped"], 1.0, [part(n, s, "dropped", 0) for n, s in SHAPES.items()])
    if i in OWNERS:
        treatment = f"shared with layers.{OWNERS[i]}"
        return block(f"layers.{i}", [treatment], 0.11 + 0.01 * i / 7, [part(n, s, treatment, 0) for n, s in SHAPES.items()])
    parts = []
    for n, s in SHAPES.items():
        if "norm" in n:
            parts.append(part(n, s, "dense", 16.0))
        elif i in (0, 29) or (n == "mlp.down_proj" and i % 4 == 1):
            parts.append(part(n, s, "flexround int8 g64", 8.25, 0.004))
        elif 11 <= i < 15 and n.startswith("mlp"):
            parts.append(part(n, s, "flexround int3 g64", 3.25, 0.1303))
        elif i in (18, 19) and n.startswith("mlp"):
            parts.append(part(n, s, "50% zeros", 16.0, 0.5))
        else:
            parts.append(part(n, s, "flexround int4 g64", 4.25, 0.0612))
    error = 0.004 + 0.03 * math.sin(1.7 * i) ** 2 + (0.03 if 11 <= i < 15 else 0)
    return block(f"layers.{i}", sorted({p["treatment"] for p in parts} - {"dense"}), error, parts)


def smollm2() -> dict[str, Any]:
    """What a run with many different treatments reports: 30 layers, d 576, kv 192, ffn 1536, vocabulary 49152, embedding and head tied."""
    embedding = block("embedding", ["int8 g64"], None, [part("model.embed_tokens", [49152, 576], "int8 g64", 8.25, 0.0105)])
    norm = block("norm", ["kept"], None, [part("model.norm", [576], "dense", 16.0)])
    head = block("head", ["shared with embedding"], None, [])
    kept = [i for i in range(30) if i not in GONE and i not in OWNERS]
    return {
        "format": 1,
        "title": "smollm2-off-grid: foldgpt + dsnot + flexround",
        "model": {
            "name": "smollm2-off-grid",
            "architecture": "LlamaForCausalLM",
            "parameters": 134515008,
            "source_bytes": 538090408,
            "bf16_bytes": 269030016,
        },
        "dense": {"perplexity": 19.62422182137429, "bytes": 269030016, "tokens_per_second": 26.692821479508797, "peak_memory": 676634624},
        "result": {
            "perplexity": 22.262983431224715,
            "kl": 0.12358325004938082,
            "top1": 0.8029411764705883,
            "bytes": 89490408,
            "tokens_per_second": 71.265367317,
            "peak_memory": 310719232,
            "folder": "out/fold",
            "layout": "blockwright",
            "opens_with": 'bw.load("out/fold")',
        },
        "blocks": [embedding, *map(layer, range(30)), norm, head],
        "stages": [
            {
                "name": "foldgpt",
                "options": {"drop": 0.067, "group": 2, "protect": [0, -1], "cure_steps": 60},
                "seconds": 214.4,
                "perplexity": 24.913,
                "kl": 0.2317,
                "top1": 0.7441,
                "bytes": 233630000,
                "curves": {"gates": [3.1 - 0.004 * t for t in range(120)], "cure": [3.4 - 0.01 * t for t in range(60)]},
            },
            {
                "name": "dsnot",
                "options": {"sparsity": 0.5, "targets": ["re:.*layers.1[89].mlp"], "ignore": []},
                "seconds": 33.1,
                "perplexity": 25.87,
                "kl": 0.2514,
                "top1": 0.7303,
                "bytes": 233630000,
                "curves": None,
            },
            {
                "name": "flexround",
                "options": {"bits": 4, "group_size": 64, "lr": 0.003, "overrides": {"re:layers.1[1-4].mlp": {"bits": 3}}},
                "seconds": 418.0,
                "perplexity": 22.301,
                "kl": 0.1229,
                "top1": 0.8044,
                "bytes": 116938000,
                "curves": {f"layers.{i}": [0.02 * (1 + i / 9) * (0.45 + 0.55 * math.exp(-t / 60)) for t in range(250)] for i in kept},
            },
        ],
        "reference_points": [
            {"name": f"round to nearest, {bits} bits", "bytes": size, "perplexity": perplexity}
            for bits, size, perplexity in ((8, 138800000, 19.65), (5, 99020000, 22.91), (4, 85700000, 27.31), (3, 72420000, 114.6))
        ],
        "samples": [
            {
                "prompt": "What is a Python decorator?",
                "dense": "A Python decorator is a small function that takes another function as an argument and returns a new function "
                "that can be used to modify the behavior of another function. This is achieved by using the `@` syntax to define a",
                "result": "A Python decorator is a special type of function that takes another function as an argument and returns a new "
                "function with the same name. It allows you to create a new function with the same attributes as the original",
            },
            {
                "prompt": "Write a haiku about the sea.",
                "dense": "The sea is a mirror that reflects the depths of our souls.",
                "result": "The sun rises in the horizon,\na promise of new beginnings, a promise of the unknown.",
            },
            {"prompt": "2 + 2 =", "dense": "4", "result": "4"},
        ],
        "recipe": "# Fold and round.\nmodel: smollm2-off-grid\nstages:\n  - foldgpt: {drop: 0.067}\nembedding: 8\nout: out/fold\n",
        "command": "blockwright run recipe.yaml",
        "versions": {"python": "3.11.7", "blockwright": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.24.0", "numpy": "2.4.6"},
        "machine": {"cpu": "x86_64", "cores": 2, "memory": 25276502016, "threads": 2},
        "seed": 7,
        "seconds": 731.5,
        "warnings": ["foldgpt: 2 of 30 gates had not settled."],
    }


def small() -> dict[str, Any]:
    """Every kind of entry once."""
    full = smollm2()
    full["blocks"] = [full["blocks"][0], layer(1)]
    full["blocks"][1]["parts"] = full["blocks"][1]["parts"][:2]
    full["stages"] = [full["stages"][0] | {"curves": {"gates": [3.0, 2.5, 2.75]}}]
    full["reference_points"] = full["reference_points"][:1]
    full["samples"] = full["samples"][:1]
    return full


def tall(count: int) -> dict[str, Any]:
    """So many blocks, embedding and head included where there is room."""
    full = smollm2()
    layers = [layer(i % 30) | {"name": f"layers.{i}", "label": f"layers.{i}"} for i in range(count if count < 3 else count - 2)]
    full["blocks"] = layers if count < 3 else [full["blocks"][0], *layers, full["blocks"][-1]]
    return full


def all_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: all_null(v) for k, v in value.items()}
    return [all_null(v) for v in value] if isinstance(value, list) else None


def every_string(value: Any, text: str) -> Any:
    """The report with `text` in each of its strings, names of curves, options and versions included."""
    if isinstance(value, dict):
        return {(k + text if k in FREE_KEYS else k): every_string(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [every_string(v, text) for v in value]
    return value + text if isinstance(value, str) else value


FREE_KEYS = {"gates", "drop", "python"}
LONG = "a_very_long_name_that_never_ends_" * 9
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)></pre></style>{{ 7 * 7 }}&amp;"""
CASES = {
    "smollm2": smollm2,
    "small": small,
    "1 block": lambda: tall(1),
    "2 blocks": lambda: tall(2),
    "100 blocks": lambda: tall(100),
    "null": lambda: all_null(smollm2()),
    "empty": dict,
    "long names": lambda: every_string(small(), LONG),
    "hostile": lambda: every_string(small(), HOSTILE),
}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A page read strictly: every tag closed in turn, no attribute twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]

    def said(self) -> str:
        """All text, and all text in attributes that a reader may see, with single spaces."""
        seen = [self.text, *(v for _, a in self.tags for k, v in a.items() if v and k in ("title", "aria-label"))]
        return re.sub(r"\s+", " ", " ".join(seen))


def page(made: dict[str, Any]) -> Page:
    return Page(report.html(made))


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_the_page_is_balanced_and_needs_nothing_from_outside(make: Any) -> None:
    text = report.html(make())
    read = Page(text)
    assert text.startswith("<!doctype html>")
    names = [tag for tag, _ in read.tags]
    assert not {"link", "img", "iframe", "object", "base", "form", "a", "image", "use"} & set(names)
    assert names.count("script") == 1 and names.count("style") == 1
    for tag, attrs in read.tags:
        assert not {"src", "href", "xlink:href", "srcset", "action"} & attrs.keys(), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert "url(" not in (attrs.get("style") or "")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    policy = next(a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_no_address_stands_in_the_page() -> None:
    assert not re.search(r"https?:|//\w", report.html(smollm2()))


def test_whatever_comes_from_a_model_or_a_prompt_is_text() -> None:
    plain, hostile = page(small()), page(every_string(small(), HOSTILE))
    tags, theirs = ([tag for tag, _ in read.tags] for read in (plain, hostile))
    assert set(theirs) <= set(tags)
    assert all(tags.count(tag) == theirs.count(tag) for tag in ("script", "style", "pre", "h1", "code", "tbody"))
    assert {name for _, a in hostile.tags for name in a} <= {name for _, a in plain.tags for name in a}
    spaced = re.sub(r"\s+", " ", HOSTILE)
    for place in (
        "smollm2-off-grid",
        "What is a Python decorator?",
        "self_attn.q_proj",
        "foldgpt",
        "gates",
        "drop",
        "python",
        "not settled.",
    ):
        assert place + spaced in hostile.said(), place


def significant(value: float, digits: int) -> str:
    """Oracle: decimal arithmetic, half to even, without an exponent."""
    exact = Decimal(value)
    if exact == 0:
        return "0"
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    rounded = exact.quantize(step, ROUND_HALF_EVEN)
    if rounded.adjusted() > exact.adjusted():  # 9.996 -> 10.00: one digit less behind the point
        rounded = exact.quantize(step * 10, ROUND_HALF_EVEN)
    return f"{rounded:,f}"


def in_bytes(value: int) -> str:
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= Decimal(10) ** power * Decimal("0.9995"):
            return f"{significant(value / 10**power, 3)} {unit}"
    return f"{value} B"


def in_percent(value: float) -> str:
    return f"{(Decimal(value) * 100).quantize(Decimal('0.1'), ROUND_HALF_EVEN)} %"


def test_all_numbers_of_the_report_stand_on_the_page() -> None:
    made = smollm2()
    said = page(made).said()
    wanted = {in_bytes(made["model"][key]) for key in ("source_bytes", "bf16_bytes")} | {"134,515,008 parameters", "12.2 min", "25.3 GB"}
    for thing in (made["dense"], made["result"], *made["stages"], *made["reference_points"]):
        wanted |= {significant(thing["perplexity"], 4), in_bytes(thing["bytes"])}
        wanted |= {significant(thing["kl"], 3), in_percent(thing["top1"])} if "kl" in thing else set()
        wanted |= {significant(thing["tokens_per_second"], 3), in_bytes(thing["peak_memory"])} if "peak_memory" in thing else set()
    wanted |= {"3.6 min", "33 s", "7.0 min", "drop: 0.067", "cure_steps: 60", "protect: [0, -1]", "lr: 0.003", '{"bits": 3}'}
    for b in made["blocks"]:
        wanted |= {significant(b["error"], 3)} if b["error"] is not None else set()
        for thing in (b, *b["parts"]):
            wanted |= {in_bytes(thing["bytes_before"]), in_bytes(thing["bytes_after"])}
            wanted |= {significant(thing["bits"], 3)} if thing["bits"] is not None else set()
            wanted |= {in_percent(thing["sparsity"])} if thing["sparsity"] is not None else set()
            wanted |= {" × ".join(map(str, thing["shape"]))} if "shape" in thing else set()
    for s in made["stages"]:
        for losses in (s["curves"] or {}).values():
            wanted.add(f"{significant(losses[0], 3)} → {significant(losses[-1], 3)}")
    assert sorted(w for w in wanted if w not in said) == []
    assert len(wanted) > 100


def test_the_page_holds_what_repeats_the_run_and_what_the_models_wrote() -> None:
    made = smollm2()
    made["stages"][0]["options"] |= {"names": ["é"], "empty": [], "null": None}
    said = page(made).said()
    texts = [
        made["recipe"],
        made["command"],
        *(s[key] for s in made["samples"] for key in ("prompt", "dense", "result")),
        *made["warnings"],
    ]
    for text in texts:
        assert re.sub(r"\s+", " ", text).strip() in said
    for name, value in {**made["versions"], "seed": 7, "threads used": 2, "written to": "out/fold"}.items():
        assert f"{name} {value} " in re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", report.html(made)))
    assert 'names: ["é"]' in said and "empty:" not in said and "null:" not in said
    assert "word for word the same" in said and 'bw.load("out/fold")' in said


def test_a_row_of_numbers_says_what_its_block_holds() -> None:
    text = re.sub(r"<[^>]*>", "|", report.html(smollm2()).replace("&#34;", "'"))
    assert re.search(r"layers\.0\|+flexround int8 g64\|+7\.08 MB\|+3\.65 MB\|+8\.25\|+0\.4 %\|+0\.00400\|", text)
    assert re.search(r"mlp\.down_proj\|+50% zeros\|+576 × 1536\|+1\.77 MB\|+1\.77 MB\|+16\.0\|+50\.0 %\|", text)
    dsnot = r"\|dsnot\|+sparsity: 0\.5\|+targets: \['re:.*layers.1\[89\].mlp'\]\|+33 s\|+234 MB\|+25\.87\|+0\.251\|+73\.0 %\|"
    assert re.search(dsnot, text)
    assert re.search(r"\|as written\|+–\|+89\.5 MB\|+22\.26\|+0\.124\|+80\.3 %\|", text)
    assert re.search(r"\|round to nearest, 3 bits\|+–\|+72\.4 MB\|+114\.6\|+–\|+–\|", text)


def test_the_three_big_numbers_by_hand() -> None:
    made = small()
    made["dense"] |= {"bytes": 250_000_000, "perplexity": 20.0, "tokens_per_second": 40.0}
    made["result"] |= {"bytes": 100_000_000, "perplexity": 23.0, "tokens_per_second": 10.0}
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "|", report.html(made)))
    assert re.search(r"\|Size\|[ |]*250 MB →[ |]*100\|+MB[ |]*2\.50× smaller\|+, 40\.0 % of dense\|", text)
    assert re.search(r"\|Perplexity\|[ |]*20\.00 →[ |]*23\.00[ |]*1\.15× higher\|", text)
    assert re.search(r"\|Tokens per second\|[ |]*40\.0 →[ |]*10\.0[ |]*4\.00× slower\|", text)
    bars = [a["style"] for t, a in page(made).tags if t == "i" and (a.get("style") or "").startswith("width:")]
    assert bars[:6] == ["width:100.0%", "width:40.0%", "width:86.96%", "width:100.0%", "width:100.0%", "width:25.0%"]
    assert "5.95" in page(made).said()  # 8 x 1e8 / 134,515,008 bits a weight


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [(1, 4, "4.00x less"), (4, 1, "4.00x more"), (3, 3, "the same"), (1.001, 1, "the same"), (2000, 1, "2,000x more"), (None, 1, "–"),
     (1, None, "–"), (0, 1, "–"), (1, 0, "–")],
)  # fmt: skip
def test_change(now: float | None, before: float | None, said: str) -> None:
    assert report.change(now, before, "more", "less") == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1.00 kB"), (1152, "1.15 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"),
     (999_499, "999 kB"), (999_500, "1.00 MB"), (7_080_192, "7.08 MB"), (269_030_016, "269 MB"), (3.2e9, "3.20 GB"), (1.4e12, "1.40 TB"),
     (2.5e15, "2,500 TB")],
)  # fmt: skip
def test_size(value: float | None, said: str) -> None:
    assert drawing.size(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0.0, "0"), (0, "0"), (22.3, "22.30"), (22.29996, "22.30"), (9.9999, "10.00"), (99.996, "100.0"), (999.96, "1,000"),
     (9999.4, "9,999"), (9999.6, "10,000"), (1234567.8, "1,234,568"), (134515008, "134,515,008"), (0.0123456, "0.01235"), (-2.5, "-2.500"),
     (1e30, "1e+30")],
)  # fmt: skip
def test_number(value: float | None, said: str) -> None:
    assert drawing.number(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0.0, "0.0 %"), (0.5, "50.0 %"), (0.8029, "80.3 %"), (1, "100.0 %"), (0.00026, "0.03 %"), (0.0006, "0.1 %")],
)
def test_share(value: float | None, said: str) -> None:
    assert report.share(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (30.5, "30 s"),
        (119.4, "119 s"),
        (120, "2.0 min"),
        (7169, "119.5 min"),
        (7200, "2.0 h"),
    ],
)
def test_duration(value: float | None, said: str) -> None:
    assert report.duration(value) == said


@given(st.floats(1e-4, 1e11))
def test_numbers_and_sizes_round_by_less_than_half_a_digit(value: float) -> None:
    assert float(drawing.number(value).replace(",", "")) == pytest.approx(value, rel=0.501e-3)
    amount, unit = drawing.size(value).split()
    if unit != "B":
        assert float(amount) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] == pytest.approx(value, rel=0.501e-2)
        assert 1 <= float(amount) < 1000


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values, containers included."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


PATHS = list(leaves(small()))


def test_any_value_may_be_null_or_missing() -> None:
    assert len(PATHS) > 120
    for path in PATHS:
        made = small()
        at(made, path[:-1])[path[-1]] = None
        said = page(made).said()
        assert not re.search(r"\bNone\b|\bnan\b|\bundefined\b", said), path
        render(report.table(made))
        render(report.block_table(made))
        if isinstance(path[-1], str):
            del at(made, path[:-1])[path[-1]]
            page(made)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_never_printed(bad: float, tmp_path: Path) -> None:
    made = small()
    numbers = [p for p in PATHS if isinstance(at(made, p), float) or (isinstance(at(made, p), int) and p[0] != "format")]
    for path in numbers:
        at(made, path[:-1])[path[-1]] = bad
    report.write(made, tmp_path)
    shown = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    attributes = " ".join(v or "" for _, a in shown.tags for v in a.values())
    assert not re.search(r"\b(nan|inf|infinity)\b", f"{shown.said()} {attributes} {render(report.table(made))}", re.IGNORECASE)
    kept = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
    assert all(at(kept, path) is None for path in numbers) and len(numbers) > 40


def test_the_json_is_the_report(tmp_path: Path) -> None:
    report.write(smollm2(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == smollm2()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_report_is_not_changed() -> None:
    made = smollm2()
    before = copy.deepcopy(made)
    report.html(made)
    render(report.table(made))
    assert made == before


def test_same_report_same_bytes_in_any_process_and_without_torch(tmp_path: Path) -> None:
    report.write(smollm2(), tmp_path)
    code = (
        "import json, sys; from pathlib import Path; from blockwright.recipes import report; folder = Path(sys.argv[1]);"
        "made = json.loads((folder / 'report.json').read_text()); (folder / 'again').mkdir(); report.write(made, folder / 'again');"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONHASHSEED": "123"}, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"
    for name in ("report.html", "report.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_half_a_character_from_a_tokenizer_is_written(tmp_path: Path) -> None:
    made = small()
    made["samples"][0]["result"] = "cut \ud83d"
    report.write(made, tmp_path)
    assert "cut ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


# The picture


def rows(read: Page) -> list[dict[str, Any]]:
    """The rows of the tower from top to bottom: height in px, width in percent, cells with weight, percent that is solid, classes."""
    found: list[dict[str, Any]] = []
    for tag, attrs in read.tags:
        style = dict(part.split(":") for part in (attrs.get("style") or "").split(";") if part)
        classes = (attrs.get("class") or "").split()
        if "row" in classes:
            found.append(
                {"row": int(attrs["data-row"] or ""), "height": float(style["--h"].removesuffix("px")), "cells": [], "error": None}
            )
        elif "cells" in classes:
            found[-1]["width"] = float(style["--w"].removesuffix("%"))
        elif "cell" in classes and "data-part" in attrs:
            cell = {"weight": float(style["flex-grow"]), "hole": style["--hole"], "part": int(attrs["data-part"] or "")}
            found[-1]["cells"].append(cell | {"classes": set(classes) - {"cell"}})
        elif tag == "b" and found and found[-1]["cells"] and "solid" not in found[-1]["cells"][-1]:
            found[-1]["cells"][-1]["solid"] = float(style["width"].removesuffix("%"))
        elif tag == "i" and "--e" in style:
            found[-1]["error"] = float(style["--e"])
    return found


def test_the_picture_is_drawn_to_scale() -> None:
    made = smollm2()
    found = rows(page(made))
    assert [r["row"] for r in found] == list(range(32, -1, -1))  # from the head down to the embedding
    layers = found[2:32]
    assert {(r["height"], r["width"]) for r in layers} == {(17, 100)}
    assert found[32]["height"] == round(17 * 56_623_104 / 7_080_192) == 136 and found[32]["width"] == 100  # the same bytes, the same area
    assert found[1]["width"] == 0.4 and found[1]["height"] == 17  # a norm of 1152 bytes can only just be seen
    (embedding,) = found[32]["cells"]
    assert embedding["solid"] == pytest.approx(100 * 8.25 / 16, abs=0.06) and embedding["classes"] == {"b8"}
    plain = layers[29 - 2]["cells"]  # layers.2: int4
    assert [c["weight"] for c in plain] == [2 * 576 * n for n in (576, 192, 192, 576, 1536, 1536, 1536)]  # norms are too small to be seen
    assert [c["part"] for c in plain] == list(range(7))
    assert all(c["solid"] == pytest.approx(100 * 4.25 / 16, abs=0.06) and c["classes"] == {"b4"} for c in plain)
    assert [c["classes"] for c in layers[29 - 13]["cells"]] == [{"b4"}] * 4 + [{"b3"}] * 2 + [{"b8"}]
    assert all(c["classes"] == {"dropped"} for i in GONE for c in layers[29 - i]["cells"])
    assert all(c["classes"] == {"shared"} for i in OWNERS for c in layers[29 - i]["cells"])
    sparse = layers[29 - 18]["cells"][4]
    assert sparse["classes"] == {"b16", "holes"} and sparse["solid"] == 100
    assert float(sparse["hole"].removesuffix("px")) ** 2 / 5**2 == pytest.approx(0.5, abs=2e-3)  # holes of half the area


def test_error_bars_are_scaled_to_the_worst_block_that_is_left() -> None:
    made = smollm2()
    found = {r["row"] - 1: r["error"] for r in rows(page(made))}  # row 0 is the embedding
    errors = {i: b["error"] for i, b in enumerate(made["blocks"][1:31])}
    worst = max(e for i, e in errors.items() if i not in GONE and i not in OWNERS)
    for i, e in errors.items():
        assert found[i] == pytest.approx(min(e / worst, 1), abs=1e-3)
    assert found[-1] is None
    assert len(page(made).of_class("beyond")) == len(GONE) + len(OWNERS)
    tower = next(a for _, a in page(made).tags if a.get("id") == "tower")
    assert errors[int(tower["data-first"] or "") - 1] == worst  # what is shown before anything is pointed at


def test_a_block_far_larger_than_a_layer_is_cut_and_says_so() -> None:
    made = small()
    made["blocks"][0] = block("embedding", ["kept"], None, [part("wte", [256_000, 2304], "dense", 16.0)])
    made["blocks"][1] = layer(2)
    assert rows(page(made))[1]["height"] == 12 * 26
    assert f"12 rows high here, {2 * 256_000 * 2304 / 7_080_192:.0f} to scale" in page(made).said()


def test_what_is_pointed_at_has_its_numbers() -> None:
    made = smollm2()
    read = page(made)
    tables = {a["id"] for t, a in read.tags if t == "tbody" and "id" in a}
    for r in rows(read):
        assert f"numbers-{r['row']}" in tables
        assert all(c["part"] < max(len(made["blocks"][r["row"]]["parts"]), 1) for c in r["cells"])


def test_blocks_stand_in_the_order_of_the_model_whatever_the_order_of_the_report() -> None:
    made = smollm2()
    made["blocks"] = [*made["blocks"][1:31], made["blocks"][31], made["blocks"][0]]
    text = report.html(made)
    labels = re.findall(r'<span class="label">([^<]*)</span>', text)
    assert labels == ["norm", *(f"layers.{i}" for i in range(29, -1, -1)), "embedding"]


@pytest.mark.parametrize(
    ("treatment", "bits", "css"),
    [("int4 g64", 4.25, "b4"), ("flexround int4 g32", 4.75, "b4"), ("finequant int8 channel", 8.01, "b8"), ("int5 g64", 5.25, "b5"),
     ("int6", 6.5, "b6"), ("int7", 7, "b6"), ("int3 g64", 3.25, "b3"), ("int2", 2.25, "b2"), ("low rank 64", 6.4, "b6"),
     ("low rank 8", 0.7, "b2"), ("low rank 200", 12.0, "b9"), ("dense", 16.0, "b16"), ("dense", 32.0, "b16"), (None, None, "b16"),
     ("sprint3", 8.0, "b8"), ("packed", 4.25, "b4"), ("packed", 15.9, "b16")],
)  # fmt: skip
def test_the_colour_says_the_bits(treatment: str | None, bits: float | None, css: str) -> None:
    made = small()
    made["blocks"] = [block("layers.0", [], None, [part("mlp.up_proj", [64, 64], "", 16.0) | {"treatment": treatment, "bits": bits}])]
    read = page(made)
    assert rows(read)[0]["cells"][0]["classes"] == {css}
    assert [c["class"] for c in read.of_class("cell") if "data-part" not in c] == [
        f"cell {css}"
    ]  # and the legend explains it, nothing else


def test_zeros_that_rounding_leaves_are_no_pruning() -> None:
    for sparsity, holes in ((0.19, False), (0.2, True), (0.99, True), (None, False)):
        made = small() | {"blocks": [block("layers.0", ["int3"], None, [part("mlp.up_proj", [64, 64], "int3", 3.25, sparsity)])]}
        assert ("holes" in rows(page(made))[0]["cells"][0]["classes"]) == holes


def test_a_block_with_one_shared_part_is_not_shared() -> None:
    parts = [part("self_attn.k_proj", [64, 64], "shared with layers.0", 0), part("mlp.up_proj", [64, 64], "int4 g64", 4.25)]
    made = small() | {"blocks": [block("layers.1", ["int4 g64", "shared with layers.0"], None, parts)]}
    for treatment in (["int4 g64", "shared with layers.0"], ["shared with layers.0", "dropped"]):
        made["blocks"][0]["treatment"] = treatment
        assert [c["classes"] for c in rows(page(made))[0]["cells"]] == [{"shared"}, {"b4"}]
    for treatment in ("shared with layers.0", "dropped"):
        made["blocks"][0]["treatment"] = [treatment]
        assert [c["classes"] for c in rows(page(made))[0]["cells"]] == [{treatment.split()[0]}] * 2


def test_a_part_that_grew_is_full() -> None:
    made = small() | {"blocks": [block("layers.0", ["dense"], None, [part("mlp.up_proj", [64, 64], "dense", 32.0)])]}
    assert rows(page(made))[0]["cells"][0]["solid"] == 100


def test_the_legend_explains_what_is_drawn_and_nothing_else() -> None:
    text = re.sub(r"<[^>]*>", "|", report.html(smollm2()))
    legend = [w for w in re.split(r"[|\n]+", text[text.index("16 bits or more") : text.index("error added")]) if w]
    assert legend[:6] == ["16 bits or more", "8 bits", "4 bits", "3 bits", "zeros (holes: their share)", "shared, stored elsewhere"]
    assert legend[6:] == ["dropped", "q", "k", "v", "o", "gate", "up", "down", "now"]


# The plot


def test_the_plot_by_hand() -> None:
    made = small() | {"stages": [], "reference_points": []}
    made["dense"] |= {"bytes": 1000, "perplexity": 10.0}
    made["result"] |= {"bytes": 250, "perplexity": 20.0}
    circles = {a["cy"]: a["cx"] for t, a in page(made).tags if t == "circle"}
    margin = 0.12 * math.log(2)
    top, bottom = math.log(20) + margin, math.log(10) - margin
    y = {v: round(300 * (top - math.log(v)) / (top - bottom), 1) for v in (10, 20)}
    assert circles == {str(y[10]): f"{round(100 / 1.06, 2)}%", str(y[20]): f"{round(25 / 1.06, 2)}%"}
    grid = {a["y1"] for a in page(made).of_class("grid") if a["x1"] == "0"}
    assert {str(y[10]), str(y[20])} <= grid  # round values


def test_a_reference_far_above_does_not_flatten_the_plot() -> None:
    made = smollm2()
    circles = [(a["cx"], float(a["cy"] or 0)) for t, a in page(made).tags if t == "circle"]
    assert len(circles) == 1 + 3 + 1 + 4
    assert "as written: 89.5 MB, perplexity 22.26" in page(made).said()  # what pointing at it says
    assert min(y for _, y in circles) == 8 and "round to nearest, 3 bits ↑ 114.6" in page(made).said()
    assert max(y for _, y in circles) - sorted(y for _, y in circles)[1] > 180


def test_a_model_that_fell_apart_is_left_out_of_the_plot() -> None:
    made = smollm2()
    made["stages"][1]["perplexity"] = 1e308
    circles = [a for t, a in page(made).tags if t == "circle"]
    assert len(circles) == 1 + 2 + 1 + 4 and "1e+308" in page(made).said()


@pytest.mark.parametrize("keep", [0, 1])
def test_no_plot_without_two_points(keep: int) -> None:
    made = all_null(smollm2())
    if keep:
        made["dense"] |= {"bytes": 10, "perplexity": 3.0}
    assert not page(made).of_class("plot")
    made["dense"] |= {"bytes": 10, "perplexity": 3.0}
    made["result"] |= {"bytes": 5, "perplexity": 3.0}
    assert page(made).of_class("plot")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**12), st.floats(1, 1e40), st.text(st.characters(codec="utf-8"), max_size=50)), min_size=1, max_size=12
    ),
    st.integers(0, 4),
)
def test_the_plot_holds_all_points_and_no_label_covers_another(points: list[tuple[int, float, str]], num_stages: int) -> None:
    made = small()
    made["stages"] = [{"name": name, "bytes": size, "perplexity": perplexity} for size, perplexity, name in points[:num_stages]]
    made["reference_points"] = [{"name": name, "bytes": size, "perplexity": perplexity} for size, perplexity, name in points[num_stages:]]
    tags = page(made).tags
    circles = [(760 * float((a["cx"] or "").removesuffix("%")) / 100, float(a["cy"] or "")) for t, a in tags if t == "circle"]
    assert len(circles) == 2 + len(points)
    assert all(0 <= x <= 760 and 0 <= y <= 300 for x, y in circles)
    labels = [a for t, a in tags if t == "text" and a.get("class") == "halo"]
    anchors = [760 * float((a["x"] or "").removesuffix("%")) / 100 + float(a["dx"] or "") for a in labels]
    spots = [(x, float(a["y"] or "") + float(a["dy"] or ""), a["text-anchor"]) for x, a in zip(anchors, labels, strict=True)]
    read = [len(text) * 7.2 for text in re.findall(r'<text class="halo"[^>]*>([^<]*)', report.html(made)) if "&" not in text]
    for width, (x, _, anchor) in zip(read, spots, strict=False) if len(read) == len(spots) else ():
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[str(anchor)]
        assert left >= -0.1 and left + width <= 760.1
    for i, (x, y, anchor) in enumerate(spots):
        for x2, y2, anchor2 in spots[:i]:
            assert anchor != anchor2 or abs(y - y2) >= 13 or x != x2


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9), st.integers(2, 9))
def test_round_values_are_even_and_inside(low: float, width: float, count: int) -> None:
    values = drawing._round_values(low, low + width, count)
    steps = [b - a for a, b in pairwise(values)]
    assert len(values) <= count + 1
    assert all(low - width * 1e-6 <= v <= low + width * (1 + 1e-6) for v in values)
    assert all(s == pytest.approx(steps[0], rel=1e-4, abs=1e-6) for s in steps)
    assert len(values) >= count // 3


def test_axis_values() -> None:
    assert drawing._round_values(0, 285, 6) == [0, 50, 100, 150, 200, 250]
    assert drawing._log_values(18, 29) == pytest.approx([18, 20, 22, 24, 26, 28])
    assert drawing._log_values(0.9, 60) == pytest.approx([1, 2, 5, 10, 20, 50])
    assert drawing._log_values(1, 2e30) == pytest.approx([1e0, 1e4, 1e8, 1e12, 1e16, 1e20, 1e24, 1e28])


# Curves, bytes, samples


def test_curves() -> None:
    (a, b) = report._curves({"a": [4.0, None, 2.0, 1.0], "one": [3.0], "none": None, "b": [-1.0, 1.0]})
    assert a == {"name": "a", "points": "0.0,1.00 50.0,20.00 100.0,29.50", "first": "4.00", "last": "1.00", "change": "−75 %"}
    assert b["points"] == "0.0,39.00 100.0,1.00" and b["change"] == ""
    (long,) = report._curves({"long": [float(i % 7) for i in range(5001)]})
    pairs = [tuple(map(float, p.split(","))) for p in long["points"].split()]
    assert len(pairs) == 99 and pairs[0][0] == 0 and pairs[-1][0] == 100 and (long["first"], long["last"]) == ("0", "2.00")
    (flat,) = report._curves({"flat": [0.0, 0.0]})
    assert flat["points"] == "0.0,39.00 100.0,39.00"


def test_where_the_bytes_go_by_hand() -> None:
    made = smollm2()
    made["blocks"] = [made["blocks"][0], layer(2)]
    got = {r["kind"]: r for r in report._where_bytes_go(made["blocks"])["rows"]}
    total = 56_623_104 + 7_080_192
    assert list(got) == ["embedding and head", "attention", "MLP", "norms and the rest"]
    assert got["attention"]["before"] == "1.77 MB" and got["attention"]["after"] == "470 kB"
    assert got["MLP"]["widths"] == (round(100 * 5_308_416 / total, 3), round(100 * 1_410_048 / total, 3))
    assert got["embedding and head"]["part_before"] == "88.9 %" and got["norms and the rest"]["before"] == "2.30 kB"
    assert got["attention"]["part_after"] == f"{100 * 470_016 / (29_196_288 + 1_880_064 + 2304):.1f} %"
    assert sum(r["widths"][0] for r in got.values()) == pytest.approx(100, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("attention", ["layers.0.self_attn.q_proj", "h.0.attn.c_attn", "layer.0.attention.output.dense"]),
     ("MLP", ["layers.0.mlp.up_proj", "h.0.mlp.c_fc", "layer.0.intermediate.dense", "layer.0.output.dense", "layers.0.fc1",
              "layers.0.block_sparse_moe.experts.3.w1"]),
     ("embedding and head", ["wte", "embeddings.word_embeddings", "model.embed_tokens", "lm_head"]),
     ("norms and the rest", ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "h.0.ln_1", "layers.0.self_attn.q_norm",
                             "layers.0.rotary"])],
)  # fmt: skip
def test_kinds_of_parts(kind: str, names: list[str]) -> None:
    assert {report._kind(name) for name in names} == {kind}


@pytest.mark.parametrize(
    ("dense", "result", "same"),
    [("the cat sat", "the car sat", "the "), ("the cat", "the cat sat", "the "), ("x\ny z", "x\ny w", "x\ny "), ("abc", "abd", ""),
     ("a b", "a b", "a b"), (None, "a", ""), ("a", None, ""), ("", "a", ""), (None, None, "–")],
)  # fmt: skip
def test_a_sample_is_cut_where_the_answers_part(dense: str | None, result: str | None, same: str) -> None:
    got = report._sample({"prompt": "p", "dense": dense, "result": result})
    assert got["same"] == same
    assert got["same"] + got["dense"] == (dense or "–") and got["same"] + got["result"] == (result or "–")
    assert got["equal"] == (dense is not None and dense == result)


@given(st.text("ab \n", max_size=20), st.text("ab \n", max_size=20))
def test_no_word_of_a_sample_is_lost(dense: str, result: str) -> None:
    got = report._sample({"prompt": "p", "dense": dense, "result": result})
    assert got["same"] + got["dense"] == (dense or "–") and got["same"] + got["result"] == (result or "–")


# The terminal


def render(renderable: Any) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_table_for_the_terminal() -> None:
    lines = [line.split() for line in render(report.table(smollm2())).splitlines() if line.strip()]
    assert lines[0] == ["smollm2-off-grid:", "foldgpt", "+", "dsnot", "+", "flexround"]
    assert ["size", "269", "MB", "89.5", "MB", "3.01x", "smaller"] in lines
    assert ["perplexity", "19.62", "22.26", "1.13x", "higher"] in lines
    assert ["decoding,", "tokens/s", "26.7", "71.3", "2.67x", "faster"] in lines
    assert ["peak", "memory", "677", "MB", "311", "MB", "2.18x", "less"] in lines
    assert ["same", "top", "choice", "as", "dense", "80.3", "%"] in lines
    assert ["flexround", "7.0", "min", "117", "MB", "22.30", "0.123", "80.4", "%"] in lines
    assert render(report.table(smollm2())).isascii()


def test_one_stage_needs_no_table_of_stages() -> None:
    assert "after stage" not in render(report.table(small()))


def test_the_table_of_blocks() -> None:
    lines = [line.split() for line in render(report.block_table(smollm2())).splitlines()]
    assert len(lines) == 1 + 33
    assert ["layers.10", "dropped", "7.08", "MB", "0", "B", "0", "0.0", "%", "1.00"] in lines
    assert ["embedding", "int8", "g64", "56.6", "MB", "29.2", "MB", "8.25", "1.1", "%", "-"] in lines


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/nothing]", "\x1b[31mred", "a\x07b\rc"])
def test_names_are_no_markup_and_no_control_codes(name: str) -> None:
    made = every_string(smollm2(), name)
    for text in (render(report.table(made)), render(report.block_table(made))):
        assert re.sub(r"[\x00-\x1f]", " ", name) in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_the_comparison_stands_beside_a_run_on_the_same_model_and_text_and_no_other():
    job = {"model": "smollm2-off-grid", "stages": ["finequant"], "out": "out"}
    rows = {f"{row['model']}, {row['size']}": row for row in registry.results("comparison")["cpu"]["rows"]}
    perplexity = rows.pop("dense, bf16")["perplexity"]
    points = {p["name"]: p for p in outcome.reference_points(load_recipe(job), perplexity * 1.0001)}
    assert points.keys() == rows.keys() and "GPTQ of llm-compressor, 4 bits" in points
    for name, point in points.items():
        assert point["bytes"] == pytest.approx(1e6 * rows[name]["MB"], abs=1) and point["perplexity"] == rows[name]["perplexity"]
    made = small() | {"reference_points": list(points.values())}
    assert all(name in report.html(made) for name in rows)
    others = [{"num": 8}, {"num": 16, "length": 128}, {"num": 16, "text": "other.txt"}]
    for change in [{"model": "smollm2"}, *({"evaluation": text} for text in others)]:
        assert outcome.reference_points(load_recipe(job | change), perplexity) == []
    assert outcome.reference_points(load_recipe(job), perplexity * 1.01) == outcome.reference_points(load_recipe(job), None) == []
