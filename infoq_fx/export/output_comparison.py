"""Compares the outputs of a file with those of the module that it was made from, batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infoq_fx.conversion.quantized import Provenance
from infoq_fx.core.data import read_classes
from infoq_fx.core.readings import Categorical, Reading
from infoq_fx.errors import ExportError
from infoq_fx.export.verification_result import LevelResult, OutputResult
from infoq_fx.runtime.outputs import find_labelled, predict_classes

__all__ = ["OutputComparison", "find_problem"]

_STEPS = 255
_LEAST_STEP = 2.0**-20  # of the largest value
_EXACT_AGREEMENT, _FAIR_AGREEMENT = 0.995, 0.9
_EXACT_STEPS, _FAIR_STEPS, _FAIR_CLASS_STEPS = 1.0, 4.0, 8.0


class OutputComparison:
    """Adds up what two runs of the same samples have apart, output by output."""

    def __init__(self, provenance: Provenance, labels: Tensor | None) -> None:
        self._names, self._readings, self._labels = provenance.output_names, provenance.readings, labels
        self._sums: dict[int, _Sums] = {}
        self._labelled: int | None = None
        self._right = [0.0, 0.0, 0.0]  # of the module, of the file, and all

    def add(self, start: int, expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
        """Compare the outputs for the samples from ``start`` on."""
        if len(expected) != len(found):
            raise ExportError(
                f"the file has {len(found)} outputs, the module {len(expected)}: it was made from another module; "
                "export it again"
            )
        for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            if ours.shape != theirs.shape:
                raise ExportError(
                    f"the file's output {self._names[index]!r} is {list(theirs.shape)}, the module's "
                    f"{list(ours.shape)}: it was made from another module; export it again"
                )
            if ours.is_floating_point():
                self._sums.setdefault(index, _Sums()).add(self._reading(index), ours, theirs)
        if self._labels is not None:
            self._count_right(start, expected, found, self._labels)

    def finish(self, level: str) -> LevelResult:
        """Return what was found."""
        outputs = tuple(sums.finish(self._names[index]) for index, sums in self._sums.items())
        agreements = [one.agreement for one in outputs if one.agreement is not None]
        _, right, counted = self._right
        return LevelResult(
            level,
            min(agreements, default=1.0),
            max((one.mean_error_steps for one in outputs), default=0.0),
            max((one.largest_error_steps for one in outputs), default=0.0),
            100 * right / counted if counted else None,
            outputs,
        )

    def module_top1(self) -> float | None:
        """Return the percentage of the module's classes that are right; None without labels that fit."""
        right, _, counted = self._right
        return 100 * right / counted if counted else None

    def _reading(self, index: int) -> Reading | None:
        return self._readings[index] if index < len(self._readings) else None

    def _count_right(self, start: int, expected: tuple[Tensor, ...], found: tuple[Tensor, ...], labels: Tensor) -> None:
        readings = self._readings[: len(expected)]
        index = find_labelled(readings, expected, labels)
        if index is None:
            return
        reading = readings[index]
        assert isinstance(reading, Categorical)
        wanted = read_classes(labels[start : start + len(expected[index])], expected[index].shape[reading.axis])
        known = wanted >= 0
        for place, outputs in enumerate((expected, found)):
            self._right[place] += float((predict_classes(reading, outputs[index]) == wanted)[known].sum())
        self._right[2] += float(known.sum())


class _Sums:
    """What is added up for one output."""

    def __init__(self) -> None:
        self.signal = self.noise = self.error = self.largest = self.values = 0.0
        self.low, self.high = math.inf, -math.inf
        self.agreed = self.positions = 0.0
        self.small: list[Tensor] = []
        self.is_finite = True

    def add(self, reading: Reading | None, ours: Tensor, theirs: Tensor) -> None:
        usable = torch.isfinite(ours)
        self.is_finite &= bool((torch.isfinite(theirs) | ~usable).all())
        p, q = ours.double()[usable], theirs.double()[usable]
        if p.numel():
            error = (p - q).abs()
            self.signal, self.noise = self.signal + float(p.square().sum()), self.noise + float(error.square().sum())
            self.error, self.values = self.error + float(error.sum()), self.values + p.numel()
            self.largest = max(self.largest, float(error.max()))
            self.low, self.high = min(self.low, float(p.min())), max(self.high, float(p.max()))
        if isinstance(reading, Categorical):
            equal = predict_classes(reading, ours) == predict_classes(reading, theirs)
            self.agreed, self.positions = self.agreed + float(equal.sum()), self.positions + equal.numel()
        elif ours.ndim < 2 or ours[0].numel() == 1:
            self.small.append((ours.double() - theirs.double()).abs().flatten())

    def finish(self, name: str) -> OutputResult:
        # An output that is the same for all samples has no range: its last bits are no steps.
        least = max(_LEAST_STEP * max(abs(self.high), abs(self.low)), 1e-30) if self.values else 1.0
        step = max((self.high - self.low) / _STEPS, least) if self.values else 1.0
        agreement = self.agreed / self.positions if self.positions else None
        if self.small:
            agreement = float((torch.cat(self.small) <= step).double().mean())
        if not self.is_finite:
            return OutputResult(name, -math.inf, math.inf, math.inf, agreement, False)
        sqnr = math.inf if self.noise == 0 else 10 * math.log10(max(self.signal, 1e-300) / self.noise)
        mean = self.error / self.values if self.values else 0.0
        return OutputResult(name, sqnr, mean / step, self.largest / step, agreement)


def find_problem(result: LevelResult, module_top1: float | None, samples: int) -> str | None:
    """Say what is wrong with the worst output at a level; None if nothing is.

    Args:
        result: of the level.
        module_top1: percent of the module's classes that are right, None without labels.
        samples: number of samples that were run.
    """
    several = len(result.outputs) > 1
    for one in sorted(result.outputs, key=lambda one: -one.mean_error_steps):
        label = f"output {one.name!r}" if several else "the file"
        if not one.is_finite:
            return f"at level {result.level!r} {label if several else 'an output'} is not finite"
        agreement = (
            ""
            if one.agreement is None
            else f"agrees with the module on {100 * one.agreement:.1f} % of {samples} samples and "
        )
        apart = f"{label} {agreement}is {one.mean_error_steps:.3g} output steps off on average"
        exact, fair = one.agreement is None or one.agreement >= _EXACT_AGREEMENT, one.agreement is None
        if result.level == "off" and not (exact and one.mean_error_steps <= _EXACT_STEPS):
            return f"without optimisation {apart}; it belongs to another module"
        if result.level != "off" and one.mean_error_steps > (_FAIR_STEPS if fair else _FAIR_CLASS_STEPS):
            return f"at level {result.level!r} {apart}; ship it unoptimised, or check why"
    if result.level == "off":
        return None
    if module_top1 is None or result.top1 is None:
        if result.agreement >= _FAIR_AGREEMENT:
            return None
        agreement = f"agrees with the module on {100 * result.agreement:.1f} % of {samples} samples"
        return f"at level {result.level!r} the file {agreement}; ship it unoptimised, or check why"
    # Of m changed predictions, the number of wrong ones minus right ones has a standard deviation of at most sqrt(m).
    lost, changed = (module_top1 - result.top1) / 100 * samples, (1 - result.agreement) * samples
    if lost <= 2 * math.sqrt(changed):
        return None
    return f"at level {result.level!r} top-1 falls from {module_top1:.1f} to {result.top1:.1f} %; ship it unoptimised"
