"""Turns an exported program into a graph module that holds its tensors under their own paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from infoq_fx.errors import UnsupportedModelError
from infoq_fx.graph.operands import make_unique
from infoq_fx.quantization.call_forms import OutputTemplate

__all__ = ["BufferTracer", "FlatProgram", "flatten_program"]

# A view is valid only for the memory layout at capture; quantized values and channels-last images have others.
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
_MUTATIONS = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
_PLAIN = (dict, list, tuple)


class _RecordedCalls(TorchFunctionMode):
    """Records calls of operators whose only traced arguments are numbers, as ``zeros([batch, 16])``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        traced = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, fx.Proxy)]
        if traced and isinstance(func, torch._ops.OpOverload):
            return traced[0].tracer.create_proxy("call_function", func, args, dict(kwargs or {}))
        return func(*args, **(kwargs or {}))


class BufferTracer(fx.Tracer):
    """Tracer that records reads of buffers as nodes.

    Unpickling a graph module traces it again, which would otherwise constant-fold its integer weights.
    """

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module."""
        with _RecordedCalls():
            return super().trace(root, concrete_args)


# Attributes of every graph module: a tensor of the model's that lay there would be hidden or overwritten.
_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


@dataclass(frozen=True)
class FlatProgram:
    """A program as a graph module, the result of :func:`flatten_program`.

    The graph gives tensors alone, one for each of ``output_names``; ``template`` restores the model's own structure
    around them, None where the graph has it.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    template: OutputTemplate | None

    def symbolic_axes(self) -> list[tuple[int, ...]]:
        """Return the axes besides the first that may have any size, for each input."""
        shapes = [node.meta["val"].shape for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        return [tuple(a for a, n in enumerate(shape) if a and not is_concrete_int(n)) for shape in shapes]


def flatten_program(program: ExportedProgram, device: torch.device) -> FlatProgram:
    """Turn a program into a graph module that holds its tensors under their own paths.

    What becomes of inputs that the model changes in place is no part of the result, nor is a buffer that it changes
    and does not read (a counter).

    Args:
        program: functional; its tensors are copied.
        device: of the copies.

    Raises:
        UnsupportedModelError: an input is not a tensor, no output is one, a buffer carries state from run to run, or
            the program has graphs within its graph (``torch.cond``).
    """
    if any(_device_of(tensor) != device for tensor in program.state_dict.values()):
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    _refuse_nested_graphs(program)
    signature = program.graph_signature
    lifted: dict[str, str] = {}
    input_names = []
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            lifted[spec.arg.name] = str(spec.target)
        elif spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            input_names.append(spec.arg.name)
        elif not isinstance(spec.arg, ConstantArgument):
            raise UnsupportedModelError(f"input {spec.arg.name!r} is a {spec.kind.name}; give the model tensors alone")
    paths = _move_reserved(lifted)
    graph, output_names, template = _copy_graph(program, paths, input_names)
    held = {paths[name]: _copy_tensor(program, target, device) for name, target in lifted.items()}
    graph_module = fx.GraphModule(held, graph, class_name="CapturedModel")
    graph_module.graph.eliminate_dead_code()
    _refuse_state(program, graph_module, paths)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return FlatProgram(graph_module, tuple(input_names), output_names, template)


def _move_reserved(lifted: Mapping[str, str]) -> dict[str, str]:
    """Paths at which a graph module can hold the tensors: those below a reserved name get another first part."""
    taken = {*_RESERVED, *(path.partition(".")[0] for path in lifted.values())}
    renamed: dict[str, str] = {}
    for path in lifted.values():
        first = path.partition(".")[0]
        if first in _RESERVED and first not in renamed:
            renamed[first] = make_unique(first, taken)
    moved = {}
    for name, path in lifted.items():
        first, dot, rest = path.partition(".")
        moved[name] = f"{renamed.get(first, first)}{dot}{rest}"
    return moved


def _refuse_nested_graphs(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            name = str(node.target).rpartition(".")[2]
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            place = f" in {stack[-1][0]!r}" if stack and stack[-1][0] else ""
            raise UnsupportedModelError(
                f"the model calls torch.{name}{place}, which holds graphs within the graph; compute both branches and "
                "choose by torch.where, or quantize the submodules of each branch by themselves"
            )


def _refuse_state(program: ExportedProgram, graph_module: fx.GraphModule, paths: Mapping[str, str]) -> None:
    """Refuse buffers that the program changes and whose value its outputs depend on."""
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr" and node.users}
    inputs = program.graph_signature.input_specs
    moved = {str(spec.target): paths[spec.arg.name] for spec in inputs if spec.arg.name in paths}
    for out in program.graph_signature.output_specs:
        is_state = out.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
        if is_state and moved.get(str(out.target)) in read:
            raise UnsupportedModelError(
                f"the model changes {out.target!r} while it runs and reads it again ({out.kind.name}); quantize a "
                "stateless model: take the state as an input and return it"
            )


def _copy_graph(
    program: ExportedProgram, paths: Mapping[str, str], input_names: Sequence[str]
) -> tuple[fx.Graph, tuple[str, ...], OutputTemplate | None]:
    graph = fx.Graph(tracer_cls=BufferTracer)
    copies: dict[fx.Node, fx.Node] = {}
    output_names: tuple[str, ...] = ()
    template: OutputTemplate | None = None
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in paths:
            # The code of a graph has one name for an input and its value: a tensor of that name would replace it.
            name = f"{paths[node.name]}_tensor" if paths[node.name] in input_names else None
            copies[node] = graph.create_node("get_attr", paths[node.name], name=name)
            copies[node].meta = dict(node.meta)
        elif node.op == "placeholder" and node.name not in input_names:
            continue  # a constant argument: torch.export specialised on its value
        elif node.op == "output":
            kinds = [out.kind for out in program.graph_signature.output_specs]
            own = [x for x, kind in zip(node.args[0], kinds, strict=True) if kind not in _MUTATIONS]
            flat = [copies[x] if isinstance(x, fx.Node) else x for x in own]
            value, output_names, template = _restore_outputs(program, graph, flat, input_names)
            graph.output(value)
        elif _is_dropout_or_assert(node):
            if node.args and isinstance(node.args[0], fx.Node):
                copies[node] = copies[node.args[0]]
        else:
            copies[node] = _copy_node(graph, node, copies)
    return graph, output_names, template


def _copy_node(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy with a name of its own: torch's numbers count operations on sizes, of which few are left."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return graph.node_copy(node, copies.__getitem__)
    operation: Any = torch.ops.aten.reshape.default if node.target in _VIEWS else node.target
    args: Any = fx.map_arg(node.args, copies.__getitem__)
    kwargs: Any = fx.map_arg(dict(node.kwargs), copies.__getitem__)
    name = getattr(operation, "overloadpacket", operation).__name__
    copied = graph.create_node("call_function", operation, args, kwargs, name)
    copied.meta = dict(node.meta)
    return copied


def _is_dropout_or_assert(node: fx.Node) -> bool:
    name = str(node.target)
    is_dropout = name.startswith("aten.") and "dropout" in name
    return node.op == "call_function" and (is_dropout or "_assert" in name or "sym_constrain_range" in name)


def _restore_outputs(
    program: ExportedProgram, graph: fx.Graph, flat: list[Any], input_names: Sequence[str]
) -> tuple[Any, tuple[str, ...], OutputTemplate | None]:
    """The graph's outputs, a name for each, and the structure of the model's own around them where that is another."""
    tree = program.call_spec.out_spec
    positions = tuple(index for index, item in enumerate(flat) if isinstance(item, fx.Node))
    if not positions:
        raise UnsupportedModelError("the model returns no tensor; return what is to be computed")
    numbers = tuple(index for index in positions if not isinstance(flat[index].meta.get("val"), Tensor))
    flat = [_as_tensor(graph, item) if index in numbers else item for index, item in enumerate(flat)]
    value = pytree.tree_unflatten(flat, tree)
    taken = set(input_names)
    names = tuple(make_unique(name, taken) for name, item in _name_leaves(value) if isinstance(item, fx.Node))
    if len(names) != len(positions):
        names = tuple(make_unique(f"output_{index}", taken) for index in positions)
    if len(positions) == len(flat) and not numbers:
        if _is_plain(value):
            return value, names, None
        if isinstance(value, Mapping) and all(isinstance(item, fx.Node) for item in value.values()):
            return dict(value), names, OutputTemplate(tree, positions)
    constants = {index: item for index, item in enumerate(flat) if index not in positions and item is not None}
    found = tuple(flat[index] for index in positions)
    return found, names, OutputTemplate(tree, positions, constants, numbers)


def _is_plain(value: Any) -> bool:
    """Whether a graph can hold a structure of nodes: tuples, named ones too, lists and dicts."""
    if isinstance(value, fx.Node):
        return True
    if type(value) not in _PLAIN and not hasattr(value, "_fields"):
        return False
    return all(_is_plain(item) for item in (value.values() if isinstance(value, dict) else value))


def _as_tensor(graph: fx.Graph, number: fx.Node) -> fx.Node:
    """A scalar tensor of a number that the graph computes, such as the batch's size."""
    is_float = isinstance(number.meta.get("val"), float | torch.SymFloat)
    dtype = torch.float32 if is_float else torch.int64
    node = graph.call_function(torch.ops.aten.scalar_tensor.default, (number,), {"dtype": dtype})
    node.meta = {**number.meta, "val": torch.empty((), dtype=dtype, device="meta")}
    return node


def _name_leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every leaf of the outputs' structure with its name: keys and fields joined by dots, positions otherwise."""
    children = _children(value)
    if children is None:
        return [(path or "output", value)]
    is_listed = all(isinstance(key, int) for key, _ in children)
    prefix = path + "." if path else "output_" if is_listed else ""
    return [leaf for key, item in children for leaf in _name_leaves(item, f"{prefix}{key}")]


def _children(value: Any) -> list[tuple[str | int, Any]] | None:
    """The parts of a structure with their keys, in the order in which they are flattened; None for a leaf."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    known = pytree.SUPPORTED_NODES.get(type(value))
    if known is None:
        return None
    items = list(known.flatten_fn(value)[0])
    fields = [name for name in getattr(value, "__dataclass_fields__", {}) if getattr(value, name) is not None]
    return list(zip(fields, items, strict=True)) if len(fields) == len(items) else list(enumerate(items))


def _copy_tensor(program: ExportedProgram, target: str, device: torch.device) -> Tensor:
    source = program.state_dict.get(target)
    is_parameter = isinstance(source, nn.Parameter)
    if source is None:
        source = program.constants[target]
    copied = source.detach().to(device, copy=True)
    return nn.Parameter(copied, requires_grad=False) if is_parameter else copied


def _device_of(tensor: Tensor) -> torch.device:
    # "cuda" and "cuda:0" are one device when only one is meant.
    return torch.device(tensor.device.type) if tensor.device.index in (None, 0) else tensor.device
