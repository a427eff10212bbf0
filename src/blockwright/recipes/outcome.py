"""What a run made: its numbers for the report, a row for each block, the model card."""

import math
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from blockwright import meter, registry
from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.parameters import Place
from blockwright.errors import BlockwrightError
from blockwright.recipes import measure
from blockwright.recipes.measure import Judge
from blockwright.recipes.prepare import Job
from blockwright.recipes.recipe import Recipe, Text

VERSIONS = ("blockwright", "torch", "transformers", "safetensors", "compressed-tensors", "numpy")


def gather(
    job: Job,
    judge: Judge,
    dense: dict[str, Any],
    stages: list[dict[str, Any]],
    result: Blueprint,
    folder: Path,
    *,
    own: str | None,
    seconds: float,
) -> dict[str, Any]:
    """The report (see recipes/report.py) of a result as it was written into `folder`.

    dense, stages : numbers of the dense model, and of each stage. own : why the layout is our own, or None where it is standard.
    seconds : that the run took up to here.
    """
    recipe, wanted = job.recipe, job.recipe.measure
    numbers = judge.quality(result) if wanted.quality else {}
    errors = judge.block_errors(result) if wanted.blocks else {}
    warnings = [] if own is None else [f"Plain transformers cannot open this folder: {own}. Open it with bw.load, or export it."]
    used: dict[str, dict[str, Any]] = {"dense": {}, "result": {}}
    if wanted.use:
        try:
            for which, path in (("dense", job.source), ("result", folder)):
                used[which] = measure.use(path, wanted.prompts, new_tokens=wanted.new_tokens)
        except BlockwrightError as error:  # the model is made and measured: it is not thrown away because it could not be tried
            warnings.append(f"Speed, memory and samples are missing: {error}")
    parameters = sum(torch.Size(job.dense.tensors.facts(n).shape).numel() for n in _owners(job.dense))
    opens = "transformers: AutoModelForCausalLM.from_pretrained" if own is None else "blockwright: bw.load"
    return {
        "format": 1,
        "title": f"{recipe.model}: {' + '.join(s.name for s in recipe.stages) or 'unchanged'}",
        "model": {
            "name": recipe.model,
            "architecture": (job.dense.config.architectures or [job.dense.config.model_type])[0],
            "parameters": parameters,
            "source_bytes": sum(p.stat().st_size for p in job.source.glob("*.safetensors")),
            "bf16_bytes": 2 * parameters,
        },
        "dense": {"perplexity": dense["perplexity"], "bytes": 2 * parameters, **_speed(used["dense"])},
        "result": {
            "perplexity": numbers.get("perplexity"),
            "kl": numbers.get("kl"),
            "top1": numbers.get("top1"),
            "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
            **_speed(used["result"]),
            "folder": str(recipe.out),
            "layout": "standard" if own is None else "blockwright",
            "opens_with": opens,
        },
        "blocks": block_table(job.dense, result, errors),
        "stages": [
            {key: s.get(key) for key in ("name", "options", "seconds", "perplexity", "kl", "top1", "bytes", "curves", "details")}
            for s in stages
        ],
        "reference_points": reference_points(recipe, dense["perplexity"]),
        "samples": [
            {"prompt": p, "dense": a, "result": b}
            for p, a, b in zip(wanted.prompts, used["dense"].get("samples", []), used["result"].get("samples", []), strict=False)
        ],
        "recipe": recipe.source_text,
        "command": "blockwright run recipe.yaml",
        "versions": versions(),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=True),
            "memory": min(psutil.virtual_memory().total, meter.memory_limit()),
            "threads": torch.get_num_threads(),
        },
        "seed": recipe.seed,
        "seconds": seconds,
        "warnings": warnings,
    }


