"""Recipes: what is wrong is told in one line, with the thing, what is allowed and the cure, before torch is imported."""

import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockwright import registry
from blockwright.errors import BlockwrightError
from blockwright.recipes import recipe as recipes
from blockwright.recipes.recipe import load_recipe, option_model

PLAIN = {"model": "smollm2", "out": "out/x", "stages": ["finequant"]}


def yaml_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults_are_filled_in_and_the_text_is_kept(tmp_path):
    text = "model: smollm2  # a comment\nstages:\n  - finequant: {bits: 3}\nout: out/x\n"
    r = load_recipe(yaml_file(tmp_path, text))
    assert (r.model, str(r.out), r.seed, r.dtype, r.export, r.embedding) == ("smollm2", "out/x", 0, "bf16", "auto", None)
    assert (r.calibration.text, r.calibration.num, r.calibration.length, r.evaluation.num) == ("pydoc", 64, 256, 16)
    assert r.stages[0].options["bits"] == 3 and r.stages[0].options["group_size"] == 64 and r.source_text == text


def test_a_mapping_and_a_file_say_the_same_and_out_can_be_replaced(tmp_path):
    (tmp_path / "r.yaml").write_text("model: smollm2\nstages: [finequant]\nout: out/x\n")
    a, b = load_recipe(tmp_path / "r.yaml"), load_recipe(PLAIN)
    assert a.model_copy(update={"source_text": ""}) == b.model_copy(update={"source_text": ""})
    assert load_recipe(PLAIN, out=tmp_path).out == tmp_path


