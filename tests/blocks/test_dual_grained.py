"""dual_grained: expansion and products against plain integers and fp64; the module as a form of a model."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import dual_grained, layers
from blockwright.blocks.dual_grained import DualGrained, DualGrainedLinear
from blockwright.blocks.parameters import Tensors
from blockwright.errors import BlockwrightError


def grains(n, k, group, bits=4, seed=0):
    """Random codes on both grids, int8 weights within 127."""
    rng = torch.Generator().manual_seed(seed)
    g = 1 if group == -1 else -(-k // group)
    half, top = 2 ** (bits - 1), 127 // (2**bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=rng, dtype=torch.int8)
    zero = torch.randint(-half, half, (n, g), generator=rng, dtype=torch.int8)
    scale = torch.randint(1, max(2, top + 1), (n, g), generator=rng, dtype=torch.int8)
    if bits == 8:
        zero = zero.clamp(0, 0)
        codes = codes.clamp(-127, 127)
    return DualGrained(codes, zero, scale, torch.rand(n, generator=rng) + 0.1)


def by_hand(weight, group):
    """The int8 weights, one number at a time."""
    n, k = weight.codes.shape
    out = [[0] * k for _ in range(n)]
    for i, j in itertools.product(range(n), range(k)):
        g = 0 if group == -1 else j // group
        out[i][j] = int(weight.group_scale[i, g]) * (int(weight.codes[i, j]) - int(weight.zero[i, g]))
    return out


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 6), k=st.integers(1, 70), group=st.sampled_from([-1, 1, 16, 32]), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99)
)
def test_a_group_expands_exactly(n, k, group, bits, seed):
    weight = grains(n, k, group, bits, seed)
    want = by_hand(weight, group)
    assert dual_grained.expand(weight.codes, weight.zero, weight.group_scale, group_size=group).tolist() == want
    linear = DualGrainedLinear.of(nn.Linear(k, n), weight, 1.0, bits=bits, group_size=group)
    assert linear.int8_weight().tolist() == want
    assert all(torch.equal(a, b) for a, b in zip(linear.weight(), weight, strict=True))
    exact = torch.tensor(want).double() * weight.channel_scale.double()[:, None]
    assert torch.equal(linear.plain_weight(), exact.float())  # one rounding


def test_rounding_of_activations_by_hand():
    x = torch.tensor([[0.5, 1.5, 2.5, -2.5, 126.4, 300.0, -300.0, float("inf")]])
    assert dual_grained.to_int8(x, torch.tensor(127.0)).tolist() == [[0, 2, 2, -2, 126, 127, -127, 127]]  # ties to even, never -128
    assert dual_grained.to_int8(x, torch.tensor(254.0)).tolist() == [[0, 1, 1, -1, 63, 127, -127, 127]]


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (1, 33, 64), (3, 16, 1025), (17, 5, 4099), (0, 4, 8), (40, 24, 100)])
def test_products_are_exact_on_any_machine(monkeypatch, vnni, m, n, k):
    if not vnni:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    rng = torch.Generator().manual_seed(k)
    x, w = (torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8) for shape in ((m, k), (n, k)))
    x[:, ::2], w[:, ::2] = 127, -127  # large sums: above 2**24 for the long rows
    got = dual_grained.int8_product(x, w)
    assert got.dtype == torch.int32 and torch.equal(got.long(), x.long() @ w.long().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (2, 1), (33,), (0,)])
def test_the_integer_path_is_the_float_path(dtype, shape):
    weight, bias = grains(20, 300, 64), torch.randn(20)
    linear = nn.Linear(300, 20)
    linear.bias.data = bias
    module = DualGrainedLinear.of(linear, weight, 2.5, bits=4, group_size=64)
    x = torch.randn(*shape, 300).to(dtype)
    x8 = (x.float() / torch.tensor(2.5 / 127)).round().clamp(-127, 127)
    w = torch.tensor(by_hand(weight, 64)).double() * weight.channel_scale.double()[:, None]
    want = (x8.double() * (2.5 / 127)) @ w.T + bias.double()
    got = module(x)
    assert got.dtype == dtype and got.shape == (*shape, 20)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert got.numel() == 0 or (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_form_is_stored_and_opened_again(tmp_path, transposed, bias):
    linear = Conv1D(12, 40) if transposed else nn.Linear(40, 12, bias=bias)
    weight = grains(12, 40, 16)
    module = DualGrainedLinear.of(linear, weight, 3.14159, bits=4, group_size=16)
    assert module.amax == torch.tensor(3.14159).bfloat16().float()
    assert layers.size(module) == (12, 40) and module.plain_weight().shape == linear.weight.shape
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        again = DualGrainedLinear.from_form(linear, module.form())
        layers.fill(again, Tensors.of_folder(tmp_path), dtype=dtype)
        assert torch.equal(again.plain_weight(), module.plain_weight()) and again.channel_weight_scale.dtype == torch.float32
        assert again.amax.float() == module.amax
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["weight_packed"].shape == (12, 5) and stored["group_scale"].dtype == torch.int8
    assert stored["weight_zero_point"].shape == (2, 3)


@pytest.mark.parametrize("what,value", [("amax", 0.0), ("amax", -1.0), ("group_scale", 0), ("channel_weight_scale", 0.0)])
def test_a_scale_that_is_not_positive_is_refused_with_its_name(tmp_path, what, value):
    module = DualGrainedLinear.of(nn.Linear(40, 12), grains(12, 40, 16), 1.0, bits=4, group_size=16)
    state = {f"net.{name}": t.clone() for name, t in module.state_dict().items()}
    state[f"net.{what}"].view(-1)[:1] = value
    save_file(state, tmp_path / "model.safetensors")
    again = DualGrainedLinear.from_form(nn.Linear(40, 12), module.form())
    with pytest.raises(BlockwrightError, match=rf"net\.{what}: .*Allowed: positive scales"):
        layers.fill(again, Tensors.of_folder(tmp_path), "net.")


def test_a_range_of_zero_is_refused():
    with pytest.raises(BlockwrightError, match="amax: 0"):
        DualGrainedLinear.of(nn.Linear(40, 12), grains(12, 40, 16), 0.0, bits=4, group_size=16)
