"""Verifies that an exported file computes the same as the module that it was made from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from infoq_fx.conversion.quantized import provenance_of
from infoq_fx.core.data import ForwardArguments, read_data
from infoq_fx.core.readings import Metric, check_metric, measure_metric
from infoq_fx.core.targets import DEFAULT_TARGET, find_target
from infoq_fx.errors import CalibrationDataError, ExportError, OptionError
from infoq_fx.export.loading import measure_loading
from infoq_fx.export.output_comparison import OutputComparison, find_problem
from infoq_fx.export.verification_result import LevelResult, Loading, OutputResult, Verification
from infoq_fx.graph.reading_choice import join_tensors
from infoq_fx.quantization.call_forms import CallForm, flatten_tensors

__all__ = ["LevelResult", "Loading", "OutputResult", "Verification", "verify_onnx"]

_Run = Callable[[dict[str, Any]], list[Any]]


def verify_onnx(
    path: str | os.PathLike[str],
    quantized: nn.Module,
    data: Any,
    *,
    target: str = DEFAULT_TARGET,
    batch_size: int = 32,
    metric: Metric | None = None,
) -> Verification:
    """Verify an exported file: run it over samples and compare it with the quantized module that it was made from.

    All floating-point outputs are compared, and the verdict is about the worst. onnxruntime runs the file twice. With
    optimisation off, every output must be within one output step on average, and an output with classes must give the
    module's on 99.5 % of the positions; otherwise the graph is wrong. At the default level, integer kernels round
    single values differently by one step: outputs must be within four steps on average (with classes, eight), which
    changes close decisions. With labels, the predictions that become wrong may then outnumber those that become right
    by at most two standard errors of their difference; without labels, 90 % must agree. OpenVINO has only the default
    level.

    ``loading`` says whether the runtime unpacks the weights of container ``"exact"`` once, as it loads, and how long
    that takes.

    Args:
        path: of the file.
        quantized: the module.
        data: as calibration data of :func:`infoq_fx.quantize`; a few hundred samples, with labels if available.
        target: the runtime of :data:`infoq_fx.TARGETS`; ``"openvino"`` and ``"qonnx"`` need the extras
            ``infoq-fx[openvino]`` and ``infoq-fx[qonnx]``.
        batch_size: samples per run; a module with a fixed batch size uses that, and QONNX one.
        metric: ``(outputs, labels) -> float`` over all samples, larger is better; it is shown for module and file. The
            outputs are those of the module, in its own structure.

    Raises:
        OptionError: the module is not a quantized module, or the target is unknown or not installed.
        CalibrationDataError: the data cannot be used, or holds less than a fixed batch.
        ExportError: the runtime refuses the file.
    """
    check_metric(metric)
    provenance = provenance_of(quantized)
    if provenance is None:
        raise OptionError(f"{type(quantized).__name__} is not a quantized module; pass what quantize() returned")
    names, size = tuple(provenance.example_inputs), provenance.batch_size or (1 if target == "qonnx" else batch_size)
    samples = read_data(data, ForwardArguments.exactly(names)).named(names)
    samples = replace(samples, inputs=provenance.form.file_inputs(samples.inputs))
    if provenance.batch_size is not None:
        if samples.samples < size:
            raise CalibrationDataError(
                f"the module is fixed to batches of {size}, the data holds {samples.samples} samples; give at least "
                f"{size}"
            )
        samples = samples.take(samples.samples - samples.samples % size)
    name, runs = _open_sessions(_check_dialect(path, target), find_target(target).name, provenance.output_names)
    comparisons = {level: OutputComparison(provenance, samples.labels) for level in runs}
    kept: dict[str, list[tuple[Tensor, ...]]] = {"module": [], **{level: [] for level in runs}}
    structure: Any = None
    for start, batch in zip(range(0, samples.samples, size), samples.batches(size), strict=True):
        structure = _run_module(quantized, batch, next(iter(provenance.example_inputs.values())).device)
        expected = _graph_outputs(structure, provenance.form)
        for key in kept:
            found = expected if key == "module" else _run_file(runs[key], batch, path)
            if key != "module":
                comparisons[key].add(start, expected, found)
            kept[key] += [] if metric is None else [_tensors_of(structure, provenance.form, found)]
    measured = {
        key: None if metric is None else measure_metric(metric, join_tensors(structure, parts), samples.labels)
        for key, parts in kept.items()
    }
    results = tuple(
        replace(comparison.finish(level), metric=measured[level]) for level, comparison in comparisons.items()
    )
    own = next(iter(comparisons.values())).module_top1()
    problem = next(filter(None, (find_problem(result, own, samples.samples) for result in results)), None)
    verdict = f"not sound: {problem}" if problem else "sound: the file computes what the module computes"
    called, loading = getattr(metric, "__name__", "metric"), measure_loading(path, target)
    is_sound, module = problem is None, measured["module"]
    return Verification(name, samples.samples, results, own, is_sound, verdict, module, called, loading)


def _check_dialect(path: str | os.PathLike[str], target: str) -> str:
    """The path of a file, which is not one of QONNX for another target."""
    try:
        domains = {opset.domain for opset in onnx.load(path, load_external_data=False).opset_import}
    except Exception:  # the runtime says what is wrong with it
        domains = set()
    if target != "qonnx" and any(domain.startswith("qonnx") for domain in domains):
        raise OptionError(f"{os.fspath(path)!r} is a QONNX file, which {target} does not run; give target='qonnx'")
    return os.fspath(path)


def _open_sessions(path: str, target: str, outputs: Sequence[str]) -> tuple[str, Mapping[str, _Run]]:
    """The runtime's name with its version, and a function that runs the file for each of its levels."""
    if target == "openvino":
        return _open_openvino(path)
    if target == "qonnx":
        return _open_qonnx(path, outputs)
    levels = {
        "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "default": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    runs: dict[str, _Run] = {}
    for name, level in levels.items():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} refuses {path}: {error}; export it again"
            ) from error
        runs[name] = lambda feeds, session=session: session.run(list(outputs), feeds)  # type: ignore[misc]
    return f"onnxruntime {onnxruntime.__version__}", runs


