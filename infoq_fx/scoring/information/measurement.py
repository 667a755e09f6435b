"""Measures sliced mutual information at observers: runs the sites of a block and estimates how it changes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.threads import ThreadMap, thread_map
from infoq_fx.errors import CalibrationDataError
from infoq_fx.graph.float_interpreter import read_weight
from infoq_fx.quantization.pointwise import project_rows
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, run_perturbed, run_whole
from infoq_fx.runtime.held_outputs import OutputHolder
from infoq_fx.runtime.interpreter import ReadValue
from infoq_fx.runtime.outputs import read_nodes
from infoq_fx.runtime.run_plan import plan_perturbed_run
from infoq_fx.scoring.criterion import Observer
from infoq_fx.scoring.information.mutual_info import (
    ClassedSamples,
    RankedSamples,
    absolute_change,
    class_samples,
    estimate_ksg,
    estimate_ross,
    group_classes,
    rank_samples,
    unit_projections,
)
from infoq_fx.scoring.information.observers import pool_features
from infoq_fx.scoring.output_measure import OutputRecord, Outputs, affected_outputs, read_outputs
from infoq_fx.types import BASELINE_BITS, Measurement, QuantSite

__all__ = ["InformationMeasure", "Neighbours", "measure_baseline"]

_SAMPLES_PER_GROUP = 50
_MIN_SAMPLES_PER_CLASS = 10

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """Number of neighbours k of the estimators: of KSG, and of Ross within a class."""

    ksg: int
    ross: int


@dataclass(frozen=True)
class _Place:
    """A node whose value is projected: its first name, the directions ``[features, slices]``, what is measured there.

    ``inputs`` are the projections of X_E for observers of input information, by observer name, sorted once.
    ``baseline`` is the information of the 8-bit baseline per slice, in nats, by ``"measure:observer"``.
    """

    name: str
    directions: Floats
    inputs: Mapping[str, RankedSamples]
    baseline: Mapping[str, Doubles]


@dataclass(frozen=True)
class InformationMeasure:
    """Measures blocks of sites; holds the baseline, the projections of X_E and the classes, all computed once.

    ``reads_output`` says whether runs continue to the output, which is then compared with the baseline's.
    """

    places: tuple[_Place, ...]
    classes: ClassedSamples
    outputs: Outputs
    neighbours: Neighbours
    batch_size: int
    reads_output: bool

    @property
    def run_bytes(self) -> int:
        """Bytes of a run's projections, float32, and of what is kept of its outputs."""
        slices: int = sum(place.directions.shape[1] for place in self.places)
        return self.outputs.samples * (OutputRecord.SAMPLE_BYTES + 4 * slices)

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure baseline SMI, its absolute change and the change's standard error per observer, in nats."""
        if data is None:
            raise CalibrationDataError(
                "InfoQ needs calibration data, found none; give some, or take criterion='weight_mse'"
            )
        with thread_map(run_options.threads, run_options.stop) as spread:
            records = self._run(prepared, data, sites, run_options, spread)
            wanted = [(site.name, bits) for site in sites for bits in site.bits]

            def estimate(key: tuple[str, int]) -> Measurement:
                values = self._unchanged(prepared, key[0]) if key not in records else self._estimate(records[key])
                return Measurement(*key, values)

            measured = []
            for found in spread(estimate, wanted):
                measured.append(found)
                run_options.advance(_ESTIMATE_SHARE if (found.site, found.bits) in records else 1.0)
        return measured

    def _run(
        self,
        prepared: PreparedModel,
        data: CalibrationData,
        sites: Sequence[QuantSite],
        run_options: RunOptions,
        spread: ThreadMap,
    ) -> dict[tuple[str, int], _Record]:
        """A record of every perturbed run of a block."""
        nodes, read = self._nodes(prepared), read_nodes(prepared)
        runs = [(site.name, bits) for site in sites for bits in site.bits if bits != BASELINE_BITS]
        names = [site.name for site in sites]
        reached = affected_outputs(prepared, names) if self.reads_output else dict.fromkeys(names, ())
        records = {run: _Record(nodes, [(i, read[i]) for i in reached[run[0]]], self.outputs) for run in runs}
        run_perturbed(
            prepared,
            data,
            sites,
            {*nodes, *read} if self.reads_output else nodes,
            lambda run, start: records[run].reader(start),
            batch_size=self.batch_size,
            run_options=run_options,
            spread=spread,
            share=1 - _ESTIMATE_SHARE,
        )
        return records

    def _nodes(self, prepared: PreparedModel) -> dict[fx.Node, _Place]:
        named = prepared.observer_nodes()
        return {named[place.name]: place for place in self.places}

    def _unchanged(self, prepared: PreparedModel, site: str) -> dict[str, float]:
        """The values of a site at 8 bits, where nothing is perturbed: no change downstream."""
        nodes = self._nodes(prepared)
        downstream = set(plan_perturbed_run(prepared, site, set(nodes)).nodes)
        values = OutputRecord(self.outputs, ()).summarize() if self.reads_output else {}
        for node, place in nodes.items():
            for key, baseline in place.baseline.items() if node in downstream else ():
                values[f"{key}:baseline"] = float(np.mean(baseline))
                values[f"{key}:change"] = values[f"{key}:standard_error"] = 0.0
        return values

    def _estimate(self, record: _Record) -> dict[str, float]:
        values = record.outputs.summarize() if self.reads_output else {}
        for node, projected in record.projections.found.items():
            place = record.projections.places[node]
            for key, baseline in place.baseline.items():
                found = _estimate_information(key, projected, place.inputs, self.classes, self.neighbours)
                change, error = absolute_change(baseline, found)
                values[f"{key}:baseline"] = float(np.mean(baseline))
                values[f"{key}:change"], values[f"{key}:standard_error"] = change, error
        return values


