"""Find what can be quantized: weights, the activations that meet them, and what lets integer kernels fuse."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.errors import UnsupportedModelError, unknown_name_error
from infoq_fx.passes.layers import ATTENTION, LAYER_OPS, MATMUL_OPS, LayerOp, module_path, read_tensor
from infoq_fx.spec import BASELINE_BITS, Inventory, Operation, QuantSite

__all__ = ["Placement", "SitePlan", "find_sites"]

_ATEN = torch.ops.aten
_FUSED_ACTIVATIONS = {_ATEN.relu.default, _ATEN.hardtanh.default, _ATEN.clamp.default, _ATEN.relu6.default}


@dataclass(frozen=True)
class Placement:
    """A site, the node whose value it quantizes and the nodes that read the quantized value."""

    site: QuantSite
    node: fx.Node
    users: tuple[fx.Node, ...]


@dataclass(frozen=True)
class SitePlan:
    """Where quantizers go, what the model costs, and the weight site of the layer that makes the logits."""

    placements: tuple[Placement, ...]
    inventory: Inventory
    classifier: str | None


@dataclass(frozen=True)
class _Layer:
    """One multiplying node: its name, and its operands as (node, name, kind, channel axis)."""

    node: fx.Node
    name: str
    operands: tuple[tuple[fx.Node, str, str, int | None], ...]


def find_sites(
    graph_module: fx.GraphModule,
    example_inputs: Mapping[str, Tensor],
    *,
    bits: tuple[int, ...],
    activation_bits: tuple[int, ...] | None,
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
) -> SitePlan:
    """List the sites of a graph in normal form.

    Weight sites are the weights of convolutions (1-3d, transposed), linear layers and embeddings; activation sites
    are the tensors that feed the former two and the operands of matrix products and attention. Convolution outputs
    and operands of residual additions between convolutions get a fixed 8-bit site, since integer kernels need them.

    Args:
        graph_module: in normal form; not changed.
        example_inputs: a batch, from which shapes are read.
        bits: candidate bit-widths of weights.
        activation_bits: candidate bit-widths of activations; None leaves all activations in float.
        ignore: glob patterns on module paths, layers to leave in float.
        pin: glob pattern on module paths (their weights) or site names, to the bit-width it must have.

    Raises:
        UnsupportedModelError: nothing to quantize, or a weight that is not finite.
        OptionError: a pattern that matches nothing.
    """
    shapes = _record_shapes(graph_module, example_inputs)
    all_layers = _find_layers(graph_module)
    if not all_layers:
        raise UnsupportedModelError(
            "no layer to quantize: the model has no convolution, linear layer or matmul; give one that has"
        )
    known = _known_paths(all_layers)
    _check_patterns("ignore", ignore, known)
    layers = [layer for layer in all_layers if not any(_matches(layer, pattern) for pattern in ignore)]
    if not any(operand[2] == "weight" for layer in layers for operand in layer.operands):
        raise UnsupportedModelError(
            "no layer to quantize is left: every layer with weights is ignored; take some out of ignore"
        )
    placements = _place_layers(graph_module, layers, shapes, bits, activation_bits)
    placements = _apply_pins(placements, layers, pin or {}, known)
    if activation_bits is not None:
        placements += _place_fused(graph_module, layers, placements, shapes)
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    placements.sort(key=lambda p: (min(order[user] for user in p.users), p.site.kind))
    inventory = _take_inventory(graph_module, placements, all_layers, shapes)
    return SitePlan(tuple(placements), inventory, _find_classifier(graph_module, layers))


class _ShapeRecorder(fx.Interpreter):
    """Runs the graph once and keeps only each tensor's shape."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _record_shapes(
    graph_module: fx.GraphModule, example_inputs: Mapping[str, Tensor]
) -> Callable[[fx.Node], tuple[int, ...]]:
    recorder = _ShapeRecorder(graph_module)
    with torch.no_grad():
        recorder.run(*example_inputs.values())
    samples = next((x.shape[0] for x in example_inputs.values() if x.ndim), 1)

    def sample_shape(node: fx.Node) -> tuple[int, ...]:
        shape = recorder.shapes[node]
        if shape and shape[0] == samples:
            return shape[1:]
        elements = math.prod(shape)
        return (elements // samples,) if elements % samples == 0 else shape

    return sample_shape


def _find_layers(graph_module: fx.GraphModule) -> list[_Layer]:
    layers = []
    names: set[str] = set()
    for node in graph_module.graph.nodes:
        op = LAYER_OPS.get(node.target)
        if op is not None and _is_parameter(node.args[op.weight]):
            weight = node.args[op.weight]
            target = str(weight.target)
            if read_tensor(graph_module, weight).ndim < 2:
                continue
            name = _unique(module_path(node) or target.rpartition(".")[0] or target, names)
            read = (weight, target, "weight", op.channel_axis)
            source = (node.args[op.source], f"{name}.input", "activation", None)
            layers.append(_Layer(node, name, (read,) if op.is_lookup else (read, source)))
        elif node.target in MATMUL_OPS or node.target is ATTENTION:
            roles = ("query", "key", "value") if node.target is ATTENTION else ("left", "right")
            base = "attention" if node.target is ATTENTION else "matmul"
            name = _unique(f"{module_path(node)}.{base}".removeprefix("."), names)
            operands = tuple(
                (x, f"{name}.{role}", "activation", None) for x, role in zip(node.args, roles, strict=False)
            )
            layers.append(_Layer(node, name, operands))
    return layers


def _is_lookup(layer: _Layer) -> bool:
    return layer.node.target in LAYER_OPS and LAYER_OPS[layer.node.target].is_lookup


def _is_parameter(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and operand.op == "get_attr"


def _unique(name: str, taken: set[str]) -> str:
    found, count = name, 1
    while found in taken:
        found, count = f"{name}_{count}", count + 1
    taken.add(found)
    return found


def _known_paths(layers: Sequence[_Layer]) -> list[str]:
    paths: dict[str, None] = {}
    for layer in layers:
        parts = layer.name.split(".")
        paths.update(dict.fromkeys(".".join(parts[:end]) for end in range(len(parts), 0, -1)))
    for layer in layers:
        paths.update(dict.fromkeys(name for _, name, _, _ in layer.operands))
    return list(paths)


def _matches(layer: _Layer, pattern: str) -> bool:
    parts = layer.name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _check_patterns(option: str, patterns: Sequence[str], known: Sequence[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise unknown_name_error(f"layer in {option}", pattern, known)


def _place_layers(
    graph_module: fx.GraphModule,
    layers: Sequence[_Layer],
    shapes: Callable[[fx.Node], tuple[int, ...]],
    bits: tuple[int, ...],
    activation_bits: tuple[int, ...] | None,
) -> list[Placement]:
    """One placement a tensor: layers that share a weight or an input share its site.

    The scales of a shared weight are those that its multiplying layers take; embeddings take any.
    """
    found: dict[tuple[str, Any], Placement] = {}
    for layer in sorted(layers, key=_is_lookup):
        for node, name, kind, axis in layer.operands:
            is_weight = kind == "weight"
            if _is_parameter(node) and not is_weight:
                continue
            key = (kind, node.target if is_weight else node)
            if key in found:
                users = dict.fromkeys((*found[key].users, layer.node))
                found[key] = replace(found[key], users=tuple(users))
            elif is_weight:
                tensor = read_tensor(graph_module, node)
                if not bool(torch.isfinite(tensor).all()):
                    raise UnsupportedModelError(f"weight {name!r} holds NaN or infinity: mend the checkpoint first")
                site = QuantSite(name, "weight", tuple(tensor.shape), bits, axis)
                found[key] = Placement(site, node, (layer.node,))
            elif activation_bits is not None:
                site = QuantSite(name, "activation", shapes(node), activation_bits)
                found[key] = Placement(site, node, (layer.node,))
    return list(found.values())


def _apply_pins(
    placements: list[Placement], layers: Sequence[_Layer], pin: Mapping[str, int], known: Sequence[str]
) -> list[Placement]:
    for pattern, fixed in pin.items():
        pinned = {name for layer in layers if _matches(layer, pattern) for _, name, kind, _ in layer.operands
                  if kind == "weight"}  # fmt: skip
        pinned |= {p.site.name for p in placements if fnmatch.fnmatchcase(p.site.name, pattern)}
        if not pinned:
            raise unknown_name_error("layer in pin", pattern, known)
        placements = [
            replace(p, site=replace(p.site, bits=(fixed,))) if p.site.name in pinned else p for p in placements
        ]
    return placements


def _place_fused(
    graph_module: fx.GraphModule,
    layers: Sequence[_Layer],
    placements: Sequence[Placement],
    shapes: Callable[[fx.Node], tuple[int, ...]],
) -> list[Placement]:
    """Fixed 8-bit sites on convolution outputs and on residual additions that join them."""
    outputs: dict[fx.Node, str] = {}
    names = {layer.node: layer.name for layer in layers}
    for node in graph_module.graph.nodes:
        op = LAYER_OPS.get(node.target)
        if node in names and op is not None and op.is_convolution:
            outputs[_after_activation(node)] = f"{names[node]}.output"
        elif node.target is _ATEN.add.Tensor and _joins_convolutions(node, outputs):
            for operand in node.args[:2]:
                outputs.setdefault(operand, f"{_tensor_name(operand)}.output")
            outputs[_after_activation(node)] = f"{_tensor_name(node)}.output"
    quantized_users: dict[fx.Node, set[fx.Node]] = {}
    for placement in placements:
        quantized_users.setdefault(placement.node, set()).update(placement.users)
    found, taken = [], {placement.site.name for placement in placements}
    for node, name in outputs.items():
        users = [user for user in node.users if user.op != "output"]
        users = [user for user in users if user not in quantized_users.get(node, ())]
        if users and node.op != "placeholder":
            site = QuantSite(_unique(name, taken), "activation", shapes(node), (BASELINE_BITS,), is_searched=False)
            found.append(Placement(site, node, tuple(users)))
    return found


def _after_activation(node: fx.Node) -> fx.Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _FUSED_ACTIVATIONS else node


def _joins_convolutions(node: fx.Node, outputs: Mapping[fx.Node, str]) -> bool:
    operands = node.args[:2]
    return all(isinstance(x, fx.Node) and x.op != "get_attr" for x in operands) and any(x in outputs for x in operands)


def _tensor_name(node: fx.Node) -> str:
    return f"{module_path(node)}.{node.name}".removeprefix(".")


def _take_inventory(
    graph_module: fx.GraphModule,
    placements: Sequence[Placement],
    layers: Sequence[_Layer],
    shapes: Callable[[fx.Node], tuple[int, ...]],
) -> Inventory:
    sites = tuple(placement.site for placement in placements)
    present = {site.name for site in sites}
    # A tensor that several layers read has one site, under the name of the first of them.
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
    ignored = sum(weights.values()) - quantized
    return Inventory(sites, tuple(operations), total_bytes - 4 * quantized, ignored)


def _products(
    graph_module: fx.GraphModule,
    layer: _Layer,
    sides: list[str | None],
    shapes: Callable[[fx.Node], tuple[int, ...]],
) -> list[tuple[int, str | None, str | None]]:
    node = layer.node
    op: LayerOp | None = LAYER_OPS.get(node.target)
    if op is not None and op.is_lookup:
        return []
    first = layer.operands[0][0]
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


def _find_classifier(graph_module: fx.GraphModule, layers: Sequence[_Layer]) -> str | None:
    """The weight site of the layer whose output is the first output of the model."""
    output = next(iter(reversed(graph_module.graph.nodes)))
    node = next(iter(output.all_input_nodes), None)
    for layer in layers:
        if layer.node is node and layer.operands[0][2] == "weight":
            return layer.operands[0][1]
    return None
