"""Moments of a layer's input, in the reference and in the quantized model, and what they say of a rounded weight."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infoq_fx.core.threads import ThreadMap, thread_map
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Pair
from infoq_fx.recovery.moments.row_products import (
    Rows,
    add_products,
    as_integers,
    count_rows,
    dequantize_rows,
    join_rows,
    mirror,
    rows_at_once,
    sum_rows,
)
from infoq_fx.recovery.moments.unfolding import sources_of
from infoq_fx.recovery.second_order import Curvature, cholesky, factorize, factorize_inputs
from infoq_fx.recovery.segments import Layer
from infoq_fx.runtime.integer_convolution import QuantizedTensor

__all__ = [
    "MOST_COLUMNS",
    "InputMoments",
    "InputSamples",
    "Inputs",
    "RunningMoments",
    "average_moments",
    "dtype_of_moments",
    "measure_moments",
]

MOST_COLUMNS = 8192  # the moments of more would take gigabytes
_MOST_DOUBLE = 2048  # columns; moments of more are held in float32, since they are sums of float32 products anyway
_MOMENT_NOISE = 1e-5  # relative rounding error of sums of float32 products
_FLOAT32_RANGE = 1e-20, 1e20  # of second moments; ridges are up to a hundred times as large, weights anything
_ROWS_AT_ONCE = 256
_SAMPLES_SHARE = 16  # rows are kept as they are if the columns are this many times as many;
_SHARE_OF_MANY = 2  # of more than MOST_COLUMNS columns


@dataclass(frozen=True)
class InputMoments:
    """Moments of ``count`` rows of a layer's input: x in the reference and x^ in the quantized model.

    ``mean`` E x and ``mean_quantized`` E x^ are float64 ``[groups, columns]``. ``second`` E x^ x^^T and ``cross``
    E x x^^T are ``[groups, columns, columns]``, minus the products of the means if they are centred; float64, or
    float32 for more than 2,048 columns. What is computed from them is of ``dtype``.
    """

    count: int
    mean: Tensor
    mean_quantized: Tensor
    second: Tensor
    cross: Tensor
    dtype: torch.dtype = torch.float64

    def narrow(self) -> InputMoments:
        """Return the same moments, computed with in float32 where that has the range: in half the time and memory."""
        largest = float(_diagonal(self.second).abs().max())
        return replace(self, dtype=torch.float32) if _FLOAT32_RANGE[0] < largest < _FLOAT32_RANGE[1] else self

    def centre(self) -> InputMoments:
        """Turn second moments into covariances in place, for layers whose bias corrects the mean error."""
        return self._add_products(-1)

    def decentre(self) -> InputMoments:
        """Undo :meth:`centre`, in place."""
        return self._add_products(1)

    def _add_products(self, sign: int) -> InputMoments:
        """Add the products of the means to the moments, or subtract them, in place."""
        for moment, mean in ((self.second, self.mean_quantized), (self.cross, self.mean)):
            for rows, some in zip(moment.split(_ROWS_AT_ONCE, 1), mean.split(_ROWS_AT_ONCE, 1), strict=True):
                rows.add_(some[:, :, None] * self.mean_quantized[:, None, :], alpha=sign)
        return self

    def ridge(self, damping: float) -> Tensor:
        """Return ``damping`` times the mean diagonal, above rounding errors where inputs are constant, ``[groups]``."""
        return _ridge(self.second.diagonal(dim1=1, dim2=2).double(), self.mean_quantized, damping)

    def factorize(self, damping: float) -> Curvature:
        """Return the curvature of the layer's output error, with a ridge of ``damping``."""
        return factorize(self._raise_diagonal(self.ridge(damping)))

    def products(self, rows: Tensor) -> Tensor:
        """Return what the other methods need of the float rows W and take long to compute, the same for every ridge."""
        return rows.to(self.dtype) @ self.cross.to(self.dtype)

    def ideal_rows(self, rows: Tensor, products: Tensor, shrinkage: float) -> Tensor:
        """Return the real-valued rows that best approximate the reference's output from the quantized model's input.

        They minimise ``E |W x - V x^|^2 + ridge |V - W|^2`` over V, float64 ``[groups, rows, columns]``.
        """
        ridge = self.ridge(shrinkage)
        target = products + (ridge[:, None, None] * rows.double()).to(self.dtype)
        found: Tensor = torch.cholesky_solve(target.mT, cholesky(self._raise_diagonal(ridge))).mT
        return found.double()

    def output_error(self, products: Tensor, rounded: Tensor) -> float:
        """Return ``E |W x - V x^|^2 - E |W x|^2`` for rounded rows V, summed over the rows."""
        values = rounded.to(self.dtype)
        return float(((values @ self.second.to(self.dtype) - 2 * products) * values).sum(dtype=torch.float64))

    def _raise_diagonal(self, size: Tensor) -> Tensor:
        """A copy of the second moments with ``size [groups]`` added to the diagonal."""
        found = self.second.to(self.dtype, copy=True)
        found.diagonal(dim1=1, dim2=2).add_(size[:, None])
        return found


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

    def narrow(self) -> InputSamples:
        """See :class:`InputMoments`; here it is the same, since the matrices are small."""
        return self

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

    def products(self, rows: Tensor) -> Tensor:
        """See :class:`InputMoments`: here the reference's output."""
        return rows.double() @ self.reference.mT

    def ideal_rows(self, rows: Tensor, products: Tensor, shrinkage: float) -> Tensor:
        """See :class:`InputMoments`."""
        size = self.ridge(shrinkage)[:, None, None]
        inner = self.quantized @ self.quantized.mT / self.count
        inner += size * torch.eye(self.count, dtype=size.dtype, device=size.device)
        missing = products - rows.double() @ self.quantized.mT
        found: Tensor = rows + torch.linalg.solve(inner, missing.mT).mT @ self.quantized / self.count
        return found

    def output_error(self, products: Tensor, rounded: Tensor) -> float:
        """See :class:`InputMoments`."""
        found = rounded @ self.quantized.mT
        return float(((found - 2 * products) * found).sum() / self.count)


