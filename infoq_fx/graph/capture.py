"""Captures a model in normal form: the functional ATen graph of ``torch.export``, batch first."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.errors import InfoqError, UnsupportedModelError
from infoq_fx.graph.program.drafts import (
    Draft,
    accepts_inputs,
    draft_program,
    export_module,
    make_draft,
    move_inputs,
    on_equal_terms,
    raise_if_inputs_rejected,
    try_draft,
)
from infoq_fx.graph.program.dtypes import cast_inputs, floating_dtypes, note_casts
from infoq_fx.graph.program.exporting import ExampleInputs
from infoq_fx.graph.program.sample_axis import refuse_other_sample_axes
from infoq_fx.graph.program.sizes import (
    Dynamic,
    are_equal,
    choose_axes,
    free_batch,
    keys_of,
    place_of_difference,
    resize,
    same_operations,
    stay_equal,
)
from infoq_fx.quantization.call_forms import CallForm

__all__ = ["CapturedModel", "capture"]

_LOGGER = logging.getLogger(__name__)
_Difference = Literal["nothing", "sizes", "operations"]
_MAY_BE_FREE = ("nothing", "sizes")


@dataclass(frozen=True)
class CapturedModel:
    """A model in normal form, the result of :func:`capture`.

    ``graph_module`` takes the model's tensor inputs by position or by name, holds copies of its parameters under
    their own paths, and has fake tensors with shapes in ``node.meta["val"]``. ``batch_size`` is None if the
    first dimension of every input is dynamic, else the size that the graph is fixed to. ``form`` tells how the model
    itself is called and answers, where the graph cannot. ``free_axes`` are axes besides the first, by input name,
    that may have any size; the fake tensors may have the example's sizes there.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    batch_size: int | None
    form: CallForm = field(default_factory=CallForm)
    free_axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs,
    *,
    device: torch.device | str = "cpu",
    dynamic: Dynamic = "auto",
) -> CapturedModel:
    """Capture a model for inference; the model itself is not changed.

    Args:
        model: an ``nn.Module`` (an ``fx.GraphModule`` too), in any mode, or an ``ExportedProgram``.
        example_inputs: one batch of at least two samples, positional or by name, each ``[samples, ...]``.
        device: of the captured copy.
        dynamic: axes besides the first that stay free, see :func:`infoq_fx.quantize`.

    Returns:
        The functional graph without dropout; views become reshapes, and batch norms are still separate nodes.

    Raises:
        UnsupportedModelError: torch cannot export the model; the message names the module and torch's reason.
        CalibrationDataError: the model itself rejects the example inputs.
        OptionError: ``dynamic`` does not fit the inputs.
    """
    given, target = example_inputs, torch.device(device)
    if isinstance(model, nn.Module) and floating_dtypes(model) == {torch.float32}:
        example_inputs = cast_inputs(given, torch.float32)  # what a model of float32 would reject
    draft = make_draft(model, example_inputs, target)
    form = note_casts(draft.form, draft.input_names, given, example_inputs)
    _tell_dtypes(draft.dtypes | set(form.input_dtypes.values()))
    _check_examples(draft, form, move_inputs(example_inputs, target))
    batch_size = _fixed_batch_size(draft.graph_module)
    if isinstance(model, nn.Module):
        as_is = draft
        draft, free_axes = _free_axes(model, draft, example_inputs, dynamic, target)
        if batch_size is not None:
            draft, free_axes = (as_is, free_axes if draft is as_is else {})
            draft = _free_batch(model, draft, example_inputs, batch_size, target)
            batch_size = _fixed_batch_size(draft.graph_module)
    else:
        every = {name: tuple(range(1, x.ndim)) for name, x in _by_name(draft, example_inputs).items()}
        free_axes = _symbolic_axes(draft.graph_module, every)
    return CapturedModel(draft.graph_module, draft.input_names, draft.output_names, batch_size, form, free_axes)


def _tell_dtypes(dtypes: set[torch.dtype]) -> None:
    if dtypes:
        named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        _LOGGER.warning("what the model computes in %s is taken in float32", named)


def _by_name(draft: Draft, inputs: ExampleInputs) -> dict[str, Tensor]:
    values = [inputs[name] for name in draft.input_names] if isinstance(inputs, Mapping) else inputs
    return dict(zip(draft.input_names, values, strict=True))


def _check_examples(draft: Draft, form: CallForm, inputs: ExampleInputs) -> None:
    """Run the graph on real inputs: fake tensors accept dtypes that kernels reject, and do not show what is mixed."""
    if isinstance(inputs, Mapping) and set(inputs) != set(draft.input_names):
        return
    examples = {name: form.take(x) for name, x in _by_name(draft, inputs).items()}
    size = _fixed_batch_size(draft.graph_module)
    if any(x.ndim and size not in (None, x.shape[0]) for x in examples.values()):
        return  # of a program with another batch
    raise_if_inputs_rejected(draft.graph_module, list(examples.values()))
    refuse_other_sample_axes(draft.graph_module, examples)


