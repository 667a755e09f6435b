"""The training loop: losses against the float model, gradients from several threads, and updates by Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import clip_grad_norm_

from infoq_fx.core.data import read_classes
from infoq_fx.core.readings import Categorical, OutputLoss, measure_cross_entropy
from infoq_fx.core.threads import ThreadMap
from infoq_fx.finetuning.features import FeatureLoss, run_with_features
from infoq_fx.finetuning.retraining import TrainableModule
from infoq_fx.finetuning.trainable import LearnedStepQuantizer
from infoq_fx.finetuning.training_data import Samples, Source
from infoq_fx.graph.float_interpreter import channels_last
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.runtime.forward import GRADIENT_BYTES
from infoq_fx.runtime.held_outputs import OutputHolder

__all__ = [
    "Learned",
    "Optimizer",
    "Settings",
    "Training",
    "begin_optimizer",
    "choose_run_size",
    "compute_gradients",
    "hold_reference",
    "list_learned",
    "measure_loss",
    "place",
    "run_student",
    "update",
]

_BETAS = 0.9, 0.99  # training is short, so the average of squared gradients has a short memory
_EPSILON = 1e-12
_LARGEST_NORM = 1.0
_WARM_UP = 0.05
_RATE_OF_STEPS, _RATE_OF_BIASES = 0.05, 0.3
_SMALLEST_UNIT = 0.01
_FEWEST_RUNS = 2


@dataclass(frozen=True)
class Settings:
    """The options of training; see :func:`infoq_fx.finetune`."""

    epochs: int
    learning_rate: float
    batch_size: int
    label_weight: float
    seed: int
    temperature: float = 1.0
    feature_weight: float = 0.0


@dataclass(frozen=True)
class Learned:
    """A parameter and the largest change of it per update at the full rate, which broadcasts to the parameter."""

    parameter: nn.Parameter
    reach: Tensor
    is_step: bool


@dataclass(frozen=True)
class Optimizer:
    """Adam over the trained parameters, and running averages of the parameters.

    Adam updates ``units``, a tensor per parameter with the update in multiples of the parameter's ``reach``, which is
    zero between two updates. ``average`` covers about an epoch. A weight near the boundary between two integers
    oscillates between them, however small the updates are; its average has the integer that it was at for longer.

    Reference:
        "Averaging Weights Leads to Wider Optima", arXiv 1803.05407; "Overcoming Oscillations in Quantization-Aware
        Training", arXiv 2203.11086, Section 3, for why quantized weights need it.
    """

    adam: torch.optim.Adam
    units: Sequence[Tensor]
    average: Sequence[Tensor]


@dataclass(frozen=True)
class Training:
    """A training: the module, its parameters, the data and the options.

    ``ask`` returns the float model's outputs that are read, None if labels alone count; ``loss`` compares them with the
    student's. ``features`` are compared too while it trains, if they are given; the reference outputs are then those of
    their float model. ``read`` are the indices of these outputs among all; ``labelled`` is the index of the one that
    has the labels, among those that are read. Batches are run in parts of ``run_size`` samples, by several threads.
    """

    student: fx.GraphModule
    learned: Sequence[Learned]
    source: Source
    settings: Settings
    ask: Callable[[Samples], tuple[Tensor, ...]] | None
    loss: OutputLoss
    read: tuple[int, ...]
    labelled: int | None
    device: torch.device
    run_size: int
    features: FeatureLoss | None = None


def begin_optimizer(learned: Sequence[Learned]) -> Optimizer:
    """Create the optimizer for the first update."""
    units = [torch.zeros_like(one.parameter, requires_grad=False) for one in learned]
    average = [one.parameter.detach().clone() for one in learned]
    return Optimizer(torch.optim.Adam(units, betas=_BETAS, eps=_EPSILON), units, average)


def list_learned(student: TrainableModule, learning_rate: float) -> list[Learned]:
    """List all parameters with their reach: ``learning_rate`` in the units described by :func:`infoq_fx.finetune`."""
    quantizers = [found for found in student.modules() if isinstance(found, LearnedStepQuantizer)]
    of_weights = {found.site.name: found for found in quantizers if found.site.kind == "weight"}
    steps = {id(found.scale) for found in quantizers}
    levels = {id(found.levels) for found in quantizers if found.levels is not None}
    learned = []
    for name, parameter in student.named_parameters():
        value = parameter.detach()
        unit = value.square().mean().sqrt()
        if id(parameter) in steps:
            unit = _RATE_OF_STEPS * value.abs()
        elif id(parameter) in levels:
            unit = torch.full_like(unit, _RATE_OF_STEPS)
        elif name in of_weights:
            quantizer = of_weights[name]
            shape = [1] * value.ndim
            shape[quantizer.spec.channel_axis or 0] = -1
            unit = torch.minimum((quantizer.level_unit * quantizer.qparams().scale.abs()).reshape(shape), unit)
        else:
            unit = _RATE_OF_BIASES * unit.clamp_min(_SMALLEST_UNIT)
        is_step = id(parameter) in steps or id(parameter) in levels
        learned.append(Learned(parameter, learning_rate * unit, is_step))
    return learned


def choose_run_size(
    student: fx.GraphModule, examples: Mapping[str, Tensor], batch_size: int, run_bytes: int = GRADIENT_BYTES
) -> int:
    """Choose the number of samples per run, the same on every machine.

    The activations of a run take about ``run_bytes``; with the default of 512 MiB, quantizing the weights again in each
    run costs little in comparison. A batch is split into at least two runs, for two threads.
    """
    samples = next(iter(examples.values())).shape[0]
    recorder = _SizeRecorder(student, samples)
    recorder.run(*examples.values())
    largest = min(run_bytes * samples // max(1, recorder.bytes), math.ceil(batch_size / _FEWEST_RUNS))
    return max(1, largest)


def measure_loss(training: Training, spread: ThreadMap) -> float:
    """Return the mean loss on the held-out samples, at a temperature of 1."""

    def run(samples: Samples) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return _losses(training, samples, 1.0)

    return float(torch.cat(list(spread(run, training.source.held_back.split(training.run_size)))).mean())


def compute_gradients(training: Training, batch: Samples, spread: ThreadMap) -> list[Tensor]:
    """Return the gradients of a batch's mean loss by parameter; the sum does not depend on the number of threads."""
    parameters = [learned.parameter for learned in training.learned]

    def run(samples: Samples) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            loss = _training_loss(training, samples) / batch.count
            return torch.autograd.grad(loss, parameters, materialize_grads=True)

    total: list[Tensor] = []
    for gradients in spread(run, batch.split(training.run_size)):
        total = [a.add_(b) for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
    return total


def update(
    training: Training, optimizer: Optimizer, gradients: Sequence[Tensor], done: int, *, rate: float = 1.0
) -> None:
    """Update the parameters and their averages, after ``done`` updates, at ``rate`` times the learning rate.

    Gradients are clipped to a norm, for step sizes and the other parameters separately: those of step sizes are so much
    smaller that a common norm would suppress them. As batch norms are folded, nothing else bounds an update.

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
    """Move inputs to a device, images to channels-last memory format."""
    return {name: channels_last(x.to(device)) for name, x in inputs.items()}


def run_student(
    module: nn.Module, inputs: Mapping[str, Tensor], read: Sequence[int], device: torch.device
) -> tuple[Tensor, ...]:
    """Run a module on a batch and return the outputs of the given indices."""
    outputs = flatten_tensors(module(*place(inputs, device).values()))
    return tuple(outputs[index] for index in read)


def hold_reference(
    samples: Samples, ask: Callable[[Samples], tuple[Tensor, ...]], size: int, spread: ThreadMap
) -> Samples:
    """Return the samples with the float model's outputs, which are mapped from disk if they are large."""
    holder = OutputHolder(samples.count)

    def run(numbered: tuple[int, Samples]) -> None:
        start, part = numbered
        holder.add(start, ask(part))

    for _ in spread(run, list(zip(range(0, samples.count, size), samples.split(size), strict=True))):
        pass
    return replace(samples, reference=holder.finish().tensors)


def _training_loss(training: Training, samples: Samples) -> Tensor:
    """What is trained on: the sum of the samples' losses at the training's temperature, and of those of features."""
    features, temperature = training.features, training.settings.temperature
    if features is None:
        return _losses(training, samples, temperature).sum()
    inputs = place(samples.inputs, training.device)
    outputs, ours = run_with_features(training.student, inputs)
    with torch.no_grad():
        reference, theirs = run_with_features(features.float_model, inputs)
    asked = replace(samples, reference=tuple(reference[index] for index in training.read))
    read = tuple(outputs[index] for index in training.read)
    return _compare(training, asked, read, temperature).sum() + samples.count * features.measure(ours, theirs)


def _losses(training: Training, samples: Samples, temperature: float) -> Tensor:
    """The loss of every sample, float64 ``[samples]``."""
    outputs = run_student(training.student, samples.inputs, training.read, training.device)
    return _compare(training, samples, outputs, temperature)


def _compare(training: Training, samples: Samples, outputs: tuple[Tensor, ...], temperature: float) -> Tensor:
    """The loss of every sample's outputs, by the float model's outputs and by labels."""
    weight, device = training.settings.label_weight, training.device
    losses = torch.zeros(samples.count, dtype=torch.float64, device=device)
    if training.ask is not None:
        reference = training.ask(samples) if samples.reference is None else samples.reference
        theirs = tuple(x.to(device) for x in reference)
        losses = (1 - weight) * training.loss(theirs, outputs, temperature)
    if samples.labels is not None and training.labelled is not None:
        reading = training.loss.readings[training.labelled]
        assert isinstance(reading, Categorical)
        output = outputs[training.labelled]
        labels = read_classes(samples.labels, output.shape[reading.axis]).to(device)
        entropy = measure_cross_entropy(reading, output, labels)
        losses = losses + weight * entropy
    return losses


class _SizeRecorder(GraphInterpreter):
    """Runs the graph and sums the bytes of all tensors that have a batch dimension."""

    def __init__(self, module: fx.GraphModule, samples: int) -> None:
        super().__init__(module)
        self.samples, self.bytes = samples, 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.shape[:1] == (self.samples,):
            self.bytes += value.numel() * value.element_size()
        return value
