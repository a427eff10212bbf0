"""A small language model trained on the spot, and the texts around it: for claims that a real model would take too long for."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from blockwright import zoo


def texts(
    num: int, length: int = 128
) -> tuple[Int[Tensor, " n"], Int[Tensor, "num length"], Int[Tensor, "num length"], Int[Tensor, "m length"]]:
    """Bytes of the Python language reference to train on [n]; windows to learn from, to choose options by, and to evaluate on.

    No byte is in two of them, and the last shares no run of 20 words with the others; m = 4 num.
    """

    def encoded(part: Any) -> Tensor:
        return torch.tensor(list(zoo.text("pydoc", part).encode("ascii", "replace")))

    ours, theirs = encoded("calibration"), encoded("evaluation")
    held_out = 2 * num * length
    calibration, tuning = ours[-held_out:].view(2, num, length)
    return ours[:-held_out], calibration, tuning, theirs[: 2 * held_out].view(-1, length)


def trained(
    ids: Int[Tensor, " n"], *, layers: int, steps: int, seed: int, batch: int = 16, length: int = 128, heads: int = 4, kv_heads: int = 4
) -> nn.Module:
    """A Llama of width 128 that has learned to predict the next byte, in eval mode, without gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=length, **sizes))
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length, (batch, 1), generator=rng)
        rows = ids[starts + torch.arange(length)]
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
