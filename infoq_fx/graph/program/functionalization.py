"""Makes exported programs functional: no operation changes a tensor in place.

Torch does this for any program, but traces it twice more, which takes most of the time of a capture. A program of
everyday operations is copied node by node instead.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.graph.program.exporting import exporting

__all__ = ["EVERYDAY_OPERATIONS", "copy_functional", "make_functional"]

_ATEN = torch.ops.aten
_BATCH_NORM, _CONTIGUOUS, _RESHAPE = _ATEN.batch_norm.default, _ATEN.contiguous.default, _ATEN.reshape.default
_DROPOUTS = (_ATEN.dropout.default, _ATEN.dropout_.default)
_CHUNK = _ATEN.chunk.default
_RESHAPED = (_ATEN.flatten.using_ints, _ATEN.unflatten.int)
_COMPARISONS = frozenset({_ATEN.eq.Scalar, _ATEN.ne.Scalar})  # their results are of another dtype
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)

_NAMES = """
    _assert_tensor_metadata.default abs.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default add.Tensor
    addmm.default amax.default avg_pool1d.default avg_pool2d.default bmm.default cat.default channel_shuffle.default
    clamp.default clamp_min.default conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default
    conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input cumsum.default div.Tensor einsum.default
    elu.default embedding.default eq.Scalar erf.default exp.default expand.default flip.default gelu.default
    glu.default group_norm.default hardsigmoid.default hardswish.default hardtanh.default index.Tensor
    instance_norm.default layer_norm.default leaky_relu.default linear.default log.default log_softmax.int
    masked_fill.Scalar matmul.default max_pool1d.default max_pool2d.default maximum.default mean.default mean.dim
    mish.default mul.Tensor ne.Scalar neg.default ones.default pad.default permute.default pixel_shuffle.default
    pixel_unshuffle.default pow.Tensor_Scalar prelu.default reciprocal.default relu.default relu6.default
    repeat.default repeat_interleave.self_int rms_norm.default roll.default rsqrt.default rsub.Scalar
    scaled_dot_product_attention.default select.int selu.default sigmoid.default silu.default slice.Tensor softmax.int
    softplus.default split.Tensor split_with_sizes.default sqrt.default square.default squeeze.dim stack.default
    sub.Tensor sum.dim_IntList sym_size.int tanh.default threshold.default transpose.int unbind.int unsqueeze.default
    upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_nearest2d.vec view.default where.self zeros.default
