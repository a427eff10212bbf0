"""The main job: a recipe in; a cheaper model folder with its report out.

Everything is checked and estimated first. Then the stages run, journalled per block in `.<out>.work/` beside the output; at the end the
folder is written aside, measured as written, and committed whole.
"""

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockwright import registry
from blockwright.blocks import folders
from blockwright.blocks.embedding import pack_embedding
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Progress, Run, silent
from blockwright.errors import BlockwrightError
from blockwright.recipes import export, outcome, report
from blockwright.recipes.measure import Judge
from blockwright.recipes.plan import refuse_if_too_large, refuse_layout
from blockwright.recipes.prepare import Job, check_output, prepare
from blockwright.recipes.recipe import Recipe

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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
    refuse_layout(job)
    refuse_if_too_large(job)
    with workspace(job, resume=resume, overwrite=overwrite) as work:
        judge, dense = _dense_side(job, work, progress)
        model, stages = _run_stages(job, judge, work, progress)
        made: dict[str, Any] = {}

        def write(scratch: Path) -> None:
            layout = export.write(model, scratch, source=job.source, layout=recipe.export, dtype=job.dtype, about=_about(job))
            own = None if layout == "standard" else export.why_not_standard(model) or "the recipe asks for our own layout"
            progress("measuring the result", 0, 1)
            seconds = time.perf_counter() - started
            made.update(outcome.gather(job, judge, dense, stages, export.read(scratch), scratch, own=own, seconds=seconds))
            progress("measuring the result", 1, 1)
            report.write(made, scratch)
            licence = next((p.name for p in sorted(scratch.glob("LICENSE*"))), None)
            (scratch / "README.md").write_text(outcome.model_card(made, licence), encoding="utf-8")

        folders.publish(recipe.out, write)
    shutil.rmtree(job.work, ignore_errors=True)
    return made


@contextmanager
def workspace(job: Job, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The journal's folder, locked. Raises BlockwrightError where another run holds it or left it with other options or inputs.

    An error inside leaves the journal for `resume`, unless no block was finished yet: then nothing stays.
    """
    work, out = job.work, job.recipe.out
    try:
        if work.exists() and not resume:
            if not overwrite:
                raise BlockwrightError(f"out {out}: an unfinished run is here", do="Go on with --resume, or start again with --overwrite")
            with folders.locked(work, wait=False):
                shutil.rmtree(work)
        _make(work, out)
        with folders.locked(work, wait=False):
            mine = _identity(job)
            refuse_other_work(work, mine)
            try:
                _kept_json(work / "job.json", lambda: mine)
                yield work
            except Exception as error:
                if not any(work.rglob("unit-*.safetensors")):
                    shutil.rmtree(work, ignore_errors=True)
                told = _ran_out(out, error)
                if told is None:
                    raise
                raise told from error
    except BlockingIOError:
        raise BlockwrightError(f"out {out}: another run is writing it", do="Wait for it, or name another folder") from None


def refuse_other_work(work: Path, mine: dict[str, Any]) -> None:
    """Raise BlockwrightError where a journal belongs to a run of other options or inputs than `mine`."""
    about = work / "job.json"
    theirs = json.loads(about.read_text()) if about.exists() else mine
    differ = [key for key in mine if theirs.get(key) != mine[key]]
    if differ:
        raise BlockwrightError(
            f"--resume: {differ[0]} differs from the unfinished run's",
            allowed="the same recipe, model, text, versions and threads",
            do="Use --overwrite to start again",
        )


def _make(work: Path, out: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folders.told(out, error) from error


def _ran_out(out: Path, error: Exception) -> BlockwrightError | None:
    """What to tell where the disk or the memory ran out."""
    if isinstance(error, OSError) and error.errno in DISK:
        return folders.told(out, error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return BlockwrightError(f"out {out}: memory ran out", do="Free some and go on with --resume; finished blocks are kept")
    return None


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
        "versions": outcome.versions(),
        "threads": torch.get_num_threads(),
    }


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
    run = Run(job.dense, calibration=job.calibration, journal=work, seed=recipe.seed, progress=progress, dtype=job.dtype)
    for number, stage in enumerate(recipe.stages):
        started = time.perf_counter()
        run.begin(f"{number}-{stage.name}")
        registry.method(stage.name).load()(run, **stage.options)
        seconds = time.perf_counter() - started
        model, curves, details = run.model, dict(run.curves), dict(run.details)
        numbers = _kept_json(
            work / f"{number}-{stage.name}.json",
            lambda: {
                "name": stage.name,  # noqa: B023 (called at once)
                "options": stage.options,  # noqa: B023
                "seconds": seconds,  # noqa: B023
                "bytes": export.predicted_bytes(model, job.dtype, recipe.export),  # noqa: B023
                "curves": curves or None,  # noqa: B023
                "details": details or None,  # noqa: B023
                **(judge.quality(model) if recipe.measure.quality else {}),  # noqa: B023
            },
        )
        done.append(numbers)
    model = run.model if recipe.embedding is None else pack_embedding(run.model, recipe.embedding)
    return model, done


def _kept_json(path: Path, make: Callable[[], Any]) -> Any:
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
        "versions": outcome.versions(),
    }