def _open_openvino(path: str) -> tuple[str, Mapping[str, _Run]]:
    try:
        import openvino
    except ImportError as error:
        raise OptionError("target 'openvino' needs OpenVINO: pip install 'infoq-fx[openvino]'") from error
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU")
    except RuntimeError as error:
        raise ExportError(f"OpenVINO {openvino.__version__} refuses {path}: {error}; export it again") from error
    return f"OpenVINO {openvino.__version__.partition('-')[0]}", {
        "default": lambda feeds: [compiled(feeds)[key] for key in compiled.outputs]
    }


def _open_qonnx(path: str, outputs: Sequence[str]) -> tuple[str, Mapping[str, _Run]]:
    """The executor of the ``qonnx`` package, node by node as written."""
    try:
        from importlib.metadata import version

        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
    except ImportError as error:
        raise OptionError("target 'qonnx' needs the qonnx package: pip install 'infoq-fx[qonnx]'") from error
    try:
        model = ModelWrapper(path)
    except Exception as error:
        raise ExportError(f"qonnx refuses {path}: {error}; export it again") from error

    def run(feeds: dict[str, Any]) -> list[Any]:
        found = execute_onnx(model, feeds)
        return [found[name] for name in outputs]

    return f"qonnx {version('qonnx')}", {"off": run}


def _run_module(quantized: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Any:
    with torch.no_grad():
        return quantized(*(x.to(device) for x in batch.values()))


def _graph_outputs(structure: Any, form: CallForm) -> tuple[Tensor, ...]:
    """The outputs that the file has too, in order: numbers, such as a size, are tensors without axes there."""
    found = flatten_tensors(structure) if form.template is None else form.template.read(structure)
    return tuple(torch.as_tensor(x).cpu() for x in found)


def _tensors_of(structure: Any, form: CallForm, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those of a file's outputs that the module gives as tensors."""
    if form.template is None:
        return found
    is_tensor = [isinstance(x, Tensor) for x in form.template.read(structure)]
    return tuple(x for x, keep in zip(found, is_tensor, strict=True) if keep)


def _run_file(run: _Run, batch: Mapping[str, Tensor], path: str | os.PathLike[str]) -> tuple[Tensor, ...]:
    try:
        found = run({name: x.cpu().numpy() for name, x in batch.items()})
    except Exception as error:
        raise ExportError(
            f"{os.fspath(path)} does not take the module's inputs, or stops at them: {error}; export it again"
        ) from error
    return tuple(torch.from_numpy(np.array(x)) for x in found)
