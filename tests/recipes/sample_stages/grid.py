"""Rounding to the nearest point of a grid, symmetric or not: the packed forms."""

from blockwright.blocks import tiles
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.run import Facts, Run, stage
from blockwright.options import Bits, GroupSize, Targets

CARD = {
    "slug": "sample-grid",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "A sample",
    "summary": "rounding",
    "saves": "weight bytes",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "packed",
    "writes": "compressed-tensors pack-quantized",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


@stage
def sample_grid(
    run: Run,
    *,
    bits: Bits = 4,
    group_size: GroupSize = 32,
    symmetric: bool = True,
    targets: Targets = ["Linear"],
    ignore: Targets = [],
    overrides: dict[str, dict[str, int]] = {},
) -> None:
    """Round every targeted linear.

    bits : of a weight. group_size : inputs that share a scale. symmetric : without zero points.
    targets : what to round. ignore : what not. overrides : other options for some layers, by the end of their name.
    """

    def round_block(block, x, y, rng) -> Facts:
        for name, linear in block.linears(targets, ignore).items():
            own = next((values for end, values in overrides.items() if name.endswith(end)), {})
            b, g = own.get("bits", bits), own.get("group_size", group_size)
            weight = linear.weight if hasattr(linear, "in_features") else linear.weight.T
            zero = None
            if symmetric:
                scale = tiles.symmetric_scale(weight, bits=b, group_size=g)
            else:
                scale, zero = tiles.asymmetric_grid(weight, bits=b, group_size=g)
            codes = tiles.to_codes(weight, scale, zero, bits=b, group_size=g)
            block.swap(name, PackedLinear.of(linear, codes, scale, zero, bits=b, group_size=g))
        return {}

    run.blocks(round_block, write=True)


def plan(*, block_parameters: int, tokens: int, **options) -> dict:
    group = options["group_size"]
    return {"copies": 3, "passes": 0, "bits": options["bits"] + (0 if group == -1 else 32 / group)}
