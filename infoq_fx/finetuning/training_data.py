"""Training data: checked samples, held-out samples, and the batches of every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData, ForwardArguments, read_data
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.finetuning.augmentation import Augment

__all__ = ["Form", "Samples", "Source", "digest_tensors", "open_source"]

_SHARE = 5  # every fifth sample is held out
_FEWEST, _ENOUGH = 16, 64
_MOST_OF_LOADER = 2048
_EPOCHS_APART = 1_000_003
_OF_AUGMENTATION = 0x5EED


@dataclass(frozen=True)
class Samples:
    """Samples: inputs by name ``[samples, ...]``, with optional labels and reference outputs.

    ``labels`` are int64 ``[samples]``. ``reference`` are the float model's outputs that are read, each
    ``[samples, ...]``. ``by_name`` says whether the user's model takes the inputs by name.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    reference: tuple[Tensor, ...] | None = None
    by_name: bool = True

    @property
    def count(self) -> int:
        """Number of samples."""
        return next(iter(self.inputs.values())).shape[0]

    def take(self, rows: Tensor) -> Samples:
        """Return copies of the samples with the given indices, int64 ``[samples]``."""
        reference = self.reference
        return replace(
            self,
            inputs={name: x[rows.to(x.device)] for name, x in self.inputs.items()},
            labels=None if self.labels is None else self.labels[rows.to(self.labels.device)],
            reference=None if reference is None else tuple(x[rows.to(x.device)] for x in reference),
        )

    def split(self, size: int) -> Iterator[Samples]:
        """Yield consecutive parts of at most ``size`` samples."""
        for rows in torch.arange(self.count).split(size):
            yield self.take(rows)

    def whole(self, size: int) -> Samples:
        """Return as many samples as make whole runs of ``size`` samples."""
        return self if self.count % size == 0 else self.take(torch.arange(self.count - self.count % size))


@dataclass(frozen=True)
class Form:
    """The required form of samples: like ``examples`` by input name, with labels if they are needed."""

    examples: Mapping[str, Tensor]
    needs_labels: bool

    def read(self, data: Any) -> Samples:
        """Read and check all samples of ``data``, in any form of :func:`infoq_fx.core.data.read_data`.

        Raises:
            CalibrationDataError: they cannot be read, differ in form from the examples, or lack labels.
        """
        found = read_data(data, ForwardArguments.exactly(tuple(self.examples)))
        named = found.named(tuple(self.examples))
        for name, wanted in self.examples.items():
            x = named.inputs[name]
            if x.dtype != wanted.dtype or x.shape[1:] != wanted.shape[1:]:
                raise CalibrationDataError(
                    f"input {name!r} takes {wanted.dtype} {['samples', *wanted.shape[1:]]}, the data has {x.dtype} "
                    f"{['samples', *x.shape[1:]]}: resize or convert the data"
                )
        if self.needs_labels and named.labels is None:
            raise CalibrationDataError(
                "label_weight asks for labels and the data has none: give (inputs, labels), or label_weight=0"
            )
        labels = named.labels if self.needs_labels else None
        return Samples(named.inputs, labels, by_name=not found.is_positional)

    @staticmethod
    def check_alike(inputs: Any, before: Mapping[str, Tensor]) -> None:
        """Check that augmented inputs have the form of those before, and are finite.

        Raises:
            OptionError: they do not.
        """
        is_alike = isinstance(inputs, Mapping) and set(inputs) == set(before)
        if not is_alike or any(
            not isinstance(inputs[name], Tensor) or (inputs[name].shape, inputs[name].dtype) != (x.shape, x.dtype)
            for name, x in before.items()
        ):
            wanted = ", ".join(f"{name!r} {x.dtype} {list(x.shape)}" for name, x in before.items())
            raise OptionError(
                f"augment returned inputs of another form; give a function that returns what it gets: {wanted}"
            )
        for name in before:
            if inputs[name].is_floating_point() and not bool(inputs[name].isfinite().all()):
                raise OptionError(
                    f"augment returned NaN or infinity for input {name!r}; correct it, or leave augment= out"
                )


