"""Writes and checks ONNX files before they are moved to their path, with external data if they are too large."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from infoq_fx.conversion.quantized import Provenance, plain_graph
from infoq_fx.errors import ExportError
from infoq_fx.export.qdq_onnx.quant_nodes import QONNX_DOMAIN, write_out_quant
from infoq_fx.quantization.call_forms import flatten_tensors

__all__ = ["check_file", "folder_beside", "write_model"]

_MOST_BYTES = (1 << 31) - (1 << 20)  # protobuf's limit of 2 GiB, less room for the graph itself
_TOLERATED_ERROR = 0.25


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield a folder for drafts; if the block succeeds they are moved into the folder of ``target``, itself last.

    Raises:
        ExportError: the path cannot be written; a previous file is not changed.
    """
    if target.is_dir():
        raise ExportError(f"cannot write {target}: it is a folder; give the path of a file")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            yield Path(name)
            for draft in sorted(Path(name).iterdir(), key=lambda draft: draft.name == target.name):
                draft.replace(target.with_name(draft.name))
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror}; give a path in a folder that exists, is writable and has space"
        ) from error


def write_model(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Write a model, with tensors of 1 kB and more in ``<name>.data`` if asked for or if the file is too large."""
    large = sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values() if tensor.const_value)
    if external_data or large > _MOST_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    else:
        path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def check_file(draft: Path, quantized: nn.Module, provenance: Provenance) -> None:
    """Check a file by the ONNX checker, strict shape inference, and a run on the module's example inputs.

    QONNX nodes, which ONNX does not know, are written out for the run.

    Raises:
        ExportError: a check failed.
    """
    proto = onnx.load(draft, load_external_data=False)
    is_standard = all(entry.domain != QONNX_DOMAIN for entry in proto.opset_import)
    try:
        onnx.checker.check_model(str(draft), full_check=is_standard)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph fails the ONNX checker: {error}; report it") from error
    if is_standard:
        return _check_run(draft, quantized, provenance, provenance.example_inputs)
    model = ir.load(draft)
    write_out_quant(model)
    with tempfile.TemporaryDirectory() as folder:
        written_out = Path(folder) / draft.name
        write_model(model, written_out, external_data=False)
        one = {name: x if provenance.batch_size else x[:1] for name, x in provenance.example_inputs.items()}
        return _check_run(written_out, quantized, provenance, one)


def _check_run(draft: Path, quantized: nn.Module, provenance: Provenance, given: Mapping[str, torch.Tensor]) -> None:
    """Compare a run of the file, unoptimised, with the module on inputs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    examples = provenance.form.file_inputs(given)
    feeds = {name: x.detach().cpu().numpy() for name, x in examples.items()}
    try:
        session = onnxruntime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
        found = session.run(list(provenance.output_names), feeds)
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} refuses the exported file: {error}; install a newer release"
        ) from error
    with torch.no_grad():
        outputs = plain_graph(quantized)(*given.values())
    expected = [x.cpu().numpy() for x in flatten_tensors(outputs)]
    for name, ours, theirs in zip(provenance.output_names, expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(
                f"onnxruntime gives {name!r} the shape {theirs.shape}, the module {ours.shape}; report it"
            )
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        is_counted = np.isfinite(ours) | (ours != theirs)  # infinities, as of masks, must be equal
        ours, theirs = ours[is_counted], theirs[is_counted]
        # Sums in another order change values by single steps, which grow downstream; a wrong graph is off by far more.
        distance = float(np.linalg.norm(ours - theirs))
        if not distance <= _TOLERATED_ERROR * float(np.linalg.norm(ours)):
            raise ExportError(
                f"onnxruntime disagrees with the module at output {name!r} by {distance:g} (L2); report it"
            )
