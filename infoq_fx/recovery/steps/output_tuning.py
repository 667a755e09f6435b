"""Output tuning: learns all scales and biases together from the model's outputs, at fixed integer weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count, check_rate
from infoq_fx.core.readings import Ignored
from infoq_fx.core.threads import ThreadMap, thread_map
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.trainable import LearnedStepQuantizer, copy_with, float_copy
from infoq_fx.finetuning.training_data import Form, Samples, Source
from infoq_fx.finetuning.training_loop import (
    Learned,
    Settings,
    Training,
    begin_optimizer,
    choose_run_size,
    compute_gradients,
    hold_reference,
    run_student,
    update,
)
from infoq_fx.graph.calibration import weight_digits
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.numerics import keep_size, quantize, shorten_scale
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.layerwise_runner import choose_samples
from infoq_fx.recovery.parameters import fork, read_qparams, set_bias, set_parameter, set_qparams
from infoq_fx.recovery.segments import Layer, find_segments
from infoq_fx.recovery.step import StepContext
from infoq_fx.runtime.held_outputs import HeldOutputs, make_loss
from infoq_fx.types import QParams

__all__ = ["OutputTuning"]

_SMALLEST_UNIT = 0.01


@dataclass(frozen=True)
class OutputTuning:
    """Learns the scales and biases of all layers together, so that the outputs approximate the float model's.

    Earlier steps fit a layer or a block at a time; their remaining errors add up towards the output. Here the integers
    of all weights are fixed. The scale of every output channel and every bias are learned by gradient descent on
    E KL(p || q), with p of the float model and q of the quantized one, both with their outputs divided by the
    ``temperature``. These are so few parameters that a few hundred samples are enough.

    Adam as in :func:`infoq_fx.finetune`; the result is the average over about the last epoch. Scales are rounded to
    the few significant bits with which kernels are exact, with a straight-through gradient; at the default rate this
    leaves most scales unchanged, so that mainly the biases are learned. Activations keep their scales.

    Cost: ``epochs`` forward and backward passes over ``samples`` of the quantized model and one forward pass of the
    float model; no labels.

    Reference:
        Chen et al., "EfficientQAT", arXiv 2407.11062, Section 3.3, for training quantization parameters alone, end to
        end; there with the task's loss and without biases.

    Args:
        epochs: passes over the samples.
        samples: largest number of samples, spread over the data.
        batch_size: samples per update.
        learning_rate: largest change of a bias per update, in units of the root mean square of its layer's biases (at
            least 0.01); a scale changes by at most ``learning_rate * scale_rate`` times itself.
        scale_rate: learning rate of scales relative to biases.
        temperature: as in :func:`infoq_fx.finetune`.
        seed: of the order of the samples.

    Raises:
        OptionError: an option is out of range.
    """

    epochs: int = 4
    samples: int = 1024
    batch_size: int = 32
    learning_rate: float = 0.001
    scale_rate: float = 0.5
    temperature: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("epochs", "samples", "batch_size"):
            check_count(option, getattr(self, option), 1)
        for option in ("learning_rate", "temperature"):
            check_rate(option, getattr(self, option))
        if not 0 <= self.scale_rate < math.inf:
            raise OptionError(f"scale_rate={self.scale_rate!r}; give a finite number of 0 or more")

    @property
    def name(self) -> str:
        """``"output_tuning"``."""
        return "output_tuning"

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """See :class:`infoq_fx.recovery.RecoveryStep`."""
        changed, chosen = fork(prepared), choose_samples(prepared, data, self.samples)
        layers = [layer for segment in find_segments(changed) for layer in segment.layers]
        student = _make_student(changed, layers, bits)
        with (
            thread_map(context.run_options.threads, context.run_options.stop) as spread,
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            run_bytes = context.run_options.gradient_bytes
            training = _prepare(self, student, changed, layers, chosen, spread, run_bytes)
            _descend(training, context, spread)
        _put_back(changed, layers, student, bits)
        return changed


class SettledWeight(nn.Module):
    """A weight with fixed integers and learned scales, one per channel; it ignores its input."""

    q: Tensor
    smallest: Tensor

    def __init__(self, q: Tensor, qparams: QParams, significant_bits: int) -> None:
        super().__init__()
        self.spec, self.significant_bits = qparams.spec, significant_bits
        self.scale = nn.Parameter(qparams.scale.detach().clone())
        layout = torch.channels_last if q.ndim == 4 else torch.contiguous_format
        self.register_buffer("q", q.float().contiguous(memory_format=layout))
        self.register_buffer("smallest", 0.5 * qparams.scale.detach())

    def usable_scale(self) -> Tensor:
        """Return the scale rounded to few significant bits, and at least half of its initial value."""
        return shorten_scale(keep_size(self.scale.detach(), self.smallest), self.significant_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized weight."""
        scale = self.scale + (self.usable_scale() - self.scale).detach()
        axis = self.spec.channel_axis
        return self.q * scale.reshape([-1 if a == axis else 1 for a in range(self.q.ndim)] if scale.ndim else [])


