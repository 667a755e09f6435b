"""The outputs of a prepared model that are read: their nodes, and their values in a run of the float model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.core.readings import Categorical, Ignored, Reading
from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.graph.reading_choice import list_output_nodes
from infoq_fx.quantization.prepared import PreparedModel

__all__ = [
    "FloatOutputs",
    "count_positions",
    "find_labelled",
    "is_read",
    "predict_classes",
    "read_nodes",
    "read_readings",
]


class FloatOutputs(FloatInterpreter):
    """Runs the float model behind a prepared graph; the result are the outputs that are read, in order."""

    def __init__(self, prepared: PreparedModel) -> None:
        super().__init__(prepared)
        self._read = read_nodes(prepared)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs that are read."""
        return tuple(self.env[node] for node in self._read)


def read_nodes(prepared: PreparedModel) -> tuple[fx.Node, ...]:
    """Return the nodes of the outputs that are read, in order."""
    nodes = list_output_nodes(prepared.graph_module)
    return tuple(node for node, reading in zip(nodes, prepared.readings, strict=True) if is_read(reading))


def count_positions(prepared: PreparedModel) -> int:
    """Return the positions of one sample in the output that has the fewest: 1 for a class, all for pixels or tokens."""
    with torch.inference_mode():
        outputs = FloatOutputs(prepared).run(*prepared.example_inputs.values())
    return min(
        (
            math.prod(size for axis, size in enumerate(x.shape) if axis not in (0, reading.axis % max(1, x.ndim)))
            for x, reading in zip(outputs, read_readings(prepared), strict=True)
            if not isinstance(reading, Ignored)
        ),
        default=1,
    )


def read_readings(prepared: PreparedModel) -> tuple[Reading, ...]:
    """Return the readings of the outputs that are read, in order."""
    return tuple(reading for reading in prepared.readings if is_read(reading))


def find_labelled(readings: tuple[Reading, ...], outputs: tuple[Tensor, ...], labels: Tensor | None) -> int | None:
    """Return the index of the first categorical output that the labels fit: its shape without the classes.

    Without labels it is the first categorical output; None if there is none.
    """
    for index, (reading, output) in enumerate(zip(readings, outputs, strict=True)):
        if isinstance(reading, Categorical):
            positions = [size for axis, size in enumerate(output.shape) if axis != reading.axis % output.ndim]
            if labels is None or (not labels.is_floating_point() and list(labels.shape[1:]) == positions[1:]):
                return index
    return None


def predict_classes(reading: Categorical, output: Tensor) -> Tensor:
    """Return the most probable class at every position, int64 ``[samples, ...]``."""
    return output.argmax(reading.axis)


def is_read(reading: Reading) -> bool:
    """Whether an output with this reading has a part in the loss."""
    return not isinstance(reading, Ignored)
