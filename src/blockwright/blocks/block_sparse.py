"""Linears of which only some tiles are kept: block-compressed rows, with ragged borders."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from blockwright.blocks.linear import size
from blockwright.errors import BlockwrightError

Product = Callable[[Tensor, "BlockSparseLinear"], Tensor]  # x [*b, K] -> y [*b, N]
TALL, FEW, MANY = 32, 0.4, 64  # rows of a tile, share of tiles kept, rows of x: where gathering inputs is faster on a CPU, as measured


def cut(w_NK: Float[Tensor, "N K"], tile: tuple[int, int]) -> Float[Tensor, "R C r c"]:
    """A matrix as R = ceil(N / r) by C = ceil(K / c) tiles of r x c; those at the border are filled up with zeros."""
    (n, k), (r, c) = w_NK.shape, tile
    padded = pad(w_NK, (0, -k % c, 0, -n % r))
    return padded.unflatten(0, (-1, r)).unflatten(2, (-1, c)).transpose(1, 2)


def joined(tiles_RCrc: Shaped[Tensor, "R C r c"], n: int, k: int) -> Shaped[Tensor, "{n} {k}"]:
    """The matrix [n, k] that `cut` cut."""
    return tiles_RCrc.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:n, :k]


def tile_sums(w_NK: Float[Tensor, "N K"], tile: tuple[int, int]) -> Float[Tensor, " n"]:
    """The sum over each tile, in fp64, rows of tiles first."""
    return cut(w_NK.double(), tile).sum((2, 3)).flatten()


class BlockSparseLinear(nn.Module):
    """y = x W^T + b, where W [N, K] is zero outside the kept tiles of r x c.

    values [kept, r, c] : the kept tiles, row of tiles by row of tiles; a tile over the border holds zeros there.
    col int32 [kept] : the column of tiles that each lies in, ascending in a row.
    crow int32 [R + 1] : where each row of tiles starts in values.
    product : what multiplies in place of the default, which makes W dense at every call: the same numbers, and no time is saved.
    transposed : it stands where a transformers Conv1D stood, which holds [K, N].
    """

    values: Tensor
    col: Tensor
    crow: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, tile: tuple[int, int], kept: int, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.tile, self.kept, self.transposed = in_features, out_features, tile, kept, transposed
        self.product: Product | None = None
        meta = torch.device("meta")
        self.values = nn.Parameter(torch.empty(kept, *tile, device=meta), requires_grad=False)
        self.register_buffer("col", torch.empty(kept, dtype=torch.int32, device=meta))
        self.register_buffer("crow", torch.empty(-(-out_features // tile[0]) + 1, dtype=torch.int32, device=meta))
        self.bias = nn.Parameter(torch.empty(out_features, device=meta), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls, dense: nn.Module, keep_RC: Bool[Tensor, "R C"], tile: tuple[int, int], dtype: torch.dtype | None = None
    ) -> "BlockSparseLinear":
        """The tiles `keep_RC` of a dense linear (nn.Linear or Conv1D), with its bias. dtype : of the values; None: the linear's."""
        transposed = isinstance(dense, Conv1D)
        w_NK: Tensor = dense.weight.detach().T if transposed else dense.weight.detach()  # type: ignore[operator,union-attr,assignment]
        bias = dense.bias if isinstance(dense.bias, Tensor) else None
        n, k = w_NK.shape
        new = cls(k, n, tile=tile, kept=int(keep_RC.sum()), bias=bias is not None, transposed=transposed)
        new.values = nn.Parameter(cut(w_NK, tile)[keep_RC].to(dtype or w_NK.dtype), requires_grad=False)
        new.col = keep_RC.nonzero()[:, 1].to(torch.int32)
        new.crow = pad(keep_RC.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return new

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "BlockSparseLinear":
        """The module without its tensors (on meta), in the place of a linear of the same sizes."""
        transposed = isinstance(replaced, Conv1D)
        n, k = size(replaced)
        r, c = form["tile"]
        bias = getattr(replaced, "bias", None) is not None
        return cls(k, n, tile=(r, c), kept=form["kept"], bias=bias, transposed=transposed)

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        return {"form": "block_sparse", "tile": list(self.tile), "kept": self.kept}

    def check(self, name: str) -> None:
        """Raise BlockwrightError where col and crow describe no tiles of this matrix; called with its full name once they are there."""
        crow, col = self.crow.long().cpu(), self.col.long().cpu()
        columns = -(-self.in_features // self.tile[1])
        good = int(crow[0]) == 0 and int(crow[-1]) == self.kept and bool((crow.diff() >= 0).all())
        good = good and bool(((col >= 0) & (col < columns)).all())
        if good:
            row = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff())
            good = bool(((row * columns + col).diff() > 0).all())
        if not good:
            raise BlockwrightError(
                f"{name}: col and crow name no {self.kept} tiles of {self.out_features} x {self.in_features}",
                allowed=f"columns 0 to {columns - 1}, ascending in each row of tiles",
                do="Copy the model folder again; this file is damaged",
            )

    def mask(self) -> Bool[Tensor, "R C"]:
        """Which tiles are kept."""
        columns = -(-self.in_features // self.tile[1])
        keep = torch.zeros(len(self.crow) - 1, columns, dtype=torch.bool, device=self.col.device)
        keep[self._rows(), self.col.long()] = True
        return keep

    def dense(self) -> Float[Tensor, "N K"]:
        """W, in the dtype of the values."""
        r, c = self.tile
        tiles = self.values.new_zeros(len(self.crow) - 1, -(-self.in_features // c), r, c)
        return joined(tiles.index_put((self._rows(), self.col.long()), self.values), self.out_features, self.in_features)

    def plain_weight(self) -> Tensor:
        """The weights in fp32, laid out as in the module that this one replaces."""
        return self.dense().float().T if self.transposed else self.dense().float()

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        if self.product is not None:
            return self.product(x, self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.dense().to(x.dtype), bias)

    def _rows(self) -> Tensor:
        """The row of tiles of each kept tile."""
        places = torch.arange(len(self.crow) - 1, device=self.crow.device)
        return torch.repeat_interleave(places, self.crow.long().diff(), output_size=self.kept)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tile={self.tile[0]}x{self.tile[1]}, kept={self.kept}"


class GatheredLinear(nn.Module):
    """y = x W^T + b, for many rows of x by one product for each row of tiles, with those inputs alone that its kept tiles read: on a CPU
    faster than a dense product where tiles are tall and few are kept. Few rows of x take the dense product.

    A run-time form, made of a BlockSparseLinear, which is what files hold. weight [N, K]. inputs : which inputs each row of tiles reads,
    one row after the other.
    """

    inputs: Tensor

    def __init__(self, stored: BlockSparseLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = stored.in_features, stored.out_features, stored.bias
        reads_RK = stored.mask().repeat_interleave(stored.tile[1], 1)[:, : stored.in_features]
        self.height, self.counts = stored.tile[0], reads_RK.sum(1).tolist()
        self.weight = nn.Parameter(stored.dense(), requires_grad=False)
        self.register_buffer("inputs", reads_RK.nonzero()[:, 1])

    @staticmethod
    def pays(stored: BlockSparseLinear) -> bool:
        """Whether it is the faster form."""
        tiles = (len(stored.crow) - 1) * -(-stored.in_features // stored.tile[1])
        return stored.tile[0] >= TALL and stored.kept <= FEW * tiles

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        x_MK = x.reshape(-1, self.in_features)
        if len(x_MK) < MANY:
            return linear(x, self.weight, self.bias)
        rows = zip(self.weight.split(self.height), self.inputs.split(self.counts), strict=True)
        y_MN = torch.cat([linear(x_MK.index_select(1, read), w.index_select(1, read)) for w, read in rows], 1)
        return (y_MN if self.bias is None else y_MN + self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def multiplications(model: nn.Module, sample: Tensor) -> dict[str, tuple[int, int]]:
    """Multiplications for one sample [1, ...] that the tiles of each pruned linear take, and those of the dense linear; by name.

    Weights outside kept tiles count as skipped; attention scores, softmax and layers of other forms are not counted.
    """
    counts: dict[str, tuple[int, int]] = {}

    def heard(name: str, module: BlockSparseLinear, args: Any, out: Tensor) -> None:
        ones = tile_sums(torch.ones(module.out_features, module.in_features), module.tile)
        positions, (kept, whole) = out.numel() // module.out_features, counts.get(name, (0, 0))
        counts[name] = (
            kept + positions * int(ones[module.mask().cpu().flatten()].sum()),
            whole + positions * module.in_features * module.out_features,
        )

    handles = [m.register_forward_hook(partial(heard, n)) for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)]
    try:
        with torch.no_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return counts
