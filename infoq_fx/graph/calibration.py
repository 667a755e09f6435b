"""Calibration: chooses the qparams of every quantizer at every bit-width from the float model's values."""

from __future__ import annotations

import cmath
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import copy_out_of_heap
from infoq_fx.core.threads import ThreadMap, one_torch_thread, thread_map
from infoq_fx.errors import CalibrationDataError
from infoq_fx.graph.clamps import CLAMPS
from infoq_fx.graph.float_interpreter import FloatInterpreter, read_weight
from infoq_fx.graph.layers import LAYER_OPS
from infoq_fx.graph.passes.quantize_biases import fit_input_scale
from infoq_fx.graph.passes.scale_equalization import equalize_scales, find_scale_groups
from infoq_fx.quantization.activation_ranges import OUTLIER_REMEDY, rank_activations
from infoq_fx.quantization.histogram import (
    MAX_VALUES_PER_SAMPLE,
    Histogram,
    choose_activation_qparams,
    coprime_stride,
    find_activation_scale,
    measure_noise,
    measure_peak,
    range_bits,
    scale_significant_bits,
    significant_bits_of,
)
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer, spec_of
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import BASELINE_BITS, FLOAT16_BITS, MAX_BITS, QParams

__all__ = [
    "ChannelEqualizer",
    "ChannelRange",
    "calibrate",
    "join_ranges",
    "range_of_channels",
    "record_range",
    "weight_digits",
]

_LOGGER = logging.getLogger(__name__)
_VALUES_HELD = 1 << 21  # of a tensor whose channels are equalized; of 512 samples as many as a histogram counts


@dataclass(frozen=True)
class ChannelRange:
    """The smallest and the largest value of every channel, ``[channels]``."""

    low: Tensor
    high: Tensor


class ChannelEqualizer(Protocol):
    """Multiplies channels of some tensors by factors that depend on their ranges over all data.

    ``axes`` are the nodes whose ranges it needs, each with the axis of its channels.
    """

    @property
    def axes(self) -> Mapping[fx.Node, int]:
        """Nodes and axes; quantizers among them may be multiplied."""

    def equalize(self, ranges: Mapping[fx.Node, ChannelRange]) -> Mapping[fx.Node, Tensor]:
        """Change the weights around some quantizers' nodes, and return these with their factors ``[channels]``."""


def calibrate(
    prepared: PreparedModel, data: CalibrationData, *, batch_size: int, equalizer: ChannelEqualizer | None = None
) -> None:
    """Set the qparams of every quantizer for all its candidate bit-widths and for the 8-bit baseline.

    Weights: the scales of least squared error, per output channel. Activations: one pass of the float model over
    the data fills a histogram per site, from which the qparams of least squared error follow for every bit-width.

    The scales of activations are powers of two wherever a factor can be moved into the surrounding weights
    (:func:`infoq_fx.graph.passes.scale_equalization.find_scale_groups`): the factor makes the best scale a power of
    two, at no loss. Integer kernels that multiply a sum by ``scale_x scale_w / scale_y`` are then exact, as float32
    is, and round every value to the same step.

    Args:
        prepared: changed in place.
        data: by the model's input names, on the model's device.
        batch_size: samples per run of the float model.
        equalizer: equalizes channels behind the pass; the histograms of the tensors that it may multiply wait for it.

    Raises:
        CalibrationDataError: an activation is NaN or infinite; the message names the site.
    """
    quantizers = dict(prepared.quantizer_nodes())
    activations = [(node, module) for node, module in quantizers.items() if module.site.kind == "activation"]
    with one_torch_thread() as threads, thread_map(threads if prepared.device.type == "cpu" else 1, Event()) as spread:
        histograms = {module.site.name: Histogram() for _, module in activations}
        if activations:
            _fill_histograms(prepared, histograms, data, batch_size, equalizer, spread)
        _choose_all(prepared, quantizers, activations, histograms, spread)
    outliers = [activation for activation in rank_activations(prepared) if activation.has_outliers]
    if outliers:
        _LOGGER.info(
            "%d activations have outliers, %r the most, up to %.0f standard deviations from the mean: %s",
            len(outliers),
            outliers[0].site,
            outliers[0].peak,
            OUTLIER_REMEDY,
        )


def range_of_channels(x: Tensor, axis: int) -> ChannelRange:
    """Return the range of every channel of a tensor."""
    rows = x.movedim(axis, 0).flatten(1)
    return ChannelRange(rows.amin(1), rows.amax(1))


