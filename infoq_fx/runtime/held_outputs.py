"""Outputs of a model for all samples: in memory, or mapped from a file without a name if they are large."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infoq_fx.core.readings import Encoded, OutputLoss, Quantity, Reading, split_samples
from infoq_fx.errors import CalibrationDataError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.outputs import read_readings

__all__ = ["HeldLoss", "HeldOutputs", "OutputHolder", "make_loss", "measure_variances"]

_HELD_BYTES = 64 << 20  # more than this is mapped from disk
_ROWS_BYTES = 16 << 20  # read at once
_ENCODED_BYTES = 256 << 20  # of log-probabilities that are kept
_BYTES_OF_VALUE = 16  # of an output: its log-probability and its probability, float64


@dataclass(frozen=True)
class HeldOutputs:
    """The outputs that are read, in order, each float32 ``[samples, ...]``."""

    tensors: tuple[Tensor, ...]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.tensors[0])

    def rows(self, start: int, count: int) -> tuple[Tensor, ...]:
        """Return the outputs of ``count`` samples from ``start`` on."""
        return tuple(x[start : start + count] for x in self.tensors)

    def __getstate__(self) -> dict[str, tuple[Tensor, ...]]:
        return {"tensors": tuple(x.clone() for x in self.tensors)}  # a mapped tensor is pickled with its values


class OutputHolder:
    """Collects the outputs of batches, in any order and from several threads."""

    def __init__(self, samples: int) -> None:
        self._samples, self._lock = samples, threading.Lock()
        self._tensors: tuple[Tensor, ...] = ()

    def add(self, start: int, outputs: Sequence[Tensor]) -> None:
        """Store the outputs of a batch whose first sample has the index ``start``."""
        with self._lock:
            if not self._tensors:
                self._tensors = self._make_room(outputs)
        for room, output in zip(self._tensors, outputs, strict=True):
            room[start : start + len(output)] = output.detach().to("cpu", torch.float32)

    def finish(self) -> HeldOutputs:
        """Return what was collected."""
        return HeldOutputs(self._tensors)

    def _make_room(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = [(self._samples, *output.shape[1:]) for output in outputs]
        total_bytes = 4 * sum(int(np.prod(shape)) for shape in shapes)
        if total_bytes <= _HELD_BYTES:
            return tuple(torch.empty(shape) for shape in shapes)
        try:
            return tuple(_map_file(shape) for shape in shapes)
        except OSError as error:
            raise CalibrationDataError(
                f"the float model's outputs for {self._samples} samples take {total_bytes / 2**20:,.0f} MiB, held in "
                f"{tempfile.gettempdir()!r}: {error}; give fewer samples, or set TMPDIR to a larger disk"
            ) from error


class HeldLoss:
    """Compares batches with the float model's outputs for the same samples.

    What a loss reads of them, such as their log-probabilities, is computed once and kept for all runs, for as many
    batches as ``limit_bytes`` hold. Several threads may compare different batches at once.

    Args:
        reference: outputs of the float model.
        loss: compares them with those of a run, nats ``[samples]``; what an :class:`OutputLoss` reads of them is kept.
        limit_bytes: None for 256 MiB.
    """

    def __init__(
        self,
        reference: HeldOutputs,
        loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        limit_bytes: int | None = None,
    ) -> None:
        self.reference, self.loss = reference, loss
        self._room = _ENCODED_BYTES if limit_bytes is None else min(_ENCODED_BYTES, limit_bytes)
        self._encoded: dict[tuple[int, int], tuple[Encoded, ...]] = {}
        self._lock = threading.Lock()

    def __call__(self, start: int, found: Sequence[Tensor]) -> Tensor:
        """Return the nats of a batch, float64 ``[samples]``, whose first sample has the index ``start``."""
        count, loss = len(found[0]), self.loss
        if not isinstance(loss, OutputLoss) or loss.function is not None:
            return loss(self.reference.rows(start, count), found)
        compared = []
        for part in split_samples(found):
            reference = self._encode(loss, start + part.start, part.stop - part.start)
            compared.append(loss.compare(reference, loss.encode([x[part] for x in found])))
        return torch.cat(compared)

    def _encode(self, loss: OutputLoss, start: int, count: int) -> tuple[Encoded, ...]:
        with self._lock:
            if (start, count) in self._encoded:
                return self._encoded[start, count]
        rows = self.reference.rows(start, count)
        encoded, needed = loss.encode(rows), _BYTES_OF_VALUE * sum(x.numel() for x in rows)
        with self._lock:
            if needed <= self._room:
                self._room -= needed
                self._encoded[start, count] = encoded
        return encoded


def make_loss(prepared: PreparedModel, reference: HeldOutputs) -> OutputLoss:
    """Return the loss against the float model's outputs, with the variances that its quantities have there."""
    readings = read_readings(prepared)
    return OutputLoss(readings, measure_variances(readings, reference), prepared.loss_function)


def measure_variances(readings: Sequence[Reading], outputs: HeldOutputs) -> tuple[Tensor | None, ...]:
    """Return the variance of every channel of a quantity over samples and positions, float64 ``[channels]``."""
    return tuple(
        _channel_variance(x, reading.axis) if isinstance(reading, Quantity) else None
        for reading, x in zip(readings, outputs.tensors, strict=True)
    )


def _channel_variance(x: Tensor, axis: int) -> Tensor:
    """Over finite values, in two passes over a few samples at a time: a mapped output is never read as a whole."""
    rows = x.reshape(-1, 1) if x.ndim < 2 else x
    count, channels = max(1, _ROWS_BYTES // max(1, rows[:1].numel() * 8)), rows.shape[1 if x.ndim < 2 else axis]
    known, total, squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))

    def split() -> Iterator[tuple[Tensor, Tensor]]:
        for part in rows.split(count):
            values = part.double().movedim(1 if x.ndim < 2 else axis, -1).reshape(-1, channels)
            yield values, torch.isfinite(values)

    for values, is_finite in split():
        known += is_finite.sum(0)
        total += torch.where(is_finite, values, 0.0).sum(0)
    mean = total / known.clamp_min(1)
    for values, is_finite in split():
        squares += torch.where(is_finite, values - mean, 0.0).square().sum(0)
    return squares / known.clamp_min(1)


def _map_file(shape: tuple[int, ...]) -> Tensor:
    file = tempfile.TemporaryFile(prefix="infoq_fx_")  # noqa: SIM115  # the mapping keeps it
    return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
