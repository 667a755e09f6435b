"""How a model is called and how it answers, where a graph of float32 tensors cannot hold that itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["CallForm", "OutputTemplate", "flatten_tensors"]


@dataclass(frozen=True)
class OutputTemplate:
    """The structure of a model's own outputs: a tree with constants at some leaves and the graph's tensors at others.

    ``tensors`` are the positions, among the leaves, of the graph's outputs in their order; ``numbers`` are those of
    them that the model gives as a number of Python's. ``constants`` has the value of every other leaf.
    """

    tree: pytree.TreeSpec
    tensors: tuple[int, ...]
    constants: Mapping[int, Any] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    def fill(self, found: Sequence[Tensor]) -> Any:
        """Return the model's own structure around the outputs of its graph."""
        leaves: list[Any] = [self.constants.get(index) for index in range(self.tree.num_leaves)]
        for index, value in zip(self.tensors, found, strict=True):
            leaves[index] = value.item() if index in self.numbers else value
        return pytree.tree_unflatten(leaves, self.tree)

    def read(self, outputs: Any) -> list[Any]:
        """Return the outputs of the graph from the model's own structure, in order; the inverse of :meth:`fill`."""
        leaves = pytree.tree_leaves(outputs)
        return [leaves[index] for index in self.tensors]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A class that lives in a function cannot be found again.
        kept: Any = (self.tree, self.tensors, dict(self.constants), self.numbers)
        try:
            pickle.dumps(kept)
        except Exception:
            return _forget, ()
        return OutputTemplate, kept


@dataclass(frozen=True)
class CallForm:
    """Dtypes of a model's inputs by name and of its outputs by position, where they are not the graph's float32.

    ``template`` is None where the graph has the structure of the model's outputs itself. ``is_float_in_file`` tells
    that a file takes float32 all the same, as the model itself does.
    """

    input_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    output_dtypes: Mapping[int, torch.dtype] = field(default_factory=dict)
    template: OutputTemplate | None = None
    is_float_in_file: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the graph takes and gives what the model does."""
        return not self.input_dtypes and not self.output_dtypes and self.template is None

    def take(self, value: Any) -> Any:
        """Return an input as the graph takes it."""
        is_narrow = isinstance(value, Tensor) and value.dtype in self.input_dtypes.values()
        return value.float() if is_narrow else value

    def take_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs by name as the graph takes them."""
        return {name: x.float() if x.dtype == self.input_dtypes.get(name) else x for name, x in inputs.items()}

    def file_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs in the dtypes that a file takes: the model's own, but float32 for bfloat16."""
        wanted = self.file_dtypes
        return {
            name: x.to(wanted.get(name, torch.float32)) if name in self.input_dtypes else x
            for name, x in inputs.items()
        }

    @property
    def file_dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the inputs that a file takes in another dtype than float32; runtimes have no bfloat16 arrays."""
        found = {} if self.is_float_in_file else self.input_dtypes
        return {name: dtype for name, dtype in found.items() if dtype != torch.bfloat16}

    def give(self, value: Any, *, narrow: bool = True) -> Any:
        """Return the graph's outputs as the model gives them; ``narrow`` tells whether in its own dtypes."""
        if self.output_dtypes and narrow:
            leaves, tree = pytree.tree_flatten(value)
            leaves = [x.to(self.output_dtypes.get(index, x.dtype)) for index, x in enumerate(leaves)]
            value = pytree.tree_unflatten(leaves, tree)
        return value if self.template is None else self.template.fill(flatten_tensors(value))


def flatten_tensors(value: Any) -> tuple[Tensor, ...]:
    """Return all tensors of a model's outputs, whatever their structure, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, tuple | list):
        items = list(value)
    elif hasattr(value, "__dataclass_fields__"):
        items = [getattr(value, name) for name in value.__dataclass_fields__]
    else:
        items = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    return tuple(tensor for item in items for tensor in flatten_tensors(item))


def _forget() -> None:
    return None
