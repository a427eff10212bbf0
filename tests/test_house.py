"""What all methods share, tested once for all: every file of every room, found and not listed."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blockwright import registry
from blockwright.errors import BlockwrightError
from blockwright.recipes.recipe import option_model

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "blockwright").rglob("*.py"))
FILES = {p for room in registry.ROOMS for p in (ROOT / "src" / "blockwright" / room).glob("*.py")}
METHODS = [m for m in registry.methods().values() if m.path in FILES]
STAGES = [m for m in METHODS if m.card["kind"] == "stage"]
LONG = ("iters", "steps", "cycles", "epochs")  # options that only cost time end so: 2 is enough here
every_method = pytest.mark.parametrize("m", METHODS, ids=lambda m: m.slug)
every_stage = pytest.mark.parametrize("m", STAGES, ids=lambda m: m.slug)
every_learning_stage = pytest.mark.parametrize("m", [m for m in STAGES if "calibration" in m.card["needs"]], ids=lambda m: m.slug)
every_file = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src" / "blockwright")))


def imports(path):
    """Dotted names of the modules that a file imports from blockwright, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return {name for name in found if name.split(".")[0] == "blockwright"}


def test_there_are_methods_to_test():
    assert METHODS and STAGES and len({m.slug for m in METHODS}) == len(METHODS)


@every_method
def test_one_name_everywhere(m):
    assert m.slug == m.path.stem.replace("_", "-") and m.card["room"] == m.path.parent.name
    assert m.card["claim"].keys() == {"figure", "against", "where"} and all(m.card["claim"].values())
    assert isinstance(m.card["needs"], list) and all(isinstance(m.card[key], str) for key in ("title", "summary", "saves", "writes"))
    planned = registry.roadmap().get(m.slug)
    assert planned is None or (planned["room"], planned["arxiv"]) == (m.card["room"], m.card["arxiv"])
    assert f"`blockwright reproduce {m.slug}`" in m.docstring and (m.card["arxiv"] or "") in m.docstring


@every_method
def test_a_claim_and_a_test(m):
    claim = next(n for n in ast.parse(m.claim_path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "claim")
    assert [a.arg for a in claim.args.kwonlyargs] == ["seed", "device"] and not claim.args.args
    test = ROOT / "tests" / m.card["room"] / f"test_{m.name}.py"
    assert "\ndef test_" in test.read_text() and "assert" in test.read_text()


@every_method
def test_options_are_documented_and_have_a_schema(m):
    for option in m.options:
        assert option.help, f"{m.slug}: {option.name} has no line in the docstring"
    option_model(m).model_json_schema()


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_method_imports_blocks_its_kernels_and_the_common_file_and_no_other_method(path):
    room = path.parent.name
    stems = {m.path.stem for m in METHODS}
    owner = next((s for s in stems if path.stem.startswith(s + "_")), path.stem)  # <method>_<part>.py is a part of the method
    allowed = (
        "blockwright.blocks",
        "blockwright.errors",
        "blockwright.options",
        f"blockwright.{room}.common",
        f"blockwright.{room}.{owner}",
    )
    for name in imports(path):
        plain = name in ("blockwright", f"blockwright.{room}")
        mine = any(name == a or name.startswith((a + ".", a + "_")) for a in allowed)
        assert plain or mine, f"{path.name} imports {name}"


@every_file
def test_no_pickle_no_foreign_code_no_machine_paths(path):
    text = path.read_text()
    for word in (
        "import pickle",
        "pickle.load",
        "torch.load(",
        "torch.save(",
        "trust_remote_code=True",
        "from __future__ import annotations",
        "/work/",
    ):
        assert word not in text, f"{path}: {word}"
    for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)):
        assert call.func.id not in ("exec", "compile", "__import__")
        assert call.func.id != "eval" or "noqa: S307" in text.splitlines()[call.lineno - 1]


@every_file
def test_every_public_function_says_what_it_does(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.stem == "__init__", f"{path}: no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_no_test_is_excused():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        assert not re.search(r"@pytest\.mark\." + "xfail|pytest" + r"\.xfail\(", path.read_text()), path


# every stage, on a small model


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


def text():
    return torch.randint(0, 80, (6, 12), generator=torch.Generator().manual_seed(1))


def treated(m, model, seed=0, **padded):
    options = {o.name: 2 for o in m.options if o.name.endswith(LONG)}
    return m.load()(model, seed=seed, **({"calibration": text() if m.card["needs"] else None} | padded), **options)


@every_stage
def test_same_seed_same_bits_and_the_input_stays(m):
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first = treated(m, model)
    torch.manual_seed(99)
    torch.rand(7)  # whatever ran before
    second = treated(m, model)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    ids = torch.arange(9)[None]
    logits = first(ids).logits
    assert logits.shape == (1, 9, 80) and bool(torch.isfinite(logits).all())
    assert any(k not in before or not torch.equal(before[k], a[k]) for k in a) or len(a) < len(before)  # it did something


@every_learning_stage
def test_what_padding_holds_does_not_matter(m):
    model, ids, mask = small_model(), text(), torch.ones(6, 12, dtype=torch.int64)
    mask[1, :5] = mask[4, 9:] = 0
    a, b = (treated(m, model, calibration=t, mask=mask).state_dict() for t in (ids, torch.where(mask == 0, 79 - ids, ids)))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_stage
def test_nan_in_the_weights_is_told_by_name(m):
    model = small_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(BlockwrightError, match=r"model\.layers\.2.*nan"):
        treated(m, model)


@every_stage
def test_calibration_that_is_needed_is_asked_for(m):
    if "calibration" in m.card["needs"]:
        with pytest.raises(BlockwrightError, match="needs calibration text"):
            m.load()(small_model())
    else:
        assert treated(m, small_model()) is not None


@every_stage
def test_the_plan_can_be_asked_without_a_run(m):
    defaults = option_model(m)(**{o.name: 0.5 for o in m.options if o.required}).model_dump()
    plan = importlib.import_module(m.module).plan(block_parameters=1_000_000, tokens=1000, **defaults)
    assert plan["copies"] > 0 and plan["passes"] >= 0 and (plan["bits"] is None or 0 < plan["bits"] <= 32)
    assert "options" in inspect.signature(importlib.import_module(m.module).plan).parameters or plan
