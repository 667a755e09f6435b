"""Chooses among a few allocations by running the model with each, and improves the best one if asked to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from infoq_fx.allocation.solver import move_allocation, propose
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.readings import OutputLoss
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.errors import OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.runtime.forward import RunOptions, choose_batch_size, hold_float_outputs, measure_lost_nats
from infoq_fx.runtime.held_outputs import HeldLoss, make_loss
from infoq_fx.scoring.criteria.weight_mse import WeightMSE
from infoq_fx.scoring.output_measure import LossOverPairs
from infoq_fx.scoring.search import improve_allocation, neighbours
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation, Budget, QuantSite

__all__ = ["LossRuns", "begin_runs", "check_scores", "choose_allocation"]

_SAMPLES = 512
_REACH = 2  # candidates around the start whose weights are rounded at once, before the search
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossRuns:
    """Runs a model at given bit-widths over some samples, and measures what its outputs lose.

    ``candidates`` are rounded weights to run with, None for rounding to nearest. ``known`` are the nats of all runs so
    far, by bit-widths.
    """

    prepared: PreparedModel
    samples: CalibrationData
    loss: HeldLoss
    candidates: Candidates | None
    batch_size: int
    run_options: RunOptions
    known: dict[frozenset[tuple[str, int]], Tensor] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        prepared: PreparedModel,
        data: CalibrationData,
        candidates: Candidates | None,
        *,
        batch_size: int,
        run_options: RunOptions,
        memory_limit: int | None = None,
    ) -> LossRuns:
        """Run the float model over at most 512 samples, evenly spread over the data."""
        samples = data.spread(_SAMPLES)
        if prepared.batch_size is not None:
            samples = samples.take(samples.samples - samples.samples % prepared.batch_size)
        reference = hold_float_outputs(prepared, samples, batch_size=batch_size, run_options=run_options)
        loss = HeldLoss(reference, make_loss(prepared, reference), memory_limit and memory_limit // 4)
        return cls(prepared, samples, loss, candidates, batch_size, run_options)

    def rounded(self, sites: Iterable[QuantSite]) -> LossRuns:
        """Return these runs with the weights of some sites rounded at all their candidates."""
        if self.candidates is None:
            return self
        return replace(self, prepared=self.candidates.round(sites, self.run_options))

    def over_pairs(self) -> LossRuns:
        """Return these runs with the loss over pairs of samples, which is less noisy; see :class:`LossOverPairs`."""
        reference, loss = self.loss.reference, self.loss.loss
        assert isinstance(loss, OutputLoss)
        return replace(self, loss=HeldLoss(reference, LossOverPairs.begin(loss, reference)), known={})

    def __call__(self, bits: Mapping[str, int]) -> Tensor:
        """Return the nats lost at the bit-widths of all sites, float64 ``[samples]``."""
        key = frozenset(bits.items())
        if key not in self.known:
            sites = [replace(site, bits=(bits[site.name],)) for site in self.prepared.inventory.sites]
            self.known[key] = measure_lost_nats(
                self.rounded(sites).prepared,
                self.samples,
                bits,
                self.loss,
                batch_size=self.batch_size,
                run_options=self.run_options,
            )
        return self.known[key]


def check_scores(prepared: PreparedModel, table: SensitivityTable) -> None:
    """Check that scores are for the sites of a model, and for the levels of the weights that it was prepared with.

    Raises:
        OptionError: they are for others.
    """
    held, scored = prepared.inventory.levels, table.inventory.levels
    if held != scored:
        raise OptionError(
            f"the scores are for weights with levels {scored!r}, the model was prepared with {held!r}; prepare it with "
            f"levels={scored!r}, or score again"
        )
    known, own = ([site.name for site in inventory.sites] for inventory in (table.inventory, prepared.inventory))
    missing = next((name for name in own if name not in known), None)
    if missing is not None:
        other = next((repr(name) for name in known if name not in own), "fewer")
        raise OptionError(
            f"the scores are for other sites than the model's: they have {other} where it has {missing!r} (earlier "
            "versions named additions by torch's numbers); score the model again"
        )


def begin_runs(
    prepared: PreparedModel, data: CalibrationData, candidates: Candidates | None, memory_limit: int | None = None
) -> LossRuns:
    """Begin the runs of :func:`choose_allocation`, which several calls for the same data may share."""
    with one_torch_thread() as threads:
        run_options = RunOptions(threads=threads if prepared.device.type == "cpu" else 1)
        size = choose_batch_size(prepared, memory_limit)
        return LossRuns.begin(
            prepared, data, candidates, batch_size=size, run_options=run_options, memory_limit=memory_limit
        )


def choose_allocation(
    prepared: PreparedModel,
    table: SensitivityTable,
    budget: float | Budget,
    data: CalibrationData,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    candidates: Candidates | None = None,
    memory_limit: int | None = None,
    search_passes: int = 0,
    search_data: CalibrationData | None = None,
    runs: LossRuns | None = None,
) -> Allocation:
    """Return the proposed allocation that loses the least information at the output, with all sites at their bits.

    The loss is E KL(p || q), p of the float model and q of the quantized one, in nats per sample, over at most 512
    samples evenly spread over the data; :class:`infoq_fx.InfoQ` measures the same for single sites. Proposals are those
    of :func:`infoq_fx.allocation.solver.propose`, with the relative error of the weights as second scores if only
    weights are searched. The uniform allocation is among them, so that the result is never worse by this measure.

    With ``search_passes``, the best proposal is then improved by :func:`infoq_fx.scoring.search.improve_allocation` on
    at most 512 other samples, by :class:`LossOverPairs`: nats themselves are means of a few large values, and do not
    distinguish neighbours on so few samples (on ResNet-20 at 2.5 bits, nats of 36 neighbours on 512 samples correlate
    at 0.23 with those on 1,000 others, the loss over pairs at 0.81). Every step of the search is judged on ``data``,
    which it has not seen; the best proposal stays unless a step loses less there, over pairs and in nats.

    Cost: one forward pass per proposal (at most six) and one of the float model; no labels. The search adds
    ``search_passes`` forward passes at most, one of the float model, and one over ``data`` for each step.

    Args:
        prepared: calibrated.
        table: the sites' scores, of any criterion.
        budget: the limits; a number is the mean weight bit-width.
        data: by the model's input names, on the model's device.
        alpha: factor on the scores of activations relative to those of weights.
        pin: fixed bit-widths by site name.
        candidates: rounded weights to run with; None for rounding to nearest.
        memory_limit: bytes for a batch's values; None for about 256 MiB.
        search_passes: number of passes of the search; 0 for none.
        search_data: the samples of the search; None for ``data``, which then judges nothing that is new to it.
        runs: of :func:`begin_runs` for the same model, data and candidates, so that what earlier calls have run is not
            run again.

    Raises:
        OptionError, InfeasibleBudgetError: as :func:`infoq_fx.allocate`.
    """
    check_scores(prepared, table)
    proposals = list(propose(table, budget, alpha=alpha, pin=pin, second=_weight_errors(prepared)))
    runs = runs or begin_runs(prepared, data, candidates, memory_limit)
    with one_torch_thread():
        runs = runs.rounded(_sites_at(prepared, proposals))
        measured = [_measure(runs, proposal) for proposal in proposals]
        best = _best_of(measured)
        if search_passes:
            other = data if search_data is None else search_data
            seen = begin_runs(prepared, other, candidates, memory_limit)
            steps = _search(table, best, seen, search_passes, alpha, pin)
            judged = runs.over_pairs()
            for bits in sorted(steps, key=lambda bits: float(judged(bits).mean())):
                if bits is steps[0]:
                    break
                moved = _measure(runs, move_allocation(table, best, bits, alpha))
                if _best_of([best, moved]) is moved:
                    best = moved
                    break
    return best


def _search(
    table: SensitivityTable,
    start: Allocation,
    runs: LossRuns,
    passes: int,
    alpha: float,
    pin: Mapping[str, int] | None,
) -> list[dict[str, int]]:
    """The steps of the search from a proposal; most weights that it needs are rounded together."""
    paired = runs.rounded(neighbours(table.inventory, start.bits, _REACH)).over_pairs()
    return improve_allocation(table, start, lambda bits: float(paired(bits).mean()), passes, alpha=alpha, pin=pin)


def _measure(runs: LossRuns, allocation: Allocation) -> Allocation:
    return replace(allocation, lost_nats=float(runs(allocation.bits).mean()))


def _best_of(measured: Sequence[Allocation]) -> Allocation:
    """The allocation that loses the least, the first of equal ones."""
    _LOGGER.info(
        "%d allocations lose %s nats a sample", len(measured), ", ".join(f"{m.lost_nats:.4g}" for m in measured)
    )
    return min(measured, key=lambda allocation: allocation.lost_nats or 0.0)


def _sites_at(prepared: PreparedModel, proposals: Sequence[Allocation]) -> list[QuantSite]:
    """The sites with the bit-widths that the proposals give them as candidates."""
    return [
        replace(site, bits=tuple(sorted({proposal.bits[site.name] for proposal in proposals})))
        for site in prepared.inventory.sites
    ]


def _weight_errors(prepared: PreparedModel) -> dict[str, dict[int, float]] | None:
    """Scores by :class:`WeightMSE`; None if activations are searched, which it does not score."""
    sites = [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    if any(site.kind == "activation" for site in sites):
        return None
    criterion = WeightMSE()
    measure = criterion.begin(prepared, None, batch_size=1, run_options=RunOptions())
    scores = criterion.score(prepared, measure(prepared, None, sites, RunOptions()))
    return {site: {bits: score.value for bits, score in by_bits.items()} for site, by_bits in scores.items()}
