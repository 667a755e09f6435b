"""InfoQ: how much quantizing one site changes the information that flows through the rest of the network."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from infoq_fx.criteria.observers import choose_default_observers, find_observers, pool_features
from infoq_fx.criteria.protocol import Scores
from infoq_fx.data import CalibrationData
from infoq_fx.encoders import Encoder, encode_inputs
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.interpreter import (
    SiteInterpreter,
    class_logits,
    first_output,
    read_weight,
)
from infoq_fx.mutual_info import absolute_change, estimate_ksg, estimate_ross, group_classes, unit_projections
from infoq_fx.prepared import PreparedModel
from infoq_fx.run_plan import plan_baseline_run, plan_perturbed_run
from infoq_fx.spec import BASELINE_BITS, Measurement, Observer, QuantSite, Score

__all__ = ["CORRELATION_THRESHOLD", "InfoQ"]

CORRELATION_THRESHOLD = 0.70
_SAMPLES_PER_GROUP = 50
_MIN_SAMPLES_PER_CLASS = 10
_SMALLEST_BASELINE_NATS = 1e-3
_BASELINE = ("", 0)
_ACCURACY_DROP = "accuracy_drop"

Run = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class InfoQ:
    """The paper's criterion: normalised change of sliced mutual information at downstream observers.

    S(i, b) = 1/b * (sum of |change of SMI| over downstream observers) / (sum of their baseline SMI), Eqs. 3 and 4:
    SMI(X_E; L_j) by KSG at input observers, SMI(L_j; Y) by Ross at task observers, over the same random unit
    projections for the baseline and every perturbed run. Feature maps are averaged over space (tokens over the
    sequence) before they are projected. The score has no unit (nats over nats, divided by bits).

    Cost: one partial forward pass a (site, bit-width); labels help but are not needed.

    Args:
        observers: None for the paper's heuristic (task information at the classifier's input and at the logits,
            input information at intermediate blocks); names or :class:`Observer` values (a bare name measures
            both); ``"auto"`` for the paper's correlation analysis: every named place is measured and those whose
            change correlates with the accuracy drop at r > 0.70 are used.
        encoder: X -> X_E, see :func:`infoq_fx.encoders.encode_inputs`.
        slices: random projections a place; the standard error falls with its square root.
        neighbours: k of KSG; larger has less variance and more bias.
        class_neighbours: k of Ross.
        seed: of projections and of class groups.

    Reference:
        "InfoQ: Mixed-Precision Quantization via Global Information Flow", Eqs. 3 and 4, Algorithm 1.
    """

    observers: Sequence[Observer | str] | Literal["auto"] | None = None
    encoder: Encoder | str | None = None
    slices: int = 256
    neighbours: int = 5
    class_neighbours: int = 3
    seed: int = 0
    name: str = "infoq"
    needs_data: bool = True

    def measure(
        self,
        prepared: PreparedModel,
        data: CalibrationData | None,
        sites: Sequence[QuantSite],
        *,
        batch_size: int,
        advance: Callable[[float], None],
    ) -> list[Measurement]:
        """Per observer: baseline SMI, its absolute change and the change's standard error, in nats.

        Raises:
            CalibrationDataError: no data, or too few samples for the estimators.
            OptionError: unknown observers, or a site with none downstream.
        """
        if data is None or data.samples <= self.neighbours + 1:
            found = "none" if data is None else f"{data.samples} samples"
            raise CalibrationDataError(f"InfoQ needs more than {self.neighbours + 1} samples, found {found}")
        observers = self._resolve(prepared)
        runs = _run_all(prepared, data, sites, set(observers.values()), self, batch_size, advance)
        labels = _task_labels(prepared, data, runs, self.seed)
        features = encode_inputs(data.inputs, self.encoder, batch_size=batch_size).numpy()
        estimator = _Estimator(self, features, labels)
        projected = runs.projected[_BASELINE]
        baseline = {observer: estimator(observer, projected[node]) for observer, node in observers.items()}
        measured = []
        for site in sites:
            for bits in site.bits:
                run = runs.projected[site.name, bits]
                values = {_ACCURACY_DROP: runs.accuracy_drop((site.name, bits), data.labels)}
                for observer, node in observers.items():
                    if node in run:
                        change, error = absolute_change(baseline[observer], estimator(observer, run[node]))
                        key = f"{observer.measure}:{observer.name}"
                        values[f"{key}:baseline"] = float(np.mean(baseline[observer]))
                        values[f"{key}:change"], values[f"{key}:standard_error"] = change, error
                measured.append(Measurement(site.name, bits, values))
        return measured

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Eq. 4 over the observers, which are chosen here from the same measurements when ``"auto"``."""
        chosen = {f"{o.measure}:{o.name}" for o in self._resolve(prepared)}
        if self.observers == "auto":
            chosen = self._select(prepared, measurements)
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            keys = [key for key in chosen if f"{key}:change" in found.values]
            if not keys:
                raise OptionError(f"site {found.site!r} has no observer downstream; add 'output' to observers")
            total = sum(found.values[f"{key}:baseline"] for key in sorted(keys))
            scale = found.bits * max(total, _SMALLEST_BASELINE_NATS)
            change = sum(found.values[f"{key}:change"] for key in sorted(keys))
            error = math.sqrt(sum(found.values[f"{key}:standard_error"] ** 2 for key in sorted(keys)))
            scores.setdefault(found.site, {})[found.bits] = Score(change / scale, error / scale)
        return scores

    def correlations(self, measurements: Sequence[Measurement]) -> dict[str, float]:
        """Pearson r between the change of SMI and the accuracy drop, by ``"measure:observer"`` (paper, Fig. 1).

        Over all (site, bit-width) below 8 bits upstream of the observer; observers with fewer than three, or
        without any variation, are left out.
        """
        below = [m for m in measurements if m.bits < BASELINE_BITS]
        suffix = ":change"
        keys = sorted({k.removesuffix(suffix) for m in below for k in m.values if k.endswith(suffix)})
        found = {}
        for key in keys:
            pairs = [(m.values[key + suffix], m.values[_ACCURACY_DROP]) for m in below if key + suffix in m.values]
            changes, drops = np.array(pairs).T
            if len(pairs) > 2 and np.std(changes) > 0 and np.std(drops) > 0:
                found[key] = float(np.corrcoef(changes, drops)[0, 1])
        return found

    def _resolve(self, prepared: PreparedModel) -> dict[Observer, fx.Node]:
        if self.observers is None:
            return choose_default_observers(prepared)
        return find_observers(prepared, self.observers)

    def _select(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> set[str]:
        correlations = self.correlations(measurements)
        chosen = {key for key, r in correlations.items() if r > CORRELATION_THRESHOLD}
        log = logging.getLogger(__name__)
        if any(not any(f"{key}:change" in m.values for key in chosen) for m in measurements):
            log.warning(
                "observers='auto': %d observers reach r > %.2f but not every site has one downstream; the default "
                "observers are added",
                len(chosen),
                CORRELATION_THRESHOLD,
            )
            measured_as = {node: observer.name for observer, node in self._resolve(prepared).items()}
            defaults = choose_default_observers(prepared)
            chosen |= {f"{o.measure}:{measured_as[node]}" for o, node in defaults.items()}
        log.info("observers='auto' chose %s", ", ".join(sorted(chosen)))
        return chosen


@dataclass(frozen=True)
class _Runs:
    """What all runs left: projections ``[slices, samples]`` by run and observe node, and class predictions."""

    projected: Mapping[Run, Mapping[fx.Node, np.ndarray[Any, Any]]]
    predictions: Mapping[Run, Tensor]
    logits: Tensor

    def accuracy_drop(self, run: Run, labels: Tensor | None) -> float:
        """Top-1 of the baseline minus top-1 of the run, in points of 100; without labels, disagreement."""
        reference = self.predictions[_BASELINE] if labels is None else labels.cpu()
        before, after = self.predictions[_BASELINE] == reference, self.predictions[run] == reference
        return 100.0 * float(before.double().mean() - after.double().mean())


@dataclass
class _Recorder:
    """Reads one run's observed values as they are computed and keeps only their projections."""

    criterion: InfoQ
    observed: set[fx.Node]
    output: fx.Node
    names: Mapping[fx.Node, str]
    samples: int
    directions: dict[fx.Node, Tensor] = field(default_factory=dict)
    projected: dict[Run, dict[fx.Node, np.ndarray[Any, Any]]] = field(default_factory=dict)
    predictions: dict[Run, Tensor] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)

    def reader(self, run: Run, start: int) -> Callable[[fx.Node, Any], None]:
        stored = self.projected.setdefault(run, {})
        predictions = self.predictions.setdefault(run, torch.zeros(self.samples, dtype=torch.int64))

        def read(node: fx.Node, value: Any) -> None:
            if node is self.output:
                logits = class_logits(value).cpu()
                predictions[start : start + len(logits)] = logits.argmax(1)
                if run == _BASELINE:
                    self.logits.append(logits)
            if node in self.observed:
                rows = self._project(node, value)
                if node not in stored:
                    stored[node] = np.empty((rows.shape[0], self.samples), np.float32)
                stored[node][:, start : start + rows.shape[1]] = rows

        return read

    def _project(self, node: fx.Node, value: Tensor) -> np.ndarray[Any, Any]:
        features = pool_features(value, node).float()
        if node not in self.directions:
            seed = _mix(self.criterion.seed, self.names[node])
            chosen = unit_projections(features.shape[1], self.criterion.slices, seed)
            self.directions[node] = torch.from_numpy(chosen).to(features.device)
        projected: np.ndarray[Any, Any] = (features @ self.directions[node]).T.cpu().numpy()
        return projected


