"""Subblocks that do less: attention and feed-forward layers that are one linear, or nothing, and the norm before a subblock that is gone.

Each is what a block's own code calls in the place of the module that stood there. An attention without keys and values leaves a slot in the
cache that holds no numbers and only counts tokens: models ask their first layer how long the text is.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class NoAttention(nn.Module):
    """Attention that adds nothing: zeros, whatever the block passes, and no keys and values. layer_idx : its slot in the cache."""

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "NoAttention":
        """In the place of an attention of any architecture."""
        return cls(slot(replaced))

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module."""
        return {"form": "no_attention"}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Float[Tensor, "b T d"], None]:
        x = _hidden(args, kwargs)
        count_tokens(x, self.layer_idx, (*args, *kwargs.values()))
        return torch.zeros_like(x), None


class LinearAttention(nn.Module):
    """Attention that lets every token read only itself: one linear, and no keys and values. `<name>.linear` is an ordinary linear."""

    def __init__(self, width: int, *, bias: bool, layer_idx: int | None) -> None:
        super().__init__()
        self.width, self.layer_idx = width, layer_idx
        self.linear = nn.Linear(width, width, bias=bias, device="meta").requires_grad_(False)

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "LinearAttention":
        """The module without its tensors (on meta), in the place of an attention of any architecture."""
        return cls(form["width"], bias=form["bias"], layer_idx=slot(replaced))

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        return {"form": "linear_attention", "width": self.width, "bias": getattr(self.linear, "bias", None) is not None}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Float[Tensor, "b T d"], None]:
        x = _hidden(args, kwargs)
        count_tokens(x, self.layer_idx, (*args, *kwargs.values()))
        return self.linear(x), None


class NoFfn(nn.Module):
    """A feed-forward layer, or the linear out of one, that gives zeros."""

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "NoFfn":
        """In the place of any module."""
        return cls()

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module."""
        return {"form": "no_ffn"}

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return torch.zeros_like(x)


class LinearFfn(nn.Module):
    """A feed-forward layer that is one linear. `<name>.linear` is an ordinary linear."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, width, bias=bias, device="meta").requires_grad_(False)

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "LinearFfn":
        """The module without its tensors (on meta), in the place of a feed-forward layer of any architecture."""
        return cls(form["width"], bias=form["bias"])

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module without its tensors."""
        return {"form": "linear_ffn", "width": self.width, "bias": getattr(self.linear, "bias", None) is not None}

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        y: Tensor = self.linear(x)
        return y


class Skip(nn.Module):
    """The norm before a subblock that is gone, or a linear inside it: hands on its input, which nobody reads."""

    @classmethod
    def from_form(cls, replaced: nn.Module, form: dict[str, Any]) -> "Skip":
        """In the place of any module."""
        return cls()

    def form(self) -> dict[str, Any]:
        """JSON from which `from_form` rebuilds this module."""
        return {"form": "skip"}

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x


class EmptyLayer(DynamicLayer):
    """The slot in a cache of a layer without keys and values: tensors of no elements whose length is the number of tokens."""

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.dim() == 4 else 0


def count_tokens(x: Float[Tensor, "b T d"], layer_idx: int | None, arguments: tuple[Any, ...]) -> None:
    """Tell the cache, where there is one among the arguments of an attention, that T more tokens passed the layer."""
    cache = next((a for a in arguments if isinstance(a, Cache)), None)
    if cache is None or layer_idx is None:
        return
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[layer_idx], EmptyLayer):
        cache.layers[layer_idx] = EmptyLayer()
    nothing = x.new_empty(x.shape[0], 1, x.shape[1], 0)
    cache.layers[layer_idx].update(nothing, nothing)


def slot(attention: nn.Module) -> int | None:
    """The slot in the cache that an attention fills."""
    found = (getattr(m, key) for m in attention.modules() for key in ("layer_idx", "layer_id") if isinstance(getattr(m, key, None), int))
    return next(found, None)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among what a block passes to its attention."""
    x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return x
