"""What is written in the standard layout opens in plain transformers with the same logits, and nothing else opens there at all."""

import itertools
import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import python
from safetensors import safe_open
from safetensors.torch import load_file
from sample_stages.fold import sample_fold
from sample_stages.grid import sample_grid
from sample_stages.slim import sample_slim
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from blockwright.blocks.embedding import pack_embedding
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.low_rank import LowRankLinear
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.parameters import DTYPES, Facts, Place
from blockwright.blocks.run import Run
from blockwright.errors import BlockwrightError
from blockwright.recipes import export
from blockwright.recipes.load import load

IDS = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),  # has biases
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=3, n_head=4, n_positions=64)),  # has Conv1D
}
GRID, FOLD, SLIM = sample_grid, sample_fold, sample_slim
MIXED = {"bits": 3, "overrides": {"down_proj": {"bits": 8, "group_size": -1}, "q_proj": {"bits": 4, "group_size": 16}}}
STANDARD = {  # name: model, stages, how it is written
    "dense": ("llama", [], {}),
    "dense, tied": ("tied", [], {}),
    "dense, gpt2": ("gpt2", [], {}),
    "4 bits, group": ("llama", [(GRID, {"bits": 4, "group_size": 32})], {}),
    "8 bits, channel": ("tied", [(GRID, {"bits": 8, "group_size": -1})], {}),
    "3, 4 and 8 bits": ("llama", [(GRID, MIXED)], {}),
    "biases": ("qwen", [(GRID, {"bits": 4, "group_size": 16})], {}),
    "some layers": ("llama", [(GRID, {"bits": 5, "ignore": ["o_proj", "layers.1"]})], {}),
    "2 bits": ("llama", [(GRID, {"bits": 2, "group_size": 64, "ignore": ["down_proj"]})], {}),
    "asymmetric": ("llama", [(GRID, {"symmetric": False})], {}),
    "asymmetric, channel, some": ("tied", [(GRID, {"bits": 8, "group_size": -1, "symmetric": False, "ignore": ["v_proj"]})], {}),
    "dropped": ("llama", [(FOLD, {"drop": [1]})], {}),
    "dropped, packed": ("qwen", [(FOLD, {"drop": [0]}), (GRID, {})], {}),
    "shared, unrolled": ("llama", [(FOLD, {"share": {1: 0}})], {"layout": "unrolled"}),
    "shared, packed, unrolled": ("tied", [(FOLD, {"share": {2: 1}}), (GRID, {})], {"layout": "unrolled"}),
    "shared, packed, dense": ("tied", [(FOLD, {"share": {2: 1}}), (GRID, {})], {"layout": "dense"}),
    "asked for": ("llama", [(GRID, {})], {"layout": "standard"}),
    "packed gpt2, dense": ("gpt2", [(GRID, {})], {"layout": "dense"}),
    "packed embedding, dense": ("tied", [(GRID, {}), 8], {"layout": "dense"}),
}  # fmt: skip
OWN = {
    "packed gpt2": ("gpt2", [(GRID, {})], {}),
    "packed embedding": ("tied", [(GRID, {}), 8], {}),
    "packed embedding alone": ("llama", [4], {}),
    "shared": ("llama", [(FOLD, {"share": {1: 0}})], {}),
    "shared, packed": ("qwen", [(FOLD, {"share": {2: 1}}), (GRID, {})], {}),
    "asymmetric, two schemes": ("llama", [(GRID, {"symmetric": False, "overrides": {"o_proj": {"bits": 8}}})], {}),
    "groups that do not divide": ("llama", [(GRID, {"group_size": 48})], {}),
    "groups longer than a row": ("llama", [(GRID, {"group_size": 128})], {}),
    "asked for": ("llama", [(GRID, {})], {"layout": "blockwright"}),
    "dense, asked for": ("tied", [], {"layout": "blockwright"}),
    "narrower": ("qwen", [(SLIM, {})], {}),
    "narrower, packed": ("llama", [(SLIM, {}), (GRID, {})], {}),
    "narrower, dropped, packed": ("tied", [(SLIM, {}), (FOLD, {"drop": [0]}), (GRID, {"bits": 8}), 8], {}),
    "narrower gpt2": ("gpt2", [(SLIM, {})], {}),
    "narrower gpt2, packed": ("gpt2", [(SLIM, {}), (GRID, {})], {}),
}  # fmt: skip
PLAIN = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, logits, infos = sys.argv[1], {}, {}
for name in json.loads(sys.argv[2]):
    try:
        model, info = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", output_loading_info=True)
        logits[name] = model.eval()(torch.tensor(json.loads(sys.argv[3]))).logits.detach().float().contiguous()
        infos[name] = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        infos[name]["dtype"] = str(model.dtype)
    except Exception as error:
        infos[name] = f"{type(error).__name__}: {error}"