"""


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ATEN, packet), overload)


EVERYDAY_OPERATIONS = frozenset(_overload(name) for name in _NAMES.split())
"""Operations that torch leaves as they are when it makes a program functional."""


def copy_functional(program: ExportedProgram) -> ExportedProgram | None:
    """Return a program that computes the same without changing a tensor in place; convolutions stay what they are.

    The result is None unless the program consists of everyday operations, and changes no tensor that others see.
    """
    signature = program.graph_signature
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        return None
    owners = _find_owners(program.graph)
    if owners is None:
        return None
    graph = _copy_graph(program.graph, owners)
    (output,) = graph.find_nodes(op="output")
    specs = [
        replace(spec, arg=TensorArgument(name=value.name)) if isinstance(spec.arg, TensorArgument) else spec
        for spec, value in zip(signature.output_specs, output.args[0], strict=True)
    ]
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=replace(signature, output_specs=specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,
        constants=program.constants,
        verifiers=[program.verifier],
    )


def make_functional(program: ExportedProgram) -> ExportedProgram:
    """Return what :func:`copy_functional` does, of any program, as torch makes it.

    Raises:
        Exception: torch's own, if it cannot do it.
    """
    examples = program.example_inputs
    try:
        # Without examples torch adds no checks of the inputs, which torch 2.9 cannot do for a forward(*xs).
        # An empty table makes the graph functional without decomposing conv2d, linear and attention.
        with exporting():
            program.example_inputs = None
            functional: ExportedProgram = program.run_decompositions({})
        return functional
    finally:
        program.example_inputs = examples


def _find_owners(graph: fx.Graph) -> dict[fx.Node, fx.Node] | None:
    """The node that made the tensor of each node; None unless all are everyday operations on tensors of their own.

    A tensor that changes in place must not be an input or a parameter, nor share its memory with a view.
    """
    owners: dict[fx.Node, fx.Node] = {}
    shared: set[fx.Node] = set()
    for node in graph.nodes:
        owners[node] = node
        if node.op == "placeholder":
            shared.add(node)
        elif node.op == "call_function":
            if not _is_everyday(node):
                return None
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                continue
            if node.target in _DROPOUTS or _is_in_place(node):
                owners[node] = owners[source]
                if _is_in_place(node) and owners[source] in shared:
                    return None
            elif _is_view(node):
                shared |= {owners[source], node}
        elif node.op != "output":
            return None
    return owners


def _is_everyday(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    operation: Any = node.target
    args: Any = node.args
    if isinstance(value, _NUMBERS) or operation is operator.getitem:
        return True
    if operation in _DROPOUTS:
        return args[2] is False
    if operation is _BATCH_NORM:
        return args[5] is False and all(isinstance(x, fx.Node) for x in args[3:5])
    if operation is _CHUNK:
        size = args[0].meta["val"].shape[_axis_of(args)]
        return is_concrete_int(size) and size > 0
    if operation in _RESHAPED:
        return [_is_number_or_input(size) for size in value.shape].count(False) <= 1
    if _is_in_place(node):
        dtypes = {x.meta["val"].dtype for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)}
        is_kept = value.dtype.is_floating_point and dtypes == {value.dtype}
        return is_kept and _out_of_place(operation) in EVERYDAY_OPERATIONS - _COMPARISONS
    return operation in EVERYDAY_OPERATIONS or operation in (_CONTIGUOUS, _RESHAPE)


def _is_number_or_input(size: Any) -> bool:
    return is_concrete_int(size) or bool(size.node.expr.is_symbol)


def _axis_of(chunk: Sequence[Any]) -> int:
    return int(chunk[2]) if len(chunk) > 2 else 0


def _is_in_place(node: fx.Node) -> bool:
    operation: Any = node.target
    is_operator = isinstance(operation, torch._ops.OpOverload) and operation not in _DROPOUTS
    return is_operator and bool(operation._schema.is_mutable)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(value.alias_info is not None for value in schema.returns)


def _out_of_place(operation: Any) -> Any:
    packet = getattr(_ATEN, operation.overloadpacket.__name__.removesuffix("_"), None)
    return getattr(packet, operation._overloadname, None)


def _copy_graph(source: fx.Graph, owners: Mapping[fx.Node, fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, list[fx.Node]] = {}
    for node in source.nodes:
        aliases.setdefault(owners[node], []).append(node)
        original = node.args[0] if node.args else None
        if isinstance(original, fx.Node) and _changes_nothing(node, original):
            copies[node] = copies[original]
            continue
        copies[node] = copied = _copy_node(graph, node, copies)
        if _is_in_place(node):
            copies |= dict.fromkeys(aliases[owners[node]], copied)
    return graph


def _changes_nothing(node: fx.Node, original: fx.Node) -> bool:
    is_flat = node.target is _ATEN.flatten.using_ints and node.meta["val"].ndim == original.meta["val"].ndim
    return is_flat or node.target in _DROPOUTS or node.target is _CONTIGUOUS


def _copy_node(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    value: Any = node.meta.get("val")
    operation: Any = node.target
    if node.op != "call_function" or isinstance(value, _NUMBERS):
        copied = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copied.name = node.name  # the signature names inputs so
        return copied
    args: Any = fx.map_arg(node.args, copies.__getitem__)
    kwargs: Any = fx.map_arg(dict(node.kwargs), copies.__getitem__)
    if operation is _BATCH_NORM:
        norm = _call(graph, _ATEN._native_batch_norm_legit_no_training.default, (*args[:5], *args[6:8]), node)
        norm.meta["val"] = (value, value.new_empty(0), value.new_empty(0))
        return _call(graph, operator.getitem, (norm, 0), node)
    if operation is _CHUNK:
        axis = _axis_of(args)
        length = -(-node.all_input_nodes[0].meta["val"].shape[axis] // args[1])
        return _call(graph, _ATEN.split.Tensor, (args[0], length, axis), node)
    if operation in _RESHAPED:
        return _call(graph, _RESHAPE, (args[0], _write_sizes(graph, copies, value)), node)
    return _call(graph, _out_of_place(operation) if _is_in_place(node) else operation, args, node, kwargs)


def _call(
    graph: fx.Graph, operation: Any, args: tuple[Any, ...], source: fx.Node, kwargs: dict[str, Any] | None = None
) -> fx.Node:
    node = graph.call_function(operation, args, kwargs)
    node.meta = dict(source.meta)
    return node


def _write_sizes(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], value: Tensor) -> list[Any]:
    """The sizes of a tensor as arguments: numbers, sizes of inputs, and -1 for one that is neither."""
    sizes: list[Any] = [
        int(size) if is_concrete_int(size) else _size_of_input(graph, copies, size) for size in value.shape
    ]
    return [-1 if size is None else size for size in sizes]


def _size_of_input(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], size: Any) -> fx.Node | None:
    for source in copies:
        value = source.meta.get("val")
        shape: Any = value.shape if isinstance(value, Tensor) and source.op == "placeholder" else ()
        for axis, found in enumerate(shape):
            if not is_concrete_int(found) and found.node.expr == size.node.expr:
                place = copies[source], axis
                written = [x for x in place[0].users if x.target is _ATEN.sym_size.int and x.args == place]
                node = written[0] if written else _call(graph, _ATEN.sym_size.int, place, source)
                node.meta["val"] = size
                return node
    return None