_ESTIMATE_SHARE = 0.3  # approximate share of the time of a (site, bit-width); used by the progress bar only


class _Projections:
    """Projections ``[slices, samples]`` by node, filled batch by batch."""

    def __init__(self, places: Mapping[fx.Node, _Place], samples: int) -> None:
        self.places, self._samples = places, samples
        self.found: dict[fx.Node, Floats] = {}

    def add(self, node: fx.Node, features: Tensor, start: int) -> None:
        """Store the projections of ``features [samples from start on, features]``."""
        directions = self.places[node].directions
        empty = np.empty((directions.shape[1], self._samples), np.float32)  # uses memory only where written
        out = self.found.setdefault(node, empty)[:, start : start + len(features)]
        if features.device.type == "cpu":
            project_rows(features.contiguous().numpy(), directions, out)
        else:
            out[:] = (features @ torch.from_numpy(directions).to(features.device)).T.cpu().numpy()


class _Record:
    """What is kept of one run: projections at the observers, and the change of the outputs."""

    def __init__(self, places: Mapping[fx.Node, _Place], read: Sequence[tuple[int, fx.Node]], outputs: Outputs) -> None:
        self._read = read
        self.projections = _Projections(places, outputs.samples)
        self.outputs = OutputRecord(outputs, [index for index, _ in read])

    def reader(self, start: int) -> ReadValue:
        def read(node: fx.Node, value: Any) -> None:
            for index, output in self._read:
                if node is output:
                    self.outputs.add(start, index, value)
            if node in self.projections.places:
                self.projections.add(node, pool_features(value, node).float(), start)

        return read


def measure_baseline(
    prepared: PreparedModel,
    data: CalibrationData,
    observers: Mapping[Observer, fx.Node],
    features: Floats,
    *,
    slices: int,
    neighbours: Neighbours,
    seed: int,
    batch_size: int,
    reads_output: bool,
    run_options: RunOptions,
) -> InformationMeasure:
    """Run the 8-bit baseline over all samples, and compute what all sites are compared with.

    Args:
        prepared: calibrated.
        data: by the model's input names.
        observers: what is measured, and at which node.
        features: X_E, ``[samples, features]``.
        slices: random directions per observed tensor.
        neighbours: of the estimators.
        seed: of directions and class groups.
        batch_size: samples per run.
        reads_output: whether perturbed runs continue to the output even if no observer needs it.
        run_options: threads and progress.
    """
    nodes = read_nodes(prepared)
    names = {node: min(n for n, m in prepared.observer_nodes().items() if m is node) for node in observers.values()}
    holder, record = OutputHolder(data.samples), _Projections({}, data.samples)

    def read(start: int, values: Mapping[fx.Node, Any]) -> None:
        holder.add(start, [values[node] for node in nodes])
        pooled = {node: pool_features(values[node], node).float() for node in names}
        if not record.places:  # the first batch determines the number of features
            record.places = {
                node: _Place(name, unit_projections(pooled[node].shape[1], slices, _mix(seed, name)), {}, {})
                for node, name in names.items()
            }
        for node, rows in pooled.items():
            record.add(node, rows, start)

    run_whole(prepared, data, {*names, *nodes}, read, batch_size=batch_size, run_options=run_options)
    outputs = read_outputs(prepared, data, holder.finish(), batch_size=batch_size, run_options=run_options)
    classes = class_samples(_choose_classes(prepared, outputs, seed))
    places = [
        _measure_place(
            place,
            [observer for observer, observed in observers.items() if observed is node],
            record.found[node],
            features,
            classes,
            neighbours,
            seed,
        )
        for node, place in record.places.items()
    ]
    return InformationMeasure(
        tuple(places), classes, outputs, neighbours, batch_size, reads_output or not set(nodes).isdisjoint(names)
    )


