"""GPTQ against hand calculation and against rounding to nearest."""

import pytest
import torch

from blockwright.blocks import tiles
from blockwright.blocks.gptq import gptq
from blockwright.errors import BlockwrightError


def random(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(8, 24, generator=rng), torch.randn(200, 6, generator=rng) @ torch.randn(6, 24, generator=rng)


def test_two_like_inputs_by_hand():
    # two inputs that are nearly the same: 0.6 rounds up to 1, and the -0.4 that is too much goes into the second, 0.6 -> 0.2 -> 0
    codes = gptq(torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 0.99], [0.99, 1.0]]), torch.ones(1, 1), None, bits=4)
    assert sorted(codes.tolist()[0]) == [0, 1]


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 10, -1])  # 10: the last group is shorter
def test_outputs_are_better_than_nearest_on_the_same_grid(bits, group, reorder):
    w, x = random()
    scale, zero = tiles.asymmetric_grid(w, bits=bits, group_size=group)
    nearest = tiles.to_codes(w, scale, zero, bits=bits, group_size=group)
    codes = gptq(w, x.T @ x, scale, zero, bits=bits, group_size=group, reorder=reorder)
    wrong = lambda c: float((x @ (tiles.from_codes(c, scale, zero, group_size=group) - w).T).square().sum())  # noqa: E731
    assert wrong(codes) < 0.6 * wrong(nearest)
    assert codes.min() >= nearest.min() and codes.max() <= nearest.max()  # every group's grid is used from end to end


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inputs_without_correlation_are_rounded_to_nearest(bits):
    w, _ = random()
    scale, zero = tiles.asymmetric_grid(w, bits=bits, group_size=8)
    for gram in (torch.eye(24), torch.zeros(24, 24), torch.diag(torch.arange(24.0))):
        codes = gptq(w, gram, scale, zero, bits=bits, group_size=8)
        assert torch.equal(codes, tiles.to_codes(w, scale, zero, bits=bits, group_size=8))


def test_a_gram_that_cannot_be_inverted_is_refused_and_arguments_stay():
    w, x = random()
    x[:, 5] = 0  # an input that was always 0: its place on the diagonal is filled, in a copy even of fp64
    gram = (x.T @ x).double()
    before = w.clone(), gram.clone()
    scale, zero = tiles.asymmetric_grid(w, bits=3, group_size=8)
    gptq(w, gram, scale, zero, bits=3, group_size=8)
    assert torch.equal(w, before[0]) and torch.equal(gram, before[1])
    with pytest.raises(BlockwrightError, match="cannot be inverted"):
        gptq(w, torch.full((24, 24), torch.nan), scale, zero, bits=3, group_size=8)


def test_a_gram_with_a_negative_eigenvalue_is_damped_more():
    # its eigenvalues are 2.05 and -0.05: 1 % of the mean diagonal is not enough, 10 % is
    codes = gptq(torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 1.05], [1.05, 1.0]]), torch.ones(1, 1), None, bits=4)
    assert sorted(codes.tolist()[0]) == [0, 1]
