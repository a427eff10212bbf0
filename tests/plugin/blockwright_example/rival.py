"""Takes a slug that is taken."""

CARD = {
    "slug": "finequant",
    "room": "compress",
    "kind": "data",
    "arxiv": "0000.00000",
    "title": "A rival",
    "summary": "",
    "saves": "",
    "needs": [],
    "writes": "",
    "claim": {"figure": "none", "against": "none", "where": "nowhere"},
}


def finequant() -> None:
    """Nothing."""
