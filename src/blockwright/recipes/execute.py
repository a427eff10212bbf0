"""The main job: a recipe in; a cheaper model folder with its report out.

Everything is checked and estimated first. Then the stages run, journalled per block in `.<out>.work/` beside the output; at the end the
folder is written aside, measured as written, and committed whole.
"""

import dataclasses
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockwright import meter, registry, zoo
from blockwright.blocks import folders, layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedEmbedding
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Progress, Run, silent
from blockwright.errors import BlockwrightError
from blockwright.recipes import export, measure, report
from blockwright.recipes.measure import Judge
from blockwright.recipes.recipe import Recipe, Text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASE_MEMORY = 600 * 2**20  # the interpreter with torch and transformers loaded
VERSIONS = ("blockwright", "torch", "transformers", "safetensors", "compressed-tensors", "numpy")


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe with everything it names found, opened and checked."""

    recipe: Recipe
    source: Path  # the dense model's folder
    dense: Blueprint
    calibration: Tensor | None  # ids [n, T]
    evaluation: Tensor

    @property
    def work(self) -> Path:
        """The journal, beside the output."""
        out = self.recipe.out.absolute()
        return out.with_name(f".{out.name}.work")


def execute(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Do what the recipe says. Returns the report (also written into the output folder as report.html and report.json).

    resume : go on where a killed run stopped; the same options, inputs, versions and threads are required.
    overwrite : replace what `out` holds.
    Raises BlockwrightError, before any work, for wrong input and for a job that cannot fit into memory.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    started = time.perf_counter()
    check_output(recipe.out, resume=resume, overwrite=overwrite)
    job = prepare(recipe)
    refuse_if_too_large(job)
    with workspace(job, resume=resume, overwrite=overwrite) as work:
        judge, dense = _dense_side(job, work, progress)
        model, stages = _run_stages(job, judge, work, progress)
        made: dict[str, Any] = {}

        def write(scratch: Path) -> None:
            layout = export.write(model, scratch, source=job.source, layout=recipe.export, dtype=DTYPES[recipe.dtype], about=_about(job))
            progress("measuring the result", 0, 1)
            made.update(_report(job, judge, dense, stages, export.read(scratch), scratch, layout, time.perf_counter() - started))
            report.write(made, scratch)

        folders.publish(recipe.out, write)
    shutil.rmtree(job.work, ignore_errors=True)
    return made


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `execute` would do, without doing it: per stage memory, time, bits; the size of the result. Reads headers, not weights."""
    job = prepare(recipe)
    dense, tokens = job.dense, 0 if job.calibration is None else job.calibration.numel()
    path = layers.chain_path(dense.skeleton()) + "."
    parameters = {n: torch.Size(dense.tensors.facts(n).shape).numel() for n in dense.tensors}
    in_blocks = sum(v for n, v in parameters.items() if n.startswith(path))
    rest = sum({dense.tensors[n]: v for n, v in parameters.items() if not n.startswith(path)}.values())
    count = layers.num_blocks(dense.config)
    rate = _flops_per_second()
    hidden = int(dense.config.hidden_size)
    around = 4 * rest
    activations = 4 * tokens * hidden
    bits, kept, stages = 8.0 * DTYPES[recipe.dtype].itemsize, 1.0, []
    for stage in recipe.stages:
        module = import_module(registry.method(stage.name).module)
        p = module.plan(block_parameters=in_blocks // count, tokens=tokens, **stage.options)
        resident = in_blocks * 4 if p.get("resident") else 0
        memory = BASE_MEMORY + int(p["copies"] * 4 * in_blocks / count) + 3 * activations + around + resident
        seconds = p["passes"] * 2 * in_blocks * kept * tokens / rate + 8 * in_blocks / 1e9
        kept *= p.get("layers", 1.0)
        bits = p["bits"] or bits
        stages.append({"name": stage.name, "options": stage.options, "memory": memory, "seconds": seconds, "bits": bits})
    vocabulary = int(dense.config.vocab_size)
    evaluated = job.evaluation.numel()
    memory = BASE_MEMORY + around + 8 * in_blocks // count + 12 * evaluated * hidden + 20 * job.evaluation.shape[1] * vocabulary
    seconds = (2 + len(stages)) * 2 * (in_blocks + rest) * evaluated / rate
    embedding_bits = recipe.embedding + 0.25 if recipe.embedding else 8 * DTYPES[recipe.dtype].itemsize
    size = int(in_blocks * kept * bits / 8 + rest * embedding_bits / 8)
    return {
        "model": recipe.model,
        "parameters": in_blocks + rest,
        "bf16_bytes": 2 * (in_blocks + rest),
        "stages": stages,
        "measuring": {"memory": memory, "seconds": seconds},
        "memory": max([memory, *(s["memory"] for s in stages)]),
        "seconds": seconds + sum(s["seconds"] for s in stages) + (30 if recipe.measure.use else 0),
        "bytes": size,
        "out": str(recipe.out),
    }


def prepare(recipe: Recipe) -> Job:
    """Find and open what a recipe names. Raises BlockwrightError for everything that is wrong with it."""
    source = find_model(recipe.model)
    dense = Blueprint.of_folder(source)
    needs = any("calibration" in registry.method(s.name).card["needs"] for s in recipe.stages)
    evaluation, heard = _ids(recipe.evaluation, "evaluation", source)
    calibration = None
    if needs:
        calibration, learned = _ids(recipe.calibration, "calibration", source)
        run = zoo.shared_run(learned, heard)
        if run is not None:
            raise BlockwrightError(
                f"calibration and evaluation text share a run of {zoo.RUN} words: {run[:80]!r}...",
                allowed="texts that share no such run",
                do="Evaluate on another text: what was learned from the text it is measured on proves nothing",
            )
    if recipe.embedding is not None:
        _check_embedding(dense)
    return Job(recipe, source, dense, calibration, evaluation)


def find_model(name: str) -> Path:
    """The folder of a zoo model, of a path, or of a hub id ("owner/name", downloaded only because it was named)."""
    if name in zoo.MODELS:
        return zoo.model_folder(name)
    path = Path(name)
    owner, slash, rest = name.partition("/")
    if not path.exists() and slash and owner not in ("", ".", "..", "~") and "/" not in rest and rest:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]))
        except Exception as error:  # the hub's client raises a dozen kinds
            raise BlockwrightError(
                f"model {name!r}: no such folder, and not to be had from the hub ({type(error).__name__})",
                allowed=f"a model folder, a hub id, or one of {', '.join(zoo.MODELS)}",
                do="Check the name",
            ) from None
    if not path.exists():
        near = registry.nearest(name, zoo.MODELS)
        raise BlockwrightError(
            f"model {name!r}: no such folder",
            allowed=f"a model folder, a hub id, or one of {', '.join(zoo.MODELS)}",
            do=near or "Check the path",
        )
    layers.read_config(path)  # says what is wrong with a missing or empty folder
    return path


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise BlockwrightError where the output folder may not be written."""
    folders.settle(out)
    if out.exists() and not out.is_dir():
        raise BlockwrightError(f"out {out}: is a file", do="Name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        done = (out / "blockwright.json").exists() and resume
        raise BlockwrightError(
            f"out {out}: {'this run is finished already' if done else 'not empty'}",
            allowed="a new or empty folder",
            do="Use --overwrite to replace it, or name another folder",
        )


def refuse_if_too_large(job: Job) -> None:
    """Raise BlockwrightError where the estimate exceeds what may be used, with what would fit."""
    estimate = plan(job.recipe)
    limit = parse_bytes(job.recipe.memory) if job.recipe.memory else psutil.virtual_memory().available
    if estimate["memory"] > limit:
        worst = max([*estimate["stages"], {"name": "measuring", **estimate["measuring"]}], key=lambda s: s["memory"])
        raise BlockwrightError(
            f"{worst['name']}: needs about {worst['memory'] / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB may be used",
            do="Use fewer or shorter calibration and evaluation windows (num, length), or a machine with more memory",
        )


def parse_bytes(text: str) -> int:
    """ "8GB", "500MB", "2GiB" -> bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    number, unit = text.strip().upper().rstrip("BIKMG"), text.strip().upper()[len(text.strip().upper().rstrip("BIKMG")) :]
    try:
        return int(float(number) * units[unit or "B"])
    except (ValueError, KeyError, OverflowError):
        raise BlockwrightError(f"memory: {text!r}", allowed='a number with KB, MB, GB, KiB, MiB or GiB, e.g. "8GB"') from None


