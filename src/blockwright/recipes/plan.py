"""What a job will take, before it starts: memory, time, and the bytes of the result. Reads headers, not weights."""

import dataclasses
from functools import cache
from importlib import import_module
from typing import Any

import psutil
import torch
from torch import nn

from blockwright import meter, registry
from blockwright.blocks import embedding, layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.treatments import SHAPE_BYTES, Treatment, nbytes
from blockwright.errors import BlockwrightError
from blockwright.recipes import export
from blockwright.recipes.prepare import Job, prepare
from blockwright.recipes.recipe import Recipe

BASE_MEMORY = 600 * 2**20  # the interpreter with torch and transformers loaded
PACKED = ("packed", "dual-grained", "offset-packed")  # what a stage leaves that a standard layout holds as packed linears


def plan(recipe: Recipe) -> dict[str, Any]:
    """What running the recipe would do: per stage memory, time and bits; the bytes of the result. Raises as `refuse_layout` does."""
    job = prepare(recipe)
    refuse_layout(job)
    return estimate(job)


def estimate(job: Job) -> dict[str, Any]:
    """The same of a job. Memory in bytes, time in seconds; `bytes` counts tensors, exactly so where groups divide the rows."""
    recipe, dense, tokens = job.recipe, job.dense, 0 if job.calibration is None else job.calibration.numel()
    skeleton = dense.skeleton()
    path = layers.chain_path(skeleton) + "."
    numel = {n: torch.Size(dense.tensors.facts(n).shape).numel() for n in dense.tensors}
    once = {place: n for n, place in dense.tensors.items()}.values()
    in_blocks = sum(numel[n] for n in once if n.startswith(path))
    around = sum(numel[n] for n in once) - in_blocks
    linears = layers.block_linears(skeleton)
    weights = sum(numel[f"{n}.weight"] for n in linears)
    block = in_blocks // layers.num_blocks(dense.config)
    hidden, width, rate = int(dense.config.hidden_size), 8.0 * job.dtype.itemsize, _flops_per_second()
    bits, kept, stages = dict.fromkeys(linears, width), 1.0, []
    for stage in recipe.stages:
        module = import_module(registry.method(stage.name).module)
        p = module.plan(block_parameters=block, tokens=tokens, **stage.options)
        for name, options in _options_by_linear(stage.options, linears).items():
            own = module.plan(block_parameters=block, tokens=tokens, **options)
            bits[name] = (own["bits"] or bits[name]) + own.get("row_bits", 0) / layers.size(linears[name])[1]
        memory = BASE_MEMORY + int(4 * (p["copies"] * block + p.get("resident", 0) * in_blocks + 3 * tokens * hidden + around))
        seconds = p["passes"] * 2 * in_blocks * kept * tokens / rate + 8 * in_blocks / 1e9
        kept *= p.get("layers", 1.0)
        mean = sum(bits[n] * numel[f"{n}.weight"] for n in linears) / max(weights, 1)
        stages.append({"name": stage.name, "options": stage.options, "memory": memory, "seconds": seconds, "bits": mean})
    evaluated = job.evaluation.numel()
    vocabulary = 20 * job.evaluation.shape[1] * int(dense.config.vocab_size)
    memory = BASE_MEMORY + 4 * around + 8 * block + 12 * evaluated * hidden + vocabulary
    seconds = (2 + len(stages)) * 2 * (in_blocks + around) * evaluated / rate
    if recipe.export == "dense":
        bits = dict.fromkeys(linears, width)
    packed = sum(numel[f"{n}.weight"] * b / 8 + SHAPE_BYTES * (b != width) for n, b in bits.items())
    size = kept * (packed + (in_blocks - weights) * width / 8) + around * width / 8 + _gain_of_embedding(job, dense)
    return {
        "model": recipe.model,
        "parameters": in_blocks + around,
        "bf16_bytes": 2 * (in_blocks + around),
        "stages": stages,
        "measuring": {"memory": memory, "seconds": seconds},
        "memory": max([memory, *(s["memory"] for s in stages)]),
        "seconds": seconds + sum(s["seconds"] for s in stages) + (30 if recipe.measure.use else 0),
        "bytes": round(size),
        "out": str(recipe.out),
    }


