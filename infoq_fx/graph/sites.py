"""Finds what can be quantized: weights, the activations they multiply, and tensors that let integer kernels fuse."""

from __future__ import annotations

import fnmatch
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.errors import OptionError, UnsupportedModelError, unknown_name_error
from infoq_fx.graph.inventory import find_float_weights, take_inventory
from infoq_fx.graph.layers import ATTENTION, LAYER_OPS, MATMUL_OPS, module_path, read_tensor
from infoq_fx.graph.operands import (
    MultiplyingLayer,
    Placement,
    find_multiplying_layers,
    is_lookup,
    is_parameter,
    make_unique,
    record_sample_shapes,
)
from infoq_fx.types import BASELINE_BITS, FLOAT16_BITS, Inventory, QuantSite, WeightLevels

__all__ = ["SitePlan", "find_sites", "warn_of_float_weights"]

_ATEN = torch.ops.aten
_LARGE_WEIGHT = 1000  # elements; smaller ones in float are not worth a warning
_FUSED_ACTIVATIONS = {_ATEN.relu.default, _ATEN.hardtanh.default, _ATEN.clamp.default, _ATEN.relu6.default}


@dataclass(frozen=True)
class SitePlan:
    """The sites of a graph: their placements, the inventory, and the weight site of the layer that makes the logits.

    ``float_weights`` are the elements, by path, of large weights that stay in float though nobody asked for it.
    """

    placements: tuple[Placement, ...]
    inventory: Inventory
    classifier: str | None
    float_weights: Mapping[str, int] = field(default_factory=dict)


def find_sites(
    graph_module: fx.GraphModule,
    example_inputs: Mapping[str, Tensor],
    *,
    bits: tuple[int, ...],
    activation_bits: tuple[int, ...] | None,
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
    tie: Sequence[Sequence[str]] = (),
    levels: WeightLevels = "uniform",
) -> SitePlan:
    """Find the sites of a graph in normal form.

    Weight sites are the weights of convolutions (1-3d, transposed), linear layers, embeddings and recurrent layers.
    Activation sites are the inputs of convolutions and linear layers and the operands of matrix products and
    attention. Convolution outputs and operands of residual additions between convolutions get a fixed 8-bit site,
    since integer kernels need them.

    Args:
        graph_module: in normal form; not changed.
        example_inputs: one batch, from which shapes are read.
        bits: candidate bit-widths of weights.
        activation_bits: candidate bit-widths of activations; None leaves all activations in float.
        ignore: glob patterns on the module paths of layers to leave in float, or on the paths of other weights, which
            stay in float anyway, to say that this is known.
        pin: fixed bit-widths by glob pattern on module paths (their weights) or site names.
        tie: groups of glob patterns on module paths of layers whose weights get one bit-width; there is one tie for
            each parent module that a group has matches in.
        levels: the integers that weights of few bits may have.

    Raises:
        UnsupportedModelError: there is nothing to quantize, or a weight is not finite.
        OptionError: a pattern matches nothing, or a tie holds one layer only, or layers pinned to different bits.
    """
    shapes = record_sample_shapes(graph_module, example_inputs)
    all_layers = find_multiplying_layers(graph_module)
    if not all_layers:
        raise UnsupportedModelError(
            "no layer to quantize: the model has no convolution, linear layer or matmul; give one that has"
        )
    floats = find_float_weights(graph_module, all_layers)
    _check_patterns("ignore", ignore, [*_module_paths(all_layers), *floats])
    layers = [layer for layer in all_layers if not any(_matches(layer.name, pattern) for pattern in ignore)]
    if not any(operand[2] == "weight" for layer in layers for operand in layer.operands):
        raise UnsupportedModelError(
            "no layer to quantize is left: every layer with weights is ignored; take some out of ignore"
        )
    placements = _place_layers(graph_module, layers, shapes, bits, activation_bits)
    placements = [replace(p, site=replace(p.site, levels=levels)) if p.site.kind == "weight" else p for p in placements]
    placements = _apply_pins(placements, layers, pin or {})
    with_weights = _module_paths(filter(_weights_of, all_layers))
    _check_patterns("tie", [pattern for group in tie for pattern in group], with_weights)
    ties = _find_ties(layers, tie)
    placements = _share_candidates(placements, ties)
    if activation_bits is not None and activation_bits != (FLOAT16_BITS,):
        placements = _follow_operands(_follow_weights(placements))
        placements += _place_fused(graph_module, all_layers, layers, placements, shapes)
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    placements.sort(key=lambda p: (min(order[user] for user in p.users), p.site.kind))
    inventory = take_inventory(graph_module, placements, all_layers, shapes, floats, ties)
    unasked = {
        name: count
        for name, count in floats.items()
        if count > _LARGE_WEIGHT and not any(_matches(name, pattern) for pattern in ignore)
    }
    return SitePlan(tuple(placements), inventory, _find_classifier(graph_module, layers), unasked)


