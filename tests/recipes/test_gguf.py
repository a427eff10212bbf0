"""A GGUF file holds the same model: read by transformers' own reader, by the gguf package, by hand, and by llama.cpp where it is here."""

import copy
import importlib.util
import json
import math
import resource
import struct
from pathlib import Path

import gguf as reader
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import in_fork
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import blockwright as bw
from blockwright import zoo
from blockwright.blocks import folders, layers, tiles
from blockwright.blocks.embedding import pack_embedding
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.lora import LoraLinear
from blockwright.blocks.packed import PackedLinear
from blockwright.errors import BlockwrightError
from blockwright.recipes import export, gguf
from blockwright.search.puzzle import puzzle

SIZES = {
    "vocab_size": 352, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1234.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES | more)),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": None} | more)),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES | more)),  # q, k and v have biases
    "qwen3": lambda **more: Qwen3ForCausalLM(
        Qwen3Config(**SIZES | {"head_dim": 128, "num_attention_heads": 2} | more)
    ),  # q and k have norms
}
ROPE = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 8.0, "original_max_position_embeddings": 128}
IDS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
}
TEXT = "def add(a, b):\n    return a + b  # it's 1234 + 5678, isn't it?\nThe naïve café costs 12 €.   Three  spaces.\n\n\tTab 2024" * 3
SAMPLES = [TEXT, "1 22 333 4444", "  3 x   45", "<|im_start|>user\nHi<|im_end|>\n", "a<think>b</think> ", "we'LL 日本語 🙂\r\n", ""]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tokenizer(pre: str = "gpt-2", **changes) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 tokens that cuts text as `pre` does."""
    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer, made.decoder = CUTS[pre], decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=315, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_tokens(["<think>", "</think>"])
    for name, value in changes.items():
        setattr(made, name, value)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=special[2], chat_template=TEMPLATE, **names)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a tokenizer and a licence."""
    folder = tmp_path_factory.mktemp("tiny-source")
    tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("The licence of the tiny model.\n")
    return folder


def built(name: str, **more) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name](**more).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:
            p += 0.1 * torch.randn_like(p)  # biases and norms that matter
    return model


