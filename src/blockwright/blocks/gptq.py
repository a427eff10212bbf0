"""GPTQ: codes of a matrix on a given grid, column by column, each column's error made up for by those after it. arXiv 2210.17323."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from blockwright.blocks import tiles
from blockwright.errors import BlockwrightError

DAMP = (0.01, 0.1, 1.0, 10.0)  # shares of the mean diagonal, tried in turn until the Gram matrix can be inverted


def gptq(
    w_NK: Float[Tensor, "N K"],
    gram_KK: Float[Tensor, "K K"],
    scale_NG: Float[Tensor, "#N G"],
    zero_NG: Int8[Tensor, "#N G"] | None,
    *,
    bits: int,
    group_size: int = -1,
    reorder: bool = True,
) -> Int8[Tensor, "N K"]:
    """Codes of `tiles.to_codes` that leave a smaller error of the outputs than rounding each weight to nearest.

    w_NK, gram_KK : weights and x^T x over the tokens; not modified. Inputs that were always 0 are rounded to nearest.
    scale_NG, zero_NG : the grid, one column for each group of `group_size` inputs; zero None: symmetric.
    reorder : inputs with the largest squares first; else in their order.
    Raises BlockwrightError for a Gram matrix that is not finite or cannot be inverted, damped by 1000 % of its mean diagonal.
    Memory: four fp64 copies of gram.
    """
    k = w_NK.shape[1]
    h = gram_KK.double().clone()
    h.diagonal()[h.diagonal() == 0] = 1
    order = h.diagonal().argsort(descending=True, stable=True) if reorder else torch.arange(k, device=h.device)
    u = _factor(h[order][:, order]).float()
    scale_NK = tiles.spread(scale_NG, group_size, k).expand(-1, k)[:, order]
    zero_NK = None if zero_NG is None else tiles.spread(zero_NG, group_size, k).expand(-1, k)[:, order]
    w = w_NK.float()[:, order].clone()
    codes = torch.empty_like(w, dtype=torch.int8)
    for i in range(k):
        grid = scale_NK[:, i : i + 1], None if zero_NK is None else zero_NK[:, i : i + 1]
        column = w[:, i : i + 1]
        codes[:, i : i + 1] = tiles.to_codes(column, *grid, bits=bits)
        error = (column - tiles.from_codes(codes[:, i : i + 1], *grid)) / u[i, i]
        w[:, i + 1 :].addmm_(error, u[i : i + 1, i + 1 :], alpha=-1)
    return codes[:, order.argsort()]


def _factor(h_KK: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """The upper Cholesky factor of the inverse of a damped Gram matrix."""
    mean = h_KK.diagonal().mean()
    for damp in DAMP:
        damped = h_KK + damp * mean * torch.eye(len(h_KK), dtype=h_KK.dtype, device=h_KK.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.isfinite().all()):
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    raise BlockwrightError(
        "gptq: the Gram matrix of the inputs cannot be inverted", allowed="x^T x of finite inputs", do="Look at the inputs"
    )
