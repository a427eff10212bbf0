"""Curves: smoothing by hand, the convex curve against brute force, slopes of polynomials."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.blocks.curves import convex, derivative, smoothed


def test_smoothing_by_hand():
    y = np.array([0.0, 1.0, 0.2, 2.0])
    # weight 1/2, debiased: 0, (0 + 1/2) / (3/4), (1/4 + 0.1) / (7/8), (0.175 + 1) / (15/16); then never down
    want = [0, 2 / 3, 2 / 3, 1.175 * 16 / 15]
    assert smoothed(y, 0.5) == pytest.approx(want) and smoothed(y, 0.0) == pytest.approx([0, 1, 1, 2])


def test_the_convex_curve_lies_below_and_touches():
    y = np.array([0.0, 3.0, 1.0, 2.0, 8.0])
    assert convex(y) == pytest.approx([0, 0.5, 1, 2, 8]) and convex(np.arange(5.0) ** 2) == pytest.approx(np.arange(5.0) ** 2)


def test_the_derivative_is_exact_for_quadratics_and_inside_for_quartics():
    a = np.arange(101) / 100
    assert derivative(3 * a**2 - a) == pytest.approx(6 * a - 1, abs=1e-9)
    assert derivative(a**4)[4:-4] == pytest.approx(4 * a[4:-4] ** 3, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(y=st.lists(st.integers(-9, 9), min_size=1, max_size=12))
def test_no_chord_passes_below_the_convex_curve(y):
    """The largest convex curve below y: at each point the lowest chord between any two points of y on either side."""
    chords = [
        min(y[i] + (y[j] - y[i]) * ((k - i) / (j - i) if j > i else 0) for i in range(k + 1) for j in range(k, len(y)))
        for k in range(len(y))
    ]
    assert convex(np.array(y, dtype=float)) == pytest.approx(chords, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(y=st.lists(st.floats(-10, 10), min_size=1, max_size=12), weight=st.floats(0, 0.95))
def test_a_smoothed_curve_never_falls_and_is_one_number_at_a_time(y, weight):
    found, top = smoothed(np.array(y), weight), -np.inf
    for n in range(len(y)):
        shares = [(1 - weight) * weight ** (n - i) for i in range(n + 1)]
        top = max(top, sum(s * v for s, v in zip(shares, y, strict=False)) / sum(shares))
        assert found[n] == pytest.approx(top, abs=1e-6)
