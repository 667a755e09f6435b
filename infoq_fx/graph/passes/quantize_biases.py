"""Stores biases as int32 in units of the accumulator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from infoq_fx.graph.layers import LAYER_OPS, free_path, is_call, module_path, read_tensor, write_tensor
from infoq_fx.quantization.codebooks import bias_multiple
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.types import FLOAT16_BITS, FLOAT_BITS

__all__ = ["find_zero_channels", "fit_input_scale", "fit_weight_scale", "quantize_biases"]

_LARGEST_BIAS = 1 << 30
_FINE_BIAS = 1 << 20  # steps of a bias that alone makes its output, in units or in 16 of them; exact in float32
_SMALLEST_UNIT = 2 * torch.finfo(torch.float32).tiny


def quantize_biases(graph_module: fx.GraphModule) -> bool:
    """Store the bias of a fully quantized layer as int32 with scale ``input scale * weight scale``.

    1. a layer whose input and weight are quantized and whose bias is a parameter: int32 under the bias's own path
       and float32 ``<path>_scale``, so that a runtime adds it directly to the accumulator. Multiples of
       :func:`infoq_fx.quantization.codebooks.bias_multiple`.

    Left alone: layers with an operand in float or float16, and grouped transposed convolutions (several output channels
    share a weight scale).
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        op = LAYER_OPS.get(node.target)
        if op is None:
            continue
        source, weight, bias = node.args[op.source], node.args[op.weight], op.bias_of(node)
        is_quantized = is_call(source, quantize_dequantize_op) and is_call(weight, dequantize_op)
        is_quantized = is_quantized and weight.args[3] != FLOAT16_BITS
        if is_quantized and isinstance(bias, fx.Node) and bias.op == "get_attr":
            scale = read_tensor(graph_module, weight.args[1]) * source.args[1]
            if scale.shape == read_tensor(graph_module, bias).shape:
                multiple = bias_multiple(read_tensor(graph_module, weight.args[0]), int(weight.args[3]))
                op.set_bias(node, _convert_bias(graph_module, node, bias, scale, multiple))
                changed = True
    return changed


def fit_weight_scale(
    scale: Tensor, biases: Sequence[tuple[Tensor, float | Tensor]], is_zero: Tensor | None = None
) -> Tensor:
    """Return a weight's scales ``[channels]``, changed where a bias of its layers could not be stored well.

    A bias is stored in units of the input's scale times the weight's. A channel whose bias would overflow int32 takes a
    larger scale. A channel of zeros is its bias, and any scale suits its weights: it takes the power of two that gives
    the bias at least 2^20 steps: 2^16 of a codebook's multiples.

    Args:
        scale: of the weight, ``[channels]``.
        biases: of the layers that share the weight, ``[channels]``, each with the scale of its layer's input.
        is_zero: the channels of zeros, see :func:`find_zero_channels`; None leaves them alone.

    Returns:
        Scales of the same signs, but that channels of zeros are positive.
    """
    if is_zero is not None:
        fine = torch.full_like(scale, torch.inf)
        for bias, input_scale in biases:
            fine = torch.where(bias == 0, fine, torch.minimum(fine, bias.abs() / (input_scale * _FINE_BIAS)))
        scale = torch.where(is_zero & fine.isfinite(), _floor_to_power(fine), scale)
    for bias, input_scale in biases:
        least = torch.clamp_min(bias.abs() / _LARGEST_BIAS, _SMALLEST_UNIT) / input_scale
        scale = torch.maximum(scale.abs(), least).copysign(scale)
    return scale


def fit_input_scale(graph_module: fx.GraphModule, source: fx.Node) -> float:
    """Return the scale that a tensor of zeros takes for the biases of the layers that read it.

    What such a layer computes is its bias, stored in units of this scale times the weight's. The scale is a power of
    two that gives the largest bias of a layer 2^16 steps or more at every bit-width of its weight; 1 if no layer with a
    bias reads the tensor.
    """
    fine = []
    for layer in source.users:
        op = LAYER_OPS.get(layer.target)
        if op is None or layer.args[op.source] is not source:
            continue
        weight, bias = layer.args[op.weight], op.bias_of(layer)
        while isinstance(weight, fx.Node) and weight.op == "call_module":
            (weight,) = weight.all_input_nodes
        operands = [x for x in (weight, bias) if isinstance(x, fx.Node) and x.op == "get_attr"]
        tensors = [read_tensor(graph_module, x) for x in operands]
        sizes = [float(x.abs().amax()) for x in tensors if x.numel()]
        if len(sizes) == 2 and min(sizes) > 0:
            fine.append(sizes[1] / (sizes[0] * _FINE_BIAS))
    return float(_floor_to_power(torch.tensor(min(fine, default=1.0), dtype=torch.float32)))


def find_zero_channels(weight: Tensor, channel_axis: int | None) -> Tensor:
    """Return which output channels of a weight are all zeros, ``[channels]``, or ``[]`` without a channel axis."""
    if channel_axis is None:
        return (weight == 0).all()
    return (weight == 0).movedim(channel_axis, 0).flatten(1).all(1)


def _floor_to_power(x: Tensor) -> Tensor:
    """The largest powers of two up to positive numbers, within the normal numbers of float32."""
    return torch.exp2((torch.frexp(x).exponent - 1).clamp(-126, 126).to(torch.float32))


def _convert_bias(graph_module: fx.GraphModule, layer: fx.Node, bias: fx.Node, scale: Tensor, multiple: int) -> fx.Node:
    value = read_tensor(graph_module, bias)
    integers = torch.round(value.double() / (multiple * scale.double())).to(torch.int32) * multiple
    target = str(bias.target)
    if len(bias.users) > 1:
        target = free_path(graph_module, f"{target}_of_{layer.name}")
    write_tensor(graph_module, target, integers)
    scale_path = free_path(graph_module, f"{target}_scale")
    write_tensor(graph_module, scale_path, scale)
    with graph_module.graph.inserting_before(layer):
        stored = graph_module.graph.get_attr(target)
        scale_node = graph_module.graph.get_attr(scale_path)
        converted = graph_module.graph.call_function(
            dequantize_op, (stored, scale_node, 0, FLOAT_BITS, f"{module_path(layer)}.bias")
        )
    converted.meta = {key: value for key, value in bias.meta.items() if key == "val"}
    return converted
