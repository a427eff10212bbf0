"""N:M masks by the kernel: against sorting in plain Python, and bit for bit against the reference; on a GPU where there is one."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.blocks import masks_triton, tiles

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scores(n, k, levels, dtype=torch.float32, seed=0):
    """Random scores of both signs, `levels` different ones at most: the fewer, the more ties."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-(levels // 2), levels - levels // 2, (n, k), generator=generator) / 8).to(dtype)


def by_sorting(score, n, m):
    """Oracle: Python's stable sort of each group, the last of equals first; NaN above all numbers."""
    keep = []
    for row in score.double().tolist():
        best = set()
        for start in range(0, len(row), m):
            last_first = range(start + m - 1, start - 1, -1)
            best.update(sorted(last_first, key=lambda j: (0, 0.0) if math.isnan(row[j]) else (1, -row[j]))[:n])
        keep.append([j in best for j in range(len(row))])
    return keep


def masked(score, n, m):
    keep = masks_triton.n_m_mask(score.to(DEVICE), n, m)
    assert keep.dtype == torch.bool and keep.shape == score.shape and keep.device.type == DEVICE
    return keep.cpu()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 7),
    m=st.sampled_from(masks_triton.WIDTHS),
    levels=st.sampled_from([1, 2, 5, 200]),
    dtype=st.sampled_from(masks_triton.DTYPES),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_kernel_keeps_what_sorting_keeps(rows, groups, m, levels, dtype, seed, data):
    n, score = data.draw(st.integers(0, m)), scores(rows, groups * m, levels, dtype, seed)
    keep = masked(score, n, m)
    assert keep.tolist() == by_sorting(score, n, m)
    assert torch.equal(keep, tiles.n_m_mask(score, n, m))
    assert int(keep.sum()) == rows * groups * n


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 16)])
@pytest.mark.parametrize("rows", [1, 3, 513])  # less than one program's scores, and several programs with a ragged end
def test_the_kernel_equals_the_reference(n, m, rows):
    for dtype, levels in itertools.product(masks_triton.DTYPES, (1, 3, 1000)):
        score = scores(rows, 3 * m, levels, dtype)
        assert torch.equal(masked(score, n, m), tiles.n_m_mask(score, n, m))


def test_groups_by_hand():
    score = torch.tensor([[4.0, 1, 3, 2], [5, 5, 5, 5], [-1, -4, -2, -3], [0.0, -0.0, 0.0, -0.0], [INF, 1, -INF, INF]])
    assert masked(score, 2, 4).int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]
    assert masked(score, 1, 4).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_infinite_scores_and_nan_are_ranked_as_the_reference_ranks_them():
    values = (-INF, -1.0, 0.0, INF, NAN)
    score = torch.tensor(list(itertools.product(values, repeat=4)))
    for n in range(5):
        keep = masked(score, n, 4)
        assert torch.equal(keep, tiles.n_m_mask(score, n, 4)) and keep.tolist() == by_sorting(score, n, 4)


def test_scores_that_are_a_transposed_view():
    score = scores(8, 12, 50).T
    assert torch.equal(masked(score, 2, 4), tiles.n_m_mask(score, 2, 4))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    assert masked(torch.zeros(shape), 2, 4).shape == shape


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("m", [4, 6, 8, 16, 32])
def test_masks_on_a_gpu_are_those_of_the_cpu(m):  # 6 and 32 go by the reference there
    for dtype in (*masks_triton.DTYPES, torch.float64):
        score = scores(65, 96, 9, dtype)
        assert torch.equal(tiles.n_m_mask(score.to(DEVICE), m // 2, m).cpu(), tiles.n_m_mask(score, m // 2, m))


def test_the_kernel_is_used_where_it_can(monkeypatch):
    """tiles.n_m_mask hands scores on a GPU to the kernel: seen here with a tensor that says it lies on one."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    used = []

    def kernel(score, n, m):
        used.append((score.dtype, n, m))
        return torch.ones(score.shape, dtype=torch.bool)

    monkeypatch.setattr(masks_triton, "n_m_mask", kernel)
    for dtype, m in ((torch.float32, 4), (torch.float16, 8), (torch.bfloat16, 16), (torch.float64, 4), (torch.float32, 6)):
        tiles.n_m_mask(torch.zeros(2, 48, dtype=dtype).as_subclass(OnGpu), 2, m)
    assert used == [(torch.float32, 2, 4), (torch.float16, 2, 8), (torch.bfloat16, 2, 16)]
