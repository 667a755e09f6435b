"""Sizes of a model's values, and what is alive of them at once in a run that frees them as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Observe

__all__ = ["measure_peak_and_largest_bytes", "measure_peak_bytes", "measure_sizes"]


def measure_sizes(prepared: PreparedModel) -> dict[fx.Node, int]:
    """Measure the bytes of every node's value for one sample, in one run of the float model on the example inputs.

    Values that depend on no input, such as weights, are left out.
    """
    recorder = _Recorder(prepared)
    with torch.inference_mode():
        recorder.run(*prepared.example_inputs.values())
    samples = next(iter(prepared.example_inputs.values())).shape[0]
    found: dict[fx.Node, int] = {}
    for node, size in recorder.sizes.items():
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found[node] = -(-size // samples)
    return found


def measure_peak_bytes(prepared: PreparedModel) -> int:
    """Measure the bytes that are alive at once for one sample, at most, if nodes run in the order of the graph.

    A value is freed after the last node that reads it. Observers give back their input.
    """
    return measure_peak_and_largest_bytes(prepared)[0]


def measure_peak_and_largest_bytes(prepared: PreparedModel) -> tuple[int, int]:
    """Measure what :func:`measure_peak_bytes` does, and the bytes of the largest value of one sample."""
    sizes, sources = measure_sizes(prepared), dict[fx.Node, fx.Node]()
    for node in sizes:
        is_alias = node.op == "call_module" and isinstance(
            prepared.graph_module.get_submodule(str(node.target)), Observe
        )
        sources[node] = sources[node.all_input_nodes[0]] if is_alias else node
    return _find_peak(prepared.graph_module.graph, sizes, sources), max(sizes.values(), default=0)


def _find_peak(graph: fx.Graph, sizes: Mapping[fx.Node, int], sources: Mapping[fx.Node, fx.Node]) -> int:
    nodes: list[fx.Node] = list(graph.nodes)
    last = {sources[value]: node for node in nodes for value in (node, *node.all_input_nodes) if value in sources}
    freed: dict[fx.Node, int] = {}
    for value, node in last.items():
        freed[node] = freed.get(node, 0) + sizes[value]
    alive = peak = 0
    for node in nodes:
        alive += sizes[node] if sources.get(node) is node else 0
        peak = max(peak, alive)
        alive -= freed.get(node, 0)
    return peak


class _Recorder(FloatInterpreter):
    """Records the bytes of every node's value."""

    def __init__(self, prepared: PreparedModel) -> None:
        super().__init__(prepared)
        self.sizes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        tensors = value if isinstance(value, tuple | list) else (value,)
        if n.op != "output":
            self.sizes[n] = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
        return value
