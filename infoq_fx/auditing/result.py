"""The result of an audit: a row for each way to allocate, and the recommended criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from infoq_fx.core.tabular import align_rows
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation, Score

__all__ = ["Audit", "AuditRow", "Hits", "Nats"]

Hits: TypeAlias = NDArray[np.float64]
"""Share of correct classes of each evaluation sample: 0 or 1 where it has a single class."""
Nats: TypeAlias = NDArray[np.float64]
"""KL divergence of the quantized model's output from the float model's, of each evaluation sample."""


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """Accuracy, information loss and cost of one way to allocate.

    ``hits`` says which evaluation samples are predicted correctly, by budget. ``nats`` is the divergence of their
    outputs from the float model's, which distinguishes allocations of equal top-1. ``correlation`` is Pearson's r
    between score and accuracy drop over layers and low bits, with its standard error; ``rank_correlation`` is
    Spearman's. ``cpu_seconds`` is the time of scoring over all runs (without killed ones and workers), or of a search
    for all budgets; ``images`` is the number of samples that scoring used. These five are None for other rows without a
    criterion of their own. ``metrics`` are values of the user's metric by budget; ``sqnr_db`` has the
    signal-to-quantization-noise ratio of every output that is read, in dB, by budget and name.
    """

    name: str
    hits: Mapping[str, Hits]
    allocations: Mapping[str, Allocation]
    correlation: float | None = None
    correlation_error: float | None = None
    rank_correlation: float | None = None
    cpu_seconds: float | None = None
    images: int | None = None
    nats: Mapping[str, Nats] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    sqnr_db: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def top1(self, budget: str) -> Score | None:
        """Return the percentage of correct predictions and its standard error; None if there is none."""
        if budget not in self.hits:
            return None
        hits = self.hits[budget]
        return Score(100 * float(hits.mean()), 100 * float(hits.std()) / math.sqrt(len(hits)))

    def lost_nats(self, budget: str) -> Score | None:
        """Return the mean of ``nats`` over the samples and its standard error; None if nothing fits the budget."""
        if budget not in self.nats:
            return None
        nats = self.nats[budget]
        return Score(float(nats.mean()), float(nats.std() / math.sqrt(len(nats))))

    @property
    def mean_top1(self) -> float:
        """Mean top-1 over the budgets."""
        return float(np.mean([100 * hits.mean() for hits in self.hits.values()])) if self.hits else math.nan


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of an audit: a row per criterion, ``"uniform"``, with InfoQ ``"infoq, refined"``, then all searches.

    ``accuracy_drops`` are measured on the evaluation samples, in points with standard errors, by site and bit-width.
    ``float_top1`` is the float model's top-1 in percent. ``references`` are the names of the searches, which are
    compared with and not recommended.
    """

    rows: tuple[AuditRow, ...]
    budgets: tuple[str, ...]
    tables: Mapping[str, SensitivityTable]
    accuracy_drops: Mapping[str, Mapping[int, Score]]
    float_top1: float
    evaluation_samples: int
    float_metric: float | None = None
    metric_name: str = "metric"
    references: tuple[str, ...] = ()

    @property
    def leader(self) -> AuditRow:
        """The row of the criterion with the best mean top-1; among equals, the one with the lower cost."""
        rows = self._candidates()
        if not any(row.hits for row in rows):  # no output has classes
            return min(rows, key=_mean_log_nats)
        return max(rows, key=lambda row: (row.mean_top1, -(row.cpu_seconds or 0.0)))

    @property
    def recommended(self) -> AuditRow:
        """The row that loses the fewest nats (geometric mean over budgets) among the leader and those level with it."""
        leader, level = self.leader, self.indistinguishable()
        rows = [leader, *(row for row in self._candidates() if row.name in level)]
        return leader if any(not row.nats for row in rows) else min(rows, key=_mean_log_nats)

    def lead_over(self, name: str) -> Score:
        """Return the leader's lead over another row in points of mean top-1, with the paired standard error."""
        best, other = self.leader, next(row for row in self.rows if row.name == name)
        shared = [budget for budget in self.budgets if budget in best.hits and budget in other.hits]
        if not shared:
            return Score(0.0)
        difference = np.mean([100.0 * best.hits[b] - 100.0 * other.hits[b] for b in shared], axis=0)
        return Score(float(difference.mean()), float(difference.std() / math.sqrt(len(difference))))

    def indistinguishable(self) -> list[str]:
        """Return the names of the other criteria whose top-1 is within two standard errors of the leader's."""
        leader = self.leader
        others = [row.name for row in self._candidates() if row is not leader]
        return [name for name in others if (lead := self.lead_over(name)).value <= 2 * lead.standard_error]

    def __str__(self) -> str:
        cells = [["criterion", "r", "rank r", *(f"top-1, {b}" for b in self.budgets), "lead lost", "CPU s", "images"]]
        for row in self.rows:
            lead = self.lead_over(row.name)
            r = "-" if row.correlation is None else f"{row.correlation:.2f} ± {row.correlation_error:.2f}"
            found = [row.top1(b) for b in self.budgets]
            cells.append(
                [
                    row.name,
                    r,
                    "-" if row.rank_correlation is None else f"{row.rank_correlation:.2f}",
                    *("-" if t is None else f"{t.value:.1f} ± {t.standard_error:.1f}" for t in found),
                    "-" if row is self.leader else f"{lead.value:.1f} ± {lead.standard_error:.1f}",
                    "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}",
                    "-" if row.images is None else str(row.images),
                ]
            )
        lost = [["nats lost", *self.budgets]]
        for row in self.rows:
            nats = [row.lost_nats(b) for b in self.budgets]
            lost.append([row.name, *("-" if n is None else f"{n.value:.3g} ± {n.standard_error:.1g}" for n in nats)])
        float_top1 = "no classes" if math.isnan(self.float_top1) else f"float top-1 {self.float_top1:.1f}"
        head = f"{float_top1} on {self.evaluation_samples} samples"
        parts = [head, *align_rows(cells), "", *align_rows(lost), ""]
        for table in (*self._list_sqnr(), *self._list_metrics()):
            parts += [*align_rows(table), ""]
        return "\n".join([*parts, self._advise()])

    def _list_sqnr(self) -> list[list[list[str]]]:
        """A table for each output that is read."""
        outputs = dict.fromkeys(name for row in self.rows for found in row.sqnr_db.values() for name in found)
        tables = []
        for name in outputs:
            cells = [[f"SQNR of {name!r}, dB", *self.budgets]]
            for row in self.rows:
                found = [row.sqnr_db.get(b, {}).get(name) for b in self.budgets]
                cells.append([row.name, *("-" if value is None else f"{value:.1f}" for value in found)])
            tables.append(cells)
        return tables

    def _list_metrics(self) -> list[list[list[str]]]:
        if self.float_metric is None:
            return []
        cells = [[self.metric_name, *self.budgets], ["float", *(f"{self.float_metric:.4g}" for _ in self.budgets)]]
        for row in self.rows:
            values = [row.metrics.get(b) for b in self.budgets]
            cells.append([row.name, *("-" if v is None else f"{v:.4g}" for v in values)])
        return [cells]

    def _advise(self) -> str:
        best = self.recommended.name
        level = [self.leader.name, *self.indistinguishable()]
        if len(level) == 1:
            return f"take {best!r}"
        return (
            f"take {best!r}: it loses the fewest nats of those level in top-1 (2 standard errors): {', '.join(level)}"
        )

    def _candidates(self) -> list[AuditRow]:
        others = ("uniform", *self.references)
        return [row for row in self.rows if row.name not in others and len(row.allocations) == len(self.budgets)]


def _mean_log_nats(row: AuditRow) -> float:
    return float(np.mean([math.log(max(nats.mean(), 1e-300)) for nats in row.nats.values()]))
