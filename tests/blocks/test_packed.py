"""Packed modules: their numbers against the formula, their files against plain transformers with compressed-tensors."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers, tiles
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.errors import BlockwrightError

quick = settings(deadline=None, max_examples=40)


def linear(k: int, n: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(k * 100 + n)
    return nn.Linear(k, n, bias=bias).requires_grad_(False)


def packed(dense: nn.Module, bits: int, group_size: int, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    w = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
    zero = None
    if symmetric:
        scale = tiles.symmetric_scale(w, bits=bits, group_size=group_size, dtype=dtype)
    else:
        scale, zero = tiles.asymmetric_grid(w, bits=bits, group_size=group_size, dtype=dtype)
    codes = tiles.to_codes(w, scale, zero, bits=bits, group_size=group_size)
    return PackedLinear.of(dense, codes, scale, zero, bits=bits, group_size=group_size)


def refilled(module: nn.Module, empty: nn.Module) -> nn.Module:
    """`empty` (on meta) with the tensors of `module`, strictly by name."""
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(module.state_dict(), assign=True)
    return empty


@quick
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.one_of(st.just(-1), st.integers(1, 80)),
    symmetric=st.booleans(),
    bias=st.booleans(),
)
def test_a_packed_linear_multiplies_by_its_codes_and_scales(n, k, bits, group, symmetric, bias):
    dense = linear(k, n, bias=bias)
    module = packed(dense, bits, group, symmetric=symmetric)
    codes, scale, zero = module.codes(), module.weight_scale.double(), module.zero()
    size = k if group == -1 else group
    by_hand = torch.tensor(
        [
            [(codes[i, j].item() - (0 if zero is None else zero[i, j // size].item())) * scale[i, j // size].item() for j in range(k)]
            for i in range(n)
        ],
        dtype=torch.float64,
    )
    assert torch.equal(module.dequantize().double(), by_hand)
    top = (dense.weight.abs().max() * 2 / (2**bits - 1)).item()  # no group has a larger step
    assert (by_hand - dense.weight).abs().max() <= 1.6 * top  # 1, and what a clamp loses where bf16 rounds the scale down
    x = torch.randn(2, 3, k)
    want = x.double() @ by_hand.T + (dense.bias.double() if bias else 0)
    assert torch.allclose(module(x).double(), want, rtol=1e-5, atol=1e-5)
    assert sorted(module.state_dict()) == sorted(
        ["weight_packed", "weight_scale", "weight_shape"] + ["weight_zero_point"] * (not symmetric) + ["bias"] * bias
    )
    assert module.weight_shape.tolist() == [n, k] and module.weight_packed.shape == (n, -(-k * bits // 32))
    again = refilled(module, PackedLinear.from_form(dense, json.loads(json.dumps(module.form()))))
    assert torch.equal(again(x), module(x)) and again.form() == module.form()
    assert (again.in_features, again.out_features) == (k, n)


def test_a_packed_linear_answers_in_the_dtype_of_its_input():
    module = packed(linear(48, 8), 4, 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = module(torch.randn(5, 48, dtype=dtype))
        assert y.dtype == dtype and y.shape == (5, 8)
    assert module(torch.randn(0, 48)).shape == (0, 8)


def test_gradients_reach_the_input_and_nothing_else():
    module = packed(linear(20, 6), 4, 8)
    x = torch.randn(4, 20, requires_grad=True)
    module(x).backward(torch.ones(4, 6))
    assert torch.allclose(x.grad, torch.ones(4, 6) @ module.dequantize())
    assert not any(p.requires_grad for p in module.parameters())


def test_one_grid_for_the_whole_matrix_is_stored_row_by_row():
    dense = linear(20, 6)
    scale, zero = tiles.asymmetric_grid(dense.weight.reshape(1, -1), bits=8)
    module = PackedLinear.of(dense, tiles.to_codes(dense.weight, scale, zero, bits=8), scale, zero, bits=8, group_size=-1)
    assert module.weight_scale.shape == (6, 1) and module.zero().unique().numel() == 1
    assert (module.dequantize() - dense.weight).abs().max() <= scale.item()


def test_a_conv1d_keeps_its_layout():
    torch.manual_seed(0)
    dense = Conv1D(8, 24).requires_grad_(False)
    module = packed(dense, 8, 8)
    x = torch.randn(3, 24)
    assert (module(x) - dense(x)).abs().max() < 0.05 * dense(x).abs().max()
    assert module.plain_weight().shape == dense.weight.shape and (module.plain_weight() - dense.weight).abs().max() < 1e-3
    assert module.form()["transposed"]
    again = refilled(module, PackedLinear.from_form(dense, module.form()))
    assert torch.equal(again(x), module(x)) and torch.equal(again.plain_weight(), module.plain_weight())
    assert torch.equal(packed(linear(24, 8), 8, 8).plain_weight(), packed(linear(24, 8), 8, 8).dequantize())


def test_the_original_is_left_alone():
    dense = linear(20, 6)
    weight, bias = dense.weight.clone(), dense.bias.clone()
    module = packed(dense, 4, 8)
    module.bias.add_(1)
    assert torch.equal(dense.weight, weight) and torch.equal(dense.bias, bias)


def test_damaged_codes_are_refused():
    module = packed(linear(20, 6), 4, 8)
    module.weight_packed = module.weight_packed[:, :2].contiguous()
    with pytest.raises(BlockwrightError, match="2 words a row.*3 words for 20 columns"):
        module(torch.randn(1, 20))


@pytest.mark.parametrize("bits,group", [(8, 64), (4, 16), (5, -1), (8, 7)])
def test_an_embedding_reads_the_rows_asked_for(bits, group):
    torch.manual_seed(0)
    table = torch.randn(50, 30)
    module = PackedEmbedding.of(table, bits=bits, group_size=group, dtype=torch.float32)
    ids = torch.tensor([[3, 49, 0], [3, 3, 7]])
    assert torch.equal(module(ids), module.dequantize()[ids])
    assert (module(ids) - table[ids]).abs().max() <= 1.001 * table.abs().max() / (2**bits - 1) + 1e-6  # half of the widest step
    assert module(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 30)
    again = refilled(module, PackedEmbedding.from_form(nn.Embedding(50, 30), json.loads(json.dumps(module.form()))))
    assert torch.equal(again(ids), module(ids)) and torch.equal(again.plain_weight(), module.dequantize())
    assert PackedEmbedding.of(table)(ids).dtype == torch.bfloat16  # the dtype of its scales


def test_a_tied_head_is_a_packed_linear_on_the_same_tensors():
    table = torch.randn(50, 32)
    embedding = PackedEmbedding.of(table, bits=8, group_size=16)
    head = PackedLinear.from_form(nn.Linear(32, 50, bias=False), embedding.form() | {"form": "packed"})
    for name in embedding.state_dict():
        head._buffers[name] = embedding._buffers[name]
    x = torch.randn(3, 32)
    assert torch.equal(head(x), x @ embedding.dequantize().T)
    assert head.weight_packed.data_ptr() == embedding.weight_packed.data_ptr()


# plain transformers


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() == 1:
            p += 0.1 * torch.randn_like(p)  # biases and norms that matter
    return model


def saved(model: nn.Module, folder, forms: dict[str, dict], extra: dict) -> None:
    """Weights under their names and a config as compressed-tensors writes it, one config group a scheme."""
    groups: dict[tuple, list[str]] = {}
    for name, form in forms.items():
        groups.setdefault((form["bits"], form["group_size"], form["symmetric"]), []).append(name)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "dynamic": False,
                    "strategy": "channel" if group == -1 else "group",
                    "group_size": None if group == -1 else group,
                },
            }
            for i, ((bits, group, symmetric), names) in enumerate(groups.items())
        },
    } | extra
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def quantized(schemes: list[tuple[int, int]], symmetric: bool, dtype: torch.dtype) -> tuple[nn.Module, dict[str, dict]]:
    model = tiny_llama()
    forms = {}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for i, name in enumerate(names):
        bits, group = schemes[i % len(schemes)]
        new = packed(model.get_submodule(name), bits, group, symmetric=symmetric, dtype=dtype)
        layers.swap(model, name, new)
        forms[name] = new.form()
    return model, forms


MIXED = [(3, -1), (4, 32), (5, 16), (8, -1), (4, -1), (2, 32), (6, 8), (7, 16), (8, 32)]


@pytest.mark.parametrize(
    "schemes,symmetric,scales",
    [(MIXED, True, torch.bfloat16), ([(4, 16)], False, torch.float32), ([(3, -1)], False, torch.float32)],
)
def test_plain_transformers_opens_the_same_model(tmp_path, schemes, symmetric, scales):
    model, forms = quantized(schemes, symmetric, scales)
    saved(model, tmp_path, forms, {} if symmetric else {"dequantize": True})
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours, theirs, dense = (m.eval()(ids).logits for m in (model, opened, tiny_llama()))
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - dense).abs().max() > 1e-3  # it was quantised at all
    for name in forms:
        assert torch.equal(opened.get_submodule(name).weight, model.get_submodule(name).dequantize()), name


def test_plain_transformers_dequantises_asymmetric_weights_in_the_dtype_of_their_scales(tmp_path):
    model, forms = quantized([(4, 16)], False, torch.bfloat16)
    saved(model, tmp_path, forms, {"dequantize": True})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name in forms:  # exact for a bf16 model, rounded once more for an fp32 one
        assert torch.equal(opened.get_submodule(name).weight, model.get_submodule(name).dequantize().bfloat16().float()), name
