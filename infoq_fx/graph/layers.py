"""Tables of ATen layers: which operand is the weight, and where its output channels are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "ATTENTION",
    "LAYER_OPS",
    "MATMUL_OPS",
    "RECURRENT",
    "RECURRENT_OPS",
    "LayerOp",
    "called_modules",
    "free_path",
    "is_call",
    "module_path",
    "read_parameter",
    "read_tensor",
    "write_tensor",
]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class LayerOp:
    """Positions of the operands of a layer; ``channel_axis`` is the axis of output channels in its weight.

    A lookup (embedding) gathers rows of its weight by integer indices; it multiplies nothing, so its source is never
    quantized. A recurrent layer has a list of parameters in the weight's place.
    """

    source: int
    weight: int
    bias: int | None
    channel_axis: int
    is_transposed: bool = False
    is_convolution: bool = False
    is_lookup: bool = False
    is_recurrent: bool = False

    def bias_of(self, node: fx.Node) -> Any:
        """Return the bias operand, None if there is none."""
        return node.args[self.bias] if self.bias is not None and len(node.args) > self.bias else None

    def set_bias(self, node: fx.Node, bias: fx.Node) -> None:
        """Set the bias operand of a layer of a kind that takes one."""
        if self.bias is None:
            raise ValueError(f"{node.target} takes no bias")
        args = list(node.args) + [None] * (self.bias + 1 - len(node.args))
        args[self.bias] = bias
        node.args = tuple(args)


_CONV = LayerOp(source=0, weight=1, bias=2, channel_axis=0, is_convolution=True)
_TRANSPOSED = LayerOp(source=0, weight=1, bias=2, channel_axis=1, is_transposed=True, is_convolution=True)
_RIGHT = LayerOp(source=0, weight=1, bias=None, channel_axis=1)
# One scale per feature: features of unusual size are the same in all rows, and DequantizeLinear applies such scales
# only to the rows that were gathered.
_EMBEDDING = LayerOp(source=1, weight=0, bias=None, channel_axis=1, is_lookup=True)

LAYER_OPS: dict[Any, LayerOp] = {
    _ATEN.conv1d.default: _CONV,
    _ATEN.conv1d.padding: _CONV,
    _ATEN.conv2d.default: _CONV,
    _ATEN.conv2d.padding: _CONV,
    _ATEN.conv3d.default: _CONV,
    _ATEN.conv3d.padding: _CONV,
    _ATEN.conv_transpose1d.default: _TRANSPOSED,
    _ATEN.conv_transpose2d.input: _TRANSPOSED,
    _ATEN.conv_transpose3d.input: _TRANSPOSED,
    _ATEN.linear.default: LayerOp(source=0, weight=1, bias=2, channel_axis=0),
    _ATEN.addmm.default: LayerOp(source=1, weight=2, bias=0, channel_axis=1),
    _ATEN.mm.default: _RIGHT,
    _ATEN.matmul.default: _RIGHT,
    _ATEN.embedding.default: _EMBEDDING,
}
"""Layers with a weight by ATen op; matrix products are layers only if their right operand is a 2-D parameter."""

MATMUL_OPS = {_ATEN.mm.default, _ATEN.matmul.default, _ATEN.bmm.default}
ATTENTION = _ATEN.scaled_dot_product_attention.default


RECURRENT = LayerOp(source=0, weight=2, bias=None, channel_axis=0, is_recurrent=True)

RECURRENT_OPS: dict[Any, int] = {
    _ATEN.lstm.input: 4,
    _ATEN.gru.input: 3,
    _ATEN.rnn_tanh.input: 1,
    _ATEN.rnn_relu.input: 1,
}
"""Recurrent layers by ATen op, with the number of their gates. Their operands are the input, the initial state and a
list of parameters: for each direction ``w_ih, w_hh``, biases if there are any, and ``w_hr`` of a projection. The
weights are quantized, per row; input and state stay in float."""


def module_path(node: fx.Node) -> str:
    """Return the module path that a node comes from; empty for the model itself or if it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    # Non-strict export writes the user's paths; a traced GraphModule may prefix them with "L['self']".
    paths = [path for path, _ in stack.values() if not path.startswith("_empty_nn_module")]
    path = str(paths[-1]) if paths else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def read_parameter(graph_module: fx.GraphModule, source: fx.Node | str) -> Tensor:
    """Return the parameter or buffer of a ``get_attr`` node or at a dotted path, as it is held."""
    owner, _, name = (source if isinstance(source, str) else str(source.target)).rpartition(".")
    value: Tensor = getattr(graph_module.get_submodule(owner), name)
    return value


def read_tensor(graph_module: fx.GraphModule, source: fx.Node | str) -> Tensor:
    """Return the parameter or buffer of a ``get_attr`` node or at a dotted path, detached."""
    return read_parameter(graph_module, source).detach()


def free_path(graph_module: fx.GraphModule, path: str) -> str:
    """Return a dotted path at which nothing lies yet: the given one, with numbers appended to parts that are taken.

    Whatever the model's own parameters and modules are called, a tensor or module added there replaces none of them.
    """
    *owners, last = path.split(".")
    owner: nn.Module = graph_module
    found = []
    for part in owners:
        name, count = part, 1
        while hasattr(owner, name) and not isinstance(getattr(owner, name), nn.Module):
            name, count = f"{part}_{count}", count + 1
        owner = getattr(owner, name) if hasattr(owner, name) else nn.Module()
        found.append(name)
    name, count = last, 1
    while hasattr(owner, name):
        name, count = f"{last}_{count}", count + 1
    return ".".join([*found, name])


def write_tensor(graph_module: fx.GraphModule, target: str, value: Tensor) -> None:
    """Register a tensor as a buffer at a dotted path, replacing a parameter or buffer of that name."""
    owner_path, _, name = target.rpartition(".")
    owner: nn.Module = graph_module
    for part in filter(None, owner_path.split(".")):
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, name):
        delattr(owner, name)
    owner.register_buffer(name, value.contiguous())


def is_call(node: Any, target: Any) -> bool:
    """Return whether an operand is a node that calls ``target``."""
    return isinstance(node, fx.Node) and node.target is target


def called_modules(graph_module: fx.GraphModule) -> list[tuple[fx.Node, nn.Module]]:
    """Return every node that calls a module, with the module, in graph order."""
    return [
        (node, graph_module.get_submodule(str(node.target)))
        for node in graph_module.graph.nodes
        if node.op == "call_module"
    ]