def warn_of_float_weights(plan: SitePlan, *, stacklevel: int) -> None:
    """Warn of all large weights of a plan that stay in float, once."""
    if plan.float_weights:
        named = ", ".join(f"{name!r} ({count:,} elements)" for name, count in plan.float_weights.items())
        warnings.warn(
            f"weights that no layer multiplies stay in float: {named}; sizes and compression count them so; "
            "name them in ignore=[...] if that is meant",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _module_paths(layers: Iterable[MultiplyingLayer]) -> list[str]:
    """The names of layers and of the modules around them."""
    paths: dict[str, None] = {}
    for layer in layers:
        parts = layer.name.split(".")
        paths.update(dict.fromkeys(".".join(parts[:end]) for end in range(len(parts), 0, -1)))
    return list(paths)


def _weights_of(layer: MultiplyingLayer) -> list[str]:
    return [name for _, name, kind, _ in layer.operands if kind == "weight"]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a layer's name or one of the modules around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _check_patterns(option: str, patterns: Sequence[str], known: Sequence[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise unknown_name_error(f"layer in {option}", pattern, known)


def _place_layers(
    graph_module: fx.GraphModule,
    layers: Sequence[MultiplyingLayer],
    shapes: Callable[[fx.Node], tuple[int, ...]],
    bits: tuple[int, ...],
    activation_bits: tuple[int, ...] | None,
) -> list[Placement]:
    """One placement per tensor: layers that share a weight or an input share its site.

    The scales of a shared weight run along the channel axis of its multiplying layers; embeddings take any axis.
    """
    found: dict[tuple[str, Any], Placement] = {}
    for layer in sorted(layers, key=is_lookup):
        for node, name, kind, axis in layer.operands:
            is_weight = kind == "weight"
            if is_parameter(node) and not is_weight:
                continue
            key = (kind, node.target if is_weight else node)
            if key in found:
                users = dict.fromkeys((*found[key].users, layer.node))
                found[key] = replace(found[key], users=tuple(users))
            elif is_weight:
                tensor = read_tensor(graph_module, node)
                if not bool(torch.isfinite(tensor).all()):
                    raise UnsupportedModelError(f"weight {name!r} holds NaN or infinity: fix the checkpoint first")
                site = QuantSite(name, "weight", tuple(tensor.shape), bits, axis)
                found[key] = Placement(site, node, (layer.node,))
            elif activation_bits is not None:
                site = QuantSite(name, "activation", shapes(node), activation_bits)
                found[key] = Placement(site, node, (layer.node,))
    return list(found.values())


def _apply_pins(
    placements: list[Placement], layers: Sequence[MultiplyingLayer], pin: Mapping[str, int]
) -> list[Placement]:
    """Fix the bits of the weights of layers, and of sites by their names; the last pattern that matches counts."""
    _check_shared(layers, pin)
    for pattern, fixed in pin.items():
        pinned = {name for layer in layers if _matches(layer.name, pattern) for name in _weights_of(layer)}
        pinned |= {p.site.name for p in placements if fnmatch.fnmatchcase(p.site.name, pattern)}
        if not pinned:
            raise unknown_name_error("layer in pin", pattern, _pinnable(placements, layers, pattern))
        placements = [
            replace(p, site=replace(p.site, bits=(fixed,))) if p.site.name in pinned else p for p in placements
        ]
    return placements


def _check_shared(layers: Sequence[MultiplyingLayer], pin: Mapping[str, int]) -> None:
    """Refuse different bit-widths for layers that share a weight; a later pattern may override one that matches all."""
    readers: dict[str, list[str]] = {}
    for layer in layers:
        for weight in _weights_of(layer):
            readers.setdefault(weight, []).append(layer.name)
    for weight, names in readers.items():
        found = {pattern: {name for name in names if _matches(name, pattern)} for pattern in pin}
        for (first, ours), (second, theirs) in itertools.combinations(found.items(), 2):
            if ours and theirs and ours.isdisjoint(theirs) and pin[first] != pin[second]:
                raise OptionError(
                    f"pin has {first!r}: {pin[first]} and {second!r}: {pin[second]}, but {sorted(ours)[0]!r} and "
                    f"{sorted(theirs)[0]!r} share the weight {weight!r}; pin one of them, or both alike"
                )


def _pinnable(placements: Sequence[Placement], layers: Sequence[MultiplyingLayer], pattern: str) -> list[str]:
    """Names that can be pinned, with sites of activations only where the pattern looks like one of them."""
    last = pattern.rpartition(".")[2]
    sites = [
        placement.site.name
        for placement in placements
        if placement.site.kind == "weight" or placement.site.name.rpartition(".")[2] == last
    ]
    return [*_module_paths(filter(_weights_of, layers)), *sites]


def _find_ties(layers: Sequence[MultiplyingLayer], tie: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The weights of each group of patterns below each parent module, in graph order; ties that overlap are one."""
    found: list[dict[str, None]] = []
    for patterns in tie:
        below: dict[str, dict[str, None]] = {}
        for layer in layers:
            weights = _weights_of(layer)
            if weights and (parent := _find_parent(layer.name, patterns)) is not None:
                below.setdefault(parent, {}).update(dict.fromkeys(weights))
        if not below:
            raise OptionError(
                f"tie={tuple(patterns)} matches no layer with a quantized weight; leave its layers out of ignore, or "
                "remove it"
            )
        for parent, names in below.items():
            if len(names) == 1:
                single, advice = _describe_single(parent, below)
                raise OptionError(f"tie={tuple(patterns)} matches only {single}; give {advice}")
            apart = [other for other in found if not other.keys() & names.keys()]
            joined = [other for other in found if other.keys() & names.keys()]
            found = [*apart, {name: None for group in (*joined, names) for name in group}]
    order = {name: index for index, layer in enumerate(layers) for _, name, _, _ in reversed(layer.operands)}
    return tuple(sorted((tuple(sorted(names, key=order.__getitem__)) for names in found), key=lambda t: order[t[0]]))


def _describe_single(parent: str, below: Mapping[str, Mapping[str, None]]) -> tuple[str, str]:
    """What a group of patterns matches that finds a single layer below a parent module, and what to give instead."""
    places = {path: f"{next(iter(names))!r} below {path or 'the model'!r}" for path, names in below.items()}
    other = next((path for path in below if path != parent), None)
    if other is None:
        return places[parent], "patterns that match several layers there, or remove it"
    is_near = parent and other and parent.rpartition(".")[0] == other.rpartition(".")[0]
    advice = f"name the modules, as {(parent, other)} ties all layers in both" if is_near else "pin these alike"
    found = f"{places[parent]}, and {places[other]}: layers are tied below one parent"
    return found, f"patterns that match several layers there, or {advice}"


def _find_parent(path: str, patterns: Sequence[str]) -> str | None:
    """The parent of the innermost module on a path that matches a pattern."""
    while path:
        parent = path.rpartition(".")[0]
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return parent
        path = parent
    return None


def _share_candidates(placements: list[Placement], ties: Sequence[Sequence[str]]) -> list[Placement]:
    """Give all sites of a tie the candidates that they have in common."""
    candidates = {placement.site.name: placement.site.bits for placement in placements}
    for tie in ties:
        shared = tuple(bits for bits in candidates[tie[0]] if all(bits in candidates[name] for name in tie))
        if not shared:
            found = ", ".join(f"{name!r} has {candidates[name]}" for name in tie)
            raise OptionError(f"tied layers have no bit-width in common: {found}; pin one of them, or all alike")
        candidates |= dict.fromkeys(tie, shared)
    return [replace(p, site=replace(p.site, bits=candidates[p.site.name])) for p in placements]


def _follow_weights(placements: Sequence[Placement]) -> list[Placement]:
    """Let the input of a single layer follow its weight: with a weight in float there is no integer kernel."""
    floats = {
        user: p.site.name
        for p in placements
        if p.site.kind == "weight" and FLOAT16_BITS in p.site.bits
        for user in p.users
    }
    found = []
    for p in placements:
        weight = floats.get(p.users[0]) if p.site.kind == "activation" and len(p.users) == 1 else None
        found.append(p if weight is None else replace(p, site=replace(p.site, follows=(weight,))))
    return found


def _follow_operands(placements: Sequence[Placement]) -> list[Placement]:
    """Let the second operand of a product of activations follow the first: a float operand leaves no integer kernel.

    Two operands that both lose much are then measured together. One that something else reads too is left alone.
    """
    first: dict[fx.Node, str] = {}
    found = []
    for p in placements:
        is_product = p.site.kind == "activation" and p.users[0].target in (*MATMUL_OPS, ATTENTION)
        before = first.get(p.users[0]) if is_product and len(p.users) == 1 else None
        if is_product and FLOAT16_BITS in p.site.bits:
            first.setdefault(p.users[0], p.site.name)
        found.append(p if before is None else replace(p, site=replace(p.site, follows=(before,))))
    return found


def _place_fused(
    graph_module: fx.GraphModule,
    all_layers: Sequence[MultiplyingLayer],
    layers: Sequence[MultiplyingLayer],
    placements: Sequence[Placement],
    shapes: Callable[[fx.Node], tuple[int, ...]],
) -> list[Placement]:
    """Fixed 8-bit sites on convolution outputs and on residual additions that join them.

    They help integer kernels only, and are in float where the convolution is, where another layer reads the same
    tensor in float, or where the addition that reads them does its work in float. Layers that are left in float do not
    read them: onnxruntime would quantize their weights itself.
    """
    in_float = {layer.node for layer in all_layers} - {layer.node for layer in layers}
    outputs: dict[fx.Node, str] = {}
    names = {layer.node: layer.name for layer in layers}
    additions = []
    for node in graph_module.graph.nodes:
        op = LAYER_OPS.get(node.target)
        if node in names and op is not None and op.is_convolution:
            outputs[_after_activation(node)] = f"{names[node]}.output"
        elif node.target is _ATEN.add.Tensor and _joins_convolutions(node, outputs):
            for operand in node.args[:2]:
                outputs.setdefault(operand, f"{_tensor_name(operand)}.output")
            outputs[_after_activation(node)] = f"{_tensor_name(node)}.output"
            additions.append(node)
    quantized_users: dict[fx.Node, set[fx.Node]] = {}
    for placement in placements:
        quantized_users.setdefault(placement.node, set()).update(placement.users)
    made_by = {_after_activation(layer.node): layer.node for layer in layers}
    found, taken = [], {placement.site.name for placement in placements}
    for node, name in outputs.items():
        users = [user for user in node.users if user.op != "output"]
        users = [user for user in users if user not in quantized_users.get(node, ()) and user not in in_float]
        if users and node.op != "placeholder":
            leaders = [
                p.site
                for p in placements
                if FLOAT16_BITS in p.site.bits and (p.node is node or made_by.get(node) in p.users)
            ]
            site = QuantSite(
                make_unique(name, taken),
                "activation",
                shapes(node),
                (BASELINE_BITS,),
                is_searched=False,
                follows=tuple(leader.name for leader in leaders),
            )
            found.append(Placement(site, node, tuple(users)))
    return _follow_additions(found, placements, additions, made_by)


def _follow_additions(
    fused: Sequence[Placement], layers: Sequence[Placement], additions: Sequence[fx.Node], made_by: Collection[fx.Node]
) -> list[Placement]:
    """Let an operand of an addition follow what puts the sum, or the other operand, in float: there is no kernel then.

    A sum with outliers has them from its operands, so that only all together gain from float. The output of a
    convolution, whose own kernel needs it, does not follow the other operand. An operand that something else reads too
    is left alone.

    Args:
        fused: the fixed sites.
        layers: all other sites.
        additions: those that join convolutions.
        made_by: the tensors that convolutions make.
    """
    may_float = {p.site.name for p in (*fused, *layers) if p.site.follows or FLOAT16_BITS in p.site.bits}
    read_by_layers = {p.node: p.site.name for p in layers if p.site.kind == "activation"}
    found = {p.node: p for p in fused}
    movable = [p for p in fused if len(p.users) == 1 and p.users[0] in additions]
    is_grown = True
    while is_grown:  # an addition may be an operand of the next one
        is_grown = False
        for node, (user,) in ((p.node, p.users) for p in movable):
            site, total = found[node].site, _after_activation(user)
            leaders = [read_by_layers[total]] if total in read_by_layers else []
            if node not in made_by:
                others = (*user.args[:2], *(() if leaders else (total,)))
                leaders += [found[x].site.name for x in others if x is not node and x in found]
            added = [name for name in leaders if name in may_float and name not in site.follows]
            if added:
                found[node] = replace(found[node], site=replace(site, follows=(*site.follows, *added)))
                may_float.add(site.name)
                is_grown = True
    return list(found.values())


def _after_activation(node: fx.Node) -> fx.Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _FUSED_ACTIVATIONS else node


def _joins_convolutions(node: fx.Node, outputs: Mapping[fx.Node, str]) -> bool:
    operands = node.args[:2]
    return all(isinstance(x, fx.Node) and x.op != "get_attr" for x in operands) and any(x in outputs for x in operands)


def _tensor_name(node: fx.Node) -> str:
    return f"{module_path(node)}.{node.name}".removeprefix(".")


def _find_classifier(graph_module: fx.GraphModule, layers: Sequence[MultiplyingLayer]) -> str | None:
    """The weight site of the layer whose output is the first output of the model."""
    output = graph_module.graph.output_node()
    node = next(iter(output.all_input_nodes), None)
    for layer in layers:
        if layer.node is node and layer.operands[0][2] == "weight":
            return layer.operands[0][1]
    return None
