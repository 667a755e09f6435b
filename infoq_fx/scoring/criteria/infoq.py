"""InfoQ: the information at the output that is lost when one site is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from infoq_fx.core.data import CalibrationData
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.runtime.outputs import count_positions
from infoq_fx.scoring.criteria.infoq_paper import InfoQPaper
from infoq_fx.scoring.criterion import Kind, Measure, Observer, Scores
from infoq_fx.scoring.information.encoders import Encoder
from infoq_fx.scoring.output_measure import DESCRIPTION, INFORMATION_LOSS, LOSS_OVER_PAIRS, measure_outputs
from infoq_fx.scoring.shrinkage import Evidence, shrink_losses
from infoq_fx.types import BASELINE_BITS, FLOAT16_BITS, Measurement, Plain, QuantSite, Score

__all__ = ["InfoQ"]

_MEASURED_WIDTHS = 2
_SAMPLES, _FEWEST_SAMPLES, _OBSERVED_SAMPLES = 96, 48, 1024
_MOST_PASSES = 8  # of the data, that runs from each site on take: half a pass each
_MANY_POSITIONS, _FEWER_OF_MANY = 64, 3  # of a sample's output; each is measured
_SAMPLES_FOR_FLOAT = 192  # what a site gains in float counts above three standard errors


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

    Only the two smallest candidates of a site are measured, on a hundred samples. These losses are means of heavy
    tails, and noisy; what else is known makes scores of them, at all bit-widths: the loss of the same changes at other
    samples, and the power of the rounding error (:func:`infoq_fx.scoring.shrinkage.shrink_losses`). On
    ResNet-20 and MobileNetV2, scores from 192 samples at 2 bit-widths are as close to the losses on unseen images as
    means over all calibration samples at 6 bit-widths are, and allocations from 96 samples lose as little as those from
    192.

    With 16 bits among the candidates, at which a tensor stays in float, the site's own part of what 8 bits lose is
    measured too, and a score says what is lost beyond float: it is 0 at 16 bits.

    A single output column is treated as a quantity with Gaussian errors, not as logits.

    Sliced mutual information at observers can be added: ``observers`` names them, and every nat by which SMI(X_E; L)
    or SMI(L; Y) changes beyond two standard errors adds ``smi_weight`` to the score. On ResNet-20 and MobileNetV2 it
    did not improve an allocation; it is off by default.

    Cost: two partial forward passes per site, no backward pass, no labels.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all, ``"auto"`` for 96, for 192 where
            float is among the candidates, whose small gains need them, for a third of that where every output has 64
            positions or more (pixels, tokens, anchors), or 1,024 with observers. Networks of many layers take fewer, at
            least half as many, so that scoring runs at most eight passes of the data.
        observers: where sliced mutual information is measured too, see :class:`InfoQPaper`; None for nowhere. With
            observers, all bit-widths are measured.
        smi_weight: nats added to the score per nat of changed SMI.
        encoder: X -> X_E for SMI(X_E; L), see :func:`infoq_fx.scoring.information.encoders.encode_inputs`.
        slices: random projections per observer.
        seed: of projections and of class groups.

    Reference:
        "The IM Algorithm: A Variational Approach to Information Maximization", Barber and Agakov, NIPS 2003, Eq. 3;
        InfoQ, Section 4, for information flow as the measure of sensitivity.
    """

    samples: int | Literal["auto"] | None = "auto"
    observers: Sequence[Observer | str] | Literal["auto"] | None = None
    smi_weight: float = 0.1
    encoder: Encoder | str | None = None
    slices: int = 256
    seed: int = 0
    name: str = "infoq"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")
    runs_weights: ClassVar[bool] = True
    scores_float: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples == "auto":
            object.__setattr__(self, "samples", _SAMPLES if self.observers is None else _OBSERVED_SAMPLES)

    def choose_samples(self, prepared: PreparedModel, sites: Sequence[QuantSite], samples: int) -> int | None:
        """Return the largest number of samples for these sites, of the data's ``samples``."""
        assert self.samples != "auto"
        if self.samples != _SAMPLES:
            return self.samples
        has_float = any(max(site.bits) == FLOAT16_BITS for site in sites)
        most, fewest = _SAMPLES_FOR_FLOAT if has_float else _SAMPLES, _FEWEST_SAMPLES
        if count_positions(prepared) >= _MANY_POSITIONS:
            most, fewest = most // _FEWER_OF_MANY, fewest // _FEWER_OF_MANY
        if has_float:
            return most
        runs = sum(bits < BASELINE_BITS for site in sites for bits in site.bits)
        return min(most, max(fewest, 2 * _MOST_PASSES * samples // max(1, runs)))

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
        """Return the estimated loss of every site at all its candidates, and its remaining standard error."""
        by_site: dict[str, dict[int, Evidence]] = {}
        for found in measurements:
            by_site.setdefault(found.site, {})[found.bits] = self._read(found)
        noise = {module.site.name: module.noise for _, module in prepared.quantizer_nodes()}
        return shrink_losses(by_site, {site.name: site.bits for site in prepared.inventory.sites}, noise)

    def choose_bits(self, site: QuantSite) -> tuple[int, ...]:
        """Return the bit-widths that are measured; the scores of the others follow from them."""
        below = tuple(sorted(bits for bits in site.bits if bits < BASELINE_BITS))
        above = tuple(bits for bits in site.bits if bits > BASELINE_BITS)
        return site.bits if self.observers is not None else (*below[:_MEASURED_WIDTHS], *above)

    def _sliced(self) -> InfoQPaper:
        return InfoQPaper(observers=self.observers, encoder=self.encoder, slices=self.slices, seed=self.seed)

    def _read(self, found: Measurement) -> Evidence:
        values = found.values
        loss, error = values[INFORMATION_LOSS], values[f"{INFORMATION_LOSS}:standard_error"]
        over_pairs = None
        if LOSS_OVER_PAIRS in values:
            over_pairs = Score(values[LOSS_OVER_PAIRS], values[f"{LOSS_OVER_PAIRS}:standard_error"])
        for key in sorted(k.removesuffix(":change") for k in values if k.endswith(":change")):
            doubt = values[f"{key}:standard_error"]
            added = self.smi_weight * max(0.0, values[f"{key}:change"] - 2 * doubt)
            loss, error = loss + added, math.hypot(error, self.smi_weight * doubt)
            if over_pairs is not None:
                over_pairs = Score(over_pairs.value + added, over_pairs.standard_error)
        return Evidence(Score(loss, error), over_pairs)
