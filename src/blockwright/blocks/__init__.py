"""Primitives: a tensor, a network or a sequence as blocks. Knows nothing of methods."""
