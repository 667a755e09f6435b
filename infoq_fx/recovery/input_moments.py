"""Moments of a layer's input, in the reference and in the quantized model, and what they say of a rounded weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Pair
from infoq_fx.recovery.second_order import Curvature, cholesky, factorize, factorize_inputs
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.unfolding import input_rows

__all__ = [
    "MOST_COLUMNS",
    "InputMoments",
    "InputSamples",
    "Inputs",
    "RunningMoments",
    "average_moments",
    "measure_moments",
    "measure_rows",
]

MOST_COLUMNS = 8192  # the moments of more would take gigabytes
_MOMENT_NOISE = 1e-5  # relative rounding error of sums of float32 products
_SAMPLES_SHARE = 2  # rows are kept as they are if the columns are this many times as many


@dataclass(frozen=True)
class InputMoments:
    """Moments of ``count`` rows of a layer's input, float64: x in the reference and x^ in the quantized model.

    ``mean`` E x and ``mean_quantized`` E x^ are ``[groups, columns]``. ``second`` E x^ x^^T and ``cross`` E x x^^T
    are ``[groups, columns, columns]``, minus the products of the means if they are centred.
    """

    count: int
    mean: Tensor
    mean_quantized: Tensor
    second: Tensor
    cross: Tensor

    def centre(self) -> InputMoments:
        """Return covariances in place of second moments, for layers whose bias corrects the mean error."""
        outer = self.mean_quantized[:, None, :]
        return InputMoments(
            self.count,
            self.mean,
            self.mean_quantized,
            self.second - self.mean_quantized[:, :, None] * outer,
            self.cross - self.mean[:, :, None] * outer,
        )

    def ridge(self, damping: float) -> Tensor:
        """Return ``damping`` times the mean diagonal, above rounding errors where inputs are constant, ``[groups]``."""
        return _ridge(self.second.diagonal(dim1=1, dim2=2), self.mean_quantized, damping)

    def factorize(self, damping: float) -> Curvature:
        """Return the curvature of the layer's output error, with a ridge of ``damping``."""
        return factorize(self.second + self._diagonal(damping))

    def ideal_rows(self, rows: Tensor, shrinkage: float) -> Tensor:
        """Return the real-valued rows that best approximate the reference's output from the quantized model's input.

        They minimise ``E |W x - V x^|^2 + ridge |V - W|^2`` over V, float64 ``[groups, rows, columns]``.
        """
        ridge = self._diagonal(shrinkage)
        target = rows.double() @ (self.cross + ridge)
        found: Tensor = torch.cholesky_solve(target.mT, cholesky(self.second + ridge)).mT
        return found

    def output_error(self, rows: Tensor, rounded: Tensor) -> float:
        """Return ``E |W x - V x^|^2 - E |W x|^2`` for rounded rows V, summed over the rows."""
        return float(((rounded @ self.second - 2 * rows @ self.cross) * rounded).sum())

    def _diagonal(self, damping: float) -> Tensor:
        size = self.ridge(damping)
        return torch.eye(self.second.shape[1], dtype=size.dtype, device=size.device) * size[:, None, None]


@dataclass(frozen=True)
class InputSamples:
    """The input rows themselves, where they are fewer than the columns: their moments have no higher rank.

    ``reference`` and ``quantized`` are ``[groups, count, columns]``, float64, minus their means if ``is_centred``.
    The methods are those of :class:`InputMoments`, by matrices of the size of ``count``.
    """

    reference: Tensor
    quantized: Tensor
    mean: Tensor
    mean_quantized: Tensor

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.reference.shape[1]

    def centre(self) -> InputSamples:
        """See :class:`InputMoments`."""
        means = self.mean[:, None, :], self.mean_quantized[:, None, :]
        return replace(self, reference=self.reference - means[0], quantized=self.quantized - means[1])

    def ridge(self, damping: float) -> Tensor:
        """See :class:`InputMoments`."""
        return _ridge(self.quantized.square().mean(1), self.mean_quantized, damping)

    def factorize(self, damping: float) -> Curvature:
        """See :class:`InputMoments`."""
        return factorize_inputs(self.quantized / math.sqrt(self.count), self.ridge(damping))

    def ideal_rows(self, rows: Tensor, shrinkage: float) -> Tensor:
        """See :class:`InputMoments`."""
        products = self.quantized @ self.quantized.mT / self.count
        size = self.ridge(shrinkage)[:, None, None]
        inner = products + size * torch.eye(self.count, dtype=size.dtype, device=size.device)
        missing = rows.double() @ (self.reference - self.quantized).mT
        found: Tensor = rows + torch.linalg.solve(inner, missing.mT).mT @ self.quantized / self.count
        return found

    def output_error(self, rows: Tensor, rounded: Tensor) -> float:
        """See :class:`InputMoments`."""
        wanted, found = rows @ self.reference.mT, rounded @ self.quantized.mT
        return float(((found - 2 * wanted) * found).sum() / self.count)


Inputs = InputMoments | InputSamples


