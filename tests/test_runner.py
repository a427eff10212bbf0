"""Claims: what is kept of them, what is drawn, and that a miss is a miss."""

import json
import sys
import types
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from blockwright import cli, registry
from blockwright.claims import runner
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.errors import BlockwrightError

NUMBERS = {"measured": 0.5, "target": 0.6, "unit": "of it", "better": "lower"}


@pytest.fixture
def claims(monkeypatch):
    """Methods `a-b`, `c` and `d` whose claims are what the test puts into the returned mapping (functions of seed and device)."""
    real, made = registry.method("finequant"), {}
    known = {}
    for slug in ("a-b", "c", "d"):
        m = registry.Method(slug, f"claims_of_a_test.{slug.replace('-', '_')}", real.path, real.card | {"slug": slug}, "", "", ())
        module = types.ModuleType(m.claim_module)
        module.claim = lambda *, seed, device, slug=slug: made[slug](seed, device)
        monkeypatch.setitem(sys.modules, m.claim_module, module)
        known[slug] = m
    monkeypatch.setitem(sys.modules, "claims_of_a_test", types.ModuleType("claims_of_a_test"))
    monkeypatch.setattr(registry, "methods", lambda: known)
    monkeypatch.setattr(registry.Method, "claim_path", property(lambda self: self.path))
    return made


def bars(**options):
    return Plot(kind="bar", title="Size <b>&</b>", x="what", y="MB", series={"": [("dense", 3.0), ("ours", 1.5)]}, **options)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_met_is_the_comparison_and_nan_never_is(measured, target):
    for better, want in (("higher", measured >= target), ("lower", measured <= target)):
        assert Measured(measured=measured, target=target, unit="", better=better).met == want
        assert not Measured(measured=float("nan"), target=target, unit="", better=better).met


@pytest.mark.parametrize("headline, parts, met", [(0.5, [1, 2], True), (0.7, [1, 2], False), (0.5, [1, 0], False), (0.5, [], True)])
def test_a_claim_is_met_when_every_part_is(headline, parts, met):
    parts = [Measured(measured=p, target=1, unit="", better="higher") for p in parts]
    assert Claim(paper="", **NUMBERS | {"measured": headline}, parts=parts).met is met