def _make_student(changed: PreparedModel, layers: list[Layer], bits: Mapping[str, int]) -> fx.GraphModule:
    """A copy with fixed integers in its layers; the scales of activations and of other weights are not learned."""
    inner = {layer.site.name: layer for layer in layers}

    def make(quantizer: Quantizer) -> nn.Module | None:
        site = quantizer.site
        width = bits.get(site.name, site.baseline_bits)
        qparams = quantizer.qparams_at(width)
        if qparams.spec.is_float:
            return None
        if site.name not in inner:
            found = LearnedStepQuantizer(site, qparams)
            found.scale.requires_grad_(False)
            return found
        layer = inner[site.name]
        q = quantize(read_tensor(changed.graph_module, layer.weight), qparams)
        return SettledWeight(q, qparams, weight_digits(changed, layer.quantizer, width))

    return copy_with(changed, make)


def _prepare(
    options: OutputTuning,
    student: fx.GraphModule,
    changed: PreparedModel,
    layers: list[Layer],
    data: CalibrationData,
    spread: ThreadMap,
    run_bytes: int,
) -> Training:
    fixed, device = changed.batch_size, next(iter(data.inputs.values())).device
    size = fixed or options.batch_size
    if fixed is None and device.type == "cpu":
        size = choose_run_size(student, changed.example_inputs, options.batch_size, run_bytes)
    float_model = float_copy(changed.origin or changed)

    read = tuple(i for i, reading in enumerate(changed.readings) if not isinstance(reading, Ignored))

    def ask(samples: Samples) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            return run_student(float_model, samples.inputs, read, device)

    samples = hold_reference(Samples(data.inputs), ask, size, spread)
    assert samples.reference is not None
    loss = make_loss(changed, HeldOutputs(samples.reference))
    batch_size = min(max(options.batch_size, fixed or 1), samples.count) // (fixed or 1) * (fixed or 1)
    steps = samples.count // batch_size
    source = Source(
        Form(changed.example_inputs, False),
        samples.take(torch.arange(0)),
        samples,
        None,
        None,
        steps,
        batch_size,
        options.seed,
        fixed or 1,
    )
    settings = Settings(options.epochs, options.learning_rate, batch_size, 0.0, options.seed, options.temperature)
    learned = list(_list_learned(student, layers, options))
    return Training(student, learned, source, settings, ask, loss, read, None, device, size)


def _list_learned(student: fx.GraphModule, layers: list[Layer], options: OutputTuning) -> Iterator[Learned]:
    rate = options.learning_rate
    for layer in layers:
        if layer.bias is not None:
            bias = student.get_parameter(layer.bias)
            unit = bias.detach().square().mean().sqrt().clamp_min(_SMALLEST_UNIT)
            yield Learned(bias, rate * unit, False)
    for module in student.modules():
        if isinstance(module, SettledWeight) and options.scale_rate:
            yield Learned(module.scale, rate * options.scale_rate * module.scale.detach().abs(), True)


def _descend(training: Training, context: StepContext, spread: ThreadMap) -> None:
    optimizer, total = begin_optimizer(training.learned), training.settings.epochs * training.source.steps
    for epoch in range(training.settings.epochs):
        for step, batch in enumerate(training.source.batches(epoch)):
            gradients = compute_gradients(training, batch, spread)
            update(training, optimizer, gradients, epoch * training.source.steps + step)
            context.run_options.advance(1 / total)
    for learned, average in zip(training.learned, optimizer.average, strict=True):
        learned.parameter.copy_(average)


def _put_back(changed: PreparedModel, layers: list[Layer], student: fx.GraphModule, bits: Mapping[str, int]) -> None:
    for layer in layers:
        qparams = read_qparams(changed, layer, bits)
        if qparams.spec.is_float:
            continue
        weight: Any = student.get_submodule(str(layer.quantizer.target))
        with torch.no_grad():
            set_qparams(changed, layer, replace(qparams, scale=weight.usable_scale()))
            set_parameter(changed, layer.weight, weight(weight.q).contiguous())
    for layer in layers:
        if layer.bias is not None:
            set_bias(changed, layer, student.get_parameter(layer.bias).detach(), bits)
