"""Recovers accuracy lost to rounding, at fixed bit-widths: names the recovery steps and runs them in order."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import return_free_memory, usual_bytes
from infoq_fx.core.option_checks import with_seed
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.recovery.step import RecoveryStep, StepContext
from infoq_fx.recovery.steps.bias_correction import BiasCorrection
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction
from infoq_fx.recovery.steps.output_tuning import OutputTuning
from infoq_fx.recovery.steps.range_equalization import RangeEqualization
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding
from infoq_fx.runtime.forward import (
    RunOptions,
    choose_batch_size,
    choose_gradient_bytes,
    hold_float_outputs,
    measure_lost_nats,
)
from infoq_fx.runtime.held_outputs import HeldLoss, make_loss

__all__ = [
    "LADDER",
    "RECOVERY_STEPS",
    "AnyRecovery",
    "BiasCorrection",
    "BlockReconstruction",
    "Candidates",
    "OutputTuning",
    "RangeEqualization",
    "RecoveryStep",
    "SecondOrderRounding",
    "StepContext",
    "find_candidates",
    "find_steps",
    "hold_checked",
    "recover_accuracy",
]

RECOVERY_STEPS: Mapping[str, type[RecoveryStep]] = {
    "range_equalization": RangeEqualization,
    "bias_correction": BiasCorrection,
    "second_order_rounding": SecondOrderRounding,
    "block_reconstruction": BlockReconstruction,
    "output_tuning": OutputTuning,
}
"""Recovery steps by name, each with its default options."""

LADDER: Mapping[str, tuple[str | RecoveryStep, ...]] = {
    "none": (),
    "fast": ("second_order_rounding",),
    "best": (
        "second_order_rounding",
        SecondOrderRounding(reference="float_model"),
        "block_reconstruction",
        "output_tuning",
    ),
}
"""Levels of recovery by name, from no cost to the highest: the steps of each, in order."""

AnyRecovery = str | RecoveryStep | Sequence[str | RecoveryStep]

_HELD_SHARE = 5  # one in this many samples is held out
_MOST_HELD = 256
_HELD_BYTES = 512 << 20  # of values between layers in memory


def find_steps(recovery: AnyRecovery, seed: int = 0) -> list[RecoveryStep]:
    """Return the steps of a level of recovery, a step's name, a step, or a sequence of these.

    Steps made from a name take the ``seed``, if they have a field for it; objects bring their own.

    Raises:
        OptionError: a name is unknown, an object is not a step, or the seed is not an integer of at least 0.
    """
    if isinstance(recovery, str) and recovery in LADDER:
        return find_steps(LADDER[recovery], seed)
    if isinstance(recovery, str):
        if recovery not in RECOVERY_STEPS:
            raise unknown_name_error("recovery", recovery, [*LADDER, *RECOVERY_STEPS])
        return [with_seed(RECOVERY_STEPS[recovery](), seed)]
    if isinstance(recovery, Sequence):
        return [step for one in recovery for step in find_steps(one, seed)]
    if callable(getattr(recovery, "recover", None)) and isinstance(getattr(recovery, "name", None), str):
        return [recovery]
    known = ", ".join(map(repr, [*LADDER, *RECOVERY_STEPS]))
    raise OptionError(
        f"recovery={recovery!r} is not a step; give one of {known}, an object with name and recover(), or a list of "
        "these"
    )


def find_candidates(
    prepared: PreparedModel, data: CalibrationData, steps: Sequence[RecoveryStep], *, memory_limit: int | None = None
) -> Candidates | None:
    """Return rounded weights to score with if these steps follow; None for rounding to nearest."""
    return (
        Candidates(prepared, data, memory_limit=memory_limit)
        if any(step.name == Candidates.recovery for step in steps)
        else None
    )


def recover_accuracy(
    prepared: PreparedModel,
    bits: Mapping[str, int],
    data: CalibrationData,
    steps: Sequence[RecoveryStep],
    *,
    cache_dir: Path | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
    checked: HeldLoss | None = None,
) -> PreparedModel:
    """Run the steps in order, and undo each step that does not bring the outputs closer to the float model's.

    The distance is the mean KL divergence of the outputs from the float model's, in nats per sample, over every fifth
    sample (at most 256), which no step sees. Fewer than ten samples are used for both.

    Args:
        prepared: calibrated; not changed.
        bits: bit-width by site.
        data: by the model's input names, on the model's device.
        steps: in order.
        cache_dir: where long steps keep finished parts.
        memory_limit: bytes for batches and for values between layers; those beyond it go to a temporary file. None for
            256 MiB and 512 MiB.
        progress: show a progress bar on standard error.
        checked: of :func:`hold_checked` for the same model and data, so that the float model does not run again.

    Returns:
        A copy with better parameters, or ``prepared`` itself if no step helped; ``recovered_by`` names the steps kept.
    """
    if not steps:
        return prepared
    log = logging.getLogger(__name__)
    batch_size = choose_batch_size(prepared, memory_limit)
    usual = usual_bytes(prepared.device, _HELD_BYTES)
    held_bytes = usual if memory_limit is None else min(usual, memory_limit // 2)
    fitted, held = _hold_back(data, prepared.batch_size or 1)
    is_on_cpu = prepared.device.type == "cpu"
    with (
        one_torch_thread() as threads,
        tqdm(total=len(steps), disable=not progress, desc="recovering", unit="step", bar_format=_BAR) as bar,
    ):
        gradient_bytes = choose_gradient_bytes(memory_limit, prepared.device)
        run_options = RunOptions(threads=threads if is_on_cpu else 1, advance=bar.update, gradient_bytes=gradient_bytes)
        checked = checked or hold_checked(prepared, data, memory_limit)
        check = _Check(held, bits, checked, batch_size, RunOptions(threads=run_options.threads))
        current, nats = prepared, check(prepared)
        for index, step in enumerate(steps):
            bar.set_description(f"recovering ({step.name})")
            found, found_nats = current, math.inf
            variants = _find_variants(step, current, bits)
            advance = functools.partial(_advance, bar, len(variants))
            context = StepContext(
                batch_size=batch_size,
                run_options=replace(run_options, advance=advance),
                cache_dir=cache_dir,
                held_bytes=held_bytes,
            )
            for variant in variants:
                tried = variant.recover(current, bits, fitted, context)
                return_free_memory()
                tried_nats = check(tried)
                log.debug("%s: %.4g nats from the float model", variant, tried_nats)
                if tried_nats < found_nats:
                    found, found_nats = tried, tried_nats
                del tried
            if found_nats < nats:
                log.info("%s: %.4g nats from the float model, %.4g before", step.name, found_nats, nats)
                current = replace(found, recovered_by=(*current.recovered_by, step.name))
                nats = found_nats
            else:
                log.info("%s is undone: %.4g nats from the float model, %.4g before", step.name, found_nats, nats)
            bar.update(index + 1 - bar.n)
    return current


def hold_checked(prepared: PreparedModel, data: CalibrationData, memory_limit: int | None = None) -> HeldLoss:
    """Run the float model over the samples that :func:`recover_accuracy` checks its steps by."""
    origin, (_, held) = prepared.origin or prepared, _hold_back(data, prepared.batch_size or 1)
    with one_torch_thread() as threads:
        run_options = RunOptions(threads=threads if prepared.device.type == "cpu" else 1)
        size = choose_batch_size(prepared, memory_limit)
        reference = hold_float_outputs(origin, held, batch_size=size, run_options=run_options)
    return HeldLoss(reference, make_loss(origin, reference), memory_limit and memory_limit // 4)


def _find_variants(step: RecoveryStep, prepared: PreparedModel, bits: Mapping[str, int]) -> Sequence[RecoveryStep]:
    return step.variants(prepared, bits) if isinstance(step, SecondOrderRounding) else [step]


def _advance(bar: tqdm[Any], variants: int, share: float) -> None:
    bar.update(share / variants)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


class _Check:
    """Divergence from the float model in nats, over samples that no step sees."""

    def __init__(
        self,
        held: CalibrationData,
        bits: Mapping[str, int],
        loss: HeldLoss,
        batch_size: int,
        run_options: RunOptions,
    ) -> None:
        self._held, self._bits, self._loss = held, bits, loss
        self._batch_size, self._run_options = batch_size, run_options

    def __call__(self, prepared: PreparedModel) -> float:
        nats = measure_lost_nats(
            prepared,
            self._held,
            self._bits,
            self._loss,
            batch_size=self._batch_size,
            run_options=self._run_options,
        )
        return float(nats.mean())


def _hold_back(data: CalibrationData, fixed: int) -> tuple[CalibrationData, CalibrationData]:
    """Samples to fit and samples to check, in whole batches of a fixed graph."""
    if data.samples < 2 * _HELD_SHARE or data.samples < 2 * fixed:
        return data, data
    every = max(_HELD_SHARE, -(-data.samples // _MOST_HELD))
    is_held = torch.arange(data.samples) % every == every - 1
    held, fitted = (data.select(rows.nonzero()[:, 0]) for rows in (is_held, ~is_held))
    if fixed > 1:
        if held.samples < fixed:
            return data.take(data.samples - fixed), data.select(torch.arange(data.samples - fixed, data.samples))
        held, fitted = (part.take(part.samples - part.samples % fixed) for part in (held, fitted))
    return fitted, held
