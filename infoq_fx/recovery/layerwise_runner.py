"""Runs the quantized model and its reference together over all samples, from layer to layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import return_free_memory
from infoq_fx.core.readings import Quantity, draw_log_likelihood
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import OptionError
from infoq_fx.graph.float_interpreter import channels_last
from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.segments import Layer, Segment, find_segments, needed_constants
from infoq_fx.recovery.step import StepContext
from infoq_fx.runtime.held_outputs import OutputHolder, measure_variances
from infoq_fx.runtime.held_values import HeldValues, ValuesByBatch
from infoq_fx.runtime.integer_convolution import (
    QuantizedTensor,
    compute_layer,
    find_integer_nodes,
    quantize_activation,
    quantize_weight,
)
from infoq_fx.runtime.outputs import read_nodes, read_readings
from infoq_fx.types import BASELINE_BITS, QParams

__all__ = [
    "LIGHT_BITS",
    "LayerwiseRunner",
    "Pair",
    "Reference",
    "SegmentRunner",
    "Values",
    "check_reference",
    "choose_samples",
    "few_bit_activations",
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
    quantized: Tensor | QuantizedTensor


class LayerwiseRunner:
    """Runs the quantized model and its reference over all samples, each from one place in the graph to the next.

    ``prepared`` is a fork whose parameters and qparams may be changed on the way: nodes that were passed are not run
    again, so that every node runs about once in each model. Only the values that later nodes read are kept. In the
    reference ``"float_weights"``, activations of ``LIGHT_BITS`` and more are quantized at their bit-widths. With
    ``at_baseline`` those of fewer bits run at 8 bits in both models.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        bits: Mapping[str, int],
        data: CalibrationData,
        context: StepContext,
        *,
        reference: Reference = "float_model",
        at_baseline: bool = False,
    ) -> None:
        bits = prepared.inventory.complete_floats(bits)
        self.prepared, self.bits, self.run_options, self.samples = prepared, bits, context.run_options, data.samples
        self.segments = find_segments(prepared)
        self.layers = [layer for segment in self.segments for layer in segment.layers]
        self._constants = tuple(dict.fromkeys(node for segment in self.segments for node in segment.constants))
        self._nodes = [node for segment in self.segments for node in segment.nodes]
        self._at = {node: index for index, node in enumerate(self._nodes)}
        self._of_layers = frozenset(layer.node for layer in self.layers)
        self._inputs = [node for node in prepared.graph_module.graph.nodes if node.op == "placeholder"]
        self._held_bytes = context.held_bytes // 4  # of each model, before the nodes that run and behind them
        inputs = _Samples(self._inputs, data, context.batch_size)
        self.batch_samples = inputs.batch_samples
        bits_run = (
            {**bits, **dict.fromkeys(few_bit_activations(prepared, bits), BASELINE_BITS)} if at_baseline else bits
        )
        bits_sought = bits_run if reference == "float_weights" else None
        self._reference = _Place(SegmentRunner(prepared, bits_sought, has_float_weights=True), 0, inputs)
        self._quantized = _Place(_IntegerRunner(prepared, bits_run), 0, inputs)

    @property
    def reference(self) -> ValuesByBatch:
        """The values of the reference at its place."""
        return self._reference.values

    @property
    def quantized(self) -> ValuesByBatch:
        """The values of the quantized model at its place."""
        return self._quantized.values

    def visit(self) -> Iterator[Layer]:
        """Yield every layer in graph order, and advance the progress bar."""
        for layer in self.layers:
            yield layer
            self.run_options.advance(1 / len(self.layers))

    def squared_gradients(
        self, nodes: Sequence[fx.Node], read: Callable[[fx.Node, Tensor], Tensor], seed: int
    ) -> dict[fx.Node, list[Tensor]]:
        """Apply ``read`` to squared gradients of the float model's log-likelihood at some nodes, by batch.

        All outputs are drawn from the model's own distributions, by their readings, so that the mean of the squares is
        the Fisher information of each value. The runner must be at the inputs.
        """
        draw = torch.Generator().manual_seed(seed)
        seeds = torch.randint(1 << 62, (self.samples,), generator=draw).split(self.batch_samples)
        found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
        variances = self._measure_variances()

        def run(index: int) -> list[Tensor]:
            inputs, generators = self.reference.read(index, self._inputs), map(_seeded, seeds[index].tolist())
            squares = _squared_gradients(self.prepared, self.segments, inputs, nodes, variances, list(generators))
            return [read(node, square) for node, square in zip(nodes, squares, strict=True)]

        with thread_map(self.run_options.threads, self.run_options.stop) as spread:
            for squares in spread(run, range(len(self.batch_samples))):
                for node, square in zip(nodes, squares, strict=True):
                    found[node].append(square)
        return found

    def _measure_variances(self) -> tuple[Tensor | None, ...]:
        """Of the float model's outputs, where a reading needs them."""
        readings, nodes = read_readings(self.prepared), read_nodes(self.prepared)
        if not any(isinstance(reading, Quantity) for reading in readings):
            return (None,) * len(readings)
        holder, runner, start = OutputHolder(self.samples), SegmentRunner(self.prepared, None), 0
        for index, count in enumerate(self.batch_samples):
            inputs = self.reference.read(index, self._inputs)
            with torch.inference_mode():
                values = runner.compute([*self._constants, *self._nodes], inputs, set(nodes))
            holder.add(start, [values[node] for node in nodes])
            start += count
        return measure_variances(readings, holder.finish())

    def collect(self, node: fx.Node, read: Callable[[int, Pair], _Result]) -> Iterator[_Result]:
        """Run both models to a node, and apply ``read`` to each batch's index and the node's values, in order.

        A layer's output is computed for ``read`` alone: the layer runs again, perhaps with other parameters. Nodes that
        were passed can be read as long as later nodes read them.
        """
        return self.collect_all([node], lambda index, pairs: read(index, pairs[0]))

    def collect_all(
        self, wanted: Sequence[fx.Node], read: Callable[[int, Sequence[Pair]], _Result]
    ) -> Iterator[_Result]:
        """Run both models to the first of several nodes, and apply ``read`` to each batch's index and all their values.

        What lies behind the first node is computed for ``read`` alone, as a layer's output is by :meth:`collect`.
        """
        places, node = (self._reference, self._quantized), wanted[0]
        behind = self._at[node] + (node not in self._of_layers) if node in self._at else 0
        stop = max(behind, *(place.position for place in places))
        runs = [self._prepare(place, stop, wanted) for place in places]

        def run(index: int) -> tuple[list[_Passed], _Result]:
            with torch.inference_mode():
                first, second = (run_from(index) for run_from in runs)
                pairs = [Pair(*both) for both in zip(first.wanted, second.wanted, strict=True)]
                return [first, second], read(index, pairs)

        passed = HeldValues(self._held_bytes), HeldValues(self._held_bytes)
        with thread_map(self.run_options.threads, self.run_options.stop) as spread:
            for batch, result in spread(run, range(len(self.batch_samples))):
                for held, found in zip(passed, batch, strict=True):
                    held.add(found.kept, found.quantized)
                yield result
        for place, held in zip(places, passed, strict=True):
            place.move(stop, held)
        return_free_memory()

    def advance(self, segment: Segment) -> None:
        """Run both models to the end of a segment."""
        self.advance_reference(segment)
        self._advance(self._quantized, segment)

    def advance_reference(self, segment: Segment) -> None:
        """Run the reference alone to the end of a segment."""
        self._advance(self._reference, segment)

    def _advance(self, place: _Place, segment: Segment) -> None:
        stop = max(place.position, self._at[segment.nodes[-1]] + 1) if segment.nodes else place.position
        run_from, held = self._prepare(place, stop, ()), HeldValues(self._held_bytes)

        def run(index: int) -> _Passed:
            with torch.inference_mode():
                return run_from(index)

        with thread_map(self.run_options.threads, self.run_options.stop) as spread:
            for found in spread(run, range(len(self.batch_samples))):
                held.add(found.kept, found.quantized)
        place.move(stop, held)
        return_free_memory()

    def _prepare(self, place: _Place, stop: int, wanted: Sequence[fx.Node]) -> Callable[[int], _Passed]:
        """A run of a batch from a place to a position, and on to the nodes that are ``wanted`` if they lie behind."""
        nodes = [*self._nodes[place.position : stop], *_up_to(self._nodes[stop:], wanted)]
        alive = self._alive_at(stop) if stop > place.position else []
        needed = {*alive, *(source for node in nodes for source in node.all_input_nodes)}
        kept = {*alive, *wanted}
        runner, read = place.runner, kept | needed
        with torch.inference_mode():
            constants = runner.fork().compute(needed_constants(self._constants, nodes), {})
        qparams = {node: found for node in alive if (found := runner.qparams_of(node)) is not None}

        def run(index: int) -> _Passed:
            values = runner.fork().compute(nodes, constants | place.values.read(index, read), kept)
            return _Passed({node: values[node] for node in alive}, qparams, [values[node] for node in wanted])

        return run

    def _alive_at(self, position: int) -> list[fx.Node]:
        """The nodes before a position that nodes from there on read, or that are outputs."""
        last, passed = len(self._nodes), (*self._inputs, *self._nodes[:position])
        return [node for node in passed if any(self._at.get(user, last) >= position for user in node.users)]


