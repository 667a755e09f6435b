"""One step of a search within a tolerance: an allocation at a limit, recovered and measured, and kept on disk."""

from __future__ import annotations

import functools
import io
import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from infoq_fx.allocation.allocation_file import decode_allocation, describe_allocation
from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.solver import allocate
from infoq_fx.conversion.conversion import convert_prepared
from infoq_fx.core.atomic_files import write_atomically
from infoq_fx.core.data import CalibrationData
from infoq_fx.errors import InfeasibleBudgetError, OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.recovery.ladder import hold_checked, recover_accuracy
from infoq_fx.recovery.parameters import fork
from infoq_fx.recovery.step import RecoveryStep
from infoq_fx.runtime.digest import digest_run, name_function
from infoq_fx.runtime.held_outputs import HeldLoss
from infoq_fx.runtime.kept_results import load_result, result_path, store_result
from infoq_fx.scoring.refinement import LossRuns, begin_runs, choose_allocation
from infoq_fx.scoring.sensitivity import Resources
from infoq_fx.table import SensitivityTable
from infoq_fx.tolerance.measurement import GROUPS, Validation, measure_loss
from infoq_fx.tolerance.result import ToleranceStep
from infoq_fx.tolerance.tolerance import limit_cost
from infoq_fx.types import BASELINE_BITS, Allocation, Budget, MeasuredLoss, Plain

__all__ = ["Search", "StepTaker", "explain_failure"]

_LOGGER = logging.getLogger(__name__)
_UNLIMITED = Budget(size_bytes=1e30)
_KIND = "tolerance"
_VERSION = 2  # raised when the same step is measured differently


@dataclass(frozen=True, kw_only=True)
class Search:
    """Everything that the steps of a search share; ``data`` is what refinement and recovery see."""

    validation: Validation
    table: SensitivityTable
    data: CalibrationData
    steps: tuple[RecoveryStep, ...]
    candidates: Candidates | None
    alpha: float
    pin: Mapping[str, int]
    refine: bool
    resources: Resources
    search_passes: int = 0

    @property
    def prepared(self) -> PreparedModel:
        """The prepared model."""
        return self.validation.prepared

    @property
    def folder(self) -> Path | None:
        """Where steps are kept."""
        return None if self.resources.cache_dir is None else Path(self.resources.cache_dir)

    @functools.cached_property
    def divided(self) -> tuple[CalibrationData, CalibrationData]:
        """The samples that a search of refinement sees, and those that refinement judges by."""
        return self.data.hold_back(self.prepared.batch_size or 1)

    @functools.cached_property
    def runs(self) -> LossRuns:
        """The runs of refinement, which steps share."""
        return begin_runs(self.prepared, self.divided[1], self.candidates, self.resources.memory_limit)

    @functools.cached_property
    def checked(self) -> HeldLoss | None:
        """What recovery is checked by; None where there is none."""
        return hold_checked(self.prepared, self.data, self.resources.memory_limit) if self.steps else None

    @functools.cached_property
    def key(self) -> str:
        """A hash of everything that determines what a step finds and measures, besides its limits."""
        validation, size = self.validation, self.validation.batch_size
        settings: dict[str, Plain] = {
            "measure": f"tolerance, {validation.tolerance.measure}",
            "version": _VERSION,
            "groups": GROUPS,
            "metric": name_function(validation.metric),
            "fitted": digest_run(self.prepared, self.data, {}, batch_size=size),
            "recovery": ", ".join(map(repr, self.steps)),
            "refine": self.refine,
            "search passes": self.search_passes,
            "table": self.table.to_json(),
        }
        if self.candidates is not None and self.refine:
            settings |= self.candidates.describe()
        return digest_run(self.prepared, validation.data, settings, batch_size=size)


