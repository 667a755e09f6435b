"""Inserts an observer at every tensor that has a name."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.graph.layers import LAYER_OPS, RECURRENT_OPS, free_path, module_path
from infoq_fx.graph.operands import is_lookup_node, make_unique
from infoq_fx.quantization.quantizers import Observe, Quantizer

__all__ = ["OUTPUT", "insert_observers"]

OUTPUT = "output"
_LIFTS = {torch.ops.aten.unsqueeze.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default}


def insert_observers(graph_module: fx.GraphModule) -> bool:
    """Insert an :class:`Observe` after every node whose value may be observed.

    1. the last value of every module path: named by the path.
    2. the tensor that feeds a layer or a searched activation site: ``"<layer>.input"`` or the site's name,
       observed before the quantizer.
    3. the outputs of the model: ``"output"``, and ``"output_1"`` and so on for further ones (a module of such a name
       whose value is another gets the next number).

    Left alone: values that are not floating-point tensors, or the same for all samples (position embeddings), or that
    have samples elsewhere than first (recurrent layers over ``[steps, samples, features]``). Each node gets at most one
    observer, which has all its names.
    """
    names: dict[fx.Node, list[str]] = {}
    output = graph_module.graph.output_node()
    last_of: dict[str, fx.Node] = {}
    varying: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
        if node.op == "call_function" and node in varying and _is_floating(node) and _has_samples_first(node):
            parts = module_path(node).split(".")
            last_of.update(dict.fromkeys((".".join(parts[:end]) for end in range(1, len(parts) + 1)), node))
        elif node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, Quantizer) and module.site.kind == "weight":
                for layer in (user for user in node.users if not is_lookup_node(user)):
                    names.setdefault(_source(graph_module, layer), []).append(f"{module_path(layer)}.input")
            elif isinstance(module, Quantizer) and module.site.is_searched:
                names.setdefault(node.all_input_nodes[0], []).append(module.site.name)
    for path, node in last_of.items():
        if path:
            names.setdefault(node, []).append(path)
    if output.all_input_nodes:
        last = output.all_input_nodes[0]
        for node, known in names.items():
            if node is not last and OUTPUT in known:  # a module of that name; the model's output goes first
                known[known.index(OUTPUT)] = make_unique(OUTPUT, {OUTPUT, *last_of})
        names.setdefault(last, []).append(OUTPUT)
        taken = {OUTPUT, *last_of}
        for node in output.all_input_nodes[1:]:
            if node in varying and _is_floating(node):
                names.setdefault(node, []).append(make_unique(OUTPUT, taken))
    for index, (node, known) in enumerate(names.items()):
        _insert(graph_module, node, f"observers.{index}", tuple(dict.fromkeys(known)))
    return bool(names)


def _source(graph_module: fx.GraphModule, layer: fx.Node) -> fx.Node:
    """The value that a layer multiplies, before its quantizer."""
    place = 0 if layer.target in RECURRENT_OPS else LAYER_OPS[layer.target].source
    source: fx.Node = layer.args[place]  # type: ignore[assignment]
    while layer.target in RECURRENT_OPS and not _has_samples_first(source) and source.target in _LIFTS:
        (source,) = source.all_input_nodes
    is_quantized = source.op == "call_module" and isinstance(graph_module.get_submodule(str(source.target)), Quantizer)
    return source.all_input_nodes[0] if is_quantized else source


def _has_samples_first(node: fx.Node) -> bool:
    """Whether a value's first dimension can be that of samples: it is free where that of the first input is."""
    first = next(x for x in node.graph.nodes if x.op == "placeholder").meta["val"].shape
    shape = node.meta["val"].shape
    is_free = bool(first) and not is_concrete_int(first[0])
    return not is_free or not shape or not is_concrete_int(shape[0])


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _insert(graph_module: fx.GraphModule, node: fx.Node, target: str, names: tuple[str, ...]) -> None:
    target = free_path(graph_module, target)
    graph_module.add_submodule(target, Observe(names))
    with graph_module.graph.inserting_after(node):
        observed = graph_module.graph.call_module(target, (node,))
    observed.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
    node.replace_all_uses_with(observed, delete_user_cb=lambda user: user is not observed)
