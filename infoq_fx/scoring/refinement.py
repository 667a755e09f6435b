"""Chooses among a few allocations by running the model with each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from infoq_fx.allocation.solver import propose
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.runtime.forward import RunOptions, choose_batch_size, hold_float_outputs, measure_lost_nats
from infoq_fx.runtime.held_outputs import make_loss
from infoq_fx.scoring.criteria.weight_mse import WeightMSE
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation, Budget, QuantSite

__all__ = ["choose_allocation"]

_SAMPLES = 512


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
) -> Allocation:
    """Return the proposed allocation that loses the least information at the output, with all sites at their bits.

    The loss is E KL(p || q), p of the float model and q of the quantized one, in nats per sample, over at most 512
    samples evenly spread over the data; :class:`infoq_fx.InfoQ` measures the same for single sites. Proposals are those
    of :func:`infoq_fx.allocation.solver.propose`, with the relative error of the weights as second scores if only
    weights are searched. The uniform allocation is among them, so that the result is never worse by this measure.

    Cost: one forward pass per proposal (at most six) and one of the float model; no labels.

    Args:
        prepared: calibrated.
        table: the sites' scores, of any criterion.
        budget: the limits; a number is the mean weight bit-width.
        data: by the model's input names, on the model's device.
        alpha: factor on the scores of activations relative to those of weights.
        pin: fixed bit-widths by site name.
        candidates: rounded weights to run with; None for rounding to nearest.
        memory_limit: bytes for a batch's values; None for about 256 MiB.

    Raises:
        OptionError, InfeasibleBudgetError: as :func:`infoq_fx.allocate`.
    """
    proposals = list(propose(table, budget, alpha=alpha, pin=pin, second=_weight_errors(prepared)))
    samples = data.spread(_SAMPLES)
    if prepared.batch_size is not None:
        samples = samples.take(samples.samples - samples.samples % prepared.batch_size)
    batch_size = choose_batch_size(prepared, memory_limit)
    with one_torch_thread() as threads:
        run_options = RunOptions(threads=threads if prepared.device.type == "cpu" else 1)
        if candidates is not None:
            prepared = candidates.round(_sites_at(prepared, proposals), run_options)
        reference = hold_float_outputs(prepared, samples, batch_size=batch_size, run_options=run_options)
        loss, measured = make_loss(prepared, reference), []
        for proposal in proposals:
            nats = measure_lost_nats(
                prepared, samples, proposal.bits, reference, loss, batch_size=batch_size, run_options=run_options
            )
            measured.append(replace(proposal, lost_nats=float(nats.mean())))
    best = min(measured, key=lambda allocation: allocation.lost_nats or 0.0)
    logging.getLogger(__name__).info(
        "%d proposals lose %s nats a sample", len(measured), ", ".join(f"{m.lost_nats:.4g}" for m in measured)
    )
    return best


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
