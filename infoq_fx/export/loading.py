"""Measures an exported file: what its bytes are, and what a runtime does with its constant operators as it loads."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from infoq_fx.allocation.summary import FileSize
from infoq_fx.errors import OptionError
from infoq_fx.export.verification_result import Loading

__all__ = ["measure_file", "measure_loading"]

_LEVELS = onnxruntime.GraphOptimizationLevel
_DEQUANTIZE = "DequantizeLinear"  # runtimes keep it, as a part of integer kernels
_REPEATS = 3


def measure_file(path: str | os.PathLike[str]) -> FileSize:
    """Measure how many bytes of an exported file are tensors, and how many the graph; external data counts too.

    Args:
        path: of the file.

    Raises:
        OptionError: the file cannot be read.
    """
    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        total = Path(path).stat().st_size
        kept = {_location(path, tensor): tensor for tensor in tensors if uses_external_data(tensor)}
        outside = sum(place.stat().st_size for place in kept)
    except Exception as error:
        raise OptionError(f"cannot read {os.fspath(path)!r}: {error}; give a file that export_onnx wrote") from error
    inside = sum(len(tensor.raw_data) for tensor in tensors if not uses_external_data(tensor))
    return FileSize(total + outside, inside + outside)


def measure_loading(path: str | os.PathLike[str], target: str) -> Loading | None:
    """Load a file in a runtime, and the same file with its constants computed, and count the constant operators left.

    Args:
        path: of a file that the runtime runs.
        target: its name in :data:`infoq_fx.TARGETS`.

    Returns:
        None for a file without such operators, for QONNX, and where OpenVINO does not take the file with its constants
        computed.
    """
    if target == "qonnx":
        return None
    operators = _count_constant(onnx.load(path, load_external_data=False).graph)
    if operators == 0:
        return None
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "unpacked.onnx"
        _open(path, _LEVELS.ORT_ENABLE_BASIC, unpacked)
        if target == "openvino":
            # It also prepares the biases of an unpacked file as it loads, and shows that as operators.
            try:
                left, load = max(0, _count_in_openvino(path) - _count_in_openvino(unpacked)), _compile
            except RuntimeError:  # OpenVINO does not take what onnxruntime writes of an embedding before a GRU
                return None
        else:
            optimised = Path(folder) / "optimised.onnx"
            _open(path, _LEVELS.ORT_ENABLE_ALL, optimised)
            left, load = _count_constant(onnx.load(optimised, load_external_data=False).graph), _open
        return Loading(operators, left, _time(load, path), _time(load, unpacked))


def _location(path: str | os.PathLike[str], tensor: onnx.TensorProto) -> Path:
    return Path(path).parent / ExternalDataInfo(tensor).location


def _count_constant(graph: onnx.GraphProto) -> int:
    """The operators whose inputs are all constants, without DequantizeLinear."""
    known, count = {"", *(tensor.name for tensor in graph.initializer)}, 0
    for node in graph.node:
        if node.op_type != _DEQUANTIZE and known.issuperset(node.input):
            known |= set(node.output)
            count += 1
    return count


def _open(
    path: str | os.PathLike[str], level: Any = _LEVELS.ORT_ENABLE_ALL, optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        if Path(path).stat().st_size + _outside(path) >= 1 << 30:
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
            )
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def _outside(path: str | os.PathLike[str]) -> int:
    return measure_file(path).total_bytes - Path(path).stat().st_size


def _compile(path: str | os.PathLike[str]) -> Any:
    import openvino

    core = openvino.Core()
    return core.compile_model(core.read_model(os.fspath(path)), "CPU")


def _count_in_openvino(path: str | os.PathLike[str]) -> int:
    constant: set[str] = set()
    count = 0
    for operator in _compile(path).get_runtime_model().get_ordered_ops():
        kind = str(operator.get_rt_info()["layerType"].value)
        sources = [value.get_source_output().get_node().get_friendly_name() for value in operator.inputs()]
        if kind == "Const" or (sources and constant.issuperset(sources)):
            constant.add(operator.get_friendly_name())
            count += kind != "Const"
    return count


def _time(load: Callable[[str | os.PathLike[str]], Any], path: str | os.PathLike[str]) -> float:
    """The shortest of a few loads, in seconds."""
    spent = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        load(path)
        spent.append(time.perf_counter() - start)
    return min(spent)
