"""Chooses what each output of a model means: from the user's words, the end of the graph, the labels and the values."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.readings import READINGS, Bernoulli, Categorical, Ignored, LossFunction, Quantity, Reading
from infoq_fx.errors import OptionError, UnsupportedModelError, unknown_name_error
from infoq_fx.quantization.call_forms import flatten_tensors

__all__ = [
    "OutputsOption",
    "ReadingChoice",
    "RunSamples",
    "choose_readings",
    "describe_choice",
    "join_tensors",
    "list_output_nodes",
    "map_tensors",
    "run_samples",
]

OutputsOption = str | Reading | Mapping[Any, Any] | LossFunction
"""``"auto"``, a reading for all outputs, readings by output name or position, or a loss function."""

_ATEN = torch.ops.aten
_SOFTMAX = {_ATEN.softmax.int: "probabilities", _ATEN._softmax.default: "probabilities"}
_LOG_SOFTMAX = {_ATEN.log_softmax.int: "log_probabilities", _ATEN._log_softmax.default: "log_probabilities"}
_SIGMOID = {_ATEN.sigmoid.default}
_SAME_SHAPE = {  # an output behind these means what is in front of them
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.alias.default,
    _ATEN.detach.default,
    _ATEN._to_copy.default,
    _ATEN.to.dtype,
}
_LAST_AXIS = {
    _ATEN.linear.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.matmul.default,
    _ATEN.layer_norm.default,
}
_CONFIDENT = 0.5  # mean probability of the most probable class, between that of a guess (0) and certainty (1)
_CONFIDENT_OF_MANY = 0.2
_FEW_CLASSES = 10
_SAMPLES = 64
_ORDER_MATTERS = 1e-2
_BEYOND_CHANCE = 3.0  # standard errors
_FEWEST_TOKENS = 16
_UNLABELLED = 255  # in masks of uint8
_MOST_VALUES = 1 << 24
_FEWEST_NATS = 1e-3  # mean entropy: values that are all certain are no logits


@dataclass(frozen=True)
class RunSamples:
    """Outputs of the float model in order, with the inputs and labels of the same samples.

    An output without an entry for each sample, such as a mean over the batch or a constant, is None.
    """

    outputs: tuple[Tensor | None, ...]
    inputs: tuple[Tensor, ...]
    labels: Tensor | None


@dataclass(frozen=True)
class ReadingChoice:
    """The readings of all outputs in order, how each was found, and the user's own loss if there is one."""

    readings: tuple[Reading, ...]
    reasons: tuple[str, ...]
    function: LossFunction | None = None