def _fill_histograms(
    prepared: PreparedModel,
    histograms: Mapping[str, Histogram],
    data: CalibrationData,
    batch_size: int,
    equalizer: ChannelEqualizer | None,
    spread: ThreadMap,
) -> None:
    """Run the float model over the data; tensors that an equalizer multiplies are counted behind it."""
    axes = {} if equalizer is None else equalizer.axes
    locks = {name: Lock() for name in histograms}
    most = min(MAX_VALUES_PER_SAMPLE, max(1, _VALUES_HELD // data.samples))

    def run(batch: Mapping[str, Tensor]) -> Mapping[fx.Node, _Channels]:
        samples = next(iter(batch.values())).shape[0]
        calibrator = _Calibrator(prepared, histograms, locks, axes, most * samples)
        with torch.inference_mode():
            calibrator.run(*batch.values())
        return _keep_apart(calibrator.held)

    held = list(spread(run, data.batches(batch_size)))
    if equalizer is None:
        return
    ranges = {node: join_ranges([found[node].range for found in held]) for node in axes}
    factors = equalizer.equalize(ranges)
    quantizers = dict(prepared.quantizer_nodes())
    for node in axes.keys() & quantizers.keys():
        histogram = histograms[quantizers[node].site.name]
        for found in held:
            found[node].count(histogram, factors.get(node, torch.ones_like(ranges[node].low)))


def join_ranges(ranges: Sequence[ChannelRange]) -> ChannelRange:
    """Return the ranges over all batches from those of each."""
    return ChannelRange(
        torch.stack([found.low for found in ranges]).amin(0), torch.stack([found.high for found in ranges]).amax(0)
    )


@dataclass(frozen=True)
class _Channels:
    """What is kept of a batch until factors are known: ranges, some values ``[samples, values]`` and their channels."""

    range: ChannelRange
    values: Tensor
    channels: Tensor

    def count(self, histogram: Histogram, factors: Tensor) -> None:
        low, high = (self.range.low * factors).amin(), (self.range.high * factors).amax()
        histogram.add(self.values * factors[self.channels], float(low), float(high))


def _hold(x: Tensor, axis: int, most: int) -> _Channels:
    per_sample = math.prod(x.shape[1:])
    positions = torch.arange(0, per_sample, coprime_stride(per_sample, most), device=x.device)
    channels = positions.div(math.prod(x.shape[axis + 1 :]), rounding_mode="floor") % x.shape[axis]
    return _Channels(range_of_channels(x, axis), x.reshape(x.shape[0], -1)[:, positions].float(), channels)


def _keep_apart(held: Mapping[fx.Node, _Channels]) -> dict[fx.Node, _Channels]:
    parts = [(found.range.low, found.range.high, found.values, found.channels) for found in held.values()]
    copies = iter(copy_out_of_heap([x for part in parts for x in part]))
    return {
        node: _Channels(ChannelRange(low, high), values, channels)
        for node, low, high, values, channels in zip(held, copies, copies, copies, copies, strict=False)
    }


def _choose_all(
    prepared: PreparedModel,
    quantizers: Mapping[fx.Node, Quantizer],
    activations: Sequence[tuple[fx.Node, Quantizer]],
    histograms: Mapping[str, Histogram],
    spread: ThreadMap,
) -> None:
    """Choose the qparams of all quantizers, those of activations from their histograms."""
    factors = _choose_factors(prepared, activations, histograms)
    equalize_scales(prepared.graph_module, factors)
    prepared.graph_module.recompile()
    device = prepared.device
    for node, module in activations:
        histogram, of_zeros = histograms[module.site.name], fit_input_scale(prepared.graph_module, node)
        choose = functools.partial(choose_activation_qparams, histogram, factor=factors.get(node), of_zeros=of_zeros)
        qparams = {bits: choose(spec_of(module.site, bits)) for bits in _widths(module)}
        module.set_qparams(qparams, device)
        record_range(module, histogram, factors.get(node))

    def choose_of_weight(node: fx.Node) -> dict[int, QParams]:
        module = quantizers[node]
        weight, digits = read_weight(prepared, node), functools.partial(weight_digits, prepared, node)
        return {b: choose_weight_qparams(weight, spec_of(module.site, b), digits(b)) for b in _widths(module)}

    weights = [node for node, module in quantizers.items() if module.site.kind == "weight"]
    for node, chosen in zip(weights, spread(choose_of_weight, weights), strict=True):
        quantizers[node].set_qparams(chosen, device)


def record_range(quantizer: Quantizer, histogram: Histogram, factor: float | None) -> None:
    """Record what an activation loses at every bit-width that it has qparams for, and how far its values reach.

    ``factor`` is that of :func:`infoq_fx.quantization.choose_activation_qparams`.
    """
    known = {bits: quantizer.qparams_at(bits) for bits in quantizer.calibrated_bits}
    quantizer.noise = {bits: measure_noise(histogram, qparams, factor=factor) for bits, qparams in known.items()}
    quantizer.peak = measure_peak(histogram)


def weight_digits(prepared: PreparedModel, node: fx.Node, bits: int) -> int:
    """Return how many significant bits the scales of a weight may have, given the scales of its layers' inputs.

    Args:
        prepared: its quantizers of activations have their qparams.
        node: the weight's quantizer node.
        bits: its bit-width.
    """
    sources: list[Any] = [
        layer.args[LAYER_OPS[layer.target].source] if layer.target in LAYER_OPS else None for layer in node.users
    ]
    found = [prepared.quantizer_at(source) for source in sources]
    met = [quantizer for quantizer in found if quantizer is not None and quantizer.site.kind == "activation"]
    scales = [float(q.qparams_at(width).scale) for q in met for width in q.calibrated_bits if width <= MAX_BITS]
    of_input = None if len(met) < len(sources) else max(map(significant_bits_of, scales), default=None)
    own = prepared.quantizer_at(node)
    assert own is not None
    site = own.site
    terms = max(1, site.numel // site.shape[site.channel_axis or 0])
    width = range_bits(spec_of(site, bits))
    return scale_significant_bits(width, is_weight=True, terms=terms, of_input=of_input)


def _widths(quantizer: Quantizer) -> list[int]:
    following = (FLOAT16_BITS,) if quantizer.site.follows else ()
    return sorted({*quantizer.site.bits, BASELINE_BITS, *following})


def _choose_factors(
    prepared: PreparedModel, activations: Sequence[tuple[fx.Node, Quantizer]], histograms: Mapping[str, Histogram]
) -> dict[fx.Node, float]:
    """Factors by node, from 2^-0.5 to 2^0.5: a tensor's best scale times its factor is a power of two.

    Tensors that share a factor take the circular mean of their own log2 factors, modulo 1. If some of them are outputs
    of a clamp, only those count: the clamp is then no tighter than the range of the integers, and fuses into integer
    kernels.
    """
    groups = find_scale_groups(prepared.graph_module)
    asked: dict[tuple[fx.Node, bool], list[float]] = {}
    for node, module in activations:
        histogram = histograms[module.site.name]
        if node in groups and not histogram.minimum == histogram.maximum == 0:
            widest = max((bits for bits in module.site.bits if bits <= MAX_BITS), default=BASELINE_BITS)
            scale = find_activation_scale(histogram, spec_of(module.site, widest))
            asked.setdefault((groups[node], _is_clamped(node)), []).append(math.log2(scale))
    decisive = {first: asked.get((first, True)) or found for (first, _), found in asked.items()}
    octaves = {
        first: cmath.phase(sum(cmath.exp(2j * math.pi * octave) for octave in found)) / (2 * math.pi)
        for first, found in decisive.items()
    }
    # Slightly above, to allow for rounding.
    return {node: (1 + 2**-18) * 2.0 ** -octaves[first] for node, first in groups.items() if first in octaves}


def _is_clamped(node: fx.Node) -> bool:
    """Whether a quantizer reads the output of a clamp, perhaps through an observer."""
    while node.op == "call_module":
        (node,) = node.all_input_nodes
    return node.target in CLAMPS


class _Calibrator(FloatInterpreter):
    """Fills the histograms of activations, and holds what others need; no order of batches or threads changes it."""

    def __init__(
        self,
        prepared: PreparedModel,
        histograms: Mapping[str, Histogram],
        locks: Mapping[str, Lock],
        axes: Mapping[fx.Node, int],
        most: int,
    ) -> None:
        super().__init__(prepared)
        self._histograms, self._locks, self._axes, self._most = histograms, locks, axes, most
        self.held: dict[fx.Node, _Channels] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._axes:
            return super().run_node(n)
        is_counted = n.op == "call_module"
        value = self.env[n.all_input_nodes[0]] if is_counted else super().run_node(n)
        most = min(MAX_VALUES_PER_SAMPLE, max(1, self._most // max(1, value.shape[0])))
        self.held[n] = _hold(value, self._axes[n], most if is_counted else 1)
        if is_counted:
            found = self.held[n].range
            _check_finite(self.fetch_attr(str(n.target)), bool((found.low.isfinite() & found.high.isfinite()).all()))
        return value

    def see(self, quantizer: Quantizer, x: Tensor) -> None:
        if quantizer.site.kind == "weight":
            return
        name = quantizer.site.name
        with self._locks[name]:
            self._histograms[name].update(x)
            is_finite = self._histograms[name].is_finite
        _check_finite(quantizer, is_finite)


def _check_finite(quantizer: Any, is_finite: bool) -> None:
    if not is_finite:
        raise CalibrationDataError(
            f"the activation at {quantizer.site.name!r} is NaN or infinite for a calibration batch: check the inputs' "
            "normalisation and the checkpoint, or leave the layer before it in float with ignore=[...]"
        )
