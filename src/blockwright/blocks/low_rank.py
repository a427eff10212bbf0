"""A linear as the product of two thin ones: fewer parameters and multiplications where the rank is below N K / (N + K)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks.linear import size


class LowRankLinear(nn.Module):
    """y = U(V(x)): V from K inputs to `rank` without a bias, U from there to N outputs with the bias of the linear that it stands for.

    V.weight [rank, K], U.weight [N, rank] : on meta until they are filled. Later stages find `<name>.V` and `<name>.U` as ordinary linears.
    transposed : it stands where a transformers Conv1D stood, which holds [K, N].
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, bias: bool, transposed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.transposed = in_features, out_features, rank, transposed
        self.V = nn.Linear(in_features, rank, bias=False, device="meta").requires_grad_(False)
        self.U = nn.Linear(rank, out_features, bias=bias, device="meta").requires_grad_(False)

    @classmethod
    def of(cls, linear: nn.Module, v_rK: Float[Tensor, "r K"], u_Nr: Float[Tensor, "N r"]) -> "LowRankLinear":
        """Two factors in the place of a dense linear (nn.Linear or Conv1D), whose bias is kept, in the dtype of the factors."""
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        transposed = isinstance(linear, Conv1D)
        new = cls(v_rK.shape[1], u_Nr.shape[0], rank=len(v_rK), bias=bias is not None, transposed=transposed)
        new.V.weight, new.U.weight = (nn.Parameter(t, requires_grad=False) for t in (v_rK, u_Nr))
        if bias is not None:
            new.U.bias = nn.Parameter(bias.detach().to(u_Nr.dtype, copy=True), requires_grad=False)
        return new

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "LowRankLinear":
        """The module without its tensors (on meta), in the place of a linear of the same sizes."""
        transposed = isinstance(replaced, Conv1D)
        n, k = size(replaced)
        return cls(k, n, rank=form["rank"], bias=getattr(replaced, "bias", None) is not None, transposed=transposed)

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        return {"form": "low_rank", "rank": self.rank}

    def plain_weight(self) -> Tensor:
        """The product of the factors in fp32, laid out as in the module that this one replaces; a factor may be packed by now."""
        u, v = (m.weight if isinstance(m, nn.Linear) else m.plain_weight() for m in (self.U, self.V))
        product = u.float() @ v.float()
        return product.T if self.transposed else product

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        y: Tensor = self.U(self.V(x))
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


def factors(w_NK: Float[Tensor, "N K"], rank: int) -> tuple[Float[Tensor, "r K"], Float[Tensor, "N r"]]:
    """(sqrt S V^T, U sqrt S) of the `rank` largest singular values in fp32: their product, the second times the first, is nearest to w.

    Each factor takes half of the scale, so that neither learns faster. w : not modified.
    """
    u, s, v = torch.linalg.svd(w_NK.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
