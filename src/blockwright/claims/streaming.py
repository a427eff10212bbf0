"""The claim that a model larger than memory goes through the main job: its weights lie in files, and one block at a time is resident."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from blockwright import meter
from blockwright.blocks import layers
from blockwright.claims.runner import Claim, Measured, Plot

LIMIT = 1.2e9  # bytes above the interpreter with torch and transformers loaded
WORDS = 90
STAGES: dict[str, dict[str, Any]] = {"finequant": {"bits": 4, "group_size": 64}, "dsnot": {"mask_structure": "2:4"}}
LOADED = """
import sys, torch, transformers
from transformers import AutoTokenizer, LlamaForCausalLM
import blockwright.recipes.execute, blockwright.compress.dsnot, blockwright.compress.finequant
"""
JOB = "import json, blockwright\nblockwright.run(json.loads(sys.argv[1]))\n"


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """Peak resident memory of the main job on a random bf16 Llama of 3.1 GB: int4 weights, and calibrated 2:4 pruning."""
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=34,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    with tempfile.TemporaryDirectory(prefix="blockwright-") as scratch:
        write_model(Path(scratch) / "model", config, blocks_per_file=5, seed=seed)
        found = peaks(Path(scratch), STAGES)
    whole = found["bytes"]
    rows = [{"stage": stage} | numbers for stage, numbers in found["stages"].items()]
    worst = max(rows, key=lambda row: row["peak_bytes"])
    parts = [
        Measured(name=f"peak of {r['stage']}", measured=r["peak_bytes"], target=LIMIT, unit="bytes", better="lower", baseline=whole)
        for r in rows
    ]
    return Claim(
        paper="one block is resident: memory does not grow with the depth of the model",
        measured=worst["peak_bytes"],
        target=LIMIT,
        unit="bytes above the interpreter with torch and transformers",
        better="lower",
        baseline=whole,
        parts=parts,
        rows=rows,
        plot=Plot(
            kind="bar",
            title="Peak memory of the main job on a model of 3.1 GB",
            x="",
            y="GB above the interpreter",
            series={"": [(r["stage"], r["peak_bytes"] / 1e9) for r in rows] + [("the model's weights", whole / 1e9)]},
            target=LIMIT / 1e9,
        ),
        notes=[
            f"Random bf16 weights, {config.num_hidden_layers} blocks of d 2048 and ffn 5632 in files of 5; each stage is a job of its own",
            "A main job is one child: reading, the dense model's perplexity, the stage with its journal, writing the folder",
            f"The interpreter with torch, transformers and blockwright takes {found['loaded'] / 1e6:.0f} MB; VmHWM, mapped pages included",
        ],
    )


def peaks(scratch: Path, stages: Mapping[str, Mapping[str, Any]], *, length: int = 64, setup: str = "") -> dict[str, Any]:
    """Run a main job for each stage on `scratch`/model, in a child, and delete what it wrote.

    length : tokens in each of the 2 windows of calibration and evaluation. setup : code that the child runs first.
    Returns loaded (peak bytes of a child that only imports), bytes (of the model's weights), and stages: for each one peak_bytes (above
    `loaded`), seconds, written_bytes and bits (of a written weight, all tensors together).
    """
    write_texts(scratch, 4 * length)
    loaded = meter.peak_rss("-c", LOADED)
    weights = sum(p.stat().st_size for p in (scratch / "model").glob("*.safetensors"))
    found = {}
    for stage, options in stages.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            out = Path(folder) / "out"
            recipe = {
                "model": str(scratch / "model"),
                "stages": [{stage: dict(options)}],
                "out": str(out),
                "calibration": {"text": str(scratch / "learn.txt"), "num": 2, "length": length},
                "evaluation": {"text": str(scratch / "judge.txt"), "num": 2, "length": length},
                "measure": {"quality": False, "blocks": False, "use": False},
            }
            peak: list[int] = []
            seconds = meter.time(lambda: peak.append(meter.peak_rss("-c", LOADED + setup + JOB, json.dumps(recipe))), repeats=1, warmup=0)  # noqa: B023
            written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        found[stage] = {
            "peak_bytes": peak[0] - loaded,
            "seconds": round(seconds.median, 1),
            "written_bytes": written,
            "bits": 16 * written / weights,
        }
    return {"loaded": loaded, "bytes": weights, "stages": found}


def write_texts(folder: Path, words: int) -> None:
    """learn.txt and judge.txt, of that many words each; they share no run of 20."""
    for name, step in (("learn", 1), ("judge", 7)):
        (folder / f"{name}.txt").write_text(" ".join(f"w{(i * i + step * i) % WORDS}" for i in range(words)))


def write_model(folder: Path, config: LlamaConfig, *, blocks_per_file: int, seed: int = 0) -> None:
    """A random bf16 model folder with a tokenizer of whole words w0, w1, ...; one file at a time is in memory."""
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    words = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    shapes = {name: p.shape for name, p in layers.skeleton(config).named_parameters()}
    blocks = config.num_hidden_layers
    parts = [
        [f"model.layers.{i}." for i in range(start, min(start + blocks_per_file, blocks))] for start in range(0, blocks, blocks_per_file)
    ]
    files = [[name for name in shapes if name.startswith(tuple(prefixes))] for prefixes in parts]
    files.append([name for name in shapes if not name.startswith("model.layers.")])
    rng = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {n: torch.ones(shapes[n]) if len(shapes[n]) == 1 else 0.02 * torch.randn(shapes[n], generator=rng) for n in names}
        save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
