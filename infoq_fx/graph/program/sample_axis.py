"""Refuses models whose samples do not lie along the first dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from infoq_fx.errors import UnsupportedModelError
from infoq_fx.quantization.call_forms import flatten_tensors

__all__ = ["refuse_other_sample_axes"]


def refuse_other_sample_axes(graph_module: fx.GraphModule, examples: Mapping[str, Tensor]) -> None:
    """Refuse a model that takes ``[tokens, samples, ...]``: what it computes for samples does not mix them.

    It is one if the values of an output mix along the first dimension of the inputs, and not along the second.

    Args:
        graph_module: in normal form, with a free batch.
        examples: two samples or more by input name.

    Raises:
        UnsupportedModelError: the second dimension has the samples.
    """
    batched = {name: x for name, x in examples.items() if x.ndim > 2}
    if not batched:
        return
    name, first = next(iter(batched.items()))
    width = first.shape[1]
    if width < 2 or any(x.shape[1] != width for x in batched.values()):
        return
    expected = _run(graph_module, examples)
    along_first = _run(graph_module, {key: _repeat_last(x, 0) for key, x in examples.items()})
    if _keeps_last(expected, along_first, 0, first.shape[0]):
        return
    along_second = _run(graph_module, {key: _repeat_last(x, 1) if key in batched else x for key, x in examples.items()})
    axes = (1, 0) if any(x.ndim and x.shape[0] == width for x in expected) else (1,)
    if any(_keeps_last(expected, along_second, axis, width) for axis in axes):
        raise UnsupportedModelError(
            f"the model mixes values along the first dimension of input {name!r} {list(first.shape)} and not along the "
            "second, as batch_first=False has it, and samples must come first; wrap it in a module that takes "
            "[samples, ...] and transposes inputs and outputs (x.transpose(0, 1))"
        )


def _run(graph_module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return flatten_tensors(graph_module(*inputs.values()))


def _repeat_last(x: Tensor, axis: int) -> Tensor:
    """The input with all but its last entry along an axis replaced by the last."""
    if x.ndim <= axis:
        return x
    size = x.shape[axis]
    return x.index_select(axis, torch.full((size,), size - 1, device=x.device))


def _keeps_last(expected: Sequence[Tensor], found: Sequence[Tensor], axis: int, size: int) -> bool:
    """Whether an output has an entry for each along the axis, of which the last is the same in both runs."""
    for ours, theirs in zip(expected, found, strict=True):
        if ours.ndim > axis and ours.shape == theirs.shape and ours.shape[axis] == size and ours.is_floating_point():
            a, b = (x.select(axis, size - 1).double() for x in (ours, theirs))
            if bool((a - b).norm() <= 1e-3 * a.norm()):
                return True
    return False
