"""Mutual information of one-dimensional projections, in nats: KSG, Ross, random directions, class groups.

Sliced mutual information is the mean over random directions of the information between projections. Whoever
compares two networks projects both onto the same directions and takes the difference slice by slice: most of the
estimator's spread is common to the two and cancels.

Ties need care, because ReLU and low bit-widths put many samples on one value. A sample whose k-th neighbour lies at
distance 0 is counted as a discrete value; all others follow the plain formulas, which count strictly within the
distance. Distances that differ by rounding alone are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import digamma

from infoq_fx.errors import CalibrationDataError, OptionError

__all__ = [
    "SlicedEstimate",
    "absolute_change",
    "estimate_ksg",
    "estimate_ross",
    "group_classes",
    "unit_projections",
]

Floats: TypeAlias = NDArray[np.floating[Any]]
Integers: TypeAlias = NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LANES = 128  # points whose neighbours are sought together; wide enough to hide the loop around them
_MIN_VALUES_PER_THREAD = 1 << 14  # below about 2 ms of work a thread costs more than it saves
_MAX_LLOYD_STEPS = 100


@dataclass(frozen=True, eq=False)
class SlicedEstimate:
    """Sliced mutual information: ``per_slice`` is float64 ``[slices]``, in nats."""

    per_slice: NDArray[np.float64]

    @property
    def mean_nats(self) -> float:
        """The estimate: the mean over slices. It may be slightly negative where there is no information."""
        return float(np.mean(self.per_slice))

    @property
    def standard_error_nats(self) -> float:
        """Standard error of the mean over random directions; 0 for one slice, where none can be told."""
        return _standard_error(self.per_slice)


def unit_projections(dimension: int, slices: int, seed: int) -> NDArray[np.float32]:
    """Random directions, uniform on the unit sphere.

    Args:
        dimension: length of the vectors to be projected; 1 gives columns of +1 or -1.
        slices: number of directions.
        seed: non-negative; the same seed gives the same directions.

    Returns:
        float32 ``[dimension, slices]``, columns of norm 1.

    Raises:
        OptionError: a size that is not positive, or a negative seed.

    Reference:
        Goldfeld et al., "k-Sliced Mutual Information", NeurIPS 2022, with k = 1; InfoQ, Section 3.
    """
    for name, value, smallest in (("dimension", dimension, 1), ("slices", slices, 1), ("seed", seed, 0)):
        _check_integer(name, value, smallest)
    normals = np.random.Generator(np.random.PCG64(seed)).standard_normal((dimension, slices))
    # The norm of one element is that element: rounding must not leave 0.99999994 there.
    lengths = np.abs(normals[0]) if dimension == 1 else np.linalg.norm(normals, axis=0)
    return np.asarray(normals / lengths, np.float32)


def estimate_ksg(x: ArrayLike, y: ArrayLike, *, k: int = 5) -> NDArray[np.float64]:
    """Mutual information of two continuous variables, slice by slice, from k-th neighbour distances.

    Both variables are brought to unit standard deviation, then neighbours are exact under the maximum norm. For a
    sample with more than ``k`` copies of itself, neighbours and margins count the copies.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for the same samples in every slice.
        y: the same for the second variable. float32 and float64 are kept, other types become float64.
        k: neighbours; more of them mean less variance and more bias.

    Returns:
        float64 ``[slices]`` in nats, never clipped at 0; exactly 0 where ``x`` or ``y`` is constant.

    Raises:
        OptionError: shapes that do not fit each other, or ``k`` below 1.
        CalibrationDataError: at most ``k`` samples, or values that are NaN or infinite.

    Reference:
        Kraskov, Stögbauer and Grassberger, "Estimating mutual information", 2004, Eq. 8; for tied samples Gao,
        Kannan, Oh and Viswanath, "Estimating mutual information for discrete-continuous mixtures", 2017.
    """
    _check_integer("k", k, 1)
    x, y = _as_slices(x, "x"), _as_slices(y, "y")
    slices, samples = max(len(x), len(y)), x.shape[1]
    if y.shape[1] != samples or {len(x), len(y)} - {1, slices}:
        raise OptionError(
            f"x {x.shape} and y {y.shape} must have the same [slices, samples], or one slice to share"
        )
    if samples <= k:
        remedy = f"; the largest k that works is {samples - 1}" if samples > 1 else ""
        raise CalibrationDataError(f"k={k} neighbours need at least {k + 1} samples, found {samples}{remedy}")
    dtype = np.result_type(x, y)
    x, y = (np.broadcast_to(v.astype(dtype, copy=False), (slices, samples)) for v in (x, y))
    psi = _digamma_table(samples)
    return _map_slices(lambda part: _ksg_of_slices(x[part], y[part], int(k), psi), slices, samples)


def estimate_ross(x: ArrayLike, labels: ArrayLike, *, k: int = 3) -> NDArray[np.float64]:
    """Mutual information of a continuous variable and a class, slice by slice.

    A class of ``n`` samples uses ``min(k, n - 1)`` neighbours; samples alone in their class are left out.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for one slice; float32 and float64 are kept.
        labels: integers ``[samples]``, any values.
        k: neighbours within the class; more of them mean less variance and more bias.

    Returns:
        float64 ``[slices]`` in nats, never clipped at 0; exactly 0 where ``x`` is constant or only one class is left.

    Raises:
        OptionError: shapes that do not fit, labels that are no integers, or ``k`` below 1.
        CalibrationDataError: no class has two samples, or values that are NaN or infinite.

    Reference:
        Ross, "Mutual information between discrete and continuous data sets", 2014; tied samples are counted as in
        Gao et al., 2017.
    """
    _check_integer("k", k, 1)
    x, labels = _as_slices(x, "x"), np.asarray(labels)
    if labels.shape != x.shape[1:] or labels.dtype.kind not in "iu":
        raise OptionError(
            f"labels must be integers of shape {x.shape[1:]}, got {labels.dtype} {labels.shape}"
        )
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if not np.any(counts > 1):
        raise CalibrationDataError(
            f"each of {len(counts)} classes has fewer than two of the {len(labels)} samples, so neighbours within a "
            "class do not exist; give more samples a class or merge classes with group_classes"
        )
    if np.count_nonzero(counts > 1) == 1:
        return np.zeros(len(x))
    is_kept = counts[classes] > 1
    if not is_kept.all():
        x = x[:, is_kept]
        _, classes, counts = np.unique(classes[is_kept], return_inverse=True, return_counts=True)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    classes, psi = classes.astype(np.int64), _digamma_table(x.shape[1])
    return _map_slices(
        lambda part: _ross_of_slices(x[part], classes, starts, int(k), psi), len(x), x.shape[1]
    )


def absolute_change(baseline: ArrayLike, perturbed: ArrayLike) -> tuple[float, float]:
    """How much the sliced mutual information changed, and how well that is known.

    Args:
        baseline: ``[slices]`` in nats.
        perturbed: ``[slices]`` in nats, from the same projections.

    Returns:
        The absolute mean of the differences and its standard error over slices (0 for one slice), in nats.

    Raises:
        OptionError: the two do not have the same slices.

    Reference:
        InfoQ, Eq. 3.
    """
    before, after = np.asarray(baseline, np.float64), np.asarray(perturbed, np.float64)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise OptionError(
            f"baseline {before.shape} and perturbed {after.shape} must be [slices] of the same slices"
        )
    differences = before - after
    return abs(float(np.mean(differences))), _standard_error(differences)


def group_classes(rows: ArrayLike, groups: int, seed: int) -> Integers:
    """Merge classes that the classifier holds for similar, so that each group has enough samples.

    k-means with k-means++ seeding; a group without classes takes the one farthest from its own centre.

    Args:
        rows: ``[classes, dimension]``, one vector a class.
        groups: number of groups; there are fewer where there are fewer distinct rows.
        seed: non-negative.

    Returns:
        int64 ``[classes]``: the group of each class, numbered from 0 without gaps.

    Raises:
        OptionError: rows that are no matrix, no group, or a negative seed.
        CalibrationDataError: rows that are NaN or infinite.

    Reference:
        Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    _check_integer("groups", groups, 1)
    _check_integer("seed", seed, 0)
    points = np.asarray(rows, np.float64)
    if points.ndim != 2 or not points.size:
        raise OptionError(f"rows must be [classes, dimension], got shape {points.shape}")
    _check_finite(points, "rows")
    centres = _seed_centres(points, groups, np.random.Generator(np.random.PCG64(seed)))
    assigned = np.full(len(points), -1)
    for _ in range(_MAX_LLOYD_STEPS):
        distances = cdist(points, centres, "sqeuclidean")
        nearest = distances.argmin(1)
        for group in np.setdiff1d(np.arange(len(centres)), nearest):
            is_movable = np.bincount(nearest, minlength=len(centres))[nearest] > 1
            nearest[np.where(is_movable, distances.min(1), -1.0).argmax()] = group
        if np.array_equal(nearest, assigned):
            break
        assigned = nearest
        centres = np.stack([points[assigned == group].mean(0) for group in range(len(centres))])
    return np.unique(assigned, return_inverse=True)[1].astype(np.int64)