assert not any("blockwright" in name for name in sys.modules)
save_file(logits, f"{folder}/logits.safetensors")
print(json.dumps(infos))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> the folder of a small random model."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, make in MODELS.items():
        torch.manual_seed(1)
        made[name] = folder / name
        make().save_pretrained(made[name])
        for path in (made[name] / "tokenizer.json", made[name] / "LICENSE"):
            path.write_text("{}")
    return made


def treated(folder, stages):
    """A blueprint after some stages; a number packs the embedding."""
    run = Run(Blueprint.of_folder(folder))
    for stage in stages:
        if isinstance(stage, int):
            run.model = pack_embedding(run.model, stage)
        else:
            run.begin("stage")
            stage[0](run, **stage[1])
    return run.model


def build(models, folder, model, stages, options, dtype=torch.float32):
    folder.mkdir(parents=True)
    blueprint = treated(models[model], stages)
    return blueprint, export.write(blueprint, folder, source=models[model], dtype=dtype, **options)


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory):
    """Every folder of STANDARD, OWN and a few in bf16, and what plain transformers made of them in one process of its own."""
    folder = tmp_path_factory.mktemp("written")
    cases = {f"standard/{n}": (c, "standard") for n, c in STANDARD.items()} | {f"own/{n}": (c, "blockwright") for n, c in OWN.items()}
    for name, (case, layout) in cases.items():
        assert build(models, folder / name, *case)[1] == layout, name
    names = [*cases, *(f"bf16/{n}" for n in ("dense", "4 bits, group", "asymmetric"))]
    for name in names[len(cases) :]:
        build(models, folder / name, *STANDARD[name.removeprefix("bf16/")], dtype=torch.bfloat16)
    infos = json.loads(python(PLAIN, str(folder), json.dumps(names), json.dumps(IDS.tolist())).splitlines()[-1])
    return folder, infos, load_file(folder / "logits.safetensors")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("name", STANDARD)
