"""A blueprint written as a model folder: standard (opens in plain transformers), our own layout (`bw.load`), or dense.

Tensors are read, converted and written shard by shard, so the model need not fit in memory.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Facts, Place, Tensors
from blockwright.errors import BlockwrightError

FORMAT = 1
OWN_STEM, STANDARD_STEM = "blockwright", "model"  # plain transformers finds no weights in an own-layout folder: it cannot open it wrongly
SHARD_BYTES = 256 * 2**20
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json", "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip


def why_not_standard(model: Blueprint, *, shared: bool = True) -> str | None:
    """Why plain transformers could not open this model, or None where it can. shared: places that blocks share are stored once."""
    path = layers.chain_path(layers.skeleton(model.config))
    packed = [f for f in model.forms.values() if f["form"] == "packed"]
    for name, form in model.forms.items():
        if form["form"] != "packed" or not name.startswith(path + "."):
            return f"{name} is {form['form'].replace('_', ' ')}, which compressed-tensors has no place for"
        if form.get("transposed"):
            return f"{name} is a packed Conv1D"
    if not all(f["symmetric"] for f in packed) and len({_scheme(f) for f in packed}) > 1:
        return "asymmetric linears in more than one scheme"
    in_blocks = [place for name, place in model.tensors.items() if name.startswith(path + ".")]
    if shared and len(set(in_blocks)) < len(in_blocks):
        return "blocks share weights"
    return None


class Entry(NamedTuple):
    """One tensor to write: what it will be, and how to get it."""

    facts: Facts
    read: Callable[[], Tensor]


def write(
    model: Blueprint,
    folder: Path,
    *,
    source: Path,
    layout: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    about: dict[str, Any] | None = None,
) -> str:
    """Write the model into the empty folder `folder`. Returns the layout written: "standard" or "blockwright".

    layout : auto (standard where possible), standard, blockwright, unrolled (shared blocks as copies, adapters merged: standard, no gain in
        size from sharing), dense (plain weights everywhere).
    dtype : of floating-point tensors that are not scales. source : the dense model's folder, for tokenizer, licence and the like.
    about : goes into blockwright.json. Raises BlockwrightError where a standard layout cannot hold the model, with the reason.
    """
    forms = dict(model.forms)
    if layout == "dense":
        forms = {}
    elif layout == "unrolled":
        forms = {name: form for name, form in forms.items() if form["form"] == "packed"}
    copies = layout in ("dense", "unrolled")
    reason = why_not_standard(model.edited(forms=forms), shared=not copies)
    if layout in ("standard", "unrolled") and reason:
        raise BlockwrightError(
            f"export={layout}: {reason}", allowed="auto, blockwright, dense", do="Use export: dense, or leave that part as it is"
        )
    standard = reason is None and layout != "blockwright"
    entries = _entries(model, forms, dtype, copies=copies)
    _write_shards(folder, STANDARD_STEM if standard else OWN_STEM, entries)
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    if standard and forms:
        config["quantization_config"] = quantization_config(model.edited(forms=forms))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    written_at = {model.tensors[name]: name for name in reversed(list(entries)) if name in model.tensors}
    description = {
        "format": FORMAT,
        "layout": "standard" if standard else "blockwright",
        "forms": forms,
        "stored_as": {n: written_at[p] for n, p in model.tensors.items() if n not in entries and p in written_at},
        "origin": list(model.origin),
        **(about or {}),
    }
    (folder / "blockwright.json").write_text(json.dumps(description, indent=1) + "\n")
    return str(description["layout"])


def predicted_bytes(model: Blueprint, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of all tensors as `write` will store them."""
    return sum(entry.facts.nbytes for entry in _entries(model, dict(model.forms), dtype, copies=False).values())