@contextmanager
def workspace(job: Job, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The journal's folder, locked. Raises BlockwrightError where another run holds it or left it with other options or inputs."""
    work, mine = job.work, _identity(job)
    try:
        if work.exists() and overwrite and not resume:
            with folders.locked(work, wait=False):
                shutil.rmtree(work)
        elif work.exists() and not resume:
            raise BlockwrightError(
                f"out {job.recipe.out}: an unfinished run is here", do="Use --resume to go on with it, or --overwrite to start again"
            )
        work.mkdir(parents=True, exist_ok=True)
        with folders.locked(work, wait=False):
            about = work / "job.json"
            if about.exists():
                theirs = json.loads(about.read_text())
                differ = [key for key in mine if theirs.get(key) != mine[key]]
                if differ:
                    raise BlockwrightError(
                        f"--resume: {differ[0]} differs from the unfinished run's",
                        allowed="the same recipe, model, text, versions and threads",
                        do="Use --overwrite to start again",
                    )
            else:
                folders.replace_file(about, lambda p: p.write_text(json.dumps(mine)))
            yield work
    except BlockingIOError:
        raise BlockwrightError(f"out {job.recipe.out}: another run is writing it", do="Wait for it, or name another folder") from None
    except OSError as error:
        raise folders.told(job.recipe.out, error) from error


def _identity(job: Job) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on with, each part as a digest or a plain value."""
    recipe = job.recipe.model_dump(mode="json", exclude={"out", "source_text", "memory", "measure"})
    files = sorted(p for p in job.source.iterdir() if p.suffix in (".json", ".safetensors"))

    def digest(*tensors: Tensor | None) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors if t is not None)).hexdigest()

    return {
        "recipe": recipe,
        "model": {p.name: folders.sha256(p) for p in files},
        "text": digest(job.calibration, job.evaluation),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source"
    return found


def _ids(text: Text, purpose: str, source: Path) -> tuple[Tensor, str]:
    """Windows of a text as ids [num, length], and the words that they hold."""
    part: Any = purpose if text.text in zoo.TEXTS else "all"
    tokenizer = zoo.tokenizer(str(source))
    try:
        ids = zoo.windows(zoo.text(text.text, part), num=text.num, length=text.length, tokenizer=tokenizer)
    except BlockwrightError as error:
        raise BlockwrightError(f"{purpose} {error.what}", allowed=error.allowed, do=error.do) from None
    return ids, tokenizer.decode(ids.flatten())


def _dense_side(job: Job, work: Path, progress: Progress) -> tuple[Judge, dict[str, Any]]:
    """The judge, and the dense model's own numbers; kept in the journal."""
    progress("measuring the dense model", 0, 1)
    kept = work / "dense.safetensors"
    judge = Judge(job.dense, job.evaluation, hidden=load_file(kept)["hidden"] if kept.exists() else None)
    if not kept.exists():
        folders.replace_file(kept, lambda p: save_file({"hidden": judge.hidden}, p))
    numbers = _kept_json(work / "dense.json", lambda: judge.quality(job.dense))
    progress("measuring the dense model", 1, 1)
    return judge, numbers


def _run_stages(job: Job, judge: Judge, work: Path, progress: Progress) -> tuple[Blueprint, list[dict[str, Any]]]:
    recipe, done = job.recipe, []
    run = Run(job.dense, calibration=job.calibration, journal=work, seed=recipe.seed, progress=progress)
    for number, stage in enumerate(recipe.stages):
        started = time.perf_counter()
        run.begin(f"{number}-{stage.name}")
        registry.method(stage.name).load()(run, **stage.options)
        seconds = time.perf_counter() - started
        model, curves = run.model, dict(run.curves)
        numbers = _kept_json(
            work / f"{number}-{stage.name}.json",
            lambda: {
                "name": stage.name,  # noqa: B023 (called at once)
                "options": stage.options,  # noqa: B023
                "seconds": seconds,  # noqa: B023
                "bytes": export.predicted_bytes(model, DTYPES[recipe.dtype]),  # noqa: B023
                "curves": curves or None,  # noqa: B023
                **(judge.quality(model) if recipe.measure.quality else {}),  # noqa: B023
            },
        )
        done.append(numbers)
    model = run.model if recipe.embedding is None else pack_embedding(run.model, recipe.embedding)
    return model, done


def pack_embedding(model: Blueprint, bits: int, group_size: int = 64) -> Blueprint:
    """The model with its embedding packed, and its head too where the two are tied (on the same tensors)."""
    skeleton = model.skeleton()
    name = next(n for n, m in skeleton.named_modules() if m is skeleton.get_input_embeddings())
    head = next((n for n, m in skeleton.named_modules() if m is skeleton.get_output_embeddings()), None)
    packed = PackedEmbedding.of(model.tensors.read([f"{name}.weight"])[f"{name}.weight"], bits=bits, group_size=group_size)
    memory = {f"packed:{name}.{key}": t for key, t in packed.state_dict().items()}
    owners = [name]
    forms = dict(model.forms) | {name: packed.form()}
    if head is not None and model.tensors.places.get(f"{head}.weight") == model.tensors[f"{name}.weight"]:
        owners.append(head)
        forms[head] = packed.form() | {"form": "packed"}
    added = {f"{owner}.{key}": Place(None, f"packed:{name}.{key}") for owner in owners for key in packed.state_dict()}
    return model.edited(tensors=model.tensors.replaced([f"{o}.weight" for o in owners], added, memory), forms=forms)


def _check_embedding(model: Blueprint) -> None:
    embedding = model.skeleton().get_input_embeddings()
    if type(embedding) is not torch.nn.Embedding:
        raise BlockwrightError(
            f"embedding: {type(embedding).__name__} cannot be quantised",
            allowed="a plain nn.Embedding",
            do="Leave `embedding` out of the recipe",
        )


def _kept_json(path: Path, make: Any) -> Any:
    """What `make()` returns, from the journal if it is there already."""
    if not path.exists():
        value = make()
        folders.replace_file(path, lambda p: p.write_text(json.dumps(value)))
    return json.loads(path.read_text())


def _about(job: Job) -> dict[str, Any]:
    """What a folder tells of how it was made."""
    recipe = job.recipe
    return {
        "model": recipe.model,
        "stages": [{"name": s.name, "options": s.options} for s in recipe.stages],
        "embedding": recipe.embedding,
        "seed": recipe.seed,
        "versions": versions(),
    }


def _report(
    job: Job,
    judge: Judge,
    dense: dict[str, Any],
    stages: list[dict[str, Any]],
    result: Blueprint,
    folder: Path,
    layout: str,
    seconds: float,
) -> dict[str, Any]:
    recipe, wanted = job.recipe, job.recipe.measure
    numbers = judge.quality(result) if wanted.quality else {}
    errors = judge.block_errors(result) if wanted.blocks else {}
    used = {"dense": {}, "result": {}}  # type: dict[str, dict[str, Any]]
    if wanted.use:
        used = {
            "dense": measure.use(job.source, wanted.prompts, new_tokens=wanted.new_tokens),
            "result": measure.use(folder, wanted.prompts, new_tokens=wanted.new_tokens),
        }
    parameters = sum(torch.Size(job.dense.tensors.facts(n).shape).numel() for n in _owners(job.dense))
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    opens = "transformers: AutoModelForCausalLM.from_pretrained" if layout == "standard" else "blockwright: bw.load"
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
            "bytes": weights,
            **_speed(used["result"]),
            "folder": str(recipe.out),
            "layout": layout,
            "opens_with": opens,
        },
        "blocks": block_table(job.dense, result, errors),
        "stages": [
            {key: s.get(key) for key in ("name", "options", "seconds", "perplexity", "kl", "top1", "bytes", "curves")} for s in stages
        ],
        "reference_points": [],
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
            "memory": psutil.virtual_memory().total,
            "threads": torch.get_num_threads(),
        },
        "seed": recipe.seed,
        "seconds": seconds,
        "warnings": [],
    }


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
        after = _modules(result, f"{path}.{now[i]}.") if i in now else {}
        parts = [_part(dense, result, name, tensors, after.get(name), owners) for name, tensors in before.items()]
        treatments = sorted({p["treatment"] for p in parts if p["treatment"] not in ("", "dense")}) or ["kept"]
        rows.append(_row(f"layers.{i}", treatments if i in now else ["dropped"], parts, errors.get(i)))
    outside = {n: t for n, t in _modules(dense, "").items() if not n.startswith(path + ".")}
    after_all = _modules(result, "")
    seen: set[Place] = set()
    for name, tensors in outside.items():
        places = {dense.tensors[t] for t in tensors}
        if not places <= seen:
            seen |= places
            part = _part(dense, result, name, tensors, after_all.get(name), owners)
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


