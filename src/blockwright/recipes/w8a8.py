"""Dual-grained linears as compressed-tensors' int-quantized: the same int8 products in vLLM and transformers, in a byte a weight."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Facts
from blockwright.errors import BlockwrightError
from blockwright.recipes import export
from blockwright.recipes.export import Entry


def write(model: Blueprint, folder: Path, *, source: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model into the empty folder `folder`, for servers: `bw.load` does not open it.

    weight : int8 [N, K]; weight_scale : fp32 [N, 1]; input_scale : fp32 [1], amax / 127. dtype : of what is not quantised.
    Raises BlockwrightError where a linear has another form, or is GPT-2's Conv1D, and where none is dual-grained.
    """
    other = next((n for n, f in model.forms.items() if f["form"] != "dual_grained" or f.get("transposed") or "size" in f), None)
    if other is not None or not model.forms:
        what = f"{other} is {model.forms[other]['form'].replace('_', ' ')}" if other else "the model has no dual-grained linear"
        raise BlockwrightError(
            f"export=w8a8: {what}", allowed="dual-grained linears that stand for an nn.Linear", do="Use dgq, or another --to"
        )
    plain, forms, copies = export.laid_out(model, "dense")
    entries = export.entries_of(plain, forms, dtype, copies=copies)
    built = model.skeleton()
    for name in model.forms:
        module = built.get_submodule(name)
        n, k = layers.size(module)
        parts: dict[str, tuple[Facts, Callable[[Any], Tensor]]] = {
            "weight": (Facts(torch.int8, (n, k)), lambda m: m.int8_weight()),
            "weight_scale": (Facts(torch.float32, (n, 1)), lambda m: m.channel_weight_scale[:, None].clone()),
            "input_scale": (Facts(torch.float32, (1,)), lambda m: (m.amax / 127)[None]),
        }
        for part, (facts, make) in parts.items():
            entries[f"{name}.{part}"] = Entry(facts, partial(_made, model, name, module, make))
    export.write_shards(folder, export.STANDARD_STEM, entries)
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": _config(model, built)}
    export.write_beside(folder, config, source)


def _made(model: Blueprint, name: str, module: nn.Module, make: Callable[[Any], Tensor]) -> Tensor:
    module = copy.deepcopy(module)  # on meta; dropped again when it has been written
    layers.fill(module, model.tensors, name + ".")
    return make(module)


def _config(model: Blueprint, built: nn.Module) -> dict[str, Any]:
    grid = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    group = {
        "targets": sorted(model.forms),
        "weights": grid | {"strategy": "channel"},
        "input_activations": grid | {"strategy": "tensor"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(n for n, m in built.named_modules() if layers.is_linear(m)),
    }
