"""Records the fake value of every node of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from infoq_fx.graph.layers import RECURRENT_OPS
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.graph.program.recurrent_shapes import infer_recurrent

__all__ = ["infer_values"]


def infer_values(graph_module: fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Tensor]) -> None:
    """Run a graph on fake tensors of a mode, and keep every value in ``node.meta["val"]``."""
    with mode, torch.no_grad():
        _Inference(graph_module, mode).run(*inputs)


class _Inference(GraphInterpreter):
    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self._mode = mode

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._mode.from_tensor(self.fetch_attr(target), static_shapes=True)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in RECURRENT_OPS:
            return infer_recurrent(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result
