"""Puts samples into the form that a captured model takes: by input name, of its shapes, on its device."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from infoq_fx.core.data import CalibrationData, ForwardArguments, read_data
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.graph.capture import CapturedModel
from infoq_fx.quantization.prepared import PreparedModel

__all__ = ["Inputs", "check_against_graph", "choose_example_inputs", "find_arguments", "fit_data", "name_examples"]


def find_arguments(model: nn.Module | ExportedProgram) -> ForwardArguments | None:
    """Return what a model's forward takes; None for a forward that passes everything on (``*args, **kwargs``)."""
    if isinstance(model, ExportedProgram):
        return ForwardArguments.exactly([str(name) for name in model.graph_signature.user_inputs])
    parameters = inspect.signature(model.forward).parameters.values()
    named = [x for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
    is_open = any(x.kind is x.VAR_POSITIONAL for x in parameters)
    if is_open and any(x.kind is x.VAR_KEYWORD for x in parameters):
        return None
    required = sum(x.default is x.empty for x in named)
    return ForwardArguments(tuple(x.name for x in named), required, is_open)


Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def choose_example_inputs(
    model: nn.Module | ExportedProgram, data: CalibrationData | None, example_inputs: Inputs | None
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Return example inputs from the data, else from ``example_inputs``, else from the exported program.

    Raises:
        OptionError: none of these is given.
        CalibrationDataError: the data has entries that the model's forward does not take.
    """
    if data is not None:
        _check_entries(model, data)
        _tell_of_labels(model, data)
        return data.example_inputs
    if example_inputs is not None:
        given = example_inputs if isinstance(example_inputs, Tensor | Mapping) else [(tuple(example_inputs), None)]
        batch = read_data(given, find_arguments(model))
        return batch.example_inputs
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        return dict(kwargs) if kwargs else tuple(args)
    raise OptionError(
        "without calibration data no inputs are known; give example_inputs=(one batch) or an exported program"
    )


def _check_entries(model: nn.Module | ExportedProgram, data: CalibrationData) -> None:
    if isinstance(model, ExportedProgram) or data.is_positional:
        return
    parameters = inspect.signature(model.forward).parameters
    unknown = [name for name in data.inputs if name not in parameters]
    if unknown and not any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        raise CalibrationDataError(
            f"calibration data has {', '.join(map(repr, unknown))}, and the model's forward takes "
            f"{', '.join(map(repr, parameters))}: leave out what it does not take"
        )


def _tell_of_labels(model: nn.Module | ExportedProgram, data: CalibrationData) -> None:
    """Say where the last tensor of a batch is taken for labels that no class is, and may be an optional input."""
    arguments = find_arguments(model)
    is_odd = data.labels is not None and data.labels.is_floating_point() and data.labels.ndim > 1
    if is_odd and data.is_positional and arguments is not None and len(arguments.names) > len(data.inputs):
        logging.getLogger(__name__).warning(
            "the last tensor of each batch is read as labels; if it is the input %r, give [((x, ...), None), ...]",
            arguments.names[len(data.inputs)],
        )


def name_examples(
    captured: CapturedModel, inputs: tuple[Tensor, ...] | dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Return example inputs by the model's input names, in batches of the size that the graph takes.

    Raises:
        CalibrationDataError: the model does not take these inputs.
    """
    given = inputs if isinstance(inputs, dict) else [(inputs, None)]
    held = read_data(given, ForwardArguments.exactly(captured.input_names)).named(captured.input_names)
    held = replace(held, inputs=captured.form.take_inputs(held.inputs))
    check_against_graph(captured.graph_module, held)
    rows = torch.arange(captured.batch_size or max(2, held.samples)) % held.samples
    return {name: x[rows.to(x.device)].to(device) for name, x in held.inputs.items()}


def fit_data(prepared: PreparedModel, data: CalibrationData) -> CalibrationData:
    """Return data by the model's input names, on its device, in whole batches if the graph's batch size is fixed.

    Raises:
        CalibrationDataError: the model does not take these names, shapes or dtypes, or there is less than one batch.
    """
    named = data.named(prepared.input_names)
    named = replace(named, inputs=prepared.form.take_inputs(named.inputs))
    check_against_graph(prepared.graph_module, named)
    if prepared.batch_size is not None:
        whole = named.samples - named.samples % prepared.batch_size
        if whole == 0:
            raise CalibrationDataError(
                f"the model is fixed to batches of {prepared.batch_size}, the data holds {named.samples} samples; "
                "give at least one batch"
            )
        named = named.take(whole)
    device = prepared.device
    return named.to(device)


def check_against_graph(graph_module: fx.GraphModule, data: CalibrationData) -> None:
    """Check that the graph takes inputs of these shapes and dtypes.

    Raises:
        CalibrationDataError: it does not.
    """
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        wanted, found = node.meta["val"], data.inputs[str(node.target)]
        fits = wanted.ndim == found.ndim and wanted.dtype == found.dtype
        sizes = zip(wanted.shape[1:], found.shape[1:], strict=True) if fits else ()
        if not fits or any(isinstance(w, int) and w != f for w, f in sizes):
            shape = [size if isinstance(size, int) else "any" for size in wanted.shape]
            raise CalibrationDataError(
                f"input {node.target!r} takes {wanted.dtype} {['samples', *shape[1:]]}, the data has {found.dtype} "
                f"{['samples', *found.shape[1:]]}: resize or convert the data"
            )
