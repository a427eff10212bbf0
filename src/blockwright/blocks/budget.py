"""One answer per block under a budget: the exact choice among options, and shares with an exact total.

The choice is the multiple-choice knapsack problem, solved as a mixed-integer program by HiGHS through scipy.
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

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
    room = limit - sum(smallest)
    if room < 0:
        raise BlockwrightError(
            f"budget={budget}: the smallest options of all blocks together need {sum(smallest)}",
            allowed=f"at least {sum(smallest)}",
            do="Raise the budget or give the blocks smaller options",
        )
    if not costs:
        return Choice((), 0.0, 0, 0.0)
    extra = [[cost - min(block) for cost in block] for block in costs]
    above = [[size - least for size in block] for block, least in zip(exact, smallest, strict=True)]
    picks, missing = _solve(extra, above, room, gap)
    cost = math.fsum(block[i] for block, i in zip(costs, picks, strict=True))
    size = sum(block[i] for block, i in zip(exact, picks, strict=True))
    return Choice(tuple(picks), cost, size, missing)


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
    where = [(b, i) for b, block in enumerate(costs) for i in range(len(block))]
    at = {place: k for k, place in enumerate(where)}
    agree = [(tuple(at[b, i] for b, i in enumerate(picks)), math.floor(alike * len(costs))) for picks in unlike]
    picks = _pick(where, costs, checked, agree)
    if picks is not None:
        return picks
    needed = []
    for k, (sizes, _) in enumerate(checked):
        best = _pick(where, sizes, checked[:k] + checked[k + 1 :], agree)
        needed.append("none" if best is None else str(sum(sizes[b][i] for b, i in enumerate(best))))
    raise BlockwrightError(
        f"budgets={[limit for _, limit in checked]}: no choice keeps them all" + (" and is unlike the earlier ones" if agree else ""),
        allowed=f"with the others as they are, at least {', '.join(needed)}",
        do="Raise a budget or give the blocks smaller options",
    )


def _pick(
    where: list[tuple[int, int]],
    costs: Sequence[Sequence[float]] | Sequence[Sequence[int]],
    limits: Sequence[tuple[list[list[int]], int]],
    agree: list[tuple[tuple[int, ...], int]],
) -> tuple[int, ...] | None:
    """The picks of least cost within the limits, None where there are none. agree : variables of which at most so many may be 1.

    HiGHS keeps a limit to its tolerance only: a choice that is over one in integers is cut off, and the rest is solved again.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n, agree = len(where), list(agree)
    one_each = csr_array((np.ones(n), ([b for b, _ in where], np.arange(n))), shape=(len(costs), n))
    cost = np.array([costs[b][i] for b, i in where], dtype=float)
    rows, most = [], []
    for sizes, limit in limits:
        row = [sizes[b][i] for b, i in where]
        scale = _scale(float(max(row)), 10) if max(row) else 1.0
        rows.append([size * scale for size in row])
        most.append(min(limit, sum(row)) * scale)
    while True:
        cuts = [[float(k in set(together)) for k in range(n)] for together, _ in agree]
        at_most = LinearConstraint(np.array([*rows, *cuts]).reshape(-1, n), -np.inf, [*most, *(count for _, count in agree)])
        solution = milp(
            cost * _scale(float(np.abs(cost).max()) or 1.0, 20),
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), *([at_most] if rows or cuts else [])],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            return None
        chosen = [k for k, value in enumerate(solution.x) if value > 0.5]
        picks = tuple(where[k][1] for k in chosen)
        if all(sum(sizes[b][i] for b, i in enumerate(picks)) <= limit for sizes, limit in limits):
            return picks
        agree.append((tuple(chosen), len(costs) - 1))


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


def _undominated(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The options of a block that no other equals or beats in both cost and size, from the smallest to the largest."""
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (sizes[i], costs[i])):
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return kept


def _solve(costs: list[list[float]], sizes: list[list[int]], room: int, gap: float) -> tuple[list[int], float]:
    """The picks of least total cost with total size <= room, and how much less the best could cost.

    costs, sizes : above those of each block's cheapest and smallest option.

    HiGHS works with tolerances (1e-6 on total cost, rows and integers), and fails on numbers above 1e9, so three things are done. Costs and
    sizes are scaled by powers of two; costs again where a first solution shows that the largest of them cannot be part of the best. And a
    choice that is over the budget by no more than the tolerance is cut off, together with all those that are as large in every block.
    """
    options = [_undominated(c, s) for c, s in zip(costs, sizes, strict=True)]
    unit = math.gcd(*(size for block in sizes for size in block)) or 1
    too_large: list[list[int]] = []  # the sizes of choices that were cut off
    while True:
        where = [(b, i) for b, block in enumerate(options) for i in block]
        largest = max(costs[b][i] for b, i in where)
        scale = _scale(largest, 20)
        solution = _milp(
            [costs[b][i] * scale for b, i in where],
            [b for b, _ in where],
            [sizes[b][i] // unit for b, i in where],
            room // unit,
            [[sizes[b][i] >= least[b] for b, i in where] for least in too_large],
            gap,
        )
        value = dict(zip(where, solution.x, strict=True))
        picks = [max((value[b, i], i) for i in block)[1] for b, block in enumerate(options)]
        picked = [sizes[b][i] for b, i in enumerate(picks)]
        if sum(picked) > room:
            too_large.append(picked)
            continue
        cost = math.fsum(costs[b][i] for b, i in enumerate(picks))
        useful = [[i for i in block if costs[b][i] <= cost] for b, block in enumerate(options)]
        if max(costs[b][i] for b, block in enumerate(useful) for i in block) < largest / 1024:
            options = useful
            continue
        missing = cost - solution.mip_dual_bound / scale
        return picks, missing if missing * scale > 2e-6 else 0.0


def _milp(costs: list[float], blocks: list[int], sizes: list[int], room: int, cuts: list[list[bool]], gap: float) -> Any:
    """One option of each block, total size <= room, and of each cut not in all blocks: the least total cost, by HiGHS."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n, num_blocks = len(costs), blocks[-1] + 1
    one_each = csr_array((np.ones(n), (blocks, np.arange(n))), shape=(num_blocks, n))
    scale = _scale(float(max(sizes)), 10)
    at_most = np.array([[size * scale for size in sizes], *cuts], dtype=float)
    limits = [min(room, sum(sizes)) * scale, *[num_blocks - 1] * len(cuts)]
    solution = milp(
        costs,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(at_most, -np.inf, limits)],
        options={"mip_rel_gap": gap},
    )
    assert solution.x is not None, solution.message  # the smallest options of all blocks always fit
    return solution


def _scale(largest: float, exponent: int) -> float:
    """The power of two that brings `largest` below 2**exponent, so that no digit is lost."""
    return math.ldexp(1.0, exponent - math.frexp(largest)[1])
