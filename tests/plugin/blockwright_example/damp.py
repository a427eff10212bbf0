"""Weights times a factor: the smallest stage there is."""

from blockwright.blocks.run import Facts, Run, stage
from blockwright.options import Rate, Targets

CARD = {
    "slug": "example-damp",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "An example",
    "summary": "weights times a factor",
    "saves": "nothing",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "dense safetensors",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


@stage
def example_damp(run: Run, *, factor: Rate = 0.5, targets: Targets = ["Linear"]) -> None:
    """Multiply every targeted linear.

    factor : what weights are multiplied by,
        a positive number.
    """

    def damp(block, x, y, rng) -> Facts:
        for linear in block.linears(targets, []).values():
            linear.weight.data *= factor
        return {}

    run.blocks(damp, write=True)
