"""One answer per block under a budget: the exact choice among options, and shares with an exact total.

The choice is the multiple-choice knapsack problem, solved as a mixed-integer program by HiGHS through scipy.
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from blockwright.blocks import binaries
from blockwright.errors import BlockwrightError


class Choice(NamedTuple):
    """One option for each block.

    picks : the index of the option of each block. cost, size : their totals.
    gap : how far below `cost` the best total may still lie, in the unit of cost; 0 where the choice is proven best.
    """

    picks: tuple[int, ...]
    cost: float
    size: int
    gap: float


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, gap: float = 0.0) -> Choice:
    """Pick one option for each block so that the total cost is least and the total size is at most `budget`.

    costs : for each block the cost of each of its options: finite, of any sign and unit.
    sizes : likewise, integers >= 0 (bytes, nanoseconds). Their total is checked in integers: it never exceeds the budget.
    gap : 0 proves the choice best. Where costs are nearly a function of sizes the proof can be slow (210 blocks of 12: 20 s and more, else
        below 0.5 s); gap=1e-6 stops once at most that share of the cost above every block's cheapest option could still be saved (then
        about 1 s, but no bound holds for every input). Python sees no Ctrl-C meanwhile: long solves belong in a child.
    Where two options of a block cost the same, the larger is never picked.
    Raises BlockwrightError where the lists do not match, a value is not allowed, or even the smallest options exceed the budget.
    """
    if not gap >= 0:
        raise BlockwrightError(f"choose: gap={gap}", allowed="a share >= 0")
    exact, limit = _checked(costs, sizes, budget)
    smallest = [min(block) for block in exact]
    if sum(smallest) > limit:
        raise BlockwrightError(
            f"budget={budget}: the smallest options of all blocks together need {sum(smallest)}",
            allowed=f"at least {sum(smallest)}",
            do="Raise the budget or give the blocks smaller options",
        )
    if not costs:
        return Choice((), 0.0, 0, 0.0)
    options = [binaries.undominated(list(zip(size, cost, strict=True))) for size, cost in zip(exact, costs, strict=True)]
    found = _least(costs, options, [(exact, limit)], gap=gap)
    assert found is not None  # the smallest options of all blocks fit
    picks, missing = found
    cost = math.fsum(block[i] for block, i in zip(costs, picks, strict=True))
    size = sum(block[i] for block, i in zip(exact, picks, strict=True))
    return Choice(picks, cost, size, missing)


def choose_within(
    costs: Sequence[Sequence[float]],
    limits: Sequence[tuple[Sequence[Sequence[int]], int]],
    *,
    unlike: Sequence[Sequence[int]] = (),
    alike: float = 1.0,
) -> tuple[int, ...]:
    """Pick one option for each block so that the total cost is least and each of several budgets is kept.

    costs : for each block the cost of each of its options: finite, of any sign and unit.
    limits : pairs of sizes, as `choose` takes them, and the budget of their total; checked in integers.
    unlike : earlier picks; the new ones agree with each of them in at most floor(alike * blocks) blocks.
    Returns the index of the option of each block; the costs are least to about a millionth of the largest.
    Raises BlockwrightError where the lists do not match, a value is not allowed, or no choice is within all limits: with the least total
    that each budget would have to allow while the others hold.
    """
    checked = [_checked(costs, sizes, budget) for sizes, budget in limits]
    if not 0 <= alike <= 1:
        raise BlockwrightError(f"choose_within: alike={alike}", allowed="0 to 1")
    if not costs:
        return ()
    options = [range(len(block)) for block in costs]
    agree = [(picks, math.floor(alike * len(costs))) for picks in unlike]
    found = _least(costs, options, checked, agree)
    if found is not None:
        return found[0]
    needed = []
    for k, (sizes, _) in enumerate(checked):
        best = _least(sizes, options, checked[:k] + checked[k + 1 :], agree)
        needed.append("none" if best is None else str(sum(sizes[b][i] for b, i in enumerate(best[0]))))
    raise BlockwrightError(
        f"budgets={[limit for _, limit in checked]}: no choice keeps them all" + (" and is unlike the earlier ones" if agree else ""),
        allowed=f"with the others as they are, at least {', '.join(needed)}",
        do="Raise a budget or give the blocks smaller options",
    )


def _least(
    costs: Sequence[Sequence[binaries.Number]],
    options: Sequence[Sequence[int]],
    limits: Sequence[tuple[Sequence[Sequence[int]], int]],
    agree: Sequence[tuple[Sequence[int], int]] = (),
    gap: float = 0.0,
) -> tuple[tuple[int, ...], float] | None:
    """The picks of least cost among these options of each block, and how far below it the best may lie; None where there are none.

    agree : picks, and in how many blocks the new ones may agree with them at most.
    """
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    where = [(b, i) for b, block in enumerate(options) for i in block]
    blocks = [b for b, _ in where]

    def above(values: Sequence[Sequence[Any]]) -> list[Any]:  # the least of each block
        least = [min(block) for block in values]
        return [values[b][i] - least[b] for b, i in where]

    one_each = csr_array((np.ones(len(where)), (blocks, np.arange(len(where)))), shape=(len(costs), len(where)))
    structure = [LinearConstraint(one_each, 1, 1)]
    structure += [LinearConstraint(np.array([float(picks[b] == i) for b, i in where]), -np.inf, most) for picks, most in agree]
    rooms = [(above(sizes), limit - sum(min(block) for block in sizes)) for sizes, limit in limits]
    found = binaries.least(above(costs), rooms, structure, blocks, gap=gap)
    return found and (tuple(where[v][1] for v in found[0]), found[1])


def allocate(
    weights: Sequence[float], total: int, *, lower: int | Sequence[int] = 0, upper: int | Sequence[int], granularity: int = 1
) -> list[int]:
    """Divide `total` in proportion to `weights` within bounds, in multiples of `granularity`, to the last unit.

    The real-valued shares are clip(t * weight, lower, upper) with the one t that meets the total; where only zero weights are left, they
    share alike. Shares are then rounded down, and the units left over go to the largest remainders (the first of equal ones).
    weights : finite, >= 0. total : a multiple of granularity.
    lower, upper : one for all or one for each; narrowed to multiples of granularity.
    Returns integers with sum(result) == total, each less than `granularity` from its real-valued share.
    Raises BlockwrightError where a value is not allowed or the bounds do not admit the total.
    """
    n = len(weights)
    if granularity < 1 or total % granularity:
        raise BlockwrightError(f"allocate: total={total}, granularity={granularity}", allowed="granularity >= 1 and total a multiple of it")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise BlockwrightError(f"allocate: weights={list(weights)!r}", allowed="finite numbers >= 0")
    lows, highs = ([bound] * n if isinstance(bound, int) else list(bound) for bound in (lower, upper))
    if not len(lows) == len(highs) == n:
        raise BlockwrightError(
            f"allocate: {len(lows)} lower, {len(highs)} upper bounds, {n} weights", allowed="one bound for all or for each"
        )
    lows = [-(-low // granularity) for low in lows]  # from here on in units of granularity
    highs = [high // granularity for high in highs]
    for i in range(n):
        if not 0 <= lows[i] <= highs[i]:
            raise BlockwrightError(
                f"allocate: the bounds of item {i} hold no multiple of {granularity}", allowed="0 <= lower <= some multiple <= upper"
            )
    units = total // granularity
    if not sum(lows) <= units <= sum(highs):
        least, most = sum(lows) * granularity, sum(highs) * granularity
        raise BlockwrightError(f"allocate: total={total}", allowed=f"{least} to {most}, the sums of the bounds")
    shares = _shares([Fraction(w) for w in weights], units, lows, highs)
    counts = [math.floor(share) for share in shares]
    for i in sorted(range(n), key=lambda i: counts[i] - shares[i])[: units - sum(counts)]:
        counts[i] += 1
    return [count * granularity for count in counts]


def _shares(weights: list[Fraction], total: int, lower: list[int], upper: list[int]) -> list[Fraction]:
    """clip(t * weights, lower, upper) with the sum `total`, exactly. Each round fixes those items whose bound certainly holds."""
    shares = [Fraction(0)] * len(weights)
    free, rest = list(range(len(weights))), Fraction(total)
    while free:
        whole = sum(weights[i] for i in free)
        wanted = {i: rest * weights[i] / whole if whole else rest / len(free) for i in free}
        clipped = {i: min(max(wanted[i], Fraction(lower[i])), Fraction(upper[i])) for i in free}
        pushed = sum(clipped.values()) - rest  # > 0: lower bounds add more than upper ones take, so t will fall and they hold
        fixed = [i for i in free if pushed == 0 or (clipped[i] - wanted[i]) * pushed > 0]
        for i in fixed:
            shares[i] = clipped[i]
            rest -= clipped[i]
        free = [i for i in free if i not in set(fixed)]
    return shares


def _checked(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> tuple[list[list[int]], int]:
    """The sizes and the budget as Python integers, or what is wrong with them."""
    if len(costs) != len(sizes):
        raise BlockwrightError(f"choose: costs of {len(costs)} blocks, sizes of {len(sizes)}", allowed="as many of the one as of the other")
    for b, (c, s) in enumerate(zip(costs, sizes, strict=True)):
        if len(c) != len(s) or not len(c):
            raise BlockwrightError(f"choose: block {b} has {len(c)} costs and {len(s)} sizes", allowed="the same number, at least 1")
        if not all(math.isfinite(v) for v in c):
            raise BlockwrightError(f"choose: costs of block {b} are {list(c)!r}", allowed="finite numbers", do="Leave such options out")
    try:
        exact, limit = [[operator.index(v) for v in block] for block in sizes], operator.index(budget)
    except TypeError:
        raise BlockwrightError("choose: a size or the budget is not an integer", allowed="integers, e.g. bytes or nanoseconds") from None
    if any(v < 0 for block in exact for v in block):
        raise BlockwrightError("choose: a size is negative", allowed="integers >= 0")
    return exact, limit
