"""Equalizes the channels of a prepared model: measures their values, and moves factors between the layers around."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.threads import ThreadMap, one_torch_thread, thread_map
from infoq_fx.graph.calibration import ChannelRange, join_ranges, range_of_channels, weight_digits
from infoq_fx.graph.clamps import constant_bounds
from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.histogram import coprime_stride
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer, spec_of
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.recovery.moments.unfolding import can_unfold, groups_of, rows_to_weight, weight_to_rows
from infoq_fx.recovery.parameters import set_parameter, weight_quantizer
from infoq_fx.recovery.ranges.factors import Reader, RoundedTensor, choose_factors
from infoq_fx.recovery.ranges.groups import RangeGroup, RangeSource, find_groups
from infoq_fx.recovery.segments import Layer, find_segments
from infoq_fx.types import QParams, QuantSpec

__all__ = [
    "ChannelValues",
    "DepthwiseEqualizer",
    "equalize_groups",
    "find_depthwise",
    "measure_channels",
    "renew_qparams",
]

_SAMPLES = 64  # that factors are chosen on
_VALUES = 512  # of each channel
_WEIGHTS = 1 << 18  # of a layer, about, that errors are measured on
_LEAST_GAIN, _LEAST_GAIN_ADDED = 0.02, 0.2  # the latter for a product that is added


@dataclass(frozen=True)
class ChannelValues:
    """Some values of each channel ``[channels, values]``, and the range of all."""

    values: Tensor
    range: ChannelRange


def measure_channels(
    prepared: PreparedModel,
    groups: Sequence[RangeGroup],
    data: CalibrationData,
    spread: ThreadMap,
    *,
    batch_size: int,
    values: int = _VALUES,
) -> dict[fx.Node, ChannelValues]:
    """Run the float model, and return some values of each channel of the groups' tensors, and their ranges.

    Args:
        prepared: not changed.
        groups: whose quantized and clamped tensors are measured.
        data: by the model's input names.
        spread: runs batches.
        batch_size: samples per run.
        values: of each channel, about; 0 for the ranges alone, which hold nothing else.
    """
    axes, most = _axes_of(groups), math.ceil(values / data.samples)

    def run(batch: Mapping[str, Tensor]) -> dict[fx.Node, ChannelValues]:
        recorder = _ChannelRecorder(prepared, axes, most)
        with torch.inference_mode():
            recorder.run(*batch.values())
        return recorder.found

    parts = list(spread(run, data.batches(batch_size) if axes else ()))
    return {
        node: ChannelValues(
            torch.cat([part[node].values for part in parts], 1), join_ranges([part[node].range for part in parts])
        )
        for node in axes
    }


def equalize_groups(
    prepared: PreparedModel,
    groups: Sequence[RangeGroup],
    bits: Mapping[str, int],
    measured: Mapping[fx.Node, ChannelValues],
    ranges: Mapping[fx.Node, ChannelRange],
) -> list[tuple[RangeGroup, Tensor]]:
    """Multiply the channels of every group by the factors of least error, in place, where that pays.

    The outputs of the float model do not change by a bit, but for subnormal numbers, and for values at a clamp that are
    larger than the ranges. Weights that were calibrated get new qparams; activations keep theirs.

    Args:
        prepared: changed in place.
        groups: of the model; no two share a tensor.
        bits: bit-widths that errors are measured at, by site.
        measured: values that errors are measured on.
        ranges: over all samples.

    Returns:
        The groups that were changed, with their factors.
    """
    log, changed = logging.getLogger(__name__), []
    for group in groups:
        factors, share = _choose(prepared, group, measured, ranges, bits)
        least_gain = _LEAST_GAIN_ADDED if any(first.is_added for first in group.firsts) else _LEAST_GAIN
        is_better = share < 1 - least_gain
        found = "equalized" if is_better else "left alone"
        log.info("behind %s channels are %s: %.3g of the squared error", group.name, found, share)
        if is_better:
            for first in group.firsts:
                _multiply_outputs(prepared, first, factors)
            for second in group.seconds:
                _divide_inputs(prepared, second, factors)
            changed.append((group, factors))
    return changed


@dataclass(frozen=True)
class DepthwiseEqualizer:
    """Equalizes the inputs of depthwise layers while a model is calibrated.

    Every output of such a layer reads one channel, so that the factors multiply whole rows of both weights, and with
    them scales: no integer of a weight changes. Which bits an input will get is not known: its error is measured at the
    middle one of its candidates, the lower of two.
    """

    prepared: PreparedModel
    groups: Sequence[RangeGroup]
    measured: Mapping[fx.Node, ChannelValues]

    @property
    def axes(self) -> Mapping[fx.Node, int]:
        """See :class:`infoq_fx.graph.calibration.ChannelEqualizer`."""
        return _axes_of(self.groups)

    def equalize(self, ranges: Mapping[fx.Node, ChannelRange]) -> Mapping[fx.Node, Tensor]:
        """See :class:`infoq_fx.graph.calibration.ChannelEqualizer`."""
        sites = self.prepared.inventory.sites
        bits = {site.name: site.bits[(len(site.bits) - 1) // 2] for site in sites if site.bits}
        changed = equalize_groups(self.prepared, self.groups, bits, self.measured, ranges)
        return {node: factors for group, factors in changed for node in group.quantizers}


def find_depthwise(prepared: PreparedModel, data: CalibrationData, *, batch_size: int) -> DepthwiseEqualizer | None:
    """Find the inputs of depthwise layers of a model that is not calibrated yet; None if it has none to equalize.

    Args:
        prepared: with quantizers that have no qparams.
        data: by the model's input names; 64 samples are run.
        batch_size: samples per run.
    """
    layers = [layer for segment in find_segments(prepared) for layer in segment.layers]
    if not any(_is_depthwise(layer) for layer in layers):
        return None
    groups = [group for group in find_groups(prepared, layers) if _is_free(group)]
    fixed = prepared.batch_size or 1
    chosen = data.spread(max(_SAMPLES, fixed))
    chosen = chosen.take(chosen.samples - chosen.samples % fixed)
    with (
        one_torch_thread() as threads,
        thread_map(threads if prepared.device.type == "cpu" else 1, threading.Event()) as spread,
    ):
        measured = measure_channels(prepared, groups, chosen, spread, batch_size=batch_size)
    return DepthwiseEqualizer(prepared, groups, measured) if groups else None


def _axes_of(groups: Sequence[RangeGroup]) -> dict[fx.Node, int]:
    """The quantizers and clamps of some groups with the axes of their channels."""
    return {node: group.axes[node] for group in groups for node in (*group.quantizers, *group.clamps)}


def _is_depthwise(layer: Layer) -> bool:
    """Whether each output reads one of several channels."""
    return layer.op.is_convolution and can_unfold(layer) and groups_of(layer) > 1 == layer.site.shape[1]


def _is_free(group: RangeGroup) -> bool:
    """Whether factors change no integer: layers make the tensor, and depthwise layers read it."""
    return all(first.layer is not None for first in group.firsts) and all(map(_is_depthwise, group.seconds))


class _ChannelRecorder(FloatInterpreter):
    """Runs a batch and keeps values of the channels of some nodes; ``most`` of each sample and channel."""

    def __init__(self, prepared: PreparedModel, axes: Mapping[fx.Node, int], most: int) -> None:
        super().__init__(prepared)
        self._axes, self._most = axes, most
        self.found: dict[fx.Node, ChannelValues] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._axes:
            by_channel = (
                value.movedim(self._axes[n], 0).flatten(2) if value.ndim > 2 else value.movedim(-1, 0)[..., None]
            )
            stride = coprime_stride(by_channel.shape[2], self._most) if self._most else 1
            values = by_channel[:, :, ::stride] if self._most else by_channel[:, :, :0]
            self.found[n] = ChannelValues(values.flatten(1).clone(), range_of_channels(value, self._axes[n]))
        return value


def _choose(
    prepared: PreparedModel,
    group: RangeGroup,
    measured: Mapping[fx.Node, ChannelValues],
    ranges: Mapping[fx.Node, ChannelRange],
    bits: Mapping[str, int],
) -> tuple[Tensor, float]:
    """The factors of a group, and their error relative to that without."""
    modules = {node: prepared.graph_module.get_submodule(str(node.target)) for node in group.quantizers}
    channels = {node: measured[node] for node in group.quantizers}
    if any(layer.source not in channels for layer in group.seconds):  # an input that is not quantized
        return torch.ones(1), 1.0
    readers = [_read(prepared, layer, channels, bits) for layer in group.seconds]
    energies = torch.stack([reader.energy() for reader in readers])
    tensors = []
    for node, module in modules.items():
        assert isinstance(module, Quantizer)
        own = [i for i, layer in enumerate(group.seconds) if layer.source is node] or list(range(len(readers)))
        tensors.append(RoundedTensor(channels[node].values, energies[own].sum(0), _spec(module, bits)))
    highest = torch.full_like(energies[0], torch.inf)
    for node in group.quantizers:  # rare values of a channel must not widen the range of the others
        reached = torch.maximum(ranges[node].high, -ranges[node].low)
        highest = torch.minimum(highest, _octaves_up_to(float(reached.max()), reached))
    for node in group.clamps:
        highest = torch.minimum(highest, _limit_at_clamp(node, ranges[node]))
    return choose_factors(tensors, readers, highest)


def _read(
    prepared: PreparedModel, layer: Layer, channels: Mapping[fx.Node, ChannelValues], bits: Mapping[str, int]
) -> Reader:
    rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight))
    every = max(1, min(rows.shape[1], rows.numel() // _WEIGHTS))
    square = channels[layer.source].values.var(1, correction=0)  # the mean's part is left to the bias
    return Reader(rows[:, ::every], every, bits.get(layer.site.name, layer.site.baseline_bits), square)


def _limit_at_clamp(node: fx.Node, channels: ChannelRange) -> Tensor:
    """The largest log2 of the factors ``[channels]``, at least 0, with which no value meets a clamp that passed it."""
    highest = torch.full_like(channels.high, torch.inf)
    low, high = constant_bounds(node) or (-math.inf, math.inf)
    if low > 0 or high < 0:
        return torch.zeros_like(highest)
    for bound, reached in ((low, -channels.low), (high, channels.high)):
        if 0 < abs(bound) < math.inf:
            highest = torch.minimum(highest, _octaves_up_to(abs(bound), reached))
    return highest


def _octaves_up_to(bound: float, reached: Tensor) -> Tensor:
    """The largest integers k of at least 0 with ``reached 2^k <= bound``, exactly."""
    ratio = bound / reached.double().clamp_min(1e-30)
    return (torch.frexp(ratio).exponent - 1).clamp_min(0).to(reached)


def _multiply_outputs(prepared: PreparedModel, first: RangeSource, factors: Tensor) -> None:
    """Multiply what makes a tensor; a layer's scales too, so that its integers do not change."""
    for path in first.parameters:
        set_parameter(prepared, path, read_tensor(prepared.graph_module, path) * factors)
    if first.layer is None:
        return
    layer = first.layer
    shape = [-1 if axis == layer.op.channel_axis else 1 for axis in range(len(layer.site.shape))]
    set_parameter(prepared, layer.weight, read_tensor(prepared.graph_module, layer.weight) * factors.reshape(shape))
    if layer.bias is not None:
        set_parameter(prepared, layer.bias, read_tensor(prepared.graph_module, layer.bias) * factors)
    quantizer = weight_quantizer(prepared, layer)
    known = {bits: quantizer.qparams_at(bits) for bits in quantizer.calibrated_bits}

    def scaled(spec: QuantSpec) -> QParams:
        found = known[spec.bits]
        return found if spec.is_float else replace(found, scale=found.scale * factors)

    renew_qparams(quantizer, scaled)


