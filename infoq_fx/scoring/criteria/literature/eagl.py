"""EAGL: the entropy of the quantized weights; needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.graph.float_interpreter import read_weights
from infoq_fx.quantization import numerics
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, QuantSite, Score

__all__ = ["EAGL"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements


@dataclass(frozen=True)
class EAGL:
    """Entropy that a layer's weights lose at a bit-width, in bits per weight.

    The score is H(8-bit weights) - H(b-bit weights), with H the entropy of the empirical distribution of the
    integer weights of the layer. The source chooses between two precisions and values the higher one by H; the
    loss relative to 8 bits extends this to any set of bit-widths. Activations are not scored.

    Cost: no forward pass, no data, no labels. The score is exact: its standard error is 0.

    Reference:
        "Efficient and Effective Methods for Mixed Precision Neural Network Quantization for Faster,
        Energy-efficient Inference", arXiv 2301.13330, Section 3.3.
    """

    name: str = "eagl"
    needs_data: bool = False
    kinds: tuple[Kind, ...] = ("weight",)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the kind of measurement; only the weights determine it."""
        return {"measure": "weight entropy", "algorithm_version": _ALGORITHM_VERSION}

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Return the measure; sites share no computation."""
        return EntropyMeasure()

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the baseline entropy minus the entropy, at least 0."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            lost = found.values["baseline_entropy_bits"] - found.values["entropy_bits"]
            scores.setdefault(found.site, {})[found.bits] = Score(max(0.0, lost))
        return scores


@dataclass(frozen=True)
class EntropyMeasure:
    """Measures the entropy of weights in bits per weight, at each bit-width and at the 8-bit baseline."""

    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure both entropies of every weight site; activation sites are skipped."""
        measured = []
        for site, quantizer, weight in read_weights(prepared, sites):
            entropies = {
                bits: _entropy_bits(numerics.quantize(weight, quantizer.qparams_at(bits)))
                for bits in {*site.bits, BASELINE_BITS}
            }
            for bits in site.bits:
                values = {"entropy_bits": entropies[bits], "baseline_entropy_bits": entropies[BASELINE_BITS]}
                measured.append(Measurement(site.name, bits, values))
                run_options.advance(1.0)
        return measured


def _entropy_bits(quantized: Tensor) -> float:
    _, counts = torch.unique(quantized, return_counts=True)
    shares = counts.double() / counts.sum()
    return float(-(shares * shares.log2()).sum())