def packed(dense: nn.Linear, bits: int, group: int, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    if symmetric:
        scale, zero = tiles.symmetric_scale(dense.weight, bits=bits, group_size=group, dtype=dtype), None
    else:
        scale, zero = tiles.asymmetric_grid(dense.weight, bits=bits, group_size=group, dtype=dtype)
    codes = tiles.to_codes(dense.weight, scale, zero, bits=bits, group_size=group)
    return PackedLinear.of(dense, codes, scale, zero, bits=bits, group_size=group)


def rounded(model: nn.Module, schemes: list[tuple[int, int]], **options) -> Blueprint:
    """The linears of the blocks packed, by these (bits, group) in turn."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for i, name in enumerate(names):
        layers.swap(model, name, packed(model.get_submodule(name), *schemes[i % len(schemes)], **options))
    return Blueprint.of_module(model)


def written(model: Blueprint, folder: Path, source: Path) -> dict:
    folder.mkdir()
    return gguf.write(model, folder, source=source)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def opened(folder: Path) -> nn.Module:
    """transformers' own reader, everything found and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model


def values(file: Path | reader.GGUFReader) -> dict[str, object]:
    """All metadata of a file, by the gguf package."""
    found = file if isinstance(file, reader.GGUFReader) else reader.GGUFReader(file)
    return {k: f.contents() for k, f in found.fields.items() if not k.startswith("GGUF.")}


# the same model


MIXED = [(4, 64), (3, -1), (8, 32), (5, 64), (2, 32), (4, 32), (7, -1), (6, 64)]  # 192 inputs: 64 does divide them
EXACT = {  # name: model, its config, (bits, group) in turn, bits of the embedding, types in the file
    "4 bits, 32": ("llama", {"tie_word_embeddings": True}, [(4, 32)], None, {"Q4_0", "F32"}),
    "4 bits, 64": ("llama", {}, [(4, 64)], None, {"Q4_0", "F32"}),
    "4 bits, 128 (192 inputs: the last group is short)": ("llama", {}, [(4, 128)], None, {"Q4_0", "F32"}),
    "3 bits, channel": ("mistral", {}, [(3, -1)], None, {"Q4_0", "F32"}),
    "5 bits": ("mistral", {"tie_word_embeddings": True}, [(5, 32)], None, {"Q5_0", "F32"}),
    "8 bits, channel": ("qwen2", {}, [(8, -1)], None, {"Q8_0", "F32"}),
    "mixed, llama": ("llama", {"head_dim": 64}, MIXED, 8, {"Q4_0", "Q5_0", "Q8_0", "F32"}),
    "mixed, qwen2": ("qwen2", {"tie_word_embeddings": True}, MIXED, 8, {"Q4_0", "Q5_0", "Q8_0", "F32"}),
    "mixed, qwen3": ("qwen3", {"tie_word_embeddings": True}, MIXED, 4, {"Q4_0", "Q5_0", "Q8_0", "F32"}),
    "many heads, one k and v": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}, [(4, 32)], 6, {"Q4_0", "Q8_0", "F32"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_plain_transformers_reads_the_same_model(name, tmp_path, source):
    kind, config, schemes, embedding, types = EXACT[name]
    dense = built(kind, **config)
    model = rounded(copy.deepcopy(dense), schemes)
    if embedding:
        model = pack_embedding(model, embedding)
    report = written(model, tmp_path / "out", source)
    assert report["loss"]["worst"] == 0 and report["loss"]["mean"] == 0 and not report["warnings"]
    assert {t["type"] for t in report["tensors"].values()} == types
    theirs = opened(tmp_path / "out")
    got, want = logits(theirs), logits(model.build(dtype=torch.float32))
    assert (got - want).abs().max() <= 1e-5
    assert (got - logits(dense)).abs().max() > 1e-3  # it was quantised at all
    tied = bool(config.get("tie_word_embeddings"))
    assert theirs.config.tie_word_embeddings is tied and ("output.weight" not in report["tensors"]) is tied
    assert theirs.config.max_position_embeddings == 256 and theirs.config.rope_parameters["rope_theta"] == 1234


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype, type_name", [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_dense_matrices_keep_their_dtype(kind, dtype, type_name, tmp_path, source):
    model = built(kind).to(dtype)
    model = Blueprint.of_module(model)
    report = written(model, tmp_path / "out", source)
    kinds = {name: t["type"] for name, t in report["tensors"].items()}
    assert report["loss"]["worst"] == 0
    assert {k for n, k in kinds.items() if "norm" in n or n.endswith("bias")} == {"F32"}
    assert {k for n, k in kinds.items() if n.endswith("weight") and "norm" not in n} == {type_name}
    assert (logits(opened(tmp_path / "out")) - logits(model.build(dtype=torch.float32))).abs().max() <= 1e-5


def test_a_pruned_model_is_dense(tmp_path, source):
    model = built("llama")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.mul_(tiles.n_m_mask(module.weight.abs(), 2, 4))
    written(Blueprint.of_module(model), tmp_path / "out", source)
    theirs = opened(tmp_path / "out")
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert (theirs.model.layers[2].self_attn.q_proj.weight == 0).float().mean() == 0.5


def test_dropped_and_shared_blocks_become_a_model_of_the_blocks_that_run(tmp_path, source):
    model = rounded(built("llama"), [(4, 32)])
    model = model.with_layers([0, 2, 1]).with_shared({2: 0}, own=lambda name: "norm" in name).with_layers([0, 2])
    report = written(model, tmp_path / "out", source)
    assert (logits(opened(tmp_path / "out")) - logits(model.build(dtype=torch.float32))).abs().max() <= 1e-5
    assert values(tmp_path / "out" / "model.gguf")["llama.block_count"] == 2
    sizes = [report["tensors"][f"blk.{i}.ffn_up.weight"]["bytes"] for i in (0, 1)]
    assert sizes == [192 * 128 // 32 * 18] * 2  # copies


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_are_merged(kind, tmp_path, source):
    module = built(kind)
    rounded(module, [(4, 32)])
    rng = torch.Generator().manual_seed(0)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        adapted = LoraLinear(module.get_submodule(name), r=4, lora_alpha=8.0)
        adapted.start(rng)
        adapted.lora_B.data.normal_(std=0.02, generator=rng)
        layers.swap(module, name, adapted.requires_grad_(False))
    model = Blueprint.of_module(module)
    report = written(model, tmp_path / "out", source)
    lossy = {t["of"] for t in report["tensors"].values() if t["loss"]}
    assert lossy == {"model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    assert report["tensors"]["blk.0.attn_q.weight"]["type"] == "Q8_0" and 0 < report["loss"]["worst"] < 0.01
    theirs = opened(tmp_path / "out")
    for name in lossy:
        merged = module.get_submodule(name.removesuffix(".weight")).plain_weight()
        [stated] = [t["loss"] for t in report["tensors"].values() if t["of"] == name]
        assert ((theirs.get_parameter(name) - merged).norm() / merged.norm()).item() == pytest.approx(stated, rel=1e-4)
    got, want = logits(theirs), logits(model.build(dtype=torch.float32))
    assert (got - want).norm() < 0.02 * want.norm()


# the bytes


def by_hand(kind: str, block: bytes) -> list[float]:
    """The 32 numbers of a block, as ggml-quants.c reads them, one at a time."""
    half = lambda at: struct.unpack_from("<e", block, at)[0]  # noqa: E731
    d = half(0)
    if kind == "Q8_0":
        return [d * struct.unpack_from("<b", block, 2 + j)[0] for j in range(32)]
    m, at = (half(2), 4) if kind.endswith("_1") else (None, 2)
    fifth, at = (struct.unpack_from("<I", block, at)[0], at + 4) if kind.startswith("Q5") else (0, at)
    out = []
    for j in range(32):
        byte = block[at + j % 16]
        q = (byte & 15 if j < 16 else byte >> 4) | ((fifth >> j) & 1) << 4
        out.append(d * (q - (16 if kind.startswith("Q5") else 8)) if m is None else d * q + m)
    return out


BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 5),
    blocks=st.integers(1, 6),
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 32, 64, 96, 4096]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_hold_our_codes(n, blocks, bits, group, symmetric, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(32 * blocks, n, bias=False).requires_grad_(False)
    module = packed(linear, bits, group, symmetric=symmetric)
    found = gguf.on_grid(module)
    if not symmetric and bits > 5:
        assert found is None
        return
    kind, rows = found
    assert kind.name == {True: "Q4_0 Q4_0 Q4_0 Q5_0 Q8_0 Q8_0 Q8_0", False: "Q4_1 Q4_1 Q4_1 Q5_1"}[symmetric].split()[bits - 2]
    size = BLOCK_BYTES[kind.name]
    assert rows.dtype == np.uint8 and rows.shape == (n, blocks * size)
    hand = torch.tensor([[v for b in range(blocks) for v in by_hand(kind.name, row[b * size : (b + 1) * size].tobytes())] for row in rows])
    ours = module.dequantize()
    if symmetric:
        assert torch.equal(hand, ours)
    else:  # m is rounded to fp16; 0 stays exact
        off = module.zero().float().add(2 ** (bits - 1)).mul(module.weight_scale.float()).amax().item()
        assert (hand - ours).abs().max() <= off * 2.0**-11 + 1e-7
    assert np.allclose(reader.quants.dequantize(rows, kind), hand.numpy(), rtol=1e-6, atol=1e-9)


def test_an_asymmetric_grid_is_exact_where_its_minimum_is_an_fp16_number():
    linear = nn.Linear(32, 2, bias=False).requires_grad_(False)
    codes = torch.randint(-8, 8, (2, 32), dtype=torch.int8)
    for scale, exact in ((0.25, True), (255 / 128, False)):  # 15 * 255 takes 12 bits, one too many
        module = PackedLinear.of(linear, codes, torch.full((2, 1), scale), torch.full((2, 1), 7, dtype=torch.int8), bits=4, group_size=-1)
        kind, rows = gguf.on_grid(module)
        assert kind.name == "Q4_1" and np.array_equal(reader.quants.dequantize(rows, kind), module.dequantize().numpy()) is exact


@pytest.mark.parametrize("k, group", [(33, 33), (48, -1), (64, 24), (64, 48), (128, 16)])
def test_codes_that_blocks_of_32_cannot_follow_are_not_kept(k, group):
    assert gguf.on_grid(packed(nn.Linear(k, 3).requires_grad_(False), 4, group)) is None


# what is lost


LOSSY = {  # (bits, group), options, the worst loss in between, types of the blocks' matrices
    "asymmetric": ([(4, 32), (5, 64), (3, -1)], {"symmetric": False}, (1e-6, 5e-4), {"Q4_1", "Q5_1"}),
    "asymmetric, 8 bits": ([(8, 32)], {"symmetric": False}, (1e-4, 1e-2), {"Q8_0"}),
    "groups of 24": ([(4, 24)], {}, (1e-3, 1e-2), {"Q8_0"}),
    "groups of 16": ([(3, 16)], {}, (1e-3, 1e-2), {"Q8_0"}),
    "fp32 scales": ([(4, 32), (8, 64)], {"dtype": torch.float32}, (1e-6, 5e-4), {"Q4_0", "Q8_0"}),
}


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_lost_is_stated(name, tmp_path, source):
    schemes, options, (low, high), types = LOSSY[name]
    model = rounded(built("llama"), schemes, **options)
    report = written(model, tmp_path / "out", source)
    blocks = {n: t for n, t in report["tensors"].items() if n.startswith("blk.") and "norm" not in n}
    assert {t["type"] for t in blocks.values()} == types and low < report["loss"]["worst"] < high
    theirs = dict(opened(tmp_path / "out").named_parameters())
    true = {}
    for n, t in blocks.items():  # measured again on what transformers reads
        ours = model.build(dtype=torch.float32).get_submodule(t["of"].removesuffix(".weight")).dequantize()
        true[n] = ((theirs[t["of"]] - ours).norm() / ours.norm()).item()
        assert t["loss"] == pytest.approx(true[n], rel=1e-3, abs=1e-9)
    others = sum(1 for n, t in report["tensors"].items() if n in ("token_embd.weight", "output.weight"))
    assert report["loss"] == {
        "worst": max(t["loss"] for t in blocks.values()),
        "tensor": max(blocks, key=lambda n: blocks[n]["loss"]),
        "mean": pytest.approx(sum(true.values()) / (len(true) + others), rel=1e-3),
    }
    kept = values(tmp_path / "out" / "model.gguf")
    assert kept["blockwright.loss.worst"] == pytest.approx(report["loss"]["worst"], rel=1e-6)
    assert kept["blockwright.loss.mean"] == pytest.approx(report["loss"]["mean"], rel=1e-6)
    assert json.loads(kept["blockwright.loss.tensors"]) == {n: t["loss"] for n, t in blocks.items() if t["loss"]}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report


def test_widths_that_no_block_fits_are_halves(tmp_path, source):
    model = rounded(built("llama", intermediate_size=200), [(8, -1)])
    report = written(model, tmp_path / "out", source)
    kinds = {n: (t["type"], t["loss"]) for n, t in report["tensors"].items() if n.startswith("blk.0.ffn") and "norm" not in n}
    assert {n: k for n, (k, _) in kinds.items()} == {
        "blk.0.ffn_gate.weight": "Q8_0",
        "blk.0.ffn_up.weight": "Q8_0",
        "blk.0.ffn_down.weight": "F16",
    }
    assert kinds["blk.0.ffn_up.weight"][1] == 0 < kinds["blk.0.ffn_down.weight"][1] < 5e-4
    assert (logits(opened(tmp_path / "out")) - logits(model.build(dtype=torch.float32))).abs().max() < 1e-3


@pytest.mark.parametrize("factor, kind", [(1e-4, "Q4_0"), (1e-6, "BF16"), (1e8, "BF16"), (0, "Q4_0")])
def test_scales_beyond_fp16_do_not_ruin_a_matrix(factor, kind):
    """1e-4: subnormal in fp16, still within 1 %; 1e-6: it would lose most of its digits; 1e8: infinite."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False).requires_grad_(False)
    linear.weight *= factor
    found = gguf._nearest(packed(linear, 4, 32))
    assert found.kind.name == kind and found.loss <= 0.01 and math.isfinite(found.loss)


# the tokenizer and the rest of the metadata


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "smollm"])
def test_the_tokenizer_gives_the_same_ids(pre, tmp_path):
    made = tokenizer(pre)
    made.save_pretrained(tmp_path / "source")
    report = written(rounded(built("llama"), [(4, 32)]), tmp_path / "out", tmp_path / "source")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    kept = values(tmp_path / "out" / "model.gguf")
    assert not report["warnings"] and kept["tokenizer.ggml.pre"] == pre and kept["tokenizer.ggml.model"] == "gpt2"
    for text in SAMPLES:
        if pre != "smollm" or not any(c.isdigit() for c in text):  # transformers' reader does not know that smollm cuts at digits
            assert theirs(text).input_ids == made(text).input_ids, text
            assert theirs.decode(theirs(text).input_ids) == made.decode(made(text).input_ids)
    message = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(message, tokenize=False) == made.apply_chat_template(message, tokenize=False)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == (
        made.bos_token,
        made.eos_token,
        made.unk_token,
        made.pad_token,
    )
    types = kept["tokenizer.ggml.token_type"]
    assert len(types) == len(kept["tokenizer.ggml.tokens"]) == 352  # the model's, which has more rows than the tokenizer has tokens
    assert types[:3] == [3, 3, 3] and types[315:317] == [4, 4] and set(types[3:315]) == {1} and set(types[317:]) == {5}
    assert kept["tokenizer.ggml.add_bos_token"] is False and kept["tokenizer.ggml.add_eos_token"] is False


def framing(before: str, after: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2), ("<|endoftext|>", 0)]
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), WORDS])}, "no name for its way to cut text (Punctuation"),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), WORDS])}, "no name for its way to cut text (Digits"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "the space put before a text"),
        ({"normalizer": normalizers.NFC()}, "NFC"),
        ({"post_processor": framing("<|im_start|> <|endoftext|>", "")}, "more around a text"),
    ],
)
def test_what_a_file_cannot_say_of_a_tokenizer_is_a_warning(changes, said, tmp_path):
    tokenizer(**changes).save_pretrained(tmp_path / "source")
    report = written(Blueprint.of_module(built("llama")), tmp_path / "out", tmp_path / "source")
    assert len(report["warnings"]) == 1 and said in report["warnings"][0]
    named = values(tmp_path / "out" / "model.gguf")["tokenizer.ggml.pre"]
    assert named == ("default" if "no name" in said else "gpt-2")


def test_words_that_are_taken_whole_or_not_are_a_warning(tmp_path):
    made = tokenizer("qwen2")
    made.backend_tokenizer.model.ignore_merges = True
    made.save_pretrained(tmp_path / "source")
    report = written(Blueprint.of_module(built("llama")), tmp_path / "out", tmp_path / "source")
    assert ["do not take a known word whole" in w for w in report["warnings"]] == [True]


def test_first_and_last_tokens_are_told(tmp_path):
    tokenizer(post_processor=framing("<|im_start|>", "<|im_end|>")).save_pretrained(tmp_path / "source")
    assert not written(Blueprint.of_module(built("llama")), tmp_path / "out", tmp_path / "source")["warnings"]
    kept = values(tmp_path / "out" / "model.gguf")
    assert kept["tokenizer.ggml.add_bos_token"] is True and kept["tokenizer.ggml.add_eos_token"] is True


def test_metadata_agrees_with_a_file_that_llama_cpp_made(tmp_path, monkeypatch):
    """SmolLM2's published GGUF, against ours of the model and tokenizer read from it: one small tensor, all metadata."""
    package, name, cure = zoo.SMOLLM2
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(cure)
    published = reader.GGUFReader(Path(spec.submodule_search_locations[0]) / name)
    folder = zoo.model_folder("smollm2")
    some = [t for t in published.tensors if t.name in ("blk.29.attn_norm.weight", "blk.3.attn_k.weight")]
    few = [(t.name, t.name, gguf.Encoded(t.tensor_type, np.array(t.data), 0.0)) for t in some]
    monkeypatch.setattr(gguf, "_tensors", lambda model: iter(few))
    report = written(Blueprint.of_folder(folder), tmp_path / "out", folder)
    written_file = reader.GGUFReader(tmp_path / "out" / "model.gguf")
    ours, theirs = values(written_file), values(published)
    about_its_makers = {f"general.{key}" for key in ("name", "organization", "finetune", "basename", "size_label", "license", "languages")}
    assert theirs.keys() - about_its_makers <= ours.keys()
    same = theirs.keys() - about_its_makers - {"tokenizer.ggml.pre"}
    assert {k for k in same if ours[k] != theirs[k]} == set()
    # transformers' reader, which the tokenizer went through, dropped "smollm" (digits one by one): written is what the tokenizer now does
    assert theirs["tokenizer.ggml.pre"] == "smollm" and ours["tokenizer.ggml.pre"] == "gpt-2"
    for a, b in zip(written_file.tensors, some, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type) and np.array_equal(a.data, b.data) and np.array_equal(a.shape, b.shape)
    assert report["warnings"] == []


@pytest.mark.parametrize(
    "kind, more, keys, warned",
    [
        ("llama", {"head_dim": 64}, {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}, None),
        ("llama", {}, {"rope.dimension_count": 32, "context_length": 256}, None),
        ("mistral", {"sliding_window": 64}, {"context_length": 64}, "no sliding window for mistral"),
        ("mistral", {"sliding_window": 4096}, {"context_length": 256}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, {"context_length": 32}, "no sliding window"),
        ("qwen2", {"sliding_window": 32}, {"context_length": 256}, None),
        ("qwen3", {"head_dim": 64}, {"attention.key_length": None}, "head_dim is 64"),
        ("qwen3", {"head_dim": 32}, {"attention.key_length": 32}, "head_dim is 32"),
        (
            "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 1e4}, "RoPE scaling 'linear'",
        ),
    ],
)  # fmt: skip
def test_sizes_that_differ_from_the_usual_are_told(kind, more, keys, warned, tmp_path, source):
    model = built(kind, **more)
    report = written(Blueprint.of_module(model), tmp_path / "out", source)
    kept = values(tmp_path / "out" / "model.gguf")
    prefix = "llama" if kind == "mistral" else kind
    assert {k: kept.get(f"{prefix}.{k}") for k in keys} == keys
    assert [warned in w for w in report["warnings"]] == ([True] if warned else [])


def test_llama3_scaling_is_a_table_of_factors(tmp_path, source):
    report = written(Blueprint.of_module(built("llama", rope_parameters=ROPE)), tmp_path / "out", source)
    [table] = [t for t in reader.GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "rope_freqs.weight"]
    want = []
    for i in range(16):  # arXiv 2407.21783's scaling, one frequency at a time
        length = 2 * math.pi * 5e3 ** (2 * i / 32)
        smooth = (128 / length - 1) / (4 - 1)
        want.append(8 if length > 128 else 1 if length < 32 else 1 / ((1 - smooth) / 8 + smooth))
    assert table.data.tolist() == pytest.approx(want, rel=1e-5) and len(set(want)) > 2
    assert ["transformers' own GGUF reader does not" in w for w in report["warnings"]] == [True]


# refusals


@pytest.mark.parametrize(
    "kind, more, said",
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'. Allowed: 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "RoPE scaling 'dynamic' of llama"),
        ("llama", {"rope_parameters": YARN}, "RoPE scaling 'yarn' of llama. Allowed: default, linear, llama3."),
        ("qwen2", {"rope_parameters": ROPE}, "RoPE scaling 'llama3' of qwen2. Allowed: default, linear."),
        ("llama", {"vocab_size": 310}, "the tokenizer knows id 316, the model 310 tokens"),
    ],
)
def test_a_model_that_gguf_cannot_say_is_refused(kind, more, said, tmp_path, source):
    with pytest.raises(BlockwrightError) as refused:
        written(Blueprint.of_module(built(kind, **more)), tmp_path / "out", source)
    assert said in str(refused.value) and not list((tmp_path / "out").iterdir())


def test_another_architecture_is_refused_by_name(tmp_path, source):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=352, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(BlockwrightError, match="architecture 'gpt2'.*llama, mistral, qwen2, qwen3"):
        written(Blueprint.of_module(model), tmp_path / "out", source)


def spoken(kind: str) -> Tokenizer:
    if kind == "Unigram":
        return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    if kind == "WordLevel":
        return Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    if kind == "sentencepiece":
        return Tokenizer(models.BPE({"<unk>": 0, "a": 1, "▁": 2}, [], byte_fallback=True, unk_token="<unk>"))
    made = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1, "b</w>": 2}, [], end_of_word_suffix="</w>" if kind == "ends" else "", unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace() if kind == "Whitespace" else WORDS
    if kind == "Lowercase":
        made.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize(
    "kind, said",
    [
        ("Unigram", "tokenizer Unigram"),
        ("WordLevel", "tokenizer WordLevel"),
        ("sentencepiece", "BPE with byte fallback, as sentencepiece makes it"),
        ("ends", "BPE with marks at the ends of words"),
        ("Whitespace", "BPE behind Whitespace"),
        ("Lowercase", "BPE on text changed by Lowercase"),
    ],
)
def test_other_tokenizers_are_refused_by_name(kind, said, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=spoken(kind), unk_token="<unk>").save_pretrained(tmp_path / "source")
    with pytest.raises(BlockwrightError, match=f"{said}.*byte-level BPE"):
        written(Blueprint.of_module(built("llama")), tmp_path / "out", tmp_path / "source")


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path, source):
    model = Blueprint.of_module(built("llama"))
    (tmp_path / "none").mkdir()
    with pytest.raises(BlockwrightError, match=r"no tokenizer\.json"):
        written(model, tmp_path / "a", tmp_path / "none")
    (tmp_path / "none" / "tokenizer.json").write_text((source / "tokenizer.json").read_text()[:-100])
    with pytest.raises(BlockwrightError, match="unreadable tokenizer"):
        written(model, tmp_path / "b", tmp_path / "none")


