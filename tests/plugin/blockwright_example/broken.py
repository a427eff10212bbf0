"""A card that is no plain literal."""

CARD = dict(slug="example-broken")