class _Samples:
    """The samples as values of the input nodes, by batch; images with channels last."""

    def __init__(self, nodes: Sequence[fx.Node], data: CalibrationData, batch_size: int) -> None:
        self._nodes, self._batches = nodes, list(data.batches(batch_size))
        self.batch_samples = [len(next(iter(batch.values()))) for batch in self._batches]

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, index: int, nodes: Collection[fx.Node]) -> Values:
        batch = self._batches[index]
        return {node: channels_last(batch[str(node.target)]) for node in self._nodes if node in nodes}


class _Place:
    """A model, how many of the nodes it has passed, and the values there that later nodes read."""

    def __init__(self, runner: SegmentRunner, position: int, values: ValuesByBatch) -> None:
        self.runner, self.position, self.values = runner, position, values

    def move(self, position: int, values: ValuesByBatch) -> None:
        if position > self.position:
            self.position, self.values = position, values


@dataclass(frozen=True)
class _Passed:
    """What a run of a batch leaves: the values that are alive, qparams of fake quantized ones, and those to read."""

    kept: Values
    quantized: Mapping[fx.Node, QParams]
    wanted: Sequence[Any]


def check_reference(reference: str) -> None:
    """Check the name of a reference.

    Raises:
        OptionError: it is not one of ``Reference``.
    """
    if reference not in get_args(Reference):
        raise OptionError(f"reference={reference!r}; give one of {', '.join(map(repr, get_args(Reference)))}")


