"""Takes models of other floating-point dtypes in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from infoq_fx.graph.program.exporting import ExampleInputs
from infoq_fx.graph.program.fake_values import infer_values
from infoq_fx.quantization.call_forms import CallForm

__all__ = ["cast_inputs", "floating_dtypes", "note_casts", "take_in_float32"]

_HALVES = {torch.float16, torch.bfloat16}
_LARGEST = torch.finfo(torch.float32).max
_COPY = torch.ops.aten._to_copy.default


def floating_dtypes(module: nn.Module) -> set[torch.dtype]:
    """Return the floating-point dtypes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def cast_inputs(inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    """Return inputs of which those of any floating-point dtype have the given one."""
    if isinstance(inputs, Mapping):
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def note_casts(form: CallForm, names: Sequence[str], given: ExampleInputs, taken: ExampleInputs) -> CallForm:
    """Return the form of a model of float32 whose inputs were cast, as those of a data set of float64."""
    pairs = zip(*(_by_name(inputs, names).items() for inputs in (given, taken)), strict=True)
    cast = {name: x.dtype for (name, x), (_, y) in pairs if x.dtype != y.dtype}
    return replace(form, input_dtypes=cast, is_float_in_file=True) if cast else form


def _by_name(inputs: ExampleInputs, names: Sequence[str]) -> Mapping[str, Tensor]:
    return inputs if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))


def take_in_float32(graph_module: fx.GraphModule) -> tuple[CallForm, set[torch.dtype]]:
    """Let a graph in normal form compute in float32: parameters, inputs, outputs and all casts between.

    Half precision is replaced everywhere. Double precision is where the model is of double precision, or takes it;
    what a model of float32 computes in float64 by itself stays.

    Args:
        graph_module: changed in place; its nodes have fake values, which follow.

    Returns:
        The dtypes that inputs and outputs had where they were replaced, and all dtypes that were.
    """
    replaced = _find_replaced(graph_module)
    graph = graph_module.graph
    inputs = {str(node.target): _dtype_of(node) for node in graph.nodes if node.op == "placeholder"}
    outputs = dict(enumerate(map(_dtype_of, _tensors_of(graph.output_node().args[0]))))
    found = replaced & {_dtype_of(node) for node in graph.nodes}
    if not found:
        return CallForm(), set()
    for name, tensor in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        if tensor.dtype in replaced:
            _replace_tensor(graph_module, name, tensor)
    for node in graph.nodes:
        if node.op == "call_function":
            given: Any = map_aggregate((node.args, node.kwargs), lambda value: _as_float32(value, replaced))
            node.args, node.kwargs = given
    _infer_values(graph_module, replaced)
    _drop_casts(graph_module)
    form = CallForm(
        {name: dtype for name, dtype in inputs.items() if dtype in replaced},
        {index: dtype for index, dtype in outputs.items() if dtype in replaced},
    )
    return form, found


def _find_replaced(graph_module: fx.GraphModule) -> set[Any]:
    inputs = {_dtype_of(node) for node in graph_module.graph.nodes if node.op == "placeholder"}
    of_model = floating_dtypes(graph_module)
    is_double = torch.float64 in inputs or (torch.float64 in of_model and torch.float32 not in of_model)
    return {*_HALVES, torch.float64} if is_double else set(_HALVES)


def _dtype_of(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _tensors_of(value: Any) -> list[Any]:
    found: list[Any] = []
    map_aggregate(value, found.append)
    return [node for node in found if isinstance(node, fx.Node)]


def _as_float32(value: Any, replaced: set[Any]) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in replaced else value
    if isinstance(value, float) and _LARGEST < abs(value) < float("inf"):
        return _LARGEST if value > 0 else -_LARGEST  # the lowest number of float64, in masks
    return value


def _replace_tensor(graph_module: fx.GraphModule, path: str, tensor: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    module, taken = graph_module.get_submodule(owner), tensor.detach().float()
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(module, name, nn.Parameter(taken, requires_grad=False) if is_parameter else taken)


def _infer_values(graph_module: fx.GraphModule, replaced: set[Any]) -> None:
    given = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    with given[0].fake_mode as mode, torch.no_grad():
        inputs = [x.float() if x.dtype in replaced else x for x in given]
    infer_values(graph_module, mode, inputs)


def _drop_casts(graph_module: fx.GraphModule) -> None:
    """Remove casts from float32 to float32."""
    for node in list(graph_module.graph.nodes):
        if node.target is _COPY and set(node.kwargs) == {"dtype"}:
            source = node.args[0]
            if node.kwargs["dtype"] == torch.float32 == _dtype_of(source):
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()