Inputs = InputMoments | InputSamples


def dtype_of_moments(columns: int) -> torch.dtype:
    """Return what the second moments of so many columns are held in."""
    return torch.float64 if columns <= _MOST_DOUBLE else torch.float32


class RunningMoments:
    """Adds up the moments of batches, in the order in which they come, so that threads do not change the result.

    Rows wait until there are enough for a product: those of a batch may be few.

    Args:
        spread: map over threads, for parts of a product.
    """

    def __init__(self, spread: ThreadMap = map) -> None:
        self._spread = spread
        self._total: InputMoments | None = None
        self._samples: list[InputSamples] = []
        self._waiting: list[tuple[Rows, Rows]] = []
        self._rows_waiting = 0

    def add(self, reference: Rows, quantized: Rows, rows_in_all: float) -> None:
        """Take the rows of a batch, ``[groups, rows, columns]``; the same rows may be given twice.

        The rows are kept as they are where ``rows_in_all``, those of all batches, are at most a 16th of the columns, or
        half of more than ``MOST_COLUMNS`` columns, of which nothing is taken otherwise.
        """
        rows, columns = (quantized if isinstance(quantized, Tensor) else quantized.q).shape[1:]
        if not rows:
            return
        share = _SAMPLES_SHARE if columns <= MOST_COLUMNS else _SHARE_OF_MANY
        if rows_in_all * share <= columns:
            x, found = dequantize_rows(reference).double(), dequantize_rows(quantized).double()
            self._samples.append(InputSamples(x, found, x.mean(1), found.mean(1)))
        elif columns <= MOST_COLUMNS:
            if isinstance(quantized, QuantizedTensor):
                reference = as_integers(reference, quantized)
            self._waiting.append((reference, quantized))
            self._rows_waiting += rows
            if self._rows_waiting >= rows_at_once(quantized):
                self._multiply()

    def finish(self) -> Inputs | None:
        """Return the moments of all rows, once; None if there were none, too many columns, or values beyond float32.

        Squares of values above 1e19 are infinite.
        """
        if self._samples:
            return average_moments(self._samples)
        if self._waiting:
            self._multiply()
        found, self._total = self._total, None
        if found is None or not all(bool(_diagonal(x).isfinite().all()) for x in (found.second, found.cross)):
            return None
        mirror(found.second)
        return _divide(found, found.count)

    def _multiply(self) -> None:
        """Add the moments of the rows that wait."""
        is_same = all(x is found for x, found in self._waiting)
        found = join_rows([rows for _, rows in self._waiting])
        x = found if is_same else join_rows([rows for rows, _ in self._waiting])
        total = _zero_moments(found, is_same) if self._total is None else self._total
        add_products(total.second, found, found, self._spread, is_symmetric=True)
        if not is_same:
            add_products(total.cross, x, found, self._spread)
        self._total = replace(
            total,
            count=total.count + self._rows_waiting,
            mean=total.mean + sum_rows(x),
            mean_quantized=total.mean_quantized + sum_rows(found),
        )
        self._waiting.clear()
        self._rows_waiting = 0


def _diagonal(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=1, dim2=2)


