"""A low-rank linear: what it computes, what it merges to, and that files and other forms keep it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers, tiles
from blockwright.blocks.low_rank import LowRankLinear
from blockwright.blocks.packed import PackedLinear


def factors(n, k, r):
    rng = torch.Generator().manual_seed(n + k)
    return torch.randn(r, k, generator=rng), torch.randn(n, r, generator=rng)


def conv(n, k):
    new = Conv1D(n, k)
    new.bias.data = torch.randn(n, generator=torch.Generator().manual_seed(1))
    return new


MAKE = {"linear": lambda n, k: nn.Linear(k, n), "no bias": lambda n, k: nn.Linear(k, n, bias=False), "conv1d": conv}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("n,k,r", [(5, 7, 2), (8, 3, 3), (1, 4, 1)])
@torch.no_grad()
def test_output_and_merged_weight_number_by_number(kind, n, k, r):
    linear, (v, u) = MAKE[kind](n, k), factors(n, k, r)
    low = LowRankLinear.of(linear, v, u)
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(0))
    y, merged = low(x), low.plain_weight()
    bias = [0.0] * n if linear.bias is None else linear.bias.tolist()
    for i in range(n):
        row = [sum(u[i, j].item() * v[j, c].item() for j in range(r)) for c in range(k)]
        assert (merged.T if kind == "conv1d" else merged)[i].tolist() == pytest.approx(row, rel=1e-4, abs=1e-5)
        want = sum(a * b for a, b in zip(row, x[1, 2].tolist(), strict=True)) + bias[i]
        assert y[1, 2, i].item() == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert merged.shape == linear.weight.shape and layers.size(low) == layers.size(linear) == (n, k)
    assert [name for name, p in low.named_parameters() if p.requires_grad] == []
    if linear.bias is not None:
        assert torch.equal(low.U.bias, linear.bias) and low.U.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize("kind", MAKE)
def test_its_form_rebuilds_it_without_its_tensors(kind):
    linear = MAKE[kind](5, 7)
    low = LowRankLinear.of(linear, *factors(5, 7, 2))
    root = nn.ModuleDict({"here": linear})
    layers.place(root, "here", low.form())
    built = root["here"]
    assert all(p.is_meta for p in built.parameters()) and built.transposed is (kind == "conv1d")
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in low.named_parameters()}
    built.load_state_dict(low.state_dict(), assign=True)
    x = torch.ones(1, 7)
    assert torch.equal(built(x), low(x)) and torch.equal(built.plain_weight(), low.plain_weight())


def test_packed_factors_merge_too():
    low = LowRankLinear.of(nn.Linear(8, 6), *factors(6, 8, 4))
    want = []
    for name in ("U", "V"):
        m = low.get_submodule(name)
        scale = tiles.symmetric_scale(m.weight, bits=4)
        codes = tiles.to_codes(m.weight, scale, bits=4)
        want.append(codes.float() * scale)
        layers.swap(low, name, PackedLinear.of(m, codes, scale, bits=4, group_size=-1))
    assert torch.allclose(low.plain_weight(), want[0] @ want[1], atol=1e-5)


def test_the_dtype_is_that_of_the_factors():
    v, u = (t.bfloat16() for t in factors(6, 8, 4))
    low = LowRankLinear.of(nn.Linear(8, 6), v, u)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and low.plain_weight().dtype == torch.float32
    assert low(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
