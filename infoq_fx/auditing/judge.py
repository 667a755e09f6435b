"""Evaluates allocations over samples that no criterion saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import fx
from tqdm.auto import tqdm

from infoq_fx.auditing.result import AuditRow, Hits, Nats
from infoq_fx.conversion.conversion import convert_prepared
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.readings import Categorical, Metric, measure_metric
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.finetuning.trainable import float_copy
from infoq_fx.graph.reading_choice import join_tensors
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.ladder import recover_accuracy
from infoq_fx.recovery.step import RecoveryStep
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.forward import RunOptions, choose_batch_size, hold_float_outputs, hold_outputs
from infoq_fx.runtime.held_outputs import HeldOutputs, make_loss
from infoq_fx.runtime.kept_results import load_result, result_path, store_result
from infoq_fx.runtime.outputs import is_read, predict_classes, read_readings
from infoq_fx.scoring.output_measure import read_class_labels
from infoq_fx.types import Allocation, Plain

__all__ = ["Judge"]


class Judge:
    """Evaluates allocations over the evaluation samples, each once; results are kept in the folder."""

    def __init__(
        self,
        prepared: PreparedModel,
        data: CalibrationData,
        calibration: CalibrationData,
        steps: Sequence[RecoveryStep],
        folder: Path,
        progress: bool,
        metric: Metric | None,
    ) -> None:
        self._prepared, self._data, self._folder, self._progress = prepared, data, folder, progress
        self._calibration, self._steps, self._metric = calibration, steps, metric
        self._batch_size = choose_batch_size(prepared)
        settings: dict[str, Plain] = {"measure": "audit"}
        if steps:
            fitted = digest_run(prepared, calibration, {}, batch_size=self._batch_size)
            settings |= {"recovery": ", ".join(map(repr, steps)), "fitted": fitted}
        self._key = digest_run(prepared, data, settings, batch_size=self._batch_size)
        with one_torch_thread() as threads:
            self._reference = hold_float_outputs(
                prepared, data, batch_size=self._batch_size, run_options=self._run_options(threads)
            )
        self._loss = make_loss(prepared, self._reference)
        self._classes = read_class_labels(prepared, data, self._reference)
        self.float_hits = self._count_hits(self._reference)
        self.float_metric = self._measure_metric(prepared, None)

    def __call__(self, name: str, allocations: Mapping[str, Allocation]) -> AuditRow:
        """Evaluate the allocations of one way to allocate, by budget."""
        shown = tqdm(allocations.items(), desc=f"top-1 ({name})", unit="budget", disable=not self._progress)
        found = {budget: self._run(allocation) for budget, allocation in shown}
        return AuditRow(
            name=name,
            hits={budget: hits for budget, (hits, _, _, _) in found.items() if hits.size},
            nats={budget: nats for budget, (_, nats, _, _) in found.items()},
            sqnr_db={budget: sqnr_db for budget, (_, _, sqnr_db, _) in found.items()},
            metrics={budget: metric for budget, (_, _, _, metric) in found.items() if metric is not None},
            allocations=allocations,
        )

    def _run(self, allocation: Allocation) -> tuple[Hits, Nats, dict[str, float], float | None]:
        described = json.dumps(dict(sorted(allocation.bits.items())))
        path = result_path(self._folder, f"{self._key} {described}")
        if self._metric is None and (kept := self._read(path)) is not None:
            return *kept, None
        model = recover_accuracy(
            self._prepared, allocation.bits, self._calibration, self._steps, cache_dir=self._folder, progress=False
        )
        with one_torch_thread() as threads:
            found = hold_outputs(
                model, self._data, allocation.bits, batch_size=self._batch_size, run_options=self._run_options(threads)
            )
        hits, size = self._count_hits(found), self._batch_size
        starts = range(0, self._data.samples, size)
        nats: Nats = torch.cat([self._loss(self._reference.rows(s, size), found.rows(s, size)) for s in starts]).numpy()
        sqnr_db = self._measure_sqnr(found)
        store_result(path, {"hits": hits.tolist(), "nats": nats.tolist(), "sqnr_db": sqnr_db})
        return hits, nats, sqnr_db, self._measure_metric(model, allocation)

    def _measure_sqnr(self, found: HeldOutputs) -> dict[str, float]:
        """Signal-to-quantization-noise ratio of every output that is read, in dB."""
        names = [n for n, r in zip(self._prepared.output_names, self._prepared.readings, strict=True) if is_read(r)]
        size, sums = self._batch_size, torch.zeros(2, len(names), dtype=torch.float64)
        for start in range(0, self._data.samples, size):
            pairs = zip(self._reference.rows(start, size), found.rows(start, size), strict=True)
            for index, (wanted, x) in enumerate(pairs):
                known = torch.isfinite(wanted)
                signal, noise = wanted[known].double(), (x - wanted)[known].double()
                sums[:, index] += torch.stack([signal.square().sum(), noise.square().sum()])
        decibels = (10 * (sums[0] / sums[1].clamp_min(1e-300)).clamp_min(1e-300).log10()).tolist()
        return dict(zip(names, decibels, strict=True))

    def _measure_metric(self, model: PreparedModel, allocation: Allocation | None) -> float | None:
        """The user's metric of the quantized module, or of the float model."""
        if self._metric is None:
            return None
        module: fx.GraphModule = float_copy(model) if allocation is None else convert_prepared(model, allocation, None)
        parts, structure = [], None
        with one_torch_thread(), torch.no_grad():
            for batch in self._data.batches(self._batch_size):
                structure = module(*batch.values())
                structure = structure if allocation is not None else model.form.give(structure)
                parts.append(tuple(x.cpu() for x in flatten_tensors(structure)))
        return measure_metric(self._metric, join_tensors(structure, parts), self._data.labels)

    def _count_hits(self, outputs: HeldOutputs) -> Hits:
        """The share of right classes of every sample; empty if no output has classes."""
        if self._classes is None:
            return np.zeros(0)
        reading = read_readings(self._prepared)[self._classes.index]
        assert isinstance(reading, Categorical)
        right = predict_classes(reading, outputs.tensors[self._classes.index]) == self._classes.labels
        hits: Hits = right.double().reshape(len(right), -1).mean(1).numpy()
        return hits

    def _read(self, path: Path) -> tuple[Hits, Nats, dict[str, float]] | None:
        kept = load_result(path)
        hits, nats, sqnr_db = kept.get("hits"), kept.get("nats"), kept.get("sqnr_db")
        if not isinstance(hits, list) or not isinstance(nats, list) or not isinstance(sqnr_db, dict):
            return None
        is_whole = len(nats) == self._data.samples and len(hits) == len(self.float_hits)
        return (np.array(hits, np.float64), np.array(nats), sqnr_db) if is_whole else None

    def _run_options(self, threads: int) -> RunOptions:
        on_cpu = self._prepared.device.type == "cpu"
        return RunOptions(threads=threads if on_cpu else 1)
