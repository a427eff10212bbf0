"""Methods are found by being in a room, or by an entry point, and read without importing them."""

import json
import subprocess
import sys

import pytest

from blockwright import registry
from blockwright.errors import BlockwrightError

GOOD = '''"""What it does."""
CARD = {"slug": "an-example", "room": "data", "kind": "data", "title": "t", "arxiv": "1", "summary": "s", "saves": "n", "needs": [],
        "writes": "w", "claim": {"figure": "f", "against": "a", "where": "w"}}
import torch_that_is_not_there

def an_example(x, *, count: Positive = 3, names: list[str] = ["a"], share: Share, bare=None):
    """Do it.

    x : what it works on.
    count, share : how many of
        them.
    names : a list.
    Returns nothing.
    """
'''


def read(tmp_path, text):
    (tmp_path / "an_example.py").write_text(text)
    return registry.read(tmp_path / "an_example.py", "somewhere.an_example")


def test_a_method_is_read_without_being_imported(tmp_path):
    m = read(tmp_path, GOOD)
    assert (m.slug, m.name, m.docstring) == ("an-example", "an_example", "What it does.")
    assert m.function.startswith("Do it.")
    assert [(o.name, o.annotation, o.default, o.required, o.help) for o in m.options] == [
        ("count", "Positive", 3, False, "how many of them."),
        ("names", "list[str]", ["a"], False, "a list."),
        ("share", "Share", None, True, "how many of them."),
        ("bare", "Any", None, False, ""),
    ]


def test_a_class_gives_the_options_of_its_init(tmp_path):
    text = GOOD.replace("def an_example(x, *,", "class Example:\n  def __init__(self, x, *,").replace(
        '"slug"', '"public": "Example", "slug"'
    )
    text = text.replace('    """Do it.', '    """Do it.').replace("\n    ", "\n      ")
    assert [o.name for o in read(tmp_path, text).options] == ["count", "names", "share", "bare"]


def test_a_file_without_a_card_is_no_method(tmp_path):
    assert read(tmp_path, '"""Shared by the methods of this room."""\nx = 1\n') is None


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"kind": "data"', '"kind": "dada"', "kind='dada'"),
        ('"room": "data"', '"room": "attic"', "room='attic'"),
        ('"arxiv": "1", ', "", "CARD lacks arxiv"),
        ('"kind": "data"', '"kind": "stage"', "lacks accepts, leaves"),
        ('"slug": "an-example"', '"slug": str(1)', "not made of plain literals"),
        ("def an_example", "def another", "no public function or class an_example"),
        ("count: Positive = 3", "count: Positive = f()", "a default of an_example is no plain literal"),
        ("def an_example(", "def an_example((", "line 6"),
    ],
)
def test_a_file_that_breaks_the_house_form_is_told(tmp_path, old, new, said):
    assert old in GOOD
    with pytest.raises(BlockwrightError, match=r"an_example\.py: .*CONTRIBUTING") as told:
        read(tmp_path, GOOD.replace(old, new))
    assert said in str(told.value)


def test_an_unknown_slug_gets_the_nearest_and_a_planned_one_is_said_to_be_planned():
    assert registry.method("finequant").card["room"] == "compress"
    with pytest.raises(BlockwrightError, match="Did you mean 'finequant'"):
        registry.method("finquant")
    planned = next(slug for slug in registry.roadmap() if slug not in registry.methods())
    with pytest.raises(BlockwrightError, match="not built yet"):
        registry.method(planned)


def test_the_roadmap_holds_every_method_once_in_a_room_of_the_house():
    plan = registry.roadmap()
    assert len(plan) == 71 and {p["room"] for p in plan.values()} == set(registry.ROOMS)
    assert all(p["title"] and (p["arxiv"] is None or len(p["arxiv"]) == 10) for p in plan.values())
    for slug, m in registry.methods().items():
        if m.module.startswith("blockwright.") and slug in plan:
            assert m.card["room"] == plan[slug]["room"]


def test_results_are_read_by_device_and_a_damaged_one_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "CHECKOUT", tmp_path)
    for device, text in {"cpu": '{"measured": 1}', "h100": '{"measured": 2}', "t4": '{"measured":'}.items():
        (tmp_path / "results" / device).mkdir(parents=True)
        (tmp_path / "results" / device / "gla.json").write_text(text)
    assert registry.results("gla") == {"cpu": {"measured": 1}, "h100": {"measured": 2}} and registry.results("mos") == {}
    assert "t4/gla.json is damaged" in capsys.readouterr().err


# methods of another package


def python(code, env):
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def test_other_packages_add_methods_which_are_found_without_importing_anything(plugin):
    done = python(
        "import sys; from blockwright import registry; m = registry.methods();"
        "print(sorted(s for s in m if s.startswith('example')), m['finequant'].module, m['example-damp'].options[0].help);"
        "print([n for n in sys.modules if n.startswith(('blockwright_example', 'torch'))])",
        plugin,
    )
    assert done.stdout.splitlines() == [
        "['example-damp', 'example-slow'] blockwright.compress.finequant what weights are multiplied by, a positive number.",
        "[]",
    ]
    assert "example-broken is left out" in done.stderr and "not made of plain literals" in done.stderr
    assert "example-missing is left out: module blockwright_example.nowhere: not found" in done.stderr
    assert "finequant is left out: finequant is blockwright.compress.finequant already" in done.stderr


def test_their_claims_lie_beside_them(plugin):
    done = python(
        "from blockwright import registry as r; print(r.method('example-damp').claim_path, r.method('example-slow').claim_path.name)",
        plugin,
    )
    assert done.stdout.split() == ["None", "slow_claim.py"]


def test_a_recipe_and_the_package_itself_know_them(plugin, tmp_path):
    code = (
        "import json; from blockwright.recipes.recipe import load_recipe as load;"
        "r = load({'model': 'm', 'out': 'o', 'stages': [{'example-damp': {'factor': 2}}]}); print(json.dumps(r.stages[0].options));"
        "import blockwright as bw, torch, transformers as t;"
        "c = t.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1);"
        "m = t.LlamaForCausalLM(c); d = bw.example_damp(m, factor=4.0);"
        "print(torch.equal(d.model.layers[0].mlp.up_proj.weight, 4 * m.model.layers[0].mlp.up_proj.weight))"
    )
    first, last = python(code, plugin).stdout.splitlines()
    assert json.loads(first) == {"factor": 2.0, "targets": ["Linear"]} and last == "True"
