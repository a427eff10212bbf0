"""A blueprint written as a model folder: standard (opens in plain transformers), our own layout (`bw.load`), or dense.

Tensors are read, converted and written shard by shard, so the model need not fit in memory.
"""

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import DTYPES, Facts, Place, Tensors
from blockwright.compress import dgq
from blockwright.errors import BlockwrightError
from blockwright.recipes.whole import whole
from blockwright.recipes.zero_points import integer_zero_points

FORMAT = 1
OWN_STEM, STANDARD_STEM = "blockwright", "model"  # plain transformers finds no weights in an own-layout folder: it cannot open it wrongly
SHARD_BYTES = 256 * 2**20
METADATA = {"format": "pt"}  # in the header of each file; older transformers refuse files without it
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")  # what config.json calls the width of a feed-forward layer
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json", "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip


def why_not_standard(model: Blueprint, *, shared: bool = True) -> str | None:
    """Why plain transformers could not open this model, or None where it can. shared: places that blocks share are stored once."""
    skeleton = layers.skeleton(model.config)
    path = layers.chain_path(skeleton)
    packed = [f for f in model.forms.values() if f["form"] == "packed"]
    for name, form in model.forms.items():
        if "size" in form:
            n, k = form["size"]
            return f"{name} is {n} x {k}, and config.json has no place for a size of its own"
        if form["form"] != "packed" or not name.startswith(path + "."):
            return f"{name} is {form['form'].replace('_', ' ')}, which compressed-tensors has no place for"
        if form.get("transposed"):
            return f"{name} is a packed Conv1D"
    for name, form in model.forms.items():
        k, group = layers.size(skeleton.get_submodule(name))[1], form["group_size"]
        if group > 0 and k % group:
            return f"{name} has {k} inputs, which groups of {group} do not divide"
    if not all(f["symmetric"] for f in packed) and len({_scheme(f) for f in packed}) > 1:
        return "asymmetric linears in more than one scheme"
    in_blocks = [place for name, place in model.tensors.items() if name.startswith(path + ".")]
    if shared and len(set(in_blocks)) < len(in_blocks):
        return "blocks share weights"
    return None


