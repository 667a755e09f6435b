"""Helpers of criteria that need gradients: labelled samples, the loss, shuffled batches, updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.readings import Categorical, Ignored, measure_cross_entropy
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, hold_outputs
from infoq_fx.runtime.outputs import read_readings
from infoq_fx.runtime.value_sizes import measure_sizes
from infoq_fx.scoring.output_measure import read_class_labels

__all__ = [
    "WORST_LOSS",
    "Labelled",
    "add_gradients",
    "choose_part",
    "losses_of",
    "read_labelled",
    "shuffled_batches",
    "spread_samples",
    "with_gradients",
]


WORST_LOSS = 1e3  # nats a sample
_MOMENTUM = 0.9
_LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Labelled:
    """Samples by input name with class numbers, int64 ``[samples, ...]``, all on the model's device.

    ``reading`` is that of the output that has the classes, ``index`` its number among all outputs.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    reading: Categorical = field(default_factory=Categorical)
    index: int = 0

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def take(self, rows: Tensor) -> Labelled:
        """Return copies of some samples."""
        rows = rows.to(self.labels.device)
        return replace(self, inputs={name: x[rows] for name, x in self.inputs.items()}, labels=self.labels[rows])

    def batches(self, batch_size: int) -> Iterator[Labelled]:
        """Yield consecutive batches, copied."""
        for rows in torch.arange(self.samples).split(batch_size):
            yield self.take(rows)


def read_labelled(
    criterion: str,
    prepared: PreparedModel,
    data: CalibrationData | None,
    samples: int,
    *,
    batch_size: int,
    run_options: RunOptions,
) -> Labelled:
    """Return ``samples`` samples, evenly spread over the data, with labels or the 8-bit model's own predictions.

    Raises:
        CalibrationDataError: there is no data, or a label is not a class of the model.
    """
    chosen = spread_samples(criterion, prepared, data, samples)
    base = hold_outputs(prepared, chosen, batch_size=batch_size, run_options=run_options)
    classes = read_class_labels(prepared, chosen, base)
    if classes is None:
        raise CalibrationDataError(
            f"criterion {criterion!r} needs an output with classes, and none is read so: "
            f"{'; '.join(prepared.output_notes)}; say which has classes (outputs=...), or take criterion='infoq'"
        )
    reading = read_readings(prepared)[classes.index]
    assert isinstance(reading, Categorical)
    index = [i for i, one in enumerate(prepared.readings) if not isinstance(one, Ignored)][classes.index]
    labels = classes.labels.to(next(iter(chosen.inputs.values())).device)
    return Labelled(chosen.inputs, labels, reading, index)


def spread_samples(
    criterion: str, prepared: PreparedModel, data: CalibrationData | None, samples: int
) -> CalibrationData:
    """Return copies of ``samples`` samples, evenly spread, or all if there are fewer; whole batches of a fixed graph.

    Raises:
        CalibrationDataError: there is no data.
    """
    if data is None:
        raise CalibrationDataError(f"criterion {criterion!r} needs calibration data; give some, or take 'weight_mse'")
    fixed = prepared.batch_size or 1
    count = max(fixed, min(samples, data.samples) // fixed * fixed)
    rows = torch.arange(count) * data.samples // count
    labels = None if data.labels is None else data.labels[rows.to(data.labels.device)]
    return CalibrationData({name: x[rows.to(x.device)] for name, x in data.inputs.items()}, labels, data.is_positional)


def losses_of(module: nn.Module, batch: Labelled) -> tuple[Tensor, Tensor]:
    """Return each sample's cross-entropy in nats, float32 ``[samples]``, and the output with the classes."""
    output = flatten_tensors(module(*batch.inputs.values()))[batch.index]
    return measure_cross_entropy(batch.reading, output, batch.labels), output


def add_gradients(module: nn.Module, batch: Labelled, part: int) -> Tensor:
    """Add the gradients of a batch's mean loss to those of the parameters, and return the loss, detached.

    ``part`` samples run at once; the sum does not depend on it, but for its order.
    """
    total = torch.zeros(())
    for some in batch.batches(part):
        loss = losses_of(module, some)[0].mean() * (some.samples / batch.samples)
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def choose_part(prepared: PreparedModel, run_options: RunOptions) -> int:
    """Return how many samples may run at once with gradients, which keep the values of all nodes."""
    if prepared.batch_size is not None:
        return prepared.batch_size
    return max(1, run_options.gradient_bytes // max(1, sum(measure_sizes(prepared).values())))


def shuffled_batches(samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the row indices of batches endlessly: whole batches, in a new random order every epoch."""
    size = min(batch_size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from (rows for rows in order.split(size) if len(rows) == size)


def make_optimizer(groups: Sequence[Sequence[nn.Parameter]], learning_rate: float) -> torch.optim.SGD:
    """Return SGD with momentum 0.9; :func:`clipped_step` clips the gradient of each group to a norm of 1.

    With batch norms folded, nothing else bounds an update, and the gradients of a layer at 2 bits would destroy the
    model.
    """
    return torch.optim.SGD([{"params": list(group)} for group in groups], lr=learning_rate, momentum=_MOMENTUM)


def clipped_step(optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradient of each group, and update the parameters."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], _LARGEST_NORM)
    optimizer.step()


def check_trained(criterion: str, loss: float, learning_rate: float) -> None:
    """Check that a training did not diverge.

    Raises:
        OptionError: the loss is NaN or above ``WORST_LOSS``.
    """
    if not loss <= WORST_LOSS:
        raise OptionError(f"criterion {criterion!r} diverged at learning_rate={learning_rate:g}; lower it")


@contextmanager
def with_gradients() -> Iterator[None]:
    """Enable gradients, whatever mode the caller has set."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