def test_the_standard_layout_opens_in_plain_transformers_with_our_logits(opened, name):
    folder, infos, plain = opened
    info = infos[f"standard/{name}"]
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "dtype": "torch.float32"}
    ours = logits(load(folder / "standard" / name, dtype=torch.float32, fast=False, check=False))
    assert ours.std() > 0.01 and (plain[f"standard/{name}"] - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("name", ["dense", "4 bits, group", "asymmetric"])
def test_in_bf16_the_two_differ_by_its_rounding_alone(opened, name):
    folder, infos, plain = opened
    assert infos[f"bf16/{name}"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "dtype": "torch.bfloat16"}
    ours = logits(load(folder / "bf16" / name, dtype=torch.float32, fast=False, check=False))
    assert (plain[f"bf16/{name}"] - ours).abs().max() <= 0.03 * ours.abs().max()


@pytest.mark.parametrize("name", OWN)
def test_our_own_layout_opens_here_and_cannot_be_opened_wrongly_elsewhere(opened, models, name):
    folder, infos, plain = opened
    assert "no file named model.safetensors" in infos[f"own/{name}"] and f"own/{name}" not in plain
    assert not list((folder / "own" / name).glob("model*.safetensors"))
    model, stages, _ = OWN[name]
    expected = logits(treated(models[model], stages).build(dtype=torch.float32))
    ours = logits(load(folder / "own" / name, dtype=torch.float32, fast=False, check=False))
    assert torch.equal(ours, expected) and ours.std() > 0.01


def test_a_model_of_several_files_opens_in_both(models, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    blueprint, _ = build(models, tmp_path / "s", *STANDARD["4 bits, group"])
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "s").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors" and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == export.predicted_bytes(blueprint, torch.float32)
    assert export.file_bytes(blueprint, torch.float32) == on_disk(tmp_path / "s")
    for file in files:
        assert (tmp_path / "s" / file).stat().st_size < 40_000 + 5_000 or len(load_file(tmp_path / "s" / file)) == 1
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = logits(load(tmp_path / "s", dtype=torch.float32, fast=False, check=False))
    assert torch.allclose(logits(plain.eval()), ours, atol=1e-6) and torch.allclose(
        logits(blueprint.build(dtype=torch.float32)), ours, atol=1e-6
    )


# what a standard layout cannot hold


@pytest.mark.parametrize(
    "name, layouts, reason",
    [
        ("packed gpt2", ["standard", "unrolled"], r"transformer\.h\.0\.attn\.c_attn is a packed Conv1D"),
        ("narrower", ["standard", "unrolled"], r"gate_proj is 32 x 64, and config\.json has no place for a size of its own"),
        ("narrower, packed", ["standard", "unrolled"], r"gate_proj is 32 x 64, and config\.json has no place for a size of its own"),
        ("packed embedding", ["standard"], r"model\.embed_tokens is packed embedding, which compressed-tensors has no place for"),
        ("shared", ["standard"], "blocks share weights"),
        ("shared, packed", ["standard"], "blocks share weights"),
        ("asymmetric, two schemes", ["standard", "unrolled"], "asymmetric linears in more than one scheme"),
        ("groups that do not divide", ["standard", "unrolled"], "q_proj has 64 inputs, which groups of 48 do not divide"),
        ("groups longer than a row", ["standard", "unrolled"], "q_proj has 64 inputs, which groups of 128 do not divide"),
    ],
)
def test_a_standard_layout_that_would_open_wrongly_is_refused_with_the_reason(models, tmp_path, name, layouts, reason):
    model, stages, _ = OWN[name]
    for layout in layouts:
        with pytest.raises(BlockwrightError, match=f"export={layout}: .*{reason}.*Allowed: auto, blockwright, dense"):
            export.write(treated(models[model], stages), tmp_path, source=models[model], layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["4 bits, group", "3, 4 and 8 bits", "some layers", "asymmetric", "8 bits, channel"])
def test_the_quantization_config_says_what_each_linear_is(opened, name):
    folder, _, _ = opened
    config = json.loads((folder / "standard" / name / "config.json").read_text())["quantization_config"]
    forms = json.loads((folder / "standard" / name / "blockwright.json").read_text())["forms"]
    told = {}
    for group in config["config_groups"].values():
        w = group["weights"]
        told |= dict.fromkeys(
            group["targets"], (w["num_bits"], -1 if w["group_size"] is None else w["group_size"], w["symmetric"], w["strategy"])
        )
        assert group["input_activations"] is None and w["type"] == "int" and len(set(group["targets"])) == len(group["targets"])
    assert told == {
        n: (f["bits"], f["group_size"], f["symmetric"], "channel" if f["group_size"] == -1 else "group") for n, f in forms.items()
    }
    linears = {n for n, m in load(folder / "standard" / name, fast=False, check=False).named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(config["ignore"]) == linears and "lm_head" in linears and not linears & forms.keys()
    assert config.get("dequantize", False) == (name == "asymmetric")
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")


# what is stored


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", [f"standard/{n}" for n in STANDARD] + [f"own/{n}" for n in OWN])
def test_bytes_are_predicted_exactly(opened, models, name):
    folder, _, _ = opened
    model, stages, options = (STANDARD if name.startswith("standard") else OWN)[name.partition("/")[2]]
    tensors = stored(folder / name)
    blueprint = treated(models[model], stages)
    predicted = export.predicted_bytes(blueprint, torch.float32, **options)
    assert predicted == sum(t.numel() * t.element_size() for t in tensors.values())
    assert export.file_bytes(blueprint, torch.float32, **options) == on_disk(folder / name)


@settings(max_examples=15, deadline=None)
@given(
    model=st.sampled_from(["tied", "qwen", "gpt2"]),
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 16, 24, 33, 64, 200]),
    symmetric=st.booleans(),
    ignore=st.sets(st.sampled_from(["q_proj", "down_proj", "c_attn", "1"])),
    share=st.booleans(),
    embedding=st.sampled_from([None, 4, 8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layout=st.sampled_from(["auto", "blockwright", "dense"]),
)
def test_bytes_are_predicted_exactly_and_logits_kept_whatever_is_combined(
    models, tmp_path_factory, model, bits, group, symmetric, ignore, share, embedding, dtype, layout
):
    folder = tmp_path_factory.mktemp("any")
    stages = [(FOLD, {"drop": [1], "share": {1: 0}})] * share
    stages += [(GRID, {"bits": bits, "group_size": group, "symmetric": symmetric, "ignore": sorted(ignore)})]
    blueprint = treated(models[model], stages + [embedding] * (embedding is not None))
    export.write(blueprint, folder, source=models[model], dtype=dtype, layout=layout)
    assert export.predicted_bytes(blueprint, dtype, layout) == sum(t.numel() * t.element_size() for t in stored(folder).values())
    assert export.file_bytes(blueprint, dtype, layout) == on_disk(folder)
    expected = logits(blueprint.build(dtype=torch.float32))
    ours = logits(load(folder, dtype=torch.float32, fast=False, check=False))
    assert (ours - expected).abs().max() <= {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype] * expected.abs().max()
    again = export.read(folder)
    assert again.origin == blueprint.origin and again.tensors.keys() == again.skeleton().state_dict().keys()


def test_bytes_of_files_with_low_rank_factors_some_of_them_packed_whatever_the_layout(models, tmp_path):
    def low_rank(block, x, y, rng):
        for name, linear in block.linears().items():
            if ".self_attn." in name:
                n, k = linear.weight.shape
                block.swap(name, LowRankLinear.of(linear, torch.ones(5, k), torch.ones(n, 5)))
        return {}

    run = Run(Blueprint.of_folder(models["qwen"]))
    run.begin("low rank")
    run.blocks(low_rank, write=True)
    for stage, options in ((None, {}), (GRID, {"bits": 4, "group_size": 16})):
        if stage:
            run.begin("grid")
            stage(run, **options)
        for layout in ("auto", "dense"):
            folder = tmp_path / f"{layout}{stage is None}"
            folder.mkdir()
            export.write(run.model, folder, source=models["qwen"], layout=layout)
            assert export.file_bytes(run.model, layout=layout) == on_disk(folder)


@given(
    tensors=st.dictionaries(
        st.one_of(st.text(max_size=8), st.sampled_from([f"layers.{i}.w" for i in (1, 2, 9, 10, 11, 99, 100)])),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 11), max_size=3).map(tuple)),
        max_size=9,
    ),
    most=st.integers(0, 2000),
)
@settings(max_examples=200, deadline=None)
def test_bytes_of_files_are_those_that_the_safetensors_package_writes(tmp_path_factory, tensors, most):
    entries = {name: export.Entry(Facts(*facts), partial(torch.zeros, facts[1], dtype=facts[0])) for name, facts in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", most)
        shards = [{name: entry.facts for name, entry in shard.items()} for shard in export.shards_of(entries)]
        folder = tmp_path_factory.mktemp("any")
        export.write_shards(folder, "model", entries)
    assert [export._shard_bytes(shard) for shard in shards] == [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    sizes = [[facts.nbytes for facts in shard.values()] for shard in shards]
    assert all(sum(size) <= most or len(size) == 1 for size in sizes)
    assert all(sum(size) + after[0] > most for size, after in itertools.pairwise(sizes))


def test_what_is_tied_or_shared_is_stored_once(opened):
    folder, _, _ = opened
    tied = stored(folder / "own" / "packed embedding")
    assert "model.embed_tokens.weight_packed" in tied and not [n for n in tied if n.startswith("lm_head")]
    loaded = load(folder / "own" / "packed embedding", fast=False, check=False)
    assert isinstance(loaded.lm_head, PackedLinear)
    assert loaded.lm_head.weight_packed.data_ptr() == loaded.model.embed_tokens.weight_packed.data_ptr()
    shared = stored(folder / "own" / "shared")
    assert [n for n in shared if n.startswith("model.layers.1.")] == [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ]
    a, b, _ = load(folder / "own" / "shared", fast=False, check=False).model.layers
    assert a.mlp.up_proj.weight.data_ptr() == b.mlp.up_proj.weight.data_ptr()


def test_scales_keep_their_dtype_and_the_rest_takes_the_one_asked_for(models, tmp_path):
    build(models, tmp_path / "x", *STANDARD["4 bits, group"], dtype=torch.float16)
    for name, t in stored(tmp_path / "x").items():
        expected = torch.float32 if name.endswith("weight_scale") else torch.float16
        assert not t.is_floating_point() or t.dtype == expected, name
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "float16"


def test_a_value_too_large_for_the_dtype_is_told_and_never_written(models, tmp_path):
    blueprint = Blueprint.of_folder(models["llama"])
    weight = "model.layers.1.mlp.up_proj.weight"
    big = blueprint.tensors.read([weight])[weight]
    big[3, 4] = 1e5
    place = blueprint.tensors[weight]._replace(file=None, name="big")
    edited = blueprint.edited(tensors=blueprint.tensors.replaced([], {weight: place}, {"big": big}))
    with pytest.raises(
        BlockwrightError,
        match=r"layers\.1\.mlp\.up_proj\.weight: 1e\+05 does not fit float16. Allowed: values up to 6.55e\+04. Use dtype: bf16",
    ):
        export.write(edited, tmp_path, source=models["llama"], dtype=torch.float16)
    big[3, 4] = float("nan")
    with pytest.raises(BlockwrightError, match=r"layers\.1\.mlp\.up_proj\.weight: nan at \[3, 4\]"):
        export.write(edited, tmp_path, source=models["llama"])
    assert not list(tmp_path.glob("*.safetensors"))


def test_only_what_belongs_to_a_model_is_copied_along(models, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    kept = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE", "tokenizer.model"]
    for name in [*kept, "modeling.py", "pytorch_model.bin", "notes.txt", "model.safetensors"]:
        (source / name).write_text(f"this is {name}")
    (tmp_path / "out").mkdir()
    export.write(Blueprint.of_folder(models["llama"]), tmp_path / "out", source=source)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*kept, "config.json", "blockwright.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == f"this is {name}" for name in kept)


def test_the_same_model_gives_the_same_bytes(models, tmp_path):
    for name in ("a", "b"):
        build(models, tmp_path / name, "tied", [(FOLD, {"share": {1: 0}}), (GRID, MIXED), 8], {})
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


# reading back


def test_a_folder_is_read_and_written_again_in_another_form(opened, models, tmp_path):
    folder, _, plain = opened
    for name, layout in (("4 bits, group", "dense"), ("asymmetric", "blockwright"), ("4 bits, group", "standard")):
        (tmp_path / layout).mkdir()
        export.write(export.read(folder / "standard" / name), tmp_path / layout, source=models["llama"], layout=layout, dtype=torch.float32)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        assert ("quantization_config" in config) == (layout == "standard")
        ours = logits(load(tmp_path / layout, dtype=torch.float32, fast=False, check=False))
        assert (ours - plain[f"standard/{name}"]).abs().max() <= 1e-5 * ours.abs().max()


def damaged(models, tmp_path, change):
    """The message of `read` when blockwright.json was changed."""
    build(models, tmp_path / "f", "tied", [(GRID, {}), 8], {})
    path = tmp_path / "f" / "blockwright.json"
    about = json.loads(path.read_text())
    changed = change(about)
    path.write_text(changed if isinstance(changed, str) else json.dumps(about))
    with pytest.raises(BlockwrightError) as told:
        export.read(tmp_path / "f")
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_newer_format_is_refused(models, tmp_path):
    said = damaged(models, tmp_path, lambda a: a.update(format=export.FORMAT + 1))
    assert "blockwright.json: format 2. Allowed: up to 1. Use a newer blockwright" in said


@pytest.mark.parametrize(
    "change",
    [
        lambda a: "{",
        lambda a: "[]",
        lambda a: "[" * 100_000,
        lambda a: a.pop("forms"),
        lambda a: a.update(format="one"),
        lambda a: a.update(format=float("inf")),
        lambda a: a["stored_as"].update({"lm_head.weight_packed": [1]}),
        lambda a: a.update(format=None),
        lambda a: a.update(forms={"model.layers.0.mlp.up_proj": {"form": "magic"}}),
        lambda a: a["forms"].update({"model.layers.9.mlp.up_proj": {"form": "packed", "bits": 4, "group_size": 32, "symmetric": True}}),
        lambda a: a["forms"].update({"model.norm": {"form": "packed", "bits": 4, "group_size": 32, "symmetric": True}}),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].pop("bits"),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].update(bits="4"),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].update(bits=0),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].update(bits=10**12),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].update(group_size=0),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].update(group_size=1.5),
        lambda a: a["forms"]["model.layers.0.mlp.up_proj"].update(bits=8),
        lambda a: a["forms"].clear(),
        lambda a: a.update(stored_as=[1, 2]),
        lambda a: a.update(stored_as={"lm_head.weight_packed": "nothing"}),
        lambda a: a.update(stored_as={}),
        lambda a: a.update(origin=3),
        lambda a: a.update(layout="standard"),
    ],
)
def test_a_damaged_description_is_told(models, tmp_path, change):
    assert str(tmp_path) in damaged(models, tmp_path, change)