def test_what_is_kept(claims, tmp_path):
    def claim(seed, device):
        assert (seed, device) == (3, "cpu")
        part = Measured(name="speed", measured=torch.tensor(2.0).item(), target=3.0, unit="x", better="higher", baseline=1.0)
        row = {"bits": 4, "perplexity": torch.tensor(20.5)}
        return Claim(paper="half of it", **NUMBERS, baseline=1.0, spread=(0.4, 0.6), parts=[part], rows=[row], plot=bars(), notes=["small"])

    claims["a-b"] = claim
    result = runner.reproduce("a-b", seed=3, out=tmp_path)
    kept = json.loads((tmp_path / "cpu" / "a-b.json").read_text())
    assert kept == result
    assert {
        "method",
        "paper",
        "target",
        "measured",
        "unit",
        "better",
        "met",
        "baseline",
        "spread",
        "seconds",
        "device",
        "versions",
        "commit",
    } <= kept.keys()
    assert (kept["method"], kept["paper"], kept["measured"], kept["target"], kept["better"]) == ("a-b", "half of it", 0.5, 0.6, "lower")
    assert (kept["baseline"], kept["spread"], kept["device"], kept["seed"], kept["met"]) == (1.0, [0.4, 0.6], "cpu", 3, False)
    assert kept["parts"] == [
        {"name": "speed", "measured": 2.0, "target": 3.0, "unit": "x", "better": "higher", "baseline": 1.0, "spread": None, "met": False}
    ]
    assert kept["rows"] == [{"bits": 4, "perplexity": 20.5}] and kept["notes"] == ["small"]
    assert kept["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and kept["versions"]["python"]
    assert sorted(p.name for p in (tmp_path / "cpu").iterdir()) == ["a-b.json", "a-b.svg"]


def test_a_result_replaces_the_old_one_and_a_failure_leaves_it(claims, tmp_path):
    claims["c"] = lambda seed, device: Claim(paper="", **NUMBERS)
    runner.reproduce("c", out=tmp_path)
    before = (tmp_path / "cpu" / "c.json").read_text()
    claims["c"] = lambda seed, device: Claim(paper="", **NUMBERS | {"measured": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runner.reproduce("c", out=tmp_path)
    assert (tmp_path / "cpu" / "c.json").read_text() == before


def test_all_are_tried_and_one_that_fails_stops_nothing(claims, tmp_path):
    claims["a-b"] = lambda seed, device: 1 / 0
    claims["c"] = lambda seed, device: Claim(paper="", **NUMBERS)
    claims["d"] = lambda seed, device: Claim(paper="", **NUMBERS | {"measured": 9.0}, baseline=7.0, spread=(8.0, 10.0))
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    assert not runner.reproduce_all(["a-b", "c", "d"], out=tmp_path, console=console)
    said = console.export_text()
    assert "a-b: failed: ZeroDivisionError" in said and sorted(p.name for p in (tmp_path / "cpu").iterdir()) == ["c.json", "d.json"]
    [missed] = [line.split() for line in said.splitlines() if "8 to 10" in line]
    assert missed == ["d", "of", "it", "<=", "0.6", "9", "7", "8", "to", "10", "missed", "0"]
    assert runner.reproduce_all(["c"], out=tmp_path, console=console) and runner.reproduce_all([], out=tmp_path, console=console)
    assert not runner.reproduce_all(["d", "c"], out=tmp_path, console=console)  # a miss is not forgotten
    assert not runner.reproduce_all(["a-b", "c"], out=tmp_path, console=console)  # nor a failure
    with pytest.raises(ZeroDivisionError):  # alone, a bug is a bug
        runner.reproduce_all(["a-b"], out=tmp_path, console=console)


@pytest.mark.parametrize("measured, code", [(0.5, 0), (0.7, 1)])
def test_exit_codes_of_reproduce(claims, tmp_path, monkeypatch, measured, code):
    claims["c"] = lambda seed, device: Claim(paper="", **NUMBERS | {"measured": measured})
    monkeypatch.setattr(cli, "_in_child", lambda *, resume_with: None)
    monkeypatch.setattr(sys, "argv", ["blockwright", "reproduce", "c", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code


def test_where_results_go(claims, tmp_path, monkeypatch):
    claims["c"] = lambda seed, device: Claim(paper="", **NUMBERS)
    monkeypatch.setattr(registry, "CHECKOUT", tmp_path)
    runner.reproduce("c")
    assert (tmp_path / "results" / "cpu" / "c.json").is_file() and registry.results("c")["cpu"]["met"]
    monkeypatch.setattr(registry, "CHECKOUT", None)
    with pytest.raises(BlockwrightError, match="nowhere to write.*Add --out"):
        runner.reproduce("c")
    assert runner.commit() is None


@pytest.mark.parametrize(
    "gpu, name",
    [("NVIDIA H100 80GB HBM3", "h100"), ("Tesla T4", "t4"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_the_short_name_of_a_gpu(monkeypatch, gpu, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert runner.device_name("cuda") == name and runner.device_name("cpu") == "cpu"


def test_a_device_that_is_not_there_is_refused(claims, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BlockwrightError, match=r"device 'cuda': not on this machine. Allowed: cpu. Use --device cpu"):
        runner.reproduce("c", device="cuda", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_method_without_a_claim_says_which_file_to_write(claims, monkeypatch):
    monkeypatch.setattr(registry.Method, "claim_path", None)
    with pytest.raises(BlockwrightError, match="has no claim to reproduce. Write one: claims_of_a_test.c_claim"):
        runner.claim_module("c")


def test_a_scatter_joins_what_no_other_beats():
    drawn = []
    axes = types.SimpleNamespace(plot=lambda x, y, **_: drawn.extend(zip(x, y, strict=True)), scatter=lambda *_, **__: None)
    series = {"ours": [(2, 5.0), (4, 1.0)], "theirs": [(3, 6.0), (3.5, 3.0), (5, 1.0)]}
    runner._scatter(axes, Plot(kind="scatter", title="", x="", y="", series=series))
    assert drawn == [(2, 5.0), (3.5, 3.0), (4, 1.0)]


@pytest.mark.parametrize(
    "plot",
    [
        bars(),
        bars(target=2.0),
        Plot(kind="bar", title="t", x="", y="", series={"ours": [("a", 1), ("b", 2)], "theirs": [("a", 2), ("b", 3)]}, log=True),
        Plot(kind="line", title="t", x="bits", y="", series={"ours": [(2, 5.0), (4, 1.0)], "theirs": [(3, 2.0)]}, target=1.5, log=True),
        Plot(kind="scatter", title="t", x="MB", y="", series={"ours": [(2, 5.0), (4, 1.0)], "theirs": [(3, 6.0)]}, log=True),
    ],
    ids=["bars", "target", "groups", "lines", "scatter"],
)
def test_a_plot_is_svg_and_the_same_every_time(tmp_path, plot):
    for name in ("a.svg", "b.svg"):
        runner.draw(plot, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "<dc:date>" not in text
    ET.fromstring(text)
    assert plot.title in "".join(ET.fromstring(text).itertext())
    if plot.target is not None:
        assert f"target {plot.target:g}" in text
    for name in plot.series:
        assert name in text
