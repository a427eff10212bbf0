"""Bad input: one line that names the thing and the remedy, exit code 2, and nothing written, whatever is wrong."""

import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from jobs import in_fork, recipe, tree, written
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, MambaConfig, MambaForCausalLM, T5Config, ViTConfig

import blockwright as bw
from blockwright import meter
from blockwright.errors import BlockwrightError
from blockwright.recipes.recipe import load_recipe

GRID = {"sample-grid": {"bits": 4, "group_size": 32}}
WEIGHTS = "model/model.safetensors"


def refused(blockwright, home, file, *options):
    """What the command says; it must be one line, with exit code 2, and leave every file as it was."""
    before = tree(home)
    code, out, err = blockwright("run", file, *options)
    assert code == 2, (code, out, err)
    assert err.startswith("blockwright: ") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 500, err
    assert tree(home) == before
    return err


def edited(name, change):
    """A JSON file, changed."""
    path = Path(name)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_tensors(change):
    tensors = load_file(WEIGHTS)
    change(tensors)
    save_file(tensors, WEIGHTS, metadata={"format": "pt"})


def sharded(index):
    """The weights as two files with an index, which `index` may change."""
    tensors = load_file(WEIGHTS)
    Path(WEIGHTS).unlink()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, f"model/{file}", metadata={"format": "pt"})
    content = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    index(content)
    Path("model/model.safetensors.index.json").write_text(json.dumps(content))


# the model folder


def missing():
    return {"model": "nowhere/model"}, "model 'nowhere/model': no such folder"


def misspelt():
    return {
        "model": "smollm"
    }, "model 'smollm': no such folder. Allowed: a model folder, a hub id, or one of smollm2, smollm2-off-grid. Did you mean 'smollm2'?"


def empty():
    Path("empty").mkdir()
    return {"model": "empty"}, "model empty: is empty. Allowed: a model folder with config.json and safetensors weights. Check the path."


def no_config():
    Path("model/config.json").unlink()
    return {}, "model model: no config.json. Name a model folder"


def no_weights():
    Path(WEIGHTS).unlink()
    return {}, "model: no weights found. Allowed: model.safetensors, or model.safetensors.index.json with its files."


def pickled_weights_only():
    Path(WEIGHTS).rename("model/pytorch_model.bin")
    return {}, "model: no weights found. Allowed: model.safetensors"


def no_tokenizer():
    for path in Path("model").glob("token*"):
        path.unlink()
    return {}, "model model: its tokenizer is missing or damaged (ValueError). Allowed: a folder with tokenizer.json"


def damaged_tokenizer():
    Path("model/tokenizer.json").write_text("{")
    return {}, "model model: its tokenizer is missing or damaged"


def tokenizer_of_another_model():
    edited("model/config.json", lambda c: c.update(vocab_size=50))
    with_tensors(lambda t: t.update({n: t[n][:50].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}))
    return {}, "evaluation text: the tokenizer gives id 86, and the model has 50 tokens. Use the tokenizer and the model of one folder."


def a_file():
    return {"model": "judge.txt"}, "model judge.txt: is no folder"


def already_quantised():
    edited("model/config.json", lambda c: c.update(quantization_config={"quant_method": "compressed-tensors"}))
    return {}, "model: already quantised. Allowed: a dense model folder. Start from the model it was made from."


# its architecture


def unknown_architecture():
    edited("model/config.json", lambda c: c.update(model_type="zebra"))
    return {}, "model model: unsupported config (The checkpoint you are trying to load has model type `zebra`"


def code_of_its_own():
    edited(
        "model/config.json",
        lambda c: c.update(model_type="zebra", auto_map={"AutoConfig": "zebra.Config", "AutoModelForCausalLM": "zebra.Model"}),
    )
    Path("model/zebra.py").write_text(f"open({str(Path('ran').absolute())!r}, 'w')")
    return {}, "model model: unsupported config"


def a_vision_model():
    ViTConfig().save_pretrained("model")
    return {}, "architecture 'vit': no language model. Allowed: decoders that AutoModelForCausalLM builds"


def an_encoder_and_decoder():
    T5Config(num_layers=2).save_pretrained("model")
    return {}, "architecture 't5': no language model"