def read(folder: Path) -> Blueprint:
    """The blueprint of a folder that `write` wrote. Raises BlockwrightError when the description is missing, damaged or newer."""
    path = folder / "blockwright.json"
    try:
        about = json.loads(path.read_text())
        version, layout = about["format"], about["layout"]
        forms, stored_as, origin = dict(about["forms"]), dict(about["stored_as"]), tuple(about["origin"])
        if not all(isinstance(f, dict) and f.get("form") in layers.FORMS for f in forms.values()):
            raise ValueError("unknown form")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BlockwrightError(f"{path}: damaged", do="Write or copy the folder again") from None
    if version > FORMAT:
        raise BlockwrightError(f"{path}: format {version}", allowed=f"up to {FORMAT}", do="Use a newer blockwright")
    stem = STANDARD_STEM if layout == "standard" else OWN_STEM
    stored = Tensors.of_folder(folder, stem)
    for name, place in stored_as.items():
        if place not in stored:
            raise BlockwrightError(f"{path}: {name} is stored as {place}, which the files lack", do="Write or copy the folder again")
    config = layers.read_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = {name: name for name in stored} | stored_as
    model = Blueprint(config, stored.renamed(names), forms, origin)
    layers.check_against_skeleton(model, folder)
    return model


def quantization_config(model: Blueprint) -> dict[str, Any]:
    """What compressed-tensors calls `quantization_config`: one config group per scheme, targets named one by one."""
    schemes: dict[tuple[int, int, bool], list[str]] = {}
    for name, form in model.forms.items():
        schemes.setdefault(_scheme(form), []).append(name)
    groups = {
        f"group_{i}": {
            "targets": sorted(names),
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                "strategy": "channel" if group_size == -1 else "group", "group_size": None if group_size == -1 else group_size,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, ((bits, group_size, symmetric), names) in enumerate(sorted(schemes.items()))
    }  # fmt: skip
    dense = [n for n, m in model.skeleton().named_modules() if layers.is_linear(m)]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense),
    }
    if not all(symmetric for _, _, symmetric in schemes):
        config["dequantize"] = True
    return config


def _scheme(form: layers.Form) -> tuple[int, int, bool]:
    return form["bits"], form["group_size"], form["symmetric"]


def _entries(model: Blueprint, forms: dict[str, layers.Form], dtype: torch.dtype, *, copies: bool) -> dict[str, Entry]:
    """What to write, by name: each place once (or, with `copies`, once a name; tied embeddings still once), in the model's order.

    Modules that have a form in the model and none in `forms` are written as plain weights.
    """
    entries: dict[str, Entry] = {}
    path = layers.chain_path(layers.skeleton(model.config)) + "."
    plain = {name: form for name, form in model.forms.items() if name not in forms}
    seen: set[Place] = set()
    for name, place in model.tensors.items():
        once = not (copies and name.startswith(path))
        if once and place in seen:
            continue
        seen.add(place)
        owner = next((m for m in plain if name.startswith(m + ".")), None)
        if owner is None:
            facts = model.tensors.facts(name)
            if facts.dtype.is_floating_point and not name.endswith("weight_scale"):
                facts = Facts(dtype, facts.shape)
            entries[name] = Entry(facts, partial(_read, model, name, facts.dtype))
        elif f"{owner}.weight" not in entries:
            shape = tuple(layers.skeleton(model.config).get_submodule(owner).weight.shape)  # type: ignore[union-attr]
            entries[f"{owner}.weight"] = Entry(Facts(dtype, shape), partial(_plain_weight, model, owner, plain[owner], dtype))
            bias = f"{owner}.bias"
            if bias in model.tensors:
                entries[bias] = Entry(Facts(dtype, model.tensors.facts(bias).shape), partial(_read, model, bias, dtype))
    return entries


def _read(model: Blueprint, name: str, dtype: torch.dtype) -> Tensor:
    return model.tensors.read([name])[name].to(dtype)


def _plain_weight(model: Blueprint, owner: str, form: layers.Form, dtype: torch.dtype) -> Tensor:
    module = layers.FORMS[form["form"]].from_form(layers.skeleton(model.config).get_submodule(owner), form)
    layers.fill(module, model.tensors, owner + ".")
    return cast(Tensor, module.plain_weight()).to(dtype)


def _write_shards(folder: Path, stem: str, entries: dict[str, Entry]) -> None:
    """One safetensors file, or several of at most SHARD_BYTES with an index."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and sum(e.facts.nbytes for e in shards[-1].values()) + entry.facts.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = entry
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        tensors = {n: entry.read().contiguous() for n, entry in shard.items()}
        for n, t in tensors.items():
            layers.check_finite(t, n)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(e.facts.nbytes for e in entries.values())
        weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
