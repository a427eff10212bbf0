"""Drops blocks and lets others share weights: the edits of structure."""

from blockwright.blocks.run import Run, stage

CARD = {
    "slug": "sample-fold",
    "room": "compress",
    "kind": "stage",
    "arxiv": "0000.00000",
    "title": "A sample",
    "summary": "drops and shares",
    "saves": "blocks",
    "needs": [],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "dense safetensors",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


@stage
def sample_fold(run: Run, *, drop: list[int] = [], share: dict[int, int] = {}) -> None:
    """Drop blocks, then let some take the matrices of another.

    drop : blocks that go. share : block -> the one whose matrices it takes, counted after dropping.
    """
    count = run.model.config.num_hidden_layers
    if drop:
        run.model = run.model.with_layers([i for i in range(count) if i not in drop])
    if share:
        run.model = run.model.with_shared(share, own=lambda name: "norm" in name)


def plan(*, block_parameters: int, tokens: int, drop: list[int] = [], share: dict[int, int] = {}, **options) -> dict:
    return {"copies": 1, "passes": 0, "bits": None}
