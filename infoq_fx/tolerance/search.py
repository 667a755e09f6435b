"""Finds the smallest allocation within a tolerance: each step is refined, recovered, converted and run on samples."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.solver import check_budget
from infoq_fx.conversion.conversion import convert_prepared, warn_of_other_recovery
from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.core.data import CalibrationData, ForwardArguments, read_data
from infoq_fx.core.option_checks import check_alpha, check_memory_limit, read_search_passes
from infoq_fx.core.readings import Metric, check_metric
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.graph.model_inputs import fit_data
from infoq_fx.quantization.prepared import PreparedModel, check_prepared
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.recovery.ladder import AnyRecovery, find_candidates, find_steps
from infoq_fx.recovery.step import RecoveryStep
from infoq_fx.scoring.criterion import Criterion
from infoq_fx.scoring.refinement import check_scores
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.table import SensitivityTable, check_table
from infoq_fx.tolerance.bisection import find_smallest
from infoq_fx.tolerance.float_activations import allow_floats, has_free_floats, lower_bitops
from infoq_fx.tolerance.measurement import Validation
from infoq_fx.tolerance.result import ToleranceResult, ToleranceStep, choose_step
from infoq_fx.tolerance.steps import Search, StepTaker, explain_failure
from infoq_fx.tolerance.tolerance import Tolerance, check_tolerance, read_range
from infoq_fx.types import Budget

__all__ = ["divide_samples", "quantize_within", "search_tolerance"]

_LOGGER = logging.getLogger(__name__)
_FEWEST = 16


def search_tolerance(
    prepared: PreparedModel,
    table: SensitivityTable,
    tolerance: Tolerance,
    calibration_data: Any,
    *,
    validation_data: Any,
    metric: Metric | None = None,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    refine: bool | Literal["search"] = True,
    search_passes: int | None = None,
    recovery: AnyRecovery = "fast",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> ToleranceResult:
    """Find the smallest allocation that loses no more than a tolerance, by measuring a few on validation samples.

    The allocations are those of the curve of least score over the minimized cost. At each step one is refined,
    recovered, converted and run on the validation samples. A bisection of about five steps, eight at most, ends once
    the costs that pass and fail differ by less than 4.5 %. The result was measured to pass. If losses do not grow as
    the cost falls, a smaller allocation that passes may be missed.

    Cost: the float model's run over the validation samples, the rounding of weights, and at every step
    :func:`infoq_fx.refine`, :func:`infoq_fx.recover` and a run over the validation samples.

    Args:
        prepared: the prepared model of the table.
        table: scores of any criterion.
        tolerance: what may be lost, and what is minimized.
        calibration_data: see :func:`infoq_fx.quantize`, for refinement and recovery.
        validation_data: samples that neither ``prepared`` nor the table has seen, in the same forms; with class labels
            for a drop of top-1.
        metric: for ``Tolerance(drop=)``: ``(outputs, labels) -> float`` over all validation samples, larger is better;
            None for top-1. The outputs are the model's own, in its own structure. It is also called without a
            tenth of the samples at a time, for the standard error, so labels must come from its arguments.
        alpha: factor on activation scores relative to weight scores (Eq. 5).
        pin: fixed bit-widths by site name.
        refine: run a few allocations at every step and take the best, see :func:`infoq_fx.refine`; ``"search"`` then
            improves it.
        search_passes: forward passes that the search may take at every step, see :func:`infoq_fx.quantize`.
        recovery: see :func:`infoq_fx.recover`.
        seed: of recovery steps made from a name.
        cache_dir: folder that keeps every measured step, so that an interrupted or repeated search, or one with
            another tolerance, does not measure it again. A metric is known by its name and code.
        memory_limit: bytes for what the steps hold, see :func:`infoq_fx.quantize`.
        progress: show progress bars on standard error.

    Raises:
        OptionError: an argument is invalid.
        CalibrationDataError: the data cannot be used, or top-1 is to be measured without labels.
        InfeasibleBudgetError: nothing within the tolerance can be reached; the message says what can.
    """
    check_prepared(prepared, "search_tolerance")
    check_table(table)
    check_scores(prepared, table)
    check_alpha(alpha)
    check_memory_limit(memory_limit)
    check_tolerance(tolerance)
    passes = read_search_passes(refine, search_passes)
    steps, arguments = find_steps(recovery, seed), ForwardArguments.exactly(prepared.input_names)
    data, judged = (fit_data(prepared, read_data(x, arguments)) for x in (calibration_data, validation_data))
    search = Search(
        validation=check_validation(Validation(prepared, judged, tolerance, metric, memory_limit)),
        table=table,
        data=data,
        steps=tuple(steps),
        candidates=find_candidates(prepared, data, steps, memory_limit=memory_limit),
        alpha=alpha,
        pin=dict(pin or {}),
        refine=bool(refine),
        search_passes=passes,
        resources=Resources(cache_dir=cache_dir, memory_limit=memory_limit, progress=progress),
    )
    return _run(search)


def quantize_within(
    prepared: PreparedModel,
    tolerance: Tolerance,
    judging: tuple[Metric | None, CalibrationData | None, CalibrationData | None],
    scores: Criterion | SensitivityTable,
    steps: Sequence[RecoveryStep],
    resources: Resources,
    *,
    alpha: float = 1.0,
    refine: bool = True,
    search_passes: int = 0,
    keep_scores: Callable[[SensitivityTable], None] | None = None,
) -> QuantizedModule:
    """Score, search and convert: the steps of :func:`infoq_fx.quantize` with a tolerance after calibration.

    Weights are rounded once, for scores and refinement.

    Args:
        prepared: calibrated.
        tolerance: what may be lost, and what is minimized.
        judging: the metric of a drop, None for top-1; the samples to validate with, and those to score and recover
            with, as :func:`divide_samples` returns them or by the model's input names.
        scores: this and all following arguments are as for :func:`infoq_fx.pipeline.quantize_prepared`.
        steps: of recovery, in order.
        resources: of scoring; its ``cache_dir`` keeps steps too.
        alpha: factor on activation scores.
        refine: run a few allocations at every step.
        search_passes: number of forward passes in which the best is then improved.
        keep_scores: called with the table as soon as scoring is done.

    Raises:
        OptionError, CalibrationDataError, InfeasibleBudgetError: as :func:`search_tolerance`.
    """
    metric, *both = judging
    data, samples = (fit_data(prepared, x) for x in reversed(both) if x is not None)
    check_alpha(alpha)
    judged = check_validation(Validation(prepared, samples, tolerance, metric, resources.memory_limit))
    candidates = find_candidates(prepared, data, steps, memory_limit=resources.memory_limit)
    table = _find_table(prepared, data, scores, resources, candidates)
    if keep_scores is not None:
        keep_scores(table)
    search = Search(
        validation=judged,
        table=table,
        data=data,
        steps=tuple(steps),
        candidates=candidates,
        alpha=alpha,
        pin={},
        refine=refine,
        search_passes=search_passes,
        resources=resources,
    )
    found = _run(search)
    if isinstance(scores, SensitivityTable):
        warn_of_other_recovery(found.allocation, [step.name for step in steps], stacklevel=3)
    return convert_prepared(found.recovered, found.allocation, table)


def divide_samples(
    calibration_data: Any,
    validation_data: Any,
    budget: float | Budget | Tolerance,
    metric: Metric | None,
    arguments: ForwardArguments | None,
) -> tuple[CalibrationData | None, CalibrationData | None]:
    """Read samples to calibrate and to validate with; the latter only for a :class:`Tolerance`.

    Without ``validation_data`` every second calibration sample is held back for it, and calibrates nothing.

    Raises:
        OptionError: ``validation_data`` or ``metric`` is given for a budget that is not a tolerance.
        CalibrationDataError: there is no data, or too little to hold some back.
    """
    if isinstance(budget, type) and issubclass(budget, Tolerance):
        check_tolerance(budget)
    calibration = None if calibration_data is None else read_data(calibration_data, arguments)
    if not isinstance(budget, Tolerance):
        for name, value in (("validation_data", validation_data), ("metric", metric)):
            if value is not None:
                raise OptionError(
                    f"{name}= is given and the budget is {budget!r}, which nothing is validated for; leave it out, or "
                    "give a Tolerance as the budget"
                )
        return calibration, None
    check_losses(budget, metric)
    if calibration is None:
        raise CalibrationDataError("a Tolerance is measured on samples and there are none; give calibration_data=")
    if validation_data is not None:
        return calibration, read_data(validation_data, arguments)
    if calibration.samples < _FEWEST:
        raise CalibrationDataError(
            f"half of the calibration data is held back to validate, and there are {calibration.samples} samples; give "
            f"at least {_FEWEST}, or validation_data="
        )
    fitting, judged = calibration.hold_back_half()
    _LOGGER.info(
        "%d of %d samples are held back to validate, and calibrate nothing", judged.samples, calibration.samples
    )
    return fitting, judged


def check_losses(tolerance: Tolerance, metric: Metric | None) -> None:
    """Check that a metric is a function, and that the tolerance is one of a metric.

    Raises:
        OptionError: it is not.
    """
    check_metric(metric)
    if metric is not None and tolerance.drop is None:
        raise OptionError(f"metric= is given and the tolerance is {tolerance.measure}=; give drop=, or leave it out")


def check_validation(validation: Validation) -> Validation:
    """Check a tolerance and its samples before anything is scored.

    Raises:
        OptionError: the minimized cost is unknown or fixed, or the metric cannot be used.
        CalibrationDataError: there are fewer than 16 samples, or top-1 is to be measured without labels that fit.
        InfeasibleBudgetError: the limits besides cannot be met.
    """
    tolerance, inventory = validation.tolerance, validation.prepared.inventory
    if validation.data.samples < _FEWEST:
        raise CalibrationDataError(
            f"{validation.data.samples} validation samples say little about a loss; give at least {_FEWEST}, "
            "better some hundreds"
        )
    check_losses(tolerance, validation.metric)
    read_range(tolerance, inventory, {})
    if tolerance.within is not None:
        check_budget(inventory, tolerance.within)
    if tolerance.drop is not None and validation.metric is None:
        _ = validation.classes
    return validation


def _find_table(
    prepared: PreparedModel,
    data: CalibrationData,
    scores: Criterion | SensitivityTable,
    resources: Resources,
    candidates: Candidates | None,
) -> SensitivityTable:
    if isinstance(scores, SensitivityTable):
        return scores
    measured, _ = data.hold_back(prepared.batch_size or 1)
    return measure_sensitivity(prepared, measured, scores, resources, candidates)[0]


def _run(search: Search) -> ToleranceResult:
    tolerance = search.validation.tolerance
    least, most = read_range(tolerance, search.table.inventory, search.pin)
    is_free = has_free_floats(search)
    take = StepTaker(allow_floats(search) if is_free else search, most)
    steps = find_smallest(least, most, take)
    chosen = choose_step(steps)
    if chosen is None:
        raise explain_failure(search, steps)
    step, allocation = chosen
    if is_free:
        others, take_other = lower_bitops(search, step)
        passing = [other for other in others if other.passes]
        if passing:
            step, take = min(passing, key=lambda other: other.cost), take_other
            smaller = allocation.loss or step.loss
            loss = replace(step.loss, smaller_value=smaller.smaller_value, smaller_error=smaller.smaller_error)
            allocation = replace(step.allocation, loss=loss)
        steps = [*steps, *(_in_cost(other, search) for other in others)]
    return ToleranceResult(tolerance=tolerance, allocation=allocation, recovered=take.recover(step), steps=tuple(steps))


def _in_cost(step: ToleranceStep, search: Search) -> ToleranceStep:
    """A step that was taken for another cost, with the minimized one."""
    name = search.validation.tolerance.minimize
    cost = measure_cost(search.table.inventory, step.allocation.bits)[name]
    return replace(step, limit=cost, cost=cost)
