"""Translates recurrent layers to ONNX's operators, whose gates have another order and whose weights have one axis more.

One direction's parameter is a placeholder op at first: its integers are put into ONNX's order once it is known how they
are stored, so that the file has them as the operator reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18

from infoq_fx.export.qdq_onnx.translation.placeholders import DOMAIN, LIST, find_placeholders, make_placeholder

__all__ = ["RECURRENT_TRANSLATIONS", "WIDENED", "order_gates"]

WIDENED = "is_widened"
"""Attribute of a Dequantize whose integers are cast to int32 first."""

_ATEN = torch.ops.aten
op: Any = opset18
_Array = np.ndarray[Any, Any]
_Initialize = Callable[[str, _Array], ir.Value]

# ONNX's gate at each place, as torch numbers them: LSTM i f g o there, i o f g here; GRU r z n there, z r n here.
_LSTM, _GRU, _RNN = (0, 3, 1, 2), (1, 0, 2), (0,)
_WEIGHT = make_placeholder("RecurrentWeight", ["x"], {"gates": LIST})
_BIAS = make_placeholder("RecurrentBias", ["input", "hidden"], {"gates": LIST})


def _translate_lstm(
    source: Any,
    state: Sequence[Any],
    parameters: Sequence[Any],
    has_biases: bool,
    levels: int,
    dropout: float,
    is_training: bool,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> Any:
    directions = _Directions(parameters, has_biases, is_bidirectional, _LSTM)
    x = _steps_first(source, is_batch_first)
    options = {"hidden_size": directions.hidden_size, "direction": directions.name}
    if not directions.is_projected:
        weights = directions.input_weight(), directions.state_weight(), directions.bias()
        y, h, c = op.LSTM(x, *weights, None, *state, **options)
        return _join_directions(y, is_bidirectional, is_batch_first), h, c
    # ONNX projects nothing: its state is the one before the projection, which is part of the state's weight then.
    projection = directions.projection()
    state_weight = op.MatMul(directions.state_weight(), projection)
    y, h, c = op.LSTM(x, directions.input_weight(), state_weight, directions.bias(), None, None, state[1], **options)
    columns = op.Transpose(projection, perm=(0, 2, 1))
    y, h = op.MatMul(y, columns), op.MatMul(h, columns)
    return _join_directions(y, is_bidirectional, is_batch_first), h, c


def _translate_gru(
    source: Any,
    state: Any,
    parameters: Sequence[Any],
    has_biases: bool,
    levels: int,
    dropout: float,
    is_training: bool,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> Any:
    directions = _Directions(parameters, has_biases, is_bidirectional, _GRU)
    weights = directions.input_weight(), directions.state_weight(), directions.bias()
    options = {"hidden_size": directions.hidden_size, "direction": directions.name, "linear_before_reset": 1}
    y, h = op.GRU(_steps_first(source, is_batch_first), *weights, None, state, **options)
    return _join_directions(y, is_bidirectional, is_batch_first), h


def _make_rnn_translation(activation: str) -> Callable[..., Any]:
    def translate(
        source: Any,
        state: Any,
        parameters: Sequence[Any],
        has_biases: bool,
        levels: int,
        dropout: float,
        is_training: bool,
        is_bidirectional: bool,
        is_batch_first: bool,
    ) -> Any:
        directions = _Directions(parameters, has_biases, is_bidirectional, _RNN)
        weights = directions.input_weight(), directions.state_weight(), directions.bias()
        activations = [activation] * (2 if is_bidirectional else 1)
        options = {"hidden_size": directions.hidden_size, "direction": directions.name, "activations": activations}
        y, h = op.RNN(_steps_first(source, is_batch_first), *weights, None, state, **options)
        return _join_directions(y, is_bidirectional, is_batch_first), h

    return translate


RECURRENT_TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.lstm.input: _translate_lstm,
    _ATEN.gru.input: _translate_gru,
    _ATEN.rnn_tanh.input: _make_rnn_translation("Tanh"),
    _ATEN.rnn_relu.input: _make_rnn_translation("Relu"),
}
"""By ATen op, for the exporter."""


class _Directions:
    """The parameters of a layer of one level, by direction."""

    def __init__(
        self, parameters: Sequence[Any], has_biases: bool, is_bidirectional: bool, gates: tuple[int, ...]
    ) -> None:
        count = len(parameters) // (2 if is_bidirectional else 1)
        self._parts = [parameters[start : start + count] for start in range(0, len(parameters), count)]
        self._has_biases, self._gates = has_biases, gates
        self.is_projected = count % 2 == 1
        self.name = "bidirectional" if is_bidirectional else "forward"
        self.hidden_size = int(parameters[0].shape[0]) // len(gates)

    def input_weight(self) -> Any:
        return self._joined([_WEIGHT(part[0], gates=self._gates) for part in self._parts])

    def state_weight(self) -> Any:
        return self._joined([_WEIGHT(part[1], gates=self._gates) for part in self._parts])

    def projection(self) -> Any:
        return self._joined([_WEIGHT(part[-1], gates=(0,)) for part in self._parts])

    def bias(self) -> Any:
        if not self._has_biases:
            return None
        return self._joined([_BIAS(part[2], part[3], gates=self._gates) for part in self._parts])

    def _joined(self, parts: list[Any]) -> Any:
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)


def _steps_first(source: Any, is_batch_first: bool) -> Any:
    return op.Transpose(source, perm=(1, 0, 2)) if is_batch_first else source


def _join_directions(y: Any, is_bidirectional: bool, is_batch_first: bool) -> Any:
    """The output ``[steps, directions, samples, features]`` as torch has it."""
    if is_bidirectional:
        y = op.Transpose(y, perm=(2, 0, 1, 3) if is_batch_first else (0, 2, 1, 3))
        return op.Reshape(y, op.Constant(value_ints=[0, 0, -1]))
    y = op.Squeeze(y, op.Constant(value_ints=[1]))
    return op.Transpose(y, perm=(1, 0, 2)) if is_batch_first else y


def order_gates(model: ir.Model, initialize: _Initialize) -> None:
    """Store the parameters of recurrent layers as ONNX's operators read them, in place.

    1. RecurrentWeight of a Dequantize: a Dequantize of the integers in the other order, ``[1, rows, columns]``.
    2. RecurrentWeight and RecurrentBias of parameters in float: their values, ``[1, ...]``.

    A parameter that several nodes read, as the steps of a cell, is stored once.

    Args:
        model: with placeholders.
        initialize: adds an initializer of that name and these values, or finds it.
    """
    done: dict[Any, ir.Value] = {}
    for node in [*find_placeholders(model, "RecurrentWeight"), *find_placeholders(model, "RecurrentBias")]:
        gates = tuple(node.attributes["gates"].as_ints())
        key = (node.op_type, gates, *(id(value) for value in node.inputs))
        if key not in done:
            done[key] = _ordered(node, gates, initialize)
        node.outputs[0].replace_all_uses_with(done[key], replace_graph_outputs=True)
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]


def _ordered(node: ir.Node, gates: Sequence[int], initialize: _Initialize) -> ir.Value:
    values = [value for value in node.inputs if value is not None]
    producer = values[0].producer()
    if producer is None:
        found = np.concatenate([_in_order(_array(value), gates) for value in values])[None]
        return initialize(f"{values[0].name}_gates", found)
    integers, scale = producer.inputs[:2]
    stored = initialize(f"{integers.name}_gates", _in_order(_array(integers), gates)[None])  # type: ignore[union-attr]
    scales = initialize(f"{scale.name}_gates", _in_order(_array(scale), gates))  # type: ignore[union-attr]
    attributes = {**producer.attributes, "axis": ir.AttrInt64("axis", 1), WIDENED: ir.AttrInt64(WIDENED, 1)}
    moved = ir.Node(DOMAIN, "Dequantize", [stored, scales], list(attributes.values()), num_outputs=1)
    moved.outputs[0].name = f"{values[0].name}_gates_{'_'.join(map(str, gates))}"
    producer.graph.insert_after(producer, moved)  # type: ignore[union-attr]
    return moved.outputs[0]


def _in_order(array: _Array, gates: Sequence[int]) -> _Array:
    parts = np.split(array, len(gates))
    return np.ascontiguousarray(np.concatenate([parts[gate] for gate in gates]))


def _array(value: ir.Value | None) -> _Array:
    assert value is not None
    assert value.const_value is not None
    found: _Array = value.const_value.numpy()
    return found
