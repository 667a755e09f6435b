"""Weight MSE: the relative squared error of the quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from infoq_fx.core.data import CalibrationData
from infoq_fx.graph.float_interpreter import read_weights
from infoq_fx.quantization import numerics
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.types import Measurement, Plain, QuantSite, Score

__all__ = ["WeightMSE"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements


@dataclass(frozen=True)
class WeightMSE:
    """Squared error of the quantized weights, summed over the layer and divided by the sum of squared weights.

    |Q(w) - w|^2 / |w|^2, a ratio of powers without a unit, so that layers of any scale can be compared. Activations
    are not scored.

    Cost: no forward pass, no data, no labels. The score is exact: its standard error is 0.

    Reference:
        The simplest baseline: the error that the choice of weight scales minimises at every bit-width.
    """

    name: str = "weight_mse"
    needs_data: bool = False
    kinds: tuple[Kind, ...] = ("weight",)
    scores_float: ClassVar[bool] = True

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the kind of measurement; only the weights determine it."""
        return {"measure": "weight error", "algorithm_version": _ALGORITHM_VERSION}

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Return the measure; sites share no computation."""
        return WeightErrorMeasure()

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the squared error over the squared weights."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            ratio = found.values["squared_error"] / max(found.values["squared_weight"], 1e-30)
            scores.setdefault(found.site, {})[found.bits] = Score(ratio)
        return scores


@dataclass(frozen=True)
class WeightErrorMeasure:
    """Measures sums of squared errors and of squared weights."""

    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure both sums of every weight site; activation sites are skipped."""
        measured = []
        for site, quantizer, weight in read_weights(prepared, sites):
            power = float(weight.double().square().sum())
            for bits in site.bits:
                error = numerics.fake_quantize(weight, quantizer.qparams_at(bits)).double() - weight.double()
                values = {"squared_error": float(error.square().sum()), "squared_weight": power}
                measured.append(Measurement(site.name, bits, values))
                run_options.advance(1.0)
        return measured
