"""Measures what a quantized module loses on validation samples against the float model, with a paired error."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from infoq_fx.conversion.quantized import QuantizedModule, plain_graph
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.readings import Categorical, Metric, Quantity, measure_metric
from infoq_fx.core.threads import one_torch_thread, thread_map
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.finetuning.trainable import float_copy
from infoq_fx.graph.reading_choice import join_tensors, map_tensors
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, choose_batch_size, hold_float_outputs
from infoq_fx.runtime.held_outputs import HeldLoss, HeldOutputs, make_loss
from infoq_fx.runtime.outputs import find_labelled, is_read, predict_classes, read_readings
from infoq_fx.scoring.output_measure import ClassLabels, read_class_labels
from infoq_fx.tolerance.tolerance import Tolerance
from infoq_fx.types import MeasuredLoss

__all__ = ["GROUPS", "Validation", "jackknife_error", "measure_loss", "name_metric"]

GROUPS = 10
"""Groups of samples that are left out in turn for the error of a metric of the user's own."""

_OUTPUT_BYTES = 2 << 30  # of all samples, held for a metric of the user's own
_SMALLEST = 1e-300
_LOGGER = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Validation:
    """Samples to validate with, and what is measured on them; the float model runs over them once, when it is needed.

    ``data`` is by the model's input names, on its device.
    """

    prepared: PreparedModel
    data: CalibrationData
    tolerance: Tolerance
    metric: Metric | None = None
    memory_limit: int | None = None

    def make_loss(self, value: float, standard_error: float | None) -> MeasuredLoss:
        """Return what was measured, beside the tolerance."""
        return MeasuredLoss(
            measure=self.tolerance.measure,
            limit=float(self.tolerance.limit),
            value=value,
            standard_error=standard_error,
            samples=self.data.samples,
            metric=name_metric(self.metric) if self.tolerance.drop is not None else "",
        )

    @functools.cached_property
    def batch_size(self) -> int:
        """Samples per run."""
        return choose_batch_size(self.prepared, self.memory_limit)

    @functools.cached_property
    def reference(self) -> HeldOutputs:
        """The float model's outputs that are read."""
        with one_torch_thread() as threads:
            options = RunOptions(threads=threads if self.prepared.device.type == "cpu" else 1)
            return hold_float_outputs(self.prepared, self.data, batch_size=self.batch_size, run_options=options)

    @functools.cached_property
    def loss(self) -> HeldLoss:
        """The nats lost against the float model."""
        limit, reference = self.memory_limit, self.reference
        return HeldLoss(reference, make_loss(self.prepared, reference), limit and limit // 4)

    @functools.cached_property
    def classes(self) -> ClassLabels:
        """The labels, for the output that they fit.

        Raises:
            CalibrationDataError: there are no labels, or no output that they fit.
        """
        readings, labels = read_readings(self.prepared), self.data.labels
        remedy = "give a metric of your own (metric=), or Tolerance(nats=) or (sqnr_db=), which need no labels"
        if labels is None:
            raise CalibrationDataError(f"Tolerance(drop=) of top-1 needs labels and the samples have none; {remedy}")
        if find_labelled(readings, self.reference.tensors, labels) is None:
            raise CalibrationDataError(f"Tolerance(drop=) of top-1: the labels fit no output with classes; {remedy}")
        found = read_class_labels(self.prepared, self.data, self.reference)
        assert found is not None
        return found

    @functools.cached_property
    def float_hits(self) -> Tensor:
        """Share of right classes of every sample in the float model, float64 ``[samples]``."""
        return _count_hits(self, 0, self.reference.tensors)

    @functools.cached_property
    def float_metrics(self) -> tuple[float, tuple[float, ...]]:
        """The user's metric of the float model, and without each group of samples.

        Raises:
            OptionError: it is not a finite number.
        """
        whole, parts = _measure_own(self, float_copy(self.prepared))
        if not math.isfinite(whole):
            name = name_metric(self.metric)
            raise OptionError(f"the metric {name} of the float model is {whole}; give one that is a finite number")
        return whole, parts


def name_metric(metric: Metric | None) -> str:
    """Return how the metric of a drop is called."""
    return "top-1" if metric is None else str(getattr(metric, "__name__", "the metric"))


def measure_loss(validation: Validation, quantized: QuantizedModule) -> MeasuredLoss:
    """Run a quantized module over the validation samples and measure what it loses.

    The standard error is that of the mean of the samples' differences; for the SQNR, a ratio of two sums, it is
    linearized; for a metric of the user's own it is the jackknife over 10 groups of samples, where every output has an
    entry for each sample.

    Raises:
        CalibrationDataError: labels are needed, and missing or of other classes; or the outputs are too large to be
            held for a metric.
        OptionError: the metric returns no number.
    """
    tolerance = validation.tolerance
    if tolerance.sqnr_db is not None:
        value, error = _measure_sqnr(validation, quantized)
    elif tolerance.nats is not None:
        # The loss is made here, once, before batches are spread over threads.
        value, error = _mean(_join(validation, quantized, validation.loss))
    elif validation.metric is None:
        before = validation.float_hits
        after = _join(validation, quantized, lambda at, x: _count_hits(validation, at, x))
        value, error = _mean(100 * (before - after))
    else:
        whole, without = validation.float_metrics
        found, parts = _measure_own(validation, quantized)
        # Not a number is no accuracy at all.
        value = whole - found if math.isfinite(found) else math.inf
        error = jackknife_error([a - b for a, b in zip(without, parts, strict=False)])
    return validation.make_loss(value, error if error is not None and math.isfinite(error) else None)


def jackknife_error(parts: Sequence[float]) -> float | None:
    """Return the standard error of a value from its values without each group of samples; None without any.

    Reference:
        Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, Eq. 11.5.
    """
    count = len(parts)
    if count < 2 or not all(map(math.isfinite, parts)):
        return None
    mean = math.fsum(parts) / count
    return math.sqrt((count - 1) / count * math.fsum((part - mean) ** 2 for part in parts))


def _mean(values: Tensor) -> tuple[float, float | None]:
    count = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else None


def _join(
    validation: Validation, quantized: QuantizedModule, read: Callable[[int, Sequence[Tensor]], Tensor]
) -> Tensor:
    """What ``read`` gives for the outputs that are read of every batch, along the samples."""
    readings = validation.prepared.readings

    def pick(start: int, outputs: Any) -> Tensor:
        found = [x for x, r in zip(flatten_tensors(outputs), readings, strict=True) if is_read(r)]
        return read(start, [x.detach().to("cpu", torch.float32) for x in found])

    return torch.cat(list(_map_batches(validation, plain_graph(quantized), pick)))


def _map_batches(validation: Validation, module: Any, read: Callable[[int, Any], _Result]) -> Iterator[_Result]:
    """Run a module over all batches, spread over the threads, and yield what ``read`` returns in their order."""
    size = validation.batch_size

    def run(numbered: tuple[int, Mapping[str, Tensor]]) -> _Result:
        with torch.no_grad():
            return read(numbered[0], module(*numbered[1].values()))

    batches = zip(range(0, validation.data.samples, size), validation.data.batches(size), strict=True)
    with one_torch_thread() as threads:
        count = threads if validation.prepared.device.type == "cpu" else 1
        with thread_map(count, threading.Event()) as spread:
            yield from spread(run, batches)


def _count_hits(validation: Validation, start: int, outputs: Sequence[Tensor]) -> Tensor:
    """The share of labelled positions with the right class, float64 ``[samples]``."""
    classes = validation.classes
    reading, output = read_readings(validation.prepared)[classes.index], outputs[classes.index]
    assert isinstance(reading, Categorical)
    wanted = classes.labels[start : start + len(output)].reshape(len(output), -1)
    right = predict_classes(reading, output).reshape(len(output), -1) == wanted
    known = (wanted >= 0).double()
    return (right * known).sum(1) / known.sum(1).clamp_min(1)


def _measure_sqnr(validation: Validation, quantized: QuantizedModule) -> tuple[float, float | None]:
    """SQNR in dB of the worst output, and its standard error by linearization."""
    readings, reference = read_readings(validation.prepared), validation.reference
    chosen = [i for i, reading in enumerate(readings) if isinstance(reading, Quantity)] or list(range(len(readings)))

    def read(start: int, outputs: Sequence[Tensor]) -> Tensor:
        wanted = reference.rows(start, len(outputs[0]))
        return torch.stack([_signal_and_noise(wanted[i], outputs[i]) for i in chosen], 1)

    found = []
    for signal, noise in (sums.unbind(1) for sums in _join(validation, quantized, read).unbind(1)):
        all_signal, all_noise = (float(x.sum().clamp_min(_SMALLEST)) for x in (signal, noise))
        parts = signal / all_signal - noise / all_noise
        error = 10 / math.log(10) * math.sqrt(len(parts)) * float(parts.std()) if len(parts) > 1 else None
        found.append((10 * math.log10(all_signal / all_noise), error))
    return min(found, key=lambda one: one[0])


def _signal_and_noise(wanted: Tensor, found: Tensor) -> Tensor:
    """Sums of squares over the values of each sample that are finite in the float model, float64 ``[samples, 2]``."""
    known = torch.isfinite(wanted)
    pair = [torch.where(known, x, 0.0).double().reshape(len(x), -1) for x in (wanted, found - wanted)]
    return torch.stack([x.square().sum(1) for x in pair], 1)


def _measure_own(validation: Validation, module: fx.GraphModule) -> tuple[float, tuple[float, ...]]:
    """The user's metric over all samples, and without each group of them; no groups where outputs mix the samples."""
    metric, form, data = validation.metric, validation.prepared.form, validation.data
    assert metric is not None
    structure: Any = None
    parts: list[tuple[Tensor, ...]] = []
    for given in _map_batches(validation, plain_graph(module), lambda _, outputs: form.give(outputs)):
        structure = given
        parts.append(tuple(x.detach().cpu() for x in flatten_tensors(given)))
        if len(parts) == 1:
            _check_bytes(parts[0], validation)
    outputs, labels = join_tensors(structure, parts), None if data.labels is None else data.labels.cpu()
    whole = measure_metric(metric, outputs, labels)
    groups = min(GROUPS, data.samples)
    if groups < 2 or any(x.ndim == 0 or len(x) != data.samples for x in flatten_tensors(outputs)):
        return whole, ()
    without = []
    for group in range(groups):
        rows = (torch.arange(data.samples) % groups != group).nonzero()[:, 0]
        kept = map_tensors(outputs, functools.partial(_take, rows))
        try:
            without.append(measure_metric(metric, kept, None if labels is None else labels[rows]))
        except Exception as error:
            _LOGGER.info("no error of the metric, which fails for a part of the samples: %s", error)
            return whole, ()
    return whole, tuple(without)


def _take(rows: Tensor, x: Tensor) -> Tensor:
    return x[rows]


def _check_bytes(outputs: Sequence[Tensor], validation: Validation) -> None:
    """Refuse outputs that are too large to be held."""
    data, limit = validation.data, validation.memory_limit or _OUTPUT_BYTES
    in_batch = min(validation.batch_size, data.samples)
    total = sum(x.numel() * x.element_size() for x in outputs) * data.samples // in_batch
    if total > limit:
        raise CalibrationDataError(
            f"the outputs of {data.samples} validation samples take {total / 2**20:,.0f} MiB, and a metric of your own "
            f"needs all of them at once, in {limit / 2**20:,.0f} MiB; give fewer samples, or let the model return less"
        )
