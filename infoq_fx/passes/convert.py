"""Turn a prepared graph into the quantized one: integer weights, fixed bit-widths, plain ATen and custom ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx import numerics
from infoq_fx.passes.layers import LAYER_OPS, module_path, read_tensor, write_tensor
from infoq_fx.quantizers import Observe, Quantizer, dequantize_op, quantize_dequantize_op
from infoq_fx.spec import FLOAT_BITS, QParams

__all__ = ["convert_quantizers", "fit_weight_scale", "quantize_biases", "remove_observers"]

_LARGEST_BIAS = 1 << 30


def remove_observers(graph_module: fx.GraphModule) -> bool:
    """Take out every observe node; each reader gets the value itself."""
    found = [(node, module) for node, module in _modules(graph_module) if isinstance(module, Observe)]
    for node, _ in found:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph_module.graph.erase_node(node)
    return bool(found)


def convert_quantizers(graph_module: fx.GraphModule, bits: Mapping[str, int]) -> bool:
    """Replace quantizers by the project's ops at the bit-widths of an allocation.

    1. an activation: ``infoq_fx.quantize_dequantize`` with scale and zero point as constants; two quantizers that
       would do the same to the same tensor become one.
    2. a weight: int8 buffer under the weight's own path, float32 ``<path>_scale``, ``infoq_fx.dequantize``.

    Left alone: a float weight that something else reads too stays beside its integers, under ``<path>_float``.
    """
    done: dict[tuple[Any, ...], fx.Node] = {}
    found = [(node, module) for node, module in _modules(graph_module) if isinstance(module, Quantizer)]
    # Activations first: a weight's scale depends on the scale of its layer's input where the bias is large.
    for node, module in sorted(found, key=lambda pair: pair[1].site.kind):
        qparams = module.qparams_at(bits[module.site.name])
        if module.site.kind == "activation":
            converted = _convert_activation(graph_module, node, module.site.name, qparams, done)
        else:
            converted = _convert_weight(graph_module, node, module.site.name, qparams)
        node.replace_all_uses_with(converted)
        graph_module.graph.erase_node(node)
    return bool(found)


def quantize_biases(graph_module: fx.GraphModule) -> bool:
    """Store the bias of a fully quantized layer as int32 with scale ``input scale * weight scale``.

    1. a layer whose input and weight are quantized and whose bias is a parameter: int32 under the bias's own path
       and float32 ``<path>_scale``, so that a runtime adds it in the accumulator's own unit.

    Left alone: layers with a float operand, and grouped transposed convolutions (one weight scale serves
    several output channels).
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        op = LAYER_OPS.get(node.target)
        if op is None:
            continue
        source, weight, bias = node.args[op.source], node.args[op.weight], op.bias_of(node)
        is_quantized = _calls(source, quantize_dequantize_op) and _calls(weight, dequantize_op)
        if is_quantized and isinstance(bias, fx.Node) and bias.op == "get_attr":
            scale = read_tensor(graph_module, weight.args[1]) * source.args[1]
            if scale.shape == read_tensor(graph_module, bias).shape:
                op.set_bias(node, _convert_bias(graph_module, node, bias, scale))
                changed = True
    return changed


def fit_weight_scale(scale: Tensor, bias: Tensor, input_scale: float | Tensor) -> Tensor:
    """Scales of a weight ``[channels]``, raised where a channel is so tiny that its bias would not fit 32 bits.

    A bias is stored in units of ``input_scale`` times the weight's scale.
    """
    return torch.maximum(scale, bias.abs() / (input_scale * _LARGEST_BIAS))


def _modules(graph_module: fx.GraphModule) -> list[tuple[fx.Node, torch.nn.Module]]:
    return [
        (node, graph_module.get_submodule(str(node.target)))
        for node in graph_module.graph.nodes
        if node.op == "call_module"
    ]


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


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
    qparams = _fit_biases(graph_module, node, qparams)
    others = [user for user in source.users if user is not node]
    if others:
        write_tensor(graph_module, f"{target}_float", weight)
        with graph_module.graph.inserting_before(node):
            kept = graph_module.graph.get_attr(f"{target}_float")
        kept.meta = dict(source.meta)
        first = min(others)
        first.prepend(kept)
        for user in others:
            user.replace_input_with(source, kept)
    write_tensor(graph_module, target, numerics.quantize(weight, qparams))
    write_tensor(graph_module, f"{target}_scale", qparams.scale.detach().clone())
    with graph_module.graph.inserting_before(node):
        integers = graph_module.graph.get_attr(target)
        scale = graph_module.graph.get_attr(f"{target}_scale")
        weight_node = graph_module.graph.call_function(dequantize_op, (integers, scale, axis, qparams.spec.bits, site))
    weight_node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return weight_node


def _fit_biases(graph_module: fx.GraphModule, node: fx.Node, qparams: QParams) -> QParams:
    """Raise the scale of channels so tiny that their bias would not fit 32 bits in the accumulator's unit."""
    scale = qparams.scale
    for layer in node.users:
        op = LAYER_OPS[layer.target]
        source: Any = layer.args[op.source]
        bias = op.bias_of(layer)
        if _calls(source, quantize_dequantize_op) and isinstance(bias, fx.Node) and bias.op == "get_attr":
            value = read_tensor(graph_module, bias)
            if value.shape == scale.shape:
                scale = fit_weight_scale(scale, value, float(source.args[1]))
    return QParams(qparams.spec, scale, qparams.zero_point)


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