def refuse_layout(job: Job) -> None:
    """Raise BlockwrightError where the options tell already that the layout asked for cannot hold the result."""
    recipe, forms = job.recipe, {}
    skeleton = job.dense.skeleton()
    linears = layers.block_linears(skeleton)
    for stage in recipe.stages:
        leaves = registry.method(stage.name).card["leaves"]
        if leaves in PACKED:
            for name, o in _options_by_linear(stage.options, linears).items():
                chosen = o.get("strategy", "group") == "group" and o.get("bits_per_weight") is None
                group = o.get("group_size") if chosen else -1
                forms[name] = {
                    "form": "packed",
                    "bits": o["bits"] if isinstance(o["bits"], int) else 4,  # a mean, or a list to choose from: each linear gets its own
                    "group_size": group if isinstance(group, int) else -1,
                    "symmetric": o.get("symmetric", leaves == "packed"),
                    "transposed": not isinstance(linears[name], nn.Linear),
                }
    if recipe.embedding is not None:
        forms["the embedding"] = {"form": "packed_embedding"}
    export.refuse_layout(recipe.export, export.why_not_standard(job.dense.edited(forms=forms), shared=False))


def refuse_if_too_large(job: Job) -> None:
    """Raise BlockwrightError where the estimate exceeds what may be used, with what would fit."""
    free = min(psutil.virtual_memory().available, meter.memory_limit())
    limit = parse_bytes(job.recipe.memory) if job.recipe.memory else free
    needed = estimate(job)
    if needed["memory"] <= limit:
        return
    worst = max([*needed["stages"], {"name": "measuring", **needed["measuring"]}], key=lambda s: s["memory"])
    raise BlockwrightError(
        f"{worst['name']}: needs about {worst['memory'] / 1e9:.2f} GB of memory, {limit / 1e9:.2f} GB may be used",
        do=_what_fits(job, limit),
    )


def parse_bytes(text: str) -> int:
    """ "8GB", "500MB", "2GiB" -> bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    number, unit = text.strip().upper().rstrip("BIKMG"), text.strip().upper()[len(text.strip().upper().rstrip("BIKMG")) :]
    try:
        return int(float(number) * units[unit or "B"])
    except (ValueError, KeyError, OverflowError):
        raise BlockwrightError(f"memory: {text!r}", allowed='a number with KB, MB, GB, KiB, MiB or GiB, e.g. "8GB"') from None


def _what_fits(job: Job, limit: int) -> str:
    """Fewer windows that would fit, or the memory that this model needs at least."""
    texts = {name: ids for name, ids in (("calibration", job.calibration), ("evaluation", job.evaluation)) if ids is not None}
    least = estimate(job)["memory"]
    while any(len(ids) > 1 for ids in texts.values()):
        texts = {name: ids[: max(len(ids) // 2, 1)] for name, ids in texts.items()}
        least = estimate(dataclasses.replace(job, **texts))["memory"]
        if least <= limit:
            return "This would fit: " + ", ".join(f"{name}: {{num: {len(ids)}}}" for name, ids in texts.items())
    return f"Even one window of text takes {least / 1e9:.2f} GB: shorten it (length), or use a machine with more memory"


def _options_by_linear(options: dict[str, Any], linears: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """For each linear that a stage works on, its options with the overrides for this linear. Without `targets` it may be any."""
    if "targets" not in options:
        return dict.fromkeys(linears, options)
    found = {}
    for name, linear in layers.targeted(linears, options["targets"], options.get("ignore", [])).items():
        found[name] = dict(options)
        for pattern, values in (options.get("overrides") or {}).items():
            if layers.selected(name, linear, [pattern], []):
                found[name] |= values
    return found


def _gain_of_embedding(job: Job, dense: Blueprint) -> int:
    """Bytes that packing the embedding adds (below zero: saves)."""
    bits = job.recipe.embedding
    if bits is None or job.recipe.export == "dense":
        return 0
    v, d = dense.skeleton().get_input_embeddings().weight.shape
    return nbytes(Treatment("quantise", bits, embedding.GROUP), v, d, 2) - int(v * d * job.dtype.itemsize)


@cache
def _flops_per_second() -> float:
    """What this machine's fp32 matmul reaches, from a tenth of a second."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    seconds = meter.time(lambda: a @ b, repeats=5, warmup=2).median
    return 2 * 512 * 1024 * 1024 / seconds
