"""The stages after calibration in one call, for a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from infoq_fx.allocation.solver import allocate
from infoq_fx.conversion.conversion import convert_prepared, warn_of_other_recovery
from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_alpha
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.ladder import find_candidates, recover_accuracy
from infoq_fx.recovery.step import RecoveryStep
from infoq_fx.scoring.criterion import Criterion
from infoq_fx.scoring.refinement import check_scores, choose_allocation
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget

__all__ = ["quantize_prepared"]


def quantize_prepared(
    prepared: PreparedModel,
    budget: float | Budget,
    data: CalibrationData | None,
    scores: Criterion | SensitivityTable,
    steps: Sequence[RecoveryStep],
    resources: Resources,
    *,
    alpha: float = 1.0,
    refine: bool = True,
    search_passes: int = 0,
    keep_scores: Callable[[SensitivityTable], None] | None = None,
) -> QuantizedModule:
    """Score, allocate, refine, recover and convert: the steps of :func:`infoq_fx.quantize` after calibration.

    Weights are rounded once, for both scoring and refinement.

    Args:
        prepared: calibrated.
        budget: mean weight bit-width, or a :class:`Budget`.
        data: by the model's input names, on its device (:func:`infoq_fx.graph.model_inputs.fit_data`); None for a
            criterion that needs no data, without refinement and recovery.
        scores: a criterion, or a table of scores of this model.
        steps: of recovery, in order.
        resources: of scoring; its ``cache_dir`` and ``progress`` also apply to recovery.
        alpha: factor on activation scores relative to weight scores (Eq. 5).
        refine: run a few allocations and choose the best.
        search_passes: number of forward passes in which the best is then improved; 0 for none.
        keep_scores: called with the table as soon as scoring is done.

    Raises:
        OptionError: an argument is invalid.
        InfeasibleBudgetError: a limit cannot be met.
    """
    check_alpha(alpha)
    limit = resources.memory_limit
    candidates = None if data is None else find_candidates(prepared, data, steps, memory_limit=limit)
    measured, held = (None, None) if data is None else data.hold_back(prepared.batch_size or 1)
    if isinstance(scores, SensitivityTable):
        check_scores(prepared, scores)
        table = scores
    else:
        table, _ = measure_sensitivity(prepared, measured, scores, resources, candidates)
    if keep_scores is not None:
        keep_scores(table)
    if refine and held is not None:
        allocation = choose_allocation(
            prepared,
            table,
            budget,
            held,
            alpha=alpha,
            candidates=candidates,
            memory_limit=limit,
            search_passes=search_passes,
            search_data=measured,
        )
    else:
        allocation = allocate(table, budget, alpha=alpha)
    if isinstance(scores, SensitivityTable):
        warn_of_other_recovery(allocation, [step.name for step in steps], stacklevel=3)
    if data is None:
        return convert_prepared(prepared, allocation, table)
    del candidates, measured, held  # copies of the data and rounded weights, which recovery does not need
    folder = None if resources.cache_dir is None else Path(resources.cache_dir)
    better = recover_accuracy(
        prepared,
        allocation.bits,
        data,
        steps,
        cache_dir=folder,
        memory_limit=limit,
        progress=resources.progress,
    )
    return convert_prepared(better, allocation, table)
