"""Compares criteria on one model under equal conditions, by the accuracy of their allocations."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.export import ExportedProgram

from infoq_fx.allocation.allocation_file import decode_allocation, describe_allocation
from infoq_fx.allocation.cost import limits_bitops
from infoq_fx.allocation.solver import allocate, check_budget, find_uniform
from infoq_fx.api import DEFAULT_BITS, prepare
from infoq_fx.auditing.judge import Judge
from infoq_fx.auditing.references import AnyReference, Reference, find_references
from infoq_fx.auditing.result import Audit, AuditRow
from infoq_fx.core.data import CalibrationData, read_data
from infoq_fx.core.option_checks import check_model, check_patterns
from infoq_fx.core.readings import Metric, check_metric
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.graph.model_inputs import find_arguments, fit_data
from infoq_fx.graph.reading_choice import OutputsOption
from infoq_fx.quantization.codebooks import Levels, choose_levels
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.recovery.ladder import AnyRecovery, find_candidates, find_steps
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.forward import RunOptions, choose_batch_size
from infoq_fx.runtime.kept_results import kept_folder, load_result, result_path, store_result
from infoq_fx.scoring.criteria import AnyCriterion, find_criterion
from infoq_fx.scoring.criterion import Criterion, Measure
from infoq_fx.scoring.output_measure import ACCURACY_DROP
from infoq_fx.scoring.refinement import choose_allocation
from infoq_fx.scoring.sensitivity import Resources, describe_measurements, measure_sensitivity, runs_weights
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation, Budget, Plain, Score

__all__ = ["Audit", "AuditRow", "audit"]

_LOGGER = logging.getLogger(__name__)
DEFAULT_CRITERIA = (
    "infoq",
    "infoq_paper",
    "eagl",
    "weight_mse",
    "output_sqnr",
    "output_kl",
    "hawq_v2",
    "mpqco",
    "ompq",
)
_LOW_BITS = 4
_OPTIONAL = ("samples", "choose_samples", "choose_bits", "scores_float", "runs_pairs", "score_pairs")  # of a criterion


def audit(
    model: nn.Module | ExportedProgram,
    calibration_data: Any,
    criteria: Sequence[AnyCriterion] = DEFAULT_CRITERIA,
    budgets: Sequence[float | Budget] = (5.0, 4.0, 3.0),
    *,
    references: Sequence[AnyReference] = (),
    evaluation_data: Any = None,
    correlate: bool = True,
    bits: int | Sequence[int] = DEFAULT_BITS,
    activation_bits: int | Sequence[int] | None = 8,
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
    tie: Sequence[Sequence[str]] = (),
    outputs: OutputsOption = "auto",
    levels: Levels = "auto",
    metric: Metric | None = None,
    recovery: AnyRecovery = "none",
    device: torch.device | str = "cpu",
    executor: Executor | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> Audit:
    """Compare criteria on a model with the same quantizers, data and integer program.

    For each criterion: the correlation of its scores with the accuracy drop of every layer at 4 bits and fewer, the
    top-1 accuracy of its allocation at every budget, the nats lost there, and its cost. Accuracy is that of the
    quantized model, by default with weights rounded to nearest, on samples that no criterion saw; without labels it is
    agreement with the float model. Nats are the mean KL divergence from the float model's outputs on the same samples.
    There are also rows for the uniform allocation, for the searches in ``references`` and, if ``"infoq"`` is among the
    criteria, for the allocation that :func:`infoq_fx.quantize` makes by default.

    Results are deterministic, except for the CPU times. With ``cache_dir`` an interrupted audit resumes, and for
    another criterion or budget only what is new is measured.

    Args:
        model: as for :func:`infoq_fx.quantize`.
        calibration_data: the data for the criteria.
        criteria: names, objects or functions. The default leaves out those that train (``"limpq"``, ``"alps"``) and
            those that need labels (``"loss"``, ``"accuracy"``); of the default ones, those that cannot judge the
            model, such as ``"hawq_v2"`` without classes, are left out with a warning in the log.
        budgets: mean weight bit-widths or :class:`infoq_fx.Budget` values.
        references: searches without scores that get a row each, in minutes for every budget: ``"evolutionary"``,
            ``"differentiable"``, or objects with options,
            :class:`~infoq_fx.auditing.evolutionary.EvolutionarySearch` and
            :class:`~infoq_fx.auditing.differentiable.DifferentiableSearch`.
        evaluation_data: the data that accuracy is measured on; None sets every second calibration sample aside for it.
        correlate: measure the accuracy drop of every layer at 4 bits and fewer and correlate scores with it; this takes
            about half as long as scoring.
        bits: this and all following arguments are as for :func:`infoq_fx.quantize`.
        activation_bits: candidates of activations; criteria that score only weights need a single one.
        ignore: layers to leave in float.
        pin: fixed bit-widths.
        tie: layers with one bit-width.
        outputs: what the outputs mean.
        levels: the integers of weights; ``"auto"`` takes mirrored ones if a budget limits BitOps.
        metric: ``(outputs, labels) -> float`` over all evaluation samples, larger is better; it is measured for every
            allocation too. The outputs are the model's own, in its own structure.
        recovery: the steps applied to each allocation before it is measured, see :func:`infoq_fx.recover`, and assumed
            in scoring, see :func:`infoq_fx.score`; ``"fast"`` is the default of :func:`infoq_fx.quantize`, and takes
            its time for every row and budget.
        device: to compute on.
        executor: workers for the scoring.
        cache_dir: folder that keeps everything finished.
        memory_limit: bytes that scoring may take in one process.
        progress: show progress bars on standard error.

    Raises:
        OptionError: an argument cannot be used, a criterion or reference is given twice, or activations are searched
            that a criterion does not score.
        CalibrationDataError: the data cannot be used.
        InfeasibleBudgetError: a budget is out of reach.
    """
    check_model(model)
    check_patterns(ignore, pin, tie)
    check_metric(metric)
    if not isinstance(budgets, list | tuple):
        raise OptionError(f"budgets={budgets!r}; give a list, such as [4.0, 3.0]")
    chosen, steps, searches = _read_criteria(criteria), find_steps(recovery), find_references(references)
    arguments = find_arguments(model)
    held_back = None if evaluation_data is None else read_data(evaluation_data, arguments)
    calibration, evaluation = _split(read_data(calibration_data, arguments), held_back)
    prepared = prepare(
        model,
        calibration,
        bits=bits,
        activation_bits=activation_bits,
        ignore=ignore,
        pin=pin,
        tie=tie,
        outputs=outputs,
        levels=choose_levels(levels, counts_bitops=limits_bitops(*budgets)),
        device=device,
    )
    limits = {_name_budget(budget): check_budget(prepared.inventory, budget) for budget in budgets}
    if not limits:
        raise OptionError("audit got no budget; give at least one, such as budgets=[4.0, 3.0]")
    calibration, evaluation = (fit_data(prepared, data) for data in (calibration, evaluation))
    with kept_folder(cache_dir) as folder:
        resources = Resources(executor=executor, cache_dir=folder, memory_limit=memory_limit, progress=progress)
        drops = _measure_drops(prepared, evaluation, resources) if correlate else {}
        judge = Judge(prepared, evaluation, calibration, steps, folder, progress, metric)
        candidates = find_candidates(prepared, calibration, steps)
        tables, rows = {}, []
        for criterion in chosen:
            try:
                table, seconds = _score(prepared, calibration, criterion, resources, folder, candidates)
            except (CalibrationDataError, OptionError) as reason:
                if tuple(criteria) != DEFAULT_CRITERIA or criterion.name == "infoq":
                    raise
                _LOGGER.warning("criterion %r is left out: %s", criterion.name, reason)
                continue
            tables[criterion.name] = table
            allocations = {name: allocate(table, limit) for name, limit in limits.items()}
            r, error, rank = _correlate(table, drops)
            rows.append(
                replace(
                    judge(criterion.name, allocations),
                    correlation=r,
                    correlation_error=error,
                    rank_correlation=rank,
                    cpu_seconds=seconds,
                    images=_count_images(criterion, calibration),
                )
            )
        uniform = {name: find_uniform(prepared.inventory, limit)[1] for name, limit in limits.items()}
        fitting = {name: Allocation(bits=bits) for name, bits in uniform.items() if bits is not None}
        rows.append(judge("uniform", fitting))
        if "infoq" in tables:
            refined = {
                name: _refine(prepared, tables["infoq"], limit, calibration, candidates, folder)
                for name, limit in limits.items()
            }
            rows.append(judge("infoq, refined", refined))
        rows += [
            _judge_reference(judge, reference, prepared, limits, calibration, candidates, folder)
            for reference in searches
        ]
    return Audit(
        rows=tuple(rows),
        budgets=tuple(limits),
        tables=tables,
        accuracy_drops=drops,
        float_top1=100 * float(judge.float_hits.mean()) if judge.float_hits.size else math.nan,
        evaluation_samples=evaluation.samples,
        float_metric=judge.float_metric,
        metric_name=getattr(metric, "__name__", "metric"),
        references=tuple(reference.name for reference in searches),
    )


def _score(
    prepared: PreparedModel,
    data: CalibrationData,
    criterion: Criterion,
    resources: Resources,
    folder: Path,
    candidates: Candidates | None,
) -> tuple[SensitivityTable, float]:
    """The table and the CPU seconds of all runs behind it, earlier audits included."""
    settings = describe_measurements(criterion, prepared, data, candidates)
    key = digest_run(prepared, data, settings, batch_size=choose_batch_size(prepared))
    path = result_path(folder, f"seconds {key}")
    before, timed = float(load_result(path).get("seconds", 0.0)), _Timed(criterion, candidates)
    try:
        table, _ = measure_sensitivity(prepared, data, timed, resources, candidates)
    finally:
        seconds = before + timed.seconds()
        store_result(path, {"seconds": seconds})
    return table, seconds


def _refine(
    prepared: PreparedModel,
    table: SensitivityTable,
    limit: float | Budget,
    data: CalibrationData,
    candidates: Candidates | None,
    folder: Path,
) -> Allocation:
    """The allocation that ``quantize()`` makes under a limit; cached, since candidates need another rounding for it."""
    # The first proposal reflects the limit and user-defined costs.
    first = json.dumps(describe_allocation(allocate(table, limit)))
    settings: dict[str, Plain] = {"measure": "refinement", "table": table.to_json(), "first": first}
    if candidates is not None:
        settings |= candidates.describe()
    path = result_path(folder, digest_run(prepared, data, settings, batch_size=choose_batch_size(prepared)))
    with suppress(OptionError, KeyError, TypeError, ValueError, AttributeError):  # not cached, or damaged
        return decode_allocation(load_result(path)["allocation"])
    found = choose_allocation(prepared, table, limit, data, candidates=candidates)
    store_result(path, {"allocation": describe_allocation(found)})
    return found


def _judge_reference(
    judge: Judge,
    reference: Reference,
    prepared: PreparedModel,
    limits: Mapping[str, Budget],
    data: CalibrationData,
    candidates: Candidates | None,
    folder: Path,
) -> AuditRow:
    """The row of a search; what it finds is kept."""
    found, total = {}, 0.0
    for name, limit in limits.items():
        settings: dict[str, Plain] = {"measure": "reference", "search": repr(reference), "limits": str(limit)}
        if limit.costs:  # user-defined costs are known by the allocation that is found under them
            uniform = find_uniform(prepared.inventory, limit)[1]
            settings["fits"] = json.dumps(uniform, sort_keys=True)
        if candidates is not None:
            settings |= candidates.describe()
        path = result_path(folder, digest_run(prepared, data, settings, batch_size=choose_batch_size(prepared)))
        kept = load_result(path)
        bits, seconds = kept.get("bits"), kept.get("seconds")
        if not isinstance(bits, dict) or not isinstance(seconds, float):
            start = time.process_time()
            bits = dict(reference(prepared, data, limit, candidates))
            seconds = time.process_time() - start
            store_result(path, {"bits": bits, "seconds": seconds})
        found[name], total = Allocation(bits=bits), total + seconds
    return replace(judge(reference.name, found), cpu_seconds=total)


class _Timed:
    """A criterion that reports the CPU seconds since its measurements began: 0 if all of them were cached.

    Rounding the weights counts in full for every criterion that uses them, though it is done once.
    """

    def __init__(self, criterion: Criterion, candidates: Candidates | None) -> None:
        self._criterion, self._candidates, self._start = criterion, candidates, math.nan
        self.name, self.needs_data, self.kinds = criterion.name, criterion.needs_data, criterion.kinds
        self.runs_weights = runs_weights(criterion)
        self.describe, self.score = criterion.describe, criterion.score
        for name in _OPTIONAL:
            if hasattr(criterion, name):
                setattr(self, name, getattr(criterion, name))

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        self._start = time.process_time()
        return self._criterion.begin(prepared, data, batch_size=batch_size, run_options=run_options)

    def seconds(self) -> float:
        if math.isnan(self._start):
            return 0.0
        rounding = self._candidates.cpu_seconds if self._candidates is not None and self.runs_weights else 0.0
        return time.process_time() - self._start + rounding


def _measure_drops(
    prepared: PreparedModel, evaluation: CalibrationData, resources: Resources
) -> dict[str, dict[int, Score]]:
    sites = [
        replace(site, bits=tuple(sorted({*(b for b in site.bits if b <= _LOW_BITS), site.bits[-1]})))
        for site in prepared.inventory.sites
    ]
    low = replace(prepared, inventory=replace(prepared.inventory, sites=tuple(sites)))
    _, measurements = measure_sensitivity(low, evaluation, "output_kl", resources)
    drops: dict[str, dict[int, Score]] = {}
    for found in measurements:
        if ACCURACY_DROP not in found.values:  # no output has classes
            return {}
        value, error = found.values[ACCURACY_DROP], found.values[f"{ACCURACY_DROP}:standard_error"]
        drops.setdefault(found.site, {})[found.bits] = Score(value, error)
    return drops


def _correlate(
    table: SensitivityTable, drops: Mapping[str, Mapping[int, Score]]
) -> tuple[float | None, float | None, float | None]:
    """Pearson's r over (site, low bits), its standard error (1 - r^2) / sqrt(n - 1), and Spearman's."""
    pairs = [
        (score.value, drops[site][bits].value)
        for site, by_bits in table.scores.items()
        for bits, score in by_bits.items()
        if bits <= _LOW_BITS and bits in drops.get(site, {})
    ]
    scores, measured = np.array(pairs).reshape(-1, 2).T
    if len(pairs) < 3 or np.ptp(scores) == 0 or np.ptp(measured) == 0:
        return None, None, None
    r = float(np.corrcoef(scores, measured)[0, 1])
    return r, (1 - r * r) / math.sqrt(len(pairs) - 1), float(stats.spearmanr(scores, measured).statistic)


def _read_criteria(criteria: Sequence[AnyCriterion]) -> list[Criterion]:
    if isinstance(criteria, str) or not isinstance(criteria, Sequence) or not criteria:
        raise OptionError(f"criteria={criteria!r}; give a list of names, criterion objects or functions")
    chosen = [find_criterion(criterion) for criterion in criteria]
    names = [criterion.name for criterion in chosen]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"criterion {name!r} is given twice; give one of them another name")
    return chosen


def _split(calibration: CalibrationData, evaluation_data: Any) -> tuple[CalibrationData, CalibrationData]:
    if evaluation_data is not None:
        return calibration, read_data(evaluation_data)
    if calibration.samples < 4:
        raise CalibrationDataError(
            f"an audit without evaluation_data needs 4 samples, found {calibration.samples}; give more"
        )
    return calibration.select(torch.arange(0, calibration.samples, 2)), calibration.select(
        torch.arange(1, calibration.samples, 2)
    )


def _count_images(criterion: Criterion, data: CalibrationData) -> int:
    if not criterion.needs_data:
        return 0
    samples = getattr(criterion, "samples", None)
    return min(data.samples, samples) if isinstance(samples, int) else data.samples


def _name_budget(budget: float | Budget) -> str:
    return str(budget) if isinstance(budget, Budget) else f"{budget:g} bits"
