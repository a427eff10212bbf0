"""Halves the weights of every block, and takes its time over it where the environment says CRAWL."""

import os
import time

from blockwright.blocks.run import Facts, Run, stage
from blockwright.options import Rate

CARD = {
    "slug": "sample-crawl",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "A sample",
    "summary": "sleeps",
    "saves": "nothing",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "dense safetensors",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


@stage
def sample_crawl(run: Run, *, seconds: Rate = 2.0) -> None:
    """Halve every linear, slowly.

    seconds : a block.
    """

    def crawl(block, x, y, rng) -> Facts:
        if "CRAWL" in os.environ:
            time.sleep(seconds)
        for linear in block.linears().values():
            linear.weight.data /= 2
        return {}

    run.blocks(crawl, write=True)


def plan(*, block_parameters: int, tokens: int, **options) -> dict:
    return {"copies": 2, "passes": 0, "bits": None}
