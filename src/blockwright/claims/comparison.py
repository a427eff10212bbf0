"""The comparison at equal size: our stages, and pairs of them, beside rounding to nearest and llm-compressor's GPTQ.

Each model is written, opened again and judged; so is the peer's, which runs in an environment of its own (`make peers`). Each stage's time
is compared with the forward passes that it needs. Takes about twenty minutes on 2 cores.
"""

import subprocess
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import blockwright
from blockwright import meter, registry, zoo
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.errors import BlockwrightError

NUM, LENGTH = 32, 256  # windows of calibration and their tokens, for every method
EQUAL = 0.02  # sizes of a group differ by no more than this share
LEARNED: dict[str, Any] = {"group_size": 64, "iters": 60, "batch_size": 2}

# group -> bits of a linear's weight in it -> what is run; embeddings stay as they are, as the peer leaves them
RUNS: dict[str, dict[str, list[dict[str, dict[str, Any]]]]] = {
    "4 bits": {
        "nearest": [{"finequant": {"bits": 4, "group_size": 64}}],
        "flexround": [{"flexround": {"bits": 4, **LEARNED}}],
        "dgq": [{"dgq": {"group_size": 64}}],
        "cfsp + flexround": [{"cfsp": {"sparsity": 0.254}}, {"flexround": {"bits": 5, **LEARNED}}],
        "foldgpt + finequant": [{"foldgpt": {"remove": 0.2}}, {"finequant": {"bits": 5, "group_size": 64}}],
        "welore + finequant": [{"welore": {"keep_parameters": 0.98}}, {"finequant": {"bits": 4, "group_size": 64}}],
        "dsnot 2:4 + finequant": [{"dsnot": {"mask_structure": "2:4", "skip": []}}, {"finequant": {"bits": 4, "group_size": 64}}],
    },
    "3 bits": {
        "nearest": [{"finequant": {"bits": 3, "group_size": 64}}],
        "flexround": [{"flexround": {"bits": 3, **LEARNED}}],
    },
}
BITS = {"4 bits": 4, "3 bits": 3}
PEER = "GPTQ of llm-compressor"
PEER_PYTHON = ".venv-peers/llm-compressor/bin/python"


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """SmolLM2-135M off its 4-bit grid, at the sizes of 4 and of 3 bits a weight in groups of 64."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="blockwright-") as scratch:
        pass_seconds, block_parameters = _dense_model()
        for group, runs in RUNS.items():
            for name, stages in runs.items():
                report = _run(stages, Path(scratch) / f"{group} {name}", seed)
                if not rows:
                    rows.append({"size": "bf16", "model": "dense", **_numbers(report["dense"])})
                timed = [_timed(stage, pass_seconds, block_parameters) for stage in report["stages"]]
                rows.append({"size": group, "model": name, **_numbers(report["result"]), **_joined(timed)})
                print(rows[-1], flush=True)
            peer = _peer(Path(scratch), BITS[group])
            if peer:
                rows.append({"size": group, "model": PEER, **peer})
    return _claim(rows, pass_seconds)


def _claim(rows: list[dict[str, Any]], pass_seconds: float) -> Claim:
    found = {(row["size"], row["model"]): row for row in rows}
    rival = {group: found.get((group, PEER), found[group, "nearest"]) for group in RUNS}

    def learned(group: str) -> float:
        return float(found[group, "flexround"]["perplexity"] / rival[group]["perplexity"])

    apart = max(
        abs(row["MB"] / found[row["size"], "nearest"]["MB"] - 1) for row in rows if row["size"] in RUNS
    )  # a pruned model may be a little smaller or larger
    slowest = max(float(row["over its passes"] or 0) for row in rows if "over its passes" in row)
    first, *others = RUNS
    against = {group: f"{group} a weight, flexround over {row['model']}: perplexity" for group, row in rival.items()}
    return Claim(
        paper="at equal size, the methods of this library beside what people use today",
        name=against[first],
        measured=learned(first),
        target=1.0,
        unit="ratio",
        better="lower",
        parts=[
            *(Measured(name=against[g], measured=learned(g), target=1.0, unit="ratio", better="lower") for g in others),
            Measured(name="largest difference in size within a group", measured=apart, target=EQUAL, unit="share", better="lower"),
            Measured(
                name="slowest stage over the forward passes that it needs", measured=slowest, target=3.0, unit="times", better="lower"
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="scatter",
            title="SmolLM2-135M: perplexity against size",
            x="MB on disk",
            y="perplexity",
            series=_by_model(rows),
            log=True,
        ),
        notes=[
            f"SmolLM2-135M off its 4-bit grid; {NUM} x {LENGTH} tokens of the Python reference to learn from, 16 x 256 others to judge",
            "4 bits: int4 in groups of 64 and what else is as large; 3 bits likewise; the embedding stays in bf16 everywhere",
            f"A forward pass over the calibration text takes {pass_seconds:.1f} s; a stage's passes are counted by its `plan`",
            *([] if (first, PEER) in found else ["llm-compressor is not installed (`make peers`): rounding to nearest stands in for it"]),
        ],
    )


def _by_model(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append((row["MB"], row["perplexity"]))
    return found


def _run(stages: list[dict[str, dict[str, Any]]], out: Path, seed: int) -> dict[str, Any]:
    """The report of a recipe with these stages."""
    return blockwright.run(
        {
            "model": "smollm2-off-grid",
            "stages": stages,
            "out": str(out),
            "seed": seed,
            "calibration": {"text": "pydoc", "num": NUM, "length": LENGTH},
            "measure": {"blocks": False, "use": False},
        }
    )


def _numbers(side: dict[str, Any]) -> dict[str, Any]:
    return {"MB": side["bytes"] / 1e6, "perplexity": side["perplexity"], "kl": side.get("kl")}


def _dense_model() -> tuple[float, int]:
    """Seconds of one pass of the dense model's blocks over the calibration text, 8 windows at a time, and the parameters of a block."""
    model = zoo.smollm2(off_grid=True)
    ids = zoo.windows("pydoc", "calibration", num=8, length=LENGTH, tokenizer=zoo.tokenizer())
    seconds = NUM / len(ids) * meter.time(lambda: model.model(ids, use_cache=False), repeats=3, warmup=1).median
    return seconds, sum(p.numel() for p in model.model.layers[0].parameters())


