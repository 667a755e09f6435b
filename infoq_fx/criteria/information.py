"""The measuring half of InfoQ: runs the sites of a block and estimates what their observers' information lost."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from infoq_fx.criteria.observers import pool_features
from infoq_fx.criteria.protocol import Work
from infoq_fx.data import CalibrationData
from infoq_fx.errors import CalibrationDataError
from infoq_fx.integer_convolution import find_integer_nodes
from infoq_fx.interpreter import SiteInterpreter, class_logits, first_output, read_weight
from infoq_fx.machine import ThreadMap, thread_map
from infoq_fx.mutual_info import (
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
from infoq_fx.pointwise import project_rows
from infoq_fx.prepared import PreparedModel
from infoq_fx.run_plan import plan_baseline_run, plan_perturbed_run
from infoq_fx.spec import BASELINE_BITS, Measurement, Observer, QuantSite

__all__ = ["ACCURACY_DROP", "InformationMeasure", "Neighbours", "measure_baseline"]

ACCURACY_DROP = "accuracy_drop"
_SAMPLES_PER_GROUP = 50
_MIN_SAMPLES_PER_CLASS = 10

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """The estimators' k: of KSG, and of Ross within a class."""

    ksg: int
    ross: int


@dataclass(frozen=True)
class _Place:
    """A node whose value is projected: its first name, the directions ``[features, slices]``, what is measured.

    ``inputs`` are the projections of X_E for observers of input information, by observer name, sorted once.
    ``baseline`` is the information of the 8-bit baseline per slice, in nats, by ``"measure:observer"``.
    """

    name: str
    directions: Floats
    inputs: Mapping[str, RankedSamples]
    baseline: Mapping[str, Doubles]


@dataclass(frozen=True)
class InformationMeasure:
    """Measures blocks of sites; holds the baseline, the projections of X and the classes, all made once.

    ``predictions`` are the baseline's, int64 ``[samples]``; ``accuracy`` says whether runs go on to the output to
    compare with them.
    """

    places: tuple[_Place, ...]
    classes: ClassedSamples
    predictions: Tensor
    neighbours: Neighbours
    batch_size: int
    accuracy: bool

    @property
    def run_bytes(self) -> int:
        """The projections at all places, float32, and a prediction a sample."""
        samples = len(self.predictions)
        slices: int = sum(place.directions.shape[1] for place in self.places)
        return samples * (8 + 4 * slices)

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], work: Work
    ) -> list[Measurement]:
        """Per observer: baseline SMI, its absolute change and the change's standard error, in nats."""
        if data is None:
            raise CalibrationDataError("InfoQ needs calibration data, found none")
        with thread_map(work.threads, work.stop) as spread:
            records = self._run(prepared, data, sites, work, spread)
            wanted = [(site.name, bits) for site in sites for bits in site.bits]

            def estimate(key: tuple[str, int]) -> Measurement:
                values = self._unchanged(prepared, key[0]) if key not in records else self._estimate(records[key], data)
                return Measurement(*key, values)

            measured = []
            for found in spread(estimate, wanted):
                measured.append(found)
                work.advance(_ESTIMATE_SHARE if (found.site, found.bits) in records else 1.0)
        return measured

    def _run(
        self,
        prepared: PreparedModel,
        data: CalibrationData,
        sites: Sequence[QuantSite],
        work: Work,
        spread: ThreadMap,
    ) -> dict[tuple[str, int], _Record]:
        """All perturbed runs of a block; batches outside, sites inside, so that each baseline runs once."""
        nodes = self._nodes(prepared)
        observed = set(nodes) | ({first_output(prepared)} if self.accuracy else set())
        integers = find_integer_nodes(prepared)
        plans = {site.name: plan_perturbed_run(prepared, site.name, observed, integers) for site in sites}
        runs = [(site.name, bits) for site in sites for bits in site.bits if bits != BASELINE_BITS]
        if not runs:
            return {}
        boundary = set().union(*(plan.boundary for plan in plans.values()))
        baseline_plan = plan_baseline_run(prepared, boundary, integers)
        interpreter = SiteInterpreter(prepared, integers)
        interpreter.quantize_weights(sites)
        records = {run: _Record(nodes, first_output(prepared), data.samples) for run in runs}
        own = _ForkPerThread(interpreter)
        for start, batch in _numbered_batches(data, self.batch_size):
            known = interpreter.run_plan(baseline_plan, {}, inputs=batch, is_stopped=work.stop.is_set)

            def perturb(run: tuple[str, int], start: int = start, known: Mapping[fx.Node, Any] = known) -> None:
                plan, read = plans[run[0]], records[run].reader(start)
                own().run_plan(plan, known, perturbed=run, read=read, is_stopped=work.stop.is_set)

            share = (1 - _ESTIMATE_SHARE) * len(next(iter(batch.values()))) / data.samples
            for _ in spread(perturb, runs):
                work.advance(share)
        return records

    def _nodes(self, prepared: PreparedModel) -> dict[fx.Node, _Place]:
        named = prepared.observer_nodes()
        return {named[place.name]: place for place in self.places}

    def _unchanged(self, prepared: PreparedModel, site: str) -> dict[str, float]:
        """What is measured of a site at 8 bits, where nothing is perturbed: no change downstream."""
        nodes = self._nodes(prepared)
        downstream = set(plan_perturbed_run(prepared, site, set(nodes)).nodes)
        values = {ACCURACY_DROP: 0.0} if self.accuracy else {}
        for node, place in nodes.items():
            for key, baseline in place.baseline.items() if node in downstream else ():
                values[f"{key}:baseline"] = float(np.mean(baseline))
                values[f"{key}:change"] = values[f"{key}:standard_error"] = 0.0
        return values

    def _estimate(self, record: _Record, data: CalibrationData) -> dict[str, float]:
        values: dict[str, float] = {}
        if self.accuracy:
            reference = self.predictions if data.labels is None else data.labels.cpu()
            before, after = self.predictions == reference, record.predictions == reference
            values[ACCURACY_DROP] = 100.0 * float(before.double().mean() - after.double().mean())
        for node, projected in record.projected.items():
            place = record.places[node]
            for key, baseline in place.baseline.items():
                found = _estimate_information(key, projected, place.inputs, self.classes, self.neighbours)
                change, error = absolute_change(baseline, found)
                values[f"{key}:baseline"] = float(np.mean(baseline))
                values[f"{key}:change"], values[f"{key}:standard_error"] = change, error
        return values


