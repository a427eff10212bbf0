"""Block-sparse products in Triton: Y = X W^T + bias with W in block-compressed rows, for bf16, fp16 and fp32, summed in fp32.

A program computes rows of X times one row of tiles, and reads only the kept ones. Under TRITON_INTERPRET=1 it runs on the CPU, for fp16
and fp32 inputs.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from blockwright.blocks.block_sparse import BlockSparseLinear
from blockwright.errors import BlockwrightError


def multiply(
    x_MK: Float[Tensor, "M K"],
    values: Float[Tensor, "kept r c"],
    col: Int32[Tensor, " kept"],
    crow: Int32[Tensor, " R1"],
    bias: Float[Tensor, " N"] | None = None,
    *,
    n: int,
    rows: int | None = None,
) -> Float[Tensor, "M N"]:
    """x W^T + bias in the dtype of x; values, col and crow as `BlockSparseLinear` holds them, values in the dtype of x. A row of tiles of
    which none is kept gives the bias. Not differentiable by itself: see `product`.

    n : outputs; the last tiles may reach over the border. rows : of x in a program: a power of two >= 16; None: as measured to be good.
    Raises BlockwrightError for tiles outside 16 to 128.
    """
    (m, k), (_, r, c) = x_MK.shape, values.shape
    if not (16 <= r <= 128 and 16 <= c <= 128):
        raise BlockwrightError(f"lpvit kernel: tile {r} x {c}", allowed="16 to 128 rows and columns", do="Use the dense product here")
    out = x_MK.new_empty(m, n)
    if not m:
        return out
    rows = (128 if m > 64 else 64 if m > 32 else 32) if rows is None else rows
    big_r, big_c = triton.next_power_of_2(r), triton.next_power_of_2(c)
    stages = 1 if x_MK.dtype == torch.float32 else 3 if big_c > 64 else 4  # buffers of both operands must fit into shared memory
    grid = (len(crow) - 1, triton.cdiv(m, rows))
    _kernel[grid](
        x_MK.contiguous(), values, col, crow, out if bias is None else bias, out, m, n, k,
        R=r, C=c, BR=big_r, BC=big_c, BM=rows, BIAS=bias is not None, EVEN=k % c == 0 and big_c == c, WHOLE=big_r == r and big_c == c,
        num_warps=8 if rows * big_r >= 128 * 128 else 4, num_stages=stages,
    )  # fmt: skip
    return out


def product(x: Float[Tensor, "*b K"], module: BlockSparseLinear) -> Float[Tensor, "*b N"]:
    """What a `BlockSparseLinear` computes, by the kernel; differentiable in x: dX = dY W, with W made dense."""
    rows = x.reshape(-1, x.shape[-1])
    y = _Product.apply(rows, module) if torch.is_grad_enabled() and x.requires_grad else _forward(rows, module)
    return y.view(*x.shape[:-1], module.out_features)


def _forward(x_MK: Tensor, module: BlockSparseLinear) -> Tensor:
    bias = None if module.bias is None else module.bias.to(x_MK.dtype)
    return multiply(x_MK, module.values.to(x_MK.dtype), module.col, module.crow, bias, n=module.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, module: BlockSparseLinear) -> Tensor:
        ctx.module = module
        return _forward(x_MK, module)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        return dy[0] @ ctx.module.dense().to(dy[0].dtype), None


@triton.jit(do_not_specialize=["M"])
@no_type_check  # the tests' shape checker would wrap the function, which Triton cannot read then
def _kernel(
    x, values, col, crow, bias, out, M, N, K,
    R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """BM rows of x times one row of tiles. EVEN: no tile reaches over the last input. WHOLE: r and c are powers of two."""
    row = tl.program_id(0)  # neighbours in time read the same rows of x, which stay in the cache
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    i, j = tl.arange(0, BR), tl.arange(0, BC)
    n = row * R + i
    kept_m = tl.minimum(m, M - 1).to(tl.int64)  # rows beyond M repeat the last one and are not stored: loads of x need no mask for them
    acc = tl.zeros((BM, BR), tl.float32)
    first, last = tl.load(crow + row).to(tl.int64), tl.load(crow + row + 1).to(tl.int64)
    for at in range(first, last):
        k = tl.load(col + at) * C + j
        x_mk = x + kept_m[:, None] * K + k[None, :]
        w_kn = values + at * (R * C) + i[None, :] * C + j[:, None]
        x_value = tl.load(x_mk) if EVEN else tl.load(x_mk, mask=((k < K) & (j < C))[None, :], other=0.0)
        w_value = tl.load(w_kn) if WHOLE else tl.load(w_kn, mask=(i < R)[None, :] & (j < C)[:, None], other=0.0)
        acc = tl.dot(x_value, w_value, acc, input_precision="ieee")
    there = (i < R) & (n < N)
    if BIAS:
        acc += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & there[None, :])