def list_output_nodes(graph_module: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the nodes of all outputs in the order of their names, one for each place that an output has."""
    found: list[fx.Node] = []

    def collect(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(graph_module.graph.output_node().args, collect)
    return tuple(found)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a model's result with every tensor replaced, in the order of :func:`flatten_tensors`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {one.name: map_tensors(getattr(value, one.name), change) for one in fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def join_tensors(structure: Any, parts: Sequence[tuple[Tensor, ...]]) -> Any:
    """Join the tensors of several batches in the structure of a model's result."""
    tensors = iter([torch.cat(held) if held[0].ndim else torch.stack(held) for held in zip(*parts, strict=True)])
    return map_tensors(structure, lambda _: next(tensors))


def run_samples(graph_module: fx.GraphModule, data: CalibrationData, *, fixed: int | None) -> RunSamples:
    """Run the float model on a few samples spread over the data, fewer if its outputs are large.

    Args:
        graph_module: the float model, in normal form.
        data: by the model's input names, on its device.
        fixed: the batch size that the graph is fixed to, if any.
    """
    size = fixed or 2
    found: list[tuple[Tensor, ...]] = []
    chosen = data.spread(max(_SAMPLES, size))
    if chosen.samples < size:
        chosen = chosen.select(torch.arange(size) % chosen.samples)
    chosen = chosen.take(chosen.samples - chosen.samples % size)
    with torch.no_grad():
        for batch in chosen.batches(size):
            found.append(flatten_tensors(graph_module(*batch.values())))
            if sum(x.numel() for part in found for x in part) > _MOST_VALUES:
                break
        other = found[0]
        if fixed is None:  # in a larger batch, only what has an entry for each sample grows
            rows = torch.arange(size + 1) % chosen.samples
            other = flatten_tensors(graph_module(*chosen.select(rows).inputs.values()))
        swapped = flatten_tensors(graph_module(*chosen.select(torch.arange(size).flip(0)).inputs.values()))
    count = size if fixed else size + 1
    per_sample = [_grows(x, size, y, count) for x, y in zip(found[0], other, strict=True)]
    _refuse_mixed_samples(found[0], swapped, per_sample)
    joined = zip(per_sample, zip(*found, strict=True), strict=True)
    outputs = tuple(torch.cat([x.detach() for x in parts]) if grows else None for grows, parts in joined)
    seen = chosen.take(size * len(found))
    return RunSamples(outputs, tuple(seen.inputs.values()), seen.labels)


def _refuse_mixed_samples(outputs: Sequence[Tensor], swapped: Sequence[Tensor], per_sample: Sequence[bool]) -> None:
    """Refuse a model whose outputs, for the same samples in another order, are not the same in that order."""
    for x, y, is_checked in zip(outputs, swapped, per_sample, strict=True):
        if not (is_checked and x.is_floating_point() and x.shape == y.shape):
            continue
        expected = x.flip(0).double()
        is_counted = torch.isfinite(expected) & torch.isfinite(y)
        error = (expected - y.double())[is_counted].abs()
        if error.numel() and float(error.max()) > _ORDER_MATTERS * float(expected[is_counted].abs().max()):
            raise UnsupportedModelError(
                "what the model computes for a sample depends on the order of the samples in the batch, as where an "
                "input or a state has its samples in the second place; wrap the model in a module that takes "
                "and returns [samples, ...], or export a program with a fixed batch of 1"
            )


def _grows(x: Tensor, size: int, other: Tensor, other_size: int) -> bool:
    """Whether the first axis, and no other, is that of the samples."""
    return x.shape[:1] == (size,) and other.shape[:1] == (other_size,) and x.shape[1:] == other.shape[1:]


def choose_readings(
    graph_module: fx.GraphModule,
    outputs: Sequence[Tensor | None],
    names: Sequence[str] = (),
    option: OutputsOption = "auto",
    *,
    labels: Tensor | None = None,
    inputs: Sequence[Tensor] = (),
) -> ReadingChoice:
    """Choose the reading of every output.

    What the user said comes first; then a softmax, log-softmax or sigmoid at the end of the graph; then integer labels
    that fit the output without one of its axes; then the values of the float model. Confident ones, whose softmax gives
    the most probable class half of the probability and more (a fifth of many classes), are taken for logits; all others
    are quantities.

    Args:
        graph_module: the float model, in normal form.
        outputs: its outputs in order, for some samples; None for those without an entry for each sample.
        names: of the outputs; none for ``output_0`` and so on.
        option: see :func:`infoq_fx.quantize`.
        labels: for the same samples, ``[samples, ...]``.
        inputs: of the model, for the same samples.

    Raises:
        OptionError: ``option`` names an output that is not there, or cannot be read; or no output is left to read.
    """
    nodes = list_output_nodes(graph_module)
    known = list(names) or [f"output_{index}" for index in range(len(outputs))]
    if callable(option) and not isinstance(option, type):
        compared = tuple(
            Quantity(axis=1) if x is not None and x.is_floating_point() and x.numel() else Ignored() for x in outputs
        )
        return ReadingChoice(compared, ("compared by the given function",) * len(compared), option)
    given = _read_option(option, known)
    is_only = sum(x is not None and x.is_floating_point() for x in outputs) == 1
    labelled = _find_labelled(nodes, outputs, given, labels)
    readings, reasons = [], []
    for index, (node, x) in enumerate(zip(nodes, outputs, strict=True)):
        if (x is None or not x.numel()) and isinstance(option, Mapping) and hasattr(given[index], "weight"):
            missing = "entry for each sample along its first axis" if x is None else "values"
            raise OptionError(f"outputs reads {known[index]!r}, which has no {missing}; leave it out")
        reading, reason = _choose(node, x, given[index], labelled.get(index), inputs, is_only=is_only)
        readings.append(reading)
        reasons.append(reason)
        if reason == _GUESSED:
            logging.getLogger(__name__).info(
                "output %r is read as %s, a guess; outputs={%r: ...} says what it is",
                known[index],
                reading,
                known[index],
            )
    # A graph that gives integers alone, such as an argmax, can be converted; only scores and recovery need a reading.
    is_readable = any(x is None or x.is_floating_point() for x in outputs)
    if is_readable and all(isinstance(reading, Ignored) for reading in readings):
        told = ", ".join(f"{name!r} ({reason})" for name, reason in zip(known, reasons, strict=True))
        raise OptionError(
            f"no output is left to read of {told}; give a reading to one with floating-point values [samples, ...]"
        )
    return ReadingChoice(tuple(readings), tuple(reasons))


def describe_choice(choice: ReadingChoice, names: Sequence[str]) -> tuple[str, ...]:
    """Return a line for each output: its name, its reading and how that was found."""
    if choice.function is not None:
        return (f"all outputs are compared by {getattr(choice.function, '__qualname__', 'a function')}",)
    return tuple(
        f"output {name!r} is read as {reading} ({reason})"
        if not isinstance(reading, Ignored)
        else f"output {name!r} is ignored ({reason})"
        for name, reading, reason in zip(names, choice.readings, choice.reasons, strict=True)
    )


_GUESSED = "a guess from its values"


def _choose(
    node: fx.Node,
    x: Tensor | None,
    given: Reading | None,
    labelled: int | None,
    inputs: Sequence[Tensor],
    *,
    is_only: bool,
) -> tuple[Reading, str]:
    if x is None:
        return Ignored(), "has no entry for each sample"
    if not x.numel():
        return Ignored(), "has no values"
    if not x.is_floating_point():
        return Ignored(), "holds no floating-point values"
    if isinstance(given, Categorical) and x.ndim < 2:
        raise OptionError(
            "outputs reads an output of shape ['samples'] as categorical, which has one number for each sample and no "
            "classes; give 'bernoulli' or 'quantity'"
        )
    if given is not None:
        return _check_axis(given, x), "as given"
    if (found := _read_end(node, x)) is not None:
        return found, "by the end of the graph"
    if labelled is not None:
        return Categorical(axis=labelled), "by its labels"
    if (axis := _axis_of_tokens(x, inputs)) is not None:
        return Categorical(axis=axis), "by the tokens that the model takes"
    axis = _channel_axis(node, x)
    if x.ndim == 2 and is_only and _is_confident(x, axis):
        return Categorical(axis=axis), _GUESSED
    return Quantity(axis=axis), _GUESSED


def _read_option(option: OutputsOption, names: Sequence[str]) -> list[Reading | None]:
    if isinstance(option, Mapping):
        found: list[Reading | None] = [None] * len(names)
        keys: dict[int, Any] = {}
        for key, value in option.items():
            if isinstance(key, int) and -len(names) <= key < len(names):
                index = key % len(names)
            elif key in names:
                index = list(names).index(str(key))
            else:
                raise unknown_name_error("output", str(key), names)
            if index in keys:
                raise OptionError(
                    f"outputs gives {names[index]!r} two readings, as {keys[index]!r} and {key!r}; leave one out"
                )
            keys[index], found[index] = key, _as_reading(value)
        return found
    return [_as_reading(option)] * len(names)


def _as_reading(value: Any) -> Reading | None:
    if value == "auto":
        return None
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float):
        reading = _as_reading(value[0])
        if reading is None or isinstance(reading, Ignored):
            raise OptionError(f"outputs gives a weight to {value[0]!r}; give it with a reading, as (Quantity(), 0.5)")
        return dataclasses.replace(reading, weight=float(value[1]))
    if isinstance(value, str) and value in READINGS:
        return READINGS[value]()
    if isinstance(value, Categorical | Bernoulli | Quantity | Ignored):
        return value
    raise OptionError(
        f"outputs holds {value!r}; give 'auto', one of {', '.join(map(repr, READINGS))}, a reading such as "
        "infoq_fx.Categorical(axis=1), (reading, weight), or a function (float_outputs, outputs) -> nats"
    )


