"""A model as a chain of blocks against transformers' own loading and against hand-made edits of the living model."""

import copy
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import nn

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Place
from blockwright.errors import BlockwrightError

CHAINS = {  # read off the architectures by hand: where the blocks lie, and how many linears the first one holds
    "llama": ("model.layers", 3, 7),
    "llama-tied": ("model.layers", 3, 7),
    "gpt2": ("transformer.h", 3, 4),
    "neox": ("gpt_neox.layers", 3, 4),
    "opt": ("model.decoder.layers", 3, 6),
    "qwen2": ("model.layers", 3, 7),
    "gemma2": ("model.layers", 3, 7),
    "gemma3": ("model.layers", 3, 7),
    "deepseek": ("model.layers", 3, 8),
    "gpt-neo": ("transformer.h", 4, 6),
    "falcon": ("transformer.h", 3, 4),
}
CAUSAL = list(CHAINS)
OTHERS = {
    "BertModel": ("bert", "encoder.layer"),
    "BertForMaskedLM": ("bert", "bert.encoder.layer"),
    "BertForSequenceClassification": ("bert", "bert.encoder.layer"),
    "ViTModel": ("vit", "layers"),
    "ViTForImageClassification": ("vit", "vit.layers"),
    "LlamaModel": ("llama", "layers"),
    "LlamaForSequenceClassification": ("llama", "model.layers"),
}


def other(cls):
    name, path = OTHERS[cls]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if name == "vit" else tiny.ids()
    model = tiny.model(name, cls=getattr(t, cls), pad_token_id=0) if name != "vit" else tiny.model(name, cls=getattr(t, cls))
    return model, path, x


def saved(model, folder, **config_changes):
    model.save_pretrained(folder)
    if config_changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | config_changes))
    return folder


# where the blocks are


@pytest.mark.parametrize("name", CAUSAL)
def test_the_chain_and_its_linears_are_found(name):
    model, (path, count, linears) = tiny.model(name), CHAINS[name]
    assert layers.chain_path(model) == path and layers.num_blocks(model.config) == count == len(model.get_submodule(path))
    first = model.get_submodule(path + ".0")
    assert sum(map(layers.is_linear, first.modules())) == linears


@pytest.mark.parametrize("cls", OTHERS)
def test_the_chain_of_encoders_and_headless_models_is_found(cls):
    model, path, _ = other(cls)
    assert layers.chain_path(model) == path and layers.num_blocks(model.config) == 3


def test_the_chain_is_the_heaviest_list_not_the_first_or_longest():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.short = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
            self.none = nn.ModuleList()
            self.body = nn.Module()
            self.body.blocks = nn.ModuleList(
                [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])}) for _ in range(2)]
            )

    assert layers.chain_path(Model()) == "body.blocks"
    with pytest.raises(BlockwrightError, match="Sequential: no chain of blocks found. Allowed: a model whose layers are an nn.ModuleList"):
        layers.chain_path(nn.Sequential(nn.Linear(2, 2)))


# there and back


@pytest.mark.parametrize("name", CAUSAL)
def test_a_folder_gives_the_bits_that_transformers_gives(name, tmp_path):
    saved(tiny.model(name), tmp_path)
    theirs = t.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    if name == "deepseek":  # its files hold each expert alone, and the model holds them stacked
        with pytest.raises(BlockwrightError, match=r"model\.layers\.1\.mlp\.experts\.\w+ lies in parts in its files"):
            Blueprint.of_folder(tmp_path)
        return
    mine = Blueprint.of_folder(tmp_path).build()
    assert type(mine) is type(theirs) and not mine.training and torch.equal(tiny.logits(mine, tiny.ids()), tiny.logits(theirs, tiny.ids()))
    assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}  # tied ones once


