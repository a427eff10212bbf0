"""A matrix as tiles: uniform grids over groups of a row, dense bit packing, and masks.

Weights are w_NK, outputs x inputs. A group is `group_size` consecutive inputs of one output row; -1 is the whole row; the last group may be
shorter. A quantised weight is w = (code - zero) * scale, with code and zero in [-2**(bits-1), 2**(bits-1) - 1] as compressed-tensors stores
them; a symmetric grid has no zero. A scale of shape [1, 1] holds for the whole matrix.
"""

import importlib.util
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Int8, Int32
from torch import Tensor

from blockwright.errors import BlockwrightError

TINY = 1e-8  # the smallest step of an asymmetric grid


def num_groups(k: int, group_size: int) -> int:
    """Groups in a row of k inputs; 0 for an empty row. Raises BlockwrightError if group_size is 0 or below -1."""
    if group_size == 0 or group_size < -1:
        raise BlockwrightError(
            f"group_size={group_size}",
            allowed="a positive number of inputs, or -1 for the whole row",
            do=f"For a matrix of {k} inputs try group_size=64",
        )
    return min(k, 1) if group_size == -1 else -(-k // group_size)


def grouped(w_NK: Float[Tensor, "N K"], group_size: int, fill: float = 0.0) -> Float[Tensor, "N G g"]:
    """Rows cut into groups, the last one padded with `fill`."""
    n, k = w_NK.shape
    g = k if group_size == -1 else min(group_size, k)
    count = num_groups(k, group_size)
    if count * g != k:
        w_NK = torch.nn.functional.pad(w_NK, (0, count * g - k), value=fill)
    return w_NK.reshape(n, count, max(g, 1))


def spread(s_NG: Float[Tensor, "N G"] | Int[Tensor, "N G"], group_size: int, k: int) -> Tensor:
    """One value a group -> one a column: [N, G] -> [N, K] (or a shape that broadcasts to it)."""
    if s_NG.shape[1] == 1 or group_size == -1:
        return s_NG
    return s_NG.repeat_interleave(group_size, dim=1)[:, :k]


def symmetric_scale(
    w_NK: Float[Tensor, "N K"],
    *,
    bits: int,
    group_size: int = -1,
    formula: Literal["centred", "full"] = "centred",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "N G"]:
    """Step of a symmetric grid, rounded to `dtype`; 1 for an all-zero group.

    formula : centred s = 2 max|w| / (2**bits - 1) (MoQE, arXiv 2310.02410); full s = max|w| / 2**(bits-1)
        (FasterTransformer), where +max is clamped.
    Raises BlockwrightError if a weight is not finite, or a step overflows or vanishes in `dtype`.
    """
    top = grouped(_finite(w_NK), group_size).abs().amax(-1)
    scale = top * (2 / (2**bits - 1)) if formula == "centred" else top / 2 ** (bits - 1)
    return _stored(torch.where(scale > 0, scale, torch.ones_like(scale)), dtype)


def asymmetric_grid(
    w_NK: Float[Tensor, "N K"], *, bits: int, group_size: int = -1, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "N G"], Int8[Tensor, "N G"]]:
    """Step (rounded to `dtype`) and integer zero point of a min/max grid that holds 0.

    s = (max(w, 0) - min(w, 0)) / (2**bits - 1), at least 1e-8 (6e-8 in fp16, its smallest number); zero = round(-min / s), stored
    minus 2**(bits-1).
    Raises BlockwrightError if a weight is not finite, or a step overflows or vanishes in `dtype`.
    """
    groups = grouped(_finite(w_NK), group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    levels = 2**bits - 1
    kind = torch.finfo(dtype)
    scale = _stored(((high - low) / levels).clamp(min=max(TINY, kind.tiny * kind.eps)), dtype)
    zero = torch.round(-low / scale.float()).clamp(0, levels) - 2 ** (bits - 1)
    return scale, zero.to(torch.int8)


def to_codes(
    w_NK: Float[Tensor, "N K"],
    scale_NG: Float[Tensor, "#N G"],
    zero_NG: Int8[Tensor, "#N G"] | None = None,
    *,
    bits: int,
    group_size: int = -1,
) -> Int8[Tensor, "N K"]:
    """Nearest code of each weight (ties to even), in fp32 with the scale as stored."""
    k = w_NK.shape[1]
    q = torch.round(w_NK.float() / spread(scale_NG.float(), group_size, k))
    if zero_NG is not None:
        q += spread(zero_NG.float(), group_size, k)
    return q.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def from_codes(
    codes_NK: Int8[Tensor, "N K"],
    scale_NG: Float[Tensor, "#N G"],
    zero_NG: Int8[Tensor, "#N G"] | None = None,
    *,
    group_size: int = -1,
) -> Float[Tensor, "N K"]:
    """(code - zero) * scale in fp32."""
    k = codes_NK.shape[1]
    q = codes_NK.float()
    if zero_NG is not None:
        q -= spread(zero_NG.float(), group_size, k)
    return q * spread(scale_NG.float(), group_size, k)


def pack(codes_NK: Int8[Tensor, "N K"], bits: int) -> Int32[Tensor, "N P"]:
    """Codes as a dense stream of bits: each row ceil(K * bits / 32) words, code + 2**(bits-1), little end first.

    Bit-identical to compressed-tensors' pack_to_int32. Memory: K * bits bytes a row while packing.
    """
    n, k = codes_NK.shape
    unsigned = (codes_NK.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 8:
        stream = unsigned
    elif bits == 4:
        pairs = torch.nn.functional.pad(unsigned, (0, k % 2)).view(n, (k + 1) // 2, 2)
        stream = pairs[..., 0] | (pairs[..., 1] << 4)
    else:
        places = torch.arange(bits, dtype=torch.uint8, device=codes_NK.device)
        ones = (unsigned.unsqueeze(-1) >> places) & 1  # [N, K, bits], least bit first
        ones = torch.nn.functional.pad(ones.flatten(1), (0, -(k * bits) % 8)).unflatten(1, (-(-k * bits // 8), 8))
        weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes_NK.device)
        stream = (ones * weights).sum(-1, dtype=torch.uint8)
    words = -(-k * bits // 32)
    return torch.nn.functional.pad(stream, (0, words * 4 - stream.shape[1])).flatten().view(torch.int32).view(n, words)


def unpack(packed_NP: Int32[Tensor, "N P"], bits: int, k: int) -> Int8[Tensor, "N K"]:
    """The codes that `pack` packed; k is the number of columns. Raises BlockwrightError where the words are not as many as that takes."""
    n, words = packed_NP.shape
    if words != -(-k * bits // 32):
        raise BlockwrightError(
            f"packed weights: {words} words a row",
            allowed=f"{-(-k * bits // 32)} words for {k} columns of {bits} bits",
            do="Check bits and the shape that belong to these weights",
        )
    stream = packed_NP.contiguous().view(torch.uint8)
    if bits == 8:
        unsigned = stream
    elif bits == 4:
        unsigned = torch.stack([stream & 15, stream >> 4], dim=-1).flatten(1)
    else:
        places = torch.arange(8, dtype=torch.uint8, device=stream.device)
        ones = ((stream.unsqueeze(-1) >> places) & 1).flatten(1)[:, : k * bits].reshape(n, k, bits)
        weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=stream.device)
        unsigned = (ones * weights).sum(-1, dtype=torch.uint8)
    return (unsigned[:, :k].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def row_mask(score_NK: Float[Tensor, "N K"], sparsity: float) -> Bool[Tensor, "N K"]:
    """True where kept: each row loses its floor(K * sparsity) lowest scores (ties: the first go first)."""
    keep = torch.ones_like(score_NK, dtype=torch.bool)
    drop = int(score_NK.shape[1] * sparsity + 1e-9)  # 100 * 0.29 is 28.999999999999996
    lowest = score_NK.argsort(dim=1, stable=True)[:, :drop]
    return keep.scatter_(1, lowest, False)


def n_m_mask(score_NK: Float[Tensor, "N K"], n: int, m: int) -> Bool[Tensor, "N K"]:
    """True where kept: the n highest scores of every m consecutive inputs (ties: the last stay).

    On a GPU by a kernel for m = 4, 8, 16, the same bit for bit. Raises BlockwrightError where m does not divide K, or n is not in 0..m.
    """
    rows, k = score_NK.shape
    if m < 1 or k % m or not 0 <= n <= m:
        raise BlockwrightError(
            f"{n}:{m} sparsity on {k} inputs",
            allowed="n <= m, and in_features divisible by m",
            do="Use another pattern, or ignore this layer",
        )
    if score_NK.is_cuda and importlib.util.find_spec("triton") is not None:
        from blockwright.blocks import masks_triton

        if m in masks_triton.WIDTHS and score_NK.dtype in masks_triton.DTYPES:
            return masks_triton.n_m_mask(score_NK, n, m)
    return row_mask(score_NK.reshape(-1, m), (m - n) / m).view(rows, k)


def _finite(w_NK: Tensor) -> Tensor:
    w_NK = w_NK.float()
    if w_NK.numel() and not bool(torch.isfinite(w_NK.abs().max())):
        raise BlockwrightError("a weight is NaN or infinite", allowed="finite weights", do="Repair or download the model again")
    return w_NK


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    stored = scale.to(dtype)
    if stored.numel() and not bool((torch.isfinite(stored) & (stored > 0)).all()):
        worst = scale[~(torch.isfinite(stored) & (stored > 0))][0].item()
        raise BlockwrightError(
            f"a scale of {worst:.3g} does not fit {dtype}",
            allowed="scales in the range of their dtype",
            do="Use scale_dtype='bf16' or 'fp32'",
        )
    return stored
