"""Calibration data: reads and checks any supported form into inputs by name and optional labels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infoq_fx.errors import CalibrationDataError

__all__ = [
    "LABEL_KEYS",
    "MAX_BYTES",
    "MAX_SAMPLES",
    "CalibrationData",
    "ForwardArguments",
    "read_classes",
    "read_data",
]

MAX_SAMPLES = 20_000
MAX_BYTES = 32 << 30
_HELD_BYTES = 64 << 20  # more than this is spooled to disk while it is read, then memory-mapped
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_HELD_EVERY = 4
_UNLABELLED = 255  # in masks of uint8
_FEWEST_TO_SPLIT = 128
_FORMS = "give batches of inputs, (inputs, labels) or a dict of tensors; inputs are a tensor or a tuple of tensors"


_LABELS_OUT = "or leave the labels out: give [inputs, ...] or [(inputs, None), ...]"


@dataclass(frozen=True)
class ForwardArguments:
    """What a model's ``forward`` takes, as far as it tells inputs from labels.

    ``names`` are its arguments in order, of which the first ``required`` must be given; ``is_open`` tells that it takes
    any number of them (``*xs``).
    """

    names: tuple[str, ...]
    required: int
    is_open: bool = False

    @staticmethod
    def exactly(names: Sequence[str]) -> ForwardArguments:
        """The arguments of a model whose inputs are known."""
        return ForwardArguments(tuple(names), len(names))

    def has_input(self, key: str) -> bool:
        """Whether an entry of this key is an input; optional ``labels`` only make a model compute its loss."""
        is_optional = key in self.names[self.required :]
        return key in self.names and not (is_optional and key in ("labels", "label"))

    def are_inputs(self, tensors: Sequence[Any]) -> bool:
        """Whether a batch of so many tensors has inputs alone, and no labels in the last place."""
        count, last, first = len(tensors), tensors[-1], tensors[0]
        if self.is_open:
            return not _is_label_like(last)
        if count <= self.required:
            return True
        if count > len(self.names) or _is_label_like(last):
            return False
        if count > 2:
            return True
        # (ids, mask) beside (image, mask of classes): tokens and their mask have one shape.
        is_mask = not torch.as_tensor(last).is_floating_point() and not torch.as_tensor(first).is_floating_point()
        return is_mask and tuple(first.shape) == tuple(last.shape)


@dataclass(frozen=True)
class CalibrationData:
    """Calibration samples, in memory or memory-mapped from disk if there are many.

    ``inputs`` map input names (or positions as text, before the model is known) to tensors ``[samples, ...]``;
    ``labels`` are ``[samples, ...]``, int64 if they are integers, or None; they are checked where they are read.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    is_positional: bool

    @property
    def samples(self) -> int:
        """Number of samples."""
        return next(iter(self.inputs.values())).shape[0]

    @property
    def example_inputs(self) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Two samples (one sample twice if there is only one), in the form that the model takes."""
        rows = torch.tensor([0, min(1, self.samples - 1)])
        chosen = {name: x.cpu()[rows] for name, x in self.inputs.items()}
        return tuple(chosen.values()) if self.is_positional else chosen

    def named(self, input_names: Sequence[str]) -> CalibrationData:
        """Return the same data with the model's input names, in the model's order.

        Raises:
            CalibrationDataError: the inputs are not those that the model takes.
        """
        if self.is_positional and len(self.inputs) == len(input_names):
            inputs = dict(zip(input_names, self.inputs.values(), strict=True))
        elif not self.is_positional and set(self.inputs) == set(input_names):
            inputs = {name: self.inputs[name] for name in input_names}
        else:
            given = f"{len(self.inputs)} positional" if self.is_positional else ", ".join(map(repr, self.inputs))
            wanted = ", ".join(map(repr, input_names))
            raise CalibrationDataError(
                f"calibration data has inputs {given}; give those that the model takes: {wanted}"
            )
        return replace(self, inputs=inputs, is_positional=False)

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield consecutive slices of at most ``batch_size`` samples, by input name."""
        for start in range(0, self.samples, batch_size):
            yield {name: x[start : start + batch_size] for name, x in self.inputs.items()}

    def to(self, device: torch.device | str) -> CalibrationData:
        """Return the same data on another device."""
        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels.to(device))

    def take(self, samples: int) -> CalibrationData:
        """Return the first ``samples`` samples."""
        inputs = {name: x[:samples] for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels[:samples])

    def spread(self, samples: int) -> CalibrationData:
        """Return ``samples`` samples evenly spread over the data, or all if there are fewer."""
        if samples >= self.samples:
            return self
        return self.select(torch.arange(samples) * self.samples // samples)

    def select(self, rows: Tensor) -> CalibrationData:
        """Return copies of the samples with the given indices, int64 ``[samples]``; large ones are on disk."""
        size = sum(x.numel() * x.element_size() for x in self.inputs.values()) / self.samples
        if size * len(rows) > _HELD_BYTES and all(x.device.type == "cpu" for x in self.inputs.values()):
            # With little room on the disk they stay in memory.
            with ExitStack() as stack, suppress(CalibrationDataError):
                spool, parts = _Spool(stack), rows.split(max(1, int(_HELD_BYTES / size)))
                for some in parts[:-1]:
                    spool.take([self._copy(some)])
                return spool.map([self._copy(parts[-1])])
        return self._copy(rows)

    def _copy(self, rows: Tensor) -> CalibrationData:
        inputs = {name: x[rows.to(x.device)] for name, x in self.inputs.items()}
        labels = None if self.labels is None else self.labels[rows.to(self.labels.device)]
        return replace(self, inputs=inputs, labels=labels)

    def hold_back(self, whole: int = 1) -> tuple[CalibrationData, CalibrationData]:
        """Split the samples: three of four to measure with, and every fourth to judge by.

        Fewer than 128 samples, or than two batches of a graph that is fixed to ``whole`` samples, serve for both.
        """
        if self.samples < max(_FEWEST_TO_SPLIT, 2 * whole):
            return self, self
        is_held = torch.arange(self.samples) % _HELD_EVERY == _HELD_EVERY - 1
        measured, held = (self.select(rows.nonzero()[:, 0]) for rows in (~is_held, is_held))
        if whole == 1:
            return measured, held
        if held.samples < whole:
            return self.take(self.samples - whole), self.select(torch.arange(self.samples - whole, self.samples))
        return tuple(part.take(part.samples - part.samples % whole) for part in (measured, held))  # type: ignore[return-value]

    def hold_back_half(self) -> tuple[CalibrationData, CalibrationData]:
        """Split the samples in two: the first, third, ... and the second, fourth, ..."""
        even, odd = (self.select(torch.arange(first, self.samples, 2)) for first in (0, 1))
        return even, odd


def read_classes(labels: Tensor, classes: int) -> Tensor:
    """Return labels as class numbers, int64 of the same shape on the CPU.

    Labels of single positions, such as pixels, may leave some out: those below 0, and 255 where there are fewer
    classes, are -1 in the result.

    Raises:
        CalibrationDataError: a label is not below ``classes``, or is below 0 where a sample has one label.
    """
    read = labels.cpu().long()
    if read.ndim > 1:
        left_out = (read < 0) | ((read == _UNLABELLED) if classes <= _UNLABELLED else torch.zeros_like(read).bool())
        read = read.masked_fill(left_out, -1)
    low, high = (int(read.min()), int(read.max())) if read.numel() else (0, 0)
    if high >= classes or (read.ndim == 1 and low < 0):
        raise CalibrationDataError(
            f"labels range from {low} to {high}, but the model has {classes} classes: use 0 to {classes - 1}, "
            "or leave the labels out to use the model's own predictions"
        )
    return read


def read_data(data: Any, arguments: ForwardArguments | None = None) -> CalibrationData:
    """Read calibration data to its end and check it.

    Args:
        data: a ``DataLoader`` or other iterable of batches; or one batch by itself: a tensor ``[samples, ...]``,
            ``(inputs, labels)`` or a dict. Labels in a dict have one of ``LABEL_KEYS`` as their key. NumPy arrays
            count as tensors. A :class:`CalibrationData` is returned unchanged.
        arguments: of the model's forward, if it is known: an entry or a tensor that it takes is an input, whatever its
            name or place.

    Raises:
        CalibrationDataError: no sample, more than ``MAX_SAMPLES`` samples or ``MAX_BYTES`` bytes (an endless
            loader), batches that differ in form, shape or dtype, NaN or infinity, labels that do not fit.
    """
    if isinstance(data, CalibrationData):
        return data
    batches = [data] if _is_batch(data, arguments) else data
    if not isinstance(batches, Iterable):
        raise CalibrationDataError(f"calibration data is a {type(data).__name__}; {_FORMS}")
    parts: list[CalibrationData] = []
    samples = byte_count = held_bytes = 0
    with ExitStack() as stack:
        spool = _Spool(stack)
        for index, batch in enumerate(batches):
            part = _read_batch(batch, index, arguments)
            if parts:
                _check_alike(parts[0], part, index)
            samples += part.samples
            part_bytes = sum(x.numel() * x.element_size() for x in part.inputs.values())
            byte_count, held_bytes = byte_count + part_bytes, held_bytes + part_bytes
            parts.append(part)
            if samples > MAX_SAMPLES or byte_count > MAX_BYTES or index > MAX_SAMPLES:
                raise CalibrationDataError(
                    f"calibration data has not ended after {samples:,} samples ({byte_count / 2**20:,.0f} MiB); is the "
                    "loader endless? About 1,000 samples are enough: pass itertools.islice(loader, batches) or a Subset"
                )
            if index > 0 and held_bytes > _HELD_BYTES:
                parts, held_bytes = [spool.take(parts)], 0
        if samples == 0:
            raise CalibrationDataError("calibration data is empty: give at least a few dozen samples, better 1,000")
        return _join(parts) if not spool.samples else spool.map(parts)


class _Spool:
    """Unnamed temporary files for data too large for memory; mapped afterwards, and freed with the tensors."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[str, Any] = {}
        self._labels: list[Tensor] = []
        self.samples = 0

    def take(self, parts: Sequence[CalibrationData]) -> CalibrationData:
        """Write parts to disk and return an empty part of the same form."""
        try:
            for part in parts:
                for name, x in part.inputs.items():
                    if name not in self._files:
                        file = tempfile.TemporaryFile(prefix="infoq_fx_")  # noqa: SIM115
                        self._files[name] = self._stack.enter_context(file)
                    self._files[name].write(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                self._labels += [] if part.labels is None else [part.labels]
                self.samples += part.samples
        except OSError as error:
            raise CalibrationDataError(
                f"calibration data of more than {_HELD_BYTES >> 20} MiB is held in {tempfile.gettempdir()!r}: {error}; "
                "give fewer samples, or set TMPDIR to a larger disk"
            ) from error
        first = parts[0]
        empty = {name: x[:0].clone() for name, x in first.inputs.items()}
        return CalibrationData(empty, None if first.labels is None else first.labels[:0], first.is_positional)

    def map(self, rest: Sequence[CalibrationData]) -> CalibrationData:
        """Return everything written so far and ``rest`` as tensors mapped from the files."""
        form = self.take(rest)
        inputs = {}
        for name, file in self._files.items():
            file.flush()
            # Copy on write: torch requires writable memory.
            mapped = torch.from_numpy(np.memmap(file, np.uint8, "c"))
            inputs[name] = mapped.view(form.inputs[name].dtype).view(self.samples, *form.inputs[name].shape[1:])
        return CalibrationData(inputs, torch.cat(self._labels) if self._labels else None, form.is_positional)


def _is_batch(data: Any, arguments: ForwardArguments | None) -> bool:
    if _is_tensor(data) or isinstance(data, Mapping):
        return True
    if isinstance(data, tuple) and arguments is not None and len(data) > 1 and all(map(_is_tensor, data)):
        # All inputs of the model, perhaps with labels behind.
        return len(data) == 2 or arguments.required <= len(data) <= len(arguments.names) + 1
    # A list holds batches; a pair with labels (or None) in second place is one batch.
    return isinstance(data, tuple) and len(data) == 2 and (data[1] is None or _is_label_like(data[1]))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_label_like(value: Any) -> bool:
    return _is_tensor(value) and value.ndim <= 1


def _read_batch(batch: Any, index: int, arguments: ForwardArguments | None) -> CalibrationData:
    batch, labels = _split_labels(batch, arguments)
    if isinstance(batch, Mapping):
        keys = [key for key in LABEL_KEYS if key in batch and not (arguments and arguments.has_input(key))]
        labels = batch[keys[0]] if keys and labels is None else labels
        inputs = {str(name): x for name, x in batch.items() if name not in keys}
    else:
        tensors = batch if isinstance(batch, tuple | list) else (batch,)
        inputs = {str(i): x for i, x in enumerate(tensors)}
    if not inputs or not all(map(_is_tensor, inputs.values())):
        raise CalibrationDataError(f"batch {index} holds {_describe(inputs)}; {_FORMS}")
    read = {name: torch.as_tensor(x).detach() for name, x in inputs.items()}
    _check_inputs(read, index)
    samples = next(iter(read.values())).shape[0]
    return CalibrationData(read, _read_labels(labels, samples, index), not isinstance(batch, Mapping))


def _describe(inputs: Mapping[str, Any]) -> str:
    wrong = {name: type(x).__name__ for name, x in inputs.items() if not _is_tensor(x)}
    return ", ".join(f"{kind} ({name!r})" for name, kind in wrong.items()) or "nothing"


def _split_labels(batch: Any, arguments: ForwardArguments | None) -> tuple[Any, Any]:
    """A batch's inputs and its labels, None if there are none."""
    if not isinstance(batch, tuple | list):
        return batch, None
    are_tensors = len(batch) > 1 and all(map(_is_tensor, batch))
    if len(batch) == 2:
        if are_tensors and arguments is not None and arguments.are_inputs(batch):
            return batch, None
        return batch[0], batch[1]
    if are_tensors and arguments is not None and arguments.names and not arguments.are_inputs(batch):
        return batch[:-1], batch[-1]
    return (batch[0] if len(batch) == 1 else batch), None


def _check_inputs(inputs: Mapping[str, Tensor], index: int) -> None:
    for name, x in inputs.items():
        if x.is_meta:
            raise CalibrationDataError(
                f"input {name!r} of batch {index} is on the meta device and has no values; give a tensor that has"
            )
        if x.ndim == 0:
            raise CalibrationDataError(f"input {name!r} of batch {index} has no batch dimension; give [samples, ...]")
        if x.is_floating_point() and not all(_is_usable(part, len(inputs) > 1) for part in x.split(64)):
            raise CalibrationDataError(
                f"input {name!r} of batch {index} holds NaN or infinity: clean the data, or check its normalisation"
            )
    if len({x.shape[0] for x in inputs.values()}) > 1:
        sizes = ", ".join(f"{name}: {x.shape[0]}" for name, x in inputs.items())
        raise CalibrationDataError(
            f"inputs of batch {index} have different numbers of samples: {sizes}; samples come first in every input: "
            "give the same number of each, and wrap a model that has them elsewhere (as states have) to transpose them"
        )


def _is_usable(x: Tensor, may_mask: bool) -> bool:
    """Whether values are finite; a mask beside other inputs may hide positions by minus infinity."""
    return bool((torch.isfinite(x) | torch.isneginf(x) if may_mask else torch.isfinite(x)).all())


def _read_labels(labels: Any, samples: int, index: int) -> Tensor | None:
    if labels is None:
        return None
    if not _is_tensor(labels) and not isinstance(labels, Sequence):
        raise CalibrationDataError(
            f"labels of batch {index} are a {type(labels).__name__}; give a tensor, {_LABELS_OUT}"
        )
    try:
        read = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationDataError(
            f"labels of batch {index} are not a tensor: {error}; give one, {_LABELS_OUT}"
        ) from error
    if read.ndim == 0 or read.shape[0] != samples:
        found = "a single label" if read.ndim == 0 else f"{read.shape[0]} labels"
        raise CalibrationDataError(
            f"batch {index} has {samples} samples but {found}; give one label per sample, {_LABELS_OUT}; several "
            "inputs are [((a, b), None), ...] or a dict by the names of forward's arguments"
        )
    return read if read.is_floating_point() or read.is_complex() else read.to(torch.int64)


def _check_alike(first: CalibrationData, other: CalibrationData, index: int) -> None:
    if list(first.inputs) != list(other.inputs) or (first.labels is None) != (other.labels is None):
        raise CalibrationDataError(
            f"batch {index} has other inputs or labels than batch 0; give every batch the same ones"
        )
    for name, x in first.inputs.items():
        y = other.inputs[name]
        if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
            raise CalibrationDataError(
                f"input {name!r} of batch {index} is {y.dtype} {list(y.shape[1:])} per sample, in batch 0 it is "
                f"{x.dtype} {list(x.shape[1:])}: resize or pad the samples to one shape"
            )


def _join(parts: Sequence[CalibrationData]) -> CalibrationData:
    first = parts[0]
    if len(parts) == 1:
        return first
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in first.inputs}
    labels = [part.labels for part in parts if part.labels is not None]
    return CalibrationData(inputs, torch.cat(labels) if labels else None, first.is_positional)
