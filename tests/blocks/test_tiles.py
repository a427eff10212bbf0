"""Grids against plain Python, packing against compressed-tensors, masks against sorting by hand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.blocks import tiles
from blockwright.errors import BlockwrightError

BITS = st.integers(2, 8)
GROUP = st.one_of(st.just(-1), st.integers(1, 70))
quick = settings(deadline=None, max_examples=60)


def matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def columns_of(group: int, k: int, group_size: int) -> range:
    return range(k) if group_size == -1 else range(group * group_size, min((group + 1) * group_size, k))


# grids


def test_a_symmetric_row_by_hand():  # |max| 7.5 gives step 1; 0.5 and 1.5 are ties and go to even; a zero group keeps scale 1
    w = torch.tensor([[-7.5, 7.5, 1.2, 0.5, 1.5, -0.5, 0, 0, 0, 0, 0, 0, 3.0]])
    scale = tiles.symmetric_scale(w, bits=4, group_size=6)
    codes = tiles.to_codes(w, scale, bits=4, group_size=6)
    assert scale[0].tolist() == pytest.approx([1, 1, 6 / 15])
    assert codes.tolist() == [[-8, 7, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7]]  # 7.5 rounds to 8 and is clamped
    assert tiles.symmetric_scale(w, bits=4, group_size=6, formula="full").tolist()[0] == pytest.approx([7.5 / 8, 1, 3 / 8])


def test_an_asymmetric_row_by_hand():  # 0..15 and -15..0 use all codes; 5..30 starts at 0; a zero group keeps the floor
    w = torch.tensor([[0.0, 15, 7, -15, 0, -1, 30, 5, 6, 0, 0, 0]])
    scale, zero = tiles.asymmetric_grid(w, bits=4, group_size=3)
    assert scale[0].tolist() == pytest.approx([1, 1, 2, 1e-8])
    assert zero.tolist() == [[-8, 7, -8, -8]]
    assert tiles.to_codes(w, scale, zero, bits=4, group_size=3).tolist() == [
        [-8, 7, -1, -8, 7, 6, 7, -6, -5, -8, -8, -8]
    ]  # 5 / 2 ties to even


@quick
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 70),
    group=GROUP,
    bits=BITS,
    formula=st.sampled_from(["centred", "full"]),
    seed=st.integers(0, 99),
)
def test_symmetric_scales_and_codes_follow_the_formula(n, k, group, bits, formula, seed):
    w = matrix(n, k, seed)
    scale = tiles.symmetric_scale(w, bits=bits, group_size=group, formula=formula)
    codes = tiles.to_codes(w, scale, bits=bits, group_size=group)
    assert codes.dtype == torch.int8 and codes.shape == w.shape and scale.shape == (n, 1 if group == -1 else math.ceil(k / group))
    for i, g in itertools.product(range(n), range(scale.shape[1])):
        cols = columns_of(g, k, group)
        top = max(abs(w[i, j].item()) for j in cols)
        step = top * 2 / (2**bits - 1) if formula == "centred" else top / 2 ** (bits - 1)
        assert scale[i, g].item() == pytest.approx(step, rel=1e-6)
        for j in cols:
            exact = w[i, j].item() / scale[i, g].item()
            inside = min(max(exact, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
            assert abs(codes[i, j].item() - inside) <= 0.5 + 1e-4


@quick
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 70),
    group=GROUP,
    bits=BITS,
    shift=st.sampled_from([-5.0, 0.0, 0.3, 5.0]),
    seed=st.integers(0, 99),
)
def test_asymmetric_scales_zeros_and_codes_follow_the_formula(n, k, group, bits, shift, seed):
    w = matrix(n, k, seed) + shift
    scale, zero = tiles.asymmetric_grid(w, bits=bits, group_size=group)
    codes = tiles.to_codes(w, scale, zero, bits=bits, group_size=group)
    half = 2 ** (bits - 1)
    for i, g in itertools.product(range(n), range(scale.shape[1])):
        cols = columns_of(g, k, group)
        low, high = min(0.0, *(w[i, j].item() for j in cols)), max(0.0, *(w[i, j].item() for j in cols))
        assert scale[i, g].item() == pytest.approx((high - low) / (2**bits - 1), rel=1e-5)
        z = zero[i, g].item() + half
        assert 0 <= z <= 2**bits - 1 and abs(z + low / scale[i, g].item()) <= 0.5 + 1e-3
        for j in cols:
            exact = min(max(w[i, j].item() / scale[i, g].item(), -z), 2**bits - 1 - z)
            assert abs(codes[i, j].item() + half - z - exact) <= 0.5 + 1e-3
    error = (tiles.from_codes(codes, scale, zero, group_size=group) - w).abs()
    assert bool((error <= tiles.spread(scale, group, k) * 1.001).all())  # half a step, and half for the rounding of the zero point


@quick
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 130),
    group=st.one_of(st.just(-1), st.integers(1, 140)),
    power=st.integers(-20, 20),
)
def test_scaling_by_a_power_of_two_scales_only_the_scale(n, k, group, power):
    w = matrix(n, k)
    scale, scale2 = (tiles.symmetric_scale(x, bits=4, group_size=group) for x in (w, w * 2.0**power))
    assert torch.equal(scale * 2.0**power, scale2)
    assert torch.equal(
        tiles.to_codes(w, scale, bits=4, group_size=group),
        tiles.to_codes(w * 2.0**power, scale2, bits=4, group_size=group),
    )


@pytest.mark.parametrize("bits,group", [(2, 5), (4, 64), (4, -1), (3, 7), (8, 1), (5, 200)])
def test_reading_codes_agrees_with_compressed_tensors(bits, group):
    w = matrix(5, 140)
    scale, zero = tiles.asymmetric_grid(w, bits=bits, group_size=group)
    codes = tiles.to_codes(w, scale, zero, bits=bits, group_size=group)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=False,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    if group == -1 or 140 % group == 0:
        assert torch.equal(tiles.from_codes(codes, scale, zero, group_size=group), dequantize(codes, scale, zero, args))
    by_hand = torch.tensor(
        [
            [
                (codes[i, j].item() - zero[i, j // (140 if group == -1 else group)].item())
                * scale[i, j // (140 if group == -1 else group)].item()
                for j in range(140)
            ]
            for i in range(5)
        ]
    )
    assert torch.allclose(tiles.from_codes(codes, scale, zero, group_size=group), by_hand, rtol=1e-6, atol=0)


def test_weights_are_quantised_with_the_scale_that_is_stored():
    # a bf16 scale is up to 0.4 % off the exact one: at 8 bits that is half a step
    w = matrix(64, 256)
    for dtype in (torch.bfloat16, torch.float16):
        scale = tiles.symmetric_scale(w, bits=8, group_size=64, dtype=dtype)
        assert scale.dtype == dtype
        codes = tiles.to_codes(w, scale, bits=8, group_size=64)
        unclamped = codes.abs() < 127
        error = (tiles.from_codes(codes, scale, group_size=64) - w).abs() / tiles.spread(scale.float(), 64, 256)
        assert error[unclamped].max() <= 0.5 + 1e-3 and error.max() <= 1
        scale, zero = tiles.asymmetric_grid(w, bits=8, group_size=64, dtype=dtype)
        assert scale.dtype == dtype
        error = tiles.from_codes(tiles.to_codes(w, scale, zero, bits=8, group_size=64), scale, zero, group_size=64) - w
        assert (error.abs() / tiles.spread(scale.float(), 64, 256)).max() <= 1.6


def test_one_grid_for_a_whole_tensor_broadcasts():
    w = matrix(6, 50)
    scale, zero = tiles.asymmetric_grid(w.reshape(1, -1), bits=8, group_size=-1)
    assert scale.shape == zero.shape == (1, 1)
    codes = tiles.to_codes(w, scale, zero, bits=8, group_size=-1)
    assert codes.min() == -128 and codes.max() == 127
    assert (tiles.from_codes(codes, scale, zero, group_size=-1) - w).abs().max() <= scale.item()


def test_half_weights_are_computed_in_single_and_left_alone():
    half = matrix(3, 20).bfloat16()
    assert torch.equal(tiles.symmetric_scale(half, bits=4, group_size=8), tiles.symmetric_scale(half.float(), bits=4, group_size=8))
    before = half.clone()
    tiles.to_codes(half, tiles.symmetric_scale(half, bits=4, group_size=8), bits=4, group_size=8)
    assert torch.equal(half, before)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1), (5, 3)])
@pytest.mark.parametrize("group", [-1, 1, 4])
def test_empty_and_single_matrices(shape, group):
    w = torch.full(shape, 2.5)
    scale, zero = tiles.asymmetric_grid(w, bits=4, group_size=group)
    assert scale.shape == zero.shape == (shape[0], math.ceil(shape[1] / (group if group > 0 else shape[1] or 1)))
    assert tiles.symmetric_scale(w, bits=4, group_size=group).shape == scale.shape
    codes = tiles.to_codes(w, scale, zero, bits=4, group_size=group)
    assert torch.allclose(tiles.from_codes(codes, scale, zero, group_size=group), w)
    for bits in (3, 4):
        packed = tiles.pack(codes.clamp(-4, 3), bits)
        assert packed.shape == (shape[0], math.ceil(shape[1] * bits / 32))
        assert torch.equal(tiles.unpack(packed, bits, shape[-1]), codes.clamp(-4, 3))


def test_spread_is_differentiable():
    scale = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: tiles.spread(s, 5, 17) ** 2, scale)
    tiles.spread(scale, 5, 17).sum().backward()
    assert scale.grad.tolist() == [[5, 5, 5, 2]] * 3  # 17 columns: the last group is shorter


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grid", [tiles.symmetric_scale, tiles.asymmetric_grid])
def test_weights_that_are_not_finite_are_refused(bad, grid):
    w = matrix(3, 10)
    w[1, 9] = bad
    with pytest.raises(BlockwrightError, match="NaN or infinite"):
        grid(w, bits=4, group_size=4)


def test_scales_that_do_not_fit_their_type_are_refused():
    for value in (1e-9, 1e7):
        with pytest.raises(BlockwrightError, match="does not fit torch.float16"):
            tiles.symmetric_scale(torch.full((1, 4), value), bits=4, group_size=4, dtype=torch.float16)
        assert tiles.symmetric_scale(torch.full((1, 4), value), bits=4, group_size=4, dtype=torch.bfloat16).item() > 0
    with pytest.raises(BlockwrightError, match="does not fit torch.float16"):
        tiles.asymmetric_grid(torch.full((1, 4), 1e7), bits=4, group_size=4, dtype=torch.float16)
    scale, zero = tiles.asymmetric_grid(torch.zeros(1, 4), bits=4, group_size=4, dtype=torch.float16)  # the floor 1e-8 would be 0 in fp16
    assert scale.item() > 0 and torch.isfinite(tiles.to_codes(torch.zeros(1, 4), scale, zero, bits=4, group_size=4).float()).all()


@pytest.mark.parametrize("group", [0, -2])
def test_impossible_group_sizes_are_refused(group):
    with pytest.raises(BlockwrightError, match=f"group_size={group}.*Allowed: a positive number"):
        tiles.symmetric_scale(matrix(2, 8), bits=4, group_size=group)


# packing


@quick
@given(n=st.integers(1, 5), k=st.integers(1, 140), bits=BITS, seed=st.integers(0, 99))
def test_packed_words_are_those_of_compressed_tensors(n, k, bits, seed):
    half = 2 ** (bits - 1)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-half, half, (n, k), dtype=np.int8))
    packed = tiles.pack(codes, bits)
    assert packed.dtype == torch.int32 and torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(tiles.unpack(packed, bits, k), codes) and torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(tiles.pack(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_words_are_one_long_number(bits):  # oracle: Python integers
    half = 2 ** (bits - 1)
    codes = (torch.arange(41 * 3) * 7 % (2 * half) - half).to(torch.int8).reshape(3, 41)
    for row, words in zip(codes.tolist(), tiles.pack(codes, bits).tolist(), strict=True):
        number = sum((code + half) << (i * bits) for i, code in enumerate(row))
        assert words == [int(np.int64(number >> (32 * i) & 0xFFFFFFFF).astype(np.int32)) for i in range(len(words))]
        assert number >> (32 * len(words)) == 0


def test_every_code_survives_packing():
    for bits in range(2, 9):
        codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(3)[None, 1:]
        assert torch.equal(tiles.unpack(tiles.pack(codes, bits), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("columns", [24, 33])
def test_unpacking_refuses_a_wrong_number_of_words(columns):
    with pytest.raises(BlockwrightError, match="4 words a row"):
        tiles.unpack(torch.zeros(2, 4, dtype=torch.int32), 4, columns)


# masks


@quick
@given(n=st.integers(1, 4), k=st.integers(0, 40), percent=st.integers(0, 99), seed=st.integers(0, 9))
def test_row_mask_drops_the_smallest_first_come_first(n, k, percent, seed):
    score = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, (n, k))).float()  # many ties
    mask = tiles.row_mask(score, percent / 100)
    drop = math.floor(Fraction(percent, 100) * k)
    for row, keep in zip(score.tolist(), mask.tolist(), strict=True):
        gone = sorted(range(k), key=lambda j: (row[j], j))[:drop]
        assert [j for j in range(k) if not keep[j]] == sorted(gone)


@quick
@given(n=st.integers(1, 4), groups=st.integers(0, 9), m=st.integers(1, 9), data=st.data(), seed=st.integers(0, 9))
def test_n_m_mask_keeps_n_of_every_m(n, groups, m, data, seed):
    keep_of_m, k = data.draw(st.integers(0, m)), groups * m
    score = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, (n, k))).float()
    mask = tiles.n_m_mask(score, keep_of_m, m)
    assert mask.shape == score.shape and mask.dtype == torch.bool
    for row, keep in zip(score.tolist(), mask.tolist(), strict=True):
        for start in range(0, k, m):
            group = range(start, start + m)
            best = sorted(group, key=lambda j: (-row[j], -j))[:keep_of_m]
            assert [j for j in group if keep[j]] == sorted(best)


@pytest.mark.parametrize("n,m", [(5, 4), (-1, 4), (1, 0), (2, 3)])
def test_impossible_n_m_is_refused(n, m):
    with pytest.raises(BlockwrightError, match=f"{n}:{m} sparsity"):
        tiles.n_m_mask(matrix(2, 8), n, m)


def test_shares_are_exact_percents():  # 100 * 0.29 is 28.999999999999996
    assert tiles.row_mask(matrix(1, 100), 0.29).sum() == 71
    assert tiles.row_mask(matrix(1, 3), 0.5).sum() == 2