def _modules(model: Blueprint, prefix: str) -> dict[str, list[str]]:
    """Module name below the prefix -> its tensors' full names."""
    found: dict[str, list[str]] = {}
    for name in model.tensors:
        if name.startswith(prefix):
            found.setdefault(name[len(prefix) :].rpartition(".")[0], []).append(name)
    return found


def _part(dense: Blueprint, result: Blueprint, name: str, tensors: list[str], after: list[str] | None, owners: set[str]) -> dict[str, Any]:
    weights = sum(torch.Size(dense.tensors.facts(t).shape).numel() for t in tensors)
    stored = [t for t in after or [] if t in owners]
    module = (after or [""])[0].rpartition(".")[0]
    form, sparsity = result.forms.get(module), None
    if after is None:
        treatment = "dropped"
    elif not stored:
        treatment = "shared"
    elif form is not None:
        group = "channel" if form.get("group_size") == -1 else f"g{form.get('group_size')}"
        treatment = f"int{form['bits']} {group}" if "bits" in form else str(form["form"])
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


def _flops_per_second() -> float:
    """What this machine's fp32 matmul reaches, from a tenth of a second."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    seconds = meter.time(lambda: a @ b, repeats=5, warmup=2).median
    return 2 * 512 * 1024 * 1024 / seconds