def test_checking_a_recipe_imports_no_torch():
    code = f"import sys; from blockwright.recipes.recipe import load_recipe as l; l({PLAIN!r});"
    code += "print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    "text, said",
    [
        ("model: a\nmodel: b\nout: o\nstages: []\n", r"recipe\.yaml line 2: the key 'model' stands twice"),
        ("model: a\nstages:\n - finequant:\n    bits: 4\n    bits: 3\n", r"line 5: the key 'bits' stands twice"),
        ("model: a\nstages:\n\t- finequant\n", r"line 3: indented with a tab. Allowed: spaces"),
        ("model: !!python/object/apply:os.system ['true']\n", r"line 1: the tag .*python/object/apply:os.system is not allowed"),
        ("model: a\nout: !!python/name:os.system\n", r"line 2: the tag .* is not allowed"),
        ("model: !mine a\n", r"line 1: the tag !mine is not allowed"),
        ("a: &x [1, 2]\nb: [*x, *x]\n", r"line 1: anchors and aliases are not allowed"),
        ("model: *x\n", r"line 1: anchors and aliases"),
        ("<<: {model: a}\nout: o\n", r"line 1: a key must be a plain word"),
        ("? [a, b]\n: c\n", r"line 1: a key must be a plain word"),
        ("model: [a\nout: b\n", r"recipe\.yaml line 2: "),
        ("- model\n- out\n", r"not a mapping"),
        ("", r"not a mapping"),
        ("[" * 100_000, r"recipe\.yaml.*: not YAML"),
        ("seed: " + "9" * 10_000, r"recipe\.yaml.*: not YAML"),
        (b"model: \xff\xfe\n", r"not UTF-8 \(byte 7\)"),
        ("model: \x00\n", r"recipe\.yaml.*special characters"),
        ("#" * (2**20 + 1), r"1048577 bytes. Allowed: a recipe of at most 1048576 bytes"),
    ],
)
def test_yaml_that_is_not_plain_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(BlockwrightError, match=said) as told:
        load_recipe(yaml_file(tmp_path, text))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"modle": "x"}, r"recipe: unknown option modle. Allowed: model, stages, out, .* Did you mean 'model'\?"),
        ({"model": None}, r"recipe: model=None. Allowed: a valid string"),
        ({"stages": ["fineqant"]}, r"method 'fineqant': unknown. Did you mean 'finequant'\?"),
        ({"stages": ["gla"]}, r"'gla': on the roadmap, not built yet"),
        ({"stages": "finequant"}, r"stages is 'finequant'. Allowed: a list"),
        ({"stages": [{"finequant": {}, "dsnot": {}}]}, r"Allowed: a name, or one name with its options"),
        ({"stages": [3]}, r"stage 3. Allowed"),
        ({"stages": [{"finequant": {"bitz": 4}}]}, r"finequant: unknown option bitz. Allowed: bits, .* Did you mean 'bits'\?"),
        ({"stages": [{"finequant": {"bits": "many"}}]}, r"finequant: bits='many'. Allowed: "),
        ({"stages": [{"finequant": {"group_size": -2}}]}, r"finequant: group_size=-2. Allowed: "),
        ({"stages": [{"finequant": ["bits"]}]}, r"finequant: \['bits'\]. Allowed: "),
        ({"stages": [{"finequant": {"targets": ["re:("]}}]}, r"finequant.targets: 're:\(' is no regular expression"),
        ({"stages": [{"finequant": {"overrides": {"re:[": {"bits": 8}}}}]}, r"overrides: 're:\[' is no regular expression"),
        ({"stages": [{"finequant": {"overrides": {"down_proj": {"bts": 8}}}}]}, r"overrides\['down_proj'\]: unknown option bts.*'bits'"),
        ({"stages": [{"finequant": {"overrides": {"down_proj": {"group_size": -5}}}}]}, r"overrides\['down_proj'\]: group_size=-5"),
        (
            {"stages": [{"finequant": {"overrides": {"down_proj": {"ignore": []}}}}]},
            r"overrides\['down_proj'\]: ignore says where, not how",
        ),
        ({"stages": [{"finequant": {"overrides": {"down_proj": 8}}}]}, r"overrides.down_proj=8. Allowed: "),
        ({"calibration": {"num": 0}}, r"calibration.num=0. Allowed: "),
        ({"calibration": {"length": 1}}, r"calibration.length=1. Allowed: "),
        ({"evaluation": {"nmu": 4}}, r"unknown option evaluation.nmu. Allowed: text, num, length. Did you mean 'num'\?"),
        ({"measure": {"speed_": True}}, r"unknown option measure.speed_"),
        ({"embedding": 7}, r"embedding=7. Allowed: "),
        ({"export": "gguff"}, r"export='gguff'. Allowed: .*'auto'"),
        ({"dtype": "int8"}, r"dtype='int8'. Allowed: 'bf16', 'fp16' or 'fp32'"),
        ({"seed": -1}, r"seed=-1. Allowed: greater than or equal to 0"),
        ({"seed": 1.5}, r"seed=1.5. Allowed: a valid integer"),
        ({"threads": 0}, r"threads=0. Allowed: greater than or equal to 1"),
        ({"memory": "8"}, r"memory='8'. Allowed: a number with KB, MB, GB"),
        ({"memory": 8}, r"memory=8. Allowed: a number with KB, MB, GB"),
        ({"memory": "much GB"}, r"memory='much GB'. Allowed: "),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(change, said):
    with pytest.raises(BlockwrightError, match=said) as told:
        load_recipe(PLAIN | change)
    assert "\n" not in str(told.value) and "pydantic" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize("key", ["model", "out", "stages"])
def test_what_is_missing_is_named(key):
    with pytest.raises(BlockwrightError, match=f"recipe: {key} is missing. Give `{key}:`"):
        load_recipe({k: v for k, v in PLAIN.items() if k != key})


@pytest.mark.parametrize("memory", ["8GB", "500 MB", "1.5GiB", "640kb"])
def test_memory_is_a_number_with_a_unit(memory):
    assert load_recipe(PLAIN | {"memory": memory}).memory == memory


def test_overrides_are_options_for_some_layers():
    options = {"bits": 4, "overrides": {"re:.*down_proj": {"bits": 8}, "model.layers.0": {"group_size": -1}}}
    r = load_recipe(PLAIN | {"stages": [{"finequant": options}]})
    assert r.stages[0].options["overrides"] == options["overrides"]


# the order of stages


def stage_method(slug, accepts, leaves):
    real = registry.method("finequant")
    return registry.Method(slug, real.module, real.path, real.card | {"slug": slug, "accepts": accepts, "leaves": leaves}, "", "", ())