def few_bit_activations(prepared: PreparedModel, bits: Mapping[str, int]) -> list[str]:
    """Return the sites of activations of fewer than ``LIGHT_BITS``."""
    sites = [site for site in prepared.inventory.sites if site.kind == "activation"]
    return [site.name for site in sites if bits.get(site.name, site.baseline_bits) < LIGHT_BITS]


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

    def compute(
        self, nodes: Sequence[fx.Node], known: Mapping[fx.Node, Any], keep: Set[fx.Node] | None = None
    ) -> Values:
        """Run these nodes in order, and return their values and the known ones, or those to ``keep`` alone."""
        self.env = dict(known)
        freed = {} if keep is None else _freed_after(nodes, keep)
        for node in nodes:
            self.env[node] = self.run_node(node)
            for passed in freed.get(node, ()):
                self.env.pop(passed, None)
        return self.env

    def qparams_of(self, node: fx.Node) -> QParams | None:
        """Return the qparams that a node fake quantizes its input with, None for any other node."""
        module = self._parameters.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, Quantizer) or self._is_left(module):
            return None
        qparams = module.qparams_at(self._bits_of(module))
        return None if qparams.spec.is_float else qparams

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
        return x if self._is_left(quantizer) else quantizer.quantize_at(x, self._bits_of(quantizer))

    def _is_left(self, quantizer: Quantizer) -> bool:
        """Whether a site stays in float."""
        is_light = quantizer.site.kind == "activation" and self._bits_of(quantizer) >= LIGHT_BITS
        return self._bits is None or (self._has_float_weights and not is_light)

    def _bits_of(self, quantizer: Quantizer) -> int:
        return (self._bits or {}).get(quantizer.site.name, quantizer.site.baseline_bits)


