"""Triton kernels of finequant: y = x W^T with W as 4- or 8-bit codes and a scale per group, for NVIDIA GPUs (tuned on Hopper).

The product is computed transposed, Y^T = W X^T, so that the large matrix is the left operand: tensor cores take that from registers, and no
16-bit weight passes through shared memory. Under TRITON_INTERPRET=1 the kernels run on the CPU, for fp16 and fp32 inputs.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"
from functools import cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
PLANES = 4  # a block of inputs is cut into 4 planes; one int16 word holds a 4-bit code of each
SPLIT_ROWS = 16  # up to so many rows of x the inputs are divided among programs and the partial sums added in a second pass
FUSED_ROWS = 512  # above so many rows W is made dense, a slice of the outputs at a time, and multiplied by torch
SLICE_BYTES = 2**24  # of a dense slice: it stays in the L2 cache between the kernel that writes it and the product that reads it
ROWS = (16, 32, 64, 128, 256, 512)  # products of up to so many rows are cut alike


class KernelWeight(NamedTuple):
    """A matrix [N, K] as the kernels read it. Inputs are padded to whole blocks of PLANES * plane with codes of 0.

    words : 4 bits: int16 [blocks, N, plane], bits 4p to 4p+3 of word j are code + 8 of input (4 block + p) * plane + j;
        8 bits: int8 codes [blocks * PLANES, N, plane].
    scale : fp32 [blocks, groups of a block, N]; [1, 1, N] with one scale a row; a group longer than a block is repeated.
    """

    words: Tensor
    scale: Tensor
    n: int
    k: int
    bits: int

    @property
    def plane(self) -> int:
        return int(self.words.shape[2])

    @property
    def blocks(self) -> int:
        return int(self.words.shape[0]) // (1 if self.bits == 4 else PLANES)


class Cut(NamedTuple):
    """How a product is cut up: rows and outputs of a tile, parts of the inputs, warps of a program, stages of the load pipeline."""

    rows: int
    outputs: int
    split: int
    warps: int
    stages: int
    sums: bool  # scales multiply the sum over a group (cheaper for few rows), not the weights


# The cut of products that were measured: (one of ROWS, outputs, inputs, bits) -> a cut, or the bytes of a dense slice. Read by `cut_for`.
TUNED: dict[tuple[int, int, int, int], Cut | int] = {}


def prepare(codes_NK: Int8[Tensor, "N K"], scale_NG: Float[Tensor, "N G"], *, bits: int, group_size: int) -> KernelWeight:
    """The layout that the kernels read, from codes in [-2**(bits-1), 2**(bits-1) - 1] and their scales; on the device of the codes.

    bits : 4 or 8. group_size : a power of two >= 16, or -1.
    """
    n, k = codes_NK.shape
    whole_row = group_size == -1 or group_size >= k
    plane = 32 if whole_row else min(32, group_size)
    width = PLANES * plane
    blocks = -(-k // width)
    codes = torch.nn.functional.pad(codes_NK, (0, blocks * width - k)).view(n, blocks, PLANES, plane).permute(1, 2, 0, 3)
    if bits == 4:
        nibbles = (codes + 8).to(torch.int32)
        places = torch.tensor([1, 16, 256, 4096], dtype=torch.int32, device=codes.device).view(1, PLANES, 1, 1)
        word = (nibbles * places).sum(1, dtype=torch.int32)  # 0 to 65535
        words = torch.where(word > 32767, word - 65536, word).to(torch.int16)
    else:
        words = codes.reshape(blocks * PLANES, n, plane)
    if whole_row:
        scale = scale_NG.float().view(1, 1, n)
    else:
        step = min(group_size, width)  # inputs for which a scale is stored
        per_step = scale_NG.float().repeat_interleave(group_size // step, dim=1)[:, : -(-k // step)]
        per_step = torch.nn.functional.pad(per_step, (0, blocks * width // step - per_step.shape[1]), value=1.0)
        scale = per_step.T.reshape(blocks, width // step, n)
    return KernelWeight(words.contiguous(), scale.contiguous(), n, k, bits)


def multiply(
    x_MK: Float[Tensor, "M K"], weight: KernelWeight, bias: Float[Tensor, " N"] | None = None, cut: Cut | int | None = None
) -> Float[Tensor, "M N"]:
    """x W^T + bias in the dtype of x, summed in fp32; the same bits at every call with one cut.

    cut : of the fused kernel; or an integer, the bytes of a slice of W to make dense and multiply by torch; None: `cut_for` decides.
    Up to 16 rows the fused kernel divides the inputs among programs, and a second pass adds their sums in order.
    """
    m, n = x_MK.shape[0], weight.n
    if m == 0:
        return x_MK.new_empty(0, n)
    cut = cut_for(m, n, weight.k, weight.bits) if cut is None else cut
    return _by_slices(x_MK, weight, bias, cut) if isinstance(cut, int) else _fused(x_MK.contiguous(), weight, bias, cut)


def cut_for(m: int, n: int, k: int, bits: int) -> Cut | int:
    """The cut for a product of m rows: as measured, or made for an H100 and a few thousand outputs and inputs."""
    rows = next((r for r in ROWS if m <= r), m)
    if (rows, n, k, bits) in TUNED:
        return TUNED[rows, n, k, bits]
    if m <= SPLIT_ROWS:
        programs = -(-n // 64)
        split = min(8, max(1, k // 512), max(1, 528 // programs))  # 528: four programs on each of 132 multiprocessors
        return Cut(16, 64, split, 4, 5, True)
    if m <= 32:
        return Cut(32, 128, 1, 4, 4, True)
    if m <= 64:
        return Cut(64, 128, 1, 8, 4, False)
    return Cut(128, 128, 1, 8, 4, False) if m <= FUSED_ROWS else SLICE_BYTES


def dense(weight: KernelWeight, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Float[Tensor, "n K"]:
    """Rows first to last of the matrix, dense, each weight code * scale rounded once to dtype."""
    last = weight.n if last is None else last
    out = torch.empty(last - first, weight.k, dtype=dtype, device=weight.words.device)
    return _dense_into(out, weight, first)


def _channel(weight: KernelWeight) -> bool:
    return weight.scale.shape[0] == 1 and weight.scale.shape[1] == 1


def _dense_into(out: Tensor, weight: KernelWeight, first: int) -> Tensor:
    grid = (-(-out.shape[0] // 64), weight.blocks)
    _dense_kernel[grid](
        weight.words, weight.scale, out, first, first + out.shape[0], weight.n, weight.k,
        BITS=weight.bits, PLANE=weight.plane, GROUPS=weight.scale.shape[1], CHANNEL=_channel(weight), FAST=_fast(out.dtype), BN=64,
    )  # fmt: skip
    return out


def _by_slices(x_MK: Tensor, weight: KernelWeight, bias: Tensor | None, slice_bytes: int) -> Tensor:
    out = x_MK.new_empty(x_MK.shape[0], weight.n)
    rows = min(weight.n, max(128, slice_bytes // (x_MK.element_size() * weight.k) // 128 * 128))
    scratch = x_MK.new_empty(rows, weight.k)  # one buffer for all slices: overwritten in the cache, most of it never reaches memory
    for first in range(0, weight.n, rows):
        last = min(first + rows, weight.n)
        part = _dense_into(scratch[: last - first], weight, first)
        torch.mm(x_MK, part.T, out=out[:, first:last])
    return out if bias is None else out.add_(bias.to(out.dtype))


def _fused(x: Tensor, weight: KernelWeight, bias: Tensor | None, cut: Cut) -> Tensor:
    m, n = x.shape[0], weight.n
    out = x.new_empty(m, n)
    blocks = weight.blocks
    split = min(cut.split, blocks)
    target = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    grid = (-(-n // cut.outputs), -(-m // cut.rows), split)
    bias_of = bias if bias is not None else out  # a pointer that is not read
    _fused_kernel[grid](
        x, weight.words, weight.scale, bias_of, target, m, n, weight.k, blocks, -(-blocks // split),
        BITS=weight.bits, PLANE=weight.plane, GROUPS=weight.scale.shape[1], CHANNEL=_channel(weight),
        BIAS=bias is not None and split == 1, SUMS=cut.sums, FAST=_fast(x.dtype), BM=cut.rows, BN=cut.outputs,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if split > 1:
        size = m * n
        _add_kernel[(-(-size // 1024),)](target, bias_of, out, size, n, BIAS=bias is not None, SPLIT=split, BLOCK=1024)
    return out


@cache
def _fast(dtype: torch.dtype) -> int:
    """How codes of 4 bits become numbers: 1, 2: by bits, for bf16 and fp16 on Hopper and later; 0: by arithmetic."""
    if INTERPRETED or dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability() < (9, 0):
        return 0
    return 1 if dtype == torch.bfloat16 else 2


@triton.jit
@no_type_check  # the tests' shape checker would wrap the function, which Triton cannot read then
def _four_planes(words, FAST: tl.constexpr, dtype: tl.constexpr):
    """The codes of the four planes of int16 words, as numbers of dtype.

    FAST: two words lie in a register; a mask takes the same code of both, and or-ing it into the last bits of 128 (bf16) or 1024 (fp16)
    makes both numbers 128 + code + 8 or 1024 + code + 8.
    """
    if FAST == 1:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
            mov.b32 t, 0x43084308;
            sub.bf16x2 $0, $0, t;
            sub.bf16x2 $1, $1, t;
            sub.bf16x2 $2, $2, t;
            sub.bf16x2 $3, $3, t;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FAST == 2:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xea;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000f000f, 0x64006400, 0xea;
            mov.b32 t, 0x64086408;
            sub.f16x2 $0, $0, t;
            sub.f16x2 $1, $1, t;
            sub.f16x2 $2, $2, t;
            sub.f16x2 $3, $3, t;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        wide = words.to(tl.int32)
        a = ((wide & 15) - 8).to(dtype)
        b = (((wide >> 4) & 15) - 8).to(dtype)
        c = (((wide >> 8) & 15) - 8).to(dtype)
        d = (((wide >> 12) & 15) - 8).to(dtype)
    return a, b, c, d


@triton.jit(do_not_specialize=["M", "blocks", "blocks_each"])
@no_type_check
def _fused_kernel(
    x, words, scale, bias, out, M, N, K, blocks, blocks_each,
    BITS: tl.constexpr, PLANE: tl.constexpr, GROUPS: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr,
    FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of Y^T over a part of the inputs. SUMS: scales multiply the sum over a group, not the weights (cheaper for few rows)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, PLANE)
    kept_n = tl.minimum(n, N - 1).to(tl.int64)  # outputs beyond N are computed from the last one and not stored: loads of W need no mask
    x_m = x + m.to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.float32)
    part = tl.zeros((BN, BM), tl.float32)
    first = tl.program_id(2) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        if BITS == 4:
            w = tl.load(words + (block * N + kept_n[:, None]) * PLANE + j[None, :])
            planes = _four_planes(w, FAST, x.dtype.element_ty)
        for p in tl.static_range(4):
            k = (block * 4 + p) * PLANE + j
            x_km = tl.load(x_m[None, :] + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0.0)
            if BITS == 4:
                w_nk = planes[p]
            else:
                w_nk = tl.load(words + ((block * 4 + p) * N + kept_n[:, None]) * PLANE + j[None, :]).to(x.dtype.element_ty)
            if CHANNEL:
                acc = tl.dot(w_nk, x_km, acc, input_precision="ieee")
            else:
                s_n = tl.load(scale + (block * GROUPS + p * GROUPS // 4) * N + kept_n)
                if SUMS:
                    part = tl.dot(w_nk, x_km, part, input_precision="ieee")
                    if (p + 1) * GROUPS % 4 == 0:  # the last plane of a group
                        acc += part * s_n[:, None]
                        part = tl.zeros((BN, BM), tl.float32)
                else:
                    acc = tl.dot(w_nk * s_n.to(w_nk.dtype)[:, None], x_km, acc, input_precision="ieee")
    if CHANNEL:
        acc *= tl.load(scale + kept_n)[:, None]
    if BIAS:
        acc += tl.load(bias + kept_n).to(tl.float32)[:, None]
    place = (tl.program_id(2) * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit(do_not_specialize=["size"])
@no_type_check
def _add_kernel(partial, bias, out, size, N, BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """The second pass: partial sums added in the order of the inputs, plus the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    y = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SPLIT):
        y += tl.load(partial + (i * size + at), mask=there, other=0.0)
    if BIAS:
        y += tl.load(bias + at % N, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def _dense_kernel(
    words, scale, out, first, last, N, K,
    BITS: tl.constexpr, PLANE: tl.constexpr, GROUPS: tl.constexpr, CHANNEL: tl.constexpr, FAST: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows first to last of W, for one block of inputs, into out [last - first, K]."""
    n = first + tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    j = tl.arange(0, PLANE)
    kept_n = tl.minimum(n, N - 1).to(tl.int64)
    if BITS == 4:
        w = tl.load(words + (block * N + kept_n[:, None]) * PLANE + j[None, :])
        planes = _four_planes(w, FAST, out.dtype.element_ty)
    for p in tl.static_range(4):
        w_nk = planes[p] if BITS == 4 else tl.load(words + ((block * 4 + p) * N + kept_n[:, None]) * PLANE + j[None, :])
        group = 0 if CHANNEL else block * GROUPS + p * GROUPS // 4
        s_n = tl.load(scale + group * N + kept_n)
        k = (block * 4 + p) * PLANE + j
        place = (n[:, None] - first).to(tl.int64) * K + k[None, :]
        value = w_nk.to(tl.float32) * s_n[:, None]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=(n[:, None] < last) & (k[None, :] < K))
