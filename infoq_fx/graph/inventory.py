"""Counts what a graph stores and multiplies, from which costs are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from infoq_fx.graph.layers import ATTENTION, LAYER_OPS, RECURRENT_OPS, LayerOp, read_parameter, read_tensor
from infoq_fx.graph.operands import MultiplyingLayer, Placement
from infoq_fx.types import Inventory, Operation

__all__ = ["find_float_weights", "take_inventory"]


def take_inventory(
    graph_module: fx.GraphModule,
    placements: Sequence[Placement],
    layers: Sequence[MultiplyingLayer],
    shapes: Callable[[fx.Node], tuple[int, ...]],
    float_weights: Mapping[str, int],
    ties: tuple[tuple[str, ...], ...] = (),
) -> Inventory:
    """Collect the sites, multiply-accumulates and float bytes of a graph.

    Args:
        graph_module: in normal form.
        placements: of the sites.
        layers: all multiplying layers, those left in float included.
        shapes: gives a node's shape for one sample.
        float_weights: of :func:`find_float_weights`.
        ties: groups of weight sites with one bit-width.
    """
    sites = tuple(placement.site for placement in placements)
    present = {site.name for site in sites}
    # A tensor that several layers read has one site, named after the first of them.
    read_by = {(user, placement.node): placement.site.name for placement in placements for user in placement.users}
    operations = []
    weights: dict[str, int] = {}
    for layer in layers:
        names = [
            read_by.get((layer.node, node), name) if kind == "activation" else name
            for node, name, kind, _ in layer.operands
        ]
        for node, name, kind, _ in layer.operands:
            if kind == "weight":
                weights[name] = read_tensor(graph_module, node).numel()
        sides = [name if name in present else None for name in names]
        for index, (macs, left, right) in enumerate(_products(graph_module, layer, sides, shapes)):
            operations.append(Operation(layer.name if index == 0 else f"{layer.name}.{index}", macs, left, right))
    stored = [*graph_module.parameters(), *graph_module.buffers()]
    quantized = sum(count for name, count in weights.items() if name in present)
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    kept = sum(count for name, count in float_weights.items() if name in present)
    others = sum(count for name, count in float_weights.items() if name not in weights)
    ignored = sum(weights.values()) - quantized + kept + others
    return Inventory(sites, tuple(operations), total_bytes - 4 * quantized + 4 * kept, ignored, ties)


def find_float_weights(graph_module: fx.GraphModule, layers: Sequence[MultiplyingLayer]) -> dict[str, int]:
    """Return the elements of the weights that stay in float, at least for some of their readers, by path.

    These are parameters of two or more dimensions that something else than the multiplying layers reads, such as
    position embeddings, or a weight that is also added somewhere. Its layers then read its integers, and the others a
    copy in float.
    """
    read_by_layers = {(operand[0], layer.node) for layer in layers for operand in layer.operands}
    found: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr" or all((node, user) in read_by_layers for user in node.users):
            continue
        value = read_parameter(graph_module, node)
        if isinstance(value, nn.Parameter) and value.is_floating_point() and sum(size > 1 for size in value.shape) > 1:
            found[str(node.target)] = value.numel()
    return found


def _products(
    graph_module: fx.GraphModule,
    layer: MultiplyingLayer,
    sides: list[str | None],
    shapes: Callable[[fx.Node], tuple[int, ...]],
) -> list[tuple[int, str | None, str | None]]:
    node = layer.node
    op: LayerOp | None = LAYER_OPS.get(node.target)
    if op is not None and op.is_lookup:
        return []
    first = layer.operands[0][0]
    if node.target in RECURRENT_OPS:
        source: Any = node.args[0]
        steps = math.prod(shapes(source)) // int(source.meta["val"].shape[-1])
        return [(steps * read_tensor(graph_module, first).numel(), sides[0], None)]
    if node.target is ATTENTION:
        query, key, value = (math.prod(shapes(operand[0])) for operand in layer.operands)
        length = shapes(layer.operands[1][0])[-2]
        width = shapes(first)[-1]
        rows = query // width
        return [
            (rows * width * length, sides[0], sides[1]),
            (rows * length * value * width // key, None, sides[2]),
        ]
    outputs = math.prod(shapes(node))
    if op is None or layer.operands[0][2] != "weight":
        return [(outputs * shapes(first)[-1], sides[0], sides[1])]
    weight = read_tensor(graph_module, first)
    if op.is_transposed:
        return [(math.prod(shapes(layer.operands[1][0])) * weight.numel() // weight.shape[0], sides[0], sides[1])]
    return [(outputs * weight.numel() // weight.shape[op.channel_axis], sides[0], sides[1])]