@pytest.fixture
def three_stages(monkeypatch):
    made = {
        "prune": stage_method("prune", ["dense"], "dense"),
        "pack": stage_method("pack", ["dense"], "packed"),
        "share": stage_method("share", ["dense", "packed"], "packed"),
    }
    monkeypatch.setattr(registry, "methods", lambda: made)


def test_pruning_after_packing_is_refused_with_the_reason(three_stages):
    with pytest.raises(
        BlockwrightError, match="prune after pack: prune needs dense weights, and pack leaves packed ones. Put prune before pack"
    ):
        load_recipe(PLAIN | {"stages": ["prune", "pack", "prune"]})
    with pytest.raises(BlockwrightError, match="pack after pack"):
        load_recipe(PLAIN | {"stages": ["pack", "pack"]})


@pytest.mark.parametrize("order", [["prune", "prune", "pack", "share"], ["pack"], ["share"], []])
def test_sensible_orders_pass(three_stages, order):
    assert [s.name for s in load_recipe(PLAIN | {"stages": order}).stages] == order


def test_a_method_that_is_no_stage_is_refused(monkeypatch):
    real = registry.method("finequant")
    other = registry.Method("other", real.module, real.path, real.card | {"slug": "other", "kind": "layer"}, "", "", ())
    monkeypatch.setattr(registry, "methods", lambda: {"other": other})
    with pytest.raises(BlockwrightError, match="other is of kind layer. Allowed: methods of kind stage"):
        load_recipe(PLAIN | {"stages": ["other"]})


# the model is never changed


@pytest.mark.parametrize(
    "out, said", [("m", "is the model"), (".", "holds the model"), ("m/inside", "lies inside the model"), ("m/../m", "is the")]
)
def test_an_output_that_would_change_the_model_is_refused(tmp_path, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    with pytest.raises(BlockwrightError, match=said):
        load_recipe({"model": "m", "stages": [], "out": out})
    assert load_recipe({"model": "m", "stages": [], "out": "m2"}).out.name == "m2"


def test_a_link_to_the_model_is_the_model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(BlockwrightError, match="is the model"):
        load_recipe({"model": str(tmp_path / "m"), "stages": [], "out": str(tmp_path / "link")})


def test_a_missing_recipe_and_a_folder_are_told(tmp_path):
    with pytest.raises(BlockwrightError, match=r"no such file. See examples/"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(BlockwrightError, match=r"is a folder"):
        load_recipe(tmp_path)


# whatever is written, the answer is a recipe or our error

SEED = b"model: smollm2\nstages:\n  - finequant: {bits: 4, targets: [Linear, 're:.*x'], overrides: {a: {bits: 8}}}\nout: o\n"


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SEED)), st.integers(0, 3), st.binary(max_size=3)), max_size=6))
@example([])
def test_mutated_recipes_are_read_or_refused(tmp_path_factory, edits):
    data = SEED
    for at, cut, add in edits:
        data = data[:at] + add + data[at + cut :]
    try:
        load_recipe(yaml_file(tmp_path_factory.mktemp("fuzz"), data))
    except BlockwrightError as told:
        assert str(told)


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([*recipes.Recipe.model_fields]),
)
def test_any_value_of_any_key_is_read_or_refused(value, key):
    try:
        load_recipe(PLAIN | {key: value})
    except BlockwrightError as told:
        assert "\n" not in str(told)


# options of methods


@pytest.mark.parametrize("slug", registry.methods())
def test_the_options_of_every_method_have_a_schema(slug):
    schema = option_model(registry.method(slug)).model_json_schema()
    assert list(schema.get("properties", {})) == [o.name for o in registry.method(slug).options]


def test_a_type_that_is_not_of_the_house_is_told():
    odd = registry.Option("x", "torch.Tensor", None, False, "")
    m = stage_method("odd", ["dense"], "dense")
    with pytest.raises(BlockwrightError, match=r"odd: option x has the type torch.Tensor"):
        option_model(registry.Method("odd", m.module, m.path, m.card, "", "", (odd,)))
