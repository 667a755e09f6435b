"""Drafts of a capture: a model exported at given sizes, as a graph module in normal form."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from infoq_fx.errors import CalibrationDataError, InfoqError, UnsupportedModelError
from infoq_fx.graph.program.dtypes import cast_inputs, floating_dtypes, take_in_float32
from infoq_fx.graph.program.exporting import ExampleInputs, FreeAxes, export_quietly, exporting
from infoq_fx.graph.program.flattening import flatten_program
from infoq_fx.graph.program.functionalization import copy_functional, make_functional
from infoq_fx.quantization.call_forms import CallForm

__all__ = [
    "Draft",
    "accepts_inputs",
    "draft_program",
    "export_module",
    "make_draft",
    "move_inputs",
    "on_equal_terms",
    "raise_if_inputs_rejected",
    "try_draft",
]

_TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Draft:
    """One capture of a model, at the sizes of its example inputs. ``dtypes`` are those taken in float32.

    ``program`` is what was exported; ``operations`` are those of the program made functional. ``is_copied`` tells how:
    by :func:`copy_functional`, or by torch, whose graphs have other operations on memory.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    form: CallForm
    dtypes: set[torch.dtype]
    program: ExportedProgram
    operations: frozenset[Any]
    is_copied: bool


def make_draft(
    model: nn.Module | ExportedProgram,
    inputs: ExampleInputs,
    device: torch.device,
    free_axes: FreeAxes | None = None,
) -> Draft:
    """Export a model, with ``free_axes`` symbolic, and turn it into a graph module on a device.

    Raises:
        UnsupportedModelError: torch cannot export the model; the message names the module and torch's reason.
        CalibrationDataError: the model itself rejects the inputs.
    """
    program = model if isinstance(model, ExportedProgram) else export_module(model, inputs, free_axes)
    return draft_program(program, device)


def try_draft(
    model: nn.Module, inputs: ExampleInputs, device: torch.device, free_axes: FreeAxes | None = None
) -> Draft | None:
    """Return what :func:`make_draft` does, None if the model does not take these sizes."""
    try:
        return make_draft(model, inputs, device, free_axes)
    except InfoqError:
        return None


def draft_program(program: ExportedProgram, device: torch.device, *, may_copy: bool = True) -> Draft:
    """Turn an exported program into a graph module; without ``may_copy`` torch makes it functional in any case."""
    _refuse_training_graph(program)
    copied = copy_functional(program) if may_copy else None
    functional = copied or _make_functional(program)
    operations = frozenset(node.target for node in functional.graph.nodes if node.op == "call_function")
    flat = flatten_program(functional, device)
    form, dtypes = take_in_float32(flat.graph_module)
    form = replace(form, template=flat.template)
    names = flat.input_names, flat.output_names
    return Draft(flat.graph_module, *names, form, dtypes, program, operations, copied is not None)


def on_equal_terms(drafts: Sequence[Draft], device: torch.device) -> list[Draft]:
    """Return drafts that can be compared: all of them copied, or all as torch makes them functional.

    Where torch cannot do that, they are returned as they are, and differ.
    """
    if len({draft.is_copied for draft in drafts}) == 1:
        return list(drafts)
    try:
        return [draft_program(x.program, device, may_copy=False) if x.is_copied else x for x in drafts]
    except InfoqError:
        return list(drafts)


def export_module(
    model: nn.Module, example_inputs: ExampleInputs, free_axes: FreeAxes | None = None
) -> ExportedProgram:
    """Export a model for inference; see :func:`make_draft`."""
    with exporting(), _inference_mode_of(model), _masks_taken_as_given(model):
        # While another thread exports the same model, its parameters are swapped.
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            raise UnsupportedModelError("the model's parameters are on the meta device: load their values first")
        home = tensors[0].device if tensors else torch.device("cpu")
        at_home = _in_signature_order(model, move_inputs(example_inputs, home))
        try:
            return _export_in_own_dtype(model, at_home, free_axes)
        except Exception as error:
            place = _place_in_model(error.__traceback__, model)
            raise_if_inputs_rejected(model, at_home)
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


def accepts_inputs(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Return whether a model runs on inputs, True if that is not known.

    A copy of it runs, since a model may keep something of a run. That takes less time than an export that fails. A
    model on a GPU is not run: an index out of range would end all use of the GPU by this process.
    """
    if any(tensor.device.type != "cpu" for tensor in [*model.parameters(), *model.buffers()]):
        return True
    try:
        copied = copy.deepcopy(model)
    except Exception:  # as of modules that hold results of a computation with gradients
        return True
    try:
        with _inference_mode_of(copied):
            raise_if_inputs_rejected(copied, move_inputs(inputs, torch.device("cpu")))
    except CalibrationDataError:
        return False
    return True


def raise_if_inputs_rejected(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a model, and raise a CalibrationDataError if it fails."""
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


def move_inputs(inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    """Return inputs on a device, in the same structure."""
    if isinstance(inputs, Mapping):
        return {name: x.to(device) for name, x in inputs.items()}
    return tuple(x.to(device) for x in inputs)
