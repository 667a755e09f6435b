"""Reads and replaces weights, biases and qparams of a prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from infoq_fx.core.memory import copy_to_disk
from infoq_fx.graph.layers import read_tensor, write_tensor
from infoq_fx.graph.passes.quantize_biases import find_zero_channels, fit_weight_scale
from infoq_fx.graph.program.weight_storage import copy_graph_module
from infoq_fx.quantization.codebooks import bias_multiple
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.segments import Layer
from infoq_fx.types import QParams

__all__ = ["fork", "read_qparams", "set_bias", "set_parameter", "set_qparams", "weight_quantizer"]

_ON_DISK_BYTES = 4 << 20  # of a weight that is mapped from disk


def fork(prepared: PreparedModel) -> PreparedModel:
    """Return a copy that may be changed and keeps a reference to the float model as ``origin``."""
    copied = copy_graph_module(prepared.graph_module)
    return replace(prepared, graph_module=copied, origin=prepared.origin or prepared, rounded={})


def set_parameter(prepared: PreparedModel, target: str, value: Tensor) -> None:
    """Replace the weight or bias at a path."""
    with torch.inference_mode(False):
        value = value.to(torch.float32).clone()
        is_large = value.device.type == "cpu" and value.numel() * value.element_size() >= _ON_DISK_BYTES
        write_tensor(prepared.graph_module, target, copy_to_disk([value])[0] if is_large else value)


def set_bias(prepared: PreparedModel, layer: Layer, bias: Tensor, bits: Mapping[str, int]) -> None:
    """Replace a layer's bias by the value that conversion rounds it to: a multiple of the accumulator's unit.

    With few bits that unit, input scale times weight scale, is a considerable part of an output step, so that later
    layers must see the rounded bias.
    """
    assert layer.bias is not None
    source = layer.source
    module = prepared.graph_module.get_submodule(str(source.target)) if source.op == "call_module" else None
    weight = read_qparams(prepared, layer, bits)
    if isinstance(module, Quantizer):
        of_input = module.qparams_at(bits.get(module.site.name, module.site.baseline_bits))
        input_scale = of_input.scale
        if weight.scale.shape == bias.shape and not (weight.spec.is_float or of_input.spec.is_float):
            is_zero = find_zero_channels(read_tensor(prepared.graph_module, layer.weight), weight.spec.channel_axis)
            unit = fit_weight_scale(weight.scale, [(bias, input_scale)], is_zero) * input_scale
            unit = unit * bias_multiple(weight.levels, weight.spec.bits)
            bias = torch.where(unit != 0, torch.round(bias.double() / unit.double()).float() * unit, bias)
    set_parameter(prepared, layer.bias, bias)


def read_qparams(prepared: PreparedModel, layer: Layer, bits: int | Mapping[str, int]) -> QParams:
    """Return the qparams of a layer's weight at a bit-width, or at that of an allocation."""
    width = bits if isinstance(bits, int) else bits.get(layer.site.name, layer.site.baseline_bits)
    return weight_quantizer(prepared, layer).qparams_at(width)


def set_qparams(prepared: PreparedModel, layer: Layer, qparams: QParams) -> None:
    """Replace the qparams of a layer's weight at the bit-width of ``qparams``."""
    quantizer = weight_quantizer(prepared, layer)
    known = {bits: quantizer.qparams_at(bits) for bits in quantizer.calibrated_bits}
    quantizer.set_qparams({**known, qparams.spec.bits: qparams}, qparams.scale.device)


def weight_quantizer(prepared: PreparedModel, layer: Layer) -> Quantizer:
    """Return the module that quantizes a layer's weight."""
    quantizer = prepared.graph_module.get_submodule(str(layer.quantizer.target))
    assert isinstance(quantizer, Quantizer)
    return quantizer
