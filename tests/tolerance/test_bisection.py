"""The search on curves made up here: what it finds, what it never returns, and how often it measures."""

import math
from dataclasses import dataclass

from hypothesis import example, given
from hypothesis import strategies as st

from infoq_fx.tolerance.bisection import MOST_STEPS, PRECISION, find_smallest


@dataclass(frozen=True)
class Point:
    cost: float
    passes: bool


def search(least, most, is_passing, costs=None, most_steps=MOST_STEPS):
    """The points, and the limits that were asked for; ``costs`` are the only ones that allocations have."""
    asked, known = [], {}

    def measure(limit):
        asked.append(limit)
        fitting = [limit] if costs is None else [cost for cost in costs if cost <= limit]
        if not fitting:
            return None
        cost = max(fitting)
        return known.setdefault(cost, Point(cost, is_passing(cost)))

    return find_smallest(least, most, measure, most_steps=most_steps), asked


ranges = st.tuples(st.floats(1e-3, 1e9), st.floats(1.3, 16)).map(lambda x: (x[0], x[0] * x[1]))


@given(ranges, st.floats(0, 1))
def test_the_smallest_that_passes_is_found_on_a_monotone_curve(span, share):
    least, most = span
    threshold = least * (most / least) ** share
    points, asked = search(least, most, lambda cost: cost >= threshold)
    passing = [point.cost for point in points if point.passes]
    assert min(passing) >= threshold
    assert min(passing) * (1 - PRECISION) <= max(threshold, least)
    assert len(points) == len(asked) <= MOST_STEPS


@given(ranges)
def test_the_usual_range_takes_five_steps_and_more_for_floats(span):
    least = span[0]
    for ratio, count in ((4, 5), (8, 6)):
        points, _ = search(least, ratio * least, lambda cost: cost >= 2 * least)
        assert len(points) == count


@given(ranges)
def test_in_vain_the_largest_is_asked_after_two_failures(span):
    points, asked = search(*span, lambda cost: False)
    assert len(points) <= 3
    assert asked[-1] == span[1]
    assert not any(point.passes for point in points)


@given(ranges, st.floats(0, 1), st.integers(1, 4))
def test_few_steps_still_end_with_one_that_passes(span, share, most_steps):
    threshold = span[0] * (span[1] / span[0]) ** share
    points, _ = search(*span, lambda cost: cost >= min(threshold, span[1]), most_steps=most_steps)
    assert any(point.passes for point in points)
    assert len(points) <= most_steps


@given(st.data(), st.lists(st.integers(10, 1000), min_size=2, max_size=30, unique=True))
def test_on_any_curve_the_bounds_are_what_was_measured(data, costs):
    passing = {cost: data.draw(st.booleans()) for cost in costs}
    points, asked = search(min(costs), max(costs), passing.get, costs)
    assert len(points) == len({id(point) for point in points}) <= MOST_STEPS
    assert all(point.passes == passing[point.cost] for point in points)
    assert len(asked) <= 40
    if any(point.passes for point in points):
        best = min(point.cost for point in points if point.passes)
        # Everything smaller that was measured failed.
        assert all(not point.passes for point in points if point.cost < best)
    else:
        assert not passing[max(costs)]
        assert asked[-1] == max(costs)


@example(0.0, 5.0)
@given(st.floats(0, 1), st.floats(3, 100))
def test_a_lower_bound_that_nothing_reaches_costs_no_measurement(bound, most):
    reachable = most / 2
    points, _ = search(bound, most, lambda cost: True, [reachable, most])
    assert min(point.cost for point in points) == reachable
    assert all(math.isfinite(point.cost) for point in points)
