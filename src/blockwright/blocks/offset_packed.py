"""Linears of which each group of inputs has a step and a real-valued lowest value: w = step * code + offset, as in GGUF's Q4_1."""

from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import tiles
from blockwright.blocks.linear import size


class OffsetLinear(nn.Module):
    """y = x W^T + b with W = weight_step * u + weight_offset, u in 0..2**bits - 1. `transposed`: it replaces a transformers Conv1D.

    Other than a zero point, an offset is no multiple of the step. Both stay in the dtype they were made in, whatever the model's is.
    """

    weight_packed: Tensor  # int32 [N, ceil(K * bits / 32)]
    weight_step: Tensor  # [N, G]
    weight_offset: Tensor  # [N, G]

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.transposed = transposed
        n, groups, meta = out_features, tiles.num_groups(in_features, group_size), torch.device("meta")
        self.register_buffer("weight_packed", torch.empty(n, -(-in_features * bits // 32), dtype=torch.int32, device=meta))
        self.register_buffer("weight_step", torch.empty(n, groups, device=meta))
        self.register_buffer("weight_offset", torch.empty(n, groups, device=meta))
        self.bias = nn.Parameter(torch.empty(n, device=meta), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        linear: nn.Module,
        codes_NK: Int8[Tensor, "N K"],
        step_NG: Float[Tensor, "N G"],
        offset_NG: Float[Tensor, "N G"],
        *,
        bits: int,
        group_size: int,
    ) -> "OffsetLinear":
        """The form of a linear with these codes, in -2**(bits-1)..2**(bits-1) - 1, and grid; its bias is kept.

        offset : the weight of the lowest code; rounded to the dtype of step.
        """
        n, k = codes_NK.shape
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        transposed = isinstance(linear, Conv1D) or bool(getattr(linear, "transposed", False))
        new = cls(k, n, bits=bits, group_size=group_size, bias=bias is not None, transposed=transposed)
        new.weight_packed, new.weight_step = tiles.pack(codes_NK, bits), step_NG.contiguous()
        new.weight_offset = offset_NG.to(step_NG.dtype).contiguous()
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return new

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "OffsetLinear":
        """The module without its tensors (on meta), in the place of a linear of the same sizes."""
        n, k = size(replaced)
        bias = getattr(replaced, "bias", None) is not None
        return cls(k, n, bits=form["bits"], group_size=form["group_size"], bias=bias, transposed=form.get("transposed", False))

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        plain = {"form": "offset_packed", "bits": self.bits, "group_size": self.group_size}
        return plain | ({"transposed": True} if self.transposed else {})

    def codes(self) -> Int8[Tensor, "N K"]:
        """The codes, in -2**(bits-1)..2**(bits-1) - 1."""
        return tiles.unpack(self.weight_packed, self.bits, self.in_features)

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The weights in fp32."""
        return from_offset(self.codes(), self.weight_step, self.weight_offset, bits=self.bits, group_size=self.group_size)

    def plain_weight(self) -> Tensor:
        """The weights in fp32, laid out as in the module that this one replaces."""
        return self.dequantize().T if self.transposed else self.dequantize()

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantize().to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


def from_offset(
    codes_NK: Int8[Tensor, "N K"], step_NG: Float[Tensor, "N G"], offset_NG: Float[Tensor, "N G"], *, bits: int, group_size: int
) -> Float[Tensor, "N K"]:
    """(code + 2**(bits-1)) * step + offset in fp32."""
    k = codes_NK.shape[1]
    unsigned = codes_NK.float().add_(2 ** (bits - 1))
    return unsigned.mul_(tiles.spread(step_NG.float(), group_size, k)).add_(tiles.spread(offset_NG.float(), group_size, k))
