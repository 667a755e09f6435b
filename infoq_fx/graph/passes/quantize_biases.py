"""Stores biases as int32 in units of the accumulator."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from infoq_fx.graph.layers import LAYER_OPS, is_call, module_path, read_tensor, write_tensor
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.types import FLOAT_BITS

__all__ = ["fit_weight_scale", "quantize_biases"]


_LARGEST_BIAS = 1 << 30


def quantize_biases(graph_module: fx.GraphModule) -> bool:
    """Store the bias of a fully quantized layer as int32 with scale ``input scale * weight scale``.

    1. a layer whose input and weight are quantized and whose bias is a parameter: int32 under the bias's own path
       and float32 ``<path>_scale``, so that a runtime adds it directly to the accumulator.

    Left alone: layers with a float operand, and grouped transposed convolutions (several output channels share a
    weight scale).
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        op = LAYER_OPS.get(node.target)
        if op is None:
            continue
        source, weight, bias = node.args[op.source], node.args[op.weight], op.bias_of(node)
        is_quantized = is_call(source, quantize_dequantize_op) and is_call(weight, dequantize_op)
        if is_quantized and isinstance(bias, fx.Node) and bias.op == "get_attr":
            scale = read_tensor(graph_module, weight.args[1]) * source.args[1]
            if scale.shape == read_tensor(graph_module, bias).shape:
                op.set_bias(node, _convert_bias(graph_module, node, bias, scale))
                changed = True
    return changed


def fit_weight_scale(scale: Tensor, bias: Tensor, input_scale: float | Tensor) -> Tensor:
    """Return weight scales ``[channels]``, raised where a channel's bias would otherwise overflow int32.

    A bias is stored in units of ``input_scale`` times the weight's scale.
    """
    return torch.maximum(scale, bias.abs() / (input_scale * _LARGEST_BIAS))


def _convert_bias(graph_module: fx.GraphModule, layer: fx.Node, bias: fx.Node, scale: Tensor) -> fx.Node:
    value = read_tensor(graph_module, bias)
    integers = torch.round(value.double() / scale.double()).to(torch.int32)
    target = str(bias.target)
    if len(bias.users) > 1:
        target = f"{target}_of_{layer.name}"
    write_tensor(graph_module, target, integers)
    write_tensor(graph_module, f"{target}_scale", scale)
    with graph_module.graph.inserting_before(layer):
        stored = graph_module.graph.get_attr(target)
        scale_node = graph_module.graph.get_attr(f"{target}_scale")
        converted = graph_module.graph.call_function(
            dequantize_op, (stored, scale_node, 0, FLOAT_BITS, f"{module_path(layer)}.bias")
        )
    converted.meta = {key: value for key, value in bias.meta.items() if key == "val"}
    return converted
