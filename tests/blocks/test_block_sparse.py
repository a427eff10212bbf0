"""Block-sparse linears: cutting and joining, the product against a masked dense one, forms, and damaged tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers
from blockwright.blocks.block_sparse import BlockSparseLinear, GatheredLinear, cut, joined, multiplications, tile_sums
from blockwright.blocks.parameters import Tensors
from blockwright.errors import BlockwrightError

side = st.integers(1, 40)


def random_linear(n, k, bias=True, conv=False):
    torch.manual_seed(n * 1000 + k)
    linear = Conv1D(n, k) if conv else nn.Linear(k, n, bias=bias)
    return linear.requires_grad_(False)


def masked(w, keep, r, c):
    """W with the weights outside kept tiles 0, one number at a time."""
    out = w.clone()
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            if not keep[i // r][j // c]:
                out[i, j] = 0
    return out


@settings(deadline=None, max_examples=30)
@given(n=side, k=side, r=side, c=side)
def test_cutting_and_joining_loses_nothing(n, k, r, c):
    w = torch.arange(1.0, n * k + 1).view(n, k)
    tiles = cut(w, (r, c))
    assert tiles.shape == (-(-n // r), -(-k // c), r, c) and torch.equal(joined(tiles, n, k), w)
    i, j = n - 1, k - 1
    assert tiles[i // r, j // c, i % r, j % c] == w[i, j] and tiles.sum() == w.sum()


@settings(deadline=None, max_examples=30)
@given(n=side, k=side, r=side, c=side, share=st.sampled_from([0.0, 0.4, 1.0]), conv=st.booleans())
def test_the_product_is_that_of_the_masked_matrix(n, k, r, c, share, conv):
    linear = random_linear(n, k, conv=conv)
    keep = torch.rand(-(-n // r), -(-k // c), generator=torch.Generator().manual_seed(n)) < share
    sparse = BlockSparseLinear.of(linear, keep, (r, c))
    sparse.check("here")
    w = linear.weight.T if conv else linear.weight
    want = masked(w, keep.tolist(), r, c)
    x = torch.randn(3, 2, k)
    assert torch.equal(sparse.dense(), want) and torch.equal(sparse.mask(), keep)
    assert torch.equal(sparse.plain_weight(), want.T if conv else want)
    assert torch.allclose(sparse(x), x @ want.T + linear.bias, atol=1e-5)
    assert sparse.kept == int(keep.sum()) and sparse.values.numel() == sparse.kept * r * c
    gathered, many = GatheredLinear(sparse), torch.randn(35, 2, k)
    assert torch.allclose(gathered(x), sparse(x)) and torch.allclose(gathered(many), many @ want.T + linear.bias, atol=1e-5)
    heights = [min(r, n - i) for i in range(0, n, r)]
    work = sum(h * count for h, count in zip(heights, gathered.counts, strict=True))
    assert work == tile_sums(torch.ones(n, k), (r, c))[keep.flatten()].sum()  # no product with a pruned weight


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_form_rebuilds_the_module(conv, bias):
    linear = random_linear(20, 33, bias=bias or conv, conv=conv)
    sparse = BlockSparseLinear.of(linear, torch.tensor([[True, False, True], [False, False, True]]), (16, 12), torch.bfloat16)
    assert sparse.form() == {"form": "block_sparse", "tile": [16, 12], "kept": 3} and sparse.values.dtype == torch.bfloat16
    root = nn.ModuleDict({"a": random_linear(20, 33, bias=bias or conv, conv=conv)})
    layers.place(root, "a", sparse.form())
    layers.fill(root, Tensors.of_memory({f"a.{n}": t for n, t in sparse.state_dict().items()}))
    x = torch.randn(4, 33)
    assert torch.equal(root["a"](x), sparse(x)) and layers.size(root["a"]) == (20, 33)
    assert torch.equal(root["a"].plain_weight(), sparse.plain_weight())


@pytest.mark.parametrize(
    ("col", "crow"),
    [
        ([0, 2, 3], [0, 2, 3]),  # a column that is not there
        ([0, -1, 2], [0, 2, 3]),
        ([2, 0, 2], [0, 2, 3]),  # not ascending
        ([0, 0, 2], [0, 2, 3]),  # twice
        ([0, 2, 2], [0, 2, 4]),  # more than there are
        ([0, 2, 2], [1, 2, 3]),
        ([0, 2, 2], [0, 4, 3]),
    ],
)
def test_damaged_places_are_told_by_name(col, crow):
    sparse = BlockSparseLinear.of(random_linear(20, 33), torch.tensor([[True, False, True], [False, False, True]]), (16, 12))
    root = nn.ModuleDict({"a": random_linear(20, 33)})
    layers.place(root, "a", sparse.form())
    state = {f"a.{n}": t for n, t in sparse.state_dict().items()}
    state |= {"a.col": torch.tensor(col, dtype=torch.int32), "a.crow": torch.tensor(crow, dtype=torch.int32)}
    with pytest.raises(BlockwrightError, match=r"a: col and crow"):
        layers.fill(root, Tensors.of_memory(state))


def test_multiplications_are_those_of_kept_tiles_at_every_position():
    sparse = BlockSparseLinear.of(random_linear(20, 33), torch.tensor([[True, False, True], [False, False, True]]), (16, 12))
    kept = 16 * 12 + 16 * 9 + 4 * 9
    assert multiplications(nn.Sequential(sparse, nn.ReLU()), torch.zeros(1, 7, 33)) == {"0": (7 * kept, 7 * 20 * 33)}
    twice = nn.ModuleDict({"a": BlockSparseLinear.of(random_linear(33, 33), torch.ones(3, 3, dtype=torch.bool), (16, 12))})
    twice.forward = lambda x: twice["a"](twice["a"](x))
    assert multiplications(twice, torch.zeros(1, 2, 33)) == {"a": (4 * 33 * 33, 4 * 33 * 33)}


@pytest.mark.parametrize(
    ("tile", "kept", "pays"), [((32, 8), 6, True), ((32, 8), 7, False), ((16, 8), 6, False), ((16, 8), 0, False), ((32, 8), 0, True)]
)
def test_inputs_are_gathered_where_tiles_are_tall_and_few(tile, kept, pays):
    keep = (torch.arange(-(-100 // tile[0]) * 4) < kept).view(-1, 4)
    assert GatheredLinear.pays(BlockSparseLinear.of(random_linear(100, 32), keep, tile)) is pays


@pytest.mark.parametrize("bias", [False, True])
def test_the_gathered_product_is_differentiable_and_may_lack_a_bias(bias):
    linear = random_linear(9, 11, bias=bias).double()
    sparse = BlockSparseLinear.of(linear, torch.tensor([[True, False], [False, False]]), (5, 8))
    x = torch.randn(32, 2, 11, dtype=torch.float64, requires_grad=True)
    gathered = GatheredLinear(sparse)
    assert torch.allclose(gathered(x), sparse(x)) and gathered(x).is_contiguous() and gathered(x[:0]).shape == (0, 2, 9)
    dx = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (gathered, sparse)]
    assert torch.allclose(*dx)


def test_gradients_flow_to_the_input():
    linear = random_linear(9, 11).double()
    sparse = BlockSparseLinear.of(linear, torch.tensor([[True, False], [False, True]]), (5, 8))
    assert torch.autograd.gradcheck(sparse, torch.randn(2, 11, dtype=torch.float64, requires_grad=True))