class RunningMoments:
    """Adds up the moments of batches, in the order in which they come, so that threads do not change the result."""

    def __init__(self) -> None:
        self._total: InputMoments | None = None
        self._samples: list[InputSamples] = []

    def add(self, part: Inputs | None) -> None:
        """Take the rows of a batch; see :func:`measure_rows`."""
        if isinstance(part, InputSamples):
            self._samples.append(part)
        elif part is not None:
            added = _scale(part, part.count)
            self._total = added if self._total is None else _add_to(self._total, added)

    def finish(self) -> Inputs | None:
        """Return the moments of all rows; None if there were none."""
        if self._samples:
            return average_moments(self._samples)
        return None if self._total is None else _scale(self._total, 1 / self._total.count)


def measure_rows(reference: Tensor, quantized: Tensor, rows_in_all: float) -> Inputs | None:
    """Return the moments of the rows of a batch, ``[groups, rows, columns]``; None for too many columns.

    The rows are kept as they are where ``rows_in_all``, those of all batches, are at most half as many as the columns.
    Otherwise the result is None for more than ``MOST_COLUMNS`` columns. The same tensor may be given twice.
    """
    x, found = reference, quantized
    if _SAMPLES_SHARE * rows_in_all <= x.shape[2]:
        x, found = x.double(), found.double()
        return InputSamples(x, found, x.mean(1), found.mean(1))
    if x.shape[2] > MOST_COLUMNS:
        return None
    second = (found.mT @ found / x.shape[1]).double()
    cross = second if x is found else (x.mT @ found / x.shape[1]).double()
    return InputMoments(x.shape[1], x.mean(1).double(), found.mean(1).double(), second, cross)


def measure_moments(runner: LayerwiseRunner, layer: Layer, rows: int) -> tuple[Inputs, Inputs] | None:
    """Measure the moments over the samples of even and of odd numbers, from about ``rows`` rows in all.

    The runner goes on to the layer's input. A single sample is used for both halves. The result is None where that of
    :func:`measure_rows` is.
    """
    most = max(1, math.ceil(rows / runner.samples))
    starts = [0, *itertools.accumulate(runner.batch_samples)]

    def read(index: int, pair: Pair) -> list[Inputs | None]:
        reference, quantized = pair.reference, pair.quantized
        if reference.ndim < 2 and isinstance(quantized, Tensor):
            reference, quantized = reference[None], quantized[None]
        x, found = input_rows(layer, reference, most), input_rows(layer, quantized, most)
        in_all, samples = x.shape[1] / runner.batch_samples[index] * runner.samples, len(reference)
        first = starts[index] % 2 if samples > 1 else index % 2
        parts = [(_every_second(x, samples, n), _every_second(found, samples, n)) for n in (first, 1 - first)]
        return [measure_rows(*part, in_all) if part[0].shape[1] else None for part in parts]

    halves = RunningMoments(), RunningMoments()
    for parts in runner.collect(layer.source, read):
        for half, part in zip(halves, parts, strict=True):
            half.add(part)
    first, second = (half.finish() for half in halves)
    return None if first is None else (first, second or first)


def _every_second(rows: Tensor, samples: int, first: int) -> Tensor:
    """The rows ``[groups, rows, columns]`` of every second sample."""
    if samples == 1:
        return rows[:, :0] if first else rows
    groups, count, columns = rows.shape
    return rows.view(groups, samples, count // samples, columns)[:, first::2].reshape(groups, -1, columns)


def average_moments(parts: Sequence[Inputs]) -> Inputs:
    """Return the moments of all rows together, added in order so that threads do not change the result."""
    samples = [part for part in parts if isinstance(part, InputSamples)]
    if samples:
        reference = torch.cat([part.reference for part in samples], 1)
        quantized = torch.cat([part.quantized for part in samples], 1)
        return InputSamples(reference, quantized, reference.mean(1), quantized.mean(1))
    moments = [part for part in parts if isinstance(part, InputMoments)]
    count = sum(part.count for part in moments)

    def average(values: Iterable[Tensor]) -> Tensor:
        total = sum(value * (part.count / count) for value, part in zip(values, moments, strict=True))
        assert isinstance(total, Tensor)
        return total

    return InputMoments(
        count,
        average(part.mean for part in moments),
        average(part.mean_quantized for part in moments),
        average(part.second for part in moments),
        average(part.cross for part in moments),
    )


def _scale(part: InputMoments, factor: float) -> InputMoments:
    """The moments times a number; the count stays."""
    second = part.second * factor
    cross = second if part.cross is part.second else part.cross * factor
    return InputMoments(part.count, part.mean * factor, part.mean_quantized * factor, second, cross)


def _add_to(total: InputMoments, part: InputMoments) -> InputMoments:
    """The sum of both, in the memory of the first."""
    total.second.add_(part.second)
    if total.cross is not total.second:
        total.cross.add_(part.cross)
    return replace(
        total,
        count=total.count + part.count,
        mean=total.mean + part.mean,
        mean_quantized=total.mean_quantized + part.mean_quantized,
    )


def _ridge(diagonal: Tensor, mean: Tensor, damping: float) -> Tensor:
    noise = _MOMENT_NOISE * (diagonal.abs() + mean.square()).mean()
    return (damping * diagonal.mean(1)).maximum(noise).clamp_min(1e-12)
