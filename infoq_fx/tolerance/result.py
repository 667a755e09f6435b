"""The result of a search within a tolerance: every step with what it loses, and the smallest that passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from infoq_fx.core.tabular import align_rows
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.tolerance.tolerance import Tolerance
from infoq_fx.types import Allocation, MeasuredLoss

__all__ = ["ToleranceResult", "ToleranceStep", "choose_step"]


@dataclass(frozen=True, kw_only=True)
class ToleranceStep:
    """An allocation of the curve and what it was measured to lose.

    ``limit`` is the limit of the minimized cost that it was found for, ``cost`` what it has.
    """

    limit: float
    cost: float
    allocation: Allocation
    loss: MeasuredLoss

    @property
    def passes(self) -> bool:
        """Whether it loses no more than may be lost."""
        return self.loss.passes


@dataclass(frozen=True, kw_only=True)
class ToleranceResult:
    """The smallest allocation that loses no more than may be lost, of those that were measured.

    ``allocation.loss`` says what it loses and what the next smaller one loses. ``recovered`` is the model with its
    weights recovered at these bit-widths, for :func:`infoq_fx.convert`. ``steps`` are all that were measured, in order.
    """

    tolerance: Tolerance
    allocation: Allocation
    recovered: PreparedModel
    steps: tuple[ToleranceStep, ...]

    def __str__(self) -> str:
        rows = [[self.tolerance.minimize, "measured", "passes"]]
        for step in sorted(self.steps, key=lambda step: step.cost):
            cost = f"{step.cost:,}" if step.cost == int(step.cost) else f"{step.cost:,.6g}"
            rows.append([cost, step.loss.describe(), "yes" if step.passes else "no"])
        chosen = f"{self.allocation.loss}"
        return "\n".join([f"{self.tolerance}: {len(self.steps)} steps", *align_rows(rows), chosen])


def choose_step(steps: list[ToleranceStep]) -> tuple[ToleranceStep, Allocation] | None:
    """Return the step of least cost that passes, with its allocation, which also says what the next smaller loses.

    None if none passes.
    """
    passing = [step for step in steps if step.passes]
    if not passing:
        return None
    best = min(passing, key=lambda step: step.cost)
    smaller = [step for step in steps if not step.passes and step.cost < best.cost]
    loss = best.loss
    other = max(smaller, key=lambda step: step.cost).loss if smaller else None
    if other is not None and math.isfinite(other.value):
        loss = replace(loss, smaller_value=other.value, smaller_error=other.standard_error)
    return best, replace(best.allocation, loss=loss)