def refuse_layout(layout: str, reason: str | None) -> None:
    """Raise BlockwrightError where a standard layout is asked for and there is a reason why plain transformers could not open it."""
    if layout in ("standard", "unrolled") and reason:
        raise BlockwrightError(
            f"export={layout}: {reason}", allowed="auto, blockwright, dense", do="Use export: dense, or leave that part as it is"
        )


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
        size from sharing), dense (plain weights everywhere; feed-forward layers of different widths get zero channels up to the widest, for
        which config.json has a place, key and value heads are repeated, and what is gone gets zeros: the same outputs, no gain).
    dtype : of floating-point tensors that are not scales. source : the dense model's folder, for tokenizer, licence and the like.
    about : goes into blockwright.json. Raises BlockwrightError where a standard layout cannot hold the model, with the reason.
    """
    model, forms, copies = laid_out(model, layout)
    reason = why_not_standard(model.edited(forms=forms), shared=not copies)
    refuse_layout(layout, reason)
    standard = reason is None and layout != "blockwright"
    entries = entries_of(model, forms, dtype, copies=copies)
    write_shards(folder, STANDARD_STEM if standard else OWN_STEM, entries)
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    if standard and forms:
        config["quantization_config"] = quantization_config(model.edited(forms=forms))
    write_beside(folder, config, source)
    description = {
        "format": FORMAT,
        "layout": "standard" if standard else "blockwright",
        "forms": forms,
        "stored_as": _stored_as(model, forms, entries),
        "origin": list(model.origin),
        **(about or {}),
    }
    (folder / "blockwright.json").write_text(json.dumps(description, indent=1) + "\n")
    return str(description["layout"])


def predicted_bytes(model: Blueprint, dtype: torch.dtype = torch.bfloat16, layout: str = "auto") -> int:
    """Bytes of all tensors as `write` will store them."""
    model, forms, copies = laid_out(model, layout)
    return sum(entry.facts.nbytes for entry in entries_of(model, forms, dtype, copies=copies).values())


def file_bytes(model: Blueprint, dtype: torch.dtype = torch.bfloat16, layout: str = "auto") -> int:
    """Bytes of the .safetensors files that `write` makes, headers included; exact, from names, dtypes and shapes alone."""
    model, forms, copies = laid_out(model, layout)
    shards = shards_of(entries_of(model, forms, dtype, copies=copies))
    return sum(_shard_bytes({name: entry.facts for name, entry in shard.items()}) for shard in shards)


def read(folder: Path) -> Blueprint:
    """The blueprint of a folder that `write` wrote. Raises BlockwrightError when the description is missing, damaged or newer."""
    path = folder / "blockwright.json"
    damaged = BlockwrightError(f"{path}: damaged", do="Write or copy the folder again")
    try:
        about = json.loads(path.read_text())
        version, layout = int(about["format"]), about["layout"]
        forms, origin = dict(about["forms"]), tuple(about["origin"])
        stored_as = {name: str(other) for name, other in about["stored_as"].items()}
    except (OSError, ValueError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError):
        raise damaged from None
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
    try:
        model.skeleton()
    except (BlockwrightError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # a form that is none
        raise damaged from None
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


def laid_out(model: Blueprint, layout: str) -> tuple[Blueprint, dict[str, layers.Form], bool]:
    """The model under the config of this layout, the forms that stay, and whether blocks that share weights are written as copies."""
    if layout in ("standard", "unrolled"):
        model = integer_zero_points(dgq.weight_only(model))
    if layout == "dense":
        model = whole(model)
    forms = dict(model.forms)
    resized = {name: {"form": "linear", "size": form["size"]} for name, form in forms.items() if "size" in form}
    if layout == "dense":
        config = uniform_config(model)
        model, forms = (model, resized) if config is None else (model.edited(config=config), {})
    elif layout == "unrolled":
        adapters = tuple(f"{name}." for name, form in forms.items() if form["form"] in ("lora", "low_rank"))  # packed parts are merged too
        forms = resized | {n: form for n, form in forms.items() if form["form"] == "packed" and not n.startswith(adapters)}
    return model, forms, layout in ("dense", "unrolled")


def uniform_config(model: Blueprint) -> PreTrainedConfig | None:
    """The config with the width of the widest feed-forward layer, into which zero channels fit the others; None where they do not fit."""
    config = copy.deepcopy(model.config)
    key = next((key for key in WIDTHS if hasattr(config, key)), "")
    resized = {name: form["size"] for name, form in model.forms.items() if "size" in form}
    full = getattr(config, key, None) or 4 * int(config.hidden_size)  # GPT-2's n_inner: None
    if not resized or not key or not isinstance(full, int):
        return None
    before, now = layers.skeleton(config), model.skeleton()
    path = layers.chain_path(before) + "."
    widths = {
        own * full / usual
        for name, size in resized.items()
        for own, usual in zip(size, layers.size(before.get_submodule(name)), strict=True)
        if own != usual
    }
    narrow = {name.removeprefix(path).partition(".")[0] for name in resized}
    widest = max(widths) if len(narrow) == layers.num_blocks(config) else full
    if widest != int(widest):
        return None
    setattr(config, key, int(widest))
    after = layers.skeleton(config)

    def fits(name: str, module: nn.Module) -> bool:
        own, new = layers.size(now.get_submodule(name)), layers.size(module)
        return own == new or (name in resized and all(a == b or (a < b and b % widest == 0) for a, b in zip(own, new, strict=True)))

    linears = [(name, module) for name, module in after.named_modules() if layers.is_linear(module)]
    return config if all(fits(name, module) for name, module in linears) else None


def entries_of(model: Blueprint, forms: dict[str, layers.Form], dtype: torch.dtype, *, copies: bool) -> dict[str, Entry]:
    """What to write, by name: each place once (or, with `copies`, once a name; tied embeddings still once), in the model's order.

    Modules that have a form in the model and none in `forms` are written as plain weights.
    """
    entries: dict[str, Entry] = {}
    path = layers.chain_path(layers.skeleton(model.config)) + "."
    plain = {name: form for name, form in model.forms.items() if forms.get(name) != form}
    built, unbuilt = model.skeleton(), layers.skeleton(model.config)
    order = {name: i for i, name in enumerate(built.state_dict())}  # so that the first of blocks that share holds the weights
    seen: set[Place] = set()
    for name in sorted(model.tensors, key=lambda n: order.get(n, len(order))):
        place = model.tensors[name]
        once = not (copies and name.startswith(path))
        if once and place in seen:
            continue
        seen.add(place)
        owner = min((m for m in plain if name.startswith(m + ".")), key=len, default=None)  # the outermost
        if owner is None:
            facts = model.tensors.facts(name)
            if facts.dtype.is_floating_point and not name.endswith(("weight_scale", *layers.AS_STORED)):
                facts = Facts(dtype, facts.shape)
            entries[name] = Entry(facts, partial(_read, model, name, facts.dtype))
        elif f"{owner}.weight" not in entries:
            if owner in forms:  # as a linear of a size of its own
                layers.place(unbuilt, owner, forms[owner])
            shape = tuple(unbuilt.get_submodule(owner).weight.shape)  # type: ignore[union-attr]
            weight = partial(_plain_weight, model, owner, built.get_submodule(owner), dtype)
            entries[f"{owner}.weight"] = Entry(Facts(dtype, shape), partial(_padded, weight, shape, model.config))
            for bias in (f"{owner}.bias", f"{owner}.base.bias", f"{owner}.U.bias"):
                if bias in model.tensors:
                    shape = tuple(unbuilt.get_submodule(owner).bias.shape)  # type: ignore[union-attr]
                    read = partial(_read, model, bias, dtype)
                    entries[f"{owner}.bias"] = Entry(Facts(dtype, shape), partial(_padded, read, shape, model.config))
    return entries


def _stored_as(model: Blueprint, forms: dict[str, layers.Form], entries: dict[str, Entry]) -> dict[str, str]:
    """Names that are not written, because what they hold is written under another name: name -> that one."""
    plain = [m for m, form in model.forms.items() if forms.get(m) != form]
    names = [n for n in model.tensors if not n.startswith(tuple(f"{m}." for m in plain))] + [f"{m}.weight" for m in plain]

    def place(name: str) -> Place | None:  # of the tensor, or of the codes that it is unpacked from
        return model.tensors.get(name) or model.tensors.get(f"{name}_packed")

    written_at = {place(name): name for name in reversed(list(entries)) if place(name)}
    return {name: written_at[place(name)] for name in names if name not in entries and place(name) in written_at}


def _read(model: Blueprint, name: str, dtype: torch.dtype) -> Tensor:
    return _fitting(model.tensors.read([name])[name], dtype, name)


def _plain_weight(model: Blueprint, owner: str, module: nn.Module, dtype: torch.dtype) -> Tensor:
    module = copy.deepcopy(module)  # on meta; dropped again when it has been written
    layers.fill(module, model.tensors, owner + ".")
    weight = module.weight if layers.is_linear(module) else module.plain_weight()
    return _fitting(cast(Tensor, weight), dtype, f"{owner}.weight")


def _padded(read: Callable[[], Tensor], shape: tuple[int, ...], config: PreTrainedConfig) -> Tensor:
    """A tensor with zeros up to this shape: at its end or, where gate and up are one matrix, at the end of each."""
    value = read()
    for dim, wanted in enumerate(shape):
        if value.shape[dim] != wanted:
            width = next(getattr(config, key) for key in WIDTHS if hasattr(config, key))
            parts = value.unflatten(dim, (wanted // width, -1))
            zeros = parts.new_zeros([*parts.shape[: dim + 1], width - parts.shape[dim + 1], *parts.shape[dim + 2 :]])
            value = torch.cat([parts, zeros], dim + 1).flatten(dim, dim + 1)
    return value


def _fitting(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The value in this dtype. Raises BlockwrightError where it is not finite, or too large for the dtype."""
    layers.check_finite(value, name)
    narrow = value.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise BlockwrightError(
            f"{name}: {value.abs().max().item():.3g} does not fit {str(dtype).removeprefix('torch.')}",
            allowed=f"values up to {torch.finfo(dtype).max:.3g}",
            do="Use dtype: bf16",
        )
    return narrow.contiguous()


