"""A method whose claim never ends by itself."""

CARD = {
    "slug": "example-slow",
    "room": "search",
    "kind": "search",
    "arxiv": "0000.00000",
    "title": "A slow example",
    "summary": "sleeps",
    "saves": "nothing",
    "needs": [],
    "writes": "nothing",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


def example_slow(*, seconds: int = 60) -> None:
    """Sleep."""
