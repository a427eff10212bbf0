"""Divides by zero."""

from blockwright.blocks.run import Facts, Run, stage

CARD = {
    "slug": "sample-damage",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "A sample",
    "summary": "damages",
    "saves": "nothing",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "dense safetensors",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


@stage
def sample_damage(run: Run) -> None:
    """Divide every linear by zero."""

    def divide(block, x, y, rng) -> Facts:
        for linear in block.linears().values():
            linear.weight.data /= 0
        return {}

    run.blocks(divide, write=True)


def plan(*, block_parameters: int, tokens: int, **options) -> dict:
    return {"copies": 2, "passes": 0, "bits": None}
