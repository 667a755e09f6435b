"""InfoQ: the information at the output that is lost when one site is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from infoq_fx.core.data import CalibrationData
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria.infoq_paper import InfoQPaper
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.scoring.information.encoders import Encoder
from infoq_fx.scoring.output_measure import DESCRIPTION, INFORMATION_LOSS, measure_outputs
from infoq_fx.types import BASELINE_BITS, Measurement, Observer, Plain, Score

__all__ = ["InfoQ"]

_PRIOR_SPREAD = 0.7  # relative spread of the prior on the loss with one more bit, whose mean is about a quarter
_SMALLEST_SHARE = 0.05
_NOTHING_NATS = 1e-12
_FARTHEST = 8.0  # standard errors below zero


@dataclass(frozen=True, kw_only=True)
class InfoQ:
    """Information about the float model's decision that is lost at the output, in nats per sample.

    The rest of the network, q, is a decoder of every layer L: Barber and Agakov's bound is
    I(L; Y) >= H(Y) - E[-log q(Y | L)]. Y is drawn from the float model's outputs p(Y | X), so that no labels are
    needed. The bound of the float model is H(Y) - H(p); that of a quantized model is lower by E KL(p || q), for every
    layer. This is the information that the *fixed* layers downstream can no longer decode, even if it is still
    present (which sliced mutual information at an observer does not see). The score of (site i, b bits) is the part
    of it that the site causes,

        S(i, b) = E KL(p || q_{i at b}) - E KL(p || q_8),        q_8 the 8-bit baseline.

    Both terms are measured against the *float* model. Against the 8-bit baseline, any change at all would redraw the
    rounding errors of the whole network and cost the same constant (0.02 nats on MobileNetV2, more than most layers
    cost at 4 bits); here that constant is in both terms.

    Small scores are noisy, so each is shrunk, according to its standard error e, towards a prediction from the next
    smaller candidate b'. Rounding noise has the power 4^-b, and the loss is of second order in it, so that the prior of
    S(i, b) has the mean m = S(i, b') (4^-b - 4^-8) / (4^-b' - 4^-8) and the spread 0.7 m. The score is the mean of the
    posterior, at most S(i, b'), and 0 at 8 bits.

    A single output column is treated as a quantity with Gaussian errors, not as logits.

    Sliced mutual information at observers can be added: ``observers`` names them, and every nat by which SMI(X_E; L)
    or SMI(L; Y) changes beyond two standard errors adds ``smi_weight`` to the score. On ResNet-20 and MobileNetV2 it
    did not improve an allocation; it is off by default.

    Cost: one partial forward pass per (site, bit-width), no backward pass, no labels.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all.
        observers: where sliced mutual information is measured too, see :class:`InfoQPaper`; None for nowhere.
        smi_weight: nats added to the score per nat of changed SMI.
        encoder: X -> X_E for SMI(X_E; L), see :func:`infoq_fx.scoring.information.encoders.encode_inputs`.
        slices: random projections per observer.
        seed: of projections and of class groups.

    Reference:
        "The IM Algorithm: A Variational Approach to Information Maximization", Barber and Agakov, NIPS 2003, Eq. 3;
        InfoQ, Section 4, for information flow as the measure of sensitivity.
    """

    samples: int | None = 1024
    observers: Sequence[Observer | str] | Literal["auto"] | None = None
    smi_weight: float = 0.1
    encoder: Encoder | str | None = None
    slices: int = 256
    seed: int = 0
    name: str = "infoq"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")
    runs_weights: ClassVar[bool] = True

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the settings of the measurements; those of observers are included if there are any."""
        if self.observers is None:
            return DESCRIPTION
        of_output = DESCRIPTION["algorithm_version"]
        return {**self._sliced().describe(prepared, data), "reads output": True, "output_version": of_output}

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Run the float model and the 8-bit baseline.

        Raises:
            CalibrationDataError: there is no data, a label is not a class of the model, or there are too few samples
                for observers.
            OptionError: an observer is unknown.
        """
        if self.observers is not None:
            return self._sliced().begin(
                prepared, data, batch_size=batch_size, run_options=run_options, reads_output=True
            )
        return measure_outputs(self.name, prepared, data, batch_size=batch_size, run_options=run_options)

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the shrunk loss of every (site, bit-width) and its remaining standard error."""
        by_site: dict[str, list[Measurement]] = {}
        for found in measurements:
            by_site.setdefault(found.site, []).append(found)
        return {
            site: _shrink({m.bits: self._read(m) for m in sorted(found, key=lambda m: m.bits)})
            for site, found in by_site.items()
        }

    def _sliced(self) -> InfoQPaper:
        return InfoQPaper(observers=self.observers, encoder=self.encoder, slices=self.slices, seed=self.seed)

    def _read(self, found: Measurement) -> Score:
        values = found.values
        loss, error = values[INFORMATION_LOSS], values[f"{INFORMATION_LOSS}:standard_error"]
        for key in sorted(k.removesuffix(":change") for k in values if k.endswith(":change")):
            doubt = values[f"{key}:standard_error"]
            loss += self.smi_weight * max(0.0, values[f"{key}:change"] - 2 * doubt)
            error = math.hypot(error, self.smi_weight * doubt)
        return Score(loss, error)


def _shrink(measured: Mapping[int, Score]) -> dict[int, Score]:
    """Scores by ascending bit-width, each shrunk towards the prediction from the bit-width below it."""
    shrunk: dict[int, Score] = {}
    below: int | None = None
    for bits, found in measured.items():
        if bits >= BASELINE_BITS:
            shrunk[bits] = Score(0.0)
        elif below is None:
            shrunk[bits] = Score(_positive_mean(found.value, found.standard_error), found.standard_error)
        else:
            shrunk[bits] = _update(shrunk[below].value, below, bits, found)
        below = bits
    return shrunk


def _positive_mean(value: float, standard_error: float) -> float:
    """The mean of a loss that is known to be positive, measured as ``value`` with a normal error.

    It is the value itself where that is well above its error, and of the size of the error where the measurement says
    nothing: a site is not insensitive for want of evidence.
    """
    if standard_error <= 0:
        return max(value, 0.0)
    ratio = value / standard_error
    if ratio < -_FARTHEST:  # a normal tail: the mean is about the error over the distance
        return standard_error / -ratio
    hazard = math.exp(-ratio * ratio / 2) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(-ratio / math.sqrt(2)))
    return value + standard_error * hazard


def _update(loss_below: float, below: int, bits: int, found: Score) -> Score:
    expected = loss_below * (4.0**-bits - 4.0**-BASELINE_BITS) / (4.0**-below - 4.0**-BASELINE_BITS)
    if expected < _NOTHING_NATS:
        return Score(expected, found.standard_error)
    prior = (_PRIOR_SPREAD * expected) ** -2
    data = max(found.standard_error, _NOTHING_NATS) ** -2
    value = (data * found.value + prior * expected) / (data + prior)
    return Score(min(max(value, _SMALLEST_SHARE * expected), loss_below), (data + prior) ** -0.5)
