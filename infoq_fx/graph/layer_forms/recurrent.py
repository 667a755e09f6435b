"""Writes recurrent layers and their cells as layers of one level each, as ONNX has them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from infoq_fx.errors import UnsupportedModelError
from infoq_fx.graph.layer_forms.building import Place, arguments_of, constant_nodes
from infoq_fx.graph.layers import RECURRENT_OPS, module_path

__all__ = ["write_recurrent_layers"]

_ATEN = torch.ops.aten
_CELLS = {
    _ATEN.lstm_cell.default: _ATEN.lstm.input,
    _ATEN.gru_cell.default: _ATEN.gru.input,
    _ATEN.rnn_tanh_cell.default: _ATEN.rnn_tanh.input,
    _ATEN.rnn_relu_cell.default: _ATEN.rnn_relu.input,
}
_PACKED = {_ATEN.lstm.data, _ATEN.gru.data, _ATEN.rnn_tanh.data, _ATEN.rnn_relu.data}


def write_recurrent_layers(graph_module: fx.GraphModule) -> bool:
    """Write recurrent layers so that each node has one level, in one direction or in both.

    1. a cell: a layer over one step.
    2. a layer of several levels: one layer for each, which reads the outputs of the one before.

    Left alone: layers of one level.

    Raises:
        UnsupportedModelError: packed sequences, weights that depend on an input, or a projection (``proj_size``)
            with an initial state that is not zero, for which ONNX has no operator.
    """
    constant = constant_nodes(graph_module)
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.target in _PACKED:
            raise UnsupportedModelError(
                f"{_name(node)} runs over packed sequences, whose steps have different samples; call it on padded "
                "sequences [samples, steps, features] instead, and mask what is behind their ends"
            )
        if node.target in _CELLS:
            _refuse_computed(node, arguments_of(node)[2:4], constant)
            _write_cell(Place(graph_module, node))
        elif node.target in RECURRENT_OPS:
            _refuse_computed(node, arguments_of(node)[2], constant)
            _refuse_projected_state(node)
            if node.args[4] == 1:
                continue
            _split_levels(Place(graph_module, node))
        else:
            continue
        graph_module.graph.erase_node(node)
        changed = True
    return changed


def _name(node: fx.Node) -> str:
    return repr(module_path(node) or str(node.target))


def _refuse_computed(node: fx.Node, weights: Any, constant: set[fx.Node]) -> None:
    if any(isinstance(weight, fx.Node) and weight not in constant for weight in weights):
        raise UnsupportedModelError(
            f"the weights of the recurrent layer {_name(node)} depend on an input of the model; quantize the model "
            "without it"
        )


def _refuse_projected_state(node: fx.Node) -> None:
    _, state, parameters, _, levels, _, _, is_bidirectional, _ = arguments_of(node)
    per_level = len(parameters) // (levels * (2 if is_bidirectional else 1))
    if per_level % 2 and not _is_zero(state[0]):
        raise UnsupportedModelError(
            f"{_name(node)} has a projection (proj_size) and is given an initial state, which no operator of ONNX "
            "takes; leave the state out, or use an LSTM without proj_size and a linear layer behind it"
        )


def _is_zero(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (
        _ATEN.zeros.default,
        _ATEN.new_zeros.default,
        _ATEN.zeros_like.default,
    )


def _write_cell(place: Place) -> None:
    node = place.node
    source, state, *weights = arguments_of(node)
    target: Any = node.target
    states = state if isinstance(state, list | tuple) else [state]
    lifted = [place.call(_ATEN.unsqueeze.default, x, 0) for x in (source, *states)]
    given = [weight for weight in weights if weight is not None]
    results = _call_level(
        place, _CELLS[target], lifted[0], lifted[1:], given, is_bidirectional=False, is_batch_first=False
    )
    found = [place.call(_ATEN.squeeze.dim, x, 0) for x in results[1:]]
    _replace(place.graph_module, node, found if isinstance(state, list | tuple) else found[0])


def _split_levels(place: Place) -> None:
    node = place.node
    source, state, given, _, levels, _, _, is_bidirectional, is_batch_first = arguments_of(node)
    states = state if isinstance(state, list | tuple) else [state]
    directions = 2 if is_bidirectional else 1
    count = len(given) // levels
    finals: list[list[fx.Node]] = []
    for level in range(levels):
        first = level * directions
        own = [place.call(_ATEN.slice.Tensor, x, 0, first, first + directions) for x in states]
        weights = given[level * count : (level + 1) * count]
        source, *last = _call_level(
            place,
            node.target,
            source,
            own,
            weights,
            is_bidirectional=bool(is_bidirectional),
            is_batch_first=bool(is_batch_first),
        )
        finals.append(last)
    joined = [place.call(_ATEN.cat.default, list(parts), 0) for parts in zip(*finals, strict=True)]
    _replace(place.graph_module, node, [source, *joined])


def _call_level(
    place: Place,
    target: Any,
    source: Any,
    states: Sequence[fx.Node],
    weights: Sequence[Any],
    *,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> list[fx.Node]:
    """The output and the final states of a layer of one level."""
    state: Any = list(states) if target is _ATEN.lstm.input else states[0]
    has_biases = len(weights) >= (8 if is_bidirectional else 4)
    options = has_biases, 1, 0.0, False, is_bidirectional, is_batch_first
    node = place.call(target, source, state, list(weights), *options)
    return [place.call(operator.getitem, node, index) for index in range(1 + len(states))]


def _replace(graph_module: fx.GraphModule, node: fx.Node, results: list[Any] | fx.Node) -> None:
    """Replace a node of one or several results."""
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
        return
    for user in list(node.users):
        user.replace_all_uses_with(results[arguments_of(user)[1]])
        graph_module.graph.erase_node(user)
