"""Triton kernels of dgq: y = (ax channel_scale) (xq W8^T), W8 = group_scale (code - zero) made of 4-bit codes on the way. NVIDIA GPUs.

As in finequant's kernels the product is computed transposed, W X^T, so that the large matrix is the left operand, which tensor cores take
from registers. All sums are int32: the same bits in any order, so parts of the inputs are added by atomics. For many rows W8 is expanded
once into a scratch buffer and multiplied by torch._int_mm. Under TRITON_INTERPRET=1 the kernels run on the CPU.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from blockwright.blocks.dual_grained import DualGrained, DualGrainedLinear, int8_product

PLANE = 32  # inputs of a product of tensor cores in int8
PLANES = 4  # a block of inputs is cut into 4 planes; one int16 word holds a code of each
WIDTH = PLANE * PLANES
FUSED_ROWS = 256  # above so many rows W8 is expanded into a scratch buffer first
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds fp32 numbers below 2**22 to integers, ties to even


class KernelWeight(NamedTuple):
    """A matrix [N, K] as the kernels read it. Inputs are padded to whole blocks of WIDTH.

    words : int16 [blocks, N, PLANE], bits 4p to 4p+3 of word j are code + 8 of input (4 block + p) * PLANE + j.
    group_scale, zero : int8 [blocks, groups of a block, N], zero + 8; a group longer than a block is repeated.
    channel_scale : fp32 [N].
    """

    words: Tensor
    group_scale: Tensor
    zero: Tensor
    channel_scale: Tensor
    n: int
    k: int


class Cut(NamedTuple):
    """How a product is cut up: rows and outputs of a tile, parts of the inputs, warps of a program, stages of the load pipeline."""

    rows: int
    outputs: int
    split: int
    warps: int
    stages: int


TUNED: dict[tuple[int, int, int], Cut | None] = {}  # (rows, outputs, inputs) that were measured -> the cut, or None: expand first


def prepare(weight: DualGrained, *, group_size: int) -> KernelWeight:
    """The layout that the kernels read. group_size : a power of two >= 32, or -1 (or K and more) for the whole row."""
    n, k = weight.codes.shape
    blocks = -(-k // WIDTH)
    codes = torch.nn.functional.pad(weight.codes, (0, blocks * WIDTH - k)).view(n, blocks, PLANES, PLANE).permute(1, 2, 0, 3)
    places = torch.tensor([1, 16, 256, 4096], dtype=torch.int32, device=codes.device).view(1, PLANES, 1, 1)
    word = ((codes + 8).to(torch.int32) * places).sum(1, dtype=torch.int32)  # 0 to 65535
    words = torch.where(word > 32767, word - 65536, word).to(torch.int16)
    step = WIDTH if group_size == -1 or group_size >= k else min(group_size, WIDTH)  # inputs for which a group's numbers are stored
    repeats = blocks if group_size == -1 or group_size >= k else group_size // step

    def laid_out(value_NG: Tensor) -> Tensor:
        per_step = value_NG.repeat_interleave(repeats, dim=1)[:, : blocks * WIDTH // step]
        missing = blocks * WIDTH // step - per_step.shape[1]
        return torch.nn.functional.pad(per_step, (0, missing)).T.reshape(blocks, WIDTH // step, n).contiguous()

    return KernelWeight(words.contiguous(), laid_out(weight.group_scale), laid_out(weight.zero + 8), weight.channel_scale, n, k)


def multiply(
    x_MK: Float[Tensor, "M K"],
    weight: KernelWeight,
    amax: Float[Tensor, ""],
    bias: Float[Tensor, " N"] | None = None,
    cut: Cut | None = None,
) -> Float[Tensor, "M N"]:
    """(ax channel_scale) (xq W8^T) + bias in the dtype of x, with ax = amax / 127 and x rounded to int8; the same bits with any cut.

    cut : of the fused kernel; None: as measured (`TUNED`), or by the number of rows. Not differentiable.
    """
    m, n = x_MK.shape[0], weight.n
    out = x_MK.new_empty(m, n)
    if m == 0:
        return out
    x8 = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    x_MK = x_MK.contiguous()
    _round_kernel[(-(-x_MK.numel() // 1024),)](x_MK, amax, x8, x_MK.numel(), BLOCK=1024)
    cut = cut or TUNED.get((m, n, weight.k), cut_for(m, n, weight.k))
    if cut is not None and cut.split == 1:
        _launch(x8, weight, cut, out, amax, bias)
        return out
    sums = int8_product(x8, expand(weight)) if cut is None else accumulate(x8, weight, cut)
    bias_of = bias if bias is not None else out  # a pointer that is not read
    _scale_kernel[(-(-m * n // 1024),)](
        sums, weight.channel_scale, amax, bias_of, out, m * n, n, BIAS=bias is not None, BLOCK=1024
    )  # fmt: skip
    return out


def cut_for(m: int, n: int, k: int) -> Cut | None:
    """The cut for a product of m rows, made for an H100 and a few thousand outputs and inputs; None: expand W8, then multiply."""
    if m <= 16:
        return Cut(16, 64, min(8, max(1, k // 512), max(1, 528 // -(-n // 64))), 4, 5)  # 528: four programs on each of 132 multiprocessors
    if m <= 64:
        return Cut(32 if m <= 32 else 64, 128, 1, 4, 4)
    return Cut(128, 128, 1, 8, 3) if m <= FUSED_ROWS else None


def accumulate(x8_MK: Int8[Tensor, "M K"], weight: KernelWeight, cut: Cut) -> Int32[Tensor, "M N"]:
    """xq W8^T by the fused kernel, in integers."""
    sums = torch.zeros(x8_MK.shape[0], weight.n, dtype=torch.int32, device=x8_MK.device)
    _launch(x8_MK, weight, cut, sums, weight.channel_scale, None)
    return sums


def expand(weight: KernelWeight) -> Int8[Tensor, "N K"]:
    """The int8 weights."""
    out = torch.empty(weight.n, weight.k, dtype=torch.int8, device=weight.words.device)
    grid = (-(-weight.n // 64), weight.words.shape[0])
    _expand_kernel[grid](
        weight.words, weight.group_scale, weight.zero, out, weight.n, weight.k, GROUPS=weight.zero.shape[1], PLANE=PLANE, BN=64
    )
    return out


class KernelLinear(nn.Module):
    """y = x W^T + b with W in 4 bits, expanded by the kernel that multiplies it: a run-time form of a DualGrainedLinear on a GPU.

    Not differentiable.
    """

    def __init__(self, stored: DualGrainedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = stored.in_features, stored.out_features, stored.bias
        weight = prepare(stored.weight(), group_size=stored.group_size)
        for name in ("words", "group_scale", "zero", "channel_scale"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("amax", stored.amax)

    @staticmethod
    def fits(stored: DualGrainedLinear) -> bool:
        """Whether the kernels are made for these bits and groups."""
        g = stored.group_size
        return stored.bits == 4 and (g == -1 or g >= stored.in_features or (g >= 32 and g & (g - 1) == 0))

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        weight = KernelWeight(self.words, self.group_scale, self.zero, self.channel_scale, self.out_features, self.in_features)
        return multiply(x.reshape(-1, self.in_features), weight, self.amax, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits=4"


def _launch(x8: Tensor, weight: KernelWeight, cut: Cut, out: Tensor, amax: Tensor, bias: Tensor | None) -> None:
    m, blocks = x8.shape[0], weight.words.shape[0]
    split = min(cut.split, blocks)
    grid = (-(-weight.n // cut.outputs), -(-m // cut.rows), split)
    _fused_kernel[grid](
        x8, weight.words, weight.group_scale, weight.zero, weight.channel_scale, amax, bias if bias is not None else weight.channel_scale,
        out, m, weight.n, weight.k, blocks, -(-blocks // split),
        GROUPS=weight.zero.shape[1], PLANE=PLANE, SUMS=out.dtype == torch.int32, BIAS=bias is not None, BM=cut.rows, BN=cut.outputs,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
@no_type_check  # the tests' shape checker would wrap the function, which Triton cannot read then
def _round_kernel(x, amax, out, size, BLOCK: tl.constexpr):
    """out = clamp(round(x / (amax / 127)), -127, 127)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    scale = tl.div_rn(tl.load(amax).to(tl.float32), 127.0)
    v = tl.div_rn(tl.load(x + at, mask=there, other=0.0).to(tl.float32), tl.zeros((BLOCK,), tl.float32) + scale)
    v = tl.minimum(tl.maximum(v, -127.0), 127.0)
    tl.store(out + at, ((v + ROUNDER) - ROUNDER).to(tl.int8), mask=there)


