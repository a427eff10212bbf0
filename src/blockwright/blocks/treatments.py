"""What may become of a linear: rounded to a grid, cut to a low rank, or left dense; what that takes in bytes, and by how much it is off."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from blockwright.blocks import layers, tiles
from blockwright.blocks.low_rank import LowRankLinear, factors
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.stream import Block

SHAPE_BYTES = 16  # the two sizes that a packed matrix is stored with
NARROWED = tuple(1 - 0.08 * i for i in range(6))  # shares of the full range that a grid of few levels may cover


class Treatment(NamedTuple):
    """What a linear becomes.

    kind : dense, quantise, low_rank. bits, group_size : of its codes, for low_rank of both factors'; 0 bits: dense. rank : of the product.
    """

    kind: str
    bits: int = 0
    group_size: int = 0
    rank: int = 0

    def __str__(self) -> str:
        grid = f"int{self.bits} g{self.group_size}" if self.bits else ""
        return {"dense": "dense", "quantise": grid, "low_rank": f"rank {self.rank} {grid}".strip()}[self.kind]

    @classmethod
    def named(cls, text: str) -> "Treatment":
        """The treatment that `str` gives this name."""
        words = text.split()
        grid = (int(words[-2][3:]), int(words[-1][1:])) if words[-1].startswith("g") else (0, 0)
        if words[0] == "rank":
            return cls("low_rank", *grid, rank=int(words[1]))
        return cls("quantise", *grid) if grid[0] else cls("dense")


def nbytes(t: Treatment, n: int, k: int, itemsize: int) -> int:
    """Bytes of the tensors of a matrix of n outputs and k inputs. itemsize : of what is not packed."""
    if t.kind == "low_rank":
        one = Treatment("quantise" if t.bits else "dense", t.bits, t.group_size)
        return nbytes(one, t.rank, k, itemsize) + nbytes(one, n, t.rank, itemsize)
    if t.kind == "dense":
        return n * k * itemsize
    return 4 * n * -(-k * t.bits // 32) + 2 * n * tiles.num_groups(k, t.group_size) + SHAPE_BYTES


def grid(
    w_NK: Float[Tensor, "N K"], t: Treatment, x2_K: Float[Tensor, " K"] | None = None
) -> tuple[Int8[Tensor, "N K"], Float[Tensor, "N G"]]:
    """Codes and bf16 steps of a matrix, symmetric. At 4 bits or fewer each group's step is the one, of those of NARROWED ranges, with the
    least sum of x2 * (w - rounded)^2. x2 : mean square of each input; None counts all alike."""
    scale = tiles.symmetric_scale(w_NK, bits=t.bits, group_size=t.group_size, dtype=torch.bfloat16)
    if t.bits <= 4:
        weigh = tiles.grouped((torch.ones(w_NK.shape[1], device=w_NK.device) if x2_K is None else x2_K.to(w_NK))[None], t.group_size)
        groups, low, high = tiles.grouped(w_NK.float(), t.group_size), -(2 ** (t.bits - 1)), 2 ** (t.bits - 1) - 1
        best, least = scale, torch.full(scale.shape, torch.inf, device=w_NK.device)
        for share in NARROWED:
            step = (scale.float() * share).to(torch.bfloat16)
            wide = step.float().unsqueeze(-1)
            off = (groups / wide).round_().clamp_(low, high).mul_(wide).sub_(groups).square_().mul_(weigh).sum(-1)
            best, least = torch.where(off < least, step, best), torch.minimum(off, least)
        scale = best
    return tiles.to_codes(w_NK, scale, bits=t.bits, group_size=t.group_size), scale


def treated(w_NK: Float[Tensor, "N K"], t: Treatment, x2_K: Float[Tensor, " K"] | None = None) -> Float[Tensor, "N K"]:
    """The matrix that a treated linear multiplies by, in fp32."""
    if t.kind == "dense":
        return w_NK.float()
    if t.kind == "quantise":
        return tiles.from_codes(*grid(w_NK, t, x2_K), group_size=t.group_size)
    v, u = factors(w_NK, t.rank)
    if t.bits:
        one = Treatment("quantise", t.bits, t.group_size)
        v, u = treated(v, one, x2_K), treated(u, one)
    return u @ v


def treat(block: Block, name: str, t: Treatment, x2_K: Float[Tensor, " K"] | None = None) -> None:
    """Put what it becomes in the place of the block's dense linear of this full name (nn.Linear or Conv1D)."""
    if t.kind == "dense":
        return
    linear = block.module.get_submodule(name.removeprefix(block.name + "."))
    if t.kind == "quantise":
        block.swap(name, _packed(linear, t, x2_K))
        return
    pair = LowRankLinear.of(linear, *factors(layers.matrix(linear), t.rank))
    block.swap(name, pair)
    if t.bits:
        block.swap(f"{name}.V", _packed(pair.V, t, x2_K))
        block.swap(f"{name}.U", _packed(pair.U, t))


def _packed(linear: nn.Module, t: Treatment, x2_K: Tensor | None = None) -> PackedLinear:
    return PackedLinear.of(linear, *grid(layers.matrix(linear), t, x2_K), bits=t.bits, group_size=t.group_size)


DENSE = Treatment("dense")
