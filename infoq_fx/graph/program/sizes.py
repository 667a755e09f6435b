"""Finds which sizes of a model's inputs are written into its graph, and frees those that can be."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    is_concrete_int,
)

from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.graph.program.exporting import ExampleInputs
from infoq_fx.graph.program.fake_values import infer_values

__all__ = [
    "Dynamic",
    "are_equal",
    "choose_axes",
    "find_written_sizes",
    "free_batch",
    "keys_of",
    "place_of_difference",
    "resize",
    "same_operations",
    "stay_equal",
]

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_USER_LINE = re.compile(r'File "([^"]+)", line (\d+)')

Dynamic = Literal["auto"] | Mapping[str, int | Sequence[int]] | None
"""Axes that stay free besides the first: by input name, ``"auto"`` for those that can, None for none."""

_FREE_OF_SIZES = {torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default}

Place = tuple[int, tuple[Any, ...]]
"""Where a number is in a graph: the node's index, and the keys that lead to it in the node's arguments."""


def keys_of(inputs: ExampleInputs) -> list[str | int]:
    """Return the names of inputs, or their positions."""
    return list(inputs) if isinstance(inputs, Mapping) else list(range(len(inputs)))


def resize(inputs: ExampleInputs, sizes: Mapping[tuple[str | int, int], int]) -> ExampleInputs:
    """Return inputs with other sizes, by input (name or position) and axis: values are repeated, or cut off."""

    def resized(key: str | int, x: Tensor) -> Tensor:
        for axis in range(x.ndim):
            wanted = sizes.get((key, axis), x.shape[axis])
            if wanted != x.shape[axis]:
                x = x.index_select(axis, torch.arange(wanted, device=x.device) % x.shape[axis])
        return x

    if isinstance(inputs, Mapping):
        return {name: resized(name, x) for name, x in inputs.items()}
    return tuple(resized(index, x) for index, x in enumerate(inputs))


def choose_axes(examples: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, tuple[int, ...]]:
    """Return the axes to free, by input name: with ``"auto"`` those behind the channels of floating-point inputs.

    Raises:
        OptionError: an input or an axis is not there.
    """
    if dynamic is None:
        return {}
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise OptionError(f"dynamic is {dynamic!r}; give 'auto', None or a dict of axes by input name")
        return {name: tuple(range(2, x.ndim)) for name, x in examples.items() if x.is_floating_point() and x.ndim > 2}
    if not isinstance(dynamic, Mapping):
        raise OptionError(
            f"dynamic={dynamic!r}; give 'auto', None or a dict of axes by input name, such as "
            f"{{{next(iter(examples))!r}: (2, 3)}}"
        )
    chosen = {}
    for name, given in dynamic.items():
        if name not in examples:
            raise unknown_name_error("input in dynamic", name, examples)
        ndim = examples[name].ndim
        axes = [given] if isinstance(given, int) else list(given) if isinstance(given, list | tuple | set) else [given]
        if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
            raise OptionError(f"dynamic[{name!r}]={given!r}; give an axis or a list of axes, such as (2, 3)")
        axes = sorted(set(axes))
        wrong = [axis for axis in axes if not 0 <= axis < ndim]
        if wrong:
            raise OptionError(
                f"dynamic names axis {wrong[0]} of input {name!r}, which has {ndim}; give axes from 0 to {ndim - 1}"
            )
        chosen[name] = tuple(axis for axis in axes if axis)  # the batch is free anyway
    return {name: axes for name, axes in chosen.items() if axes}


def are_equal(first: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two captures of a model have the same operations, arguments and stored tensors."""
    return find_written_sizes([first, other]) == {}


def stay_equal(first: ExportedProgram, other: ExportedProgram, kept: Collection[Any]) -> bool:
    """Whether two exports of a model at different sizes are equal, and would be so once they are made functional.

    Making a program functional takes most of a capture's time; this saves it for the second size. False may also mean
    that it cannot be told from the exports.

    Args:
        first: a program as exported.
        other: the same model's, at other sizes.
        kept: the operations of ``first`` made functional. Others were replaced by operations whose arguments may
            depend on the sizes of tensors, so these have to be the same.
    """
    if find_written_sizes([first.graph_module, other.graph_module]) != {}:
        return False
    constants = [
        {name: x for name, x in program.constants.items() if isinstance(x, Tensor)} for program in (first, other)
    ]
    if not _hold_same(*constants):
        return False
    names = {str(operation) for operation in kept}
    for node, twin in zip(first.graph.nodes, other.graph.nodes, strict=True):
        if isinstance(node.target, HigherOrderOperator):
            return False  # its inner graph was not compared
        is_kept = node.op != "call_function" or node.target in _FREE_OF_SIZES or node.target in kept
        if not is_kept and str(node.target).replace("_.", ".") not in names and not _have_same_sizes(node, twin):
            return False
    return True


def _have_same_sizes(node: fx.Node, twin: fx.Node) -> bool:
    pairs = zip([node, *node.all_input_nodes], [twin, *twin.all_input_nodes], strict=True)
    return all(_sizes_of(first) == _sizes_of(other) is not None for first, other in pairs)


def _sizes_of(node: fx.Node) -> list[int | None] | None:
    """A tensor's sizes, None in place of free ones; None for all if there are sizes that grow with others."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: list[Any] = list(value.shape)
    if not all(is_concrete_int(size) or size.node.expr.is_symbol for size in sizes):
        return None
    return [int(size) if is_concrete_int(size) else None for size in sizes]


def same_operations(first: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two captures of a model compute their tensors by the same operations, whatever the arguments."""
    return _operations(first) == _operations(other)


