"""Cross-layer range equalization: moves factors between layers so that all channels have similar ranges."""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import OptionError
from infoq_fx.graph.calibration import weight_digits
from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.passes.scale_equalization import find_scale_groups
from infoq_fx.quantization.histogram import Histogram, choose_activation_qparams
from infoq_fx.quantization.numerics import choose_weight_qparams, fake_quantize
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer, spec_of
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Pair, choose_samples
from infoq_fx.recovery.parameters import fork, set_parameter, weight_quantizer
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.range_pairs import (
    RangePair,
    RangeSource,
    add_factors,
    channel_axis,
    drop_factors,
    find_pairs,
)
from infoq_fx.recovery.unfolding import input_rows, rows_to_weight, weight_to_rows
from infoq_fx.types import QParams, QuantSite, QuantSpec

__all__ = ["RangeEqualization"]

_ROWS = 16384  # approximate number of input rows that the error of a pair is measured on
_CHUNKS = 64  # parts of these that a histogram is updated with; it counts a few thousand values of each
_MOST_OCTAVES = 6
_STRENGTHS = (0.5, 1.0)
_LEAST_GAIN, _LEAST_GAIN_ADDED = 0.01, 0.2  # the latter for a product that is added


@dataclass(frozen=True)
class RangeEqualization:
    r"""Multiplies the channels of a tensor where it is made and divides the input channels of its readers by the same.

    Activations have one scale per tensor: if the ranges of channels differ, the narrow ones get few levels. Channel c
    of the tensor between two layers is multiplied by

        f_c = 2^round(log2(k r2_c^(1-s) / r1_c^s)),  at least 2^-6, at most 2^6, s = 1/2 or 1

    with r1_c its largest absolute value over the data, r2_c the largest absolute weight of channel c in the layers
    that read it, and k such that the tensor's largest range is kept, up to the rounding; f_c is 1 if either is zero.
    Row c of the first weight and its bias are multiplied by f_c, and the second weight's values for channel c are
    divided by it. Powers of two are exact: the float model's outputs do not change by a bit (except for subnormal
    numbers), nor do the integers of the first weight, whose scales are multiplied too.

    The first may also be a layer norm, an RMS norm or a product with a parameter per channel, and several linear
    layers may read the tensor. Between them there may only be ReLU, leaky ReLU, PReLU, pooling, means over space,
    products with another tensor (gates) and quantizers, and nothing else may read the values: factors cannot pass a
    clamp such as ReLU6 or a residual addition. Behind GELU, SiLU and other curves, which no factor passes, a product
    with the factors is added to the graph. A pair is equalized only if ``E |W x - W^ x^|^2``, the squared error of
    the readers' outputs with weights and input quantized at their bit-widths, falls by more than 1 % on the float
    model's x, and by more than 20 % for a product that is added. The better s is taken. Pairs are processed in graph
    order.

    The result has a different float model as its ``origin``, which later steps build on: this step must come first. The
    qparams of the weights and of the tensors between are recomputed for all bit-widths.

    Cost: about three forward passes of the float and two of the quantized model over ``samples``; no labels.

    Reference:
        Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721,
        Section 4.1, Eq. 7-12 (between weights); Xiao et al., "SmoothQuant", arXiv 2211.10438, Eq. 4 with migration
        strength 0.5 (between activation and weight, as here). Powers of two and the choice by error are additions.

    Args:
        samples: largest number of samples, spread over the data.

    Raises:
        OptionError: an option is out of range, or, in ``recover``, another step has changed the weights.
    """

    samples: int = 512

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    @property
    def name(self) -> str:
        """``"range_equalization"``."""
        return "range_equalization"

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """See :class:`infoq_fx.recovery.RecoveryStep`."""
        _check_float(prepared)
        widened, used = replace(fork(prepared), origin=None), choose_samples(prepared, data, self.samples)
        add_factors(widened)
        changed = fork(widened)
        runner = LayerwiseRunner(changed, bits, used, context)
        pairs = find_pairs(changed, runner.layers)
        taken: list[RangePair] = []
        for layer in runner.layers if pairs else ():
            if layer.node in pairs and _equalize(runner, pairs[layer.node]):
                taken.append(pairs[layer.node])
            context.run_options.advance(1 / (len(runner.layers) + 1))
        _calibrate_between(changed, taken, used, context)
        context.run_options.advance(1 / (len(runner.layers) + 1) if pairs else 1.0)
        drop_factors(changed)
        return fork(replace(changed, origin=None)) if taken else fork(prepared)


