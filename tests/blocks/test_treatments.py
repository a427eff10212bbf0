"""Treatments of a linear: bytes as stored, grids against a search in plain Python, low rank against numpy, the form that stays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import treatments
from blockwright.blocks.low_rank import LowRankLinear
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.stream import Block
from blockwright.blocks.treatments import DENSE, Treatment

EVERY = [DENSE, Treatment("quantise", 3, 32), Treatment("quantise", 8, 64), Treatment("low_rank", rank=8), Treatment("low_rank", 8, 32, 32)]


def block_of(linear):
    module = nn.Module()
    module.proj = linear.requires_grad_(False)
    return Block(0, "layers.0", module, arguments=None, shared=frozenset(), batch=1)


@pytest.mark.parametrize("t", EVERY, ids=str)
def test_a_name_gives_its_treatment_back(t):
    assert Treatment.named(str(t)) == t


@pytest.mark.parametrize("t", EVERY, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_is_stored_takes_the_bytes_and_multiplies_by_the_matrix_that_was_told(t, kind):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48) if kind is nn.Linear else Conv1D(48, 64)
    nn.init.normal_(linear.bias)
    w, x2 = treatments.layers.matrix(linear).clone(), torch.rand(64) + 0.1
    wanted, block = treatments.treated(w, t, x2), block_of(linear)
    treatments.treat(block, "layers.0.proj", t, x2)
    now, x = block.module.proj, torch.randn(5, 64)
    torch.testing.assert_close(now(x), x @ wanted.T + linear.bias)
    stored = [v for name, v in now.state_dict().items() if not name.endswith("bias")]
    assert sum(v.numel() * (2 if v.is_floating_point() else v.element_size()) for v in stored) == treatments.nbytes(t, 48, 64, 2)
    assert isinstance(now, {"dense": kind, "quantise": PackedLinear, "low_rank": LowRankLinear}[t.kind])
    assert set(block.forms) == {"dense": set(), "quantise": {"layers.0.proj"}}.get(
        t.kind, {"layers.0.proj"} | ({"layers.0.proj.V", "layers.0.proj.U"} if t.bits else set())
    )


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 5), groups=st.integers(1, 3), bits=st.integers(2, 8), seed=st.integers(0, 99), weighed=st.booleans())
def test_no_narrower_range_leaves_less(n, groups, bits, seed, weighed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, 8 * groups)).astype(np.float32)
    x2 = (rng.random(8 * groups) + 0.01).astype(np.float32) if weighed else np.ones(8 * groups, np.float32)
    t = Treatment("quantise", bits, 8)
    codes, scale = treatments.grid(torch.tensor(w), t, torch.tensor(x2) if weighed else None)
    assert int(codes.min()) >= -(2 ** (bits - 1)) and int(codes.max()) < 2 ** (bits - 1) and scale.dtype == torch.bfloat16

    def left(row, g, step):
        values, weights = w[row, 8 * g : 8 * g + 8], x2[8 * g : 8 * g + 8]
        q = np.clip(np.round(values / np.float32(step)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * np.float32(step)
        return float((weights * (q - values) ** 2).sum())

    for row in range(n):
        for g in range(groups):
            full = 2 * np.abs(w[row, 8 * g : 8 * g + 8]).max() / (2**bits - 1)
            shares = [1.0] if bits > 4 else [1 - 0.08 * i for i in range(6)]
            steps = [float(torch.tensor(float(torch.tensor(full).bfloat16()) * s).bfloat16()) for s in shares]
            assert left(row, g, float(scale[row, g])) <= min(left(row, g, s) for s in steps) * (1 + 1e-5) + 1e-12


def test_a_low_rank_matrix_comes_back_and_no_product_of_that_rank_is_nearer():
    torch.manual_seed(0)
    w = torch.randn(12, 3) @ torch.randn(3, 20)
    torch.testing.assert_close(treatments.treated(w, Treatment("low_rank", rank=3)), w, atol=1e-4, rtol=1e-4)
    w = torch.randn(12, 20)
    left = float((treatments.treated(w, Treatment("low_rank", rank=5)) - w).square().sum())
    assert left == pytest.approx(float((np.linalg.svd(w.numpy(), compute_uv=False)[5:] ** 2).sum()), rel=1e-4)
