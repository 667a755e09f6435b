"""Mutual information of one-dimensional projections, in nats: KSG, Ross, random directions, class groups.

Sliced mutual information is the mean, over random directions, of the information between projections. Whoever
compares two networks projects both onto the same directions and takes the difference slice by slice: most of
the estimator's spread is common to the two and cancels.

ReLU and low bit-widths put many samples on one value. A sample whose k-th neighbour lies at distance 0 is
therefore counted as a discrete value, by its copies; where several neighbours lie at the k-th distance, those
strictly nearer are counted instead of k. Without ties both are the plain formulas.
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

_CHUNK_VALUES = 1 << 14  # slices are done a few at a time, so that what lies between two steps stays in cache
_MIN_VALUES_PER_THREAD = 1 << 14  # a few ms of work; for less a thread costs more than it saves
_LLOYD_STEPS = 100


@dataclass(frozen=True)
class RankedSamples:
    """One variable, made ready once for the estimates of many others: see :func:`rank_samples`.

    ``ascending`` ``[slices, samples]`` are the values within [-1, 1], ``order`` puts the samples into their
    order, ``deviation`` ``[slices]`` belongs to them, ``has_ties`` and ``is_varied`` are ``[slices]``.
    """

    ascending: Floats
    order: Integers
    deviation: Doubles
    has_ties: Mask
    is_varied: Mask


@dataclass(frozen=True)
class ClassedSamples:
    """The classes of the samples, made ready once: see :func:`class_samples`.

    ``is_kept`` ``[samples]`` leaves out those alone in their class; ``classes`` are numbered without gaps,
    ``[samples kept]``; ``sizes`` ``[classes]``.
    """

    is_kept: Mask
    classes: Integers
    sizes: Integers


def rank_samples(x: ArrayLike) -> RankedSamples:
    """Sort a variable whose information with many others will be estimated.

    Args:
        x: ``[slices, samples]``, or ``[samples]``; float32 and float64 are kept.

    Raises:
        OptionError: another shape.
        CalibrationDataError: values that are NaN or infinite.
    """
    return _rank(_as_slices(x, "x"))


def class_samples(labels: ArrayLike) -> ClassedSamples:
    """Count the classes of samples for many estimates.

    Args:
        labels: integers ``[samples]``, any values.

    Raises:
        OptionError: labels that are no integers, or not one-dimensional.
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


def estimate_ksg(x: ArrayLike | RankedSamples, y: ArrayLike, *, k: int = 5, threads: int | None = None) -> Doubles:
    """Mutual information of two continuous variables, slice by slice, from k-th neighbour distances.

    Both variables are brought to unit standard deviation; neighbours are exact, under the maximum norm. For a
    sample with at least ``k`` copies, neighbours and margins count the copies.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for the same samples in every slice; or what
            :func:`rank_samples` made of it, where several ``y`` meet one ``x``.
        y: the same for the second variable. float32 and float64 are kept, other types become float64.
        k: neighbours; more of them mean less variance and more bias.
        threads: slices are spread over so many; None for numba's own setting. The result is the same.

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
    # Not by the standard deviation: rounding of the mean leaves a constant a little of it.
    is_varied = ranked.is_varied & (y.min(1) < y.max(1))
    return _map_slices(lambda rows: _ksg_of_slices(ranked, y, rows, int(k), psi), is_varied, samples, threads)


def estimate_ross(
    x: ArrayLike, labels: ArrayLike | ClassedSamples, *, k: int = 3, threads: int | None = None
) -> Doubles:
    """Mutual information of a continuous variable and a class, slice by slice.

    A class of ``n`` samples uses ``min(k, n - 1)`` neighbours; samples alone in their class are left out.

    Args:
        x: ``[slices, samples]``, or ``[samples]`` for one slice; float32 and float64 are kept.
        labels: integers ``[samples]``, any values; or what :func:`class_samples` made of them.
        k: neighbours within the class; more of them mean less variance and more bias.
        threads: slices are spread over so many; None for numba's own setting. The result is the same.

    Returns:
        float64 ``[slices]`` in nats, never clipped at 0; exactly 0 for a constant ``x`` or one usable class.

    Raises:
        OptionError: shapes that do not fit, labels that are no integers, or ``k`` below 1.
        CalibrationDataError: no class has two samples, or values that are NaN or infinite.

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
        raise OptionError(f"baseline {before.shape} and perturbed {after.shape} differ; give the same [slices]")
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
        raise OptionError(f"rows have shape {points.shape}; give [classes, dimension], not empty")
    _check_finite(points, "rows")
    distinct = len(np.unique(points, axis=0))
    start = np.random.Generator(np.random.PCG64(seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")  # fewer groups then come out
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
    """Estimates of the varied slices, a few at a time and in several threads; 0 for the others."""
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
    """Powers of two that bring values near 1: exact, and far from overflow and subnormal numbers."""
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
