"""Runs the quantized model and its reference together, segment by segment, over all samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.readings import draw_log_likelihood
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import OptionError
from infoq_fx.graph.float_interpreter import channels_last
from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.segments import Layer, Segment, find_segments
from infoq_fx.recovery.step import StepContext
from infoq_fx.runtime.held_outputs import HeldOutputs, measure_variances
from infoq_fx.runtime.held_values import HeldValues
from infoq_fx.runtime.outputs import read_nodes, read_readings

__all__ = [
    "LIGHT_BITS",
    "LayerwiseRunner",
    "Pair",
    "Reference",
    "SegmentRunner",
    "Values",
    "check_reference",
    "choose_samples",
]

LIGHT_BITS = 6
"""Activations of at least this many bits are also quantized in the reference ``"float_weights"``, so that layers do
not compensate for their error."""

Reference = Literal["float_weights", "float_model"]
"""The outputs that a step approximates: those of float weights with quantized activations, or of the float model."""

_Result = TypeVar("_Result")
Values = dict[fx.Node, Any]
"""Values of nodes for one batch."""


@dataclass(frozen=True)
class Pair:
    """The value of one node for one batch, in the reference and in the quantized model."""

    reference: Tensor
    quantized: Tensor


class LayerwiseRunner:
    """Runs the quantized model and its reference over all samples, one segment at a time.

    ``prepared`` is a fork whose parameters and qparams may be changed on the way: segments that were passed are not
    run again. Only the values that later segments read are kept. In the reference ``"float_weights"``, activations of
    ``LIGHT_BITS`` and more are quantized at their bit-widths.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        bits: Mapping[str, int],
        data: CalibrationData,
        context: StepContext,
        *,
        reference: Reference = "float_model",
    ) -> None:
        bits = prepared.inventory.complete_floats(bits)
        self.prepared, self.bits, self.run_options, self.samples = prepared, bits, context.run_options, data.samples
        self.segments = find_segments(prepared)
        bits_sought = bits if reference == "float_weights" else None
        self._runners = SegmentRunner(prepared, bits_sought, has_float_weights=True), SegmentRunner(prepared, bits)
        self.layers = sum(len(segment.layers) for segment in self.segments)
        inputs = [node for node in prepared.graph_module.graph.nodes if node.op == "placeholder"]
        self._held_bytes = context.held_bytes // 4  # of each model, before a segment and behind it
        self._reference = self._quantized = HeldValues(2 * self._held_bytes)
        self.batch_samples: list[int] = []
        for batch in data.batches(context.batch_size):
            self.batch_samples.append(len(next(iter(batch.values()))))
            self._reference.add({node: channels_last(batch[str(node.target)]) for node in inputs})

    def visit(self) -> Iterator[tuple[Segment, Layer]]:
        """Yield every layer with its segment, in graph order, while the runner is at the segment's start."""
        for segment in self.segments:
            for layer in segment.layers:
                yield segment, layer
                self.run_options.advance(1 / self.layers)
            self.advance(segment)

    def entering(self, segment: Segment) -> list[Values]:
        """Return the quantized model's inputs of the segment that the runner is at, by batch."""
        return [{node: values[node] for node in segment.entering} for values in self._quantized]

    def run_reference(self, segment: Segment, nodes: Sequence[fx.Node]) -> list[list[Tensor]]:
        """Return values of some nodes in the reference, for every batch; the runner must be at the segment's start."""
        return list(self._map(segment, segment.nodes, lambda _, reference, __: [reference[node] for node in nodes]))

    def squared_gradients(
        self, nodes: Sequence[fx.Node], read: Callable[[fx.Node, Tensor], Tensor], seed: int
    ) -> dict[fx.Node, list[Tensor]]:
        """Apply ``read`` to squared gradients of the float model's log-likelihood at some nodes, by batch.

        All outputs are drawn from the model's own distributions, by their readings, so that the mean of the squares is
        the Fisher information of each value. The runner must be at the first segment.
        """
        seeds = torch.randint(1 << 62, (len(self._reference),), generator=torch.Generator().manual_seed(seed)).tolist()
        found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}

        def run(index: int) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seeds[index])
            squares = _squared_gradients(self.prepared, self.segments, self._reference[index], nodes, generator)
            return [read(node, square) for node, square in zip(nodes, squares, strict=True)]

        with thread_map(self.run_options.threads, self.run_options.stop) as spread:
            for squares in spread(run, range(len(self._reference))):
                for node, square in zip(nodes, squares, strict=True):
                    found[node].append(square)
        return found

    def collect(self, segment: Segment, node: fx.Node, read: Callable[[int, Pair], _Result]) -> Iterator[_Result]:
        """Apply ``read`` to each batch's index and a node's value, in order; it must be at the segment's start."""
        return self.collect_all(segment, [node], lambda index, pairs: read(index, pairs[0]))

    def collect_all(
        self, segment: Segment, wanted: Sequence[fx.Node], read: Callable[[int, Sequence[Pair]], _Result]
    ) -> Iterator[_Result]:
        """Apply ``read`` to each batch's index and several nodes' values, as :meth:`collect` does."""
        nodes = _up_to(segment, wanted)

        def read_pairs(index: int, sought: Values, found: Values) -> _Result:
            return read(index, [Pair(sought[node], found[node]) for node in wanted])

        return self._map(segment, nodes, read_pairs)

    def advance(self, segment: Segment) -> None:
        """Run a segment and move to the next one."""
        kept = segment.leaving

        def keep(_: int, reference: Values, quantized: Values) -> tuple[Values, Values]:
            return {n: reference[n] for n in kept}, {n: quantized[n] for n in kept}

        passed = HeldValues(self._held_bytes), HeldValues(self._held_bytes)
        for values in self._map(segment, segment.nodes, keep):
            for held, found in zip(passed, values, strict=True):
                held.add(found)
        self._reference, self._quantized = passed

    def _map(
        self, segment: Segment, nodes: Sequence[fx.Node], read: Callable[[int, Values, Values], _Result]
    ) -> Iterator[_Result]:
        with torch.inference_mode():
            sought, rounding = self._runners
            reference = sought.fork().compute(segment.constants, {})
            quantized = rounding.fork().compute(segment.constants, {})

        def run(index: int) -> _Result:
            with torch.inference_mode():
                first = sought.fork().compute(nodes, reference | self._reference[index])
                second = rounding.fork().compute(nodes, quantized | self._quantized[index])
                return read(index, first, second)

        with thread_map(self.run_options.threads, self.run_options.stop) as spread:
            yield from spread(run, range(len(self._reference)))


