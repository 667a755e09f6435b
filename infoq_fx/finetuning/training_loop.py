"""Updates of a trainable module: its losses against the float model, gradients from several threads, Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from infoq_fx.core.threads import ThreadMap
from infoq_fx.finetuning.retraining import TrainableModule
from infoq_fx.finetuning.trainable import LearnedStepQuantizer
from infoq_fx.finetuning.training_data import Samples, Source
from infoq_fx.graph.float_interpreter import channels_last
from infoq_fx.runtime.outputs import class_logits, diverge, first_tensor, output_rows

__all__ = [
    "Learned",
    "Optimizer",
    "Settings",
    "Training",
    "begin_optimizer",
    "choose_run_size",
    "compute_gradients",
    "list_learned",
    "measure_loss",
    "place",
    "update",
]

_BETAS = 0.9, 0.99  # trainings are short: the squares of the first gradients are soon forgotten
_EPSILON = 1e-12
_LARGEST_NORM = 1.0
_WARM_UP = 0.05
_RATE_OF_STEPS, _RATE_OF_BIASES = 0.05, 0.3
_SMALLEST_UNIT = 0.01
_RUN_BYTES = 512 << 20
_FEWEST_RUNS = 2


@dataclass(frozen=True)
class Settings:
    """The options of a training; see :func:`infoq_fx.finetune`."""

    epochs: int
    learning_rate: float
    batch_size: int
    label_weight: float
    seed: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Learned:
    """A parameter, and how far an update at the full rate moves it at most: broadcasts to the parameter."""

    parameter: nn.Parameter
    reach: Tensor
    is_step: bool


@dataclass(frozen=True)
class Optimizer:
    """Adam over the parameters of a training, and the running averages of the parameters.

    Adam moves ``units``, one for each parameter, of which each counts in the parameter's reach: they are zero between
    two updates. ``average`` looks back over about an epoch. A weight between two integers changes from one to the other in updates
    however small; its average has the one that it was at for longer.

    Reference:
        "Averaging Weights Leads to Wider Optima", arXiv 1803.05407; "Overcoming Oscillations in Quantization-Aware
        Training", arXiv 2203.11086, Section 3, for why quantized weights need it.
    """

    adam: torch.optim.Adam
    units: Sequence[Tensor]
    average: Sequence[Tensor]


@dataclass(frozen=True)
class Training:
    """What is trained, on what and how.

    ``ask`` gives the float model's first output, None if labels alone count; ``variance`` is the ``spread`` of
    :func:`infoq_fx.scoring.output_measure.diverge`. Batches are run in parts of ``run_size`` samples, by several threads.
    """

    student: fx.GraphModule
    learned: Sequence[Learned]
    source: Source
    settings: Settings
    ask: Callable[[Samples], Tensor] | None
    variance: Tensor
    run_size: int


def begin_optimizer(learned: Sequence[Learned]) -> Optimizer:
    """Make the optimizer before the first update."""
    units = [torch.zeros_like(one.parameter, requires_grad=False) for one in learned]
    average = [one.parameter.detach().clone() for one in learned]
    return Optimizer(torch.optim.Adam(units, betas=_BETAS, eps=_EPSILON), units, average)


def list_learned(student: TrainableModule, learning_rate: float) -> list[Learned]:
    """All parameters, each with the reach that suits it, in units as :func:`infoq_fx.finetune` has them."""
    quantizers = [found for found in student.modules() if isinstance(found, LearnedStepQuantizer)]
    of_weights = {found.site.name: found for found in quantizers if found.site.kind == "weight"}
    steps = {id(found.scale) for found in quantizers}
    learned = []
    for name, parameter in student.named_parameters():
        value = parameter.detach()
        unit = value.square().mean().sqrt()
        if id(parameter) in steps:
            unit = _RATE_OF_STEPS * value.clone()
        elif name in of_weights:
            qparams = of_weights[name].qparams()
            shape = [1] * value.ndim
            shape[qparams.spec.channel_axis or 0] = -1
            unit = torch.minimum(qparams.scale.reshape(shape), unit)
        else:
            unit = _RATE_OF_BIASES * unit.clamp_min(_SMALLEST_UNIT)
        learned.append(Learned(parameter, learning_rate * unit, id(parameter) in steps))
    return learned


def choose_run_size(student: fx.GraphModule, examples: Mapping[str, Tensor], batch_size: int) -> int:
    """Samples a run, the same on every machine.

    The values in it take about 512 MiB, so that quantizing the weights anew in each run costs little beside it; a batch
    makes two runs at least, for two threads.
    """
    samples = next(iter(examples.values())).shape[0]
    recorder = _SizeRecorder(student, samples)
    recorder.run(*examples.values())
    largest = min(_RUN_BYTES * samples // max(1, recorder.bytes), math.ceil(batch_size / _FEWEST_RUNS))
    return max(1, largest)


def measure_loss(training: Training, spread: ThreadMap) -> float:
    """Mean loss on what is held back, at a temperature of 1."""

    def run(samples: Samples) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return _losses(training, samples, 1.0)

    return float(torch.cat(list(spread(run, training.source.held_back.split(training.run_size)))).mean())


def compute_gradients(training: Training, batch: Samples, spread: ThreadMap) -> list[Tensor]:
    """Of the mean loss of a batch, by parameter. Parts are added up in order, whatever the number of threads."""
    parameters = [learned.parameter for learned in training.learned]

    def run(samples: Samples) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            loss = _losses(training, samples, training.settings.temperature).sum() / batch.count
            return torch.autograd.grad(loss, parameters, materialize_grads=True)

    total: list[Tensor] = []
    for gradients in spread(run, batch.split(training.run_size)):
        total = [a.add_(b) for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
    return total


def update(
    training: Training, optimizer: Optimizer, gradients: Sequence[Tensor], done: int, *, rate: float = 1.0
) -> None:
    """The update after so many, at ``rate`` times the learning rate.

    Steps and the other parameters have a norm each that their gradients are clipped by: those of the steps are so much
    smaller that one norm for all would hold them still. With batch norms folded nothing else bounds an update.

    Reference:
        Adam, arXiv 1412.6980, Algorithm 1.
    """
    total = training.settings.epochs * training.source.steps
    rate *= min(1.0, (done + 1) / max(1.0, _WARM_UP * total)) * (1 + math.cos(math.pi * min(1.0, done / total))) / 2
    for unit, gradient in zip(optimizer.units, gradients, strict=True):
        unit.grad = gradient
    for is_step in (False, True):
        pairs = zip(training.learned, optimizer.units, strict=True)
        clip_grad_norm_([unit for learned, unit in pairs if learned.is_step == is_step], _LARGEST_NORM)
    optimizer.adam.param_groups[0]["lr"] = rate
    optimizer.adam.step()
    for learned, unit, average in zip(training.learned, optimizer.units, optimizer.average, strict=True):
        learned.parameter.addcmul_(unit, learned.reach)
        unit.zero_()
        average.lerp_(learned.parameter, max(1 / (done + 1), 1 / training.source.steps))


def place(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Inputs on a device; images with channels last."""
    return {name: channels_last(x.to(device)) for name, x in inputs.items()}


def _losses(training: Training, samples: Samples, temperature: float) -> Tensor:
    """The loss of every sample, float64 ``[samples]``."""
    weight, device = training.settings.label_weight, training.variance.device
    output = first_tensor(training.student(*place(samples.inputs, device).values()))
    losses = torch.zeros(samples.count, dtype=torch.float64, device=device)
    if training.ask is not None:
        reference = training.ask(samples) if samples.reference is None else samples.reference.to(device)
        theirs, ours = (output_rows(x) / temperature for x in (reference, output))
        divergence = temperature**2 * diverge(theirs, ours, training.variance)
        losses = (1 - weight) * divergence.reshape(samples.count, -1).mean(1)
    if samples.labels is not None:
        entropy = functional.cross_entropy(class_logits(output), samples.labels.to(device), reduction="none")
        losses = losses + weight * entropy
    return losses


class _SizeRecorder(fx.Interpreter):
    """Runs the graph and adds up the bytes of what has a batch dimension."""

    def __init__(self, module: fx.GraphModule, samples: int) -> None:
        super().__init__(module)
        self.samples, self.bytes = samples, 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.shape[:1] == (self.samples,):
            self.bytes += value.numel() * value.element_size()
        return value