def a_config_that_is_none():
    Path("model/config.json").write_text("[1, 2")
    return {}, "model model: unsupported config"


# config.json that disagrees with the weights


def wider():
    edited("model/config.json", lambda c: c.update(intermediate_size=128))
    return (
        {},
        "mlp.gate_proj.weight is (96, 64) in the weights and (128, 64) by config.json. Use the config.json and the weights of one model.",
    )


def deeper():
    edited("model/config.json", lambda c: c.update(num_hidden_layers=4))
    return {}, "config.json asks for tensor model.layers.3."


def shallower():
    edited("model/config.json", lambda c: c.update(num_hidden_layers=2))
    return {}, "the weights hold model.layers.2.input_layernorm.weight, which config.json does not know"


def another_architecture():
    edited("model/config.json", lambda c: c.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    return {}, "config.json asks for tensor transformer."


def a_tensor_less():
    with_tensors(lambda t: t.pop("model.norm.weight"))
    return {}, "config.json asks for tensor model.norm.weight (64,), which the weights lack"


def nonsense_sizes():
    edited("model/config.json", lambda c: c.update(num_attention_heads="many"))
    return {}, "model model: unsupported config"


def impossible_sizes():
    edited("model/config.json", lambda c: c.update(hidden_size=-64))
    return {}, "config.json's model cannot be built"


def enormous():
    edited("model/config.json", lambda c: c.update(hidden_size=2**40))
    return {}, "config.json's model cannot be built"


# safetensors


def truncated():
    os.truncate(WEIGHTS, 300_000)
    return {}, "model.safetensors: not a whole safetensors file"


def cut_in_the_header():
    os.truncate(WEIGHTS, 100)
    return {}, "model.safetensors: not a whole safetensors file"


def no_bytes():
    os.truncate(WEIGHTS, 0)
    return {}, "model.safetensors: not a whole safetensors file"


def corrupted_header():
    data = bytearray(Path(WEIGHTS).read_bytes())
    data[20:40] = b"\xff" * 20
    Path(WEIGHTS).write_bytes(data)
    return {}, "model.safetensors: not a whole safetensors file"


def oversized_header():
    data = Path(WEIGHTS).read_bytes()
    Path(WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + data[8:])
    return {}, "model.safetensors: not a whole safetensors file"


def header_of_its_own_length():
    Path(WEIGHTS).write_bytes(struct.pack("<Q", 99_999_999) + b"{" * 64)
    return {}, "model.safetensors: not a whole safetensors file"


def header_with_overlapping_tensors():
    size = int.from_bytes(Path(WEIGHTS).read_bytes()[:8], "little")
    data = Path(WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    Path(WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return {}, "model.safetensors: not a whole safetensors file"


def not_safetensors():
    Path(WEIGHTS).write_bytes(b"PK\x03\x04" + b"\0" * 500)
    return {}, "model.safetensors: not a whole safetensors file"


def a_strange_dtype():
    with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}))
    return {}, "tensor 'model.norm.weight' has dtype F8_E4M3. Allowed: F64, F32"


# the index


def path_traversal():
    sharded(lambda c: c["weight_map"].update({"lm_head.weight": "../model/model-00001-of-00002.safetensors"}))
    return {}, "lies in '../model/model-00001-of-00002.safetensors', outside the model folder. Allowed: plain file names inside the folder."


def an_absolute_path():
    sharded(lambda c: c["weight_map"].update({"lm_head.weight": "/etc/passwd"}))
    return {}, "lies in '/etc/passwd', outside the model folder"


def a_promise_not_kept():
    sharded(
        lambda c: c["weight_map"].update(
            {"lm_head.weight": "model-00002-of-00002.safetensors", "model.norm.weight": "model-00001-of-00002.safetensors"}
        )
    )
    return {}, "which does not hold it. Copy the model folder again"


def a_file_less():
    sharded(lambda c: None)
    Path("model/model-00002-of-00002.safetensors").unlink()
    return {}, "model-00002-of-00002.safetensors: file missing. Copy the model folder again"


def no_index():
    sharded(lambda c: None)
    Path("model/model.safetensors.index.json").write_text('{"weight_map": [1]}')
    return {}, "model.safetensors.index.json: not a safetensors index"


# values that are not finite