def write_beside(folder: Path, config: dict[str, Any], source: Path) -> None:
    """config.json, and what the folder `source` has of tokenizer, licence and the like."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def shards_of(entries: dict[str, Entry]) -> list[dict[str, Entry]]:
    """The entries of each file, in order: tensors of at most SHARD_BYTES together, or a single larger one."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.facts.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.facts.nbytes
    return shards


def write_shards(folder: Path, stem: str, entries: dict[str, Entry]) -> None:
    """One safetensors file, or several of at most SHARD_BYTES with an index."""
    shards = shards_of(entries)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file({n: entry.read() for n, entry in shard.items()}, folder / name, metadata=METADATA)
    if len(shards) > 1:
        total = sum(e.facts.nbytes for e in entries.values())
        weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shard_bytes(tensors: dict[str, Facts]) -> int:
    """Bytes of a safetensors file of these tensors: the header's length, the header as JSON filled up to 8, the tensors themselves.

    The offsets in the header, and with them its length, depend on the order of the tensors: by dtype, then by name.
    """
    rank = {name: i for i, name in enumerate(_dtypes_in_order())}
    called = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": METADATA}
    size = 0
    for name, facts in sorted(tensors.items(), key=lambda item: (rank[called[item[1].dtype]], item[0])):
        header[name] = {"dtype": called[facts.dtype], "shape": facts.shape, "data_offsets": [size, size + facts.nbytes]}
        size += facts.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + size


@cache
def _dtypes_in_order() -> list[str]:
    """DTYPES in the order in which the safetensors package writes them: the order is its own affair, so it is asked."""
    written = save({name: torch.zeros(1, dtype=dtype, device="cpu") for name, dtype in DTYPES.items()})
    return list(json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")]))
