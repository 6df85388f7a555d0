"""Searches along a line, of functions that take long: each value is computed once."""

import math
from collections.abc import Callable

Function = Callable[[float], float]
# Between the points that are tried first, which find the valley to descend into.
STEP = math.log(10)
GOLDEN = (math.sqrt(5) - 1) / 2


def minimum(f: Function, low: float, high: float, tolerance: float) -> float:
    """Where f is least within [low, high]: the best of points `STEP` apart, and then golden section around it.

    Args:
        f: of several valleys, the one that those points find. NaN counts as infinite.
        low: least x.
        high: greatest.
        tolerance: of x.
    """
    value = _finite(f)
    points = _points(low, high)
    best = min(range(len(points)), key=lambda i: value(points[i]))
    a, b = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
    tried = list(points)
    while b - a > tolerance:
        left, right = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
        tried += [left, right]
        a, b = (a, right) if value(left) <= value(right) else (left, b)
    return min(tried, key=value)


def last_within(f: Function, limit: float, low: float, high: float, tolerance: float) -> float | None:
    """The greatest x within [low, high] with f(x) <= limit, by bisection; None if there is none.

    Args:
        f: above the limit from there on, as far as points `STEP` apart tell. NaN counts as infinite.
        limit: of f.
        low: least x.
        high: greatest.
        tolerance: of x.
    """
    value = _finite(f)
    points = _points(low, high)
    within = next((i for i in reversed(range(len(points))) if value(points[i]) <= limit), None)
    if within is None or within == len(points) - 1:
        return None if within is None else high
    a, b = points[within], points[within + 1]
    while b - a > tolerance:
        middle = (a + b) / 2
        a, b = (middle, b) if value(middle) <= limit else (a, middle)
    return a


def _points(low: float, high: float) -> list[float]:
    n = max(2, math.ceil((high - low) / STEP - 1e-9))
    return [low + (high - low) * i / n for i in range(n)] + [high]


def _finite(f: Function) -> Function:
    # The points of a golden section recur but for rounding.
    known: dict[float, float] = {}

    def value(x: float) -> float:
        near = next((y for y in known if abs(x - y) < 1e-9), None)
        if near is not None:
            return known[near]
        found = f(x)
        known[x] = math.inf if math.isnan(found) else found
        return known[x]

    return value
