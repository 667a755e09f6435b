"""Captures a model in normal form: the functional ATen graph of ``torch.export``, batch first."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.errors import CalibrationDataError, InfoqError, UnsupportedModelError
from infoq_fx.graph.program.dtypes import cast_inputs, floating_dtypes, note_casts, take_in_float32
from infoq_fx.graph.program.exporting import ExampleInputs, FreeAxes, export_quietly, exporting
from infoq_fx.graph.program.flattening import flatten_program
from infoq_fx.graph.program.functionalization import make_functional
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
_TORCH_FOLDER = str(Path(torch.__file__).parent)


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
    draft = _draft(model, example_inputs, target)
    form = note_casts(draft.form, draft.input_names, given, example_inputs)
    _tell_dtypes(draft.dtypes | set(form.input_dtypes.values()))
    _check_examples(draft, form, _move(example_inputs, target))
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


@dataclass(frozen=True)
class _Draft:
    """One capture of a model, at the sizes of its example inputs. ``dtypes`` are those taken in float32.

    ``program`` is what was exported; ``operations`` are those of the program made functional.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    form: CallForm
    dtypes: set[torch.dtype]
    program: ExportedProgram
    operations: frozenset[Any]


def _draft(
    model: nn.Module | ExportedProgram,
    inputs: ExampleInputs,
    device: torch.device,
    free_axes: FreeAxes | None = None,
) -> _Draft:
    return _flatten(model if isinstance(model, ExportedProgram) else _export_module(model, inputs, free_axes), device)


def _flatten(program: ExportedProgram, device: torch.device) -> _Draft:
    _refuse_training_graph(program)
    functional = _make_functional(program)
    operations = frozenset(node.target for node in functional.graph.nodes if node.op == "call_function")
    flat = flatten_program(functional, device)
    form, dtypes = take_in_float32(flat.graph_module)
    form = replace(form, template=flat.template)
    return _Draft(flat.graph_module, flat.input_names, flat.output_names, form, dtypes, program, operations)


def _try_draft(
    model: nn.Module, inputs: ExampleInputs, device: torch.device, free_axes: FreeAxes | None = None
) -> _Draft | None:
    """A capture at other sizes, None if the model does not take them."""
    try:
        return _draft(model, inputs, device, free_axes)
    except InfoqError:
        return None


def _compare_at(
    model: nn.Module, draft: _Draft, inputs: ExampleInputs, device: torch.device
) -> Literal["equal", "other sizes", "other operations"] | None:
    """How a capture at other sizes differs, None if the model does not take them."""
    try:
        program = _export_module(model, inputs)
        if stay_equal(draft.program, program, draft.operations):
            return "equal"
        other = _flatten(program, device).graph_module
    except InfoqError:
        return None
    if are_equal(draft.graph_module, other):
        return "equal"
    return "other sizes" if same_operations(draft.graph_module, other) else "other operations"


def _tell_dtypes(dtypes: set[torch.dtype]) -> None:
    if dtypes:
        named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        _LOGGER.warning("what the model computes in %s is taken in float32", named)


def _by_name(draft: _Draft, inputs: ExampleInputs) -> dict[str, Tensor]:
    values = [inputs[name] for name in draft.input_names] if isinstance(inputs, Mapping) else inputs
    return dict(zip(draft.input_names, values, strict=True))


def _check_examples(draft: _Draft, form: CallForm, inputs: ExampleInputs) -> None:
    """Run the graph on real inputs: fake tensors accept dtypes that kernels reject, and do not show what is mixed."""
    if isinstance(inputs, Mapping) and set(inputs) != set(draft.input_names):
        return
    examples = {name: form.take(x) for name, x in _by_name(draft, inputs).items()}
    size = _fixed_batch_size(draft.graph_module)
    if any(x.ndim and size not in (None, x.shape[0]) for x in examples.values()):
        return  # of a program with another batch
    _raise_if_inputs_rejected(draft.graph_module, list(examples.values()))
    refuse_other_sample_axes(draft.graph_module, examples)


