"""Linears with real-valued offsets, against plain Python: ragged groups, Conv1D, dtypes, files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers
from blockwright.blocks.offset_packed import OffsetLinear
from blockwright.blocks.parameters import Tensors


def filled(linear, bits, group, dtype=torch.float16, seed=0):
    """An OffsetLinear with random codes and grid, and the weights that they stand for, one number at a time."""
    rng = torch.Generator().manual_seed(seed)
    n, k = layers.size(linear)
    groups = -(-k // group) if group > 0 else 1
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=rng).to(torch.int8)
    step, offset = (0.1 + torch.rand(n, groups, generator=rng)).to(dtype), torch.randn(n, groups, generator=rng)
    made = OffsetLinear.of(linear, codes, step, offset, bits=bits, group_size=group)
    at = [k_ // group if group > 0 else 0 for k_ in range(k)]
    want = [
        [(codes[i, j].item() + 2 ** (bits - 1)) * step[i, at[j]].item() + offset[i, at[j]].to(dtype).item() for j in range(k)]
        for i in range(n)
    ]
    return made, torch.tensor(want, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 9), k=st.integers(1, 70), bits=st.integers(2, 8), group=st.sampled_from([-1, 1, 5, 32]), seed=st.integers(0, 99))
def test_weights_are_step_times_code_plus_offset(n, k, bits, group, seed):
    linear = nn.Linear(k, n)
    made, want = filled(linear, bits, group, seed=seed)
    assert torch.allclose(made.dequantize().double(), want, rtol=1e-5, atol=1e-5)
    assert made.weight_packed.shape == (n, -(-k * bits // 32)) and made.weight_offset.dtype == torch.float16
    x = torch.randn(2, 3, k)
    assert torch.allclose(made(x).double(), x.double() @ want.T + linear.bias.double(), rtol=1e-4, atol=1e-3)
    assert made(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_form_and_tensors_give_the_module_back_to_the_bit_whatever_the_dtype(kind, dtype):
    linear = Conv1D(6, 21) if kind == "conv1d" else nn.Linear(21, 6, bias=kind == "linear")
    made, _ = filled(linear, 3, 8)
    root = nn.Module()
    root.inner = linear
    layers.place(root, "inner", made.form())
    layers.fill(root, Tensors.of_memory({f"inner.{name}": t for name, t in made.state_dict().items()}), dtype=dtype)
    again = root.inner
    assert isinstance(again, OffsetLinear) and again.form() == made.form() and (again.bias is None) == (kind == "no bias")
    assert again.weight_step.dtype == again.weight_offset.dtype == torch.float16
    assert torch.equal(again.dequantize(), made.dequantize())
    assert made.plain_weight().shape == linear.weight.shape and layers.size(made) == (6, 21)
