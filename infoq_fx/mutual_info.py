"""Mutual information of one-dimensional projections, in nats: KSG, Ross, random directions, class groups.

Sliced mutual information is the mean, over random directions, of the information between projections. Whoever
compares two networks projects both onto the same directions and takes the difference slice by slice: most of
the estimator's spread is common to the two and cancels.

ReLU and low bit-widths put many samples on one value. A sample whose k-th neighbour lies at distance 0 is
therefore counted as a discrete value, by its copies; all others follow the plain formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import digamma

from infoq_fx.errors import CalibrationDataError, OptionError

__all__ = ["absolute_change", "estimate_ksg", "estimate_ross", "group_classes", "unit_projections"]

Floats: TypeAlias = NDArray[np.floating[Any]]
Doubles: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LANES = 128  # points whose neighbours are sought together; enough to hide the loop around them
_MIN_VALUES_PER_THREAD = 1 << 14  # a few ms of work; for less a thread costs more than it saves
_MAX_LLOYD_STEPS = 100


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
        Goldfeld et al., "k-Sliced Mutual Information", 2022, with k = 1; InfoQ, Section 3.
    """
    for name, value, smallest in (("dimension", dimension, 1), ("slices", slices, 1), ("seed", seed, 0)):
        _check_integer(name, value, smallest)
    normals = np.random.Generator(np.random.PCG64(seed)).standard_normal((dimension, slices))
    return np.asarray(normals / np.linalg.norm(normals, axis=0), np.float32)


def estimate_ksg(x: ArrayLike, y: ArrayLike, *, k: int = 5) -> Doubles:
    """Mutual information of two continuous variables, slice by slice, from k-th neighbour distances.

    Both variables are brought to unit standard deviation; neighbours are exact, under the maximum norm. For a
    sample with at least ``k`` copies, neighbours and margins count the copies.

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
        Kraskov et al., "Estimating mutual information", 2004, Eq. 8; for tied samples Gao et al., "Estimating
        mutual information for discrete-continuous mixtures", 2017.
    """
    _check_integer("k", k, 1)
    x, y = _as_slices(x, "x"), _as_slices(y, "y")
    slices, samples = max(len(x), len(y)), x.shape[1]
    if y.shape[1] != samples or {len(x), len(y)} - {1, slices}:
        raise OptionError(f"x {x.shape} and y {y.shape} need the same samples and slices (or one to share)")
    if samples <= k:
        remedy = f"give more, or k={samples - 1}" if samples > 1 else "give more"
        raise CalibrationDataError(f"k={k} neighbours need {k + 1} samples, found {samples}; {remedy}")
    dtype, psi = np.result_type(x, y), digamma(np.arange(samples + 1.0))
    x, y = (np.broadcast_to(v.astype(dtype, copy=False), (slices, samples)) for v in (x, y))
    # Not by the standard deviation: rounding of the mean leaves a constant a little of it.
    is_varied = (x.min(1) < x.max(1)) & (y.min(1) < y.max(1))
    return _map_slices(lambda rows: _ksg_of_slices(x[rows], y[rows], int(k), psi), is_varied, samples)