def _free_batch(
    model: nn.Module, draft: _Draft, inputs: ExampleInputs, batch_size: int, device: torch.device
) -> _Draft:
    """The capture with a free batch where the model wrote its size into the graph, ``int(x.shape[0])``; else a warning.

    The batch is free if captures at other sizes differ only in numbers that grow linearly with it.
    """
    keys = keys_of(inputs)
    sizes = batch_size, batch_size + 1, batch_size + 3
    others = [
        _try_draft(model, resize(inputs, {(key, 0): size for key in keys}), device) for size in sizes[1:]
    ]  # fmt: skip
    found = [draft, *(other for other in others if other is not None)]
    if len(found) == len(sizes):
        examples = {name: draft.form.take(x) for name, x in _by_name(draft, _move(inputs, device)).items()}
        freed = _draft_again(draft)
        free = free_batch([freed.graph_module, *(x.graph_module for x in found[1:])], sizes, examples)
        if free is not None and _fixed_batch_size(free) is None:
            return freed
    place = place_of_difference(draft.graph_module, found[1].graph_module) if len(found) > 1 else ""
    warnings.warn(
        f"the model fixes the batch to the {batch_size} samples of the capture{place and ' ' + place}: the quantized "
        f"module and its file take {batch_size} samples at a time; to keep it free, use x.shape[0] as it is, without "
        "int(), and no Python loop over samples",
        stacklevel=4,
    )
    return draft


def _draft_again(draft: _Draft) -> _Draft:
    return replace(draft, graph_module=copy.deepcopy(draft.graph_module))


def _free_axes(
    model: nn.Module, draft: _Draft, inputs: ExampleInputs, dynamic: Dynamic, device: torch.device
) -> tuple[_Draft, dict[str, tuple[int, ...]]]:
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
    keyed = {keys[name]: axes for name, axes in wanted.items()}
    for extra in (1, 0):  # odd sizes first: paddings to whole blocks differ there
        sizes = {
            (keys[name], axis): examples[name].shape[axis] + 32 * (axis % 3 + 1) + extra
            for name, axes in wanted.items()
            for axis in axes
        }
        found = _compare_at(model, draft, resize(inputs, sizes), device)
        if found is None:
            continue
        if found == "equal":
            return draft, wanted
        if found == "other operations":
            break  # no graph holds for both sizes, and the search for symbolic ones can take minutes
        free = _try_draft(model, inputs, device, keyed)
        if free is not None and same_operations(draft.graph_module, free.graph_module):
            kept = _symbolic_axes(free.graph_module, wanted)
            if kept == wanted or (kept and dynamic == "auto"):
                return free, kept
        break
    if dynamic != "auto":
        named = ", ".join(f"{list(axes)} of input {name!r}" for name, axes in wanted.items())
        raise UnsupportedModelError(
            f"the axes {named} cannot stay free: the model's graph depends on their sizes; leave them out of dynamic, "
            'or take dynamic="auto" for those that can'
        )
    return draft, {}