def _measure_place(
    place: _Place,
    observers: Sequence[Observer],
    projected: Floats,
    features: Floats,
    classes: ClassedSamples,
    neighbours: Neighbours,
    seed: int,
) -> _Place:
    inputs, slices = {}, place.directions.shape[1]
    for observer in observers:
        if observer.measure == "input":
            theta = unit_projections(features.shape[1], slices, _mix(seed, f"input of {observer.name}"))
            seen = np.empty((slices, len(features)), np.float32)
            project_rows(np.ascontiguousarray(features), theta, seen)
            inputs[f"input:{observer.name}"] = rank_samples(seen)
    keys = [f"{observer.measure}:{observer.name}" for observer in observers]
    baseline = {key: _estimate_information(key, projected, inputs, classes, neighbours) for key in keys}
    return replace(place, inputs=inputs, baseline=baseline)


def _estimate_information(
    key: str, projected: Floats, inputs: Mapping[str, RankedSamples], classes: ClassedSamples, neighbours: Neighbours
) -> Doubles:
    """Nats per slice: SMI(L; Y) by Ross, or SMI(X_E; L) by KSG."""
    if key in inputs:
        return estimate_ksg(inputs[key], projected, k=neighbours.ksg, threads=1)
    return estimate_ross(projected, classes, k=neighbours.ross, threads=1)


def _choose_classes(prepared: PreparedModel, outputs: Outputs, seed: int) -> NDArray[np.int64]:
    """Y of a sample: its label, the baseline's prediction, or the group that its outputs are in."""
    classes = outputs.classes
    if classes is not None and classes.labels.ndim == 1:
        return group_labels(prepared, classes.labels, outputs.base.tensors[classes.index], seed)
    rows = torch.cat([x.flatten(2).mean(2) if x.ndim > 3 else x.flatten(1) for x in outputs.base.tensors], 1)
    return group_classes(rows.numpy(), max(2, len(rows) // _SAMPLES_PER_GROUP), seed)


def group_labels(prepared: PreparedModel, labels: Tensor, logits: Tensor, seed: int) -> NDArray[np.int64]:
    """Return Y: the labels or the baseline's predictions, with classes grouped if there are too few samples of each."""
    classes = labels.unique()
    if len(classes) * _MIN_SAMPLES_PER_CLASS <= len(labels):
        return np.asarray(labels.numpy())
    groups = max(2, len(labels) // _SAMPLES_PER_GROUP)
    if len(classes) <= groups:
        return np.asarray(labels.numpy())
    rows = _class_rows(prepared, logits)[classes]
    group_of = np.zeros(int(classes.max()) + 1, np.int64)
    group_of[classes.numpy()] = group_classes(rows.numpy(), groups, seed)
    grouped: NDArray[np.int64] = group_of[labels.numpy()]
    return grouped


def _class_rows(prepared: PreparedModel, logits: Tensor) -> Tensor:
    """One vector per class: its row in the classifier, or its logits over the samples."""
    for node, quantizer in prepared.quantizer_nodes():
        site = quantizer.site
        if site.name == prepared.classifier and len(site.shape) == 2 and site.channel_axis == 0:
            weight = read_weight(prepared, node).cpu()
            if weight.shape[0] == logits.shape[1]:
                return weight
    return logits.T


def _mix(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