class _IntegerRunner(SegmentRunner):
    """Runs layers over integers where :func:`find_integer_nodes` says so; their inputs are integers then."""

    def __init__(self, prepared: PreparedModel, bits: Mapping[str, int]) -> None:
        super().__init__(prepared, bits)
        self._integers = find_integer_nodes(prepared)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the values of its arguments."""
        if n not in self._integers:
            return super().run_node(n)
        if n.op == "call_module":
            quantizer = self._parameters.get_submodule(str(n.target))
            assert isinstance(quantizer, Quantizer)
            quantize = quantize_activation if quantizer.site.kind == "activation" else quantize_weight
            qparams = quantizer.qparams_at(self._bits_of(quantizer))
            return super().run_node(n) if qparams.spec.is_float else quantize(self.env[n.all_input_nodes[0]], qparams)
        x, weight, *rest = n.args[:3]
        bias = self.env[rest[0]] if rest and isinstance(rest[0], fx.Node) else None
        return compute_layer(n, self.env[x], self.env[weight], bias)  # type: ignore[index]

    def qparams_of(self, node: fx.Node) -> QParams | None:
        """Return None for the nodes whose values are integers."""
        return None if node in self._integers else super().qparams_of(node)


def _squared_gradients(
    prepared: PreparedModel,
    segments: Sequence[Segment],
    inputs: Values,
    nodes: Sequence[fx.Node],
    variances: Sequence[Tensor | None],
    generators: Sequence[torch.Generator],
) -> list[Tensor]:
    segment_runner, values = SegmentRunner(prepared, None), Values()
    with torch.inference_mode(False), torch.enable_grad():
        for node, x in inputs.items():
            values[node] = x.clone().requires_grad_() if x.is_floating_point() else x.clone()
        for segment in segments:
            values = segment_runner.compute([*segment.constants, *segment.nodes], values)
        outputs = [values[node] for node in read_nodes(prepared)]
        likelihood = torch.stack(
            [
                draw_log_likelihood(reading, x[i : i + 1], variance, generator)
                for reading, x, variance in zip(read_readings(prepared), outputs, variances, strict=True)
                for i, generator in enumerate(generators)
            ]
        ).sum()
        wanted = [values[node] for node in nodes]
        gradients = torch.autograd.grad(likelihood, wanted, allow_unused=True)
    return [
        torch.zeros_like(x) if gradient is None else gradient.square()
        for x, gradient in zip(wanted, gradients, strict=True)
    ]


def _up_to(nodes: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of some nodes that the values of the wanted ones need, in order."""
    inside, needed, pending = set(nodes), set[fx.Node](), list(wanted)
    while pending:
        found = pending.pop()
        if found in inside and found not in needed:
            needed.add(found)
            pending.extend(found.all_input_nodes)
    return [found for found in nodes if found in needed]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _freed_after(nodes: Sequence[fx.Node], keep: Set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By node: the values that no later one reads."""
    last = {source: node for node in nodes for source in (node, *node.all_input_nodes)}
    freed: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        if source not in keep:
            freed.setdefault(node, []).append(source)
    return freed