@dataclass(frozen=True)
class Source:
    """The source of batches: all samples in ``training``, or a ``loader`` that is iterated once per epoch.

    ``steps`` is the number of batches per epoch. If the graph is fixed to ``whole`` samples per run, every batch has a
    multiple of it. Every ``stride``-th sample of a loader is held out; None if there is other validation data.
    ``augment`` changes the inputs of every batch, whose reference outputs are then not known.
    """

    form: Form
    held_back: Samples
    training: Samples | None
    loader: Iterable[Any] | None
    stride: int | None
    steps: int
    batch_size: int
    seed: int
    whole: int
    augment: Augment | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors held in memory, with their names."""
        for part in (self.held_back, self.training):
            yield from part.inputs.items() if part is not None else ()
            if part is not None and part.labels is not None:
                yield "labels", part.labels

    def batches(self, epoch: int) -> Iterator[Samples]:
        """Yield the batches of an epoch, which do not depend on earlier epochs."""
        generator = torch.Generator().manual_seed((self.seed * _EPOCHS_APART + epoch) ^ _OF_AUGMENTATION)
        for samples in self._plain_batches(epoch):
            if self.augment is None:
                yield samples
            else:
                inputs = self.augment(samples.inputs, generator)
                self.form.check_alike(inputs, samples.inputs)
                yield replace(samples, inputs=inputs, reference=None)

    def _plain_batches(self, epoch: int) -> Iterator[Samples]:
        seed = self.seed * _EPOCHS_APART + epoch
        if self.training is not None:
            order = torch.randperm(self.training.count, generator=torch.Generator().manual_seed(seed))
            for rows in order[: self.steps * self.batch_size].split(self.batch_size):
                yield self.training.take(rows)
        elif self.loader is not None:
            for start, samples in _iterate(self.loader, self.form, seed):
                kept = samples if self.stride is None else _part(samples, start, self.stride)[0]
                if kept.count >= self.whole:
                    yield kept.whole(self.whole)


def open_source(data: Any, validation_data: Any, form: Form, *, batch_size: int, seed: int, whole: int = 1) -> Source:
    """Read training and validation data.

    Without ``validation_data``, every fifth sample is held out (every fourth of 64 to 79 samples). A loader, which is
    any iterable that can be iterated again and is not a list, keeps its own batches and is iterated again every epoch,
    with torch's random seed set from seed and epoch. It is iterated once in advance for held-out samples, at most
    2,048.

    Args:
        data: see :func:`infoq_fx.core.data.read_data`.
        validation_data: likewise; None holds out a part of ``data``.
        form: required form of the samples.
        batch_size: samples per batch, for data held in memory.
        seed: of the order of samples, and of a loader's random numbers.
        whole: samples per run that the graph is fixed to; 1 if it is not.

    Raises:
        CalibrationDataError: see :meth:`Form.read`; or there are too few samples.
    """
    training, stride, steps = None, None, 0
    held = None if validation_data is None else form.read(validation_data)
    if not _is_loader(data):
        training = form.read(data)
        if held is None:
            is_small = _ENOUGH <= training.count < _SHARE * _FEWEST
            training, held = _part(training, 0, training.count // _FEWEST if is_small else _SHARE)
        batch_size = min(max(batch_size, whole), training.count) // whole * whole
        steps = training.count // batch_size if batch_size else 0
    elif held is None:
        steps, held, stride = _survey(data, form, seed * _EPOCHS_APART - 1)
    else:
        steps = _length(data) or sum(1 for _ in _iterate(data, form, seed * _EPOCHS_APART - 1))
    if steps == 0 or held is None or held.count < whole:
        raise CalibrationDataError(
            f"too few samples: every fifth is held back, and a run takes at least {whole} of each part; give more, or "
            "separate validation_data"
        )
    loader = data if training is None else None
    return Source(form, held.whole(whole), training, loader, stride, steps, batch_size, seed, whole)


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of named tensors: their bytes, shapes and dtypes."""
    found = hashlib.blake2b(digest_size=16)
    for name, x in tensors:
        found.update(f"{name} {x.dtype} {list(x.shape)};".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _is_loader(data: Any) -> bool:
    is_held = isinstance(data, Tensor | np.ndarray | Mapping | Sequence | CalibrationData) or hasattr(data, "__next__")
    return isinstance(data, Iterable) and not is_held


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # the loader has no length
        return 0


def _part(samples: Samples, start: int, stride: int) -> tuple[Samples, Samples]:
    """Split samples numbered from ``start`` on into those to train on and those held out."""
    is_held = torch.arange(start, start + samples.count) % stride == stride - 1
    return samples.take((~is_held).nonzero()[:, 0]), samples.take(is_held.nonzero()[:, 0])


def _iterate(loader: Iterable[Any], form: Form, seed: int) -> Iterator[tuple[int, Samples]]:
    """Every batch with the number of its first sample."""
    start = 0
    with _seeded(seed):
        for batch in loader:
            samples = form.read([batch])
            yield start, samples
            start += samples.count


def _survey(loader: Iterable[Any], form: Form, seed: int) -> tuple[int, Samples | None, int]:
    """The number of batches, the samples to hold out, and the stride between them."""
    steps, held, stride = 0, None, _SHARE
    for start, samples in _iterate(loader, form, seed):
        steps += 1
        more = _part(samples, start, stride)[1]
        held = more if held is None else _join(held, more)
        if held.count > _MOST_OF_LOADER:
            held, stride = held.take(torch.arange(1, held.count, 2)), 2 * stride
    return steps, held, stride


def _join(first: Samples, second: Samples) -> Samples:
    inputs = {name: torch.cat([x, second.inputs[name]]) for name, x in first.inputs.items()}
    has_labels = first.labels is not None and second.labels is not None
    labels = torch.cat([first.labels, second.labels]) if has_labels else None  # type: ignore[list-item]
    return replace(first, inputs=inputs, labels=labels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set torch's random seed, and restore the random state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