def _timed(stage: dict[str, Any], pass_seconds: float, block_parameters: int) -> tuple[float, float]:
    """Seconds of a stage, and these over the passes that it needs; one that needs no text is held against one pass."""
    plan = import_module(registry.method(stage["name"]).module).plan
    passes = plan(block_parameters=block_parameters, tokens=NUM * LENGTH, **stage["options"])["passes"]
    return stage["seconds"], stage["seconds"] / (max(passes, 1) * pass_seconds)


def _joined(timed: list[tuple[float, float]]) -> dict[str, Any]:
    return {"seconds": sum(s for s, _ in timed), "over its passes": max(share for _, share in timed)}


def _peer(scratch: Path, bits: int) -> dict[str, Any] | None:
    """What llm-compressor's GPTQ makes of the same model and text, opened by plain transformers; None where it is not installed."""
    root = registry.CHECKOUT
    if root is None or not (root / PEER_PYTHON).exists():
        return None
    from transformers import AutoModelForCausalLM

    out, text = scratch / f"peer-{bits}", scratch / "calibration.safetensors"
    tokenizer = zoo.tokenizer()
    save_file({"ids": zoo.windows("pydoc", "calibration", num=NUM, length=LENGTH, tokenizer=tokenizer)}, text)
    command = [root / PEER_PYTHON, root / "peers" / "llm_compressor.py", zoo.model_folder("smollm2-off-grid"), text, out, str(bits), "64"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BlockwrightError(f"llm-compressor: {done.stderr.strip().splitlines()[-1]}", do="Make its environment again: make peers")
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    ids = zoo.windows("pydoc", "evaluation", num=16, length=256, tokenizer=tokenizer)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    return {"MB": size / 1e6, "perplexity": meter.perplexity(model, ids), "seconds": float(done.stdout.splitlines()[-1])}
