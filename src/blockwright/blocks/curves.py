"""Curves on an even grid: what something costs, by the share of it that is taken away. Smoothing, the convex curve below, the slope."""

from itertools import accumulate

import numpy as np
from jaxtyping import Float


def smoothed(curve: Float[np.ndarray, " points"], weight: float) -> Float[np.ndarray, " points"]:
    """The debiased moving average with this weight of the past, then made nondecreasing."""
    average = np.array(list(accumulate((1 - weight) * curve, lambda past, now: weight * past + now)))
    return np.maximum.accumulate(average / (1 - weight ** np.arange(1, len(curve) + 1)))


def convex(curve: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """The largest convex curve below it: tiles are then removed in the order that a Lagrangian would."""

    def slope(i: int, j: int) -> float:
        return float(curve[j] - curve[i]) / (j - i)

    hull: list[int] = []
    for i in range(len(curve)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], i):
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(curve)), hull, curve[hull])


def derivative(y: Float[np.ndarray, " points"], h: int = 4) -> Float[np.ndarray, " points"]:
    """dy/da on an even grid of a from 0 to 1: the five-point rule over h points on either side, three points on one side at the ends.

    h : even, at most half of the points.
    """
    half, last = h // 2, len(y) - 1
    width = h / last
    out = np.empty(len(y))
    for i in range(len(y)):
        if i < h:
            out[i] = (-3 * y[i] + 4 * y[i + half] - y[i + h]) / width
        elif i > last - h:
            out[i] = (3 * y[i] - 4 * y[i - half] + y[i - h]) / width
        else:
            out[i] = (-y[i + h] + 8 * y[i + half] - 8 * y[i - half] + y[i - h]) / (6 * width)
    return out
