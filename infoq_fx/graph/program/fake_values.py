"""Records the fake value of every node of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from infoq_fx.graph.program.graph_interpreter import GraphInterpreter

__all__ = ["infer_values"]


def infer_values(graph_module: fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Tensor]) -> None:
    """Run a graph on fake tensors of a mode, and keep every value in ``node.meta["val"]``."""
    # torch's own kernel of an LSTM takes no free sizes; its decomposition in Python does.
    with mode, torch.no_grad(), enable_python_dispatcher():
        _Inference(graph_module, mode).run(*inputs)


class _Inference(GraphInterpreter):
    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self._mode = mode

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._mode.from_tensor(self.fetch_attr(target), static_shapes=True)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result
