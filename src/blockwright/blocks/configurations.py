"""Configurations: a width in bits for each unit of a model. How they are drawn with a mean, scored, and the best one found in a budget."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from blockwright.blocks import budget as budgets
from blockwright.blocks.run import Progress, silent
from blockwright.errors import BlockwrightError

Choice = tuple[int, ...]  # the width, in bits, of each unit

MORE, VERIFIED, ROUNDS = 50, 5, 4  # samples in the narrowed space; candidates that a fit proposes; fits at most
NARROWED = 4  # one unit in so many is fixed at either end
NEAR = 0.2  # of the range of sizes: configurations so far from the budget count 1/e in the fit


@lru_cache(maxsize=4096)
def categorical(widths: Choice, mean: float) -> list[float]:
    """The probabilities of the widths, ascending, of the largest entropy among those with this mean: proportional to exp(theta width).

    Raises BlockwrightError for a mean outside the widths.
    """
    low, high = widths[0], widths[-1]
    if not low <= mean <= high:
        raise BlockwrightError(f"a mean width of {mean}", allowed=f"{low} to {high}")
    if mean - low < 1e-12 or high - mean < 1e-12:
        end = low if mean - low < 1e-12 else high
        return [float(b == end) for b in widths]

    def law(theta: float) -> list[float]:
        weights = [math.exp(theta * (b - (high if theta > 0 else low))) for b in widths]
        return [w / sum(weights) for w in weights]

    below, above = -60.0, 60.0
    for _ in range(80):
        theta = (below + above) / 2
        if sum(p * b for p, b in zip(law(theta), widths, strict=True)) < mean:
            below = theta
        else:
            above = theta
    return law((below + above) / 2)


def draw(rng: torch.Generator, num_units: int, widths: Choice, mean: float) -> Choice:
    """A width for each unit, independently, from `categorical`."""
    law = torch.tensor(categorical(widths, mean), dtype=torch.float64, device=rng.device)
    return tuple(widths[i] for i in torch.multinomial(law, num_units, replacement=True, generator=rng).tolist())


def survey(
    score: Callable[[Choice], float],
    num_units: int,
    widths: Choice,
    rng: torch.Generator,
    *,
    num: int = 100,
    progress: Progress = silent,
) -> dict[Choice, float]:
    """Scores (lower is better) of `num` random configurations, with means spread evenly from the smallest width to the largest."""
    seen: dict[Choice, float] = {}
    for i in range(num):
        progress("scoring configurations", i, num)
        mean = widths[0] + (widths[-1] - widths[0]) * i / max(num - 1, 1)
        _look(score, seen, draw(rng, num_units, widths, mean))
    progress("scoring configurations", num, num)
    return seen


def search(
    score: Callable[[Choice], float],
    seen: dict[Choice, float],
    sizes: Sequence[Sequence[int]],
    limit: int,
    widths: Choice,
    rng: torch.Generator,
    *,
    solver: Literal["ilp", "samples"] = "ilp",
) -> Choice:
    """The configuration of the least score found among those whose sizes sum to at most `limit`.

    seen : scores that are known; more are added. sizes : for each unit that of each width, integers, ascending.
    samples, the paper's: scores are correlated with the width of each unit; the quarter of the units that matter least is fixed at the
    smallest width, the quarter that matters most at the largest as far as that takes half of the budget's room, and 50 configurations that
    fill it are scored.
    ilp: after that, an additive model is fitted to the scores, those near the budget counting most, and five configurations at or around
    its optimum, by an exact program, are scored; up to four times, as long as that finds a better one.
    Raises BlockwrightError where even the smallest configuration exceeds the limit.
    """
    if sum(row[0] for row in sizes) > limit:
        raise BlockwrightError(
            f"a budget of {limit}", allowed=f"at least {sum(row[0] for row in sizes)}, the size of the smallest sub-model"
        )

    def size(choice: Choice) -> int:
        return sum(row[widths.index(b)] for row, b in zip(sizes, choice, strict=True))

    def best() -> Choice:
        return min((c for c in seen if size(c) <= limit), key=lambda c: (seen[c], c))

    for choice in _narrowed(seen, sizes, limit, widths, rng):
        _look(score, seen, choice)
    if solver == "samples":
        return best()
    for _ in range(ROUNDS):
        before = best()
        for choice in _proposed(seen, before, sizes, limit, widths):
            _look(score, seen, choice)
        if best() == before:
            break
    return best()


def _look(score: Callable[[Choice], float], seen: dict[Choice, float], choice: Choice) -> None:
    if choice not in seen:
        seen[choice] = score(choice)


def _narrowed(
    seen: Mapping[Choice, float], sizes: Sequence[Sequence[int]], limit: int, widths: Choice, rng: torch.Generator
) -> Iterable[Choice]:
    """Configurations that fill the budget, with the units that matter least at the smallest width, those that matter most at the largest.

    A unit matters by minus the correlation of the scores with its width, both without what the mean width explains: it varies so much that
    all units would look alike.
    """
    table, scores = np.array(list(seen), dtype=float), np.array(list(seen.values()))
    explains = np.vander(table.mean(1), 3)  # the mean width to the powers 2, 1 and 0
    left = [v - explains @ np.linalg.lstsq(explains, v, rcond=None)[0] for v in (table, scores)]
    norm = np.linalg.norm(left[0], axis=0) * np.linalg.norm(left[1])
    sensitivity = -(left[0].T @ left[1]) / np.where(norm > 0, norm, 1.0)
    order, quarter, last = sensitivity.argsort(kind="stable").tolist(), len(sizes) // NARROWED, len(widths) - 1
    fixed = dict.fromkeys(order[:quarter], 0)
    room = limit - sum(row[0] for row in sizes)
    least = room / 2
    for u in reversed(order[len(order) - quarter :]):
        extra = sizes[u][last] - sizes[u][0]
        if room - extra >= least:
            fixed[u], room = last, room - extra
    free = [u for u in range(len(sizes)) if u not in fixed]
    whole = sum(sizes[u][last] - sizes[u][0] for u in free)
    mean = widths[0] + (widths[-1] - widths[0]) * (min(1.0, room / whole) if whole else 0.0)
    for _ in range(MORE):
        drawn = dict(zip(free, draw(rng, len(free), widths, mean), strict=True)) if free else {}
        picks = [fixed[u] if u in fixed else widths.index(drawn[u]) for u in range(len(sizes))]
        total = sum(row[i] for row, i in zip(sizes, picks, strict=True))
        shuffled = [free[i] for i in torch.randperm(len(free), generator=rng).tolist()] * last
        for u in shuffled:  # down until it fits
            if total > limit and picks[u] > 0:
                total -= sizes[u][picks[u]] - sizes[u][picks[u] - 1]
                picks[u] -= 1
        for u in shuffled:  # and up as long as it does
            if picks[u] < last and total + sizes[u][picks[u] + 1] - sizes[u][picks[u]] <= limit:
                total += sizes[u][picks[u] + 1] - sizes[u][picks[u]]
                picks[u] += 1
        yield tuple(widths[i] for i in picks)


def _proposed(seen: Mapping[Choice, float], best: Choice, sizes: Sequence[Sequence[int]], limit: int, widths: Choice) -> list[Choice]:
    """New configurations that an additive model of the scores puts first: its optimum within the budget, and those that differ from it or
    from the best one so far in two units at most.

    The model: a constant, and for each unit a step >= 0 at each width that it stays below the next; least squares.
    """
    from scipy.optimize import nnls

    picked = np.array([[widths.index(b) for b in c] for c in seen])
    units, last = np.arange(len(sizes)), len(widths) - 1
    table = np.array(sizes)
    extent = max(1, int((table[:, last] - table[:, 0]).sum()))
    weight = np.exp(-np.square((table[units, picked].sum(1) - limit) / (NEAR * extent)))
    below = (picked[:, :, None] <= np.arange(last)).reshape(len(picked), -1)
    design = np.column_stack([np.ones(len(picked)), below])
    steps = nnls(design * weight[:, None], np.array(list(seen.values())) * weight)[0][1:].reshape(len(sizes), last)
    costs = np.column_stack([steps[:, i:].sum(1) for i in range(len(widths))])
    optimum = budgets.choose(costs.tolist(), sizes, limit).picks
    found: dict[tuple[int, ...], float] = {}
    for start in (optimum, tuple(widths.index(b) for b in best)):
        cost, room = costs[units, start].sum(), limit - table[units, start].sum()
        grows, dearer = table - table[units, start][:, None], costs - costs[units, start][:, None]  # of each change of one unit
        for u, v in itertools.combinations_with_replacement(range(len(sizes)), 2):
            for i, j in itertools.product(range(last + 1), repeat=2) if u < v else ((i, start[u]) for i in range(last + 1)):
                if grows[u, i] + (grows[v, j] if u < v else 0) <= room:
                    picks = [*start]
                    picks[u] = i
                    picks[v] = j if u < v else i
                    found[tuple(picks)] = float(cost + dearer[u, i] + (dearer[v, j] if u < v else 0))
    ranked = sorted(found, key=lambda picks: (found[picks], picks))
    fresh = (choice for picks in ranked if (choice := tuple(widths[i] for i in picks)) not in seen)
    return list(itertools.islice(fresh, VERIFIED))
