"""Programs in binary variables, solved exactly by HiGHS through scipy in spite of its tolerances."""

import math
from collections.abc import Hashable, Sequence
from operator import le
from typing import Any

import numpy as np

Number = int | float


def least(
    costs: Sequence[Number],
    limits: Sequence[tuple[Sequence[int], int]],
    structure: Sequence[Any],
    groups: Sequence[Hashable],
    *,
    gap: float = 0.0,
) -> tuple[list[int], float] | None:
    """The variables that are 1 where the total cost is least, and how far below it the best may lie; None where nothing is allowed.

    costs : of each variable, finite and >= 0. limits : for each an amount of each variable, integers >= 0, and what their total may be;
        never exceeded. structure : scipy's `LinearConstraint`s, of small integers. groups : of each variable; two of a group are never 1.
    gap : 0 proves the total least; else the search stops once at most this share of it could still be saved.

    HiGHS works with tolerances (1e-6 on total cost, rows and integers), and fails on numbers above 1e9, so three things are done. Costs and
    amounts are scaled by powers of two, which loses no digit; costs again where a first solution shows that the largest of them cannot be
    part of the best. And a choice that is over a limit by no more than the tolerance is cut off, together with all those that take as much
    in every group.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost = np.array(costs, dtype=float)
    rows = [_at_most(amounts, limit) for amounts, limit in limits]
    useful = np.ones(len(cost), dtype=bool)
    while True:
        largest = cost[useful].max()
        scale = _power_of_two(largest, 20)
        solution = milp(
            np.where(useful, cost, 0.0) * scale,
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, useful.astype(float)),
            constraints=[*structure, *(LinearConstraint(np.array(row, dtype=float), -np.inf, most) for row, most in rows)],
            options={"mip_rel_gap": gap},
        )
        if solution.x is None:
            return None
        chosen = np.flatnonzero(solution.x > 0.5).tolist()
        over = [amounts for amounts, limit in limits if sum(amounts[v] for v in chosen) > limit]
        for amounts in over:
            taken = {groups[v]: amounts[v] for v in chosen}
            rows.append(([amount >= taken.get(group, math.inf) for amount, group in zip(amounts, groups, strict=True)], len(chosen) - 1))
        total = math.fsum(costs[v] for v in chosen)
        if over:
            continue
        useful &= cost <= total
        if cost[useful].max() < largest / 1024:
            continue
        missing = total * scale - solution.mip_dual_bound
        return chosen, missing / scale if missing > 2e-6 else 0.0


def _at_most(amounts: Sequence[int], limit: int) -> tuple[list[float], float]:
    """The scaled row of a limit, and its right side."""
    unit = math.gcd(*amounts) or 1
    counts = [amount // unit for amount in amounts]
    scale = _power_of_two(max(counts), 10)
    return [count * scale for count in counts], min(limit // unit, sum(counts)) * scale


def _power_of_two(largest: Number, exponent: int) -> float:
    """The power of two that brings `largest` below 2**exponent; 1 for 0."""
    return math.ldexp(1.0, exponent - math.frexp(largest)[1]) if largest else 1.0


def undominated(rows: Sequence[Sequence[Number]]) -> list[int]:
    """Which rows no other equals or beats in every number (of equal ones the first), ordered by their numbers."""
    kept: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: tuple(rows[i])):
        if not any(all(map(le, rows[k], rows[i])) for k in kept):
            kept.append(i)
    return kept