@triton.jit(do_not_specialize=["size"])
@no_type_check
def _scale_kernel(sums, channel_scale, amax, bias, out, size, N, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out = sums * (channel_scale * ax) + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    scale = tl.load(channel_scale + at % N, mask=there, other=0.0) * tl.div_rn(tl.load(amax).to(tl.float32), 127.0)
    y = tl.load(sums + at, mask=there, other=0).to(tl.float32) * scale
    if BIAS:
        y += tl.load(bias + at % N, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def _expanded(words, group_scale, zero, p: tl.constexpr):
    """The int8 weights of plane p: int16 words [outputs, inputs], the numbers of their group [outputs]."""
    code = (words.to(tl.int32) >> (4 * p)) & 15
    return ((code - zero.to(tl.int32)[:, None]) * group_scale.to(tl.int32)[:, None]).to(tl.int8)


@triton.jit(do_not_specialize=["M", "blocks", "blocks_each"])
@no_type_check
def _fused_kernel(
    x8, words, group_scale, zero, channel_scale, amax, bias, out, M, N, K, blocks, blocks_each,
    GROUPS: tl.constexpr, PLANE: tl.constexpr, SUMS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of W8 X^T over a part of the inputs. SUMS: added to int32 `out` as it is; else scaled and stored."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, PLANE)
    kept_n = tl.minimum(n, N - 1).to(tl.int64)  # outputs beyond N are computed from the last one and not stored: loads of W need no mask
    x_m = x8 + m.to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.int32)
    first = tl.program_id(2) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        w = tl.load(words + (block * N + kept_n[:, None]) * PLANE + j[None, :])
        for p in tl.static_range(4):
            k = (block * 4 + p) * PLANE + j
            x_km = tl.load(x_m[None, :] + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0)
            group = (block * GROUPS + p * GROUPS // 4) * N + kept_n
            w_nk = _expanded(w, tl.load(group_scale + group), tl.load(zero + group), p)
            acc = tl.dot(w_nk, x_km, acc, out_dtype=tl.int32)
    place = m[None, :].to(tl.int64) * N + n[:, None]
    there = (m[None, :] < M) & (n[:, None] < N)
    if SUMS:
        tl.atomic_add(out + place, acc, mask=there, sem="relaxed")
    else:
        y = acc.to(tl.float32) * (tl.load(channel_scale + kept_n) * tl.div_rn(tl.load(amax).to(tl.float32), 127.0))[:, None]
        if BIAS:
            y += tl.load(bias + kept_n).to(tl.float32)[:, None]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def _expand_kernel(words, group_scale, zero, out, N, K, GROUPS: tl.constexpr, PLANE: tl.constexpr, BN: tl.constexpr):
    """W8 for one block of inputs into out [N, K]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    j = tl.arange(0, PLANE)
    kept_n = tl.minimum(n, N - 1).to(tl.int64)
    w = tl.load(words + (block * N + kept_n[:, None]) * PLANE + j[None, :])
    for p in tl.static_range(4):
        group = (block * GROUPS + p * GROUPS // 4) * N + kept_n
        k = (block * 4 + p) * PLANE + j
        value = _expanded(w, tl.load(group_scale + group), tl.load(zero + group), p)
        tl.store(out + n[:, None].to(tl.int64) * K + k[None, :], value, mask=(n[:, None] < N) & (k[None, :] < K))