def reference_points(recipe: Recipe, perplexity: float | None) -> list[dict[str, Any]]:
    """What `blockwright reproduce comparison` measured of the same model on the same text, for the report to draw; else nothing.

    perplexity : of the dense model in this run: where the comparison's is another, it measured something else.
    """
    same = recipe.model == "smollm2-off-grid" and recipe.evaluation == Text(num=16) and perplexity is not None
    rows = registry.results("comparison").get("cpu", {}).get("rows", []) if same else []
    measured = [row for row in rows if row["model"] == "dense" and math.isclose(row["perplexity"], perplexity or 0, rel_tol=1e-3)]
    return [
        {"name": f"{row['model']}, {row['size']}", "bytes": round(1e6 * row["MB"]), "perplexity": row["perplexity"], "kl": row.get("kl")}
        for row in rows
        if measured and row["model"] != "dense"
    ]


def model_card(report: dict[str, Any], licence: str | None) -> str:
    """README.md of the folder: what it is, what it costs, how to open it, the recipe. licence : the file that holds it, if there is one."""
    dense, result = report["dense"], report["result"]
    names = [s["name"] for s in report["stages"]]
    tags = {"tags": ["blockwright", *dict.fromkeys(names)], "pipeline_tag": "text-generation"}
    if result["layout"] == "standard":
        tags["library_name"] = "transformers"
        opened = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("this folder")'
    else:
        opened = 'import blockwright as bw\n\nmodel = bw.load("this folder")'
    rows = [
        ("bytes", dense["bytes"], result["bytes"]),
        ("perplexity", dense["perplexity"], result["perplexity"]),
        ("KL to dense, nats a token", None, result["kl"]),
        ("same top choice as dense", None, result["top1"]),
        ("decoding, tokens/s", dense["tokens_per_second"], result["tokens_per_second"]),
    ]
    table = [f"| {name} | {_number(before)} | {_number(now)} |" for name, before, now in rows]
    parts = [
        f"---\n{yaml.safe_dump(tags, sort_keys=False)}---",
        f"# {report['title']}",
        f"Made from `{report['model']['name']}` by blockwright {report['versions']['blockwright']}; seed {report['seed']}. "
        "Bytes of the dense model are counted in bf16. All numbers, block by block, are in `report.html`.",
        "\n".join(["| | dense | this |", "| --- | --- | --- |", *table]),
        *report["warnings"],
        f"```python\n{opened}\n```",
        "## Recipe",
        "\n".join(f"    {line}" for line in report["recipe"].splitlines()),
        f"The licence of the model that this one was made from holds: see `{licence}`." if licence else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _number(value: int | float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _speed(used: dict[str, Any]) -> dict[str, Any]:
    return {"tokens_per_second": used.get("tokens_per_second"), "peak_memory": used.get("peak_memory")}


def _owners(model: Blueprint) -> list[str]:
    """One name a place: the first."""
    first: dict[Place, str] = {}
    for name, place in model.tensors.items():
        first.setdefault(place, name)
    return list(first.values())


def block_table(dense: Blueprint, result: Blueprint, errors: dict[int, float]) -> list[dict[str, Any]]:
    """For each block of the dense model, the embedding and the head: what happened to it, its bytes in bf16 and now, its parts."""
    path = layers.chain_path(dense.skeleton())
    count = layers.num_blocks(dense.config)
    now = {old: new for new, old in enumerate(result.origin or range(count))}
    owners = set(_owners(result))
    rows = []
    for i in range(count):
        before = _modules(dense, f"{path}.{i}.")
        prefix = f"{path}.{now[i]}." if i in now else None
        after = {} if prefix is None else _modules(result, prefix, before)
        parts = [_part(dense, result, name, tensors, prefix, after.get(name, []), owners) for name, tensors in before.items()]
        parts += [_part(dense, result, name, [], prefix, found, owners) for name, found in after.items() if name not in before]
        treatments = sorted({p["treatment"] for p in parts if p["treatment"] not in ("", "dense")}) or ["kept"]
        rows.append(_row(f"layers.{i}", ["dropped"] if prefix is None else treatments, parts, errors.get(i)))
    outside = {n: t for n, t in _modules(dense, "").items() if not n.startswith(path + ".")}
    after = _modules(result, "", outside)
    seen: set[Place] = set()
    for name, tensors in outside.items():
        places = {dense.tensors[t] for t in tensors}
        if not places <= seen:
            seen |= places
            part = _part(dense, result, name, tensors, "", after.get(name, []), owners)
            rows.append(_row(name.rpartition(".")[2], [part["treatment"] or "kept"], [part], None))
    return rows


def _row(name: str, treatment: list[str], parts: list[dict[str, Any]], error: float | None) -> dict[str, Any]:
    before, after = sum(p["bytes_before"] for p in parts), sum(p["bytes_after"] for p in parts)
    weights = before / 2
    zeros = [p["sparsity"] * p["bytes_before"] for p in parts if p["sparsity"] is not None]
    return {
        "name": name,
        "label": name,
        "treatment": treatment,
        "bytes_before": before,
        "bytes_after": after,
        "bits": 8 * after / weights if weights else None,
        "sparsity": sum(zeros) / before if zeros else None,
        "error": error,
        "parts": parts,
    }


def _modules(model: Blueprint, prefix: str, known: Iterable[str] | None = None) -> dict[str, list[str]]:
    """Module name below the prefix -> its tensors' full names. known : names of modules; what lies inside one belongs to it."""
    found: dict[str, list[str]] = {}
    for name in model.tensors:
        if name.startswith(prefix):
            module = name[len(prefix) :].rpartition(".")[0]
            if known is not None:
                module = max((k for k in known if module == k or module.startswith(k + ".")), key=len, default=module)
            found.setdefault(module, []).append(name)
    return found


def _part(
    dense: Blueprint, result: Blueprint, name: str, tensors: list[str], prefix: str | None, after: list[str], owners: set[str]
) -> dict[str, Any]:
    """One module: `name` below the block, its tensors before and after. prefix : of the block in the result, None where it was dropped."""
    weights = sum(torch.Size(dense.tensors.facts(t).shape).numel() for t in tensors)
    stored = [t for t in after if t in owners]
    module = f"{prefix}{name}"
    forms = [form for n, form in result.forms.items() if n == module or n.startswith(module + ".")]
    around = next((form for n, form in result.forms.items() if module.startswith(n + ".")), None)  # what stands for all of a subblock
    sparsity = None
    if prefix is None:
        treatment = "dropped"
    elif around is not None and not forms:
        treatment = _form(around)
    elif after and not stored:
        treatment = "shared"
    elif forms:
        treatment = " + ".join(dict.fromkeys(_form(f) for f in forms))
    else:
        matrix = next((t for t in after if t.endswith(".weight") and len(result.tensors.facts(t).shape) == 2), None)
        if matrix is not None:
            w = result.tensors.read([matrix])[matrix]
            sparsity = float((w == 0).sum()) / w.numel()
        treatment = f"{sparsity:.0%} zeros" if sparsity and sparsity > 0.01 else "dense"
    after_bytes = sum(result.tensors.facts(t).nbytes for t in stored)
    shape = next((list(dense.tensors.facts(t).shape) for t in tensors), [])
    return {
        "name": name,
        "treatment": treatment,
        "bytes_before": 2 * weights,
        "bytes_after": after_bytes,
        "bits": 8 * after_bytes / weights if weights else None,
        "sparsity": sparsity,
        "shape": shape,
    }


def _form(form: layers.Form) -> str:
    """A form in a word or two."""
    if form["form"] == "linear":
        return "{} x {}".format(*form["size"])
    if "bits" not in form:
        return str(form["form"]).replace("_", " ")
    more = {"dual_grained": ", int8 inputs", "offset_packed": ", real offsets"}.get(form["form"], "")
    return f"int{form['bits']} {'channel' if form['group_size'] == -1 else 'g' + str(form['group_size'])}{more}"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source"
    return found