def _check_float(prepared: PreparedModel) -> None:
    if prepared.origin is None:
        return
    module, origin = prepared.graph_module, prepared.origin.graph_module
    for node in module.graph.nodes:
        if node.op == "get_attr" and not torch.equal(read_tensor(module, node), read_tensor(origin, node)):
            raise OptionError("range_equalization comes before other steps; put it first in the list")


def _equalize(runner: LayerwiseRunner, pair: RangePair) -> bool:
    """Equalize a pair if that lowers the error; the runner goes on to the second layers' input."""
    changed, second, most = runner.prepared, pair.seconds[0], math.ceil(_ROWS / runner.samples)

    def read(_: int, values: Pair) -> tuple[Tensor, Tensor]:
        x = values.reference
        axis = channel_axis(second, x.shape)
        return input_rows(second, x, most), x.abs().amax([i for i in range(x.ndim) if i != axis])

    parts = list(runner.collect(second.source, read))
    x, ranges = torch.cat([rows for rows, _ in parts], 1), torch.stack([found for _, found in parts]).amax(0)
    weights = [weight_to_rows(each, read_tensor(changed.graph_module, each.weight)) for each in pair.seconds]
    by_channel = torch.stack([w.abs().amax(1).reshape(ranges.numel(), -1).amax(1) for w in weights]).amax(0)
    width = weights[0].shape[0] * weights[0].shape[2] // ranges.numel()  # inputs of each channel
    before, best = _output_error(runner, pair, x, weights), None
    for strength in _STRENGTHS:
        factors = _choose_factors(ranges, by_channel, strength)
        columns = factors.repeat_interleave(width).reshape(weights[0].shape[0], 1, -1)
        error = _output_error(runner, pair, x * columns, [weight / columns for weight in weights])
        if best is None or error < best[0]:
            best = error, factors, columns
    assert best is not None
    after, factors, columns = best
    is_better = after < (1 - (_LEAST_GAIN_ADDED if pair.first.is_added else _LEAST_GAIN)) * before
    found = pair.first.name, second.site.name, "equalized" if is_better else "left alone", after, before
    logging.getLogger(__name__).info("%s and %s are %s: squared error %.4g, before %.4g", *found)
    if is_better:
        _scale_outputs(changed, pair.first, factors)
        for each, weight in zip(pair.seconds, weights, strict=True):
            _set_weight(changed, each, rows_to_weight(each, weight / columns))
    return is_better


def _set_weight(changed: PreparedModel, layer: Layer, weight: Tensor) -> None:
    set_parameter(changed, layer.weight, weight)
    moved = read_tensor(changed.graph_module, layer.weight)
    digits = functools.partial(weight_digits, dict(changed.quantizer_nodes()), layer.quantizer)
    _renew_qparams(weight_quantizer(changed, layer), lambda spec: choose_weight_qparams(moved, spec, digits(spec.bits)))