def nan_in_a_block():
    with_tensors(lambda t: t["model.layers.2.mlp.down_proj.weight"][3].fill_(float("nan")))
    return {}, "model.layers.2.mlp.down_proj.weight: nan at [3, 0]. Allowed: finite values. Repair or download the model again"


def inf_in_the_head():
    with_tensors(lambda t: t["lm_head.weight"][3].fill_(float("-inf")))
    return {}, "lm_head.weight: -inf at [3, 0]"


def nan_in_activations():
    with_tensors(lambda t: [t[f"model.layers.1.mlp.{n}_proj.weight"].fill_(3e37) for n in ("gate", "up")])
    return {}, "output of block model.layers.1: "


# the texts


def too_short():
    return {
        "evaluation": {"text": "judge.txt", "num": 30, "length": 32}
    }, "evaluation text: 600 tokens are too few for 30 windows of 32. Allowed: num * length <= 600. Use num: 18"


def calibration_too_short():
    Path("learn.txt").write_text("w1 w2 w3")
    return (
        {},
        "calibration text: 3 tokens are too few for 4 windows of 32. Allowed: num * length <= 3. Use num: 1 and length: 3",
    )


def nothing_in_it():
    Path("judge.txt").write_text("\n")
    return {}, "evaluation text: 0 tokens are too few"


def no_such_text():
    return {
        "evaluation": {"text": "judge.text"}
    }, "evaluation text 'judge.text': neither a file nor in the zoo. Allowed: pydoc, python-source"


def not_a_text():
    Path("judge.txt").write_bytes(b"\xff\xfe\x00")
    return {}, "evaluation text judge.txt: not UTF-8 (byte 0)"


def longer_than_the_model_sees():
    return {
        "evaluation": {"text": "judge.txt", "num": 1, "length": 300}
    }, "evaluation: length=300. Allowed: up to 256, the positions that the model has"


def overlapping():
    words = Path("judge.txt").read_text().split()
    Path("learn.txt").write_text(" ".join(["w1"] * 50 + words[10:30] + ["w2"] * 100))
    return {}, "calibration and evaluation text share a run of 20 words: '"


def the_same_text():
    return {"calibration": {"text": "judge.txt", "num": 2, "length": 32}}, "calibration and evaluation text share a run of 20 words"


# stages and their options


def unknown_stage():
    return {"stages": ["fine-quant"]}, "method 'fine-quant': unknown. Did you mean 'finequant'?"


def unknown_option():
    return {"stages": [{"finequant": {"group_sizes": 64}}]}, "finequant: unknown option group_sizes. Allowed: "


def out_of_range():
    return {"stages": [{"sample-grid": {"bits": 9}}]}, "sample-grid: bits=9. Allowed: less than or equal to 8"


def out_of_range_of_finequant():
    return {"stages": [{"finequant": {"bits": 17}}]}, "finequant"


def group_size_of_nothing():
    return {"stages": [{"finequant": {"group_size": 0}}]}, "group_size=0"


def a_group_that_does_not_divide():
    return {"stages": [{"sample-grid": {"group_size": 48}}], "export": "standard"}, "has 64 inputs, which groups of 48 do not divide"


def a_packed_embedding_in_a_standard_layout():
    return {
        "stages": [],
        "embedding": 8,
        "export": "standard",
    }, "export=standard: the embedding is packed embedding, which compressed-tensors"


def two_asymmetric_schemes_in_a_standard_layout():
    options = {"symmetric": False, "overrides": {"o_proj": {"bits": 8}}}
    return {"stages": [{"sample-grid": options}], "export": "unrolled"}, "export=unrolled: asymmetric linears in more than one scheme"


def a_packed_conv1d_in_a_standard_layout():
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=92, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained("model")
    return {
        "stages": [GRID],
        "export": "standard",
    }, "export=standard: transformer.h.0.attn.c_attn is a packed Conv1D. Allowed: auto, blockwright, dense."


def offset_packed_groups_that_do_not_divide():
    return {"stages": [{"quantllm-ofa": {"group_size": 48}}], "export": "standard"}, "has 64 inputs, which groups of 48 do not divide"


def a_dual_grained_conv1d_in_a_standard_layout():
    return a_packed_conv1d_in_a_standard_layout()[0] | {"stages": ["dgq"]}, "transformer.h.0.attn.c_attn is a packed Conv1D. Allowed: auto"


