"""Int4/int8 weights with one scale per group of inputs, for small-batch decoding that is bound by weight bytes. Needs no data.

FineQuant, arXiv 2308.09723. Re-measure its claim: `blockwright reproduce finequant`.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import tiles
from blockwright.blocks.layers import selected
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block
from blockwright.options import GroupSize, Targets

CARD = {
    "slug": "finequant",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2308.09723",
    "title": "FineQuant: fine-grained weight-only quantisation",
    "summary": "int8/int4 weights with a scale per group of inputs",
    "saves": "weight bytes: 2x (int8) to 3.8x (int4)",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "packed",
    "writes": "compressed-tensors pack-quantized",
    "claim": {"figure": "up to 3.65x throughput", "against": "16-bit weights on the same GPUs", "where": "abstract, OPT-175B"},
}


@stage
def finequant(
    run: Run,
    *,
    bits: int = 4,
    group_size: GroupSize = 64,
    targets: Targets = ["Linear"],
    ignore: Targets = [],
    overrides: dict[str, dict[str, Any]] = {},
) -> None:
    """Replace every targeted linear by packed codes with a scale per group."""

    def pack_block(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        for name, linear in block.linears(targets, ignore).items():
            chosen = {"bits": bits, "group_size": group_size}
            for pattern, values in overrides.items():
                if selected(name, linear, [pattern], []):
                    chosen |= values
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            scale = tiles.symmetric_scale(weight, bits=chosen["bits"], group_size=chosen["group_size"], dtype=torch.bfloat16)
            codes = tiles.to_codes(weight, scale, bits=chosen["bits"], group_size=chosen["group_size"])
            block.swap(name, PackedLinear.of(linear, codes, scale, bits=chosen["bits"], group_size=chosen["group_size"]))
        return {}

    run.blocks(pack_block, write=True)


def accelerate(model: nn.Module) -> nn.Module:
    return model


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    group = options["group_size"]
    return {"copies": 3, "passes": 0, "bits": options["bits"] + (0 if group == -1 else 16 / group)}