def estimate_ross(x: ArrayLike, labels: ArrayLike, *, k: int = 3) -> Doubles:
    """Mutual information of a continuous variable and a class, slice by slice.

    A class of ``n`` samples uses ``min(k, n - 1)`` neighbours; samples alone in their class are left out.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for one slice; float32 and float64 are kept.
        labels: integers ``[samples]``, any values.
        k: neighbours within the class; more of them mean less variance and more bias.

    Returns:
        float64 ``[slices]`` in nats, never clipped at 0; exactly 0 for a constant ``x`` or one usable class.

    Raises:
        OptionError: shapes that do not fit, labels that are no integers, or ``k`` below 1.
        CalibrationDataError: no class has two samples, or values that are NaN or infinite.

    Reference:
        Ross, "Mutual information between discrete and continuous data sets", 2014; ties as in Gao et al.
    """
    _check_integer("k", k, 1)
    x, labels = _as_slices(x, "x"), np.asarray(labels)
    if labels.shape != x.shape[1:] or labels.dtype.kind not in "iu":
        raise OptionError(f"labels must be integers [{x.shape[1]}], got {labels.dtype} {list(labels.shape)}")
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    is_kept = counts[classes] > 1
    if not is_kept.any():
        found = f"none of {len(counts)} classes has two samples"
        raise CalibrationDataError(f"{found}; give more samples, or merge classes with group_classes")
    _, classes, counts = np.unique(labels[is_kept], return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return np.zeros(len(x))
    x, samples = x[:, is_kept], len(classes)
    is_varied, psi = x.min(1) < x.max(1), digamma(np.arange(samples + 1.0))
    return _map_slices(lambda rows: _ross_of_slices(x[rows], classes, int(k), psi), is_varied, samples)


def absolute_change(baseline: ArrayLike, perturbed: ArrayLike) -> tuple[float, float]:
    """How much the sliced mutual information changed, and how well that is known.

    Args:
        baseline: ``[slices]`` in nats.
        perturbed: ``[slices]`` in nats, from the same projections.

    Returns:
        The absolute mean of the differences and its standard error over slices (0 for a single one), in nats.

    Raises:
        OptionError: the two do not have the same slices.

    Reference:
        InfoQ, Eq. 3.
    """
    before, after = np.asarray(baseline, np.float64), np.asarray(perturbed, np.float64)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise OptionError(f"baseline {before.shape} and perturbed {after.shape} must be the same [slices]")
    differences = before - after
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return abs(float(np.mean(differences))), deviation / math.sqrt(len(differences))


def group_classes(rows: ArrayLike, groups: int, seed: int) -> Integers:
    """Merge classes that the classifier holds for similar, so that each group has enough samples.

    Args:
        rows: ``[classes, dimension]``, one vector a class.
        groups: number of groups; fewer come out where fewer rows are distinct.
        seed: non-negative; of the random start of k-means.

    Returns:
        int64 ``[classes]``: the group of each class, numbered from 0 without gaps.

    Raises:
        OptionError: rows that are no matrix, no group, or a negative seed.
        CalibrationDataError: rows that are NaN or infinite.

    Reference:
        Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++", 2007.
    """
    _check_integer("groups", groups, 1)
    _check_integer("seed", seed, 0)
    points = np.asarray(rows, np.float64)
    if points.ndim != 2 or not points.size:
        raise OptionError(f"rows must be [classes, dimension] and not empty, got shape {points.shape}")
    _check_finite(points, "rows")
    centres = _seed_centres(points, groups, np.random.Generator(np.random.PCG64(seed)))
    assigned = np.full(len(points), -1)
    for _ in range(_MAX_LLOYD_STEPS):
        previous, nearest = assigned, cdist(points, centres, "sqeuclidean").argmin(1)
        assigned = np.unique(nearest, return_inverse=True)[1]
        if np.array_equal(assigned, previous):
            break
        centres = np.stack([points[assigned == group].mean(0) for group in range(assigned.max() + 1)])
    return assigned.astype(np.int64)


def _seed_centres(points: Doubles, groups: int, generator: np.random.Generator) -> Doubles:
    """Distinct rows, each drawn with a probability proportional to its squared distance from those before."""
    chosen = [int(generator.integers(len(points)))]
    nearest = cdist(points, points[chosen], "sqeuclidean")[:, 0]
    while len(chosen) < groups and nearest.any():
        chosen.append(int(generator.choice(len(points), p=nearest / nearest.sum())))
        nearest = np.minimum(nearest, cdist(points, points[chosen[-1:]], "sqeuclidean")[:, 0])
    return points[chosen]


def _check_integer(name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
        raise OptionError(f"{name}={value!r} must be an integer of at least {smallest}")


def _check_finite(values: Floats, name: str) -> None:
    if not (is_finite := np.isfinite(values)).all():
        found = f"{name} has {int((~is_finite).sum())} NaN or infinite of {values.size} values"
        raise CalibrationDataError(f"{found}; look for overflow in the model or for broken samples")


def _as_slices(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    array = np.atleast_2d(array if array.dtype in (np.float32, np.float64) else array.astype(np.float64))
    if array.ndim != 2 or not array.size:
        raise OptionError(f"{name} must be [slices, samples] or [samples], got shape {np.shape(values)}")
    _check_finite(array, name)
    return array


def _map_slices(estimate: Callable[[Integers], Doubles], is_varied: Mask, samples: int) -> Doubles:
    """Estimates of the varied slices, in as many threads as numba may use; 0 for the others."""
    estimates, rows = np.zeros(len(is_varied)), np.flatnonzero(is_varied)
    threads = min(numba.get_num_threads(), len(rows), max(1, len(rows) * samples // _MIN_VALUES_PER_THREAD))
    if threads > 1:
        # numba's own parallel loops can abort the process when two threads, or a forked child, enter them.
        with ThreadPoolExecutor(threads) as pool:
            estimates[rows] = np.concatenate(list(pool.map(estimate, np.array_split(rows, threads))))
    elif len(rows):
        estimates[rows] = estimate(rows)
    return estimates


def _normalize(values: Floats) -> tuple[Floats, Doubles]:
    """Each slice within [-1, 1], times a power of two, which is exact; and its standard deviation."""
    exponents = np.frexp(np.abs(values).max(1))[1]
    largest = np.finfo(values.dtype).maxexp - 2
    scaled = values * np.exp2(np.clip(-exponents, -largest, largest).astype(values.dtype))[:, None]
    return scaled, np.std(scaled, axis=1, dtype=np.float64)


def _ksg_of_slices(x: Floats, y: Floats, k: int, psi: Doubles) -> Doubles:
    (x, x_deviations), (y, y_deviations) = _normalize(x), _normalize(y)
    ratios = (x_deviations / y_deviations).astype(x.dtype)
    order = np.argsort(x, axis=1)
    ascending = np.take_along_axis(x, order, 1)
    for row in np.flatnonzero((ascending[:, 1:] == ascending[:, :-1]).any(1)):
        order[row] = np.lexsort((y[row], x[row]))  # copies of a sample must lie side by side
    paired = np.take_along_axis(y, order, 1)
    distances = _find_kth_distances(ascending, paired, ratios, k)
    neighbours = _count_neighbours(distances, np.full(x.shape, k), ascending, paired)
    limits = _limit_counts(distances)
    x_counts = _count_within(ascending, ascending, limits)
    y_counts = _count_within(np.sort(y, axis=1), paired, limits / ratios[:, None])
    return np.asarray(psi[-1] + (psi[neighbours] - psi[x_counts] - psi[y_counts]).mean(1))


def _ross_of_slices(x: Floats, classes: Integers, k: int, psi: Doubles) -> Doubles:
    x, _ = _normalize(x)
    order, sizes = np.argsort(x, axis=1), np.bincount(classes)
    ascending, class_of = np.take_along_axis(x, order, 1), np.repeat(np.arange(len(sizes)), sizes)
    members, distances = _find_kth_in_classes(ascending, classes[order], np.cumsum(sizes), k)
    plain, class_of = (np.broadcast_to(v, x.shape) for v in (np.minimum(k, sizes[class_of] - 1), class_of))
    neighbours = _count_neighbours(distances, plain, members, class_of)
    counts = _count_within(ascending, members, _limit_counts(distances))
    return np.asarray(psi[-1] + (psi[neighbours] - psi[sizes[class_of]] - psi[counts]).mean(1))


def _limit_counts(distances: Floats) -> Floats:
    """Values nearer than this are counted: copies at distance 0; none that only rounding has made nearer."""
    info = np.finfo(distances.dtype)
    return np.where(distances > 0, distances * distances.dtype.type(1 - 64 * info.eps), info.tiny)


def _count_neighbours(distances: Floats, counts: Integers, *ascending: NDArray[Any]) -> Integers:
    """``counts``, but where the distance is 0 the copies of the sample: they lie side by side."""
    if distances.all():
        return counts
    is_first = np.ones(distances.shape, bool)
    is_first[:, 1:] = np.any([values[:, 1:] != values[:, :-1] for values in ascending], axis=0)
    runs = np.cumsum(is_first) - 1
    return np.where(distances > 0, counts, np.bincount(runs)[runs].reshape(distances.shape))


def _jit(function: _Function) -> _Function:
    return cast(_Function, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


@_jit
def _count_within(ascending: Floats, centres: Floats, limits: Floats) -> Integers:
    """How many values of its slice are less than its limit away from each centre."""
    counts, one = np.empty(ascending.shape, np.int64), np.uint64(1)
    first, last = np.empty((2, ascending.shape[1]), np.uint64)
    for s in range(len(ascending)):
        values, points, reach, size = ascending[s], centres[s], limits[s], np.uint64(ascending.shape[1])
        first[:], last[:] = 0, 0
        while size > 0:
            half = max(size >> one, one)
            for i in range(len(points)):  # bisection with points innermost: the compiler needs no branch
                a, b = first[i], last[i]
                first[i] = a + half if points[i] - values[a + half - one] >= reach[i] else a
                last[i] = b + half if values[b + half - one] - points[i] < reach[i] else b
            size -= half
        counts[s] = last - first
    return counts


@_jit
def _measure_lanes(x: Floats, y: Floats, other_x: Floats, other_y: Floats, ratio: float, out: Floats) -> None:
    for lane in range(len(out)):
        dx, dy = abs(other_x[lane] - x[lane]), abs(other_y[lane] - y[lane]) * ratio
        out[lane] = dx if dx > dy else dy


@_jit
def _insert_lanes(nearest: Floats, left: Floats, right: Floats) -> None:
    """Keep the smallest of three in ``nearest``, hand the two others on to the next rank."""
    for lane in range(len(nearest)):
        kept, a, b = nearest[lane], left[lane], right[lane]
        low = min(kept, a)  # min and max, not an exchange: they become vector instructions
        nearest[lane], left[lane], right[lane] = min(low, b), max(kept, a), max(low, b)


@_jit
def _search_on(x: Floats, y: Floats, i: int, steps: int, ratio: float, nearest: Floats) -> None:
    """Go on to both sides, beyond ``steps``, until the difference in x alone reaches the k-th distance."""
    last = len(nearest) - 1
    for direction in (-1, 1):
        j = i + direction * (steps + 1)
        while abs(x[j] - x[i]) < nearest[last]:
            distance = max(abs(x[j] - x[i]), abs(y[j] - y[i]) * ratio)
            if distance < nearest[last]:
                nearest[last] = distance
                for rank in range(last, 0, -1):
                    low, high = nearest[rank - 1], nearest[rank]
                    nearest[rank - 1], nearest[rank] = min(low, high), max(low, high)
            j += direction


@_jit
def _search_slice(x: Floats, y: Floats, steps: int, ratio: float, k: int, distances: Floats) -> None:
    """Distances to the k-th neighbours under the maximum norm, for samples ascending in x.

    The ``steps`` samples to either side are compared for many points at a time, without a branch; then each
    goes on alone. ``x`` is padded with infinity: ``steps + 1`` in front, ``steps + 1 + _LANES`` behind.
    """
    ranks, nearest = np.empty((k, _LANES), x.dtype), np.empty(k, x.dtype)
    left, right = np.empty(_LANES, x.dtype), np.empty(_LANES, x.dtype)
    for block in range(0, len(distances), _LANES):
        start, stop = block + steps + 1, block + steps + 1 + _LANES
        ranks[:] = np.inf
        for step in range(1, steps + 1):
            behind, ahead = slice(start - step, stop - step), slice(start + step, stop + step)
            _measure_lanes(x[start:stop], y[start:stop], x[behind], y[behind], ratio, left)
            _measure_lanes(x[start:stop], y[start:stop], x[ahead], y[ahead], ratio, right)
            for rank in range(k):
                _insert_lanes(ranks[rank], left, right)
        for lane in range(min(_LANES, len(distances) - block)):
            nearest[:] = ranks[:, lane]
            _search_on(x, y, start + lane, steps, ratio, nearest)
            distances[block + lane] = nearest[k - 1]


@_jit
def _find_kth_distances(x: Floats, paired: Floats, ratios: Floats, k: int) -> Floats:
    """The k-th distances of all slices: ``x`` ascending, ``paired`` its y."""
    samples, distances = x.shape[1], np.empty_like(x)
    steps = int(math.sqrt(k * samples)) * 2 // 3  # more than most points need
    padded_x = np.full(samples + 2 * (steps + 1) + _LANES, np.inf, x.dtype)
    padded_x[: steps + 1] = -np.inf
    padded_y = np.zeros_like(padded_x)
    for s in range(len(x)):
        padded_x[steps + 1 : steps + 1 + samples] = x[s]
        padded_y[steps + 1 : steps + 1 + samples] = paired[s]
        _search_slice(padded_x, padded_y, steps, ratios[s], k, distances[s])
    return distances


@_jit
def _find_kth_in_classes(x: Floats, classes: Integers, stops: Integers, k: int) -> tuple[Floats, Floats]:
    """Every slice class by class, ascending, and the distances to the k-th neighbours within the class."""
    members, distances = np.empty_like(x), np.empty_like(x)
    for s in range(len(x)):
        ends, start = np.append(0, stops), 0
        for i in range(x.shape[1]):
            members[s, ends[classes[s, i]]] = x[s, i]
            ends[classes[s, i]] += 1
        for stop in stops:
            near, values = min(k, stop - start - 1), members[s, start:stop]
            for i in range(len(values)):
                best = np.inf  # over the windows of near + 1 values that hold this one
                for low in range(max(0, i - near), min(i, len(values) - 1 - near) + 1):
                    best = min(best, max(values[i] - values[low], values[low + near] - values[i]))
                distances[s, start + i] = best
            start = stop
    return members, distances
