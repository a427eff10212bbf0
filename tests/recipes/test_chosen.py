"""What the report shows of `fit`: cells and their offers, the front, the sentences; of any details at all, and nothing in them is code."""

import copy
import json
import math
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jobs import recipe
from test_report import HOSTILE, LONG, SHAPES, Page, all_null, at, every_string, in_bytes, leaves, small

import blockwright as bw
from blockwright.recipes import chosen, report

LINEARS = [name for name in SHAPES if name.endswith("_proj")]


def offers(name: str, scale: float = 1.0) -> list[list[Any]]:
    """Dense and five grids of a linear of SmolLM2: fewer bits, more loss."""
    n, k = SHAPES[name]
    grids = [[f"int{b} g{g}", scale * 4.0**-b * (1 + g / 999), n * k * b // 8 + 2 * n * k // g + 16] for b in range(2, 9) for g in (32, 64)]
    return [
        ["dense", 0.0, 2 * n * k],
        *grids,
        ["rank 192", 0.07 * scale, 400 * (n + k)],
        ["rank 192 int8 g64", 0.0701 * scale, 200 * (n + k)],
    ]


def details(blocks: int = 30) -> dict[str, Any]:
    """What `fit` tells of a model of SmolLM2's shapes."""
    picks = ["int3 g64", "int4 g64", "int4 g32", "int8 g64", "dense", "rank 192", "rank 192 int8 g64"]
    return {
        "rounds": [
            {"predicted": 0.297, "measured": 0.39, "bytes": 74_999_000, "gap": 0.0001},
            {"predicted": 0.333, "measured": 0.324, "bytes": 75_000_000, "gap": 0.0002},
        ],
        "blocks": [
            {
                "options": [],
                "linears": {
                    f"model.layers.{i}.{name}": {"chosen": picks[(i + j) % len(picks)], "offers": offers(name, 0.001 * (i + 1))}
                    for j, name in enumerate(LINEARS)
                },
            }
            for i in range(blocks)
        ],
        "embedding": {"chosen": "int5 g64", "offers": [["dense", 0.0, 56_623_104], ["int5 g64", 0.01, 18_600_000]]},
        "megabyte": 0.0223,
        "front": [[0.9, 60_000_000], [0.2, 80_000_000], [0.01, 120_000_000]],
        "uniform": [["dense", 0.0, 269_030_016], ["int4 g64", 0.35, 113_000_000], ["int3 g64", 1.2, 99_000_000]],
    }


def made(found: Any, **options: Any) -> dict[str, Any]:
    """The report of a run of `fit` that told this."""
    return small() | {"stages": [{"name": "fit", "options": options, "bytes": 75_000_000, "perplexity": 24.0, "details": found}]}


def page(found: Any, **options: Any) -> Page:
    return Page(report.html(made(found, **options)))


def bare(found: Any) -> Page:
    """The page of a report that holds nothing else."""
    return Page(report.html({"stages": [{"name": "fit", "details": found}]}))


def tiny() -> dict[str, Any]:
    """Every kind of entry once or twice."""
    found = details(2)
    for block in found["blocks"]:
        block["linears"] = {name: about | {"offers": about["offers"][:3]} for name, about in list(block["linears"].items())[:2]}
    found["blocks"][0]["options"] = ["ffn: width 1152"]
    return found


def cells(read: Page) -> list[dict[str, str]]:
    """The cells of linears and the embedding, from the top: name, chosen, classes, lines of offers."""
    found = []
    for tag, attrs in read.tags:
        if tag == "td" and attrs.get("title"):
            head, *lines = str(attrs["title"]).split("\n")
            name, _, picked = head.partition(": ")
            found.append({"name": name, "chosen": picked, "css": str(attrs["class"]), "offers": lines})
    return found  # type: ignore[return-value]


# what each part got


def test_a_cell_a_linear_from_output_to_input_and_the_embedding_below() -> None:
    found = details()
    shown = cells(page(found))
    want = [
        (f"layers.{i} {name}", found["blocks"][i]["linears"][f"model.layers.{i}.{name}"]["chosen"])
        for i in range(29, -1, -1)
        for name in LINEARS
    ]
    assert [(c["name"], c["chosen"]) for c in shown] == [*want, ("embedding", "int5 g64")]
    text = report.html(made(found))
    head = re.search(r'<table class="got".*?</thead>', text, re.DOTALL)
    assert head is not None and re.findall(r"<th(?: [^>]*)?>([^<]*)", head[0]) == ["", "q", "k", "v", "o", "gate", "up", "down", "bytes"]


@pytest.mark.parametrize(
    ("treatment", "text", "css"),
    [("int4 g64", "4·64", "b4"), ("int3 g128", "3·128", "b3"), ("int2 g32", "2·32", "b2"), ("int5 g64", "5·64", "b5"),
     ("int6 g64", "6·64", "b6"), ("int8 g64", "8·64", "b8"), ("dense", "dense", "b16"), ("rank 192", "r192", "b9 low"),
     ("rank 64 int8 g64", "r64·8", "b4 low"), ("something else", "somethin…", "b16"), (None, "–", "b16")],
)  # fmt: skip
def test_a_cell_says_and_shows_what_the_linear_became(treatment: str | None, text: str, css: str) -> None:
    found = tiny()
    every = [["dense", 0.0, 1600], ["rank 192", 0.1, 1000], ["rank 64 int8 g64", 0.2, 400]]  # as bits: 16, 10, 4
    found["blocks"] = [{"options": [], "linears": {"h.0.up_proj": {"chosen": treatment, "offers": every}}}]
    html = report.html(made(found))
    assert re.findall(r'<td class="([^"]*)" title="h\.0[^"]*">([^<]*)</td>', html) == [(css, text)]
    legend = [a["class"] for a in Page(html).of_class("cell") if "data-part" not in a]
    assert f"cell {css.split()[0]}" in legend and ("cell b16 low" in legend) == ("low" in css) and "cell dropped" not in legend


def test_the_offers_of_a_cell_by_hand() -> None:
    every = [["int4 g64", 0.00012345, 188_000], ["dense", 0.0, 664_000], ["int4 g32", 0.0002, 190_000], ["int2 g64", 0.0123, 93_312]]
    found = tiny()
    found["blocks"] = [{"options": [], "linears": {"model.layers.0.mlp.up_proj": {"chosen": "int4 g64", "offers": every}}}]
    assert cells(page(found))[0]["offers"] == [
        "· dense: 0 nats, 664 kB",
        "▸ int4 g64: 0.000123 nats, 188 kB",
        "· int2 g64: 0.0123 nats, 93.3 kB",
    ]
    found["blocks"][0]["linears"]["model.layers.0.mlp.up_proj"]["chosen"] = "int4 g32"  # which is worse, and was chosen all the same
    assert cells(page(found))[0]["offers"][1:3] == ["▸ int4 g32: 0.000200 nats, 190 kB", "· int4 g64: 0.000123 nats, 188 kB"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=12), st.integers(0, 11))
def test_only_offers_that_none_beats_are_listed(pairs: list[tuple[int, int]], pick: int) -> None:
    every = [[f"int{i} g1", cost, size] for i, (cost, size) in enumerate(pairs)]
    name = f"int{pick % len(pairs)} g1"
    found = {"blocks": [{"linears": {"a.0.b": {"chosen": name, "offers": every}}}]}
    (cell,) = cells(bare(found))
    listed = {line[2:].partition(":")[0] for line in cell["offers"]}
    beaten = {a for a, c, s in every if any(c2 <= c and s2 <= s and (c2, s2) != (c, s) for _, c2, s2 in every)}
    assert listed - {name} <= {a for a, _, _ in every} - beaten and name in listed
    assert {tuple(o[1:]) for o in every if o[0] in listed} >= {tuple(o[1:]) for o in every if o[0] not in beaten}
    assert len({tuple(o[1:]) for o in every if o[0] in listed - {name}}) == len(listed - {name})  # equal ones once
    assert [line[0] for line in cell["offers"]].count("▸") == 1


def test_bytes_of_a_row_are_the_sum_of_what_was_chosen() -> None:
    found = details()
    text = report.html(made(found))
    for i in (0, 17):
        sizes = [
            next(size for label, _, size in about["offers"] if label == about["chosen"]) for about in found["blocks"][i]["linears"].values()
        ]
        row = re.search(rf'<span>layers\.</span>{i}</th>.*?<td class="n">([^<]*)</td>', text, re.DOTALL)
        assert row is not None and row[1] == in_bytes(sum(sizes))
    assert '<td class="n">18.6 MB</td>' in text


@pytest.mark.parametrize(
    ("option", "words"),
    [("ffn: width 1152", "feed-forward: 1,152 channels"), ("attention: heads 1", "attention: 1 key head"),
     ("attention: heads 2", "attention: 2 key heads"), ("ffn: none", "feed-forward: none"), ("attention: linear", "attention: one linear"),
     ("moe: fewer", "moe: fewer")],
)  # fmt: skip
def test_subblocks_of_another_shape_are_told_at_the_end_of_the_row(option: str, words: str) -> None:
    found = details(2)
    found["blocks"][1]["options"] = [option]
    assert re.findall(r'<td class="words">([^<]*)</td>', report.html(made(found))) == [words, "", ""]
    assert 'class="words"' not in report.html(made(details(2)))


def test_a_linear_that_is_gone_is_an_empty_cell() -> None:
    found = details(2)
    found["blocks"][1] |= {"options": ["ffn: none"], "linears": dict(list(found["blocks"][1]["linears"].items())[:4])}
    read = page(found)
    gone = [c for c in cells(read) if c["css"] == "dropped"]
    assert [(c["name"], c["chosen"]) for c in gone] == [(f"layers.1 mlp.{n}_proj", "no longer there") for n in ("gate", "up", "down")]
    assert "cell dropped" in [a["class"] for a in read.of_class("cell") if "data-part" not in a] and len(cells(read)) == 15


def test_kinds_of_linears_with_the_same_last_name_keep_their_whole_names() -> None:
    names = ["attention.output.dense", "output.dense", "intermediate.up"]
    found = {"blocks": [{"linears": {f"layer.0.{n}": {"chosen": "dense", "offers": [["dense", 0, 8]]} for n in names}}]}
    text = report.html(made(found))
    assert all(f"<th>{n}</th>" in text for n in ("attention.output.dense", "output.dense", "up"))


def test_the_page_stays_light() -> None:
    plain = len(report.html(made(None)).encode())
    assert len(report.html(made(details(30))).encode()) - plain < 200_000
    assert len(report.html(made(details(60))).encode()) < 400_000


# in words


def test_what_is_said_by_hand() -> None:
    said = page(details()).said()
    assert "Round 2 was kept: it was predicted to add 0.333 nats a token; measured on the calibration text, it adds 0.324. " in said
    assert "Round 1: 0.297 predicted, 0.390 measured." in said
    assert "One more megabyte would save 0.0223 nats a token, as predicted." in said
    assert "No other choice of this size is predicted to add less by more than 0.000200 nats, 0.06 % of it." in said


def test_what_is_said_of_one_round_that_is_proven() -> None:
    found = details() | {"rounds": [{"predicted": 0.25, "measured": 0.5, "bytes": 9, "gap": 0.0}], "megabyte": 0.0}
    said = page(found).said()
    assert "The choice was predicted to add 0.250 nats a token; measured on the calibration text, it adds 0.500. One" in said
    assert "would save nothing" in said and "No other choice of this size is predicted to add less: that is proven." in said
    assert "measured on the calibration text, before its rounding was learnt, it adds 0.500" in page(found, cure_steps=20).said()
    said = page(found | {"megabyte": None, "rounds": [{"predicted": 0.25}]}).said()
    assert "The choice was predicted to add 0.250 nats a token." in said and "megabyte" not in said and "No other choice" not in said


@given(st.floats(1e-7, 9.9e5))
@example(0.0000123)
def test_nats_have_three_digits_and_no_exponent(value: float) -> None:
    text = chosen.nats(value)
    assert re.fullmatch(r"[\d.]+", text) and Decimal(text) == Decimal(f"{value:.2e}")
    assert [chosen.nats(v) for v in (None, 0.0, 1e-9, -0.5)] == ["–", "0", "1.00e-09", "-0.500"]


# the front


def test_the_front_by_hand() -> None:
    found = {
        "front": [[1.0, 100], [0.1, 200]],
        "uniform": [["int4 g64", 0.5, 180]],
        "rounds": [{"predicted": 0.2, "measured": 0.3, "bytes": 150}],
    }
    base = len([t for t, _ in page(None).tags if t == "circle"])
    read = page(found)
    circles = [(a["cx"], a["cy"], a["r"]) for t, a in read.tags if t == "circle"]
    start, widest = 90, 200 + 0.06 * 110
    margin = 0.12 * math.log(10)
    top, height = margin, 2 * margin + math.log(10)

    def spot(size: float, loss: float, r: int) -> tuple[str, str, str]:
        return f"{round(100 * (size - start) / (widest - start), 2)}%", f"{round(300 * (top - math.log(loss)) / height, 1)}", str(r)

    want = [spot(100, 1.0, 3), spot(200, 0.1, 3), spot(180, 0.5, 5), spot(150, 0.3, 9), spot(150, 0.2, 5)]
    assert circles[: len(circles) - base] == want
    line, *rest = read.of_class("path")
    assert len(rest) == len(page(None).of_class("path"))
    assert (line["x1"], line["y1"], line["x2"], line["y2"]) == (*want[0][:2], *want[1][:2])
    said = read.said()
    assert "int4 g64 everywhere: 180 B, 0.500 nats" in said and "the choice, measured: 150 B, 0.300 nats" in said
    assert "the choice, predicted: 150 B, 0.200 nats" in said and "best choice: 100 B, 1.00 nats" in said
    labels = re.findall(r'<text class="halo"[^>]*>([^<]*)', report.html(made(found)))
    assert {"int4 g64", "measured", "predicted"} <= set(labels)


def test_every_size_and_setting_stands_in_numbers() -> None:
    text = re.sub(r"<[^>]*>", "|", report.html(made(details())))
    assert re.search(r"\|best of 60\.0 MB\|+60\.0 MB\|+0\.900\|", text)
    assert re.search(r"\|int4 g64 everywhere\|+113 MB\|+0\.350\|", text) and re.search(r"\|dense everywhere\|+269 MB\|+0\|", text)


def test_no_front_is_drawn_where_there_is_none() -> None:
    assert "The best of each size" not in page(details() | {"front": [], "uniform": []}).said()
    assert "The best of each size" in page(details() | {"front": []}).said()
    assert "The best of each size" in page(details() | {"uniform": []}).said()
    assert "What each part got" in page(details() | {"front": [], "uniform": []}).said()


# any details at all


@pytest.mark.parametrize("found", [None, [], {}, "text", 7, {"gates": [1, 2]}, {"blocks": 3, "front": {"a": 1}, "rounds": [None, 5]}])
def test_details_of_other_stages_leave_the_page_as_it_is(found: Any) -> None:
    assert report.html(made(found)) == report.html(made(None))


JUNK = (None, "x", "", [], {}, True, -1, 0, 10**400, math.nan, math.inf, 1e308, [[]], [None, None, None], {"a": {}})


def test_any_value_of_the_details_may_be_missing_or_something_else() -> None:
    paths = list(leaves(tiny()))
    assert len(paths) > 80
    for n, path in enumerate(paths):
        for junk in (JUNK[n % len(JUNK)], None) if len(path) > 2 else JUNK[n % 2 :: 2]:
            found = tiny()
            at(found, path[:-1])[path[-1]] = copy.deepcopy(junk)
            assert not re.search(r"\b(None|nan|inf|undefined)\b", bare(found).said()), (path, junk)
        if isinstance(path[-1], str):
            found = tiny()
            del at(found, path[:-1])[path[-1]]
            bare(found)
    bare(all_null(tiny()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "chosen", "offers", "linears", "options"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from([*tiny(), "more"]), JSON))
def test_details_may_be_any_json(found: Any) -> None:
    bare(found)


@pytest.mark.parametrize("more", [HOSTILE, LONG])
def test_whatever_the_details_hold_is_text(more: str) -> None:
    found = every_string(tiny(), more)
    for block in found["blocks"]:
        block["linears"] = {name + more: about for name, about in block["linears"].items()}
    plain, hostile = page(tiny()), page(found)
    assert [tag for tag, _ in hostile.tags if tag in ("script", "img", "style", "pre")] == [
        tag for tag, _ in plain.tags if tag in ("script", "img", "style", "pre")
    ]
    assert {name for _, a in hostile.tags for name in a} <= {name for _, a in plain.tags for name in a}
    assert len(cells(hostile)) == len(cells(plain)) and re.sub(r"\s+", " ", f"self_attn.q_proj{more}") in hostile.said()


def test_the_details_are_not_changed_and_any_number_of_stages_may_have_them() -> None:
    found = details(2)
    before = copy.deepcopy(found)
    twice = made(found)
    twice["stages"].append(twice["stages"][0])
    assert Page(report.html(twice)).text.count("What each part got") == 2 and found == before


# a run


def test_a_run_of_fit_shows_what_stands_in_the_folder(home: Any) -> None:
    bw.run(recipe({"fit": {"bits_per_weight": 9.0, "bits": [3, 4, 8], "group_sizes": [32], "samples": 0, "refine": 1, "front": 3}}))
    written = json.loads((home / "cheaper" / "report.json").read_text())
    read = Page((home / "cheaper" / "report.html").read_text(encoding="utf-8"))
    parts = {f"{b['name']} {p['name']}": p for b in written["blocks"] for p in b["parts"]}
    shown = cells(read)
    assert len(shown) == 3 * 7 + 1
    for cell in shown[:-1]:
        assert parts[cell["name"]]["treatment"] == cell["chosen"]
        assert [line for line in cell["offers"] if line.startswith(f"▸ {cell['chosen']}: ")] and len(cell["offers"]) >= 3
    assert "was predicted to add" in read.said() and "One more megabyte would save" in read.said()
    assert len(read.of_class("front")) == 3
