"""Chooses the observers where information is measured, and pools their values to feature vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx

from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.graph.reading_choice import list_output_nodes
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.scoring.criterion import Observer

__all__ = ["choose_default_observers", "find_observers", "list_output_observers", "pool_features"]

_OUTPUT = "output"
_INTERMEDIATE = 3


def choose_default_observers(prepared: PreparedModel) -> dict[Observer, fx.Node]:
    """Choose observers by the paper's heuristic: task information at the end, input information in the middle.

    Task information is measured at the classifier's input (global pooling, if there is one) and at all outputs; input
    information at three intermediate blocks, evenly spread over the second and third quarter of the depth.

    Reference:
        InfoQ, Section 4, "Observer Layer Selection and Validation".
    """
    named = prepared.observer_nodes()
    chosen: dict[Observer, fx.Node] = {}
    if prepared.classifier is not None:
        before = f"{prepared.classifier.rpartition('.')[0]}.input"
        if before in named:
            chosen[Observer(before, "task")] = named[before]
    chosen.update({Observer(name, "task"): named[name] for name in list_output_observers(prepared)})
    blocks = _blocks(prepared, named)
    for index in range(1, _INTERMEDIATE + 1):
        if blocks:
            name = blocks[min(len(blocks) - 1, len(blocks) * (index + 1) // (2 * _INTERMEDIATE))]
            chosen.setdefault(Observer(name, "input"), named[name])
    return chosen


def find_observers(
    prepared: PreparedModel, wanted: Sequence[Observer | str] | Literal["auto"]
) -> dict[Observer, fx.Node]:
    """Find observers by name: both measures for a bare name; ``"auto"`` is every named tensor, under one name each.

    The name ``"output"`` stands for all outputs of the model.

    Raises:
        OptionError: there is no observer, or a name or a measure is unknown.
    """
    named = prepared.observer_nodes()
    if wanted == "auto":
        first_names = {node: name for name, node in reversed(named.items())}
        return {Observer(name, m): node for node, name in first_names.items() for m in ("input", "task")}
    if not wanted or isinstance(wanted, str):
        raise OptionError(f"observers={wanted!r}; give a list of names or Observer values, 'auto' or None")
    chosen: dict[Observer, fx.Node] = {}
    for item in wanted:
        both = [Observer(item, "input"), Observer(item, "task")] if isinstance(item, str) else [item]
        if both[0].name == _OUTPUT:
            both = [Observer(name, one.measure) for one in both for name in list_output_observers(prepared)]
        for observer in both:
            if observer.name not in named:
                raise unknown_name_error("observer", observer.name, named)
            if observer.measure not in ("input", "task"):
                raise unknown_name_error("measure of an observer", observer.measure, ("input", "task"))
            chosen[observer] = named[observer.name]
    return chosen


def list_output_observers(prepared: PreparedModel) -> list[str]:
    """Return the names of the observers at the outputs that hold numbers, the first one's first."""
    outputs = set(list_output_nodes(prepared.graph_module))
    names: dict[fx.Node, str] = {}
    for name, node in prepared.observer_nodes().items():
        if node in outputs:
            names[node] = name  # the last of its names is that of the output
    return sorted(names.values(), key=lambda name: name != _OUTPUT)


def pool_features(value: Tensor, node: fx.Node) -> Tensor:
    """Pool an activation to ``[samples, features]``: maps averaged over space, sequences over their tokens.

    Four and more dimensions are ``[samples, channels, ...]``; three are ``[samples, tokens, features]``, or
    ``[samples, channels, length]`` after a 1-D convolution.
    """
    if value.ndim <= 2:
        return value.reshape(value.shape[0], -1)
    if value.ndim > 3:
        return value.flatten(2).mean(2)
    return value.mean(2 if _is_from_conv1d(node) else 1)


def _is_from_conv1d(node: fx.Node) -> bool:
    steps = 0
    while node.all_input_nodes and steps < 8:
        if "conv1d" in str(node.target) or "conv_transpose1d" in str(node.target):
            return True
        node, steps = node.all_input_nodes[0], steps + 1
    return False


def _blocks(prepared: PreparedModel, named: dict[str, fx.Node]) -> list[str]:
    """Names of observers between input and classifier, in graph order: outputs of modules that contain layers."""
    paths = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    order = {node: index for index, node in enumerate(prepared.graph_module.graph.nodes)}
    last = named[_OUTPUT]
    inner = {name: node for name, node in named.items() if node is not last}
    holders = [n for n in inner if sum(path.startswith(f"{n}.") for path in paths) > 1]
    found = holders if len(holders) >= _INTERMEDIATE else list(inner)
    by_node = {inner[name]: name for name in sorted(found, reverse=True)}
    return [by_node[node] for node in sorted(by_node, key=order.__getitem__)]