def _run_all(
    prepared: PreparedModel,
    data: CalibrationData,
    sites: Sequence[QuantSite],
    observed: set[fx.Node],
    criterion: InfoQ,
    batch_size: int,
    advance: Callable[[float], None],
) -> _Runs:
    """Baseline and perturbed runs of all batches; batches outside, sites inside, so that each baseline runs once."""
    output = first_output(prepared)
    wanted = observed | {output}
    plans = {site.name: plan_perturbed_run(prepared, site.name, wanted) for site in sites}
    kept = set().union(*(plan.boundary for plan in plans.values()))
    baseline_plan = plan_baseline_run(prepared, kept | wanted)
    names = {node: min(n for n, m in prepared.observer_nodes().items() if m is node) for node in observed}
    recorder = _Recorder(criterion, observed, output, names, data.samples)
    interpreter = SiteInterpreter(prepared)
    batches = range(0, data.samples, batch_size)
    for start, batch in zip(batches, data.batches(batch_size), strict=True):
        known = interpreter.run_plan(baseline_plan, {}, inputs=batch, read=recorder.reader(_BASELINE, start))
        for site in sites:
            for bits in site.bits:
                run = (site.name, bits)
                if bits != BASELINE_BITS:
                    interpreter.run_plan(plans[site.name], known, perturbed=run, read=recorder.reader(run, start))
                advance(len(next(iter(batch.values()))) / data.samples)
    for site in sites:
        if BASELINE_BITS in site.bits:  # nothing is perturbed
            downstream = {node for node in observed if node in plans[site.name].nodes}
            same = {node: recorder.projected[_BASELINE][node] for node in downstream}
            recorder.projected[site.name, BASELINE_BITS] = same
            recorder.predictions[site.name, BASELINE_BITS] = recorder.predictions[_BASELINE]
    return _Runs(recorder.projected, recorder.predictions, torch.cat(recorder.logits))


