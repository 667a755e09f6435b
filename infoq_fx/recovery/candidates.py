"""Rounds every weight at every candidate bit-width as recovery would, for scores and comparisons."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.threads import thread_map
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.input_moments import average_moments, measure_moments
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, choose_samples
from infoq_fx.recovery.parameters import fork, read_qparams
from infoq_fx.recovery.second_order import Curvature, round_rows
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding, scale_choices
from infoq_fx.recovery.unfolding import can_unfold, columns_of, rows_to_weight, weight_to_rows
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.forward import RunOptions, choose_batch_size
from infoq_fx.types import BASELINE_BITS, Plain, QParams, QuantSite, RoundedWeight

__all__ = ["Candidates"]

_SAMPLES = 512
_ROWS = 8192
_DAMPING = 0.03
_SWEEPS = 2
_ALGORITHM_VERSION = 2  # raised when the same data gives other rounded weights


class Candidates:
    """Second-order rounded weights of a prepared model, each with all other sites at 8 bits; computed on demand.

    Second-order rounding recovers most of the loss of some layers and little of others (MobileNetV2 at 2 bits: 15.75
    nats become 0.03 in its last bottleneck, 7.8 become 1.3 in its first expansion). Scores of weights rounded to
    nearest would therefore give the bits to the wrong layers when recovery follows. Each weight W is rounded against
    the second moments of its layer's input in the 8-bit baseline, as :class:`infoq_fx.SecondOrderRounding` does it
    with a fixed ridge and without a new bias.

    Transposed convolutions, embeddings and layers of more than 8,192 columns and many input rows are rounded to
    nearest.

    Args:
        prepared: calibrated; not changed.
        data: by the model's input names, on the model's device; at most 512 samples are used.

    Attributes:
        recovery: name of the recovery step that leaves weights rounded so.
        cpu_seconds: CPU time that the rounding has taken so far.
    """

    recovery = SecondOrderRounding().name

    def __init__(self, prepared: PreparedModel, data: CalibrationData) -> None:
        self._prepared = prepared
        self._data = choose_samples(prepared, data, _SAMPLES)
        self._batch_size = choose_batch_size(prepared)
        self.cpu_seconds = 0.0
        self._rounded: dict[tuple[str, int], RoundedWeight] = {}

    def describe(self) -> dict[str, Plain]:
        """Return settings that determine the rounded weights, besides the model."""
        return {
            "weights": "rounded to second order",
            "rounding_version": _ALGORITHM_VERSION,
            "rounded on": digest_run(self._prepared, self._data, {}, batch_size=self._batch_size)[:20],
        }

    def round(self, sites: Iterable[QuantSite], run_options: RunOptions) -> PreparedModel:
        """Return the prepared model with these sites' weights rounded at all their candidates below 8 bits.

        Cost: a forward pass of the model in float and at 8 bits for every two layers, and for every weight and
        bit-width the cube of its columns; weights that were rounded before cost nothing.
        """
        missing: dict[str, list[int]] = {}
        for site in sites:
            widths = [b for b in site.bits if b != BASELINE_BITS and (site.name, b) not in self._rounded]
            if site.kind == "weight" and widths:
                missing[site.name] = widths
        if missing:
            start = time.process_time()
            with torch.inference_mode():
                self._round(missing, RunOptions(threads=run_options.threads, stop=run_options.stop))
            self.cpu_seconds += time.process_time() - start
        return replace(self._prepared, rounded=dict(self._rounded))

    def _round(self, missing: Mapping[str, list[int]], run_options: RunOptions) -> None:
        runner = LayerwiseRunner(
            fork(self._prepared), {}, self._data, StepContext(batch_size=self._batch_size, run_options=run_options)
        )
        left = {layer.site.name for segment in runner.segments for layer in segment.layers} & set(missing)
        with thread_map(run_options.threads, run_options.stop) as spread:
            for segment in runner.segments:
                for layer in segment.layers:
                    name, columns = layer.site.name, columns_of(layer)
                    if name not in left or not can_unfold(layer):
                        continue
                    halves = measure_moments(runner, segment, layer, max(_ROWS, 16 * columns))
                    if halves is None:
                        continue
                    curvature = average_moments(halves).factorize(_DAMPING)

                    def run(bits: int, layer: Layer = layer, curvature: Curvature = curvature) -> RoundedWeight:
                        with torch.inference_mode():
                            return _round_layer(runner.prepared, layer, curvature, bits)

                    for bits, found in zip(missing[name], spread(run, missing[name]), strict=True):
                        self._rounded[name, bits] = found
                left -= {layer.site.name for layer in segment.layers}
                if not left:
                    break
                runner.advance(segment)


def _round_layer(prepared: PreparedModel, layer: Layer, curvature: Curvature, bits: int) -> RoundedWeight:
    rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight)).double()
    qparams = read_qparams(prepared, layer, bits)
    spec, choices = qparams.spec, scale_choices(prepared, layer, bits, rows)
    q, step = round_rows(rows, curvature, choices, spec.quant_min, spec.quant_max, _SWEEPS)
    found = QParams(spec, step.reshape(qparams.scale.shape), qparams.zero_point)
    return RoundedWeight(rows_to_weight(layer, q).to(torch.int8), found)