@pytest.mark.parametrize("name", CAUSAL)
def test_a_module_gives_its_own_bits(name):
    model = tiny.model(name)
    before = copy.deepcopy(model.state_dict())
    blueprint = Blueprint.of_module(model)
    built = blueprint.build()
    want = tiny.logits(model, tiny.ids())
    assert torch.equal(tiny.logits(built, tiny.ids()), want)
    for tensor in built.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # built from copies
    assert torch.equal(tiny.logits(blueprint.build(), tiny.ids()), want)


@pytest.mark.parametrize("cls", OTHERS)
def test_encoders_and_headless_models_give_their_own_bits(cls, tmp_path):
    model, _, x = other(cls)
    built = Blueprint.of_module(model).build()
    assert type(built) is type(model) and torch.equal(tiny.logits(built, x), tiny.logits(model, x))
    assert torch.equal(tiny.logits(Blueprint.of_folder(saved(model, tmp_path)).build(), x), tiny.logits(model, x))


def test_a_base_models_file_fills_a_tied_head_and_shards_are_one_model(tmp_path):
    model = tiny.model("llama-tied")
    saved(model.model, tmp_path / "base", architectures=["LlamaForCausalLM"])  # names without "model."
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("base", "shards"):
        built = Blueprint.of_folder(tmp_path / folder).build()
        assert torch.equal(tiny.logits(built, tiny.ids()), tiny.logits(model, tiny.ids()))
        assert built.lm_head.weight is built.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "neox"])
def test_a_bf16_folder_is_computed_as_transformers_computes_it(name, dtype, tmp_path):
    saved(tiny.model(name).to(torch.bfloat16), tmp_path)  # Gemma multiplies its embeddings by sqrt(24), rounded to the dtype
    theirs = t.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto").eval()
    mine = Blueprint.of_folder(tmp_path).build(dtype=dtype)
    assert {p.dtype for p in mine.parameters()} == {dtype or torch.bfloat16}
    assert torch.equal(tiny.logits(mine, tiny.ids()), tiny.logits(theirs, tiny.ids()))


def test_one_block_is_that_block_and_its_skeleton_holds_no_weights():
    model = tiny.model("gemma3")
    blueprint = Blueprint.of_module(model)
    assert all(p.is_meta for p in blueprint.skeleton().parameters())
    block = blueprint.block("model.layers.1")
    layers.fill(block, blueprint.tensors, "model.layers.1.")
    theirs = model.model.layers[1].state_dict()
    assert block.state_dict().keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in block.state_dict().items())
    assert block.self_attn.layer_idx == 1 and not block.self_attn.is_sliding and not any(p.requires_grad for p in block.parameters())


def test_a_skeleton_costs_no_memory():
    big = t.LlamaConfig(hidden_size=16384, intermediate_size=65536, num_hidden_layers=4, num_attention_heads=128, vocab_size=200_000)

    def resident(name):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    skeleton = layers.skeleton(big)
    assert sum(p.numel() for p in skeleton.parameters()) > 20e9 and resident("VmHWM") - before < 2**27


# dropped and reordered blocks


@torch.no_grad()
def bypassed(model, path, keep):
    """The living model with the other blocks handing on their input."""
    model = copy.deepcopy(model)
    for i, block in enumerate(model.get_submodule(path)):
        if i not in keep:
            block.forward = lambda x, *args, **kwargs: x
    return model


