"""The public calls: the whole pipeline in one call, and the same in stages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from infoq_fx.allocation.solver import allocate, check_budget
from infoq_fx.conversion.conversion import check_allocation, convert_prepared, warn_of_other_recovery
from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.core.data import CalibrationData, read_data
from infoq_fx.core.option_checks import check_alpha, check_count, check_device, check_model
from infoq_fx.core.targets import find_container
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.graph.calibration import calibrate
from infoq_fx.graph.capture import capture
from infoq_fx.graph.model_inputs import Inputs, choose_example_inputs, fit_data, name_examples
from infoq_fx.graph.passes.add_head_dimension import add_head_dimension
from infoq_fx.graph.passes.fold_batch_norm import fold_batch_norm
from infoq_fx.graph.passes.fold_constants import fold_constants
from infoq_fx.graph.passes.insert_observers import insert_observers
from infoq_fx.graph.passes.insert_quantizers import insert_quantizers
from infoq_fx.graph.passes.pass_manager import bind_options, run_passes
from infoq_fx.graph.sites import find_sites
from infoq_fx.quantization.prepared import PreparedModel, check_prepared
from infoq_fx.recovery.ladder import AnyRecovery, find_candidates, find_steps, recover_accuracy
from infoq_fx.recovery.step import RecoveryStep
from infoq_fx.runtime.forward import choose_batch_size
from infoq_fx.scoring.criteria import AnyCriterion, find_criterion
from infoq_fx.scoring.criteria.infoq import InfoQ
from infoq_fx.scoring.criteria.infoq_paper import InfoQPaper
from infoq_fx.scoring.criterion import Criterion
from infoq_fx.scoring.information.encoders import Encoder
from infoq_fx.scoring.refinement import choose_allocation
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.table import SensitivityTable, check_table
from infoq_fx.types import Allocation, Budget, Observer, check_bits

__all__ = ["convert", "make_criterion", "prepare", "quantize", "quantize_prepared", "recover", "refine", "score"]

DEFAULT_BITS = (2, 3, 4, 5, 6, 7, 8)


def quantize(
    model: nn.Module | ExportedProgram,
    budget: float | Budget,
    *,
    calibration_data: Any = None,
    example_inputs: Inputs | None = None,
    bits: int | Sequence[int] | None = None,
    activation_bits: int | Sequence[int] | None = 8,
    criterion: AnyCriterion = "infoq",
    observers: Sequence[Observer | str] | Literal["auto"] | None = None,
    encoder: Encoder | str | None = None,
    alpha: float = 1.0,
    refine: bool = True,
    recovery: AnyRecovery = "fast",
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    executor: Executor | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> QuantizedModule:
    """Find every layer's bit-width under a budget and return the quantized model.

    Args:
        model: trained; an ``nn.Module``, ``fx.GraphModule`` or ``ExportedProgram``. It is not changed.
        budget: mean weight bit-width, or a :class:`Budget` with any number of limits.
        calibration_data: about 1,000 samples, see :func:`infoq_fx.core.data.read_data`. Without labels the model's own
            predictions serve. None: weights only, by their relative error, with a warning.
        example_inputs: a batch for capture; needed only without data and without an exported program.
        bits: candidate bit-widths of weights, 2 to 8. None for all, or those that the budget's container stores.
        activation_bits: candidate bit-widths of activations; one is fixed, several are searched jointly; None
            leaves activations in float.
        criterion: how sensitivity is scored: a registered name, an object (which brings its own options and seed) or a
            function of your own, see :class:`infoq_fx.FunctionCriterion`.
        observers: where sliced mutual information is measured, see :class:`infoq_fx.InfoQ` and
            :class:`infoq_fx.InfoQPaper`.
        encoder: X -> X_E for SMI(X_E; L), see :func:`infoq_fx.scoring.information.encoders.encode_inputs`.
        alpha: weight of activation scores against weight scores (Eq. 5).
        refine: choose among a few allocations by running them, see :func:`refine`; needs data.
        recovery: what is done for the accuracy at these bit-widths, see :func:`recover`; needs data.
        ignore: glob patterns on module paths, layers to leave in float (everything below a matching module).
        pin: glob pattern on module paths or site names, to the bit-width it must have.
        seed: of everything random; the same seed gives the same result. Criteria and recovery steps given as objects
            bring their own.
        device: where the work is done and the result lives.
        executor: workers for the scoring, any ``concurrent.futures.Executor``; None for threads of this process.
        cache_dir: folder that keeps every finished score: a run that was stopped goes on, and a run with another
            budget or one more bit-width pays only for what is new.
        memory_limit: bytes that scoring may take in a process, above model and data; None for half of what is free.
        progress: show a progress bar on standard error.

    Returns:
        A graph module that takes the model's inputs, with integer weights; :func:`infoq_fx.allocation_of` reads
        the allocation, :func:`infoq_fx.export_onnx` writes the file.

    Raises:
        UnsupportedModelError: the model cannot be captured, or has nothing to quantize.
        CalibrationDataError: the data cannot be used.
        OptionError: an argument cannot be used.
        InfeasibleBudgetError: no allocation fits; known before anything is scored.
    """
    check_model(model)
    check_device(device)
    check_alpha(alpha)
    chosen, steps = make_criterion(criterion, observers, encoder, seed), find_steps(recovery, seed)
    data = None if calibration_data is None else read_data(calibration_data)
    if data is None and chosen.needs_data:
        warnings.warn(
            "no calibration data: weights are scored by their own relative error and activations stay in float; "
            "about 1,000 samples, without labels too, make a far better allocation",
            stacklevel=2,
        )
        chosen = make_criterion("weight_mse", seed=seed)
    prepared = prepare(
        model,
        data,
        example_inputs=example_inputs,
        bits=bits,
        activation_bits=activation_bits if data is not None else None,
        ignore=ignore,
        pin=pin,
        device=device,
        budget=budget,
    )
    resources = Resources(executor=executor, cache_dir=cache_dir, memory_limit=memory_limit, progress=progress)
    fitting = None if data is None else fit_data(prepared, data)
    return quantize_prepared(prepared, budget, fitting, chosen, steps, resources, alpha=alpha, refine=refine)


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
    keep_scores: Callable[[SensitivityTable], None] | None = None,
) -> QuantizedModule:
    """Score, allocate, refine, recover and convert: what :func:`quantize` does behind :func:`prepare`.

    Weights are rounded once, for the scores and for the refinement.

    Args:
        prepared: calibrated.
        budget: mean weight bit-width, or a :class:`Budget`.
        data: by the model's input names, on its device (:func:`infoq_fx.graph.model_inputs.fit_data`); None for a
            criterion that needs none: then nothing is refined or recovered.
        scores: a criterion, or scores of this model that were found before.
        steps: of recovery, in order.
        resources: of the scoring; its ``cache_dir`` and ``progress`` serve recovery too.
        alpha: weight of activation scores against weight scores (Eq. 5).
        refine: choose among a few allocations by running them.
        keep_scores: called with the table as soon as the scoring is done.

    Raises:
        OptionError: an argument cannot be used.
        InfeasibleBudgetError: a limit is out of reach.
    """
    check_alpha(alpha)
    candidates = None if data is None else find_candidates(prepared, data, steps)
    if isinstance(scores, SensitivityTable):
        table = scores
    else:
        table, _ = measure_sensitivity(prepared, data, scores, resources, candidates)
    if keep_scores is not None:
        keep_scores(table)
    if refine and data is not None:
        allocation = choose_allocation(prepared, table, budget, data, alpha=alpha, candidates=candidates)
    else:
        allocation = allocate(table, budget, alpha=alpha)
    if isinstance(scores, SensitivityTable):
        warn_of_other_recovery(allocation, [step.name for step in steps], stacklevel=3)
    if data is None:
        return convert_prepared(prepared, allocation, table)
    folder = None if resources.cache_dir is None else Path(resources.cache_dir)
    better = recover_accuracy(prepared, allocation.bits, data, steps, cache_dir=folder, progress=resources.progress)
    return convert_prepared(better, allocation, table)


def prepare(
    model: nn.Module | ExportedProgram,
    calibration_data: Any = None,
    *,
    example_inputs: Inputs | None = None,
    bits: int | Sequence[int] | None = None,
    activation_bits: int | Sequence[int] | None = 8,
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    budget: float | Budget | None = None,
) -> PreparedModel:
    """Capture a model, insert configurable quantizers and observers, and calibrate them for every bit-width.

    Arguments and errors are those of :func:`quantize`; ``budget``, where given, is only checked for being within
    reach before the calibration.
    """
    check_model(model)
    home = check_device(device)
    weight_candidates = check_bits(default_bits(budget) if bits is None else bits, "bits")
    candidates = None if activation_bits is None else check_bits(activation_bits, "activation_bits")
    for pattern, fixed in (pin or {}).items():
        check_bits(fixed, f"pin[{pattern!r}]")
    data = None if calibration_data is None else read_data(calibration_data)
    if data is None and candidates is not None:
        raise CalibrationDataError(
            "activations cannot be quantized without calibration data: give data, or activation_bits=None"
        )
    inputs = choose_example_inputs(model, data, example_inputs)
    captured = capture(model, inputs, device=home)
    examples = name_examples(captured, inputs, home)
    graph_module = run_passes(captured.graph_module, [fold_constants, fold_batch_norm, add_head_dimension])
    plan = find_sites(
        graph_module, examples, bits=weight_candidates, activation_bits=candidates, ignore=ignore, pin=pin
    )
    if budget is not None:
        check_budget(plan.inventory, budget)
    run_passes(graph_module, [bind_options(insert_quantizers, plan=plan), insert_observers])
    prepared = PreparedModel(
        graph_module=graph_module,
        inventory=plan.inventory,
        input_names=captured.input_names,
        output_names=captured.output_names,
        example_inputs=examples,
        batch_size=captured.batch_size,
        classifier=plan.classifier,
    )
    held = CalibrationData({}, None, False) if data is None else fit_data(prepared, data)
    calibrate(prepared, held, batch_size=choose_batch_size(prepared))
    return prepared


def score(
    prepared: PreparedModel,
    calibration_data: Any = None,
    *,
    criterion: AnyCriterion = "infoq",
    observers: Sequence[Observer | str] | Literal["auto"] | None = None,
    encoder: Encoder | str | None = None,
    seed: int = 0,
    recovery: AnyRecovery = "fast",
    executor: Executor | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> SensitivityTable:
    """Score every searched site at every bit-width; see :func:`quantize` for arguments and errors.

    ``recovery`` is what will be done at the bit-widths chosen, see :func:`recover`: where that rounds weights to second
    order, criteria that run weights (``"infoq"``, ``"output_kl"``, ``"output_sqnr"``, ``"loss"``, ``"accuracy"``) are
    given weights rounded so (see ``infoq_fx.recovery.candidates``), since what is lost to nearest rounding is no
    measure of what recovery leaves. With ``"none"`` weights are rounded to nearest.

    The same scores to the last digit, whatever the executor, the threads, the cache and (from 1 GiB on) the memory.
    Ctrl-C raises KeyboardInterrupt with a message that says where the finished scores are and how to go on.
    """
    check_prepared(prepared, "score")
    chosen, steps = make_criterion(criterion, observers, encoder, seed), find_steps(recovery, seed)
    data = None if calibration_data is None else fit_data(prepared, read_data(calibration_data))
    candidates = None if data is None else find_candidates(prepared, data, steps)
    resources = Resources(executor=executor, cache_dir=cache_dir, memory_limit=memory_limit, progress=progress)
    return measure_sensitivity(prepared, data, chosen, resources, candidates)[0]


def refine(
    prepared: PreparedModel,
    table: SensitivityTable,
    budget: float | Budget,
    calibration_data: Any,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    recovery: AnyRecovery = "fast",
) -> Allocation:
    """The best of a few allocations within the budget, by running them on calibration data.

    :func:`infoq_fx.allocate` trusts that the damage of single sites adds up; this does not. The allocations are those
    of least total of the scores, of their powers 0.75, 0.5 and 0.25, and of the weights' relative errors, and the
    uniform one; the best is that whose outputs diverge least from the float model's, in nats a sample: ``lost_nats`` of
    the result.

    Weights are rounded as :func:`score` has them for the same ``recovery``.

    Cost: at most seven forward passes over at most 512 samples, no labels; and that of the rounding.

    Args:
        prepared: what the table was scored on.
        table: scores of any criterion.
        budget: mean weight bit-width, or a :class:`Budget`.
        calibration_data: see :func:`quantize`.
        alpha: weight of activation scores against weight scores (Eq. 5).
        pin: bit-widths fixed beforehand, by site name.
        recovery: what will be done at these bit-widths.

    Raises:
        OptionError: an argument cannot be used, or a candidate has no score.
        CalibrationDataError: the data cannot be used.
        InfeasibleBudgetError: a limit is out of reach.
    """
    check_prepared(prepared, "refine")
    check_table(table)
    check_alpha(alpha)
    steps = find_steps(recovery)
    data = fit_data(prepared, read_data(calibration_data))
    candidates = find_candidates(prepared, data, steps)
    return choose_allocation(prepared, table, budget, data, alpha=alpha, pin=pin, candidates=candidates)


def recover(
    prepared: PreparedModel,
    allocation: Allocation,
    calibration_data: Any,
    recovery: AnyRecovery = "fast",
    *,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PreparedModel:
    """Win back accuracy at the bit-widths of an allocation: the same graph with better weights, biases and scales.

    The ladder: ``"none"``; ``"fast"``, second-order rounding with the mean error taken by the biases (the default of
    :func:`quantize`); ``"best"``, block reconstruction and output tuning on top of it. Or the name of a step in
    :data:`infoq_fx.RECOVERY_STEPS`, a step with options of your own, or a list of these, taken in order.

    Nothing is made worse: a step that lowers the agreement with the float model, measured as the mean KL divergence of
    the outputs over every fifth sample (at most 256), which no step sees, is undone; the log tells.

    Args:
        prepared: calibrated; it stays as it is and serves for the next allocation.
        allocation: bit-widths of all sites.
        calibration_data: see :func:`quantize`; labels are not read.
        recovery: what to do.
        seed: of everything random; steps given as objects bring their own.
        cache_dir: folder where long steps keep what is finished, so that a run that was stopped goes on.
        progress: show a bar on standard error.

    Returns:
        For :func:`convert` with the same allocation. Its ``recovered_by`` are the steps that helped; another
        ``recover`` goes on from there, and measures against the same float model.

    Raises:
        OptionError: an unknown step, an option out of range, or an allocation of another model.
        CalibrationDataError: the data cannot be used.
    """
    check_prepared(prepared, "recover")
    steps = find_steps(recovery, seed)
    check_allocation(prepared, allocation)
    data = fit_data(prepared, read_data(calibration_data))
    folder = None if cache_dir is None else Path(cache_dir)
    found = recover_accuracy(prepared, allocation.bits, data, steps, cache_dir=folder, progress=progress)
    tried = (*prepared.recovery_tried, *(step.name for step in steps))
    return replace(found, recovery_tried=tried) if steps else found


def convert(prepared: PreparedModel, allocation: Allocation) -> QuantizedModule:
    """The quantized model of an allocation; ``prepared`` stays as it is and serves for the next allocation.

    Warns if the scores behind the allocation assume a recovery that ``prepared`` has not been through.

    Raises:
        OptionError: the allocation lacks a site, or has a bit-width that the site was not calibrated for.
    """
    check_prepared(prepared, "convert")
    check_allocation(prepared, allocation)
    warn_of_other_recovery(allocation, [*prepared.recovered_by, *prepared.recovery_tried], stacklevel=3)
    return convert_prepared(prepared, allocation, None)


def default_bits(budget: float | Budget | None) -> tuple[int, ...]:
    """Bit-widths that make a difference: in a container of 4 and 8 bits, 3 take the place of 4 and are worse."""
    container = budget.container if isinstance(budget, Budget) else None
    return DEFAULT_BITS if container is None else find_container(container).weight_widths


def make_criterion(
    criterion: AnyCriterion,
    observers: Sequence[Observer | str] | Literal["auto"] | None = None,
    encoder: Encoder | str | None = None,
    seed: int = 0,
) -> Criterion:
    """Make the criterion of :func:`quantize`'s options.

    Raises:
        OptionError: an unknown criterion, a seed that is none, or observers or an encoder for a criterion without.
    """
    check_count("seed", seed, 0)
    if criterion == "infoq" and observers is None and encoder is not None:
        raise OptionError("encoder serves SMI(X; L) at observers: name observers too, or take criterion='infoq_paper'")
    if criterion == "infoq":
        return InfoQ(observers=observers, encoder=encoder, seed=seed)
    if criterion == "infoq_paper":
        return InfoQPaper(observers=observers, encoder=encoder, seed=seed)
    if observers is not None or encoder is not None:
        raise OptionError(
            "observers and encoder belong to criterion='infoq' or 'infoq_paper'; give them to the criterion object"
        )
    return find_criterion(criterion, seed)
