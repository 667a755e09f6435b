"""Criteria that score one measured value of how quantizing a site changes the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from infoq_fx.core.data import CalibrationData
from infoq_fx.errors import CalibrationDataError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.scoring.output_measure import (
    ACCURACY_DROP,
    DESCRIPTION,
    KL,
    LOSS_INCREASE,
    NOISE_TO_SIGNAL,
    measure_outputs,
)
from infoq_fx.types import Measurement, Plain, Score

__all__ = ["Accuracy", "Loss", "OutputCriterion", "OutputKL", "OutputSQNR"]


@dataclass(frozen=True)
class OutputCriterion:
    """Base of criteria that score one value of :class:`OutputMeasure`, whose key is ``measured``."""

    samples: int | None = 1024
    name: str = ""
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")
    measured: ClassVar[str]
    runs_weights: ClassVar[bool] = True

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the description that all criteria of this kind share, with their measurements."""
        return DESCRIPTION

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Run the float model and the 8-bit baseline; see :func:`measure_outputs` for errors."""
        return measure_outputs(self.name, prepared, data, batch_size=batch_size, run_options=run_options)

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the measured mean, at least 0, and its standard error over the samples."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            if self.measured not in found.values:
                raise CalibrationDataError(
                    f"criterion {self.name!r} needs an output with classes, and none is read so: "
                    f"{'; '.join(prepared.output_notes)}; say which has classes (outputs=), or take criterion='infoq'"
                )
            value, error = found.values[self.measured], found.values[f"{self.measured}:standard_error"]
            scores.setdefault(found.site, {})[found.bits] = Score(max(0.0, value), error)
        return scores


@dataclass(frozen=True)
class Accuracy(OutputCriterion):
    """Drop of the top-1 accuracy against the 8-bit baseline, in points; 0 where it rises.

    Labels are the data's, or the baseline's own predictions if it has none: then the score is the share of predictions
    that change.

    Cost: one partial forward pass per (site, bit-width), no backward pass; labels if there are any.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all.

    Reference:
        The quantity that the InfoQ paper correlates its criterion with (Section 4, Fig. 1).
    """

    name: str = "accuracy"
    measured = ACCURACY_DROP


@dataclass(frozen=True)
class Loss(OutputCriterion):
    """Mean increase of the cross-entropy against the 8-bit baseline, in nats per sample; 0 where it falls.

    Labels are the data's, or the baseline's own predictions if it has none.

    Cost: one partial forward pass per (site, bit-width), no backward pass; labels if there are any.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all.

    Reference:
        The quantity that HAWQ-V2 (arXiv 1911.03852, Eq. 3) and MPQCO (arXiv 2110.06554) approximate.
    """

    name: str = "loss"
    measured = LOSS_INCREASE


@dataclass(frozen=True)
class OutputKL(OutputCriterion):
    """Mean KL divergence of the perturbed outputs from the baseline's, in nats per sample.

    KL(p || q) with p the softmax of the 8-bit baseline's logits and q that of the perturbed run. By the bound of Barber
    and Agakov it is the loss of the part of I(L; Y) that the rest of the network can decode, with Y drawn from the
    baseline.

    Cost: one partial forward pass per (site, bit-width), no backward pass, no labels.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all.

    Reference:
        "The IM Algorithm: A Variational Approach to Information Maximization", Barber and Agakov, NIPS 2003, Eq. 3;
        used per layer in "ZeroQ", arXiv 2001.00281, Eq. 4.
    """

    name: str = "output_kl"
    measured = KL


@dataclass(frozen=True)
class OutputSQNR(OutputCriterion):
    """Power of the logits' error over power of the logits: the inverse of the signal-to-quantization-noise ratio.

    E|z - z'|^2 / E|z|^2, a ratio of powers without a unit (SQNR in dB is -10 log10 of it). Unlike decibels it adds up
    over layers with independent errors.

    Cost: one partial forward pass per (site, bit-width), no backward pass, no labels.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all.

    Reference:
        "A Practical Mixed Precision Algorithm for Post-Training Quantization", arXiv 2302.05397, Section 3.
    """

    name: str = "output_sqnr"
    measured = NOISE_TO_SIGNAL