def _seed_centres(
    points: NDArray[np.float64], groups: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Distinct rows, each the best of a few drawn with probability proportional to its squared distance."""
    chosen = [int(generator.integers(len(points)))]
    nearest = cdist(points, points[chosen], "sqeuclidean")[:, 0]
    while len(chosen) < groups and nearest.any():
        trials = generator.choice(len(points), size=2 + int(math.log(groups)), p=nearest / nearest.sum())
        after = np.minimum(nearest[:, None], cdist(points, points[trials], "sqeuclidean"))
        best = int(after.sum(0).argmin())
        chosen.append(int(trials[best]))
        nearest = after[:, best]
    return points[chosen]


def _check_integer(name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
        raise OptionError(f"{name}={value!r} must be an integer of at least {smallest}")


def _check_finite(values: Floats, name: str) -> None:
    if not np.isfinite(values).all():
        count = values.size - int(np.isfinite(values).sum())
        raise CalibrationDataError(
            f"{name} has {count} NaN or infinite of {values.size} values; "
            "look for overflow in the model or for broken samples"
        )


def _as_slices(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    array = np.atleast_2d(array)
    if array.ndim != 2 or not array.size:
        raise OptionError(
            f"{name} must be [slices, samples] or [samples] and not empty, got {np.shape(values)}"
        )
    _check_finite(array, name)
    return array


def _standard_error(per_slice: NDArray[np.float64]) -> float:
    return float(np.std(per_slice, ddof=1) / math.sqrt(len(per_slice))) if len(per_slice) > 1 else 0.0


@lru_cache(maxsize=8)
def _digamma_table(largest: int) -> NDArray[np.float64]:
    """``table[n]`` is digamma(n); 0 has no value."""
    table = np.concatenate(([np.nan], digamma(np.arange(1.0, largest + 1))))
    table.setflags(write=False)
    return table


def _map_slices(
    estimate: Callable[[slice], NDArray[np.float64]], slices: int, samples: int
) -> NDArray[np.float64]:
    """Estimates of all slices, in as many threads as numba may use: every slice stands alone, so any number agrees."""
    threads = min(numba.get_num_threads(), slices, max(1, slices * samples // _MIN_VALUES_PER_THREAD))
    if threads == 1:
        return estimate(slice(None))
    # numba's own parallel loops abort the process when two threads, or a forked child, enter them.
    bounds = [slices * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(estimate, map(slice, bounds[:-1], bounds[1:]))))


def _normalize(values: Floats) -> tuple[Floats, NDArray[np.float64]]:
    """Each slice over a power of two, which is exact, and the standard deviation in [0.5, 1) that is left."""
    deviations = np.std(values, axis=1, dtype=np.float64)
    mantissas, exponents = np.frexp(deviations)
    return np.ldexp(values, -exponents[:, None]), mantissas


def _is_constant(values: Floats) -> NDArray[np.bool_]:
    # Not by the standard deviation: rounding of the mean makes that of a constant positive.
    return np.asarray(values.min(1) == values.max(1))


def _ksg_of_slices(x: Floats, y: Floats, k: int, psi: NDArray[np.float64]) -> NDArray[np.float64]:
    is_constant = _is_constant(x) | _is_constant(y)
    (x, x_deviations), (y, y_deviations) = _normalize(x), _normalize(y)
    ratios = np.divide(x_deviations, y_deviations, out=np.ones(len(x)), where=~is_constant).astype(x.dtype)
    order = np.argsort(x, axis=1)
    x_sorted = np.take_along_axis(x, order, 1)
    for row in np.flatnonzero((x_sorted[:, 1:] == x_sorted[:, :-1]).any(1)):
        order[row] = np.lexsort((y[row], x[row]))  # copies of a sample must lie side by side
    paired = np.take_along_axis(y, order, 1)
    estimates = np.zeros(len(x))
    _sum_ksg(x_sorted, paired, np.sort(y, axis=1), ratios, is_constant, k, psi, estimates)
    return estimates


def _ross_of_slices(
    x: Floats, classes: Integers, starts: Integers, k: int, psi: NDArray[np.float64]
) -> NDArray[np.float64]:
    is_constant = _is_constant(x)
    x, _ = _normalize(x)
    order = np.argsort(x, axis=1)
    estimates = np.zeros(len(x))
    _sum_ross(np.take_along_axis(x, order, 1), classes[order], starts, is_constant, k, psi, estimates)
    return estimates


def _jit(function: _Function) -> _Function:
    return cast(_Function, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


@_jit
def _bounds_within(ascending: Floats, centre: float, limit: float) -> tuple[int, int]:
    """Range of the values less than ``limit`` away from ``centre``; the two searches have no branch to mispredict."""
    first, last, size = 0, 0, len(ascending)
    while size > 1:
        half = size // 2
        first = first + half if centre - ascending[first + half - 1] >= limit else first
        last = last + half if ascending[last + half - 1] - centre < limit else last
        size -= half
    first += 1 if centre - ascending[first] >= limit else 0
    last += 1 if ascending[last] - centre < limit else 0
    return first, last


@_jit
def _limit_and_tie(distance: float, values: Floats) -> tuple[float, bool]:
    """The distance below which values are counted, and whether that counts copies only."""
    info = np.finfo(values.dtype)
    if distance < info.tiny:
        return info.tiny, True
    # Equal distances that rounding has made different must not be counted as smaller.
    return distance * (values.dtype.type(1) - 64 * info.eps), False


@_jit
def _measure_lanes(x: Floats, y: Floats, x_other: Floats, y_other: Floats, ratio: float, out: Floats) -> None:
    for lane in range(len(out)):
        dx, dy = abs(x_other[lane] - x[lane]), abs(y_other[lane] - y[lane]) * ratio
        out[lane] = dx if dx > dy else dy


@_jit
def _insert_lanes(nearest: Floats, left: Floats, right: Floats) -> None:
    """Keep the smallest of three in ``nearest``; hand the two others on to the next rank."""
    for lane in range(len(nearest)):
        kept, a, b = nearest[lane], left[lane], right[lane]
        low, a = (kept, a) if kept < a else (a, kept)
        nearest[lane], right[lane] = (low, b) if low < b else (b, low)
        left[lane] = a


@_jit
def _insert(nearest: Floats, distance: float) -> None:
    rank = len(nearest) - 1
    while rank > 0 and nearest[rank - 1] > distance:
        nearest[rank] = nearest[rank - 1]
        rank -= 1
    nearest[rank] = distance


@_jit
def _sweep_on(x: Floats, y: Floats, i: int, steps: int, ratio: float, nearest: Floats) -> None:
    """Go on in both directions beyond ``steps`` until the difference in x alone exceeds the k-th distance."""
    last = len(nearest) - 1
    for direction in (-1, 1):
        j = i + direction * (steps + 1)
        dx = abs(x[j] - x[i])
        while dx < nearest[last]:
            distance = max(dx, abs(y[j] - y[i]) * ratio)
            if distance < nearest[last]:
                _insert(nearest, distance)
            j += direction
            dx = abs(x[j] - x[i])


@_jit
def _find_kth_distances(
    x: Floats, y: Floats, samples: int, steps: int, ratio: float, k: int, distances: Floats
) -> None:
    """Distances under the maximum norm to the k-th neighbours of samples sorted by x.

    The ``steps`` samples on either side are compared for many points at a time, with no branch; by then the
    k-th distance is nearly final, and each point finishes alone. ``x`` and ``y`` have ``steps + 1`` values before the
    first sample and ``steps + 1 + _LANES`` behind the last, infinite in x.
    """
    ranks, nearest = np.empty((k, _LANES), x.dtype), np.empty(k, x.dtype)
    left, right = np.empty(_LANES, x.dtype), np.empty(_LANES, x.dtype)
    for block in range(0, samples, _LANES):
        start = block + steps + 1
        stop = start + _LANES
        ranks[:] = np.inf
        for step in range(1, steps + 1):
            a, b = start - step, start + step
            x_block, y_block = x[start:stop], y[start:stop]
            _measure_lanes(x_block, y_block, x[a : a + _LANES], y[a : a + _LANES], ratio, left)
            _measure_lanes(x_block, y_block, x[b : b + _LANES], y[b : b + _LANES], ratio, right)
            for rank in range(k):
                _insert_lanes(ranks[rank], left, right)
        for lane in range(min(_LANES, samples - block)):
            nearest[:] = ranks[:, lane]
            _sweep_on(x, y, start + lane, steps, ratio, nearest)
            distances[block + lane] = nearest[k - 1]


@_jit
def _sum_ksg(
    x: Floats,
    paired: Floats,
    y: Floats,
    ratios: Floats,
    is_constant: NDArray[np.bool_],
    k: int,
    psi: NDArray[np.float64],
    estimates: NDArray[np.float64],
) -> None:
    """KSG of every slice: ``x`` ascending, ``paired`` its y in the same order, ``y`` ascending."""
    slices, samples = x.shape
    steps = (
        int(math.sqrt(k * samples)) // 2
    )  # about a third of the neighbours looked at when x and y are unrelated
    padded_x = np.full(samples + 2 * (steps + 1) + _LANES, np.inf, x.dtype)
    padded_x[: steps + 1] = -np.inf
    padded_y = np.zeros_like(padded_x)
    distances = np.empty(samples, x.dtype)
    for s in range(slices):
        if is_constant[s]:
            continue
        padded_x[steps + 1 : steps + 1 + samples], padded_y[steps + 1 : steps + 1 + samples] = x[s], paired[s]
        _find_kth_distances(padded_x, padded_y, samples, steps, ratios[s], k, distances)
        total = 0.0
        for i in range(samples):
            limit, is_tied = _limit_and_tie(distances[i], distances)
            first, last = _bounds_within(x[s], x[s, i], limit)
            y_first, y_last = _bounds_within(y[s], paired[s, i], limit / ratios[s])
            neighbours = k
            if is_tied:
                a, b = _bounds_within(paired[s, first:last], paired[s, i], limit)
                neighbours = b - a
            total += psi[neighbours] - psi[last - first] - psi[y_last - y_first]
        estimates[s] = psi[samples] + total / samples


@_jit
def _kth_distance_sorted(ascending: Floats, i: int, k: int) -> float:
    """Distance from value ``i`` to its k-th neighbour: the best of the windows of k + 1 values that hold it."""
    best = ascending[-1] - ascending[0]
    for start in range(max(0, i - k), min(i, len(ascending) - 1 - k) + 1):
        below, above = ascending[i] - ascending[start], ascending[start + k] - ascending[i]
        best = min(best, max(below, above))
    return best


@_jit
def _sum_ross(
    x: Floats,
    classes: Integers,
    starts: Integers,
    is_constant: NDArray[np.bool_],
    k: int,
    psi: NDArray[np.float64],
    estimates: NDArray[np.float64],
) -> None:
    """Ross of every slice: ``x`` ascending, ``classes`` in the same order, class c has ``starts[c + 1] - starts[c]``."""
    slices, samples = x.shape
    by_class = np.empty(samples, x.dtype)
    for s in range(slices):
        if is_constant[s]:
            continue
        ends = starts[:-1].copy()
        for i in range(samples):
            by_class[ends[classes[s, i]]] = x[s, i]
            ends[classes[s, i]] += 1
        total = 0.0
        for c in range(len(starts) - 1):
            members = by_class[starts[c] : starts[c + 1]]
            count = len(members)
            for i in range(count):
                neighbours = min(k, count - 1)
                limit, is_tied = _limit_and_tie(_kth_distance_sorted(members, i, neighbours), members)
                first, last = _bounds_within(x[s], members[i], limit)
                if is_tied:
                    a, b = _bounds_within(members, members[i], limit)
                    neighbours = b - a
                total += psi[neighbours] - psi[count] - psi[last - first]
        estimates[s] = psi[samples] + total / samples
