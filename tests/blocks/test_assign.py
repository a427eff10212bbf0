"""One treatment for every part: against every choice there is, and against a dynamic programme over bytes."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from blockwright.blocks.assign import Alternative, Assignment, Item, assign
from blockwright.blocks.budget import choose
from blockwright.errors import BlockwrightError

quick = settings(deadline=None, max_examples=150)


def builds(alternative):
    """Every way to build an alternative: the items, the cost, the amounts."""
    for items in itertools.product(*(range(len(part)) for part in alternative.parts)):
        chosen = [alternative, *(part[i] for part, i in zip(alternative.parts, items, strict=True))]
        yield items, sum(one.cost for one in chosen), [sum(column) for column in zip(*(one.amounts for one in chosen), strict=True)]


def every_choice(slots, tied=(), needs=()):
    """The picks, the cost and the amounts of every choice that ties and needs allow."""
    ways = [[(a, *build) for a, alternative in enumerate(slot) for build in builds(alternative)] for slot in slots]
    for choice in itertools.product(*ways):
        taken = {(s, a) for s, (a, *_) in enumerate(choice)}
        if all((one in taken) == (other in taken) for one, other in tied) and all(b in taken or a not in taken for a, b in needs):
            totals = [sum(column) for column in zip(*(amounts for *_, amounts in choice), strict=True)]
            yield tuple((a, items) for a, items, _, _ in choice), sum(cost for _, _, cost, _ in choice), totals


def totals_of(slots, picks):
    ways = [next(build for build in builds(slot[a]) if build[0] == items) for slot, (a, items) in zip(slots, picks, strict=True)]
    return sum(cost for _, cost, _ in ways), tuple(sum(column) for column in zip(*(amounts for *_, amounts in ways), strict=True))


def dynamic_programming(slots, limit):
    """The least cost within one budget: for each number of bytes, what the slots so far cost at least with no more of them."""

    def add(best, options):  # one of these goes to every number of bytes
        new = np.full(limit + 1, np.inf)
        for cost, size in options:
            if size <= limit:
                new[size:] = np.minimum(new[size:], best[: limit + 1 - size] + cost)
        return new

    best = np.zeros(limit + 1)
    for slot in slots:
        ways = []
        for cost, (size,), parts in slot:
            way = add(best, [(cost, size)])
            for part in parts:
                way = add(way, [(item.cost, item.amounts[0]) for item in part])
            ways.append(way)
        best = np.minimum.reduce(ways)
    return best[limit]


def random_slots(rng, num, num_alternatives, num_parts, num_items, num_budgets, *, most=12):
    """Small integers as costs, so that totals are exact and ties abound."""

    def one():
        return float(rng.integers(-9, 10)), tuple(rng.integers(0, most, num_budgets).tolist())

    def part():
        return tuple(Item(*one()) for _ in range(rng.integers(1, num_items + 1)))

    return [
        [
            Alternative(*one(), tuple(part() for _ in range(rng.integers(0, num_parts + 1))))
            for _ in range(rng.integers(1, num_alternatives + 1))
        ]
        for _ in range(num)
    ]


def random_pairs(rng, slots, num):
    def place():
        s = int(rng.integers(len(slots)))
        return s, int(rng.integers(len(slots[s])))

    return [(place(), place()) for _ in range(num)]


@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 4),
    num_budgets=st.integers(0, 2),
    num_tied=st.integers(0, 2),
    num_needs=st.integers(0, 2),
    tight=st.floats(0, 1),
)
@quick
def test_no_choice_there_is_costs_less(seed, num, num_budgets, num_tied, num_needs, tight):
    rng = np.random.default_rng(seed)
    slots = random_slots(rng, num, 3, 2, 3 if num < 4 else 2, num_budgets)
    tied, needs = random_pairs(rng, slots, num_tied), random_pairs(rng, slots, num_needs)
    all_choices = list(every_choice(slots, tied, needs))
    amounts = [[totals[k] for _, _, totals in all_choices] or [0] for k in range(num_budgets)]
    budgets = [int(min(each) + tight * (max(each) - min(each))) for each in amounts]
    costs = [cost for _, cost, totals in all_choices if all(map(int.__le__, totals, budgets))]
    if costs:
        got = assign(slots, budgets, tied=tied, needs=needs)
        assert got.cost == min(costs) and got.gap == 0
        assert (got.picks, got.cost, list(got.amounts)) in [(picks, c, totals) for picks, c, totals in all_choices]
        assert all(map(int.__le__, got.amounts, budgets))
        return
    with pytest.raises(BlockwrightError) as error:
        assign(slots, budgets, tied=tied, needs=needs)
    if not all_choices:
        assert "ties and needs leave no choice" in str(error.value)
        return
    least = []
    for k in range(num_budgets):
        others = [j for j in range(num_budgets) if j != k]
        least.append(min((totals[k] for _, _, totals in all_choices if all(totals[j] <= budgets[j] for j in others)), default="none"))
    assert f"at least {', '.join(map(str, least))}." in str(error.value)


@pytest.mark.parametrize("seed", range(4))
def test_the_dynamic_programme_over_bytes_costs_the_same(seed):
    rng = np.random.default_rng(seed)
    slots = []
    for _ in range(20):
        worth = rng.lognormal(0, 1)
        widths = rng.uniform(0.2, 1, rng.integers(1, 4))
        alternatives = [
            Alternative(
                worth * (1 - width) * rng.uniform(0, 0.1),
                (int(rng.integers(0, 4)),),
                tuple(
                    tuple(
                        Item(worth * 4.0**-bits * rng.lognormal(0, 0.3), (int(n * width * bits),))
                        for bits in rng.uniform(1, 8, rng.integers(1, 9))
                    )
                    for n in rng.integers(2, 20, rng.integers(0, 5))
                ),
            )
            for width in widths
        ]
        slots.append([*alternatives, Alternative(worth * rng.uniform(0.01, 2), (0,))])
    largest = sum(max(sum(max(i.amounts[0] for i in part) for part in alternative.parts) for alternative in slot) for slot in slots)
    for share in (0.0, 0.02, 0.15, 0.4):
        limit = int(share * largest)
        got = assign(slots, [limit])
        assert got.cost == pytest.approx(dynamic_programming(slots, limit), rel=1e-9)
        assert got.amounts[0] <= limit and (got.cost, got.amounts) == (
            pytest.approx(totals_of(slots, got.picks)[0]),
            totals_of(slots, got.picks)[1],
        )


def test_by_hand():
    part = (Item(0.0, (8,)), Item(1.0, (4,)), Item(3.0, (2,)))  # 8, 4 and 2 bits
    wide, narrow, gone = Alternative(0.0, (1,), (part, part)), Alternative(1.5, (1,), (part,)), Alternative(9.0, (0,))
    slots = [[wide, narrow, gone], [wide, gone]]
    assert assign(slots, [34]) == (((0, (0, 0)), (0, (0, 0))), 0.0, (34,), 0.0)
    assert assign(slots, [33]).cost == 1.0  # one of the four parts to 4 bits
    got = assign(slots, [24])  # the narrow one with 8 bits takes 9, the wide one with 8 and 4 takes 13
    assert (got.cost, got.amounts, got.picks[0], got.picks[1][0]) == (2.5, (22,), (1, (0,)), 0)
    assert assign(slots, [0]) == (((2, ()), (1, ())), 18.0, (0,), 0.0)
    assert assign(slots, [24], tied=[((0, 1), (1, 1))]).cost == 3.0  # narrow only where the other slot is gone: three parts to 4 bits
    assert assign(slots, [0], needs=[((0, 2), (1, 1))]).cost == 18.0
    assert assign([[wide]], [16]).picks[0][0] == 0


def test_a_tie_holds_both_ways_and_a_need_one_way():
    pair = [[Alternative(0.0, ()), Alternative(cost, ())] for cost in (-1.0, 3.0)]
    assert assign(pair, []).picks == ((1, ()), (0, ()))
    assert assign(pair, [], tied=[((0, 1), (1, 1))]).picks == ((0, ()), (0, ()))  # -1 + 3 costs more than nothing
    assert assign(pair, [], needs=[((0, 1), (1, 1))]).picks == ((0, ()), (0, ()))
    assert assign(pair, [], needs=[((1, 1), (0, 1))]).picks == ((1, ()), (0, ()))
    assert assign(pair, [], tied=[((0, 1), (1, 1)), ((0, 1), (0, 1))]).cost == 0.0


def test_nothing_to_choose():
    assert assign([], []) == Assignment((), 0.0, (), 0.0)
    assert assign([], [5, 6]) == Assignment((), 0.0, (0, 0), 0.0)
    assert assign([[Alternative(2.0, (3,))]], [3]) == Assignment(((0, ()),), 2.0, (3,), 0.0)


def test_of_equal_items_the_first_and_never_the_larger_is_picked():
    part = (Item(1.0, (5, 5)), Item(1.0, (3, 4)), Item(1.0, (3, 4)), Item(1.0, (4, 3)), Item(2.0, (3, 3)))
    for budget, item in (((9, 9), 1), ((9, 3), 3), ((3, 3), 4)):
        assert assign([[Alternative(0.0, (0, 0), (part,))]], budget).picks == ((0, (item,)),) or item == 1
    got = assign([[Alternative(0.0, (0, 0), (part[:3],))]], [9, 9])
    assert got.picks == ((0, (1,)),) and got.amounts == (3, 4)


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-30, 30), factor=st.integers(1, 10**9), shift=st.integers(-5, 5))
@example(seed=63819445, power=0, factor=1, shift=0)  # the least of one budget and that of the other are two choices' here
@settings(deadline=None, max_examples=40)
def test_units_and_what_all_alternatives_share_do_not_matter(seed, power, factor, shift):
    rng = np.random.default_rng(seed)
    slots = random_slots(rng, 5, 3, 3, 4, 2)
    some = [min((amounts for a in slot for *_, amounts in builds(a)), key=sum) for slot in slots]
    budgets = [20 + sum(amounts[k] for amounts in some) for k in range(2)]  # which one choice keeps together

    def change(one, extra):
        return (one.cost + extra * shift) * 2.0**power, tuple(factor * (amount + extra) for amount in one.amounts)

    other = [
        [Alternative(*change(a, 1), tuple(tuple(Item(*change(item, 0)) for item in part) for part in a.parts)) for a in slot]
        for slot in slots
    ]
    want = assign(slots, budgets)
    got = assign(other, [factor * (budget + 5) + factor - 1 for budget in budgets])
    assert got.cost == (want.cost + 5 * shift) * 2.0**power and got.gap == want.gap == 0


def test_alternatives_without_parts_are_the_options_of_choose():
    rng = np.random.default_rng(0)
    costs, sizes = rng.random((40, 7)).tolist(), rng.integers(1, 10**6, (40, 7)).tolist()
    limit = sum(map(min, sizes)) + 5 * 10**6
    slots = [[Alternative(c, (s,)) for c, s in zip(*both, strict=True)] for both in zip(costs, sizes, strict=True)]
    assert assign(slots, [limit]).cost == pytest.approx(choose(costs, sizes, limit).cost, rel=1e-9)


@pytest.mark.parametrize("power", [0, 7, 11, 14])
def test_one_unit_decides_whatever_the_magnitude(power):
    unit = 10**power
    part = (Item(0.0, (unit + 1, unit + 1)), Item(1.0, (unit, unit)))
    dear = (Item(0.0, (unit + 1, unit + 1)), Item(2.0, (unit, unit)))
    slots = [[Alternative(0.0, (1, 0), (part, dear)), Alternative(5.0, (0, 0), (part, dear))], [Alternative(0.0, (0, 0), (part,))]]
    for room, cost in (
        ((4, 3), 0.0),
        ((3, 3), 1.0),
        ((2, 3), 2.0),
        ((1, 3), 4.0),
        ((4, 2), 1.0),
        ((4, 1), 2.0),
        ((4, 0), 4.0),
        ((0, 0), 9.0),
    ):
        got = assign(slots, [3 * unit + room[0], 3 * unit + room[1]])
        assert got.cost == cost and got.amounts[0] <= 3 * unit + room[0] and got.amounts[1] <= 3 * unit + room[1]
    with pytest.raises(BlockwrightError, match=f"at least {3 * unit}, none"):
        assign(slots, [3 * unit - 1, 3 * unit])


@pytest.mark.parametrize("seed", range(20))
def test_totals_over_a_budget_by_less_than_the_tolerance_of_the_solver_are_not_taken(seed):
    rng = np.random.default_rng(seed)

    def part():  # beside nothing at all, amounts that differ by less than a billionth of the largest
        amounts = 10**12 + rng.integers(0, 6, (3, 2))
        return (Item(99.0, (0, 0)), *(Item(float(rng.integers(0, 9)), tuple(each)) for each in amounts.tolist()))

    def alternative():
        return Alternative(float(rng.integers(0, 9)), (0, 0), tuple(part() for _ in range(rng.integers(1, 3))))

    slots = [[alternative(), alternative()] for _ in range(2)]
    all_choices = list(every_choice(slots))
    reached = all_choices[rng.integers(len(all_choices))][2]
    got = assign(slots, reached)
    assert got.cost == min(cost for _, cost, totals in all_choices if all(map(int.__le__, totals, reached)))
    assert all(map(int.__le__, got.amounts, reached))


@pytest.mark.parametrize("terrible", [1e3, 1e9, 1e15])
@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_small_costs_count_beside_terrible_ones(terrible, unit):
    rng = np.random.default_rng(0)
    slots = []
    for _ in range(8):
        parts = [[Item(float(c) * unit, (int(n),)) for c, n in zip(rng.random(4), rng.integers(2, 20, 4), strict=True)] for _ in range(2)]
        parts = [(*part, Item(terrible * unit, (1,))) for part in parts]
        slots.append([Alternative(0.0, (0,), tuple(parts)), Alternative(terrible * unit, (0,))])
    limit = sum(min(item.amounts[0] for item in part[:-1]) for slot in slots for part in slot[0].parts) + 20
    want = dynamic_programming(slots, limit)
    assert want < 20 * unit
    assert assign(slots, [limit]).cost == pytest.approx(want, rel=1e-9)


def many(seed, num_slots, num_items, *, linear=False):
    """Slots like a model's: the whole, three narrower ones, nothing; treatments whose cost falls fourfold with each bit.

    linear : instead costs are nearly a function of bytes, whatever is chosen: the hard case.
    """
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.uniform(1.5, 8, num_items))
    slots = []
    for _ in range(num_slots):
        worth, sizes = rng.lognormal(0, 1, 4), rng.choice([576 * 192, 576 * 576, 576 * 1536], 4)
        slot = []
        for width in (1.0, 0.75, 0.5, 0.25, 0.0):
            cost = worth.sum() * (4.0**-3.5 * (1 - width) * rng.uniform(1, 6) if width else rng.uniform(0.02, 0.3))
            if linear:
                cost = 1e-6 * (8 - 8 * width) * sizes.sum() * rng.uniform(1, 1.02)
            parts = []
            for n, w in zip(sizes * width, worth * width, strict=True):
                costs = 1e-6 * n * (8 - bits) if linear else w * 4.0**-bits
                costs = (costs * rng.lognormal(0, 0.01 if linear else 0.1, num_items)).tolist()
                both = (n / 8 * bits, n * (0.3 + bits / 16) * rng.uniform(0.6, 1.4, num_items))
                amounts = zip(*(each.astype(int).tolist() for each in both), strict=True)
                parts.append(tuple(itertools.starmap(Item, zip(costs, amounts, strict=True))))
            slot.append(Alternative(float(cost), (1000, 2000) if width else (0, 0), tuple(parts) if width else ()))
        slots.append(slot)
    totals = [sum(sum(max(i.amounts[k] for i in part) for part in slot[0].parts) for slot in slots) for k in range(2)]
    return slots, [int(0.35 * totals[0]), int(0.36 * totals[1])]


def bound(slots, budgets):
    """No choice costs less, whatever the prices: what is taken of a budget is paid for, and what there is of it refunded."""
    values = [
        [(np.array([a.cost, *a.amounts]), [np.array([(i.cost, *i.amounts) for i in part]) for part in a.parts]) for a in s] for s in slots
    ]

    def refunded(prices):
        paid = np.array([1.0, *np.abs(prices)])
        least = [min(own @ paid + sum((part @ paid).min() for part in parts) for own, parts in slot) for slot in values]
        return sum(least) - np.abs(prices) @ budgets

    found = minimize(lambda prices: -refunded(prices), [1e-8, 1e-8], method="Nelder-Mead", options={"xatol": 1e-12, "maxfev": 150})
    return -found.fun


def test_the_largest_size_is_solved_within_ten_seconds():
    slots, budgets = many(0, 60, 20)
    start = time.perf_counter()
    got = assign(slots, budgets, gap=1e-3)
    assert time.perf_counter() - start < 10
    cheapest = sum(min(a.cost + sum(min(i.cost for i in part) for part in a.parts) for a in slot) for slot in slots)
    best = bound(slots, budgets)
    assert got.amounts[0] <= budgets[0] and got.amounts[1] <= budgets[1]
    assert best <= got.cost <= best + 1e-3 * (got.cost - cheapest)
    assert got.gap <= 1e-3 * (got.cost - cheapest) and best <= got.cost - got.gap * 0.999


@pytest.mark.parametrize("seed", range(3))
def test_a_gap_is_kept_and_told(seed):
    slots, budgets = many(seed, 8, 6, linear=True)
    close, best = assign(slots, budgets, gap=0.05), assign(slots, budgets)
    cheapest = sum(min(a.cost + sum(min(i.cost for i in part) for part in a.parts) for a in slot) for slot in slots)
    assert best.gap == 0 < close.gap <= 0.05 * (close.cost - cheapest)
    assert close.cost - close.gap <= best.cost <= close.cost


# what is refused


PART = (Item(0.0, (5, 1)), Item(1.0, (2, 2)))


@pytest.mark.parametrize(
    "slots, budgets, pairs, said",
    [
        ([[]], [1], {}, "slot 0 has no alternative. Allowed: at least 1"),
        ([[Alternative(0.0, (1,), (PART[:0],))]], [1], {}, "slot 0, alternative 0, part 0 has no item. Allowed: at least 1"),
        ([[Alternative(0.0, (1,))]], [1, 2], {}, "slot 0, alternative 0: 1 amounts. Allowed: one for each of the 2 budgets"),
        (
            [[Alternative(0.0, (1,), (PART,))]],
            [1],
            {},
            "slot 0, alternative 0, part 0, item 0: 2 amounts. Allowed: one for each of the 1 budgets",
        ),
        ([[Alternative(0.0, ()), Alternative(math.nan, ())]], [], {}, "slot 0, alternative 1: cost nan. Allowed: finite numbers"),
        ([[Alternative(0.0, (), ((Item(0.0, ()), Item(math.inf, ())),))]], [], {}, "slot 0, alternative 0, part 0, item 1: cost inf"),
        ([[Alternative(0.0, (-1,))]], [1], {}, "slot 0, alternative 0: amounts (-1,). Allowed: integers >= 0"),
        ([[Alternative(0.0, (0,), ((Item(0.0, (-2,)),),))]], [1], {}, "part 0, item 0: amounts (-2,). Allowed: integers >= 0"),
        ([[Alternative(0.0, (1.5,))]], [1], {}, "amounts (1.5,). Allowed: integers >= 0"),
        ([], [-1], {}, "budgets=[-1]. Allowed: integers >= 0"),
        ([[Alternative(0.0, ())]], [], {"tied": [((0, 0), (1, 0))]}, "tied: there is no slot 1 with an alternative 0"),
        ([[Alternative(0.0, ())]], [], {"needs": [((0, -1), (0, 0))]}, "needs: there is no slot 0 with an alternative -1"),
        ([[Alternative(0.0, ())]], [], {"needs": [((0, 1), (0, 0))]}, "needs: there is no slot 0 with an alternative 1"),
        ([[Alternative(0.0, ()), Alternative(0.0, ())]], [], {"gap": -0.1}, "gap=-0.1. Allowed: a share >= 0"),
        ([[Alternative(0.0, ())]], [], {"gap": math.nan}, "gap=nan"),
        ([[Alternative(0.0, ())] * 2], [], {"tied": [((0, 0), (0, 1))]}, "ties and needs leave no choice"),
        ([[Alternative(0.0, (1,))] * 2] * 2, [0], {"tied": [((0, 0), (0, 1)), ((1, 0), (1, 1))]}, "ties and needs leave no choice"),
        (
            [[Alternative(0.0, (3, 1), (PART,))]] * 2,
            [9, 9],
            {},
            "budgets=[9, 9]: no choice keeps them all. Allowed: with the others as they are, at least 10, none",
        ),
        ([[Alternative(0.0, (3, 1), (PART,))]] * 2, [12, 4], {}, "at least 16, 6"),
        ([[Alternative(0.0, (3, 1), (PART,))]] * 2, [12, 5], {}, "at least 13, 6"),
        ([[Alternative(0.0, (9,)), Alternative(1.0, (2,))]] * 2, [10], {"tied": [((0, 0), (1, 1))]}, "at least 11"),
    ],
)
def test_what_cannot_be_is_refused(slots, budgets, pairs, said):
    with pytest.raises(BlockwrightError) as error:
        assign(slots, budgets, **pairs)
    assert said in str(error.value)


def test_numpy_integers_do_not_overflow_and_fractions_of_a_byte_are_refused():
    half = np.int64(2**62)
    got = assign([[Alternative(np.float64(0.0), (half,))]] * 4, [2**64])
    assert got.amounts == (2**64,) and type(got.amounts[0]) is int and type(got.cost) is float
    with pytest.raises(BlockwrightError, match=f"at least {2**64}"):
        assign([[Alternative(0.0, (half,))]] * 4, [2**64 - 1])
    with pytest.raises(Exception, match=r"(?i)integers|type-check"):
        assign([[Alternative(0.0, (1,))]], [1.0])  # or by the checker of types that tests may run under
