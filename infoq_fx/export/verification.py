"""Verifies that an exported file computes the same as the module that it was made from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from infoq_fx.conversion.quantized import provenance_of
from infoq_fx.core.data import CalibrationData, read_data
from infoq_fx.core.targets import DEFAULT_TARGET, find_target
from infoq_fx.errors import CalibrationDataError, ExportError, OptionError
from infoq_fx.runtime.outputs import class_logits

__all__ = ["LevelResult", "Verification", "verify_onnx"]

_EXACT_AGREEMENT, _FAIR_AGREEMENT = 0.995, 0.9
_STEPS = 255
_Run = Callable[[dict[str, Any]], list[Any]]


@dataclass(frozen=True)
class LevelResult:
    """Agreement of a file with its module at one optimisation level of the runtime.

    Args:
        level: ``"off"``, where operators run one by one as written, or ``"default"``, where they are fused.
        agreement: share of samples whose top-1 class is the module's; for an output of one value, share of samples
            within one output step.
        mean_error_steps: mean difference of an output value, in output steps; a step is 1/255 of the range that the
            module's output has over the samples.
        largest_error_steps: the largest difference.
        top1: percent of correct predictions, if there are labels.
    """

    level: str
    agreement: float
    mean_error_steps: float
    largest_error_steps: float
    top1: float | None = None


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify_onnx`.

    Args:
        target: the runtime, with its version.
        samples: number of samples that were run.
        levels: a result for each optimisation level.
        module_top1: percent of correct predictions of the module, if there are labels.
        is_sound: whether the file can be deployed on this runtime.
        verdict: the same in words.
    """

    target: str
    samples: int
    levels: tuple[LevelResult, ...]
    module_top1: float | None
    is_sound: bool
    verdict: str

    def __str__(self) -> str:
        lines = [f"{self.verdict}", f"{self.target}, {self.samples} samples"]
        if self.module_top1 is not None:
            lines.append(f"  module   top-1 {self.module_top1:.1f} %")
        for result in self.levels:
            top1 = "" if result.top1 is None else f"top-1 {result.top1:.1f} %, "
            lines.append(
                f"  {result.level:<8} {top1}agrees on {100 * result.agreement:.1f} %, "
                f"mean error {result.mean_error_steps:.2g}, largest {result.largest_error_steps:.3g} output steps"
            )
        return "\n".join(lines)


def verify_onnx(
    path: str | os.PathLike[str],
    quantized: nn.Module,
    data: Any,
    *,
    target: str = DEFAULT_TARGET,
    batch_size: int = 32,
) -> Verification:
    """Verify an exported file: run it over samples and compare it with the quantized module that it was made from.

    onnxruntime runs the file twice. With optimisation off, the file must give the module's predictions on 99.5 % of
    the samples and its outputs within one output step on average; otherwise the graph is wrong. At the default level,
    integer kernels round single values differently by one step, which changes close decisions. With labels, the
    predictions that become wrong may then outnumber those that become right by at most two standard errors of their
    difference; without labels, 90 % must agree. OpenVINO has only the default level.

    Args:
        path: of the file.
        quantized: the module.
        data: as calibration data of :func:`infoq_fx.quantize`; a few hundred samples, with labels if available.
        target: the runtime of :data:`infoq_fx.TARGETS`; ``"openvino"`` needs the extra ``infoq-fx[openvino]``.
        batch_size: samples per run; a module with a fixed batch size uses that.

    Raises:
        OptionError: the module is not a quantized module, or the target is unknown or not installed.
        CalibrationDataError: the data cannot be used.
        ExportError: the runtime refuses the file.
    """
    provenance = provenance_of(quantized)
    if provenance is None:
        raise OptionError(f"{type(quantized).__name__} is not a quantized module; pass what quantize() returned")
    samples, size = read_data(data).named(tuple(provenance.example_inputs)), provenance.batch_size or batch_size
    if provenance.batch_size is not None:
        if samples.samples < size:
            raise CalibrationDataError(
                f"the module is fixed to batches of {size}, the data holds {samples.samples} samples; give at least "
                f"{size}"
            )
        samples = samples.take(samples.samples - samples.samples % size)
    name, runs = _open_sessions(os.fspath(path), find_target(target).name, provenance.output_names[0])
    device = next(iter(provenance.example_inputs.values())).device
    expected = _collect(samples, size, lambda batch: _run_module(quantized, batch, device))
    if samples.labels is not None:
        samples.check_labels(class_logits(expected).shape[1])
    results = tuple(
        _compare(level, expected, _collect(samples, size, _as_tensors(run, path)), samples)
        for level, run in runs.items()
    )
    own = None if samples.labels is None else _top1(expected, samples.labels)
    problem = next(filter(None, (_find_problem(result, own, samples.samples) for result in results)), None)
    verdict = f"not sound: {problem}" if problem else "sound: the file computes what the module computes"
    return Verification(name, samples.samples, results, own, problem is None, verdict)


