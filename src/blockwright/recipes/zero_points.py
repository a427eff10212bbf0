"""Linears with real offsets as linears with integer zero points, which is what compressed-tensors has a place for."""

import warnings

import torch

from blockwright.blocks import layers, tiles
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.offset_packed import from_offset
from blockwright.blocks.parameters import Place


def integer_zero_points(model: Blueprint) -> Blueprint:
    """The model with each offset-packed linear as a packed one of the largest width, with integer zero points. Warns of what that loses.

    This is what compressed-tensors has a place for. Steps stay; narrower codes are written as wide ones, and zero points are the nearest.
    """
    offset = {name: form for name, form in model.forms.items() if form["form"] == "offset_packed"}
    if not offset:
        return model
    bits = max(form["bits"] for form in offset.values())
    forms, removed, memory, worst = dict(model.forms), [], {}, (0.0, "")
    built = model.skeleton()
    for name, form in offset.items():
        (n, k), group, low = layers.size(built.get_submodule(name)), form["group_size"], 2 ** (bits - 1)
        old = [f"{name}.{key}" for key in ("weight_packed", "weight_step", "weight_offset")]
        packed, step, shift = model.tensors.read(old).values()
        narrow = tiles.unpack(packed, form["bits"], k)
        codes = (narrow.to(torch.int16) + 2 ** (form["bits"] - 1) - low).to(torch.int8)
        zero = (torch.round(-shift.float() / step.float()).clamp_(0, 2 * low - 1) - low).to(torch.int8)
        before = from_offset(narrow, step, shift, bits=form["bits"], group_size=group)
        after = tiles.from_codes(codes, step, zero, group_size=group)
        worst = max(worst, (float((after - before).norm() / before.norm().clamp(min=1e-30)), name))
        forms[name] = {key: v for key, v in form.items() if key != "form"} | {"form": "packed", "bits": bits, "symmetric": False}
        removed += old
        memory[f"{name}.weight_packed"] = tiles.pack(codes, bits)
        memory[f"{name}.weight_scale"] = step
        memory[f"{name}.weight_zero_point"] = tiles.pack(zero.T.contiguous(), bits).T.contiguous()
        memory[f"{name}.weight_shape"] = torch.tensor([n, k])
    places = {name: Place(None, f"integer-zeros:{name}") for name in memory}
    tensors = model.tensors.replaced(removed, places, {places[name].name: t for name, t in memory.items()})
    warnings.warn(
        f"standard layout: real offsets become integer zero points, which changes {worst[1]} most, by {worst[0]:.1%} of its norm, and all "
        f"codes are written with {bits} bits; our own layout and gguf keep them",
        stacklevel=2,
    )
    return model.edited(forms=forms, tensors=tensors)
