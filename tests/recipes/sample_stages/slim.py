"""Cuts the FFN of each block to a width of its own: linears of a size that no config knows."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks.run import Facts, Run, stage

CARD = {
    "slug": "sample-slim",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "A sample",
    "summary": "narrows",
    "saves": "a part of each FFN",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "our own layout",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}
OUTER = ("gate_proj", "up_proj", "c_fc")  # the rest of an FFN: what reads the intermediate channels


def narrowed(linear: nn.Module, n: int, k: int) -> nn.Module:
    """The first n outputs and k inputs."""
    new = Conv1D(n, k) if isinstance(linear, Conv1D) else nn.Linear(k, n, bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight[: new.weight.shape[0], : new.weight.shape[1]].clone(), requires_grad=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias[:n].clone(), requires_grad=False)
    return new


@stage
def sample_slim(run: Run, *, width: int = 32) -> None:
    """Keep `width` channels of the FFN of block 0, and 8 more in each block after it.

    width : of the first block.
    """

    def cut(block, x, y, rng) -> Facts:
        keep = width + 8 * block.index
        for name, linear in block.linears().items():
            if ".mlp." in name:
                with torch.no_grad():
                    n, k = (keep, 64) if name.endswith(OUTER) else (64, keep)
                    block.swap(name, narrowed(linear, n, k))
        return {}

    run.blocks(cut, write=True)


def plan(*, block_parameters: int, tokens: int, **options) -> dict:
    return {"copies": 2, "passes": 0, "bits": None}