@pytest.mark.parametrize("name", ["narrower, packed", "narrower gpt2, packed", "narrower, dropped, packed"])
def test_unpacked_linears_of_their_own_size_are_padded_to_the_widest(models, tmp_path, name):
    model, stages, _ = OWN[name]
    blueprint = treated(models[model], stages)
    assert export.write(blueprint, tmp_path, source=models[model], layout="dense", dtype=torch.float32) == "standard"
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert getattr(opened.config, "n_inner", None) == 48 or opened.config.intermediate_size == 48  # 32, 40 and 48
    assert torch.allclose(logits(opened.eval()), logits(blueprint.build(dtype=torch.float32)), atol=1e-5)


def test_other_linears_of_their_own_size_stay_so_when_they_are_unpacked(models, tmp_path):
    blueprint = treated(models["llama"], [])
    name = "model.layers.1.self_attn.q_proj"
    short = blueprint.tensors.read([f"{name}.weight"])[f"{name}.weight"][:32]
    tensors = blueprint.tensors.replaced([f"{name}.weight"], {f"{name}.weight": Place(None, "q")}, {"q": short})
    blueprint = blueprint.edited(tensors=tensors, forms={name: {"form": "linear", "size": [32, 64]}})
    assert export.write(blueprint, tmp_path, source=models["llama"], layout="dense", dtype=torch.float32) == "blockwright"
    assert load(tmp_path, dtype=torch.float32, check=False).get_submodule(name).weight.shape == (32, 64)


def test_a_model_in_memory_keeps_its_narrower_linears(models):
    stages = [(SLIM, {}), (GRID, {})]
    for model in ("llama", "gpt2"):
        for depth in (1, 2):  # dense, packed
            built = treated(models[model], stages[:depth]).build(dtype=torch.float32)
            again = Blueprint.of_module(built)
            assert sum("size" in f for f in again.forms.values()) == (9 if model == "llama" else 6)
            assert torch.equal(logits(again.build()), logits(built))
