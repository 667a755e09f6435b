"""Saves and loads quantized modules as ``.pt2`` files: an exported program with the module's provenance."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from infoq_fx.allocation.allocation_file import decode_allocation, describe_allocation
from infoq_fx.conversion.quantized import Provenance, QuantizedModule, provenance_of, wrap_quantized
from infoq_fx.core.atomic_files import check_format, write_atomically
from infoq_fx.core.option_checks import check_device
from infoq_fx.core.readings import Reading, decode_reading, describe_reading
from infoq_fx.errors import ExportError, OptionError, UnsupportedModelError
from infoq_fx.export.saved_structure import decode_form, describe_form, flat_graph
from infoq_fx.graph.passes.annotate_bits import read_bits
from infoq_fx.graph.program.exporting import FreeAxes, export_quietly, load_quietly
from infoq_fx.graph.program.flattening import flatten_program
from infoq_fx.graph.reading_choice import choose_readings
from infoq_fx.quantization.call_forms import CallForm, flatten_tensors
from infoq_fx.types import Allocation

__all__ = ["load_quantized", "refuse_code", "save_quantized"]

_EXTRA_FILE = "infoq_fx.json"
_FORMAT = "infoq_fx quantized module"
_VERSION = 1
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
# Sizes in a graph are sympy's Add(Symbol('s77', integer=True), Integer(1)) or s77 + 1; torch would evaluate any code.
_SIZE_EXPRESSION = re.compile(r"(?!.*__)(?:[A-Z]\w*\(|'\w+'|\w+(?![\w\s]*\()|[-+*/=,() ])*", re.ASCII)


def save_quantized(quantized: QuantizedModule, path: str | os.PathLike[str]) -> Path:
    """Write a quantized module as a ``.pt2`` file, atomically.

    The file is that of ``torch.export.save``: integers, scales and a dynamic batch dimension, on the CPU. After
    ``import infoq_fx``, which registers the custom ops, ``torch.export.load`` reads it; :func:`load_quantized` also
    restores the allocation, the names of inputs and outputs, their structure and dtypes, and the example inputs.
    Classes are not in the file: a named tuple is a tuple once loaded, and an object with fields a dict. Nor is the
    float model.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned, or a copy of it.
        path: of the file, usually with the ending ``.pt2``; its folder must exist.

    Returns:
        The path.

    Raises:
        OptionError: the module is not a quantized module.
        ExportError: torch cannot export the module, or the path cannot be written.
    """
    provenance = provenance_of(quantized)
    if provenance is None or not isinstance(quantized, QuantizedModule):
        found = type(quantized).__name__
        raise OptionError(f"save_quantized() got a {found}; pass what quantize(), convert() or to_quantized() returned")
    target, content = Path(path), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = _on_cpu(_export(quantized, provenance))
            torch.export.save(program, content, extra_files={_EXTRA_FILE: _describe(quantized, provenance)})
        except Exception as error:
            reason = " ".join(str(error).split())[-400:]
            raise ExportError(
                f"torch.export cannot write the quantized graph: {reason}; quantize a part of the model without that"
            ) from error
    try:
        write_atomically(target, content.getvalue())
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror}; give a path in a folder that exists and is writable"
        ) from error
    return target


def load_quantized(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> QuantizedModule:
    """Read a module that :func:`save_quantized` wrote; its outputs and its ONNX file are the same to the last bit.

    Only plain tensors are unpickled; a file that requires more is refused before torch reads it.

    Args:
        path: of the file.
        device: of the module.

    Returns:
        A module for :func:`infoq_fx.export_onnx`, :func:`infoq_fx.allocation_of` and :func:`infoq_fx.to_trainable`.
        Finetuning it needs the float model as ``teacher``.

    Raises:
        OptionError: there is no such file, or :func:`save_quantized` did not write it; the message says why.
    """
    source, home = Path(path), check_device(device)
    with _reasons_of(source):
        content = source.read_bytes()
        document, examples = _inspect(content)
        program = load_quietly(io.BytesIO(content))
        flat = flatten_program(program, home)
        allocation = _read_allocation(document["allocation"], read_bits(flat.graph_module.graph))
        names, outputs = tuple(document["input_names"]), tuple(document["output_names"])
        if not len(names) == len(flat.input_names) == len(examples) or len(outputs) != len(flat.output_names):
            raise OptionError("its inputs and outputs are not those of its graph")
        batch_size = document["batch_size"]
        if not (batch_size is None or (type(batch_size) is int and batch_size > 0)):
            raise OptionError(f"its batch size is {batch_size!r}")
        held = {name: x.to(device) for name, x in zip(names, examples, strict=True)}
        readings = _read_readings(document.get("readings"), flat.graph_module, held)
        form = decode_form(document["form"]) if "form" in document else CallForm()
    axes = {name: axes for name, x in zip(names, flat.symbolic_axes(), strict=True) if (axes := x)}
    provenance = Provenance(
        allocation, held, outputs, batch_size=batch_size, form=form, free_axes=axes, readings=readings
    )
    return wrap_quantized(flat.graph_module, provenance)


def _read_readings(described: Any, graph_module: fx.GraphModule, examples: Mapping[str, Tensor]) -> tuple[Reading, ...]:
    """The readings that the file holds; a file of an earlier release holds none, and they are chosen again."""
    if isinstance(described, list):
        return tuple(decode_reading(one) for one in described)
    with torch.no_grad():
        outputs = flatten_tensors(graph_module(*examples.values()))
    return choose_readings(graph_module, outputs).readings


def _export(quantized: QuantizedModule, provenance: Provenance) -> ExportedProgram:
    axes: FreeAxes = {index: provenance.free_axes.get(name, ()) for index, name in enumerate(provenance.example_inputs)}
    examples = tuple(provenance.example_inputs.values())
    return export_quietly(flat_graph(quantized), examples, axes, is_batch_free=provenance.batch_size is None)


def refuse_code(content: bytes) -> None:
    """Refuse a file of ``torch.export.save`` from which ``torch.export.load`` would unpickle or evaluate code.

    Raises:
        OptionError: it holds more than tensors, numbers and a graph, or is damaged.
    """
    with _open_archive(content) as archive:
        entries = _entries_of(archive)
        _refuse_code(archive, entries)
        if _SAMPLE_INPUTS in entries:
            torch.load(io.BytesIO(archive.read(entries[_SAMPLE_INPUTS])), weights_only=True)


def _entries_of(archive: zipfile.ZipFile) -> dict[str, str]:
    entries = {name.partition("/")[2]: name for name in archive.namelist()}
    if len({name.casefold() for name in entries}) != len(archive.namelist()):
        raise OptionError("two entries have one name")
    return entries


def _on_cpu(program: ExportedProgram) -> ExportedProgram:
    if all(tensor.device.type == "cpu" for tensor in [*program.state_dict.values(), *program.constants.values()]):
        return program
    from torch.export.passes import move_to_device_pass

    args, kwargs = program.example_inputs
    moved = move_to_device_pass(program, "cpu")
    moved.example_inputs = tuple(x.cpu() for x in args), kwargs
    return moved


def _describe(quantized: QuantizedModule, provenance: Provenance) -> str:
    with torch.no_grad():
        outputs = quantized(*provenance.example_inputs.values())
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "allocation": describe_allocation(provenance.allocation),
        "input_names": list(provenance.example_inputs),
        "output_names": list(provenance.output_names),
        "batch_size": provenance.batch_size,
        "readings": [describe_reading(reading) for reading in provenance.readings],
        "form": describe_form(provenance.form, outputs),
    }
    return json.dumps(document, sort_keys=True)


@contextlib.contextmanager
def _reasons_of(source: Path) -> Iterator[None]:
    """Turn every error into an OptionError that names the file."""
    advice = "save one with infoq_fx.save_quantized(quantized, 'model.pt2')"
    try:
        yield
    except OSError as error:
        raise OptionError(f"cannot read {str(source)!r}: {error.strerror}; {advice}") from error
    except (OptionError, UnsupportedModelError) as error:
        raise OptionError(f"{str(source)!r} is not a quantized module: {error}; {advice}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise OptionError(
            f"{str(source)!r} is not a quantized module that this torch can read: {reason}; {advice}"
        ) from error


def _open_archive(content: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise OptionError("not an archive, or cut short") from error


def _inspect(content: bytes) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Read the provenance and the example inputs, and refuse files with anything that could run code."""
    with _open_archive(content) as archive:
        entries = _entries_of(archive)
        if f"extra/{_EXTRA_FILE}" not in entries:
            raise OptionError("it holds no allocation; a program of torch.export alone is read by torch.export.load")
        document = check_format(json.loads(archive.read(entries[f"extra/{_EXTRA_FILE}"])), _FORMAT, _VERSION)
        _refuse_code(archive, entries)
        examples = torch.load(io.BytesIO(archive.read(entries[_SAMPLE_INPUTS])), weights_only=True)
    args, kwargs = examples
    if kwargs or not all(isinstance(x, Tensor) for x in args):
        raise OptionError("its example inputs are not tensors by position")
    return document, tuple(args)


