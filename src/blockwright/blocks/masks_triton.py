"""N:M masks in Triton, by counting ranks: a score is kept where fewer than n of its group of m come before it. No sort.

Under TRITON_INTERPRET=1 it runs on the CPU.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

WIDTHS = (4, 8, 16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 2048  # scores of a program


def n_m_mask(score_NK: Float[Tensor, "N K"], n: int, m: int) -> Bool[Tensor, "N K"]:
    """True where kept: what `tiles.n_m_mask` says of m in WIDTHS, a divisor of K, and of scores in DTYPES, bit for bit."""
    score = score_NK.contiguous()
    keep = torch.empty_like(score, dtype=torch.uint8)
    groups = score.numel() // m
    if groups:
        _kernel[(triton.cdiv(groups, TILE // m),)](score, keep, groups, KEEP=n, M=m, GROUPS=TILE // m)
    return keep.view(torch.bool)


@triton.jit(do_not_specialize=["groups"])
@no_type_check  # the tests' shape checker would wrap the function, which Triton cannot read then
def _kernel(score, keep, groups, KEEP: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr):
    """GROUPS groups of M scores. Of equal ones the last come first, and NaN, as torch sorts it, comes before all numbers."""
    g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    i = tl.arange(0, M)
    there = g[:, None] < groups
    at = g[:, None] * M + i[None, :]
    mine = tl.load(score + at, mask=there, other=0.0).to(tl.float32)
    rank = tl.zeros((GROUPS, M), tl.int32)
    for j in tl.static_range(M):
        other = tl.load(score + g[:, None] * M + j, mask=there, other=0.0).to(tl.float32)  # from the cache
        greater = (other > mine) | ((other != other) & (mine == mine))
        equal = (other == mine) | ((other != other) & (mine != mine))
        rank += (greater | (equal & (i < j)[None, :])).to(tl.int32)
    tl.store(keep + at, (rank < KEEP).to(tl.uint8), mask=there)