_ESTIMATE_SHARE = 0.3  # of the work on a (site, bit-width), about; only the progress bar asks


class _Record:
    """What one run leaves of the values it passes: projections ``[slices, samples]`` by node, and predictions."""

    def __init__(self, places: Mapping[fx.Node, _Place], output: fx.Node, samples: int) -> None:
        self.places, self.output = places, output
        self.projected: dict[fx.Node, Floats] = {}
        self.predictions = torch.zeros(samples, dtype=torch.int64)

    def reader(self, start: int) -> Callable[[fx.Node, Any], None]:
        def read(node: fx.Node, value: Any) -> None:
            if node is self.output:
                logits = class_logits(value).cpu()
                self.predictions[start : start + len(logits)] = logits.argmax(1)
            if node in self.places:
                self.project(node, pool_features(value, node).float(), start)

        return read

    def project(self, node: fx.Node, features: Tensor, start: int) -> None:
        """Keep the projections of ``features [samples from start on, features]``."""
        directions = self.places[node].directions
        empty = np.empty((directions.shape[1], len(self.predictions)), np.float32)  # takes memory where written only
        out = self.projected.setdefault(node, empty)[:, start : start + len(features)]
        if features.device.type == "cpu":
            project_rows(features.contiguous().numpy(), directions, out)
        else:
            out[:] = (features @ torch.from_numpy(directions).to(features.device)).T.cpu().numpy()


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
    work: Work,
) -> InformationMeasure:
    """One run of the 8-bit baseline over all samples: its information, and what all sites are compared with.

    Args:
        prepared: calibrated.
        data: by the model's input names.
        observers: what is measured, and at which node.
        features: X_E, ``[samples, features]``.
        slices: random directions a place.
        neighbours: of the estimators.
        seed: of directions and class groups.
        batch_size: samples a run.
        work: threads and progress.
    """
    output = first_output(prepared)
    names = {node: min(n for n, m in prepared.observer_nodes().items() if m is node) for node in observers.values()}
    logits: list[Tensor] = [torch.empty(0)] * -(-data.samples // batch_size)
    integers = find_integer_nodes(prepared)
    interpreter = SiteInterpreter(prepared, integers)
    interpreter.quantize_weights()
    own, plan = _ForkPerThread(interpreter), plan_baseline_run(prepared, {*names, output}, integers)
    record = _Record({}, output, data.samples)

    def run(numbered: tuple[int, Mapping[str, Tensor]]) -> None:
        start, batch = numbered
        values = own().run_plan(plan, {}, inputs=batch, is_stopped=work.stop.is_set)
        logits[start // batch_size] = class_logits(values[output]).cpu()
        pooled = {node: pool_features(values[node], node).float() for node in names}
        if not record.places:  # the first batch tells how many features there are
            record.places = {
                node: _Place(name, unit_projections(pooled[node].shape[1], slices, _mix(seed, name)), {}, {})
                for node, name in names.items()
            }
        for node, rows in pooled.items():
            record.project(node, rows, start)

    first, *others = _numbered_batches(data, batch_size)
    run(first)
    with thread_map(work.threads, work.stop) as spread:
        for _ in spread(run, others):
            pass
    found = torch.cat(logits)
    classes = class_samples(_task_labels(prepared, data, found, seed))
    places = [
        _measure_place(
            place,
            [observer for observer, observed in observers.items() if observed is node],
            record.projected[node],
            features,
            classes,
            neighbours,
            seed,
        )
        for node, place in record.places.items()
    ]
    return InformationMeasure(tuple(places), classes, found.argmax(1), neighbours, batch_size, output in names)


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


class _ForkPerThread:
    """The interpreter of the calling thread, a fork of one."""

    def __init__(self, interpreter: SiteInterpreter) -> None:
        self._interpreter, self._local = interpreter, threading.local()

    def __call__(self) -> SiteInterpreter:
        if not hasattr(self._local, "fork"):
            self._local.fork = self._interpreter.fork()
        fork: SiteInterpreter = self._local.fork
        return fork


def _numbered_batches(data: CalibrationData, batch_size: int) -> list[tuple[int, Mapping[str, Tensor]]]:
    return list(zip(range(0, data.samples, batch_size), data.batches(batch_size), strict=True))


def _task_labels(prepared: PreparedModel, data: CalibrationData, logits: Tensor, seed: int) -> NDArray[np.int64]:
    """Y: the labels, or the baseline's predictions; grouped where there are too few samples of a class."""
    data.check_labels(logits.shape[1])
    labels = logits.argmax(1) if data.labels is None else data.labels.cpu()
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
    """A vector a class: its row in the classifier, or its logits over the samples."""
    for node, quantizer in prepared.quantizer_nodes():
        site = quantizer.site
        if site.name == prepared.classifier and len(site.shape) == 2 and site.channel_axis == 0:
            weight = read_weight(prepared, node).cpu()
            if weight.shape[0] == logits.shape[1]:
                return weight
    return logits.T


def _mix(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())
