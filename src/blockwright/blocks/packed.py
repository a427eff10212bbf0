"""Linears and embeddings held as packed codes and scales, with the tensor names of compressed-tensors' pack-quantized format."""

from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import tiles
from blockwright.blocks.linear import size


class _Packed(nn.Module):
    """A matrix [N, K] as codes of `bits` bits with a scale (and zero point) a group of `group_size` inputs."""

    weight_packed: Tensor  # int32 [N, ceil(K * bits / 32)]
    weight_scale: Tensor  # [N, G]
    weight_shape: Tensor  # int64 [2]
    weight_zero_point: Tensor  # int32 [ceil(N * bits / 32), G], packed along N; asymmetric only

    def __init__(self, n: int, k: int, *, bits: int, group_size: int, symmetric: bool) -> None:
        super().__init__()
        self.shape, self.bits, self.group_size, self.symmetric = (n, k), bits, group_size, symmetric
        groups, meta = tiles.num_groups(k, group_size), torch.device("meta")
        self.register_buffer("weight_packed", torch.empty(n, -(-k * bits // 32), dtype=torch.int32, device=meta))
        self.register_buffer("weight_scale", torch.empty(n, groups, device=meta))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64, device=meta))
        if not symmetric:
            self.register_buffer("weight_zero_point", torch.empty(-(-n * bits // 32), groups, dtype=torch.int32, device=meta))

    def set_codes(
        self, codes_NK: Int8[Tensor, "N K"], scale_NG: Float[Tensor, "#N G"], zero_NG: Int8[Tensor, "#N G"] | None = None
    ) -> None:
        """Take these codes, scales (in the dtype to store) and zero points; those of one row hold for all rows."""
        self.weight_packed = tiles.pack(codes_NK, self.bits)
        self.weight_scale = scale_NG.expand(self.shape[0], -1).contiguous()
        self.weight_shape = torch.tensor(self.shape, device=codes_NK.device)
        if zero_NG is not None:
            self.weight_zero_point = tiles.pack(zero_NG.expand(self.shape[0], -1).T, self.bits).T.contiguous()

    def codes(self) -> Int8[Tensor, "N K"]:
        return tiles.unpack(self.weight_packed, self.bits, self.shape[1])

    def zero(self) -> Int8[Tensor, "N G"] | None:
        """Zero point of each group, or None for a symmetric grid."""
        if self.symmetric:
            return None
        return tiles.unpack(self.weight_zero_point.T.contiguous(), self.bits, self.shape[0]).T.contiguous()

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The weights in fp32."""
        return tiles.from_codes(self.codes(), self.weight_scale, self.zero(), group_size=self.group_size)

    def plain_weight(self) -> Tensor:
        """The weights in fp32, laid out as in the module that this one replaces."""
        return self.dequantize()

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        return {"form": "packed", "bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"


class PackedLinear(_Packed):
    """y = x W^T + b with W packed. `transposed`: it replaces a transformers Conv1D, which stores W^T."""

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group_size: int, symmetric: bool, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__(out_features, in_features, bits=bits, group_size=group_size, symmetric=symmetric)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        linear: nn.Module,
        codes_NK: Int8[Tensor, "N K"],
        scale_NG: Float[Tensor, "#N G"],
        zero_NG: Int8[Tensor, "#N G"] | None = None,
        *,
        bits: int,
        group_size: int,
    ) -> "PackedLinear":
        """The packed form of a dense linear (nn.Linear or Conv1D) with these codes; the bias is kept."""
        n, k = codes_NK.shape
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        new = cls(
            k, n, bits=bits, group_size=group_size, symmetric=zero_NG is None, bias=bias is not None, transposed=isinstance(linear, Conv1D)
        )
        new.set_codes(codes_NK, scale_NG, zero_NG)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return new

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "PackedLinear":
        """The module without its tensors (on meta), in the place of a linear of the same sizes."""
        n, k = size(replaced)
        return cls(
            k,
            n,
            bits=form["bits"],
            group_size=form["group_size"],
            symmetric=form["symmetric"],
            bias=getattr(replaced, "bias", None) is not None,
            transposed=form.get("transposed", False),
        )

    def form(self) -> dict[str, Any]:
        return super().form() | ({"transposed": True} if self.transposed else {})

    def plain_weight(self) -> Tensor:
        return self.dequantize().T if self.transposed else self.dequantize()

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantize().to(x.dtype), bias)


class PackedEmbedding(_Packed):
    """An embedding table packed by rows: only the rows asked for are dequantised. A tied head is a PackedLinear on the same tensors.

    gives : dtype of what it returns; None: that of its scales.
    """

    gives: torch.dtype | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, *, bits: int, group_size: int) -> None:
        super().__init__(num_embeddings, embedding_dim, bits=bits, group_size=group_size, symmetric=True)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    @classmethod
    def of(
        cls, table_VD: Float[Tensor, "V d"], *, bits: int = 8, group_size: int = 64, dtype: torch.dtype = torch.bfloat16
    ) -> "PackedEmbedding":
        """The packed form of an embedding table, symmetric, scales in `dtype`."""
        new = cls(*table_VD.shape, bits=bits, group_size=group_size)
        scale = tiles.symmetric_scale(table_VD, bits=bits, group_size=group_size, dtype=dtype)
        new.set_codes(tiles.to_codes(table_VD, scale, bits=bits, group_size=group_size), scale)
        return new

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "PackedEmbedding":
        v, d = replaced.weight.shape  # type: ignore[union-attr,misc]
        return cls(v, d, bits=form["bits"], group_size=form["group_size"])  # type: ignore[arg-type]

    def form(self) -> dict[str, Any]:
        return super().form() | {"form": "packed_embedding"}

    def forward(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        rows = ids.reshape(-1)
        codes = tiles.unpack(self.weight_packed[rows], self.bits, self.embedding_dim)
        out = tiles.from_codes(codes, self.weight_scale[rows], group_size=self.group_size)
        return out.view(*ids.shape, self.embedding_dim).to(self.gives or self.weight_scale.dtype)
