"""Compiled loops of the mutual information estimators: nearest neighbours and counts, one slice after the other.

The kernels are not parallel: the caller spreads slices over threads, which run in parallel since every kernel releases
the GIL. The result of a slice does not depend on other slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from infoq_fx.core.jit import jit

__all__ = [
    "sum_ksg_terms",
    "sum_ross_terms",
]

Floats: TypeAlias = NDArray[np.floating[Any]]
Integers: TypeAlias = NDArray[np.integer[Any]]
Number: TypeAlias = float | np.floating[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LANES = 64  # points whose neighbours are searched together, so that the compiler vectorizes the loop
_RANKS = 5  # nearest distances kept in registers; more neighbours take a slower path
_CHUNK = 16  # neighbours compared at a time when a single point is searched on its own
_STRAGGLERS = 6  # a block stops when at most this many lanes are unfinished; these are searched on their own
_STRIDE = 8  # steps between checks of how many lanes are unfinished


def _jit_min(function: _Function) -> _Function:
    # Without NaN a minimum is the same in any order; the compiler vectorizes it only with these flags.
    return jit(function, fastmath={"nnan", "nsz", "reassoc"})


# Neighbours of both variables -------------------------------------------------------------------------------


@jit
def sum_ksg_terms(
    ascending: Floats,
    order: Integers,
    deviations: Floats,
    y: Floats,
    y_ascending: Floats,
    scales: Floats,
    k: int,
    psi: Floats,
) -> Floats:
    """Sum the samples' terms in the estimate of Kraskov et al., Eq. 8, without psi(samples), for every slice.

    Args:
        ascending: ``[slices or 1, samples]``, x.
        order: of the same shape: the sample index of each value of ``ascending``; among equal x, ascending in y.
        deviations: ``[slices or 1]``, standard deviations of x.
        y: ``[slices or 1, samples]``.
        y_ascending: y sorted.
        scales: ``[slices or 1]``, powers of two that y is multiplied by.
        k: below the number of samples.
        psi: ``[samples + 1]``, the digamma function of 0, 1, ...

    Returns:
        float64 ``[slices]``: sums of psi(neighbours) - psi(x counts) - psi(y counts); 0 where x or y is constant.
    """
    slices, samples = max(len(ascending), len(y)), y.shape[1]
    sums = np.zeros(slices)
    paired, values, distances = np.empty(samples, y.dtype), np.empty(samples, y.dtype), np.empty(samples, y.dtype)
    inside, counts = np.empty(samples, np.int64), np.empty((2, samples), np.uint32)
    search = _make_room(samples, y)
    for s in range(slices):
        x, places = ascending[s % len(ascending)], order[s % len(order)]
        raw, raw_ascending = y[s % len(y)], y_ascending[s % len(y)]
        scale = scales[s % len(scales)]
        if x[0] == x[samples - 1] or raw_ascending[0] == raw_ascending[samples - 1]:
            continue
        for i in range(samples):
            paired[i], values[i] = raw[places[i]] * scale, raw_ascending[i] * scale
        ratio = y.dtype.type(deviations[s % len(deviations)] / deviation(values))
        _find_kth_distances(x, paired, values, ratio, k, search, distances, inside)
        _count_copies(x, paired, distances, inside)
        _set_limits(distances)
        _count_within(x, x, distances, y.dtype.type(1), counts[0])
        _count_within(values, paired, distances, ratio, counts[1])
        total = 0.0
        for i in range(samples):
            total += psi[inside[i]] - psi[counts[0, i]] - psi[counts[1, i]]
        sums[s] = total
    return sums


@jit
def order_copies(ascending: Floats, y: Floats, order: Integers) -> None:
    """Sort ``order`` ``[slices, samples]`` by y within every run of equal x, so that copies are adjacent."""
    for s in range(len(order)):
        x, values, start = ascending[s % len(ascending)], y[s % len(y)], 0
        for i in range(1, len(x) + 1):
            if i == len(x) or x[i] != x[start]:
                if i - start > 1:
                    places = order[s, start:i].copy()
                    order[s, start:i] = places[np.argsort(values[places])]
                start = i


@jit
def deviation(values: Floats) -> float:
    """Return the standard deviation, summed in eight parts so that it is the same on every processor."""
    size, total = len(values), np.zeros(8)
    for pass_ in range(2):
        mean = total.sum() / size if pass_ else 0.0
        total[:] = 0
        for start in range(0, size - 7, 8):
            for lane in range(8):
                value = np.float64(values[start + lane])
                total[lane] += (value - mean) ** 2 if pass_ else value
        for i in range(size - size % 8, size):
            total[0] += (values[i] - mean) ** 2 if pass_ else values[i]
    return math.sqrt(total.sum() / size)


@jit
def _make_room(samples: int, like: Floats) -> tuple[Floats, Floats, Integers, int]:
    """Buffers for the plane and a band of it, x above y, padded by infinities in x; and indices into the plane."""
    pad = samples + _CHUNK + 2 * _STRIDE
    size = samples + 2 * pad + _LANES
    return np.zeros((2, size), like.dtype), np.zeros((2, size), like.dtype), np.empty(samples + 1, np.int64), pad


@jit
def _find_kth_distances(
    x: Floats,
    paired: Floats,
    values: Floats,
    ratio: Number,
    k: int,
    room: tuple[Floats, Floats, Integers, int],
    distances: Floats,
    inside: Integers,
) -> None:
    """Distances to the k-th neighbours under the maximum norm, and how many samples are strictly closer.

    A block of consecutive points in x is compared at once with the points 1, 2, ... places before and after. To keep
    these few, the plane is cut into bands of y, each searched with a margin on both sides; a point whose neighbours may
    be beyond the margin is searched on its own.
    """
    plane, band, places, pad = room
    samples, infinity = len(x), x.dtype.type(np.inf)
    root = math.sqrt(k * samples)  # approximate number of samples within a neighbour's distance in one variable
    margin, bands = int(0.7 * root), max(1, int(samples / (4 * root)))
    plane[0, :pad], plane[0, pad + samples :] = -infinity, infinity
    plane[0, pad : pad + samples], plane[1, pad : pad + samples] = x, paired
    for b in range(bands):
        first, stop = b * samples // bands, (b + 1) * samples // bands
        low = values[first - margin] if first > margin else -infinity
        high = values[stop - 1 + margin] if stop + margin <= samples else infinity
        core_low = values[first] if b > 0 else -infinity
        core_high = values[stop] if b < bands - 1 else infinity
        count = _fill_band(plane, pad, samples, low, high, band, places)
        _search_band(plane, pad, band, places[:count], (low, core_low, core_high, high), ratio, k, distances, inside)


@jit
def _count_copies(x: Floats, paired: Floats, distances: Floats, inside: Integers) -> None:
    """Where the k-th distance is 0, count the copies of the sample, itself included; they are adjacent."""
    start, samples = 0, len(x)
    while start < samples:
        stop = start + 1
        if distances[start] == 0:
            while stop < samples and x[stop] == x[start] and paired[stop] == paired[start]:
                stop += 1
            inside[start:stop] = stop - start
        start = stop


@jit
def _set_limits(distances: Floats) -> None:
    """Limits below which samples are counted: copies at distance 0, and none that only rounding made closer."""
    info = np.finfo(distances.dtype)
    shrink = distances.dtype.type(1 - 64 * info.eps)
    for i in range(len(distances)):
        distances[i] = distances[i] * shrink if distances[i] > 0 else info.tiny


@jit
def _count_within(values: Floats, points: Floats, limits: Floats, ratio: Number, counts: Integers) -> None:
    """Count the ascending values less than ``limit / ratio`` away from each point, which is one of them."""
    one, size, last = np.uint32(1), np.uint32(len(points)), counts
    first, reach = np.zeros(len(points), np.uint32), limits / ratio
    last[:] = 0
    while size > 0:
        half = max(size >> one, one)
        for i in range(len(points)):  # bisection with the loop over points innermost is branch-free
            a, b = first[i], last[i]
            first[i] = a + half if points[i] - values[a + half - one] >= reach[i] else a
            last[i] = b + half if values[b + half - one] - points[i] < reach[i] else b
        size -= half
    for i in range(len(points)):
        counts[i] = last[i] - first[i]


@jit
def _fill_band(plane: Floats, pad: int, samples: int, low: Number, high: Number, band: Floats, places: Integers) -> int:
    """Copy the points with ``low <= y <= high`` after the same padding, with their indices in the plane."""
    x, y = plane[0, pad : pad + samples], plane[1, pad : pad + samples]
    band_x, band_y, count = band[0, pad:], band[1, pad:], 0
    for i in range(samples):  # store first and count afterwards, without a branch
        band_x[count], band_y[count], places[count] = x[i], y[i], i
        count += (y[i] >= low) & (y[i] <= high)
    band[0, :pad], band_x[count:] = -np.inf, np.inf
    return count


@jit
def _search_band(
    plane: Floats,
    pad: int,
    band: Floats,
    places: Integers,
    limits: tuple[Number, Number, Number, Number],
    ratio: Number,
    k: int,
    distances: Floats,
    inside: Integers,
) -> None:
    low, core_low, core_high, high = limits
    x, y, infinity = band[0], band[1], band.dtype.type(np.inf)
    ranks, nearest = np.empty(max(_RANKS, k) * _LANES, x.dtype), np.empty(k, x.dtype)
    displaced = np.empty((2, _LANES), x.dtype)
    kth = ranks[(k - 1) * _LANES : k * _LANES]
    shrink = x.dtype.type(1 - 64 * np.finfo(x.dtype).eps)
    for block in range(0, len(places), _LANES):
        start, step = pad + block, 0
        ranks[:] = infinity
        while step < len(places):
            if k <= _RANKS:
                _sweep(x, y, start, step, ratio, ranks)
            else:
                _sweep_many(x, y, start, step, ratio, ranks, displaced)
            step += _STRIDE
            if _count_unfinished(x, start, step, kth) <= _STRAGGLERS:
                break
        for lane in range(min(_LANES, len(places) - block)):
            i = start + lane
            if not core_low <= y[i] < core_high:
                continue
            for rank in range(k):
                nearest[rank] = ranks[lane + rank * _LANES]
            if min(x[i] - x[i - step], x[i + step] - x[i]) < nearest[k - 1]:
                _search_alone(x, y, i, step, infinity, -infinity, ratio, nearest)
            if (y[i] - low) * ratio < nearest[k - 1] or (high - y[i]) * ratio < nearest[k - 1]:
                _search_alone(plane[0], plane[1], pad + places[block + lane], 0, low, high, ratio, nearest)
            distances[places[block + lane]] = nearest[k - 1]
            strictly, limit = k, nearest[k - 1] * shrink
            while strictly > 1 and not nearest[strictly - 2] < limit:  # ties at the k-th distance
                strictly -= 1
            inside[places[block + lane]] = strictly


@_jit_min
def _search_alone(
    x: Floats, y: Floats, i: int, done: int, low: Number, high: Number, ratio: Number, nearest: Floats
) -> None:
    """Search on both sides, from ``done`` places on, until the difference in x alone reaches the k-th distance.

    Only points with y below ``low`` or above ``high`` are compared; the others are done already.
    """
    last, centre_x, centre_y = len(nearest) - 1, x[i], y[i]
    for direction in (-1, 1):
        j = i + done + 1 if direction > 0 else i - done - _CHUNK
        while (x[j] - centre_x if direction > 0 else centre_x - x[j + _CHUNK - 1]) < nearest[last]:
            near_x, near_y, least = x[j : j + _CHUNK], y[j : j + _CHUNK], nearest[last]
            for n in range(_CHUNK):
                dx, dy = abs(near_x[n] - centre_x), abs(near_y[n] - centre_y) * ratio
                distance = dx if dx > dy else dy
                distance = distance if (near_y[n] < low) | (near_y[n] > high) else nearest[last]
                least = distance if distance < least else least
            for n in range(_CHUNK if least < nearest[last] else 0):
                distance = max(abs(near_x[n] - centre_x), abs(near_y[n] - centre_y) * ratio)
                if distance < nearest[last] and (near_y[n] < low or near_y[n] > high):
                    _insert(nearest, distance)
            j += direction * _CHUNK


@jit
def _insert(nearest: Floats, distance: Number) -> None:
    last = len(nearest) - 1
    nearest[last] = distance
    for rank in range(last, 0, -1):
        low, high = nearest[rank - 1], nearest[rank]
        nearest[rank - 1], nearest[rank] = min(low, high), max(low, high)


@jit
def _sweep(x: Floats, y: Floats, start: int, done: int, ratio: Number, n: Floats) -> None:
    """Compare a block with the points ``done + 1`` to ``done + _STRIDE`` places before and after.

    ``n`` holds the five smallest distances of every lane, one rank after the other; the loop over ranks is unrolled so
    that they stay in registers.
    """
    centre_x, centre_y = x[start : start + _LANES], y[start : start + _LANES]
    for step in range(done + 1, done + _STRIDE + 1):
        before_x, before_y = x[start - step : start - step + _LANES], y[start - step : start - step + _LANES]
        behind_x, behind_y = x[start + step : start + step + _LANES], y[start + step : start + step + _LANES]
        for i in range(_LANES):
            a, dy = centre_x[i] - before_x[i], abs(centre_y[i] - before_y[i]) * ratio
            a = a if a > dy else dy
            b, dy = behind_x[i] - centre_x[i], abs(centre_y[i] - behind_y[i]) * ratio
            b = b if b > dy else dy
            t = n[i]
            low = min(t, a)
            n[i], a, b = min(low, b), max(t, a), max(low, b)
            t = n[i + _LANES]
            low = min(t, a)
            n[i + _LANES], a, b = min(low, b), max(t, a), max(low, b)
            t = n[i + 2 * _LANES]
            low = min(t, a)
            n[i + 2 * _LANES], a, b = min(low, b), max(t, a), max(low, b)
            t = n[i + 3 * _LANES]
            low = min(t, a)
            n[i + 3 * _LANES], a, b = min(low, b), max(t, a), max(low, b)
            n[i + 4 * _LANES] = min(min(n[i + 4 * _LANES], a), b)


@jit
def _sweep_many(x: Floats, y: Floats, start: int, done: int, ratio: Number, ranks: Floats, displaced: Floats) -> None:
    """The same for any number of ranks: two candidates per lane are passed from rank to rank."""
    left, right = displaced[0], displaced[1]
    for step in range(done + 1, done + _STRIDE + 1):
        for i in range(_LANES):
            here, before, behind = start + i, start + i - step, start + i + step
            left[i] = max(abs(x[here] - x[before]), abs(y[here] - y[before]) * ratio)
            right[i] = max(abs(x[behind] - x[here]), abs(y[behind] - y[here]) * ratio)
        for rank in range(0, len(ranks), _LANES):
            nearest = ranks[rank : rank + _LANES]
            for i in range(_LANES):
                kept, a, b = nearest[i], left[i], right[i]
                low = min(kept, a)
                nearest[i], left[i], right[i] = min(low, b), max(kept, a), max(low, b)


@jit
def _count_unfinished(x: Floats, start: int, step: int, kth: Floats) -> int:
    """Lanes that may have a closer neighbour beyond ``step`` places, by the difference in x alone."""
    count, centre = 0, x[start : start + _LANES]
    before, behind = x[start - step : start - step + _LANES], x[start + step : start + step + _LANES]
    for i in range(_LANES):
        count += min(centre[i] - before[i], behind[i] - centre[i]) < kth[i]
    return count


# Neighbours within a class ----------------------------------------------------------------------------------


@jit
def sum_ross_terms(
    ascending: Floats, order: Integers, classes: Integers, sizes: Integers, k: int, psi: Floats
) -> Floats:
    """Sum the samples' terms in the estimate of Ross, without psi(samples), for every slice.

    Args:
        ascending: ``[slices, samples]``, x.
        order: of the same shape: the sample index of each value of ``ascending``.
        classes: ``[samples]``, from 0 without gaps.
        sizes: ``[classes]``, at least 2 each; a class of n samples uses ``min(k, n - 1)`` neighbours.
        k: neighbours within the class.
        psi: ``[samples + 1]``, the digamma function of 0, 1, ...

    Returns:
        float64 ``[slices]``: sums of psi(neighbours) - psi(size of the class) - psi(counts); 0 where x is constant.
    """
    samples, sums = ascending.shape[1], np.zeros(len(ascending))
    members, distances = np.empty(samples, ascending.dtype), np.empty(samples, ascending.dtype)
    inside, counts = np.empty(samples, np.int64), np.empty(samples, np.uint32)
    for s in range(len(ascending)):
        if ascending[s, 0] == ascending[s, samples - 1]:
            continue
        ends = np.cumsum(sizes) - sizes
        for i in range(samples):
            c = classes[order[s, i]]
            members[ends[c]] = ascending[s, i]
            ends[c] += 1
        total, start = 0.0, 0
        for size in sizes:
            part = slice(start, start + size)
            _find_kth_in_class(members[part], min(k, size - 1), distances[part], inside[part])
            total -= psi[size] * size
            start += size
        _set_limits(distances)
        _count_within(ascending[s], members, distances, ascending.dtype.type(1), counts)
        for i in range(samples):
            total += psi[inside[i]] - psi[counts[i]]
        sums[s] = total
    return sums


@jit
def _find_kth_in_class(values: Floats, k: int, distances: Floats, inside: Integers) -> None:
    """Distances to the k-th neighbours among ascending values, and how many are strictly closer."""
    shrink, size = values.dtype.type(1 - 64 * np.finfo(values.dtype).eps), len(values)
    for i in range(size):
        best = values.dtype.type(np.inf)  # over the windows of k + 1 values that contain this one
        for low in range(max(0, i - k), min(i, size - 1 - k) + 1):
            best = min(best, max(values[i] - values[low], values[low + k] - values[i]))
        distances[i] = best
        if best > 0:
            strictly, limit = 1, best * shrink
            for j in range(max(0, i - k), min(i + k, size - 1) + 1):
                strictly += (j != i) & (abs(values[j] - values[i]) < limit)
            inside[i] = strictly
    _count_copies(values, values, distances, inside)