def _check_axis(reading: Reading, x: Tensor) -> Reading:
    if isinstance(reading, Ignored) or x.ndim < 2:
        return reading
    if not -x.ndim < reading.axis < x.ndim or reading.axis % x.ndim == 0:
        raise OptionError(
            f"outputs reads an output of shape {['samples', *x.shape[1:]]} along axis {reading.axis}; give one from 1 "
            f"to {x.ndim - 1}"
        )
    return dataclasses.replace(reading, axis=reading.axis % x.ndim)


def _read_end(node: fx.Node, x: Tensor) -> Reading | None:
    node = _source_of(node)
    if node.target in _SOFTMAX or node.target in _LOG_SOFTMAX:
        axis: Any = node.args[1]
        form: Any = {**_SOFTMAX, **_LOG_SOFTMAX}[node.target]
        return Categorical(axis=axis % x.ndim, form=form) if axis % x.ndim else None
    if node.target in _SIGMOID:
        return Bernoulli(axis=_channel_axis(node.all_input_nodes[0], x), form="probabilities")
    return None


def _source_of(node: fx.Node) -> fx.Node:
    """The node behind observers, copies and casts."""
    while node.op == "call_module" or node.target in _SAME_SHAPE:
        node = node.all_input_nodes[0]
    return node


def _find_labelled(
    nodes: Sequence[fx.Node], outputs: Sequence[Tensor | None], given: Sequence[Reading | None], labels: Tensor | None
) -> dict[int, int]:
    """The axis of the classes by the index of the output that the labels belong to; empty if that is not clear.

    Where a label's class has the largest value more often than by chance, it is this output, otherwise one with exactly
    as many values as the labels have classes.
    """
    fitting: dict[int, int] = {}
    for index, (node, x) in enumerate(zip(nodes, outputs, strict=True)):
        if x is not None and x.is_floating_point() and given[index] is None:
            end = _read_end(node, x)
            axis = _axis_of_labels(x, labels)
            if axis is not None and (end is None or (isinstance(end, Categorical) and end.axis == axis)):
                fitting[index] = axis
    if labels is None or not fitting:
        return {}
    agreeing = {index: _agreement(outputs[index], labels, axis) for index, axis in fitting.items()}
    best = max(agreeing, key=lambda index: agreeing[index])
    if agreeing[best] > _BEYOND_CHANCE:
        return {best: fitting[best]}
    classes = int(_known_labels(labels).max()) + 1
    exact = {index: axis for index, axis in fitting.items() if _size(outputs[index], axis) == classes}
    return exact if len(exact) == 1 else {}