def find_written_sizes(captures: Sequence[fx.GraphModule]) -> dict[Place, tuple[int, ...]] | None:
    """Compare captures of one model at several sizes of its inputs.

    Returns:
        The whole numbers that differ, by place, one value for each capture; None if the captures differ in more.
    """
    tensors = [_stored(capture) for capture in captures]
    if any(not _hold_same(tensors[0], held) for held in tensors[1:]):
        return None
    nodes = [list(capture.graph.nodes) for capture in captures]
    if len({len(found) for found in nodes}) > 1:
        return None
    numbers = [{node: index for index, node in enumerate(found)} for found in nodes]
    written: dict[Place, tuple[int, ...]] = {}
    for index, aligned in enumerate(zip(*nodes, strict=True)):
        if len({(node.op, node.target) for node in aligned}) > 1:
            return None
        leaves = [
            list(_leaves((node.args, node.kwargs), number)) for node, number in zip(aligned, numbers, strict=True)
        ]
        if len({tuple(path for path, _ in found) for found in leaves}) > 1:
            return None
        for found in zip(*leaves, strict=True):
            values = tuple(value for _, value in found)
            if all(value == values[0] for value in values[1:]):
                continue
            if not all(type(value) is int for value in values):
                return None
            written[index, found[0][0]] = values
    return written


def free_batch(
    captures: Sequence[fx.GraphModule], sizes: Sequence[int], examples: Mapping[str, Tensor]
) -> fx.GraphModule | None:
    """Free a batch size that was written into a graph.

    Every number that grows linearly with the batch is computed from the first input's size instead.

    Args:
        captures: of one model at three batch sizes; the first is changed in place.
        sizes: the batch sizes.
        examples: inputs of the first capture, by name.

    Returns:
        The first capture with symbolic sizes in its fake values; None if the batch cannot be freed, and the capture
        is then no longer of use.
    """
    written = find_written_sizes(captures)
    if written is None:
        return None
    factors = {}
    for place, values in written.items():
        gain, rest = divmod(values[1] - values[0], sizes[1] - sizes[0])
        offset = values[0] - gain * sizes[0]
        if rest or any(value != gain * size + offset for value, size in zip(values, sizes, strict=True)):
            return None
        factors[place] = gain, offset
    graph_module = captures[0]
    _write_factors(graph_module, factors)
    try:
        _infer_values(graph_module, examples)
    except Exception:
        return None
    return graph_module


def place_of_difference(first: fx.GraphModule, other: fx.GraphModule) -> str:
    """Return where in the user's code two captures begin to differ, ``in model.py:12``; empty if it is not known."""
    for node, twin in zip(first.graph.nodes, other.graph.nodes, strict=False):
        numbers = {x: str(x) for x in (*first.graph.nodes, *other.graph.nodes)}
        same = node.target == twin.target and [value for _, value in _leaves((node.args, node.kwargs), numbers)] == [
            value for _, value in _leaves((twin.args, twin.kwargs), numbers)
        ]
        if not same:
            lines = _USER_LINE.findall(str(node.meta.get("stack_trace") or ""))
            own = [(file, line) for file, line in lines if not file.startswith(_TORCH_FOLDER)]
            return f"in {Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
    return ""


def _operations(graph_module: fx.GraphModule) -> list[Any]:
    nodes = graph_module.graph.nodes
    return [x.target for x in nodes if x.op == "call_function" and isinstance(x.meta.get("val"), Tensor | tuple | list)]


def _stored(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers())}


def _hold_same(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return first.keys() == other.keys() and all(
        x.shape == other[name].shape and x.dtype == other[name].dtype and torch.equal(x, other[name])
        for name, x in first.items()
    )


def _leaves(value: Any, numbers: Mapping[fx.Node, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    else:
        yield path, ("node", numbers[value]) if isinstance(value, fx.Node) else value
        return
    for key, item in items:
        yield from _leaves(item, numbers, (*path, key))


def _write_factors(graph_module: fx.GraphModule, factors: Mapping[Place, tuple[int, int]]) -> None:
    graph, nodes = graph_module.graph, list(graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        size = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0))
    known: dict[tuple[int, int], fx.Node] = {(1, 0): size}
    last = size
    for gain, offset in dict.fromkeys(factors.values()):
        value = size
        for function, number, neutral in ((operator.mul, gain, 1), (operator.add, offset, 0)):
            if number != neutral:
                with graph.inserting_after(last):
                    last = value = graph.call_function(function, (value, number))
        known[gain, offset] = value
    for (index, path), factor in factors.items():
        node = nodes[index]
        given = _replaced((node.args, node.kwargs), path, known[factor])
        node.args, node.kwargs = given
    graph.lint()
    graph_module.recompile()


def _replaced(value: Any, path: Sequence[Any], new: fx.Node) -> Any:
    if not path:
        return new
    if isinstance(value, Mapping):
        return {key: _replaced(item, path[1:], new) if key == path[0] else item for key, item in value.items()}
    return type(value)(_replaced(item, path[1:], new) if i == path[0] else item for i, item in enumerate(value))


def _infer_values(graph_module: fx.GraphModule, examples: Mapping[str, Tensor]) -> None:
    from torch._dynamo.source import ConstantSource

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for name, x in examples.items():
        free = [DimDynamic.DYNAMIC if axis == 0 else DimDynamic.STATIC for axis in range(x.ndim)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=free)
        fakes.append(mode.from_tensor(x, source=ConstantSource(name), symbolic_context=context))
    infer_values(graph_module, mode, fakes)