def _choose_factors(ranges: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Powers of two, float32 ``[channels]``, from the ranges of activations and of the weights they multiply.

    With a strength of 1, all channels of the activation get the same range.
    """
    r1, r2 = ranges.double().cpu(), weights.double().cpu()
    is_alive = (r1 > 0) & (r2 > 0)
    r1, r2 = r1.where(is_alive, 1.0).log2(), r2.where(is_alive, 1.0).log2()
    octaves = (1 - strength) * r2 - strength * r1
    if bool(is_alive.any()):
        octaves += r1[is_alive].max() - (octaves + r1)[is_alive].max()
    octaves = octaves.round().clamp(-_MOST_OCTAVES, _MOST_OCTAVES).where(is_alive, 0.0)
    return octaves.exp2().to(ranges.device, torch.float32)


def _output_error(runner: LayerwiseRunner, pair: RangePair, x: Tensor, weights: Sequence[Tensor]) -> float:
    """Squared error of the second layers' outputs per row, with qparams chosen for these rows of input and weights."""
    rounded_x = x
    for quantizer in pair.between[-1:]:
        histogram = Histogram()
        for chunk in x.flatten().chunk(_CHUNKS):
            histogram.update(chunk[None])
        rounded_x = fake_quantize(x, choose_activation_qparams(histogram, _spec(runner, quantizer.site)))
    total = 0.0
    for layer, weight in zip(pair.seconds, weights, strict=True):
        found = rows_to_weight(layer, weight)
        rounded = weight_to_rows(layer, fake_quantize(found, choose_weight_qparams(found, _spec(runner, layer.site))))
        total += float((x @ weight.mT - rounded_x @ rounded.mT).square().sum(dtype=torch.float64))
    return total / x.shape[1]


def _spec(runner: LayerwiseRunner, site: QuantSite) -> QuantSpec:
    return spec_of(site, runner.bits.get(site.name, site.baseline_bits))


def _scale_outputs(changed: PreparedModel, first: RangeSource, factors: Tensor) -> None:
    """Multiply what makes a tensor; a layer's scales too, so that its integers do not change."""
    for path in first.parameters:
        set_parameter(changed, path, read_tensor(changed.graph_module, path) * factors)
    if first.layer is None:
        return
    layer = first.layer
    shape = [-1 if axis == layer.op.channel_axis else 1 for axis in range(len(layer.site.shape))]
    set_parameter(changed, layer.weight, read_tensor(changed.graph_module, layer.weight) * factors.reshape(shape))
    if layer.bias is not None:
        set_parameter(changed, layer.bias, read_tensor(changed.graph_module, layer.bias) * factors)
    quantizer = weight_quantizer(changed, layer)
    known = {bits: quantizer.qparams_at(bits) for bits in quantizer.calibrated_bits}

    def scaled(spec: QuantSpec) -> QParams:
        found = known[spec.bits]
        return found if spec.is_float else replace(found, scale=found.scale * factors)

    _renew_qparams(quantizer, scaled)


def _renew_qparams(quantizer: Quantizer, choose: Callable[[QuantSpec], QParams]) -> None:
    """Choose new qparams for every bit-width that a quantizer was calibrated for."""
    chosen = {bits: choose(spec_of(quantizer.site, bits)) for bits in quantizer.calibrated_bits}
    quantizer.set_qparams(chosen, next(quantizer.buffers()).device)


class _Counter(FloatInterpreter):
    """Fills the histograms of some quantizers."""

    def __init__(self, prepared: PreparedModel, histograms: Mapping[Quantizer, Histogram]) -> None:
        super().__init__(prepared)
        self._histograms, self._lock = histograms, threading.Lock()

    def see(self, quantizer: Quantizer, x: Tensor) -> None:
        if quantizer in self._histograms:
            with self._lock:
                self._histograms[quantizer].update(x)


def _calibrate_between(
    changed: PreparedModel, taken: Sequence[RangePair], data: CalibrationData, context: StepContext
) -> None:
    """New qparams for the tensors between the layers of the pairs, from the equalized float model."""
    histograms = {quantizer: Histogram() for pair in taken for quantizer in pair.between}
    counter = _Counter(changed, histograms)

    def run(batch: Mapping[str, Tensor]) -> None:
        with torch.inference_mode():
            copy.copy(counter).run(*batch.values())

    with thread_map(context.run_options.threads, context.run_options.stop) as spread:
        for _ in spread(run, data.batches(context.batch_size) if histograms else ()):
            pass
    groups = find_scale_groups(changed.graph_module)
    free = {module for node, module in changed.quantizer_nodes() if node in groups}
    for quantizer, found in histograms.items():
        factor = 1.0 if quantizer in free else None  # scales of powers of two, as in calibration
        _renew_qparams(quantizer, functools.partial(choose_activation_qparams, found, factor=factor))
