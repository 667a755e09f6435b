"""Estimates mutual information of one-dimensional projections, in nats: KSG, Ross, random directions, class groups.

Sliced mutual information is the mean, over random directions, of the information between projections. To compare two
networks, project both onto the same directions and take the difference slice by slice: most of the estimator's variance
is common to both and cancels.

ReLU and low bit-widths give many samples the same value. A sample whose k-th neighbour is at distance 0 is therefore
treated as a discrete value, by the number of its copies. If several neighbours are at the k-th distance, those strictly
closer are counted instead of k. Without ties both estimators are the published formulas.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.vq import kmeans2
from scipy.special import digamma

from infoq_fx.core.jit import usable_threads
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.scoring.information import ksg_kernels as kernels

__all__ = [
    "ClassedSamples",
    "RankedSamples",
    "absolute_change",
    "class_samples",
    "estimate_ksg",
    "estimate_ross",
    "group_classes",
    "rank_samples",
    "unit_projections",
]

Floats: TypeAlias = NDArray[np.floating[Any]]
Doubles: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]

_CHUNK_VALUES = 1 << 14  # slices are processed a few at a time, so that intermediate values stay in cache
_MIN_VALUES_PER_THREAD = 1 << 14  # a few ms of work; for less, a thread costs more than it saves
_LLOYD_STEPS = 100


@dataclass(frozen=True)
class RankedSamples:
    """One variable, sorted once for estimates with many others; see :func:`rank_samples`.

    ``ascending`` ``[slices, samples]`` has the sorted values, scaled to [-1, 1]; ``order`` their sample indices;
    ``deviation`` ``[slices]`` their standard deviation; ``has_ties`` and ``is_varied`` are ``[slices]``.
    """

    ascending: Floats
    order: Integers
    deviation: Doubles
    has_ties: Mask
    is_varied: Mask


@dataclass(frozen=True)
class ClassedSamples:
    """The classes of the samples, counted once for many estimates; see :func:`class_samples`.

    ``is_kept`` ``[samples]`` is False for samples that are alone in their class; ``classes`` ``[samples kept]`` are
    numbered without gaps; ``sizes`` is ``[classes]``.
    """

    is_kept: Mask
    classes: Integers
    sizes: Integers


def rank_samples(x: ArrayLike) -> RankedSamples:
    """Sort a variable once, to estimate its information with many others.

    Args:
        x: ``[slices, samples]``, or ``[samples]``; float32 and float64 are kept.

    Raises:
        OptionError: the shape is another.
        CalibrationDataError: a value is NaN or infinite.
    """
    return _rank(_as_slices(x, "x"))


def class_samples(labels: ArrayLike) -> ClassedSamples:
    """Count the classes of samples once, for many estimates.

    Args:
        labels: integers ``[samples]``, any values.

    Raises:
        OptionError: labels are not integers, or not one-dimensional.
        CalibrationDataError: no class has two samples.
    """
    given = np.asarray(labels)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise OptionError(f"labels are {given.dtype} {list(given.shape)}; give integers [samples]")
    _, classes, counts = np.unique(given, return_inverse=True, return_counts=True)
    is_kept = counts[classes] > 1
    if not is_kept.any():
        found = f"none of {len(counts)} classes has two samples"
        raise CalibrationDataError(f"{found}; give more samples, or merge classes with group_classes")
    _, classes, sizes = np.unique(given[is_kept], return_inverse=True, return_counts=True)
    return ClassedSamples(is_kept, classes, sizes)


def unit_projections(dimension: int, slices: int, seed: int) -> NDArray[np.float32]:
    """Draw random directions, uniformly on the unit sphere.

    Args:
        dimension: length of the vectors to be projected; 1 gives columns of +1 or -1.
        slices: number of directions.
        seed: non-negative; the same seed gives the same directions.

    Returns:
        float32 ``[dimension, slices]``, columns of norm 1.

    Raises:
        OptionError: a size is not positive, or the seed is negative.

    Reference:
        Goldfeld et al., "k-Sliced Mutual Information", 2022, with k = 1; InfoQ, Section 3.
    """
    for name, value, smallest in (("dimension", dimension, 1), ("slices", slices, 1), ("seed", seed, 0)):
        _check_integer(name, value, smallest)
    normals = np.random.Generator(np.random.PCG64(seed)).standard_normal((dimension, slices))
    return np.asarray(normals / np.linalg.norm(normals, axis=0), np.float32)


def estimate_ksg(x: ArrayLike | RankedSamples, y: ArrayLike, *, k: int = 5, threads: int | None = None) -> Doubles:
    """Estimate the mutual information of two continuous variables per slice, from k-th neighbour distances.

    Both variables are scaled to unit standard deviation. Neighbours are exact, under the maximum norm. For a sample
    with at least ``k`` copies, neighbours and margins count the copies.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for the same samples in every slice; or the result of
            :func:`rank_samples`, for estimates of one ``x`` with several ``y``.
        y: the same for the second variable. float32 and float64 are kept, other types become float64.
        k: number of neighbours; more give less variance and more bias.
        threads: number of threads for the slices; None for numba's own setting. The result is the same.

    Returns:
        float64 ``[slices]`` in nats, not clipped at 0; exactly 0 where ``x`` or ``y`` is constant.

    Raises:
        OptionError: shapes do not fit each other, or ``k`` is below 1.
        CalibrationDataError: there are at most ``k`` samples, or a value is NaN or infinite.

    Reference:
        Kraskov et al., "Estimating mutual information", 2004, Eq. 8; for tied samples Gao et al., "Estimating
        mutual information for discrete-continuous mixtures", 2017.
    """
    _check_integer("k", k, 1)
    y = _as_slices(y, "y")
    if not isinstance(x, RankedSamples):
        raw = _as_slices(x, "x")
        dtype = np.result_type(raw, y)
        x, y = _rank(raw.astype(dtype, copy=False)), y.astype(dtype, copy=False)
    ranked, y = x, y.astype(x.ascending.dtype, copy=False)
    slices, samples = max(len(ranked.ascending), len(y)), y.shape[1]
    if ranked.ascending.shape[1] != samples or {len(ranked.ascending), len(y)} - {1, slices}:
        raise OptionError(
            f"x {ranked.ascending.shape} and y {y.shape} differ; give the same samples and slices (or one to share)"
        )
    if samples <= k:
        remedy = f"give more, or k={samples - 1}" if samples > 1 else "give more"
        raise CalibrationDataError(f"k={k} neighbours need {k + 1} samples, found {samples}; {remedy}")
    psi = _digammas(samples)
    # Not by the standard deviation: due to rounding of the mean, that of a constant is not exactly 0.
    is_varied = ranked.is_varied & (y.min(1) < y.max(1))
    return _map_slices(lambda rows: _ksg_of_slices(ranked, y, rows, int(k), psi), is_varied, samples, threads)


def estimate_ross(
    x: ArrayLike, labels: ArrayLike | ClassedSamples, *, k: int = 3, threads: int | None = None
) -> Doubles:
    """Estimate the mutual information of a continuous variable and a class per slice.

    A class of ``n`` samples uses ``min(k, n - 1)`` neighbours; samples alone in their class are left out.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for one slice; float32 and float64 are kept.
        labels: integers ``[samples]``, any values; or the result of :func:`class_samples`.
        k: number of neighbours within the class; more give less variance and more bias.
        threads: number of threads for the slices; None for numba's own setting. The result is the same.

    Returns:
        float64 ``[slices]`` in nats, not clipped at 0; exactly 0 for a constant ``x`` or one usable class.

    Raises:
        OptionError: shapes do not fit each other, labels are not integers, or ``k`` is below 1.
        CalibrationDataError: no class has two samples, or a value is NaN or infinite.

    Reference:
        Ross, "Mutual information between discrete and continuous data sets", 2014; ties as in Gao et al.
    """
    _check_integer("k", k, 1)
    x = _as_slices(x, "x")
    classed = labels if isinstance(labels, ClassedSamples) else class_samples(labels)
    if len(classed.is_kept) != x.shape[1]:
        raise OptionError(
            f"there are {len(classed.is_kept)} labels for {x.shape[1]} samples; give integers [{x.shape[1]}]"
        )
    if len(classed.sizes) == 1:
        return np.zeros(len(x))
    x, samples = x[:, classed.is_kept], len(classed.classes)
    is_varied, psi = x.min(1) < x.max(1), digamma(np.arange(samples + 1.0))
    return _map_slices(lambda rows: _ross_of_slices(x[rows], classed, int(k), psi), is_varied, samples, threads)


def absolute_change(baseline: ArrayLike, perturbed: ArrayLike) -> tuple[float, float]:
    """Return the absolute change of sliced mutual information, and its standard error.

    Args:
        baseline: ``[slices]`` in nats.
        perturbed: ``[slices]`` in nats, from the same projections.

    Returns:
        The absolute mean of the differences and its standard error over slices (0 for a single one), in nats.

    Raises:
        OptionError: the shapes differ, or are not ``[slices]``.

    Reference:
        InfoQ, Eq. 3.
    """
    before, after = np.asarray(baseline, np.float64), np.asarray(perturbed, np.float64)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise OptionError(f"baseline {before.shape} and perturbed {after.shape} differ; give the same [slices]")
    differences = before - after
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return abs(float(np.mean(differences))), deviation / math.sqrt(len(differences))


def group_classes(rows: ArrayLike, groups: int, seed: int) -> Integers:
    """Merge classes with similar classifier rows by k-means, so that each group has enough samples.

    Args:
        rows: ``[classes, dimension]``, one vector per class.
        groups: number of groups; there can be fewer if fewer rows are distinct.
        seed: non-negative; of the random start of k-means.

    Returns:
        int64 ``[classes]``: the group of each class, numbered from 0 without gaps.

    Raises:
        OptionError: rows are not a matrix, ``groups`` is below 1, or the seed is negative.
        CalibrationDataError: a value of the rows is NaN or infinite.

    Reference:
        Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++", 2007.
    """
    _check_integer("groups", groups, 1)
    _check_integer("seed", seed, 0)
    points = np.asarray(rows, np.float64)
    if points.ndim != 2 or not points.size:
        raise OptionError(f"rows have shape {points.shape}; give [classes, dimension], not empty")
    _check_finite(points, "rows")
    distinct = len(np.unique(points, axis=0))
    start = np.random.Generator(np.random.PCG64(seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")  # there are then fewer groups
        _, assigned = kmeans2(points, min(groups, distinct), iter=_LLOYD_STEPS, minit="++", seed=start)
    return np.unique(assigned, return_inverse=True)[1].astype(np.int64)


def _check_integer(name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
        raise OptionError(f"{name}={value!r}; give an integer of at least {smallest}")


def _check_finite(values: Floats, name: str) -> None:
    if not (is_finite := np.isfinite(values)).all():
        found = f"{name} has {int((~is_finite).sum())} NaN or infinite of {values.size} values"
        raise CalibrationDataError(f"{found}; look for overflow in the model or for broken samples")


def _as_slices(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    array = np.atleast_2d(array if array.dtype in (np.float32, np.float64) else array.astype(np.float64))
    if array.ndim != 2 or not array.size:
        raise OptionError(f"{name} has shape {np.shape(values)}; give [slices, samples] or [samples]")
    _check_finite(array, name)
    return array


def _map_slices(estimate: Callable[[slice], Doubles], is_varied: Mask, samples: int, threads: int | None) -> Doubles:
    """Estimate the varied slices, a few at a time and in several threads; the others are 0."""
    wanted = usable_threads() if threads is None else threads
    slices = len(is_varied)
    count = max(1, min(wanted, slices, slices * samples // _MIN_VALUES_PER_THREAD))
    step = max(1, _CHUNK_VALUES // samples)
    chunks = [slice(start, start + step) for start in range(0, slices, step)]
    if count > 1:
        # numba's own parallel loops can abort the process when two threads, or a forked child, enter them.
        with ThreadPoolExecutor(count) as pool:
            estimates = np.concatenate(list(pool.map(estimate, chunks)))
    else:
        estimates = np.concatenate([estimate(chunk) for chunk in chunks])
    return np.where(is_varied, estimates, 0.0)


def _rank(x: Floats) -> RankedSamples:
    scaled = x * _scales(np.maximum(x.max(1), -x.min(1)))[:, None]
    order = np.argsort(scaled, axis=1)
    ascending = np.take_along_axis(scaled, order, 1)
    has_ties = (ascending[:, 1:] == ascending[:, :-1]).any(1)
    deviation = np.array([kernels.deviation(values) for values in ascending])
    return RankedSamples(ascending, order, deviation, has_ties, ascending[:, 0] < ascending[:, -1])


@functools.lru_cache(maxsize=8)
def _digammas(samples: int) -> Doubles:
    return np.asarray(digamma(np.arange(samples + 1.0)))


def _scales(largest: Floats) -> Floats:
    """Powers of two that scale values to about 1, exactly and far from overflow and subnormal numbers."""
    limit = np.finfo(largest.dtype).maxexp - 2
    return np.asarray(np.exp2(np.clip(-np.frexp(largest)[1], -limit, limit).astype(largest.dtype)))


def _ksg_of_slices(ranked: RankedSamples, y: Floats, rows: slice, k: int, psi: Doubles) -> Doubles:
    shared = slice(None)
    x_rows, y_rows = (rows if len(v) > 1 else shared for v in (ranked.ascending, y))
    ascending, order, values = ranked.ascending[x_rows], ranked.order[x_rows], y[y_rows]
    if ranked.has_ties[x_rows].any():
        order = np.array(np.broadcast_to(order, np.broadcast_shapes(order.shape, values.shape)))
        kernels.order_copies(ascending, values, order)
    y_ascending, deviation = np.sort(values, axis=1), ranked.deviation[x_rows]
    scales = _scales(np.maximum(y_ascending[:, -1], -y_ascending[:, 0]))
    sums = kernels.sum_ksg_terms(ascending, order, deviation, values, y_ascending, scales, k, psi)
    return np.asarray(psi[-1] + sums / y.shape[1])


def _ross_of_slices(x: Floats, classed: ClassedSamples, k: int, psi: Doubles) -> Doubles:
    ranked = _rank(x)
    sums = kernels.sum_ross_terms(ranked.ascending, ranked.order, classed.classes, classed.sizes, k, psi)
    return np.asarray(psi[-1] + sums / x.shape[1])
