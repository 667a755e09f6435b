"""Cross-layer range equalization: moves factors between layers so that all channels have similar ranges."""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

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
from infoq_fx.quantization.quantizers import Observe, Quantizer, spec_of
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Pair, SegmentRunner, choose_samples
from infoq_fx.recovery.parameters import fork, set_parameter, weight_quantizer
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.unfolding import can_unfold, input_rows, rows_to_weight, weight_to_rows
from infoq_fx.types import QParams, QuantSpec

__all__ = ["RangeEqualization"]

_ATEN = torch.ops.aten
_ROWS = 16384  # approximate number of input rows that the error of a pair is measured on
_CHUNKS = 64  # parts of these that a histogram is updated with; it counts a few thousand values of each
_MOST_OCTAVES, _LEAST_GAIN = 6, 0.01
_ELEMENTWISE = {getattr(_ATEN, name).default for name in ("relu", "leaky_relu", "prelu", "dropout", "clone")}
_KINDS = ("max", "avg", "adaptive_avg")
_POOLS = {getattr(_ATEN, f"{kind}_pool{spatial}d").default: spatial for kind in _KINDS for spatial in (1, 2, 3)}
_RESHAPES = {_ATEN.flatten.using_ints, _ATEN.reshape.default}


@dataclass(frozen=True)
class RangeEqualization:
    r"""Multiplies the output channels of a layer and divides the next layer's input channels by the same factors.

    Activations have one scale per tensor: if the ranges of channels differ, the narrow ones get few levels. Channel c
    of the tensor between two layers is multiplied by

        f_c = 2^round(log2(k sqrt(r2_c / r1_c))),  at least 2^-6, at most 2^6

    with r1_c its largest absolute value over the data, r2_c the largest absolute weight of channel c in the second
    layer, and k such that the tensor's largest range is kept, up to the rounding; f_c is 1 if either is zero. Row c of
    the first weight and its bias are multiplied by f_c, and the second weight's values for channel c are divided by it.
    Powers of two are exact: the float model's outputs do not change by a bit (except for subnormal numbers), nor do the
    integers of the first weight, whose scales are multiplied too.

    Between the layers of a pair there may only be ReLU, leaky ReLU, PReLU, pooling, means over space and quantizers,
    and nothing else may read the values: factors cannot pass a clamp such as ReLU6 or a residual addition. A pair is
    equalized only if ``E |W x - W^ x^|^2``, the squared error of the second layer's output with its weight and input
    quantized at their bit-widths, falls by more than 1 % on the float model's x. Pairs are processed in graph order.

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
        changed, used = fork(prepared), choose_samples(prepared, data, self.samples)
        runner = LayerwiseRunner(changed, bits, used, context)
        pairs = _find_pairs(changed, runner.layers)
        taken: list[_LayerPair] = []
        for layer in runner.layers if pairs else ():
            if layer.node in pairs and _equalize(runner, pairs[layer.node]):
                taken.append(pairs[layer.node])
            context.run_options.advance(1 / (len(runner.layers) + 1))
        _calibrate_between(changed, taken, used, context)
        context.run_options.advance(1 / (len(runner.layers) + 1) if pairs else 1.0)
        return fork(replace(changed, origin=None)) if taken else changed


@dataclass(frozen=True)
class _LayerPair:
    """Two layers between which positive factors per channel can move; ``between`` quantize the tensors in between."""

    first: Layer
    second: Layer
    between: tuple[Quantizer, ...]


def _check_float(prepared: PreparedModel) -> None:
    if prepared.origin is None:
        return
    module, origin = prepared.graph_module, prepared.origin.graph_module
    for node in module.graph.nodes:
        if node.op == "get_attr" and not torch.equal(read_tensor(module, node), read_tensor(origin, node)):
            raise OptionError("range_equalization comes before other steps; put it first in the list")


def _find_pairs(prepared: PreparedModel, layers: Sequence[Layer]) -> dict[fx.Node, _LayerPair]:
    """All pairs by the node of their second layer."""
    *nodes, _ = prepared.graph_module.graph.nodes
    inputs = {node: prepared.example_inputs[str(node.target)] for node in nodes if node.op == "placeholder"}
    with torch.inference_mode():
        values = SegmentRunner(prepared, None).compute([node for node in nodes if node not in inputs], inputs)
    shapes = {node: tuple(x.shape) for node, x in values.items() if isinstance(x, Tensor)}
    reads = Counter(str(node.target) for node in nodes if node.op == "get_attr" for _ in node.users)
    own = [
        layer
        for layer in layers
        if reads[layer.weight] == len(layer.quantizer.users) == 1 and not layer.op.is_recurrent
    ]
    known = {layer.node: layer for layer in own if can_unfold(layer)}
    firsts = [layer for layer in known.values() if _can_scale(prepared, layer, reads)]
    found = [_follow(prepared, first, known, shapes) for first in firsts]
    return {pair.second.node: pair for pair in found if pair is not None}


def _can_scale(prepared: PreparedModel, layer: Layer, reads: Mapping[str, int]) -> bool:
    """Whether the layer's bias can be scaled by channel: it has none, or one that nothing else reads."""
    if layer.bias is None:
        return layer.op.bias_of(layer.node) is None
    channels = layer.site.shape[layer.op.channel_axis]
    return reads[layer.bias] == 1 and read_tensor(prepared.graph_module, layer.bias).shape == (channels,)