def _symbolic_axes(graph_module: fx.GraphModule, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.target in wanted:
            shape = node.meta["val"].shape
            axes = tuple(axis for axis in wanted[str(node.target)] if not is_concrete_int(shape[axis]))
            found |= {str(node.target): axes} if axes else {}
    return found


def _export_module(
    model: nn.Module, example_inputs: ExampleInputs, free_axes: FreeAxes | None = None
) -> ExportedProgram:
    with exporting(), _inference_mode_of(model), _masks_taken_as_given(model):
        # While another thread exports the same model, its parameters are swapped.
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            raise UnsupportedModelError("the model's parameters are on the meta device: load their values first")
        home = tensors[0].device if tensors else torch.device("cpu")
        at_home = _in_signature_order(model, _move(example_inputs, home))
        try:
            return _export_in_own_dtype(model, at_home, free_axes)
        except Exception as error:
            place = _place_in_model(error.__traceback__, model)
            _raise_if_inputs_rejected(model, at_home)
            raise UnsupportedModelError(
                f"torch.export cannot capture {type(model).__name__}: {place}: {_first_lines(error)}; "
                "rewrite that part without data-dependent Python control flow, or quantize a submodule"
            ) from error


def _export_in_own_dtype(model: nn.Module, inputs: ExampleInputs, free_axes: FreeAxes | None) -> ExportedProgram:
    """Export a model; one of half or double precision that rejects float32 gets inputs of its own dtype."""
    try:
        return export_quietly(model, inputs, free_axes)
    except Exception:
        own = floating_dtypes(model)
        given = inputs.values() if isinstance(inputs, Mapping) else inputs
        if len(own) != 1 or torch.float32 in own or not any(x.dtype == torch.float32 for x in given):
            raise
        (dtype,) = own
        return export_quietly(model, cast_inputs(inputs, dtype), free_axes)


def _in_signature_order(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    if not isinstance(inputs, Mapping):
        return inputs
    order = [name for name in inspect.signature(model.forward).parameters if name in inputs]
    return {name: inputs[name] for name in dict.fromkeys([*order, *inputs])}


def _raise_if_inputs_rejected(model: nn.Module, example_inputs: ExampleInputs) -> None:
    named = isinstance(example_inputs, Mapping)
    args = () if named else example_inputs
    kwargs = example_inputs if isinstance(example_inputs, Mapping) else {}
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        shown = [*args, *kwargs.values()]
        found = ", ".join(f"{x.dtype} {list(x.shape)}" for x in shown)
        raise CalibrationDataError(
            f"the model rejects a calibration batch of {found}: {_first_lines(error)}; "
            "give inputs of the shape and dtype that the model's forward takes"
        ) from error


@contextlib.contextmanager
def _inference_mode_of(model: nn.Module) -> Iterator[None]:
    # Flags are set one by one: eval() and train() may be overridden, and submodules may differ in mode.
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _masks_taken_as_given(model: nn.Module) -> Iterator[None]:
    """Keep torch's transformers from comparing a mask with a causal one, which no graph can; the mask is the same."""

    def set_flag(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = "is_causal" if isinstance(module, nn.TransformerEncoder) else "tgt_is_causal"
        place = list(inspect.signature(module.forward).parameters).index(name)
        is_given = len(args) > place or kwargs.get(name) is not None
        return args, kwargs if is_given else {**kwargs, name: False}

    kinds = (nn.TransformerEncoder, nn.TransformerDecoder)
    masked = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_pre_hook(set_flag, with_kwargs=True) for module in masked]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _place_in_model(traceback: TracebackType | None, model: nn.Module) -> str:
    paths = {id(module): path for path, module in model.named_modules()}
    place = "in its forward"
    while traceback is not None:
        frame = traceback.tb_frame
        owner = frame.f_locals.get("self")
        if id(owner) in paths and not frame.f_code.co_filename.startswith(_TORCH_FOLDER):
            path = paths[id(owner)] or type(model).__name__
            place = f"in {path!r} ({Path(frame.f_code.co_filename).name}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def _first_lines(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def _refuse_training_graph(program: ExportedProgram) -> None:
    batch_norm, dropout = torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default
    for node in program.graph.nodes:
        trains = (node.target is batch_norm and node.args[5]) or (node.target is dropout and node.args[2])
        if trains:
            raise UnsupportedModelError(
                f"the program was exported in training mode ({node.name}): call model.eval() before torch.export"
            )


def _reserved_advice(error: Exception) -> str:
    """What to do where torch itself has an attribute of the name of a parameter or module; empty for other errors."""
    is_taken = any(part in str(error) for part in ("already exists", "references nonexistent attribute"))
    return ", or rename its attribute that torch's own graphs have too" if is_taken else ""


def _make_functional(program: ExportedProgram) -> ExportedProgram:
    try:
        return make_functional(program)
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.export cannot make the graph functional: {_first_lines(error)}; rewrite the in-place parts of the "
            f"model{_reserved_advice(error)}"
        ) from error


def _move(inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    if isinstance(inputs, Mapping):
        return {name: x.to(device) for name, x in inputs.items()}
    return tuple(x.to(device) for x in inputs)


def _fixed_batch_size(graph_module: fx.GraphModule) -> int | None:
    for node in graph_module.graph.nodes:
        # A size that the graph specialised is still a SymInt.
        if node.op == "placeholder" and node.meta["val"].ndim and is_concrete_int(node.meta["val"].shape[0]):
            return int(node.meta["val"].shape[0])
    return None