def test_a_weight_that_is_not_finite_is_named(tmp_path, source):
    model = built("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = math.inf
    with pytest.raises(BlockwrightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: inf"):
        written(Blueprint.of_module(model), tmp_path / "out", source)


# folders, bw.export and the command


@pytest.fixture(scope="module")
def ours(tmp_path_factory, source) -> Path:
    """A folder that blockwright wrote: 4 bits, embedding 8 bits, two blocks shared."""
    folder = tmp_path_factory.mktemp("ours") / "cheaper"
    model = rounded(built("llama", tie_word_embeddings=True), [(4, 64)])
    model = pack_embedding(model.with_shared({2: 1}, own=lambda name: "norm" in name), 8)
    about = {"stages": [{"name": "finequant", "options": {"bits": 4}}], "seed": 7}
    folders.publish(folder, lambda scratch: export.write(model, scratch, source=source, dtype=torch.float32, about=about))
    return folder


def test_a_folder_goes_out_whole_and_says_what_was_done(ours, tmp_path):
    made = bw.export(ours, tmp_path / "out", to="gguf")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["LICENSE", "export.json", "manifest.json", "model.gguf"]
    folders.verify(tmp_path / "out")
    kept = values(tmp_path / "out" / "model.gguf")
    assert json.loads(kept["blockwright.stages"]) == [{"name": "finequant", "options": {"bits": 4}}]
    assert kept["general.name"] == "cheaper" and kept["general.file_type"] == reader.LlamaFileType.MOSTLY_Q4_0
    assert made["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size and made["loss"]["worst"] == 0
    want = logits(bw.load(ours, dtype=torch.float32, fast=False))
    assert (logits(opened(tmp_path / "out")) - want).abs().max() <= 1e-5


def test_other_forms_hold_the_same_model(ours, tmp_path):
    want = logits(bw.load(ours, dtype=torch.float32, fast=False))
    for to in ("dense", "blockwright"):
        made = bw.export(ours, tmp_path / to, to=to)
        folders.verify(tmp_path / to)
        assert made["layout"] == ("blockwright" if to == "blockwright" else "standard")
        assert json.loads((tmp_path / to / "blockwright.json").read_text())["seed"] == 7
        assert (tmp_path / to / "LICENSE").exists() and (tmp_path / to / "tokenizer.json").exists()
        assert (logits(bw.load(tmp_path / to, dtype=torch.float32, fast=False)) - want).abs().max() <= 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert (logits(plain) - want).abs().max() <= 1e-5
    with pytest.raises(BlockwrightError, match="export=standard"):
        bw.export(ours, tmp_path / "standard", to="standard")
    assert not (tmp_path / "standard").exists()
    again = bw.export(tmp_path / "dense", tmp_path / "again", to="gguf")  # any plain model folder goes
    assert again["loss"]["worst"] == 0 and AutoConfig.from_pretrained(tmp_path / "again", gguf_file="model.gguf").vocab_size == 352


@pytest.mark.parametrize(
    "out, options, said",
    [
        ("out", {"to": "onnx"}, "to='onnx'. Allowed: gguf, standard"),
        ("model.gguf", {"to": "gguf"}, "Name a folder, such as model"),
        (".", {"to": "gguf"}, "is, holds or lies inside"),
        ("cheaper/inside", {"to": "gguf"}, "is, holds or lies inside"),
    ],
)
def test_what_cannot_be_an_export_is_refused(out, options, said, ours):
    with pytest.raises(BlockwrightError) as refused:
        bw.export(ours, ours.parent / out, **options)
    assert said in str(refused.value) and [p.name for p in ours.parent.iterdir()] == ["cheaper"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(ours, tmp_path, monkeypatch):
    def full(self):
        self.write_ti_data_to_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reader.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(BlockwrightError, match="the disk is full"):
        bw.export(ours, tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(BlockwrightError, match="not empty"):
        bw.export(ours, tmp_path / "out", to="gguf")
    with pytest.raises(BlockwrightError, match="the disk is full"):
        bw.export(ours, tmp_path / "out", to="gguf", overwrite=True)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["out", "out/old"]
    monkeypatch.undo()
    bw.export(ours, tmp_path / "out", to="gguf", overwrite=True)
    assert not (tmp_path / "out" / "old").exists() and (tmp_path / "out" / "model.gguf").exists()


@pytest.mark.parametrize("room", [1000, 30_000, 150_000])
def test_a_disk_that_fills_up_leaves_nothing(room, ours, tmp_path):
    def export_into_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(BlockwrightError, match="the disk is full"):
            bw.export(ours, tmp_path / "out", to="gguf")

    assert in_fork(export_into_little_room) == 0
    assert not list(tmp_path.iterdir())


def test_the_same_model_gives_the_same_bytes(ours, tmp_path):
    for out in ("a", "b"):
        bw.export(ours, tmp_path / out, to="gguf")
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()


def test_the_command_says_what_it_wrote_and_lost(blockwright, ours, tmp_path):
    code, out, _ = blockwright("export", str(ours), str(tmp_path / "out"), "--to", "gguf")
    assert code == 0 and str(tmp_path / "out" / "model.gguf") in out and "21 Q4_0" in out and "every weight is exact" in out
    code, _, err = blockwright("export", str(ours), str(tmp_path / "out"), "--to", "gguf")
    assert code == 2 and "not empty" in err and err.count("\n") == 1
    code, out, _ = blockwright("export", str(ours), str(tmp_path / "out"), "--to", "dense", "--overwrite")
    assert code == 0 and "layout standard" in out and not (tmp_path / "out" / "model.gguf").exists()
    code, _, err = blockwright("export", str(ours), str(tmp_path / "other"), "--to", "onnx")
    assert code == 2 and "Allowed: gguf, standard, unrolled, w8a8, dense, blockwright" in err and not (tmp_path / "other").exists()


def test_the_command_says_what_is_lost_and_warns(blockwright, tmp_path):
    tokenizer(normalizer=normalizers.NFC()).save_pretrained(tmp_path / "source")
    model = rounded(built("llama"), [(4, 16)])
    folders.publish(tmp_path / "ours", lambda s: export.write(model, s, source=tmp_path / "source", dtype=torch.float32))
    code, out, _ = blockwright("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "gguf")
    assert code == 0 and "loss     worst 0." in out and "warning  tokenizer: NFC" in out


# llama.cpp itself


def llama_cpp_of(file: Path):
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False)


@pytest.mark.parametrize(
    "kind, more",
    [
        ("llama", {}),
        ("llama", {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": ROPE}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3}}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_llama_cpp_computes_the_same(kind, more, tmp_path, source):
    pytest.importorskip("llama_cpp")
    model = built(kind, **more)
    written(Blueprint.of_module(model), tmp_path / "out", source)
    theirs = llama_cpp_of(tmp_path / "out" / "model.gguf")
    theirs.eval(IDS[0].tolist())
    got, want = torch.tensor(np.array(theirs.scores[: IDS.shape[1]])), logits(model)[0]
    assert (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_the_same_from_blocks(kind, tmp_path, source):
    pytest.importorskip("llama_cpp")
    model = pack_embedding(rounded(built(kind, tie_word_embeddings=True), MIXED), 8)
    written(model, tmp_path / "out", source)
    theirs = llama_cpp_of(tmp_path / "out" / "model.gguf")
    theirs.eval(IDS[0].tolist())
    got, want = torch.tensor(np.array(theirs.scores[: IDS.shape[1]])), logits(model.build(dtype=torch.float32))[0]
    assert (got - want).norm() < 0.03 * want.norm()  # it rounds activations to 8 bits


@pytest.mark.parametrize("pre", CUTS)
def test_llama_cpp_cuts_text_the_same_way(pre, tmp_path):
    pytest.importorskip("llama_cpp")
    made = tokenizer(pre)
    made.save_pretrained(tmp_path / "source")
    written(Blueprint.of_module(built("llama")), tmp_path / "out", tmp_path / "source")
    theirs = llama_cpp_of(tmp_path / "out" / "model.gguf")
    for text in SAMPLES:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == made(text).input_ids, text


def test_a_linear_of_its_own_size_is_refused(tmp_path):
    model = Blueprint.of_module(built("llama"))
    model = model.edited(forms={"model.layers.0.mlp.up_proj": {"form": "linear", "size": [32, 64]}})
    with pytest.raises(BlockwrightError, match="up_proj is 32 x 64, a size of its own.*Use --to blockwright"):
        gguf.write(model, tmp_path, source=tmp_path)


CHILDREN = {
    "gone": ({"widths": [], "heads": [1], "linear": False}, None),
    "narrow": ({"widths": [0.5], "heads": [], "linear": False, "no_op": False}, r"mlp\.\w+_proj is \d+ x \d+, a size of its own"),
    "linear": ({"widths": [], "heads": [], "no_op": False}, r"(self_attn|mlp) is linear (attention|ffn), which no weights of \w+ compute"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options, refused", CHILDREN.values(), ids=CHILDREN)
def test_a_puzzle_child_opens_with_its_logits_or_is_refused_by_name(kind, options, refused, tmp_path, source):
    """Gone subblocks and fewer key and value heads are in the file as zeros and as copies; widths and linears have no place in it."""
    model = built(kind)
    ids = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(1))
    child = puzzle(model, calibration=ids, size=0.86, score_windows=2, dtype="fp32", **options)
    assert (logits(child) - logits(model)).abs().max() > 1e-3
    if refused:
        with pytest.raises(BlockwrightError, match=rf"model\.layers\.\d\.{refused}"):
            written(Blueprint.of_module(child), tmp_path / "out", source)
        return
    assert {m.form()["form"] for m in child.modules() if hasattr(m, "form")} & {"no_attention", "no_ffn"}
    assert written(Blueprint.of_module(child), tmp_path / "out", source)["loss"]["worst"] == 0
    assert (logits(opened(tmp_path / "out")) - logits(child)).abs().max() <= 1e-5
