"""Bisection over the limits of a cost: the smallest point that passes, by few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = ["MOST_STEPS", "PRECISION", "Point", "find_smallest"]

MOST_STEPS = 8
"""Most points that are measured."""
PRECISION = 0.045
"""The bisection ends once the limits that pass and fail are this close, relative to the cost."""

_FAILURES = 2  # before it is asked whether anything passes at all
_MOST_LIMITS = 40


class Point(Protocol):
    """What was measured at a limit."""

    @property
    def cost(self) -> float:
        """The cost of the allocation, at most the limit."""
        ...

    @property
    def passes(self) -> bool:
        """Whether it loses no more than may be lost."""
        ...


_Point = TypeVar("_Point", bound=Point)


def find_smallest(
    least: float, most: float, measure: Callable[[float], _Point | None], *, most_steps: int = MOST_STEPS
) -> list[_Point]:
    """Measure points at limits between ``least`` and ``most``, and return them in the order of measurement.

    The point of least cost that passes is the result of the search; no point that failed is. Limits are halved by
    their ratio. If the first two fail, the largest is measured next, and if that fails too, the search ends.

    Args:
        least: of the cost, or a lower bound on it.
        most: the cost of the most accurate point.
        measure: the point at a limit; the same object again if it was measured before; None if nothing fits the limit.
        most_steps: most points to measure.
    """
    points: list[_Point] = []
    low, high, is_passed = least, most, False
    for _ in range(_MOST_LIMITS):
        is_last = len(points) == most_steps - 1 and not is_passed
        asks_for_most = not is_passed and (len(points) == _FAILURES or is_last or _is_close(low, high))
        if len(points) >= most_steps or (is_passed and _is_close(low, high)):
            break
        limit = most if asks_for_most else _halve(low, high)
        found = measure(limit)
        if found is not None and not any(found is point for point in points):
            points.append(found)
        if found is not None and found.passes:
            high, is_passed = min(high, found.cost, limit), True
        elif asks_for_most:
            break
        else:
            low = limit
    return points


def _halve(low: float, high: float) -> float:
    return math.sqrt(low * high) if low > 0 else (low + high) / 2


def _is_close(low: float, high: float) -> bool:
    return high - low <= PRECISION * high
