"""One treatment for every part of a model under several budgets at once: an exact choice where the parts themselves are a choice.

A slot (a subblock) is built in one of several ways, the alternatives; each has its own parts (linears), and each part one of several items
(treatments). It is solved as one mixed-integer program: a binary variable for each alternative, one for each item of each of its parts, and
the items of a part add up to its alternative.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from blockwright.blocks import binaries
from blockwright.blocks.binaries import Number
from blockwright.errors import BlockwrightError

Pair = tuple[tuple[int, int], tuple[int, int]]  # twice a slot and one of its alternatives


class Item(NamedTuple):
    """One treatment of one part. cost : what it adds to the total, finite. amounts : what it takes of each budget, integers >= 0."""

    cost: float
    amounts: tuple[int, ...]


class Alternative(NamedTuple):
    """One way to build a slot: what it costs and takes itself, and for each part that exists in it the items to choose from."""

    cost: float
    amounts: tuple[int, ...]
    parts: tuple[tuple[Item, ...], ...] = ()


class Assignment(NamedTuple):
    """What was chosen, and what it costs and takes.

    picks : for each slot its alternative, and for each of its parts the item. cost, amounts : the totals.
    gap : how far below `cost` the best total may still lie, in the unit of cost; 0 where the choice is proven best.
    """

    picks: tuple[tuple[int, tuple[int, ...]], ...]
    cost: float
    amounts: tuple[int, ...]
    gap: float


def assign(
    slots: Sequence[Sequence[Alternative]],
    budgets: Sequence[int],
    *,
    tied: Sequence[Pair] = (),
    needs: Sequence[Pair] = (),
    gap: float = 0.0,
) -> Assignment:
    """Pick an alternative for each slot and an item for each of its parts: the total cost is least, and each budget is kept.

    budgets : bytes, nanoseconds or the like, as many as each `amounts` has. Totals are checked in integers: they never exceed a budget.
    tied : pairs of alternatives of which both are taken or neither. needs : pairs of which the first is taken only where the second is.
    gap : 0 proves the choice best; else the search stops once at most this share of the cost above every slot's cheapest alternative with
        its cheapest items could still be saved. 60 slots of 5 alternatives with 4 parts of 20 items take 1 to 4 s at 1e-3, 2 to 20 s at 0
        (one core; no bound holds for every input). Python sees no Ctrl-C meanwhile: long solves belong in a child.
    Of items of a part that take and cost the same, the first is picked; one that takes more at the same cost never is.
    Raises BlockwrightError where lengths do not match, a value is not allowed, or no choice keeps all budgets: with the least total that
    each would have to allow while the others hold, or that ties and needs alone leave no choice.
    """
    if not gap >= 0:
        raise BlockwrightError(f"assign: gap={gap}", allowed="a share >= 0")
    exact, limits = _checked(slots, budgets, tied, needs)
    if not exact:
        return Assignment((), 0.0, (0,) * len(limits), 0.0)
    program = _program(exact, len(limits), tied, needs)
    rooms = [limit - floor for limit, floor in zip(limits, program.floors, strict=True)]
    found = program.least(program.costs, list(zip(program.amounts, rooms, strict=True)), gap=gap)
    if found is None:
        raise _impossible(program, limits, rooms)
    chosen, missing = found
    picks: list[tuple[int, tuple[int, ...]]] = []
    taken: list[Alternative | Item] = []
    for s, places in itertools.groupby((program.where[v] for v in chosen), key=operator.itemgetter(0)):
        (_, a), *items = places  # the alternative's own variable comes before those of its parts
        picks.append((a, tuple(i for _, _, _, i in items)))
        taken += [exact[s][a], *(exact[s][a].parts[p][i] for _, _, p, i in items)]
    totals = tuple(sum(one.amounts[k] for one in taken) for k in range(len(limits)))
    return Assignment(tuple(picks), math.fsum(one.cost for one in taken), totals, missing)


def _checked(
    slots: Sequence[Sequence[Alternative]], budgets: Sequence[int], tied: Sequence[Pair], needs: Sequence[Pair]
) -> tuple[list[list[Alternative]], list[int]]:
    """The slots and the budgets with Python integers, or what is wrong with them."""
    try:
        limits = [operator.index(budget) for budget in budgets]
    except TypeError:
        raise BlockwrightError(f"assign: budgets={list(budgets)!r}", allowed="integers, e.g. bytes or nanoseconds") from None
    if any(limit < 0 for limit in limits):
        raise BlockwrightError(f"assign: budgets={limits}", allowed="integers >= 0")

    def numbers(one: Alternative | Item, *place: int) -> tuple[float, tuple[int, ...]]:
        named = ", ".join(f"{kind} {at}" for kind, at in zip(("slot", "alternative", "part", "item"), place, strict=False))
        if not math.isfinite(one.cost):
            raise BlockwrightError(f"assign: {named}: cost {one.cost}", allowed="finite numbers", do="Leave it out")
        if len(one.amounts) != len(limits):
            raise BlockwrightError(f"assign: {named}: {len(one.amounts)} amounts", allowed=f"one for each of the {len(limits)} budgets")
        try:
            amounts = tuple(operator.index(amount) for amount in one.amounts)
        except TypeError:
            amounts = (-1,)
        if any(amount < 0 for amount in amounts):
            raise BlockwrightError(f"assign: {named}: amounts {tuple(one.amounts)!r}", allowed="integers >= 0, e.g. bytes or nanoseconds")
        return float(one.cost), amounts

    exact: list[list[Alternative]] = []
    for s, slot in enumerate(slots):
        if not slot:
            raise BlockwrightError(f"assign: slot {s} has no alternative", allowed="at least 1")
        exact.append([])
        for a, alternative in enumerate(slot):
            for p, part in enumerate(alternative.parts):
                if not part:
                    raise BlockwrightError(f"assign: slot {s}, alternative {a}, part {p} has no item", allowed="at least 1")
            parts = [[Item(*numbers(item, s, a, p, i)) for i, item in enumerate(part)] for p, part in enumerate(alternative.parts)]
            exact[s].append(Alternative(*numbers(alternative, s, a), tuple(map(tuple, parts))))
    for name, pairs in (("tied", tied), ("needs", needs)):
        for s, a in itertools.chain.from_iterable(pairs):
            if not (0 <= s < len(exact) and 0 <= a < len(exact[s])):
                raise BlockwrightError(f"assign: {name}: there is no slot {s} with an alternative {a}", allowed="their indices, from 0")
    return exact, limits


class _Program(NamedTuple):
    """The binary program. where : of each variable the slot, the alternative and, where it stands for an item, the part and the item.

    costs, amounts : of each variable, above the least of its part or slot, so that none is below 0.
    floors : what all slots together take of each budget at least. structure : what makes a point a choice, ties and needs included.
    """

    where: list[tuple[int, ...]]
    costs: list[float]
    amounts: list[list[int]]
    floors: list[int]
    structure: Any

    def least(
        self, costs: Sequence[Number], limits: Sequence[tuple[list[int], int]], *, gap: float = 0.0
    ) -> tuple[list[int], float] | None:
        return binaries.least(costs, limits, [self.structure], [place[:3] for place in self.where], gap=gap)


def _program(slots: list[list[Alternative]], num_budgets: int, tied: Sequence[Pair], needs: Sequence[Pair]) -> _Program:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    where: list[tuple[int, ...]] = []
    above: list[tuple[Number, ...]] = []  # of each variable the cost and the amounts
    floors = [0] * num_budgets
    rows: list[tuple[list[int], list[int], float, float]] = []  # variables, variables to subtract, lower and upper bound of the sum
    at: dict[tuple[int, int], int] = {}  # the variable of an alternative
    for s, slot in enumerate(slots):
        parts = [[[(item.cost, *item.amounts) for item in part] for part in alternative.parts] for alternative in slot]
        least = [[_least(part) for part in of_one] for of_one in parts]
        values = [_sum([(one.cost, *one.amounts), *of_one]) for one, of_one in zip(slot, least, strict=True)]
        floor = _least(values)
        floors = [total + int(amount) for total, amount in zip(floors, floor[1:], strict=True)]
        for a, of_one in enumerate(parts):
            at[s, a] = len(where)
            where.append((s, a))
            above.append(_minus(values[a], floor))
            for p, part in enumerate(of_one):
                kept = binaries.undominated(part)
                rows.append((list(range(len(where), len(where) + len(kept))), [at[s, a]], 0, 0))
                where += [(s, a, p, i) for i in kept]
                above += [_minus(part[i], least[a][p]) for i in kept]
        rows.append(([at[s, a] for a in range(len(slot))], [], 1, 1))
    rows += [([at[one]], [at[other]], 0, 0) for one, other in tied]
    rows += [([at[one]], [at[other]], -math.inf, 0) for one, other in needs]
    matrix = csr_array(
        (
            [sign for plus, minus, _, _ in rows for sign in [1.0] * len(plus) + [-1.0] * len(minus)],
            (
                [r for r, (plus, minus, _, _) in enumerate(rows) for _ in plus + minus],
                [v for plus, minus, _, _ in rows for v in plus + minus],
            ),
        ),
        shape=(len(rows), len(where)),
    )
    structure = LinearConstraint(matrix, [low for _, _, low, _ in rows], [high for _, _, _, high in rows])
    costs, *amounts = ([*column] for column in zip(*above, strict=True))
    return _Program(where, costs, amounts, floors, structure)


def _least(rows: Sequence[tuple[Number, ...]]) -> tuple[Number, ...]:
    return tuple(map(min, zip(*rows, strict=True)))


def _sum(rows: Sequence[tuple[Number, ...]]) -> tuple[Number, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def _minus(one: tuple[Number, ...], other: tuple[Number, ...]) -> tuple[Number, ...]:
    return tuple(map(operator.sub, one, other))


def _impossible(program: _Program, limits: list[int], rooms: list[int]) -> BlockwrightError:
    """What each budget would have to allow."""
    if program.least(program.costs, []) is None:
        return BlockwrightError("assign: ties and needs leave no choice", do="Leave some of them out, or add alternatives without any")
    needed = []
    within = list(zip(program.amounts, rooms, strict=True))
    for k, (amounts, floor) in enumerate(zip(program.amounts, program.floors, strict=True)):
        found = program.least(amounts, within[:k] + within[k + 1 :])
        needed.append("none" if found is None else str(floor + sum(amounts[v] for v in found[0])))
    return BlockwrightError(
        f"assign: budgets={limits}: no choice keeps them all",
        allowed=f"with the others as they are, at least {', '.join(needed)}",
        do="Raise a budget or give the slots smaller alternatives",
    )