def _follow(
    prepared: PreparedModel, first: Layer, layers: Mapping[fx.Node, Layer], shapes: Mapping[fx.Node, tuple[int, ...]]
) -> _LayerPair | None:
    """The pair that starts with a layer, if factors of its output channels commute with all nodes to another layer."""
    node, between = first.node, list[Quantizer]()
    axis = _channel_axis(first, shapes[node])
    while axis is not None and len(node.users) == 1:
        user = next(iter(node.users))
        if user in layers:
            second = layers[user]
            is_input = second.source is node and _channel_axis(second, shapes[node]) == axis
            return _LayerPair(first, second, tuple(between)) if is_input and user.args.count(node) == 1 else None
        module = prepared.graph_module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, Quantizer):
            between.append(module)
        elif not isinstance(module, Observe):
            axis = _axis_behind(user, axis, shapes) if user.op == "call_function" and user.args[0] is node else None
        node = user
    return None


def _channel_axis(layer: Layer, shape: Sequence[int]) -> int | None:
    """Axis of the channels in the layer's input or output; None for images without a batch dimension."""
    if not layer.op.is_convolution:
        return len(shape) - 1
    return 1 if len(shape) == len(layer.site.shape) else None


def _axis_behind(node: fx.Node, axis: int, shapes: Mapping[fx.Node, tuple[int, ...]]) -> int | None:
    """The axis of the first operand's channels in a node's output; None if the node does not commute with factors."""
    if node.target in _ELEMENTWISE:
        return axis
    before, after = shapes[node.all_input_nodes[0]], shapes[node]
    if node.target in _POOLS:
        return axis if axis == 1 and len(before) == _POOLS[node.target] + 2 else None
    if node.target is _ATEN.mean.dim and isinstance(node.args[1], Sequence):
        dims = {int(dim) % len(before) for dim in node.args[1]}  # type: ignore[arg-type]
        removed = sum(dim < axis for dim in dims) if len(after) < len(before) else 0
        return None if axis in dims or not dims else axis - removed
    if node.target in _RESHAPES:  # one that only drops dimensions of size 1 after the channels
        return axis if before[: axis + 1] == after and math.prod(before[axis + 1 :]) == 1 else None
    return None


def _equalize(runner: LayerwiseRunner, pair: _LayerPair) -> bool:
    """Equalize a pair if that lowers the error; the runner goes on to the second layer's input."""
    changed, second, most = runner.prepared, pair.second, math.ceil(_ROWS / runner.samples)

    def read(_: int, values: Pair) -> tuple[Tensor, Tensor]:
        x = values.reference
        axis = _channel_axis(second, x.shape)
        return input_rows(second, x, most), x.abs().amax([i for i in range(x.ndim) if i != axis])

    parts = list(runner.collect(second.source, read))
    x, ranges = torch.cat([rows for rows, _ in parts], 1), torch.stack([found for _, found in parts]).amax(0)
    weight = weight_to_rows(second, read_tensor(changed.graph_module, second.weight))
    by_channel = weight.abs().amax(1).reshape(ranges.numel(), -1)
    factors = _choose_factors(ranges, by_channel.amax(1))
    columns = factors.repeat_interleave(by_channel.shape[1]).reshape(weight.shape[0], 1, -1)
    before = _output_error(runner, pair, x, weight)
    after = _output_error(runner, pair, x * columns, weight / columns)
    is_better = after < (1 - _LEAST_GAIN) * before
    found = pair.first.site.name, second.site.name, "equalized" if is_better else "left alone", after, before
    logging.getLogger(__name__).info("%s and %s are %s: squared error %.4g, before %.4g", *found)
    if is_better:
        _scale_outputs(changed, pair.first, factors)
        set_parameter(changed, second.weight, rows_to_weight(second, weight / columns))
        moved = read_tensor(changed.graph_module, second.weight)
        digits = functools.partial(weight_digits, dict(changed.quantizer_nodes()), second.quantizer)
        _renew_qparams(
            weight_quantizer(changed, second), lambda spec: choose_weight_qparams(moved, spec, digits(spec.bits))
        )
    return is_better


def _choose_factors(ranges: Tensor, weights: Tensor) -> Tensor:
    """Powers of two, float32 ``[channels]``, from the ranges of activations and of the weights they multiply."""
    r1, r2 = ranges.double().cpu(), weights.double().cpu()
    is_alive = (r1 > 0) & (r2 > 0)
    r1, r2 = r1.where(is_alive, 1.0).log2(), r2.where(is_alive, 1.0).log2()
    octaves = (r2 - r1) / 2
    if bool(is_alive.any()):
        octaves += r1[is_alive].max() - (octaves + r1)[is_alive].max()
    octaves = octaves.round().clamp(-_MOST_OCTAVES, _MOST_OCTAVES).where(is_alive, 0.0)
    return octaves.exp2().to(ranges.device, torch.float32)


def _output_error(runner: LayerwiseRunner, pair: _LayerPair, x: Tensor, weight: Tensor) -> float:
    """Squared error of the second layer's outputs per row, with qparams chosen for these rows of input and weight."""
    sites = pair.second.site, *(quantizer.site for quantizer in pair.between[-1:])
    spec, *inner = (spec_of(site, runner.bits.get(site.name, site.baseline_bits)) for site in sites)
    found, rounded_x = rows_to_weight(pair.second, weight), x
    rounded = weight_to_rows(pair.second, fake_quantize(found, choose_weight_qparams(found, spec)))
    if inner:
        histogram = Histogram()
        for chunk in x.flatten().chunk(_CHUNKS):
            histogram.update(chunk[None])
        rounded_x = fake_quantize(x, choose_activation_qparams(histogram, inner[0]))
    return float((x @ weight.mT - rounded_x @ rounded.mT).square().sum(dtype=torch.float64)) / x.shape[1]


def _scale_outputs(changed: PreparedModel, layer: Layer, factors: Tensor) -> None:
    """Multiply a layer's weight and bias, and its scales with them, so that its integers do not change."""
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
    changed: PreparedModel, taken: Sequence[_LayerPair], data: CalibrationData, context: StepContext
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
