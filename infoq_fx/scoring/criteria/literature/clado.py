"""CLADO: losses of pairs of layers, for an integer quadratic program."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, hold_outputs, run_pairs
from infoq_fx.runtime.interpreter import ReadValue
from infoq_fx.runtime.outputs import read_nodes
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.scoring.output_measure import Outputs, affected_outputs, read_outputs
from infoq_fx.table import PairScores
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, QuantSite, Score

__all__ = ["CLADO"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements
_LOSS = "information_loss_nats"
_PAIR = "with {} at {} bits"

_Runs = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CLADO:
    """Losses of single layers and of all pairs of layers, in nats per sample.

    With S(i, b) what is lost with only site i at b bits, and S(i, b; j, c) with sites i and j at b and c, the loss of
    an allocation is taken to be of second order in the errors of the weights:

        sum_i S(i, b_i) + sum_{i < j} [S(i, b_i; j, b_j) - S(i, b_i) - S(j, b_j)]

    The bracket is the part of the Hessian between two layers, which all other criteria leave out. The matrix of this
    quadratic form is replaced by the nearest one without negative eigenvalues, since noise and large errors otherwise
    promise gains that do not exist. :func:`infoq_fx.allocate` minimizes the form.

    The loss is that of :class:`InfoQ`, E KL(p || q) with p of the float model, less what the 8-bit baseline loses. Its
    gradient is zero at the float model, as the expansion assumes; the authors take the loss on labels. Activations are
    not scored.

    Cost: a partial forward pass for every pair of (site, bit-width), no backward pass, no labels: 6,840 passes of a
    third of the network on average for 20 layers at 6 bit-widths below 8. It grows with the square of both numbers, so
    that networks of many layers are refused.

    Args:
        samples: largest number of samples, evenly spread over the data; None for all.
        most_runs: largest number of partial forward passes.
        is_projected: whether negative eigenvalues are removed.

    Reference:
        "Mixed-Precision Quantization with Cross-Layer Dependencies", arXiv 2307.05657, Section 3.
    """

    samples: int | None = 256
    most_runs: int = 20_000
    is_projected: bool = True
    name: str = "clado"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight",)
    runs_weights: ClassVar[bool] = True
    runs_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("most_runs", self.most_runs, 1)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the candidates of all sites, since every site is measured with all others."""
        candidates = ";".join(f"{site.name}:{site.bits}" for site in _searched(prepared))
        return {
            "measure": "losses of pairs",
            "algorithm_version": _ALGORITHM_VERSION,
            "candidates": hashlib.blake2b(candidates.encode(), digest_size=8).hexdigest(),
        }

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Run the float model and the 8-bit baseline.

        Raises:
            CalibrationDataError: there is no data.
            OptionError: there are more runs than ``most_runs``.
        """
        if data is None:
            raise CalibrationDataError(f"criterion {self.name!r} needs calibration data; give some, or 'weight_mse'")
        runs = count_runs(prepared)
        if runs > self.most_runs:
            sites = _searched(prepared)
            raise OptionError(
                f"criterion {self.name!r} would run the model {runs:,} times, for all pairs of {len(sites)} layers at "
                f"their bit-widths below {BASELINE_BITS}; at most {self.most_runs:,} are allowed: give fewer bits=, "
                f"pin layers, take criterion='infoq', or infoq_fx.scoring.criteria.CLADO(most_runs={runs})"
            )
        base = hold_outputs(prepared, data, batch_size=batch_size, run_options=run_options)
        outputs = read_outputs(prepared, data, base, batch_size=batch_size, run_options=run_options)
        return _PairMeasure(outputs, batch_size)

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return half of the diagonal of the quadratic form, and the standard error of what was measured there."""
        form, runs = self._read_form(measurements)
        values = {run: form[index, index] / 2 for index, run in enumerate(runs)}
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            error = found.values[f"{_LOSS}:standard_error"]
            value = float(values.get((found.site, found.bits), 0.0))
            scores.setdefault(found.site, {})[found.bits] = Score(max(0.0, value), error)
        return scores

    def score_pairs(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> PairScores:
        """Return the part of the quadratic form between every two sites."""
        form, runs = self._read_form(measurements)
        pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
        for row, (site, bits) in enumerate(runs):
            for column, (other, width) in enumerate(runs[:row]):
                if other != site:
                    pairs.setdefault((other, site), {})[width, bits] = float(form[row, column])
        return pairs

    def _read_form(self, measurements: Sequence[Measurement]) -> tuple[NDArray[np.float64], list[tuple[str, int]]]:
        """The matrix G, of which x'Gx / 2 is lost by the allocation x, and the (site, bit-width) of its rows."""
        single = {(m.site, m.bits): m.values[_LOSS] for m in measurements if m.bits < BASELINE_BITS}
        runs, form = list(single), np.diag([2 * value for value in single.values()])
        index = {_PAIR.format(*run): number for number, run in enumerate(runs)}
        for found in measurements:
            for key, value in found.values.items():
                if key in index:
                    row, column = runs.index((found.site, found.bits)), index[key]
                    beyond = value - single[runs[row]] - single[runs[column]]
                    form[row, column] = form[column, row] = beyond
        return (_project(form) if self.is_projected else form), runs


def count_runs(prepared: PreparedModel) -> int:
    """Return the number of partial forward passes: of every (site, bit-width) below 8 bits, and of every pair."""
    widths = [sum(bits < BASELINE_BITS for bits in site.bits) for site in _searched(prepared)]
    total = sum(widths)
    return total + (total**2 - sum(width**2 for width in widths)) // 2


@dataclass(frozen=True)
class _PairMeasure:
    """Runs every (site, bit-width) alone and with all sites that come later in the graph."""

    outputs: Outputs
    batch_size: int
    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        assert data is not None
        searched = _searched(prepared)
        place = {site.name: index for index, site in enumerate(searched)}
        partners = {site.name: searched[place[site.name] + 1 :] for site in sites}
        losses = _Losses(prepared, self.outputs)
        with thread_map(run_options.threads, run_options.stop) as spread:
            run_pairs(
                prepared,
                data,
                sites,
                partners,
                set(read_nodes(prepared)),
                losses.make_reader,
                batch_size=self.batch_size,
                run_options=run_options,
                spread=spread,
            )
        found = []
        for site in sites:
            for bits in site.bits:
                if bits == BASELINE_BITS:
                    run_options.advance(1.0)
                runs = [((site.name, bits), (p.name, b)) for p in partners[site.name] for b in p.bits]
                pairs = {_PAIR.format(*run[1]): losses.mean(run) for run in runs if run in losses.rows}
                alone = losses.rows.get(((site.name, bits),), torch.zeros(1))
                error = float(alone.std(correction=0)) / math.sqrt(len(alone))
                values = {_LOSS: float(alone.mean()), f"{_LOSS}:standard_error": error, **pairs}
                found.append(Measurement(site.name, bits, values))
        return found


class _Losses:
    """What every run loses beyond the baseline, float64 ``[samples]``."""

    def __init__(self, prepared: PreparedModel, outputs: Outputs) -> None:
        self._outputs, self._nodes = outputs, read_nodes(prepared)
        self._reached = affected_outputs(prepared, [site.name for site in _searched(prepared)])
        self._alone: dict[tuple[str, int], list[Tensor]] = {}
        self.rows: dict[_Runs, Tensor] = {}

    def mean(self, run: _Runs) -> float:
        """The mean over the samples."""
        return float(self.rows[run].mean())

    def make_reader(self, run: _Runs, start: int) -> ReadValue:
        """Read the outputs of a batch that the run's last site reaches; the last of them compares all."""
        reached = self._reached[run[-1][0]]
        found: dict[int, Tensor] = {}

        def read(node: fx.Node, value: Tensor) -> None:
            for index in reached:
                if self._nodes[index] is node:
                    found[index] = value.detach().to("cpu", torch.float32)
                    if len(found) == len(reached):
                        self._add(run, start, found)

        return read

    def _add(self, run: _Runs, start: int, found: Mapping[int, Tensor]) -> None:
        count = len(next(iter(found.values())))
        # A pair starts at its second site: outputs that only the first one reaches are those of its own run.
        others = self._alone[run[0]] if len(run) == 2 else self._outputs.base.rows(start, count)
        outputs = [found.get(index, x) for index, x in enumerate(others)]
        if len(run) == 1:
            self._alone[run[0]] = outputs
        nats = self._outputs.loss(self._outputs.reference.rows(start, count), outputs)
        rows = self.rows.setdefault(run, torch.zeros(self._outputs.samples, dtype=torch.float64))
        rows[start : start + count] = nats - self._outputs.lost[start : start + count]


def _searched(prepared: PreparedModel) -> list[QuantSite]:
    return [s for s in prepared.inventory.sites if s.kind == "weight" and s.is_searched and len(s.bits) > 1]


def _project(form: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest matrix, by the sum of squares, without negative eigenvalues."""
    values, vectors = np.linalg.eigh(form)
    return np.asarray((vectors * values.clip(0)) @ vectors.T)