def _open_sessions(path: str, target: str, output: str) -> tuple[str, Mapping[str, _Run]]:
    """The runtime's name with its version, and a function that runs the file for each of its levels."""
    if target == "openvino":
        return _open_openvino(path)
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
        runs[name] = lambda feeds, session=session: session.run([output], feeds)  # type: ignore[misc]
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
    return f"OpenVINO {openvino.__version__.partition('-')[0]}", {"default": lambda feeds: [compiled(feeds)[0]]}


def _collect(samples: CalibrationData, batch_size: int, run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    return torch.cat([run(batch) for batch in samples.batches(batch_size)])


def _run_module(quantized: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
    with torch.no_grad():
        output = quantized(*(x.to(device) for x in batch.values()))
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output.cpu()


def _as_tensors(run: _Run, path: str | os.PathLike[str]) -> Callable[[dict[str, Tensor]], Tensor]:
    def collect(batch: dict[str, Tensor]) -> Tensor:
        try:
            return torch.from_numpy(np.array(run({name: x.cpu().numpy() for name, x in batch.items()})[0]))
        except Exception as error:
            raise ExportError(
                f"{os.fspath(path)} does not take the module's inputs, or stops at them: {error}; export it again"
            ) from error

    return collect


def _compare(level: str, expected: Tensor, found: Tensor, samples: CalibrationData) -> LevelResult:
    if found.shape != expected.shape:
        raise ExportError(
            f"the file's output is {list(found.shape)}, the module's {list(expected.shape)}: it was made from another "
            "module; export it again"
        )
    step = max(float(expected.max() - expected.min()) / _STEPS, 1e-30)
    error = (found.double() - expected.double()).abs()
    ours, theirs = class_logits(expected), class_logits(found)
    agree = ours.argmax(1) == theirs.argmax(1) if ours.shape[1] > 1 else error.flatten(1).amax(1) <= step
    is_finite = bool(torch.isfinite(found).all())
    mean, largest = (float(x) / step if is_finite else math.inf for x in (error.mean(), error.max()))
    top1 = None if samples.labels is None else _top1(found, samples.labels)
    return LevelResult(level, float(agree.double().mean()), mean, largest, top1)


def _top1(output: Tensor, labels: Tensor) -> float:
    return 100 * float((class_logits(output).argmax(1) == labels.cpu()).double().mean())


def _find_problem(result: LevelResult, module_top1: float | None, samples: int) -> str | None:
    agreement = f"agrees with the module on {100 * result.agreement:.1f} % of {samples} samples"
    if not math.isfinite(result.largest_error_steps):
        return f"at level {result.level!r} an output is not finite"
    if result.level == "off":
        is_exact = result.agreement >= _EXACT_AGREEMENT and result.mean_error_steps <= 1
        apart = f"{agreement} and is {result.mean_error_steps:.3g} output steps off on average"
        return None if is_exact else f"without optimisation the file {apart}; it belongs to another module"
    if module_top1 is None or result.top1 is None:
        is_fair = result.agreement >= _FAIR_AGREEMENT
        return None if is_fair else f"at level {result.level!r} the file {agreement}; ship it unoptimised, or check why"
    # Of m changed predictions, the number of wrong ones minus right ones has a standard deviation of at most sqrt(m).
    lost, changed = (module_top1 - result.top1) / 100 * samples, (1 - result.agreement) * samples
    if lost <= 2 * math.sqrt(changed):
        return None
    return f"at level {result.level!r} top-1 falls from {module_top1:.1f} to {result.top1:.1f} %; ship it unoptimised"
