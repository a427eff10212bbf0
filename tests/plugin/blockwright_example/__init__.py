"""A package outside blockwright that adds methods."""
