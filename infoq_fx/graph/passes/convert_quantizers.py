"""Converts the quantizers of a prepared graph: integer weights, fixed bit-widths, only ATen and custom ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from infoq_fx.graph.layers import LAYER_OPS, called_modules, free_path, is_call, read_tensor, write_tensor
from infoq_fx.graph.passes.quantize_biases import find_zero_channels, fit_weight_scale
from infoq_fx.quantization import numerics
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.types import QParams

__all__ = ["convert_quantizers"]


def convert_quantizers(graph_module: fx.GraphModule, bits: Mapping[str, int]) -> bool:
    """Replace quantizers by the package's custom ops at the bit-widths of an allocation.

    1. an activation: ``infoq_fx.quantize_dequantize`` with scale and zero point as constants; two quantizers with
       equal qparams on the same tensor become one.
    2. a weight: int8 buffer under the weight's own path, float32 ``<path>_scale``, ``infoq_fx.dequantize``. With 16
       bits the buffer is float16.
    3. an activation at 16 bits: nothing, it stays in float, as does the input of a layer whose weight has 16 bits.

    Left alone: a float weight that other nodes also read is kept as ``<path>_float``, in addition to its integers.
    """
    done: dict[tuple[Any, ...], fx.Node] = {}
    found = [(node, module) for node, module in called_modules(graph_module) if isinstance(module, Quantizer)]
    # Activations first: a weight's scale may depend on the scale of its layer's input, see _fit_biases.
    for node, module in sorted(found, key=lambda pair: pair[1].site.kind):
        qparams = module.qparams_at(bits[module.site.name])
        if module.site.kind == "activation" and qparams.spec.is_float:
            converted = node.all_input_nodes[0]
        elif module.site.kind == "activation":
            converted = _convert_activation(graph_module, node, module.site.name, qparams, done)
        else:
            converted = _convert_weight(graph_module, node, module.site.name, qparams)
        node.replace_all_uses_with(converted)
        graph_module.graph.erase_node(node)
    return bool(found)


def _convert_activation(
    graph_module: fx.GraphModule,
    node: fx.Node,
    site: str,
    qparams: QParams,
    done: dict[tuple[Any, ...], fx.Node],
) -> fx.Node:
    source = node.all_input_nodes[0]
    constants = (float(qparams.scale), int(qparams.zero_point), qparams.spec.bits)
    key = (source, *constants)
    if key not in done:
        with graph_module.graph.inserting_before(node):
            done[key] = graph_module.graph.call_function(quantize_dequantize_op, (source, *constants, site))
        done[key].meta = dict(node.meta)
    return done[key]


def _convert_weight(graph_module: fx.GraphModule, node: fx.Node, site: str, qparams: QParams) -> fx.Node:
    source = node.all_input_nodes[0]
    weight = read_tensor(graph_module, source)
    target, axis = str(source.target), qparams.spec.channel_axis or 0
    if qparams.spec.is_float:
        _read_floats(node)
    else:
        qparams = _fit_biases(graph_module, node, qparams, find_zero_channels(weight, qparams.spec.channel_axis))
    others = [user for user in source.users if user is not node]
    if others:
        twin = free_path(graph_module, f"{target}_float")
        write_tensor(graph_module, twin, weight)
        with graph_module.graph.inserting_before(node):
            kept = graph_module.graph.get_attr(twin)
        kept.meta = dict(source.meta)
        first = min(others)
        first.prepend(kept)
        for user in others:
            user.replace_input_with(source, kept)
    write_tensor(graph_module, target, numerics.quantize(weight, qparams))
    scale_path = free_path(graph_module, f"{target}_scale")
    write_tensor(graph_module, scale_path, qparams.scale.detach().clone())
    with graph_module.graph.inserting_before(node):
        integers = graph_module.graph.get_attr(target)
        scale = graph_module.graph.get_attr(scale_path)
        weight_node = graph_module.graph.call_function(dequantize_op, (integers, scale, axis, qparams.spec.bits, site))
    weight_node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return weight_node


def _read_floats(weight: fx.Node) -> None:
    """Let the layers of a float weight read their input in float: they have no integer kernel.

    Between a quantized input and a quantized output, onnxruntime would quantize the weight itself, to 8 bits.
    """
    for layer in list(weight.users):
        op = LAYER_OPS.get(layer.target)  # recurrent layers read floats
        source: Any = None if op is None else layer.args[op.source]
        if op is not None and is_call(source, quantize_dequantize_op):
            layer.update_arg(op.source, source.args[0])


def _fit_biases(graph_module: fx.GraphModule, node: fx.Node, qparams: QParams, is_zero: Tensor) -> QParams:
    """Change the scales of channels whose bias could not be stored well in units of the accumulator."""
    biases = []
    for layer in node.users:
        op = LAYER_OPS.get(layer.target)
        if op is None:
            continue  # a recurrent layer, whose biases stay in float
        source: Any = layer.args[op.source]
        bias = op.bias_of(layer)
        if is_call(source, quantize_dequantize_op) and isinstance(bias, fx.Node) and bias.op == "get_attr":
            value = read_tensor(graph_module, bias)
            if value.shape == qparams.scale.shape:
                biases.append((value, float(source.args[1])))
    return replace(qparams, scale=fit_weight_scale(qparams.scale, biases, is_zero))