def a_child_in_a_standard_layout():
    said = "export=standard after puzzle: it writes our own layout; `export: dense` opens in plain transformers unless a subblock became"
    return {"stages": ["puzzle", GRID], "export": "standard"}, said


def narrow_layers_in_a_standard_layout():
    return {"stages": ["cfsp"], "export": "unrolled"}, "export=unrolled after cfsp: it writes our own layout with smaller matrices"


def tiles_in_a_standard_layout():
    return {"stages": ["lpvit"], "export": "standard"}, "export=standard after lpvit: it writes the kept tiles in our own layout"


def linears_that_are_not_only_called():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=92, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=8)
    MambaForCausalLM(config).save_pretrained("model")
    return {"stages": ["finequant"]}, "mixer.dt_proj: the model uses its weight without calling it, so it cannot be treated"


def pruning_after_packing():
    return {
        "stages": [GRID, "sample-nudge"]
    }, "sample-nudge after sample-grid: sample-nudge needs dense weights, and sample-grid leaves packed ones. Put sample-nudge before"


def too_little_memory():
    return {"memory": "10MB"}, "needs about 0.63 GB of memory, 0.01 GB may be used"


# the output


def not_empty():
    Path("cheaper").mkdir()
    Path("cheaper/mine.txt").write_text("mine")
    return {}, "out cheaper: not empty. Allowed: a new or empty folder. Use --overwrite to replace it, or name another folder."


def a_file_there():
    return {"out": "judge.txt"}, "out judge.txt: is a file. Name a folder."


def below_a_file():
    return {"out": "judge.txt/cheaper"}, "judge.txt/cheaper: cannot be written (Not a directory). Name another output folder."


def where_nobody_can_write():
    return {"out": "/proc/cheaper"}, "/proc/cheaper: cannot be written (No such file or directory)"


def the_model_itself():
    return {"out": "model"}, "out model: is the model folder model. Allowed: a folder apart from the model"