class _Estimator:
    """Per-slice mutual information of one observer's projections, in nats."""

    def __init__(self, criterion: InfoQ, features: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self._criterion, self._features, self._labels = criterion, features, labels
        self._projected_inputs: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, observer: Observer, projected: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if observer.measure == "task":
            return estimate_ross(projected, self._labels, k=self._criterion.class_neighbours)
        if observer.name not in self._projected_inputs:
            seed = _mix(self._criterion.seed, f"input of {observer.name}")
            directions = unit_projections(self._features.shape[1], self._criterion.slices, seed)
            self._projected_inputs[observer.name] = np.ascontiguousarray((self._features @ directions).T)
        return estimate_ksg(self._projected_inputs[observer.name], projected, k=self._criterion.neighbours)


def _task_labels(prepared: PreparedModel, data: CalibrationData, runs: _Runs, seed: int) -> np.ndarray[Any, Any]:
    """Y: the labels, or the baseline's predictions; grouped where there are too few samples of a class."""
    data.check_labels(runs.logits.shape[1])
    labels = runs.predictions[_BASELINE] if data.labels is None else data.labels.cpu()
    classes = labels.unique()
    if len(classes) * _MIN_SAMPLES_PER_CLASS <= len(labels):
        return np.asarray(labels.numpy())
    groups = max(2, len(labels) // _SAMPLES_PER_GROUP)
    if len(classes) <= groups:
        return np.asarray(labels.numpy())
    rows = _class_rows(prepared, runs.logits)[classes]
    group_of = np.zeros(int(classes.max()) + 1, np.int64)
    group_of[classes.numpy()] = group_classes(rows.numpy(), groups, seed)
    grouped: np.ndarray[Any, Any] = group_of[labels.numpy()]
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