def check_reference(reference: str) -> None:
    """Check the name of a reference.

    Raises:
        OptionError: it is not one of ``Reference``.
    """
    if reference not in get_args(Reference):
        raise OptionError(f"reference={reference!r}; give one of {', '.join(map(repr, get_args(Reference)))}")


def choose_samples(prepared: PreparedModel, data: CalibrationData, most: int) -> CalibrationData:
    """Return at most ``most`` samples spread over the data, in whole batches if the graph's batch size is fixed."""
    fixed = prepared.batch_size or 1
    chosen = data.spread(max(most, fixed))
    return chosen.take(chosen.samples - chosen.samples % fixed)


class SegmentRunner(GraphInterpreter):
    """Runs some nodes of a graph, quantized at given bit-widths, or in float if ``bits`` is None.

    In float, or with ``has_float_weights``, it uses the parameters and activation quantizers of the float model that
    ``prepared`` came from. With ``has_float_weights``, activations of fewer than ``LIGHT_BITS`` are not quantized.
    """

    def __init__(
        self, prepared: PreparedModel, bits: Mapping[str, int] | None, *, has_float_weights: bool = False
    ) -> None:
        super().__init__(prepared.graph_module, garbage_collect_values=False)
        self._bits, self._has_float_weights = bits, has_float_weights
        is_origin = bits is None or has_float_weights
        self._parameters = ((prepared.origin or prepared) if is_origin else prepared).graph_module

    def fork(self) -> Self:
        """Return a copy that may run in another thread."""
        return copy.copy(self)

    def compute(self, nodes: Sequence[fx.Node], known: Mapping[fx.Node, Any]) -> Values:
        """Run these nodes in order, and return their values and the known ones."""
        self.env = dict(known)
        for node in nodes:
            self.env[node] = self.run_node(node)
        return self.env

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a parameter, 4-D weights in channels-last format like the images."""
        value = read_tensor(self._parameters, str(target))
        return channels_last(value)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a quantizer at its bit-width, or return its input in float."""
        module = self._parameters.get_submodule(str(target))
        return self.quantize(module, args[0]) if isinstance(module, Quantizer) else args[0]

    def quantize(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """Return a quantizer's output for ``x``, which is ``x`` itself for sites in float."""
        bits = self._bits_of(quantizer)
        is_left = self._has_float_weights and (quantizer.site.kind == "weight" or bits < LIGHT_BITS)
        return x if self._bits is None or is_left else quantizer.quantize_at(x, bits)

    def _bits_of(self, quantizer: Quantizer) -> int:
        return (self._bits or {}).get(quantizer.site.name, quantizer.site.baseline_bits)


def _squared_gradients(
    prepared: PreparedModel,
    segments: Sequence[Segment],
    inputs: Values,
    nodes: Sequence[fx.Node],
    generator: torch.Generator,
) -> list[Tensor]:
    segment_runner, values = SegmentRunner(prepared, None), Values()
    with torch.inference_mode(False), torch.enable_grad():
        for node, x in inputs.items():
            values[node] = x.clone().requires_grad_() if x.is_floating_point() else x.clone()
        for segment in segments:
            values = segment_runner.compute([*segment.constants, *segment.nodes], values)
        outputs = [values[node] for node in read_nodes(prepared)]
        readings = read_readings(prepared)
        variances = measure_variances(readings, HeldOutputs(tuple(x.detach().float().cpu() for x in outputs)))
        likelihood = torch.stack(
            [
                draw_log_likelihood(reading, x, variance, generator)
                for reading, x, variance in zip(readings, outputs, variances, strict=True)
            ]
        ).sum()
        wanted = [values[node] for node in nodes]
        gradients = torch.autograd.grad(likelihood, wanted, allow_unused=True)
    return [
        torch.zeros_like(x) if gradient is None else gradient.square()
        for x, gradient in zip(wanted, gradients, strict=True)
    ]


def _up_to(segment: Segment, wanted: Sequence[fx.Node]) -> list[fx.Node]:
    """The segment's nodes that some nodes' values need."""
    inside, needed, pending = set(segment.nodes), set[fx.Node](), list(wanted)
    while pending:
        found = pending.pop()
        if found in inside and found not in needed:
            needed.add(found)
            pending.extend(found.all_input_nodes)
    return [found for found in segment.nodes if found in needed]