def _refuse_code(archive: zipfile.ZipFile, entries: Mapping[str, str]) -> None:
    """Refuse files from which torch.export.load would unpickle or evaluate code; older formats are all pickles."""
    if any(not name or (name.endswith(".pt") and name != _SAMPLE_INPUTS) for name in entries):
        raise OptionError("it is of an older format that is unpickled")
    for kind, prefix in (("weights", "weight_"), ("constants", "tensor_")):
        if f"data/{kind}/model_{kind}_config.json" not in entries:
            raise OptionError("it is of an older format that is unpickled")
        config = json.loads(archive.read(entries[f"data/{kind}/model_{kind}_config.json"]))["config"]
        if any(held["use_pickle"] or not held["path_name"].startswith(prefix) for held in config.values()):
            raise OptionError(f"its {kind} hold objects that would be unpickled")

    def check(found: dict[str, Any]) -> dict[str, Any]:
        if "expr_str" in found and not _SIZE_EXPRESSION.fullmatch(str(found["expr_str"])):
            raise OptionError(f"a size in its graph is {found['expr_str']!r}")
        return found

    json.loads(archive.read(entries["models/model.json"]), object_hook=check)


def _read_allocation(held: Mapping[str, Any], graph_bits: Mapping[str, int]) -> Allocation:
    allocation = decode_allocation(held)
    for name, width in graph_bits.items():
        if allocation.bits.get(name) != width:
            raise OptionError(f"its allocation gives site {name!r} {allocation.bits.get(name)}, its graph {width} bits")
    return allocation
