"""Linears whose 4-bit groups have small integer scales, so that a group expands exactly to int8 and one int8 product does the work."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import tiles
from blockwright.blocks.linear import size
from blockwright.errors import BlockwrightError

EXACT_INPUTS = 1024  # 1024 * 127 * 127 < 2**24: sums of so many products of int8 are exact in fp32
GPU_ROWS = 32  # torch._int_mm on a GPU wants more than 16 rows, and inputs and outputs in eights
EIGHT = 8


class DualGrained(NamedTuple):
    """A matrix [N, K] on two grids: int8 = group_scale * (code - zero), w = channel_scale * int8, with |int8| <= 127.

    codes : int8 [N, K] in [-2**(bits-1), 2**(bits-1) - 1]. zero : int8 [N, G], in the same range. group_scale : int8 [N, G], >= 1.
    channel_scale : fp32 [N].
    """

    codes: Tensor
    zero: Tensor
    group_scale: Tensor
    channel_scale: Tensor


def expand(
    codes_NK: Int8[Tensor, "N K"], zero_NG: Int8[Tensor, "N G"], group_scale_NG: Int8[Tensor, "N G"], *, group_size: int
) -> Int8[Tensor, "N K"]:
    """group_scale * (code - zero), exact wherever it fits int8, which `DualGrained` promises."""
    k = codes_NK.shape[1]
    steps = codes_NK.to(torch.int16) - tiles.spread(zero_NG, group_size, k)
    return (steps * tiles.spread(group_scale_NG, group_size, k)).to(torch.int8)


def to_int8(x: Float[Tensor, "*b K"], amax: Float[Tensor, ""]) -> Int8[Tensor, "*b K"]:
    """clamp(round(x / (amax / 127)), -127, 127), ties to even, in fp32."""
    return (x.float() / (amax.float() / 127)).round_().clamp_(-127, 127).to(torch.int8)


def int8_product(x_MK: Int8[Tensor, "M K"], w_NK: Int8[Tensor, "N K"]) -> Int32[Tensor, "M N"]:
    """x W^T in integers, exact for K <= 133,000.

    By torch._int_mm on a GPU and on CPUs whose int8 dot products do not saturate (AVX-512 VNNI); else by fp32 products of 1024 inputs.
    """
    (m, k), n = x_MK.shape, w_NK.shape[0]
    if x_MK.is_cuda:
        rows, inputs, outputs = max(0, GPU_ROWS - m), -k % EIGHT, -n % EIGHT
        x_MK = nn.functional.pad(x_MK, (0, inputs, 0, rows))
        w_NK = nn.functional.pad(w_NK, (0, inputs, 0, outputs)) if inputs or outputs else w_NK
        return torch._int_mm(x_MK, w_NK.T)[:m, :n]
    if torch.cpu._is_vnni_supported() and m and n and k:
        return torch._int_mm(x_MK, w_NK.T)
    total = torch.zeros(m, n, dtype=torch.int32)
    for start in range(0, k, EXACT_INPUTS):
        part = slice(start, start + EXACT_INPUTS)
        total += (x_MK[:, part].float() @ w_NK[:, part].float().T).to(torch.int32)
    return total


def multiply(
    x: Float[Tensor, "*b K"],
    w8_NK: Int8[Tensor, "N K"],
    channel_scale_N: Float[Tensor, " N"],
    amax: Float[Tensor, ""],
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "*b N"]:
    """y = (ax * channel_scale) * (xq W8^T) + bias with ax = amax / 127 and xq = `to_int8(x)`; scaled in fp32, in the dtype of x.

    Not differentiable. Source: arXiv 2310.04836, section 3.
    """
    sums = int8_product(to_int8(x, amax).reshape(-1, x.shape[-1]), w8_NK)
    y = sums.float().mul_(channel_scale_N * (amax.float() / 127))
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], w8_NK.shape[0])


class DualGrainedLinear(nn.Module):
    """y = x W^T + b with W as `DualGrained` and x rounded to int8 by one scale for the whole tensor, fixed when it was calibrated.

    `transposed`: it replaces a transformers Conv1D, which stores W^T. The int8 weights are made anew at every call.
    """

    weight_packed: Tensor  # int32 [N, ceil(K * bits / 32)]
    weight_zero_point: Tensor  # int32 [ceil(N * bits / 32), G], packed along N
    group_scale: Tensor  # int8 [N, G]
    channel_weight_scale: Tensor  # fp32 [N], and so in every file: names that end so are not converted to the dtype of the model
    amax: Tensor  # []: the largest input that is not clipped, a number of bf16, so that no dtype of a file changes it

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.transposed = transposed
        n, k, groups, meta = out_features, in_features, tiles.num_groups(in_features, group_size), torch.device("meta")
        self.register_buffer("weight_packed", torch.empty(n, -(-k * bits // 32), dtype=torch.int32, device=meta))
        self.register_buffer("weight_zero_point", torch.empty(-(-n * bits // 32), groups, dtype=torch.int32, device=meta))
        self.register_buffer("group_scale", torch.empty(n, groups, dtype=torch.int8, device=meta))
        self.register_buffer("channel_weight_scale", torch.empty(n, device=meta))
        self.register_buffer("amax", torch.empty((), device=meta))
        self.bias = nn.Parameter(torch.empty(n, device=meta), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Module, weight: DualGrained, amax: float, *, bits: int, group_size: int) -> "DualGrainedLinear":
        """The form of a dense linear (nn.Linear or Conv1D) with these weights and this range of inputs; the bias is kept.

        amax : rounded to bf16. Raises BlockwrightError where it is not a positive number.
        """
        n, k = weight.codes.shape
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        new = cls(k, n, bits=bits, group_size=group_size, bias=bias is not None, transposed=isinstance(linear, Conv1D))
        new.weight_packed = tiles.pack(weight.codes, bits)
        new.weight_zero_point = tiles.pack(weight.zero.T, bits).T.contiguous()
        new.group_scale, new.channel_weight_scale = weight.group_scale, weight.channel_scale
        new.amax = torch.tensor(amax, device=weight.codes.device).bfloat16().float()
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        new.check("DualGrainedLinear")
        return new

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "DualGrainedLinear":
        """The module without its tensors (on meta), in the place of a linear of the same sizes."""
        n, k = size(replaced)
        bias = getattr(replaced, "bias", None) is not None
        return cls(k, n, bits=form["bits"], group_size=form["group_size"], bias=bias, transposed=form.get("transposed", False))

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        plain = {"form": "dual_grained", "bits": self.bits, "group_size": self.group_size}
        return plain | ({"transposed": True} if self.transposed else {})

    def check(self, name: str) -> None:
        """Raise BlockwrightError where a scale of this module is not positive; called with its full name once its tensors are there."""
        for what, value in (("amax", self.amax), ("group_scale", self.group_scale), ("channel_weight_scale", self.channel_weight_scale)):
            if value.numel() and not bool((value > 0).all()):
                raise BlockwrightError(
                    f"{name}.{what}: {float(value.min())}", allowed="positive scales", do="Calibrate again; this file cannot be used"
                )

    def weight(self) -> DualGrained:
        """The weights as they are stored, one code to a byte."""
        zero = tiles.unpack(self.weight_zero_point.T.contiguous(), self.bits, self.out_features).T.contiguous()
        codes = tiles.unpack(self.weight_packed, self.bits, self.in_features)
        return DualGrained(codes, zero, self.group_scale, self.channel_weight_scale)

    def int8_weight(self) -> Int8[Tensor, "N K"]:
        """The integers that the product is made of."""
        weight = self.weight()
        return expand(weight.codes, weight.zero, weight.group_scale, group_size=self.group_size)

    def dequantize(self) -> Float[Tensor, "N K"]:
        """The weights in fp32."""
        return self.int8_weight().float() * self.channel_weight_scale[:, None]

    def plain_weight(self) -> Tensor:
        """The weights in fp32, laid out as in the module that this one replaces."""
        return self.dequantize().T if self.transposed else self.dequantize()

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        return multiply(x, self.int8_weight(), self.channel_weight_scale, self.amax, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class Int8Linear(nn.Module):
    """y = x W^T + b with W expanded to int8: a run-time form of a DualGrainedLinear, which is what files hold. Not differentiable."""

    def __init__(self, stored: DualGrainedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = stored.in_features, stored.out_features, stored.bias
        self.weight: Tensor
        self.scale: Tensor
        self.amax: Tensor
        self.register_buffer("weight", stored.int8_weight())
        self.register_buffer("scale", stored.channel_weight_scale)
        self.register_buffer("amax", stored.amax)

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        return multiply(x, self.weight, self.scale, self.amax, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"
