"""Rounds every weight at every candidate bit-width as recovery would, for scores and comparisons."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import copy_to_disk, return_free_memory, usual_bytes
from infoq_fx.core.threads import thread_map
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.codebooks import find_levels, table_of_levels
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.layerwise_runner import choose_samples
from infoq_fx.recovery.moments.input_moments import Inputs, RunningMoments, dtype_of_moments
from infoq_fx.recovery.moments.row_products import Rows, count_rows, join_rows
from infoq_fx.recovery.moments.unfolding import (
    can_unfold,
    columns_of,
    groups_of,
    rows_to_weight,
    sources_of,
    weight_to_rows,
)
from infoq_fx.recovery.parameters import read_qparams
from infoq_fx.recovery.second_order import Curvature, round_rows
from infoq_fx.recovery.segments import Layer, find_segments
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding, scale_choices
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.forward import RunOptions, choose_batch_size, map_whole
from infoq_fx.types import BASELINE_BITS, Plain, QuantSite, RoundedWeight

__all__ = ["Candidates"]

_SAMPLES = 256
_ROWS, _MOST_ROWS_PER_COLUMN = 8192, 512
_DAMPING = 0.03
_CLIPS = (0.9, 1.0, 1.1, 1.25)  # fewer than recovery tries: the error is larger by 1 to 3 %
_MOST_CLIPPED_BITS = 5  # with more, the scale of least error to nearest is taken as it is
_SWEEPS = 2
_GROUP_BYTES = 512 << 20
_IN_MEMORY_BYTES = 64 << 20  # of rounded weights
_ALGORITHM_VERSION = 12  # raised when the same data gives other rounded weights


class Candidates:
    """Second-order rounded weights of a prepared model, each with all other sites at 8 bits; computed on demand.

    Second-order rounding recovers most of the loss of some layers and little of others (MobileNetV2 at 2 bits: 15.75
    nats become 0.03 in its last bottleneck, 7.8 become 1.3 in its first expansion). Scores of weights rounded to
    nearest would therefore give the bits to the wrong layers when recovery follows. Each weight W is rounded against
    the second moments of its layer's input in the 8-bit baseline, as :class:`infoq_fx.SecondOrderRounding` does it
    with a fixed ridge, four scales (one above 5 bits) and without a new bias.

    Transposed convolutions, embeddings and layers of more than 8,192 columns and many input rows are rounded to
    nearest.

    Args:
        prepared: calibrated; not changed.
        data: by the model's input names, on the model's device; at most 256 samples are used.
        memory_limit: bytes for moments and a batch's values; None for about 768 MiB.

    Attributes:
        recovery: name of the recovery step that leaves weights rounded so.
        cpu_seconds: CPU time that the rounding has taken so far.
    """

    recovery = SecondOrderRounding().name

    def __init__(self, prepared: PreparedModel, data: CalibrationData, *, memory_limit: int | None = None) -> None:
        self._prepared = prepared
        self._data = choose_samples(prepared, data, _SAMPLES)
        self._batch_size = choose_batch_size(prepared, memory_limit)
        group_bytes = usual_bytes(prepared.device, _GROUP_BYTES)
        self._group_bytes = group_bytes if memory_limit is None else min(group_bytes, memory_limit // 2)
        self.cpu_seconds = 0.0
        self._rounded: dict[tuple[str, int], RoundedWeight] = {}
        self._room = _IN_MEMORY_BYTES

    def describe(self) -> dict[str, Plain]:
        """Return settings that determine the rounded weights, besides the model."""
        return {
            "weights": "rounded to second order",
            "rounding_version": _ALGORITHM_VERSION,
            "rounded on": digest_run(self._prepared, self._data, {}, batch_size=self._batch_size)[:20],
        }

    def round(self, sites: Iterable[QuantSite], run_options: RunOptions) -> PreparedModel:
        """Return the prepared model with these sites' weights rounded, at all their candidates in it below 8 bits.

        Cost: a forward pass of the model at 8 bits, more of them where the moments of all layers take more than 512
        MiB; for every weight the cube of its columns, and their square for every bit-width. Weights that were rounded
        before cost nothing.
        """
        wanted = {site.name for site in sites if site.kind == "weight" and min(site.bits) < BASELINE_BITS}
        missing: dict[str, list[int]] = {}
        for site in self._prepared.inventory.sites:
            widths = [b for b in site.bits if b < BASELINE_BITS and (site.name, b) not in self._rounded]
            if site.name in wanted and widths:
                missing[site.name] = widths
        if missing:
            start = time.process_time()
            with torch.inference_mode():
                self._round(missing, RunOptions(threads=run_options.threads, stop=run_options.stop))
            self.cpu_seconds += time.process_time() - start
        return replace(self._prepared, rounded=dict(self._rounded))

    def _round(self, missing: Mapping[str, list[int]], run_options: RunOptions) -> None:
        layers = [
            layer
            for segment in find_segments(self._prepared)
            for layer in segment.layers
            if layer.site.name in missing and can_unfold(layer)
        ]
        for group in _group_layers(layers, self._group_bytes):
            return_free_memory()
            moments = self._measure_moments(group, run_options)
            with thread_map(run_options.threads, run_options.stop) as spread:
                for layer in group:
                    return_free_memory()
                    inputs = moments.pop(layer.site.name, None)
                    if inputs is None:
                        continue
                    curvature, widths = inputs.narrow().factorize(_DAMPING), missing[layer.site.name]
                    del inputs

                    def run(bits: int, layer: Layer = layer, curvature: Curvature = curvature) -> RoundedWeight:
                        with torch.inference_mode():
                            return _round_layer(self._prepared, layer, curvature, bits)

                    for bits, found in zip(widths, self._hold(list(spread(run, widths))), strict=True):
                        self._rounded[layer.site.name, bits] = found

    def _hold(self, found: list[RoundedWeight]) -> list[RoundedWeight]:
        """The weights of a layer, on disk where all of those in memory take more than 64 MiB."""
        size = sum(rounded.q.numel() for rounded in found)
        if size <= self._room or self._prepared.device.type != "cpu":
            self._room -= size
            return found
        return [replace(x, q=q) for x, q in zip(found, copy_to_disk([x.q for x in found]), strict=True)]

    def _measure_moments(self, layers: Sequence[Layer], run_options: RunOptions) -> dict[str, Inputs]:
        """The moments of the inputs of some layers in the 8-bit baseline, by site."""
        samples = self._data.samples
        rows = {x.site.name: max(min(_ROWS, _MOST_ROWS_PER_COLUMN * columns_of(x)), 16 * columns_of(x)) for x in layers}
        most = {name: math.ceil(count / samples) for name, count in rows.items()}

        sources = {layer.site.name: sources_of(layer) for layer in layers}

        def read(start: int, values: Mapping[fx.Node, Any]) -> list[tuple[Rows, float]]:
            found, share = [], min(self._batch_size, samples - start) / samples
            for layer in layers:
                count, read_by = most[layer.site.name], sources[layer.site.name]
                rows = join_rows([source.rows(values[source.node], count) for source in read_by])
                found.append((rows, count_rows(rows) / share))
            return found

        with thread_map(run_options.threads, run_options.stop) as spread:
            sums = {layer.site.name: RunningMoments(spread) for layer in layers}
            for found in map_whole(
                self._prepared,
                self._data,
                {source.node for held in sources.values() for source in held},
                read,
                batch_size=self._batch_size,
                run_options=run_options,
            ):
                for layer, (taken, in_all) in zip(layers, found, strict=True):
                    sums[layer.site.name].add(taken, taken, in_all)
            return {name: total for name, x in sums.items() if (total := x.finish()) is not None}


def _group_layers(layers: Sequence[Layer], most_bytes: int) -> list[list[Layer]]:
    """Consecutive layers whose moments take at most ``most_bytes`` together, or a single one."""
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        needed = groups_of(layer) * columns_of(layer) ** 2 * dtype_of_moments(columns_of(layer)).itemsize
        if not groups or needed > room:
            groups, room = [*groups, []], most_bytes
        groups[-1].append(layer)
        room -= needed
    return groups


def _round_layer(prepared: PreparedModel, layer: Layer, curvature: Curvature, bits: int) -> RoundedWeight:
    rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight)).double()
    clips = _CLIPS if bits <= _MOST_CLIPPED_BITS else (1.0,)
    qparams, choices = read_qparams(prepared, layer, bits), scale_choices(prepared, layer, bits, rows, clips)
    q, step = round_rows(rows, curvature, choices, table_of_levels(find_levels(qparams)), _SWEEPS)
    found = replace(qparams, scale=step.reshape(qparams.scale.shape))
    return RoundedWeight(rows_to_weight(layer, q).to(torch.int8), found)
