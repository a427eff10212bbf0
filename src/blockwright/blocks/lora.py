"""A linear with a low-rank correction of its own, beside a base that stays as it is and that other blocks may share."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks.linear import is_linear, size


class LoraLinear(nn.Module):
    """y = base(x) + (lora_alpha / r) (x A^T) B^T. LoRA, arXiv 2106.09685.

    base : an nn.Linear, a transformers Conv1D, or a packed linear. A submodule, so that later stages find it as `<name>.base`.
    lora_A [r, K], lora_B [N, r] : on meta until they are filled, or until `start`.
    """

    def __init__(self, base: nn.Module, *, r: int, lora_alpha: int | float) -> None:
        super().__init__()
        self.base, self.r, self.lora_alpha = base, r, lora_alpha
        self.transposed = isinstance(base, Conv1D) or getattr(base, "transposed", False)
        n, k = size(base)
        self.in_features, self.out_features = k, n
        self.lora_A = nn.Parameter(torch.empty(r, k, device="meta"), requires_grad=False)
        self.lora_B = nn.Parameter(torch.empty(n, r, device="meta"), requires_grad=False)

    def start(self, rng: torch.Generator) -> None:
        """A uniform in +-1/sqrt(K), B zero, so that the sum is the base; fp32, on the generator's device."""
        bound = self.lora_A.shape[1] ** -0.5
        a = torch.empty(self.lora_A.shape, device=rng.device).uniform_(-bound, bound, generator=rng)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(torch.zeros(self.lora_B.shape, device=rng.device))

    def plain_weight(self) -> Tensor:
        """The merged weight in fp32, laid out as in the module that this one replaces."""
        base = self.base.weight if is_linear(self.base) else self.base.plain_weight()
        delta = self.lora_alpha / self.r * (self.lora_B.float() @ self.lora_A.float())
        return base.float() + (delta.T if self.transposed else delta)

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "LoraLinear":
        """The module around the linear that it replaces, its factors on meta."""
        return cls(replaced, r=form["r"], lora_alpha=form["lora_alpha"])

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        return {"form": "lora", "r": self.r, "lora_alpha": self.lora_alpha}

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + self.lora_alpha / self.r * nn.functional.linear(low, self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}"