def _free_batch(model: nn.Module, draft: Draft, inputs: ExampleInputs, batch_size: int, device: torch.device) -> Draft:
    """The capture with a free batch where the model wrote its size into the graph, ``int(x.shape[0])``; else a warning.

    The batch is free if captures at other sizes differ only in numbers that grow linearly with it.
    """
    keys = keys_of(inputs)
    sizes = batch_size, batch_size + 1, batch_size + 3
    others = [
        try_draft(model, resize(inputs, {(key, 0): size for key in keys}), device) for size in sizes[1:]
    ]  # fmt: skip
    found = on_equal_terms([draft, *(other for other in others if other is not None)], device)
    if len(found) == len(sizes):
        examples = {name: draft.form.take(x) for name, x in _by_name(draft, move_inputs(inputs, device)).items()}
        freed = replace(found[0], graph_module=copy.deepcopy(found[0].graph_module))
        free = free_batch([freed.graph_module, *(x.graph_module for x in found[1:])], sizes, examples)
        if free is not None and _fixed_batch_size(free) is None:
            return freed
    place = place_of_difference(found[0].graph_module, found[1].graph_module) if len(found) > 1 else ""
    warnings.warn(
        f"the model fixes the batch to the {batch_size} samples of the capture{place and ' ' + place}: the quantized "
        f"module and its file take {batch_size} samples at a time; to keep it free, use x.shape[0] as it is, without "
        "int(), and no Python loop over samples",
        stacklevel=4,
    )
    return draft


def _free_axes(
    model: nn.Module, draft: Draft, inputs: ExampleInputs, dynamic: Dynamic, device: torch.device
) -> tuple[Draft, dict[str, tuple[int, ...]]]:
    """The capture with further axes free, and these, by input name.

    Axes are free in the capture as it is if captures at other sizes are the same. Else ``torch.export`` is asked for
    symbolic sizes, whose capture is taken if its operations are the same.

    Raises:
        OptionError: ``dynamic`` names an input or an axis that is not there.
        UnsupportedModelError: an axis that it names cannot be free.
    """
    examples = _by_name(draft, inputs)
    wanted = choose_axes(examples, dynamic)
    if not wanted:
        return draft, {}
    keys = dict(zip(examples, keys_of(inputs) if not isinstance(inputs, Mapping) else examples, strict=True))
    compare = functools.partial(_compare, model, draft, inputs, examples, keys, device)
    left, difference = wanted, compare(wanted)
    if difference == "operations" and dynamic == "auto":
        # Some of the axes alone may be free. The search for symbolic sizes can take minutes: not all are asked for.
        alone = {name: [a for a in axes if compare({name: (a,)}) in _MAY_BE_FREE] for name, axes in wanted.items()}
        left = {name: tuple(axes) for name, axes in alone.items() if axes}
        difference = compare(left) if left and left != wanted else None
    if difference == "nothing":
        return draft, left
    if difference == "sizes":
        free = try_draft(model, inputs, device, {keys[name]: axes for name, axes in left.items()})
        if free is not None and _have_same_operations(draft, free, device):
            kept = _symbolic_axes(free.graph_module, left)
            if kept == wanted or (kept and dynamic == "auto"):
                return free, kept
    if dynamic != "auto":
        named = ", ".join(f"{list(axes)} of input {name!r}" for name, axes in wanted.items())
        raise UnsupportedModelError(
            f"the axes {named} cannot stay free: the model's graph depends on their sizes; leave them out of dynamic, "
            'or take dynamic="auto" for those that can'
        )
    return draft, {}


def _compare(
    model: nn.Module,
    draft: Draft,
    inputs: ExampleInputs,
    examples: Mapping[str, Tensor],
    keys: Mapping[str, str | int],
    device: torch.device,
    axes: Mapping[str, Sequence[int]],
) -> _Difference | None:
    """What differs in captures at other sizes of some axes, None if the model takes no others.

    Odd sizes come first: paddings to whole blocks differ there. Where they have other operations, whole blocks are
    tried.
    """
    worst: _Difference | None = None
    for extra in (1, 0):
        sizes = {
            (keys[name], axis): examples[name].shape[axis] + 32 * (axis % 3 + 1) + extra
            for name, some in axes.items()
            for axis in some
        }
        found = _compare_at(model, draft, resize(inputs, sizes), device)
        if found is not None and found != "operations":
            return "sizes" if worst == "operations" else found
        worst = worst or found
    return worst


def _compare_at(model: nn.Module, draft: Draft, inputs: ExampleInputs, device: torch.device) -> _Difference | None:
    """What differs in a capture of other inputs, None if the model does not take them."""
    if not accepts_inputs(model, inputs):
        return None
    try:
        program = export_module(model, inputs)
        if stay_equal(draft.program, program, draft.operations):
            return "nothing"
        if not same_operations(draft.program.graph_module, program.graph_module):
            return "operations"
        first, other = on_equal_terms([draft, draft_program(program, device)], device)
    except InfoqError:
        return None
    if are_equal(first.graph_module, other.graph_module):
        return "nothing"
    return "sizes" if same_operations(first.graph_module, other.graph_module) else "operations"


def _have_same_operations(draft: Draft, other: Draft, device: torch.device) -> bool:
    first, second = on_equal_terms([draft, other], device)
    return same_operations(first.graph_module, second.graph_module)


def _symbolic_axes(graph_module: fx.GraphModule, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.target in wanted:
            shape = node.meta["val"].shape
            axes = tuple(axis for axis in wanted[str(node.target)] if not is_concrete_int(shape[axis]))
            found |= {str(node.target): axes} if axes else {}
    return found


def _fixed_batch_size(graph_module: fx.GraphModule) -> int | None:
    for node in graph_module.graph.nodes:
        # A size that the graph specialised is still a SymInt.
        if node.op == "placeholder" and node.meta["val"].ndim and is_concrete_int(node.meta["val"].shape[0]):
            return int(node.meta["val"].shape[0])
    return None
