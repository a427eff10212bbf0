"""Budgets: the choice against brute force and dynamic programming, shares against bisection in floats."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockwright.blocks.budget import allocate, choose, choose_within
from blockwright.errors import BlockwrightError

quick = settings(deadline=None, max_examples=60)


@st.composite
def problems(draw, blocks=4, options=4, size=30):
    """costs, sizes and a budget that the smallest options keep."""
    shape = draw(st.lists(st.integers(1, options), min_size=1, max_size=blocks))
    costs = [[draw(st.integers(-50, 50)) / 4 for _ in range(n)] for n in shape]
    sizes = [[draw(st.integers(0, size)) for _ in range(n)] for n in shape]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return costs, sizes, draw(st.integers(least, most + 3))


def brute_force(costs, sizes, limit):
    """The least cost of all choices that keep the budget."""
    every = itertools.product(*(range(len(c)) for c in costs))
    totals = [(sum(c[i] for c, i in zip(costs, p, strict=True)), sum(s[i] for s, i in zip(sizes, p, strict=True))) for p in every]
    return min(cost for cost, size in totals if size <= limit)


def dynamic_programming(costs, sizes, limit):
    """The least cost, exactly: for each total size that can be, the least cost as a Fraction."""
    best = {0: Fraction(0)}
    for c, s in zip(costs, sizes, strict=True):
        new: dict[int, Fraction] = {}
        for (size, cost), (more, dearer) in itertools.product(best.items(), zip(s, c, strict=True)):
            if size + more <= limit and cost + Fraction(dearer) < new.get(size + more, math.inf):
                new[size + more] = cost + Fraction(dearer)
        best = new
    return min(best.values())


def test_a_choice_by_hand():  # the two cheapest need 10 + 9 > 15; giving way in block 0 costs 1, in block 1 costs 2
    assert choose([[0.0, 1.0], [5.0, 2.0, 0.0]], [[10, 4], [1, 5, 9]], 15) == ((1, 2), 1.0, 13, 0.0)
    assert choose([[0.0, 1.0], [5.0, 2.0, 0.0]], [[10, 4], [1, 5, 9]], 19) == ((0, 2), 0.0, 19, 0.0)
    assert choose([[0.0, 1.0], [5.0, 2.0, 0.0]], [[10, 4], [1, 5, 9]], 5) == ((1, 0), 6.0, 5, 0.0)


def test_no_blocks_one_block_one_option():
    assert choose([], [], 0) == ((), 0.0, 0, 0.0)
    assert choose([[3.5]], [[7]], 7) == ((0,), 3.5, 7, 0.0)
    assert choose([[3.5, -1.0]], [[0, 0]], 0) == ((1,), -1.0, 0, 0.0)
    assert choose([[0.0], [0.0]], [[0], [0]], 0) == ((0, 0), 0.0, 0, 0.0)


@given(problems())
@quick
def test_no_choice_is_cheaper(problem):
    costs, sizes, limit = problem
    picks, cost, size, gap = choose(costs, sizes, limit)
    assert cost == sum(c[i] for c, i in zip(costs, picks, strict=True)) == brute_force(costs, sizes, limit)  # quarters: exact in floats
    assert size == sum(s[i] for s, i in zip(sizes, picks, strict=True)) <= limit and gap == 0


@pytest.mark.parametrize("seed", range(12))
def test_more_blocks_against_dynamic_programming(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 50, (25, 6)).tolist()
    costs = rng.normal(size=(25, 6)).tolist()
    limit = int(rng.integers(sum(map(min, sizes)), sum(map(max, sizes))))
    assert choose(costs, sizes, limit).cost == pytest.approx(float(dynamic_programming(costs, sizes, limit)), abs=1e-10)


@pytest.mark.parametrize("power", range(3, 16))
def test_sizes_of_any_magnitude_where_one_unit_decides(power):  # HiGHS alone fails from 1e9 on, and goes over by less than its tolerance
    for seed in range(25):
        rng = np.random.default_rng(100 * power + seed)
        sizes = rng.integers(0, 10**power, (int(rng.integers(1, 7)), 3)).tolist()
        costs = [[-float(size) for size in block] for block in sizes] if seed % 2 else rng.random((len(sizes), 3)).tolist()
        limit = max(sum(int(rng.choice(block)) for block in sizes) - seed % 3 % 2, sum(map(min, sizes)))
        choice = choose(costs, sizes, limit)
        assert choice.size <= limit
        assert choice.cost == pytest.approx(float(dynamic_programming(costs, sizes, limit)), rel=1e-9)


@pytest.mark.parametrize("terrible", [1e3, 1e9, 1e15])
@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_small_costs_count_beside_terrible_ones(terrible, unit):
    rng = np.random.default_rng(0)
    costs = (rng.random((8, 4)) * unit).tolist()
    sizes = rng.integers(2, 40, (8, 4)).tolist()
    for c, s in zip(costs, sizes, strict=True):
        c.append(terrible * unit)  # the smallest option: dropping the block
        s.append(1)
    limit = sum(min(s[:-1]) for s in sizes) + 20
    want = float(dynamic_programming(costs, sizes, limit))
    assert want < 10 * unit
    assert choose(costs, sizes, limit).cost == pytest.approx(want, rel=1e-9)


@given(problems(), st.integers(-30, 30))
@quick
def test_the_unit_of_cost_does_not_matter(problem, power):
    costs, sizes, limit = problem
    scaled = [[c * 2.0**power for c in block] for block in costs]
    one, other = choose(costs, sizes, limit), choose(scaled, sizes, limit)
    assert one.picks == other.picks and other.cost == one.cost * 2.0**power


@given(problems(), st.integers(1, 10**9))
@quick
def test_the_unit_of_size_does_not_matter(problem, factor):
    costs, sizes, limit = problem
    larger = [[s * factor for s in block] for block in sizes]
    assert choose(costs, larger, limit * factor + factor - 1).picks == choose(costs, sizes, limit).picks


@given(problems(), st.randoms(use_true_random=False))
@quick
def test_the_order_of_blocks_and_options_does_not_matter(problem, random):
    costs, sizes, limit = problem
    blocks = random.sample(range(len(costs)), len(costs))
    orders = [random.sample(range(len(costs[b])), len(costs[b])) for b in blocks]
    mixed = [[[x[b][i] for i in order] for b, order in zip(blocks, orders, strict=True)] for x in (costs, sizes)]
    assert choose(*mixed, limit).cost == choose(costs, sizes, limit).cost


@given(problems(), st.integers(0, 20))
@quick
def test_more_room_never_costs_more(problem, more):
    costs, sizes, limit = problem
    assert choose(costs, sizes, limit + more).cost <= choose(costs, sizes, limit).cost


def test_of_equal_costs_the_smallest_is_picked():
    assert choose([[1.0, 1.0, 1.0], [0.0, 0.0]], [[5, 3, 4], [9, 8]], 100) == ((1, 1), 1.0, 11, 0.0)


def test_210_blocks_of_12_options_in_two_seconds():
    rng = np.random.default_rng(0)
    bits = np.array([2, 2.25, 2.5, 3, 3.25, 3.5, 4, 4.25, 5, 6, 8, 16])
    sizes = (rng.choice([576 * 576, 576 * 192, 576 * 1536], (210, 1)) * bits / 8).astype(int).tolist()
    costs = (4.0**-bits * rng.lognormal(0, 1, (210, 1)) * rng.lognormal(0, 0.1, (210, 12))).tolist()
    start = time.perf_counter()
    choice = choose(costs, sizes, int(0.3 * sum(map(max, sizes))))
    assert time.perf_counter() - start < 2 and choice.gap == 0


def test_a_gap_is_kept_and_told():  # cost is nearly a function of size: the hard case
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 10**6, (210, 12))
    costs = (10**6 - sizes) / 1e6 + rng.random((210, 12)) * 1e-3
    limit = int(0.3 * sizes.max(1).sum())
    close = choose(costs.tolist(), sizes.tolist(), limit, gap=1e-6)
    above = close.cost - costs.min(1).sum()
    assert 0 < close.gap <= 1e-6 * above * 1.01 and close.size <= limit
    # the linear program over single price multipliers bounds every choice from below: max over price of min cost + price * (size - limit)
    prices = np.linspace(0.9e-6, 1.1e-6, 2001)
    bound = max((costs + p * sizes).min(1).sum() - p * limit for p in prices)
    assert close.cost - close.gap >= bound - 1e-6 and close.cost >= bound


@pytest.mark.parametrize(
    "costs, sizes, limit, said",
    [
        ([[1.0, 2.0], [1.0]], [[5, 3], [4]], 6, "budget=6: the smallest options of all blocks together need 7. Allowed: at least 7"),
        ([], [], -1, "at least 0"),
        ([[1.0]], [[1], [2]], 9, "costs of 1 blocks, sizes of 2"),
        ([[1.0], [1.0, 2.0]], [[1], [2]], 9, "block 1 has 2 costs and 1 sizes"),
        ([[1.0], []], [[1], []], 9, "block 1 has 0 costs"),
        ([[1.0], [math.nan]], [[1], [2]], 9, "costs of block 1"),
        ([[math.inf]], [[1]], 9, "costs of block 0"),
        ([[1.0]], [[-1]], 9, "a size is negative"),
    ],
)
def test_wrong_choices_are_refused(costs, sizes, limit, said):
    with pytest.raises(BlockwrightError) as error:
        choose(costs, sizes, limit)
    assert said in str(error.value)


def test_a_negative_gap_and_fractions_of_a_byte_are_refused():
    with pytest.raises(BlockwrightError, match="gap=-1"):
        choose([[1.0]], [[1]], 1, gap=-1.0)
    with pytest.raises(BlockwrightError, match="gap=nan"):
        choose([[1.0]], [[1]], 1, gap=math.nan)
    for sizes, limit in (([[1.5]], 9), ([[1]], 9.0)):
        with pytest.raises(Exception, match=r"(?i)not an integer|type-check"):
            choose([[1.0]], sizes, limit)  # or by the checker of types that tests may run under


# shares


def real_shares(weights, total, lower, upper):
    """clip(t * w, lower, upper) by bisection on t, in fp64."""
    w, low, high = (np.array(x, float) for x in (weights, lower, upper))
    a, b = 0.0, 1e12
    for _ in range(400):
        t = (a + b) / 2
        a, b = (t, b) if np.clip(t * w, low, high).sum() < total else (a, t)
    return np.clip(b * w, low, high)


@st.composite
def divisions(draw, least_weight=0.5):
    n = draw(st.integers(1, 9))
    weights = [draw(st.floats(least_weight, 100, allow_subnormal=False)) for _ in range(n)]
    lower = [draw(st.integers(0, 10)) for _ in range(n)]
    upper = [low + draw(st.integers(0, 40)) for low in lower]
    return weights, draw(st.integers(sum(lower), sum(upper))), lower, upper


def test_shares_by_hand():
    assert allocate([1.0, 2.0, 3.0], 10, upper=10) == [2, 3, 5]  # 1.67, 3.33, 5: the unit left over goes to the largest remainder
    assert allocate([1.0, 2.0, 3.0], 12, upper=5) == [2, 5, 5]  # 2, 4, 6: 6 is cut to 5, the rest 7 is divided 1 : 2 = 2.33, 4.67
    assert allocate([1.0, 2.0, 3.0], 12, lower=3, upper=12) == [3, 4, 5]  # 2 is raised to 3; 9 as 2 : 3 is 3.6, 5.4
    assert allocate([1.0, 1.0, 1.0], 5, upper=9) == [2, 2, 1]  # equal remainders: the first ones
    assert allocate([0.5, 0.5], 1536, upper=1536, granularity=128) == [768, 768]
    assert allocate([1.0, 2.0], 384, upper=384, granularity=128) == [128, 256]


def test_nothing_one_and_zero_weights():
    assert allocate([], 0, upper=5) == []
    assert allocate([0.0], 3, upper=5) == [3]
    assert allocate([0.0, 0.0, 1.0], 10, upper=4) == [3, 3, 4]  # zero weights get what the others cannot take
    assert allocate([0.0, 0.0, 1.0], 3, upper=4) == [0, 0, 3]
    assert allocate([0.0, 1.0], 5, lower=[2, 0], upper=9) == [2, 3]
    assert allocate([1.0, 1.0], 0, upper=3) == [0, 0]


@given(divisions())
@quick
def test_shares_are_near_the_real_ones_and_their_sum_is_exact(division):
    weights, total, lower, upper = division
    got = allocate(weights, total, lower=lower, upper=upper)
    want = real_shares(weights, total, lower, upper)
    assert sum(got) == total and all(low <= g <= high for low, g, high in zip(lower, got, upper, strict=True))
    assert all(abs(g - w) < 1 + 1e-6 for g, w in zip(got, want, strict=True))


@given(divisions())
@settings(deadline=None, max_examples=30)
def test_no_rounding_is_nearer_in_the_sum_of_squares(division):
    weights, total, lower, upper = division
    assume(len(weights) <= 6)
    want = real_shares(weights, total, lower, upper)
    both = itertools.product(*((math.floor(w + 1e-9), math.ceil(w - 1e-9)) for w in want))
    best = min(sum((c - w) ** 2 for c, w in zip(counts, want, strict=True)) for counts in both if sum(counts) == total)
    got = allocate(weights, total, lower=lower, upper=upper)
    assert sum((g - w) ** 2 for g, w in zip(got, want, strict=True)) == pytest.approx(best, abs=1e-6)


@given(divisions(), st.integers(1, 7), st.integers(-40, 40))
@quick
def test_units_of_shares_and_weights_do_not_matter(division, granularity, power):
    weights, total, lower, upper = division
    plain = allocate(weights, total, lower=lower, upper=upper)
    coarse = [[v * granularity for v in bound] for bound in (lower, upper)]
    widened = [[max(v - granularity + 1, 0) for v in coarse[0]], [v + granularity - 1 for v in coarse[1]]]  # narrowed back to multiples
    for low, high in (coarse, widened):
        got = allocate([w * 2.0**power for w in weights], total * granularity, lower=low, upper=high, granularity=granularity)
        assert got == [v * granularity for v in plain]


@given(divisions(), st.randoms(use_true_random=False))
@quick
def test_shares_follow_their_items(division, random):
    weights, total, lower, upper = division
    assume(len(set(weights)) == len(weights))
    shares = real_shares(weights, total, lower, upper) % 1
    assume(all(abs(a - b) > 1e-6 for a, b in itertools.combinations(shares, 2) if max(a, b) > 1e-6))  # equal remainders go to the first
    order = random.sample(range(len(weights)), len(weights))
    mixed = allocate([weights[i] for i in order], total, lower=[lower[i] for i in order], upper=[upper[i] for i in order])
    assert mixed == [allocate(weights, total, lower=lower, upper=upper)[i] for i in order]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"weights": [1.0, 2.0], "total": 9, "upper": 4}, "allocate: total=9. Allowed: 0 to 8"),
        ({"weights": [1.0, 2.0], "total": 1, "lower": 1, "upper": 4}, "Allowed: 2 to 8"),
        ({"weights": [1.0], "total": 100, "upper": 200, "granularity": 64}, "total=100, granularity=64"),
        ({"weights": [1.0], "total": 0, "upper": 5, "granularity": 0}, "granularity=0"),
        ({"weights": [1.0, -1.0], "total": 1, "upper": 5}, "finite numbers >= 0"),
        ({"weights": [1.0, math.nan], "total": 1, "upper": 5}, "finite numbers >= 0"),
        ({"weights": [1.0, math.inf], "total": 1, "upper": 5}, "finite numbers >= 0"),
        ({"weights": [1.0, 1.0], "total": 1, "upper": [5]}, "1 upper bounds, 2 weights"),
        ({"weights": [1.0, 1.0], "total": 1, "lower": [0], "upper": 5}, "1 lower"),
        ({"weights": [1.0, 1.0], "total": 1, "lower": [0, 3], "upper": 2}, "bounds of item 1"),
        ({"weights": [1.0], "total": 0, "lower": -4, "upper": 5}, "bounds of item 0"),
        ({"weights": [1.0], "total": 64, "lower": 65, "upper": 127, "granularity": 64}, "bounds of item 0 hold no multiple of 64"),
    ],
)
def test_wrong_divisions_are_refused(arguments, said):
    with pytest.raises(BlockwrightError) as error:
        allocate(arguments.pop("weights"), arguments.pop("total"), **arguments)
    assert said in str(error.value)


def test_a_thousand_items_at_once():
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 2, 1000).tolist()
    start = time.perf_counter()
    assert sum(allocate(weights, 768_000, lower=128, upper=1536, granularity=128)) == 768_000
    assert time.perf_counter() - start < 5


# several budgets


def within(costs, limits, unlike=None, alike=1.0):
    """The least cost of all choices that keep every budget and differ enough from an earlier one, or None."""
    most = math.floor(alike * len(costs))
    fitting = [
        p
        for p in itertools.product(*(range(len(c)) for c in costs))
        if all(sum(s[i] for s, i in zip(sizes, p, strict=True)) <= limit for sizes, limit in limits)
        and (unlike is None or sum(a == b for a, b in zip(p, unlike, strict=True)) <= most)
    ]
    return min((sum(c[i] for c, i in zip(costs, p, strict=True)) for p in fitting), default=None)


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_within_two_budgets_is_cheaper_and_none_is_told(seed):  # ten instances each
    rng = np.random.default_rng(seed)
    for _ in range(10):
        shape = rng.integers(1, 6, rng.integers(1, 7))
        costs = [rng.integers(-20, 20, n).astype(float).tolist() for n in shape]
        sizes = [[rng.integers(0, 30, n).tolist() for n in shape] for _ in range(2)]
        limits = [(s, int(rng.integers(sum(map(min, s)), sum(map(max, s)) + 1))) for s in sizes]
        want = within(costs, limits)
        if want is None:
            with pytest.raises(BlockwrightError, match="no choice keeps them all. Allowed: with the others as they are, at least"):
                choose_within(costs, limits)
            continue
        first = choose_within(costs, limits)
        assert sum(c[i] for c, i in zip(costs, first, strict=True)) == want
        assert all(sum(s[i] for s, i in zip(size, first, strict=True)) <= limit for size, limit in limits)
        other = within(costs, limits, first, 0.8)
        if other is None:
            with pytest.raises(BlockwrightError, match="unlike the earlier ones"):
                choose_within(costs, limits, unlike=[first], alike=0.8)
            continue
        second = choose_within(costs, limits, unlike=[first], alike=0.8)
        assert sum(c[i] for c, i in zip(costs, second, strict=True)) == other
        assert sum(a == b for a, b in zip(first, second, strict=True)) <= 0.8 * len(costs)


@pytest.mark.parametrize("power", [0, 7, 11, 14])
def test_two_budgets_of_any_magnitude_where_one_unit_decides(power):
    unit = 10**power
    sizes = [[unit + 1, unit], [unit + 1, unit]]
    assert choose_within([[0.0, 1.0], [0.0, 2.0]], [(sizes, 2 * unit + 1), (sizes, 2 * unit + 2)]) == (1, 0)
    assert choose_within([[0.0, 1.0], [0.0, 2.0]], [(sizes, 2 * unit)]) == (1, 1)


def test_what_two_budgets_would_need_is_told():
    with pytest.raises(BlockwrightError, match=r"budgets=\[7, 3\]: no choice keeps them all.*at least 8, 4"):
        choose_within([[0.0, 1.0], [0.0, 1.0]], [([[5, 3], [5, 3]], 7), ([[1, 2], [1, 2]], 3)])
    with pytest.raises(BlockwrightError, match=r"alike=1\.5"):
        choose_within([[0.0]], [], alike=1.5)
    assert choose_within([], []) == () and choose_within([[2.0, 1.0]], []) == (1,)
