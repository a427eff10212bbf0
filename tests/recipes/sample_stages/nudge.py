"""Changes weights by what it sees, by chance, and by training: statistics, random numbers and a loop, all journalled."""

import torch

from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Moments
from blockwright.options import Count

CARD = {
    "slug": "sample-nudge",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "A sample",
    "summary": "moves weights a little",
    "saves": "nothing",
    "needs": ["calibration"],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "dense safetensors",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


@stage
def sample_nudge(run: Run, *, steps: Count = 6) -> None:
    """Scale inputs by their spread, add noise, train a factor.

    steps : of the loop.
    """

    def look(block, x, y, rng) -> Facts:
        seen = block.observe(x, Moments)
        return {name: stat.norm.float() for name, stat in seen.items()}

    def move(block, x, y, rng) -> Facts:
        error = (block.outputs(x) - y).square().mean().item()
        for name, linear in block.linears().items():
            norm = norms[block.index][name]
            columns = 1 + 0.01 * norm / norm.max()
            linear.weight.data *= columns if hasattr(linear, "in_features") else columns[:, None]
            linear.weight.data += 0.001 * torch.randn(linear.weight.shape, generator=rng)
        return {"error": error}

    norms = run.blocks(look, inputs="dense")
    errors = run.blocks(move, inputs="treated", target=True, write=True)
    run.curves["error"] = [e["error"] for e in errors]
    factor = torch.nn.Parameter(torch.ones(len(errors)))
    optimizer = torch.optim.Adam([factor], lr=0.01)
    target = torch.tensor(run.curves["error"])
    run.curves["loss"] = run.train(
        lambda i, rng: (factor - target - torch.rand(1, generator=rng)).square().sum(), optimizer, steps=steps, every=2
    )

    def scale(block, x, y, rng) -> Facts:
        for linear in block.linears().values():
            linear.weight.data *= 1 + 0.01 * factor[block.index].item()
        return {}

    run.blocks(scale, write=True)


def plan(*, block_parameters: int, tokens: int, **options) -> dict:
    return {"copies": 4, "passes": 5, "bits": None}
