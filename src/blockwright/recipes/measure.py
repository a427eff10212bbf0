"""What a model is worth, before and after: quality beside the dense model, error of each block, bytes, speed, memory, samples."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blockwright import meter
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.stream import Stream
from blockwright.errors import BlockwrightError


class Judge:
    """Compares models with the dense one on the same held-out windows, block by block, so that no model need fit in memory.

    ids : evaluation windows [n, T]. hidden : the dense model's final hidden states, if known already (a resumed run).
    """

    def __init__(self, dense: Blueprint, ids: Int[Tensor, "n T"], *, hidden: Float[Tensor, "n T d"] | None = None, batch: int = 8) -> None:
        self.dense, self.ids, self.batch = dense, ids, batch
        self.stream = Stream(dense, ids, batch=batch)
        self.hidden = self.stream.final_hidden(dense) if hidden is None else hidden

    def quality(self, model: Blueprint) -> dict[str, float]:
        """perplexity, nll (nats a token), kl (dense || model, nats a token), top1 (agreement with dense), tokens."""
        same = model.tensors.places == self.dense.tensors.places
        stream = self.stream if same else Stream(model, self.ids, batch=self.batch)
        hidden = self.hidden if same else stream.final_hidden(model)
        quality = meter.Quality()
        if same:
            for rows, logits in stream.logits(model, hidden):
                quality.add(logits, self.ids[rows])
            return quality.result()
        pairs = zip(stream.logits(model, hidden), self.stream.logits(self.dense, self.hidden), strict=True)
        for (rows, logits), (_, dense_logits) in pairs:
            quality.add(logits, self.ids[rows], dense_logits)
        return quality.result()

    @torch.no_grad()
    def block_errors(self, model: Blueprint, *, samples: int = 2) -> dict[int, float]:
        """For each block of the dense model: ||treated(x) - dense(x)||^2 / ||dense(x) - x||^2 on the dense model's own inputs x.

        1 is what dropping the block costs (a dropped block hands on its input). x: the first `samples` windows.
        """
        stream = Stream(self.dense, self.ids[:samples], batch=self.batch)
        treated = Stream(model, self.ids[:samples], batch=self.batch)
        place_of = {dense: new for new, dense in enumerate(model.origin or range(stream.num_blocks))}
        x, errors = stream.embedded, {}
        for i in range(stream.num_blocks):
            y = stream.block(self.dense, i).outputs(x)
            mine = treated.block(model, place_of[i]).outputs(x) if i in place_of else x
            errors[i] = float((mine - y).square().sum() / (y - x).square().sum().clamp(min=1e-30))
            x = y
        return errors


def use(folder: Path, prompts: list[str], *, new_tokens: int = 48, repeats: int = 3) -> dict[str, Any]:
    """Open a model folder in a process of its own and use it: decoding speed, peak memory, what it writes.

    Returns tokens_per_second (median of `repeats` runs, batch 1, greedy), peak_memory (bytes, VmHWM above torch and transformers loaded),
    samples (continuations of the prompts). Raises BlockwrightError where the folder cannot be used, with what was said.
    """
    job = json.dumps({"folder": str(folder), "prompts": prompts, "new_tokens": new_tokens, "repeats": repeats})
    done = subprocess.run([sys.executable, "-m", __name__], input=job, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BlockwrightError(f"{folder}: could not be used ({last})", do="Open it with bw.load to see more")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _use(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from blockwright.recipes.load import load

    before = meter.high_water()
    model = load(job["folder"], check=False)
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=False, local_files_only=True)
    samples = [_continue(model, tokenizer, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    ids = tokenizer("The", return_tensors="pt").input_ids
    steps = job["new_tokens"]

    def decode() -> None:
        model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)

    seconds = meter.time(decode, repeats=job["repeats"], warmup=1).median
    return {"tokens_per_second": steps / seconds, "peak_memory": meter.high_water() - before, "samples": samples}


def _continue(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    else:
        text = prompt
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    print(json.dumps(_use(json.loads(sys.stdin.read()))))
