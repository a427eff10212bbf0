"""The claim that stages compose: each pair of stages works on a tiny model, whole and reloaded, or is refused with a reason."""

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import blockwright
from blockwright import registry
from blockwright.claims.runner import Claim
from blockwright.claims.streaming import WORDS, write_model, write_texts
from blockwright.errors import BlockwrightError

QUICK: dict[str, dict[str, Any]] = {  # options that make a stage quick, or visible, on a model of 4 blocks; others run with their defaults
    "cfsp": {"granularity": 32, "recovery_steps": 2},
    "fit": {"bits_per_weight": 9.0, "samples": 1, "score_windows": 2},
    "flexround": {"iters": 2},
    "foldgpt": {"remove": 0.25, "group_size": 2, "gate_steps": 2, "cure_steps": 2, "r": 2},
    "lpvit": {"block_size": [16, 16]},
    "puzzle": {"score_windows": 2},
    "quantllm-ofa": {"steps": 2, "samples": 4},
}
WORKS = "works"


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """All ordered pairs of the stages that treat a language model, each with itself too, on a random Llama of 4 blocks."""
    names = stages()
    with tempfile.TemporaryDirectory(prefix="blockwright-") as scratch:
        write_small_model(Path(scratch), seed=seed)
        rows = [{"first": a, "then": b, "outcome": outcome(Path(scratch), [a, b], seed=seed)} for a, b in product(names, names)]
    fine = sum(not row["outcome"].startswith("failed") for row in rows)
    return Claim(
        paper="stages compose in any sensible order; a senseless one is refused with the reason",
        measured=fine / len(rows),
        target=1.0,
        unit="share of the pairs that work or are refused with a reason",
        better="higher",
        rows=rows,
        notes=[
            "A pair works where the recipe ends, the folder it wrote opens again, and all logits are finite",
            "Random Llama of 4 blocks with grouped-query heads, bf16; options that keep each stage short",
        ],
    )


def stages() -> list[str]:
    """The slugs of our own stages; those of other packages are theirs to combine."""
    return [m.slug for m in registry.methods().values() if m.card["kind"] == "stage" and m.module.startswith("blockwright.")]


def write_small_model(folder: Path, *, seed: int = 0) -> None:
    """A random model in `folder`/model, and two texts that share no run of words."""
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    write_model(folder / "model", config, blocks_per_file=4, seed=seed)
    write_texts(folder, 256)


def outcome(scratch: Path, names: list[str], *, seed: int = 0) -> str:
    """WORKS, "refused: " with the reason, or "failed: " with what went wrong, of a recipe with these stages."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        recipe = {
            "model": str(scratch / "model"),
            "stages": [{name: QUICK.get(name, {})} for name in names],
            "out": str(Path(folder) / "out"),
            "seed": seed,
            "calibration": {"text": str(scratch / "learn.txt"), "num": 8, "length": 16},
            "evaluation": {"text": str(scratch / "judge.txt"), "num": 2, "length": 16},
            "measure": {"quality": False, "blocks": False, "use": False},
        }
        try:
            blockwright.run(recipe)
            logits = blockwright.load(Path(folder) / "out")(torch.arange(16)[None]).logits
        except BlockwrightError as error:
            return f"refused: {error}"
        except Exception as error:  # whatever a stage raises is what this looks for
            return f"failed: {type(error).__name__}: {error}"
    return WORKS if bool(torch.isfinite(logits).all()) else "failed: logits that are not finite"
