"""Subblocks that do less as the architecture's own again, where that is exact: zeros for what is gone, key and value heads repeated."""

import copy
from typing import Any, cast

import torch
from torch import Tensor

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Place
from blockwright.errors import BlockwrightError

GONE = ("no_attention", "no_ffn", "skip")  # whatever these stood for gives zeros, or is read by what does, when all its tensors are zero
LINEAR = ("linear_attention", "linear_ffn")


def whole(model: Blueprint) -> Blueprint:
    """The model with every attention and feed-forward layer of the architecture's kind, with its outputs unchanged and nothing saved.

    Feed-forward layers of fewer channels stay as they are. Zeros take no memory; repeated heads are kept in memory.
    Raises BlockwrightError where one linear stands for a subblock: no weights of the architecture's compute that.
    """
    linear = next((name for name, form in model.forms.items() if form["form"] in LINEAR), None)
    if linear is not None:
        what = model.forms[linear]["form"].replace("_", " ")
        raise BlockwrightError(
            f"export=dense: {linear} is {what}, which no weights of {model.config.model_type} compute",
            allowed="auto, blockwright",
            do="Use our own layout, or make the model with linear: false",
        )
    unbuilt, built = layers.skeleton(model.config), model.skeleton()
    forms, removed = dict(model.forms), []
    made: dict[str, Tensor] = {}
    for name, form in model.forms.items():
        if form["form"] in GONE:
            before = unbuilt.get_submodule(name).state_dict()
            made |= {f"{name}.{n}": torch.zeros(()).expand(t.shape) for n, t in before.items()}
        elif "size" in form and _is_key_or_value(unbuilt, name):
            repeats = layers.size(unbuilt.get_submodule(name))[0] // form["size"][0]
            head_dim = int(cast(Any, unbuilt.get_submodule(name.rpartition(".")[0])).head_dim)
            made |= {f"{name}.{n}": _repeated(t, head_dim, repeats) for n, t in _plain(model, built, name).items()}
            removed += [n for n in model.tensors if n.startswith(name + ".")]
        else:
            continue
        forms = {n: f for n, f in forms.items() if n != name and not n.startswith(name + ".")}  # its parts too
    places = {name: Place(None, f"whole:{name}") for name in made}
    tensors = model.tensors.replaced(removed, places, {places[name].name: t for name, t in made.items()})
    return model.edited(forms=forms, tensors=tensors)


def _is_key_or_value(unbuilt: Any, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last in ("k_proj", "v_proj") and hasattr(unbuilt.get_submodule(owner), "num_key_value_groups")


def _plain(model: Blueprint, built: Any, name: str) -> dict[str, Tensor]:
    """Weight and bias of a linear of any form."""
    module = copy.deepcopy(built.get_submodule(name))
    layers.fill(module, model.tensors, name + ".")
    weight = module.weight if layers.is_linear(module) else module.plain_weight()
    bias = next((model.tensors.read([n])[n] for n in (f"{name}.{b}" for b in ("bias", "base.bias", "U.bias")) if n in model.tensors), None)
    return {"weight": weight.detach()} | ({} if bias is None else {"bias": bias})


def _repeated(rows: Tensor, head_dim: int, repeats: int) -> Tensor:
    """Each head `repeats` times in a row, as the query heads read them."""
    return rows.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, 0).flatten(0, 1)