def _divide_inputs(prepared: PreparedModel, layer: Layer, factors: Tensor) -> None:
    """Divide the weight of a layer that reads the tensor, by input channel."""
    rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight))
    groups, _, columns = rows.shape
    by_column = factors.repeat_interleave(groups * columns // len(factors)).reshape(groups, 1, columns)
    set_parameter(prepared, layer.weight, rows_to_weight(layer, rows / by_column))
    moved = read_tensor(prepared.graph_module, layer.weight)
    digits = functools.partial(weight_digits, prepared, layer.quantizer)
    quantizer = weight_quantizer(prepared, layer)
    renew_qparams(quantizer, lambda spec: choose_weight_qparams(moved, spec, digits(spec.bits)))


def renew_qparams(quantizer: Quantizer, choose: Callable[[QuantSpec], QParams]) -> None:
    """Choose new qparams for every bit-width that a quantizer was calibrated for."""
    if quantizer.calibrated_bits:
        chosen = {bits: choose(spec_of(quantizer.site, bits)) for bits in quantizer.calibrated_bits}
        quantizer.set_qparams(chosen, next(quantizer.buffers()).device)


def _spec(quantizer: Quantizer, bits: Mapping[str, int]) -> QuantSpec:
    site = quantizer.site
    return spec_of(site, bits.get(site.name, site.baseline_bits))
