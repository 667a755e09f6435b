"""What :func:`infoq_fx.verify_onnx` finds: results by optimisation level and output."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LevelResult", "Loading", "OutputResult", "Verification"]


@dataclass(frozen=True)
class OutputResult:
    """How one output of a file compares with the module's.

    Args:
        name: of the output.
        sqnr_db: signal-to-quantization-noise ratio, the module's output being the signal; infinite if they are equal.
        mean_error_steps: mean difference of a value, in output steps; a step is 1/255 of the range that the module's
            output has over the samples.
        largest_error_steps: the largest difference.
        agreement: share of positions whose most probable class is the module's, for an output with classes; share of
            samples within one step for an output of one value; None for other quantities.
        is_finite: whether every value is finite where the module's is.
    """

    name: str
    sqnr_db: float
    mean_error_steps: float
    largest_error_steps: float
    agreement: float | None
    is_finite: bool = True


@dataclass(frozen=True)
class LevelResult:
    """How a file compares with the module at one optimisation level of the runtime.

    Args:
        level: ``"off"``, or ``"default"``, the runtime's own choice.
        agreement: the smallest agreement of an output that has one, else 1.
        mean_error_steps: the largest mean error of an output, see :class:`OutputResult`.
        largest_error_steps: the largest error of an output.
        top1: percent of correct classes, if there are labels of an output's classes.
        outputs: a result for each floating-point output.
        metric: what the user's metric gives for the file's outputs.
    """

    level: str
    agreement: float
    mean_error_steps: float
    largest_error_steps: float
    top1: float | None = None
    outputs: tuple[OutputResult, ...] = ()
    metric: float | None = None


@dataclass(frozen=True)
class Loading:
    """What the runtime does with a file's operators on constants, such as those that unpack weights.

    Args:
        operators: their number in the file.
        operators_left: how many are left in the graph that the runtime runs, and computed at every run.
        seconds: to load the file, the shortest of three times.
        unpacked_seconds: to load the same file after these operators were computed.
    """

    operators: int
    operators_left: int
    seconds: float = field(compare=False)
    unpacked_seconds: float = field(compare=False)

    def __str__(self) -> str:
        spent = f"{1e3 * self.seconds:.0f} ms, {1e3 * self.unpacked_seconds:.0f} ms once unpacked"
        if self.operators_left:
            return (
                f"{self.operators_left} of {self.operators} operators on constants are left to every run; export in "
                f"container 'int8' ({spent})"
            )
        return f"all {self.operators} operators on constants are folded ({spent})"


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify_onnx`.

    Args:
        target: the runtime, with its version.
        samples: number of samples that were run.
        levels: a result for each optimisation level.
        module_top1: percent of correct classes of the module, if there are labels.
        is_sound: whether the file can be deployed on this runtime.
        verdict: the same in words.
        module_metric: what the user's metric gives for the module's outputs.
        metric_name: of the user's metric.
        loading: how the runtime loads the file; None if it has no operators on constants.
    """

    target: str
    samples: int
    levels: tuple[LevelResult, ...]
    module_top1: float | None
    is_sound: bool
    verdict: str
    module_metric: float | None = None
    metric_name: str = "metric"
    loading: Loading | None = None

    def __str__(self) -> str:
        lines = [f"{self.verdict}", f"{self.target}, {self.samples} samples"]
        if self.module_top1 is not None:
            lines.append(f"  module   top-1 {self.module_top1:.1f} %")
        if self.module_metric is not None:
            lines.append(f"  module   {self.metric_name} {self.module_metric:.4g}")
        for result in self.levels:
            top1 = "" if result.top1 is None else f"top-1 {result.top1:.1f} %, "
            metric = "" if result.metric is None else f"{self.metric_name} {result.metric:.4g}, "
            is_split = len(result.outputs) > 1
            for one in result.outputs:
                agrees = "" if one.agreement is None else f"agrees on {100 * one.agreement:.1f} %, "
                label = f"output {one.name!r}: " if is_split else ""
                lines.append(
                    f"  {result.level:<8} {top1}{metric}{label}{agrees}SQNR {one.sqnr_db:.1f} dB, "
                    f"mean error {one.mean_error_steps:.2g}, largest {one.largest_error_steps:.3g} output steps"
                )
                top1 = metric = ""
        if self.loading is not None:
            lines.append(f"  loading  {self.loading}")
        return "\n".join(lines)
