"""The structure of a module's outputs as plain values that a file can hold, without code."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from infoq_fx.conversion.quantized import plain_graph
from infoq_fx.errors import OptionError
from infoq_fx.graph.reading_choice import list_output_nodes
from infoq_fx.quantization.call_forms import CallForm, OutputTemplate

__all__ = ["decode_form", "describe_form", "flat_graph"]


def flat_graph(quantized: nn.Module) -> nn.Module:
    """Return a module that gives all tensors of a quantized module's graph in one tuple, or as the only one itself."""
    plain = plain_graph(quantized)
    if not isinstance(plain, fx.GraphModule):
        return plain
    nodes = list_output_nodes(plain)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(plain.graph, copies)
    graph.output(copies[nodes[0]] if len(nodes) == 1 else tuple(copies[node] for node in nodes))
    return fx.GraphModule(plain, graph)


def describe_form(form: CallForm, outputs: Any) -> dict[str, Any]:
    """Describe how a module answers.

    Dicts, lists, tuples, tensors and constants are kept. A named tuple becomes a tuple, and an object with fields a
    dict, which is logged: their classes would be code.

    Args:
        form: of the module.
        outputs: what it gives for a batch.
    """
    numbers = set() if form.template is None else set(form.template.numbers)
    counter = iter(range(1 << 30))
    leaf = iter(range(1 << 30))

    def describe(value: Any) -> Any:
        if isinstance(value, collections.OrderedDict):
            return {"ordered": [[str(key), describe(item)] for key, item in value.items()]}
        if isinstance(value, Mapping):
            if type(value) is not dict:
                _tell(value, "a dict")
            return {"dict": [[str(key), describe(item)] for key, item in value.items()]}
        if isinstance(value, tuple | list):
            if hasattr(value, "_fields"):
                _tell(value, "a tuple")
            return {"list" if isinstance(value, list) else "tuple": [describe(item) for item in value]}
        if is_dataclass(value) and not isinstance(value, type):
            _tell(value, "a dict")
            return {"dict": [[one.name, describe(getattr(value, one.name))] for one in fields(value)]}
        index = next(leaf)
        if isinstance(value, Tensor):
            return {"tensor": next(counter)}
        if index in numbers:
            return {"number": next(counter)}
        return {"value": value if isinstance(value, bool | int | float | str) else None}

    return {
        "outputs": describe(outputs),
        "input_dtypes": {name: _name(dtype) for name, dtype in form.input_dtypes.items()},
        "output_dtypes": {str(index): _name(dtype) for index, dtype in form.output_dtypes.items()},
        "is_float_in_file": form.is_float_in_file,
    }


def decode_form(described: Any) -> CallForm:
    """Return the form that :func:`describe_form` described.

    Raises:
        OptionError: it describes none.
    """
    try:
        tree = described["outputs"]
        inputs = {str(name): _DTYPES[dtype] for name, dtype in described["input_dtypes"].items()}
        outputs = {int(index): _DTYPES[dtype] for index, dtype in described["output_dtypes"].items()}
        template = None if _is_plain(tree) else _decode_template(tree)
        return CallForm(inputs, outputs, template, bool(described["is_float_in_file"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptionError("its structure of outputs is damaged") from error


@dataclass(frozen=True)
class _Place:
    """Where an output of the graph is put."""

    index: int
    is_number: bool


_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {"dict": dict, "ordered": collections.OrderedDict}


def _decode_template(tree: Any) -> OutputTemplate:
    leaves, spec = pytree.tree_flatten(_build(tree))
    places = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, _Place)}
    tensors = tuple(sorted(places, key=lambda index: places[index].index))
    constants = {index: leaf for index, leaf in enumerate(leaves) if index not in places}
    return OutputTemplate(spec, tensors, constants, tuple(i for i, place in places.items() if place.is_number))


def _build(tree: Mapping[str, Any]) -> Any:
    ((kind, value),) = tree.items()
    if kind in ("tensor", "number"):
        return _Place(int(value), kind == "number")
    if kind in _CONTAINERS:
        return _CONTAINERS[kind]((str(key), _build(item)) for key, item in value)
    if kind in ("list", "tuple"):
        items = [_build(item) for item in value]
        return items if kind == "list" else tuple(items)
    return tree["value"]


def _is_plain(tree: Mapping[str, Any]) -> bool:
    """Whether the graph gives this itself: a tensor, or a tuple of several."""
    return "tensor" in tree or (len(tree.get("tuple", ())) > 1 and all("tensor" in item for item in tree["tuple"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tell(value: Any, kind: str) -> None:
    logging.getLogger(__name__).warning("outputs of class %s are %s once loaded", type(value).__qualname__, kind)