def _zero_moments(rows: Rows, is_same: bool) -> InputMoments:
    values = rows if isinstance(rows, Tensor) else rows.q
    groups, _, columns = values.shape
    dtype = dtype_of_moments(columns)
    mean = values.new_zeros(groups, columns, dtype=torch.float64)
    second = values.new_zeros(groups, columns, columns, dtype=dtype)
    return InputMoments(0, mean, mean, second, second if is_same else torch.zeros_like(second))


def measure_moments(runner: LayerwiseRunner, layer: Layer, rows: int) -> tuple[Inputs, Inputs] | None:
    """Measure the moments over the samples of even and of odd numbers, from about ``rows`` rows in all.

    The runner goes on to the layer's input. A single sample is used for both halves. The result is None for layers of
    many rows and more than ``MOST_COLUMNS`` columns.
    """
    most = max(1, math.ceil(rows / runner.samples))
    starts = [0, *itertools.accumulate(runner.batch_samples)]

    sources = sources_of(layer)

    def read(index: int, pairs: Sequence[Pair]) -> tuple[float, list[tuple[Rows, Rows]]]:
        samples = sources[0].samples(pairs[0].reference)
        first = starts[index] % 2 if samples > 1 else index % 2
        both = [
            (source.rows(pair.reference, most), source.rows(pair.quantized, most))
            for source, pair in zip(sources, pairs, strict=True)
        ]
        in_all = sum(count_rows(x) for x, _ in both) / runner.batch_samples[index] * runner.samples
        found = []
        for number in (first, 1 - first):
            x, y = (
                join_rows([_every_second(rows, samples, number) for rows in side]) for side in zip(*both, strict=True)
            )
            found.append((x, y))
        return in_all, found

    with thread_map(runner.run_options.threads, runner.run_options.stop) as spread:
        halves = RunningMoments(spread), RunningMoments(spread)
        for in_all, parts in runner.collect_all([source.node for source in sources], read):
            for half, part in zip(halves, parts, strict=True):
                half.add(*part, in_all)
        first, second = (half.finish() for half in halves)
    return None if first is None else (first, second or copy.deepcopy(first))


def _every_second(rows: Rows, samples: int, first: int) -> Rows:
    """The rows ``[groups, rows, columns]`` of every second sample."""
    if isinstance(rows, QuantizedTensor):
        return replace(rows, q=_take_second(rows.q, samples, first))
    return _take_second(rows, samples, first)


def _take_second(rows: Tensor, samples: int, first: int) -> Tensor:
    if samples == 1:
        return rows[:, :0] if first else rows
    groups, count, columns = rows.shape
    return rows.view(groups, samples, count // samples, columns)[:, first::2].reshape(groups, -1, columns)


def average_moments(parts: Sequence[Inputs], *, are_centred: bool = False) -> Inputs:
    """Return the moments of all rows together, in the memory of the first of them, which are of no use then.

    Parts are added in order so that threads do not change the result. With ``are_centred``, :meth:`InputMoments.centre`
    was called for each.
    """
    samples = [part for part in parts if isinstance(part, InputSamples)]
    if samples:
        reference = torch.cat([part.reference for part in samples], 1)
        quantized = torch.cat([part.quantized for part in samples], 1)
        return InputSamples(reference, quantized, reference.mean(1), quantized.mean(1))
    first, *others = (part for part in parts if isinstance(part, InputMoments))
    count = sum(part.count for part in parts)
    total: InputMoments | None = None
    for part in (first, *others):
        added, share = part.decentre() if are_centred else part, part.count / count
        added = InputMoments(
            part.count,
            added.mean * share,
            added.mean_quantized * share,
            added.second.mul_(share),
            added.cross.mul_(share),
        )
        total = added if total is None else _join(total, added)
    assert total is not None
    return total


def _join(total: InputMoments, part: InputMoments) -> InputMoments:
    """The sums of both, in the memory of the first."""
    total.second.add_(part.second)
    if total.cross is not total.second:
        total.cross.add_(part.cross)
    return replace(
        total,
        count=total.count + part.count,
        mean=total.mean + part.mean,
        mean_quantized=total.mean_quantized + part.mean_quantized,
    )


def _divide(total: InputMoments, count: int) -> InputMoments:
    """The moments divided by a number, in their memory."""
    total.second.mul_(1 / count)
    if total.cross is not total.second:
        total.cross.mul_(1 / count)
    return replace(total, mean=total.mean * (1 / count), mean_quantized=total.mean_quantized * (1 / count))


def _ridge(diagonal: Tensor, mean: Tensor, damping: float) -> Tensor:
    noise = _MOMENT_NOISE * (diagonal.abs() + mean.square()).mean()
    return (damping * diagonal.mean(1)).maximum(noise).clamp_min(1e-12)