def _size(x: Tensor | None, axis: int) -> int:
    return 0 if x is None else x.shape[axis]


def _agreement(x: Tensor | None, labels: Tensor, axis: int) -> float:
    """By how many standard errors the largest values are more often those of the labels than by chance."""
    assert x is not None
    is_known = (labels >= 0) & ((labels != _UNLABELLED) | (labels.ndim == 1))
    chance, count = 1 / x.shape[axis], int(is_known.sum())
    share = float((x.argmax(axis) == labels)[is_known].double().mean())
    return (share - chance) / math.sqrt(chance * (1 - chance) / max(1, count))


def _known_labels(labels: Tensor) -> Tensor:
    return labels[(labels >= 0) & ((labels != _UNLABELLED) | (labels.ndim == 1))]


def _axis_of_labels(x: Tensor, labels: Tensor | None) -> int | None:
    """The axis without which the output has the shape of the labels, and that is long enough for all classes."""
    if labels is None or labels.is_floating_point() or labels.dtype == torch.bool or x.ndim < 2:
        return None
    known = _known_labels(labels)
    if not known.numel():
        return None
    classes = int(known.max()) + 1
    for axis in (1, *range(x.ndim - 1, 1, -1)):
        positions = [size for i, size in enumerate(x.shape) if i != axis]
        if positions[1:] == list(labels.shape[1:]) and x.shape[axis] >= max(2, classes):
            return int(axis)
    return None


def _axis_of_tokens(x: Tensor, inputs: Sequence[Tensor]) -> int | None:
    """The last axis, if the model takes integers ``[samples, tokens]`` and gives a value for each that there is."""
    for tokens in inputs:
        is_integer = not tokens.is_floating_point() and tokens.dtype != torch.bool
        fits = is_integer and x.ndim == 3 and tokens.ndim == 2 and tokens.shape[1] == x.shape[1]
        if fits and x.shape[2] > max(_FEWEST_TOKENS, int(tokens.max())):
            return 2
    return None


def _channel_axis(node: fx.Node, x: Tensor) -> int:
    """The axis of the channels: the last behind linear layers, the second behind convolutions and by default."""
    if x.ndim != 3:
        return 1
    for _ in range(8):
        node = _source_of(node)
        if node.target in _LAST_AXIS:
            return 2
        if "conv" in str(node.target) or not node.all_input_nodes:
            return 1
        node = node.all_input_nodes[0]
    return 1


def _is_confident(x: Tensor, axis: int) -> bool:
    classes = x.shape[axis]
    if classes < 2:
        return False
    log_p = x.double().log_softmax(axis)
    largest = float(log_p.max(axis).values.exp().mean())
    entropy = float(-(log_p.exp() * log_p).sum(axis).mean())
    chosen = len(log_p.argmax(axis).unique())
    confidence = (largest * classes - 1) / (classes - 1)
    wanted = max(_CONFIDENT_OF_MANY, _CONFIDENT * min(1.0, _FEW_CLASSES / classes))
    return confidence >= wanted and entropy >= _FEWEST_NATS and chosen > 1