class StepTaker:
    """Takes the step at a limit; the model of the smallest step that passes is held, others are not.

    Steps that end at bit-widths measured before give the same step.
    """

    def __init__(self, search: Search, most: float) -> None:
        self._search, self._most = search, most
        self._taken: dict[frozenset[tuple[str, int]], tuple[ToleranceStep, Path | None]] = {}
        self._best: tuple[ToleranceStep, PreparedModel | None] | None = None

    def __call__(self, limit: float) -> ToleranceStep | None:
        """Return the step at a limit; None if no allocation fits it."""
        search, within = self._search, self._search.validation.tolerance.within
        is_most = limit >= self._most
        budget = within if is_most and within is not None else limit_cost(search.validation.tolerance, limit)
        try:
            first = allocate(search.table, budget, alpha=search.alpha, pin=search.pin)
        except InfeasibleBudgetError:
            return None
        is_fixed = not search.refine
        if is_most:
            with suppress(InfeasibleBudgetError):  # the limits besides may not let all sites have their most bits
                first, is_fixed = _allocate_at_most(search, budget, None), True
        path = _find_path(search, first, is_fixed)
        allocation, loss = _load(search, path)
        if allocation is None:
            allocation = first if is_fixed else _refine(search, budget)
        key = frozenset(allocation.bits.items())
        if key in self._taken:
            return self._taken[key][0]
        recovered = None
        if loss is None:
            loss, recovered = _measure(search, allocation, path)
        step = _make_step(search, limit, allocation, loss)
        self._taken[key] = step, path
        if step.passes and (self._best is None or step.cost < self._best[0].cost):
            self._best = step, recovered
        _LOGGER.info("%s %.6g %s", search.validation.tolerance.minimize, step.cost, loss.describe())
        return step

    def recover(self, step: ToleranceStep) -> PreparedModel:
        """Return the recovered model of a step that was taken: held, kept on disk, or recovered again."""
        if self._best is not None and self._best[0] is step and self._best[1] is not None:
            return self._best[1]
        _, path = self._taken[frozenset(step.allocation.bits.items())]
        return _load_state(self._search, path) or _recover(self._search, step.allocation)


def explain_failure(search: Search, steps: list[ToleranceStep]) -> InfeasibleBudgetError:
    """Return the error of a search in which nothing passes: what was reached, and what may help."""
    tolerance, inventory = search.validation.tolerance, search.table.inventory
    top, sites = max(steps, key=lambda step: step.limit), inventory.sites
    is_whole = all(top.allocation.bits[site.name] in (search.pin.get(site.name), site.bits[-1]) for site in sites)
    widest = max(site.bits[-1] for site in sites if len(site.bits) > 1)
    where = f"with all sites at {widest} bits" if is_whole else "with the best bit-widths"
    if widest > BASELINE_BITS and not is_whole:
        where = f"with {BASELINE_BITS} bits and the worst layers in float"
    if tolerance.within is not None and not is_whole:
        where = f"{where} within {tolerance.within}"
    reached = f"{where} it {top.loss.describe()}"
    if widest > BASELINE_BITS:
        reached = f"with all sites at {BASELINE_BITS} bits it {_measure_even(search).describe()}, {reached}"
    verb = "lower" if tolerance.sqnr_db is not None else "raise"
    remedy = f"{verb} {tolerance.measure} to what is reached"
    if tolerance.within is not None and not is_whole:
        remedy += ", raise the limits of within="
    if widest < BASELINE_BITS:
        remedy += ", or allow more bits"
    elif widest == BASELINE_BITS:
        remedy += ", or add 16 to bits= (and to activation_bits=), so that the worst layers stay in float"
    samples = search.validation.data.samples
    return InfeasibleBudgetError(
        f"{tolerance.measure}={tolerance.limit:g} is out of reach on {samples} samples: {reached}; {remedy}"
    )


def _measure_even(search: Search) -> MeasuredLoss:
    """What is lost with all sites at 8 bits, or their most below that."""
    allocation = _allocate_at_most(search, _UNLIMITED, BASELINE_BITS)
    path = _find_path(search, allocation, True)
    _, loss = _load(search, path)
    return loss or _measure(search, allocation, path)[0]