CASES = [
    missing, misspelt, empty, no_config, no_weights, pickled_weights_only, no_tokenizer, damaged_tokenizer, tokenizer_of_another_model,
    a_file, already_quantised, unknown_architecture, code_of_its_own, a_vision_model, an_encoder_and_decoder, a_config_that_is_none,
    wider, deeper, shallower, another_architecture, a_tensor_less, nonsense_sizes, impossible_sizes, enormous, truncated,
    cut_in_the_header, no_bytes, corrupted_header, oversized_header, header_of_its_own_length, header_with_overlapping_tensors,
    not_safetensors, a_strange_dtype, path_traversal, an_absolute_path, a_promise_not_kept, a_file_less, no_index, nan_in_a_block,
    inf_in_the_head, nan_in_activations, too_short, calibration_too_short, nothing_in_it, no_such_text, not_a_text,
    longer_than_the_model_sees, overlapping, the_same_text, unknown_stage, unknown_option, out_of_range, out_of_range_of_finequant,
    group_size_of_nothing, a_group_that_does_not_divide, a_packed_embedding_in_a_standard_layout,
    two_asymmetric_schemes_in_a_standard_layout, a_packed_conv1d_in_a_standard_layout, a_child_in_a_standard_layout,
    offset_packed_groups_that_do_not_divide, a_dual_grained_conv1d_in_a_standard_layout,
    narrow_layers_in_a_standard_layout, tiles_in_a_standard_layout, linears_that_are_not_only_called, pruning_after_packing,
    too_little_memory, not_empty, a_file_there, below_a_file, where_nobody_can_write, the_model_itself,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_it_is_told_in_one_line_and_nothing_is_written(home, blockwright, case):
    changes, said = case()
    r = recipe("sample-nudge", GRID) | {"dtype": "fp32"} | changes
    assert said in refused(blockwright, home, written(r))


YAML = {
    "a duplicate key": ("model: model\nmodel: other\nstages: []\nout: cheaper\n", "line 2: the key 'model' stands twice. See examples/"),
    "a tab": ("model: model\nstages:\n\t- sample-grid\nout: cheaper\n", "recipe.yaml line 3: indented with a tab. Allowed: spaces."),
    "a tag": ("model: !!python/object/apply:os.mkdir ['made']\nstages: []\nout: cheaper\n", "object/apply:os.mkdir is not allowed"),
    "not YAML": ("model: [model\n", "recipe.yaml line 2: "),
    "a list": ("- model\n", "recipe.yaml: not a mapping. Allowed: model, stages, out"),
    "no output": ("model: model\nstages: []\n", "recipe.yaml: out is missing. Give `out:` (the folder to write)."),
    "an unknown key": ("model: model\nstages: []\nout: cheaper\ncalibraton: {}\n", "unknown option calibraton. Allowed: model, stages"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_a_recipe_that_is_not_plain_is_told_in_one_line_and_nothing_is_written(home, blockwright, name):
    text, said = YAML[name]
    Path("recipe.yaml").write_text(text)
    assert said in refused(blockwright, home, "recipe.yaml")


def test_code_that_a_folder_brings_is_neither_run_nor_asked_about(home, blockwright, monkeypatch):
    edited(
        "model/tokenizer_config.json",
        lambda c: c.update(tokenizer_class="ZebraTokenizer", auto_map={"AutoTokenizer": ["zebra.Zebra", None]}),
    )
    Path("model/zebra.py").write_text(f"open({str(home / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    blockwright("run", written(recipe(GRID)))
    assert not Path("ran").exists()


def test_every_mistake_is_the_same_error_in_python(home):
    for case in (empty, too_short, unknown_option, not_empty):
        changes, said = case()
        with pytest.raises(BlockwrightError) as told:
            bw.run(recipe("sample-nudge", GRID) | changes)
        assert said in str(told.value) + "."


def test_the_limit_of_a_container_counts(home, blockwright, monkeypatch):
    monkeypatch.setattr(meter, "memory_limit", lambda: 3 * 10**8)
    file = written(recipe(GRID))
    assert "needs about 0.63 GB of memory, 0.30 GB may be used" in refused(blockwright, home, file)


def test_a_dry_run_tells_the_same(home, blockwright):
    for case in (too_short, unknown_option, a_group_that_does_not_divide, tiles_in_a_standard_layout, deeper):
        changes, said = case()
        assert said in refused(blockwright, home, written(recipe("sample-nudge", GRID) | changes), "--dry-run")


def test_the_old_folder_stays_where_the_new_one_is_refused(home, blockwright):
    bw.run(recipe(GRID))
    file = written(recipe("sample-nudge", GRID))
    with_tensors(lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert "model.norm.weight: nan" in refused(blockwright, home, file, "--overwrite")


def test_a_folder_that_may_not_be_written_is_told(home, blockwright):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; below_a_file and where_nobody_can_write cover the message")
    (home / "locked").mkdir(mode=0o555)
    assert "cannot be written (Permission denied)" in refused(blockwright, home, written(recipe(GRID, out="locked/cheaper")))


def test_a_full_disk_midway_is_told_with_exit_code_2_and_no_folder(home, blockwright):
    file = written(recipe("sample-nudge", GRID))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))
        code, _, err = blockwright("run", file)
        assert code == 2 and err.count("\n") == 1 and err.startswith("blockwright: ")
        assert "the disk is full. Free space and run again; nothing of the old folder was changed." in err

    assert in_fork(limited) == 0
    assert not (home / "cheaper").exists() and not list(home.glob(".cheaper.new*"))


def test_a_disk_that_is_full_from_the_start_leaves_nothing_at_all(home):
    before = tree(home)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        with pytest.raises(BlockwrightError, match="the disk is full"):
            bw.run(recipe(GRID))

    assert in_fork(limited) == 0 and tree(home) == before


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config, BertConfig, T5Config, ViTConfig], ids=lambda c: c.__name__)
def test_any_config_without_its_weights_is_told(home, config):
    config(num_hidden_layers=2).save_pretrained("other")
    with pytest.raises(BlockwrightError, match=r"other: no weights found|no language model"):
        bw.run(recipe(GRID, model="other"))


def test_a_run_needs_no_recipe_to_be_wrong_twice(home):
    assert load_recipe(recipe(GRID)).out.name == "cheaper"  # the plain recipe of these tests is right
    assert bw.run(recipe("sample-nudge", GRID))["result"]["perplexity"] > 1