@pytest.mark.parametrize("keep", [[0, 2], [1], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "qwen2", "gemma2", "gemma3"])
def test_dropped_blocks_are_as_if_bypassed(name, keep):
    model, path = tiny.model(name), CHAINS[name][0]
    blueprint = Blueprint.of_module(model).with_layers(keep)
    built = blueprint.build()
    want = tiny.logits(bypassed(model, path, keep), tiny.ids())
    assert torch.equal(tiny.logits(built, tiny.ids()), want)
    assert blueprint.origin == tuple(keep) and layers.num_blocks(built.config) == len(keep) == len(built.get_submodule(path))
    assert layers.num_blocks(model.config) == 3  # the model's own config stands


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "qwen2", "gemma2", "gemma3", "gpt-neo"])
def test_generation_with_a_cache_equals_generation_without(name):
    built = Blueprint.of_module(tiny.model(name)).with_layers([2, 0]).build()
    attribute = "layer_id" if name == "gpt-neo" else "layer_idx"
    indices = [getattr(m, attribute) for m in built.modules() if isinstance(getattr(m, attribute, None), int)]
    assert set(indices) == {0, 1} and indices == sorted(indices)
    x = tiny.ids(2, 6)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    cached = built.generate(x, attention_mask=torch.ones_like(x), use_cache=True, **options)
    for _ in range(8):
        x = torch.cat([x, tiny.logits(built, x)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, x)


def test_per_layer_lists_of_the_config_follow_and_edits_compose():
    blueprint = Blueprint.of_module(tiny.model("gemma3"))
    assert blueprint.with_layers([2, 1]).config.layer_types == ["sliding_attention", "full_attention"]
    twice = blueprint.with_layers([2, 1, 0]).with_layers([0, 2])
    assert twice.origin == (2, 0) and twice.config.layer_types == ["sliding_attention"] * 2
    neo = Blueprint.of_module(tiny.model("gpt-neo")).with_layers([1, 2, 3]).config
    assert neo.attention_layers == ["local", "global", "local"] and neo.num_layers == 3


def test_a_block_kept_twice_is_one_block_under_two_names(tmp_path):
    blueprint = Blueprint.of_module(tiny.model("llama"))
    doubled = blueprint.with_layers([0, 1, 1, 2])
    built = doubled.build()
    assert built.model.layers[1].mlp.up_proj.weight is built.model.layers[2].mlp.up_proj.weight
    assert doubled.tensors.nbytes() == blueprint.tensors.nbytes()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt-neo"])
def test_what_is_left_opens_in_transformers(name, tmp_path):
    built = Blueprint.of_module(tiny.model(name)).with_layers([1, 2]).build()
    theirs, info = t.AutoModelForCausalLM.from_pretrained(saved(built, tmp_path), output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(tiny.logits(theirs.eval(), tiny.ids()), tiny.logits(built, tiny.ids()))


# shared blocks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_shared_block_computes_with_its_parents_weights_and_its_own_norms(name):
    model, path = tiny.model(name), CHAINS[name][0]
    blueprint = Blueprint.of_module(model)

    def own(tensor):
        return "norm" in tensor or "ln_" in tensor

    shared = blueprint.with_shared({2: 0}, own)
    by_hand = copy.deepcopy(model)
    chain = by_hand.get_submodule(path)
    chain[2].load_state_dict({n: (chain[2] if own(n) else chain[0]).state_dict()[n] for n in chain[2].state_dict()})
    built = shared.build()
    assert torch.equal(tiny.logits(built, tiny.ids()), tiny.logits(by_hand, tiny.ids()))
    first, last = (dict(built.get_submodule(f"{path}.{i}").named_parameters()) for i in (0, 2))
    assert all((first[n] is last[n]) == (not own(n)) for n in first)
    saved_bytes = sum(4 * p.numel() for n, p in last.items() if not own(n))
    assert blueprint.tensors.nbytes() - shared.tensors.nbytes() == saved_bytes > 0
    assert blueprint.tensors[f"{path}.2." + next(iter(first))] != blueprint.tensors[f"{path}.0." + next(iter(first))]  # unchanged


def test_blocks_of_different_shapes_do_not_share():
    with pytest.raises(BlockwrightError, match=r"blocks 0 and 1 cannot share: mlp\.\S+ is .* and .*. Allowed: blocks of one shape"):
        Blueprint.of_module(tiny.model("deepseek")).with_shared({1: 0}, lambda n: False)


# config and weights that disagree


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("llama", {"num_hidden_layers": 4}, r"asks for tensor model\.layers\.3\.\S+ \(.*\), which the weights lack"),
        ("llama", {"num_hidden_layers": 2}, r"the weights hold model\.layers\.2\.\S+, which config\.json does not know"),
        ("llama", {"intermediate_size": 41}, r"model\.layers\.0\.mlp\.\S+ is \(\S+ \S+\) in the weights and \(.*41.*\) by config\.json"),
        ("llama", {"hidden_size": 32}, r"model\.embed_tokens\.weight is \(37, 24\) in the weights and \(37, 32\) by config\.json"),
        ("llama", {"num_key_value_heads": 4}, r"k_proj\.weight is \(12, 24\) in the weights and \(24, 24\)"),
        ("llama", {"attention_bias": True}, r"asks for tensor model\.layers\.0\.self_attn\.\w+\.bias"),
        ("llama", {"vocab_size": 38}, r"is \(37, 24\) in the weights and \(38, 24\)"),
        (
            "llama",
            {"tie_word_embeddings": True},
            r"ties lm_head\.weight to model\.embed_tokens\.weight, and the weights hold two different",
        ),
        ("qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, r"the weights hold model\.layers\.0\.\S+\.bias, which"),
        ("gpt2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, r"which the weights lack"),
        ("llama", {"num_hidden_layers": 10**9}, r"asks for 1000000000 blocks, and the weights hold 30 tensors"),
        ("llama", {"hidden_size": 10**9}, r"cannot be built|unsupported config"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantised. Allowed: a dense model folder"),
    ],
)
def test_config_and_weights_that_disagree_are_refused_by_name(name, changes, said, tmp_path):
    with pytest.raises(BlockwrightError, match=said):
        Blueprint.of_folder(saved(tiny.model(name), tmp_path, **changes))


def test_a_base_models_extra_block_is_refused_too(tmp_path):
    saved(tiny.model("llama-tied").model, tmp_path, num_hidden_layers=2, architectures=["LlamaForCausalLM"])
    with pytest.raises(BlockwrightError, match=r"the weights hold layers\.2\.\S+, which config\.json does not know"):
        Blueprint.of_folder(tmp_path)


@pytest.mark.parametrize("cls, own", [(t.MixtralConfig, {}), (t.Qwen3MoeConfig, {"moe_intermediate_size": 8, "head_dim": 8})])
def test_experts_that_lie_in_parts_are_told_and_other_missing_tensors_as_ever(cls, own, tmp_path):
    config = cls(**tiny.COMMON, **tiny.GQA, num_local_experts=2, num_experts_per_tok=1, **own)
    saved(t.AutoModelForCausalLM.from_config(config), tmp_path / "parts")
    said = r"layers\.0\.mlp\.experts\.gate_up_proj lies in parts in its files \(.*experts\.0\..*weight, \.\.\.\).*in memory, in Python"
    with pytest.raises(BlockwrightError, match=said):
        Blueprint.of_folder(tmp_path / "parts")
    tensors = {n: v for n, v in load_file(tmp_path / "parts" / "model.safetensors").items() if ".experts." not in n}
    save_file(tensors, tmp_path / "parts" / "model.safetensors")
    with pytest.raises(BlockwrightError, match=r"experts\.gate_up_proj \(.*\), which the weights lack"):
        Blueprint.of_folder(tmp_path / "parts")


def test_two_equal_copies_of_a_tied_tensor_are_one(tmp_path):
    model = tiny.model("llama-tied")
    saved(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    built = Blueprint.of_folder(tmp_path).build()
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert torch.equal(tiny.logits(built, tiny.ids()), tiny.logits(model, tiny.ids()))


@pytest.mark.parametrize("value", [None, -1, 0, 1, 2**40, 1.5, "many", [], {}, True])
def test_a_mutated_config_is_refused_or_means_the_same_model(value, tmp_path):
    model = tiny.model("llama")
    saved(model, tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    refused = 0
    for key in whole:
        (tmp_path / "config.json").write_text(json.dumps(whole | {key: value}))
        try:
            built = Blueprint.of_folder(tmp_path).build()
            assert built.state_dict().keys() == model.state_dict().keys()
        except BlockwrightError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 5


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"model_type": "no-such-model"}', b'{"model_type": 5}']
)
def test_a_config_that_is_none_is_refused(text, tmp_path):
    saved(tiny.model("llama"), tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(BlockwrightError, match=r"model .*: unsupported config \(.*\)\. Allowed: a decoder .* Update transformers, or see"):
        layers.read_config(tmp_path)


def test_folders_that_are_no_models_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "no-config").mkdir()
    (tmp_path / "no-config" / "model.safetensors").write_bytes(b"")
    for name, said in [("gone", "does not exist"), ("empty", "is empty"), ("file", "is no folder"), ("no-config", r"no config\.json")]:
        with pytest.raises(BlockwrightError, match=rf"model .*{name}: {said}"):
            Blueprint.of_folder(tmp_path / name)
    saved(tiny.model("llama"), tmp_path / "no-weights")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    with pytest.raises(BlockwrightError, match="no-weights: no weights found"):
        Blueprint.of_folder(tmp_path / "no-weights")


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_that_a_folder_ships_is_never_run(model_type, tmp_path):
    trap = tmp_path / "sprung"
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
    folder = saved(tiny.model("llama"), tmp_path / "m", model_type=model_type, auto_map=names, architectures=["code.Model"])
    code = f"open({str(trap)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    (folder / "code.py").write_text(code)
    if model_type == "llama":  # known: transformers' own code is used
        assert type(Blueprint.of_folder(folder).build()) is t.LlamaForCausalLM
    else:
        with pytest.raises(BlockwrightError, match="unsupported config"):
            Blueprint.of_folder(folder)
    assert not trap.exists()


def test_an_architecture_without_a_model_is_refused():
    class MineConfig(t.PreTrainedConfig):
        model_type = "mine"

    with pytest.raises(
        BlockwrightError, match="architecture 'mine': unsupported. Allowed: any model that AutoModelForCausalLM or AutoModel"
    ):
        layers.skeleton(MineConfig())
    with pytest.raises(BlockwrightError, match="model: Linear. Allowed: a transformers PreTrainedModel"):
        Blueprint.of_module(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(value, dtype, tmp_path):
    model = tiny.model("llama").to(dtype)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    for blueprint in (Blueprint.of_module(model), Blueprint.of_folder(saved(model, tmp_path))):
        with pytest.raises(
            BlockwrightError, match=rf"model\.layers\.1\.mlp\.down_proj\.weight: {value} at \[3, 5\]. Allowed: finite values"
        ):
            blueprint.build()


def test_a_tensor_that_is_nowhere_is_named():
    blueprint = Blueprint.of_module(tiny.model("llama"))
    names = {n: n for n in blueprint.tensors if n != "model.norm.weight"}
    with pytest.raises(BlockwrightError, match=r"tensor model\.norm\.weight: not in the model's files"):
        blueprint.edited(tensors=blueprint.tensors.renamed(names)).build()
    with pytest.raises(BlockwrightError, match=r"x: tensor model\.norm\.weight is missing, expected \(24,\)"):
        layers.check_against_skeleton(blueprint.edited(tensors=blueprint.tensors.renamed(names)), Path("x"))
    wrong = blueprint.tensors.replaced(["model.norm.weight"], {"model.norm.weight": Place(None, "w")}, {"w": torch.ones(5)})
    with pytest.raises(BlockwrightError, match=r"model\.norm\.weight is \(5,\), expected \(24,\)"):
        layers.check_against_skeleton(blueprint.edited(tensors=wrong), Path("x"))
    layers.check_against_skeleton(blueprint, Path("x"))


# modules by name


@pytest.mark.parametrize(
    "targets, ignore, chosen",
    [
        (["Linear"], [], {"a.q_proj", "a.out", "b.q_proj", "lm_head"}),
        (["q_proj"], [], {"a.q_proj", "b.q_proj"}),
        (["proj"], [], set()),  # the end of a name is whole words
        (["a"], [], {"a", "a.q_proj", "a.out", "a.norm"}),
        (["a.q_proj"], [], {"a.q_proj"}),
        (["re:q_pro[jk]$"], [], {"a.q_proj", "b.q_proj"}),
        (["re:^b"], [], {"b", "b.q_proj"}),
        (["Linear"], ["lm_head", "a"], {"b.q_proj"}),
        (["Linear"], ["Linear"], set()),
        ([], [], set()),
        (["LayerNorm", "lm_head"], [], {"a.norm", "lm_head"}),
    ],
)
def test_modules_are_chosen_by_class_name_end_or_pattern(targets, ignore, chosen):
    a = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "out": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    root = nn.ModuleDict({"a": a, "b": nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), "lm_head": nn.Linear(2, 2)})
    assert {n for n, m in root.named_modules() if layers.selected(n, m, targets, ignore)} == chosen


class OnlyCalled(nn.Module):
    """A linear that hides its weight: what any form is to the modules around it."""

    def __init__(self, linear):
        super().__init__()
        self.hidden = [linear]

    def forward(self, x):
        return self.hidden[0](x)


@pytest.mark.parametrize("name", [*CAUSAL, "mamba", "falcon-mamba", "jamba", "rwkv"])
def test_a_linear_is_fixed_exactly_where_the_model_cannot_do_without_its_weight(name):
    model, x = tiny.model(name), tiny.ids()
    want = tiny.logits(copy.deepcopy(model), x)  # a copy: RWKV scales its weights at the first call
    skeleton = layers.block_linears(layers.skeleton(model.config))
    assert skeleton.keys() == layers.block_linears(model).keys()
    for full, linear in skeleton.items():
        changed = copy.deepcopy(model)
        layers.swap(changed, full, OnlyCalled(changed.get_submodule(full)))
        try:
            assert torch.equal(tiny.logits(changed, x), want)
            free = True
        except AttributeError:
            free = False
        assert layers.fixed(linear) is not free, full


def test_a_fixed_linear_is_refused_by_name_unless_it_is_ignored():
    model = tiny.model("mamba")
    linears = layers.block_linears(layers.skeleton(model.config))
    said = r"backbone\.layers\.0\.mixer\.dt_proj: the model uses its weight .* Leave it as it is: `ignore: \[dt_proj\]`"
    with pytest.raises(BlockwrightError, match=said):
        layers.targeted(linears, ["Linear"], [])
    ends = {n.rpartition(".")[2] for n in layers.targeted(linears, ["Linear"], ["dt_proj"])}
    assert ends == {"in_proj", "x_proj", "out_proj"}
    rwkv = layers.block_linears(layers.skeleton(tiny.model("rwkv").config))
    with pytest.raises(BlockwrightError, match=r"ignore: \[attention\.output, feed_forward\.value\]"):
        layers.targeted(rwkv, ["feed_forward.value"], [])


def test_a_module_is_swapped_where_it_stands():
    root = nn.Module()
    root.chain, root.seq, root.inner = nn.ModuleList([nn.Linear(2, 2)]), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Module()
    root.inner.head, root.table = nn.Linear(2, 2), nn.ModuleDict({"x": nn.Linear(2, 2)})
    for name in ("chain.0", "seq.1", "inner.head", "table.x", "table"):
        new = nn.Identity()
        layers.swap(root, name, new)
        assert root.get_submodule(name) is new
    assert len(root.chain) == 1 and len(root.seq) == 2


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0,), (2, 0)])
def test_finite_values_pass_and_others_are_placed(shape):
    x = torch.full(shape, torch.finfo(torch.float32).max)
    layers.check_finite(x, "x")
    layers.check_finite(torch.ones(shape, dtype=torch.int8), "codes")
    if x.numel():
        x.view(-1)[-1] = float("nan")
        with pytest.raises(BlockwrightError, match=re.escape(f"x: nan at {[n - 1 for n in shape]}")):
            layers.check_finite(x, "x")
