"""A small language to learn, for the tests that train."""

from functools import cache

import torch

TOKENS = 12


@cache
def text() -> torch.Tensor:
    """Windows [64, 24] of a language in which two tokens decide the next one, nine times in ten."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randint(0, TOKENS, (TOKENS, TOKENS), generator=rng)
    ids = torch.randint(0, TOKENS, (64, 24), generator=rng)
    noise = torch.rand(64, 24, generator=rng) < 0.1
    for t in range(2, 24):
        ids[:, t] = torch.where(noise[:, t], ids[:, t], table[ids[:, t - 1], ids[:, t - 2]])
    return ids