def _allocate_at_most(search: Search, budget: Budget, most: int | None) -> Allocation:
    """All sites at their most bits, up to ``most``."""
    widest = {
        site.name: max((b for b in site.bits if most is None or b <= most), default=site.bits[0])
        for site in search.table.inventory.sites
    }
    return allocate(search.table, budget, alpha=search.alpha, pin={**widest, **search.pin})


def _refine(search: Search, budget: Budget) -> Allocation:
    measured, held = search.divided
    return choose_allocation(
        search.prepared,
        search.table,
        budget,
        held,
        alpha=search.alpha,
        pin=search.pin,
        candidates=search.candidates,
        memory_limit=search.resources.memory_limit,
        search_passes=search.search_passes,
        search_data=measured,
        runs=search.runs,
    )


def _recover(search: Search, allocation: Allocation) -> PreparedModel:
    return recover_accuracy(
        search.prepared,
        allocation.bits,
        search.data,
        search.steps,
        cache_dir=search.folder,
        memory_limit=search.resources.memory_limit,
        progress=search.resources.progress,
        checked=search.checked,
    )


def _measure(search: Search, allocation: Allocation, path: Path | None) -> tuple[MeasuredLoss, PreparedModel]:
    """Recover, convert and run an allocation, and keep what was measured."""
    recovered = _recover(search, allocation)
    loss = measure_loss(search.validation, convert_prepared(recovered, allocation, None))
    if path is None:
        return loss, recovered
    value = loss.value if math.isfinite(loss.value) else None
    if loss.passes:
        content = io.BytesIO()
        torch.save({"state": recovered.graph_module.state_dict(), "steps": list(recovered.recovered_by)}, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".pt"), content.getvalue())
    store_result(
        path,
        {"allocation": describe_allocation(allocation), "value": value, "standard_error": loss.standard_error},
    )
    return loss, recovered


def _find_path(search: Search, first: Allocation, is_fixed: bool) -> Path | None:
    """Where a step is kept, by the allocation of least score at its limits; None without a folder."""
    if search.folder is None:
        return None
    described = json.dumps({**describe_allocation(first), "is_fixed": is_fixed}, sort_keys=True)
    return result_path(search.folder, f"{search.key} {described}", _KIND)


def _load(search: Search, path: Path | None) -> tuple[Allocation, MeasuredLoss] | tuple[None, None]:
    """A step that was kept, measured against the tolerance of this search."""
    kept = {} if path is None else load_result(path)
    try:
        allocation, value, error = decode_allocation(kept["allocation"]), kept["value"], kept["standard_error"]
        loss = search.validation.make_loss(
            math.inf if value is None else float(value), None if error is None else float(error)
        )
    except (OptionError, KeyError, TypeError, ValueError, AttributeError):  # not kept, or damaged
        return None, None
    return allocation, loss


def _load_state(search: Search, path: Path | None) -> PreparedModel | None:
    """The recovered model of a step that was kept; None if there is none that can be used."""
    if path is None or not path.with_suffix(".pt").exists():
        return None
    try:
        kept = torch.load(path.with_suffix(".pt"), map_location=search.prepared.device, weights_only=True)
        found = fork(search.prepared)
        found.graph_module.load_state_dict(kept["state"])
        return replace(found, recovered_by=tuple(map(str, kept["steps"])))
    except Exception as error:  # cut short, or of steps that change more than parameters: recover again
        _LOGGER.info("cannot use %s: %s", path.with_suffix(".pt"), error)
        return None


def _make_step(search: Search, limit: float, allocation: Allocation, loss: MeasuredLoss) -> ToleranceStep:
    name = search.validation.tolerance.minimize
    own = (name,) if not hasattr(allocation.cost, name) else ()
    cost = measure_cost(search.table.inventory, allocation.bits, own)[name]
    return ToleranceStep(limit=limit, cost=cost, allocation=replace(allocation, loss=loss), loss=loss)
