"""The public API: the whole pipeline in one call, and the same in stages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from infoq_fx.allocation.cost import limits_bitops
from infoq_fx.allocation.solver import check_budget
from infoq_fx.conversion.conversion import check_allocation, convert_prepared, warn_of_codebooks, warn_of_other_recovery
from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.core.data import CalibrationData, ForwardArguments, read_data
from infoq_fx.core.option_checks import (
    check_alpha,
    check_count,
    check_device,
    check_memory_limit,
    check_model,
    check_patterns,
    read_search_passes,
)
from infoq_fx.core.readings import Metric
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.graph.calibration import calibrate
from infoq_fx.graph.capture import capture
from infoq_fx.graph.layer_forms.normal_form import NORMAL_FORM
from infoq_fx.graph.model_inputs import Inputs, choose_example_inputs, find_arguments, fit_data, name_examples
from infoq_fx.graph.passes.insert_observers import insert_observers
from infoq_fx.graph.passes.insert_quantizers import insert_quantizers
from infoq_fx.graph.passes.pass_manager import bind_options, run_passes
from infoq_fx.graph.program.sizes import Dynamic
from infoq_fx.graph.program.weight_storage import move_to_disk
from infoq_fx.graph.reading_choice import OutputsOption, choose_readings, describe_choice, run_samples
from infoq_fx.graph.sites import find_sites, warn_of_float_weights
from infoq_fx.pipeline import quantize_prepared
from infoq_fx.quantization.codebooks import Levels, choose_levels
from infoq_fx.quantization.prepared import PreparedModel, check_prepared
from infoq_fx.recovery.ladder import AnyRecovery, find_candidates, find_steps, recover_accuracy
from infoq_fx.recovery.ranges.equalization import find_depthwise
from infoq_fx.runtime.forward import choose_batch_size
from infoq_fx.scoring.criteria import AnyCriterion, make_criterion
from infoq_fx.scoring.criterion import Observer
from infoq_fx.scoring.information.encoders import Encoder
from infoq_fx.scoring.refinement import choose_allocation
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.table import SensitivityTable, check_table
from infoq_fx.tolerance.search import divide_samples, quantize_within
from infoq_fx.tolerance.tolerance import Tolerance
from infoq_fx.types import Allocation, Budget, check_bits

__all__ = ["convert", "prepare", "quantize", "recover", "refine", "score"]

DEFAULT_BITS = (2, 3, 4, 5, 6, 7, 8)


def quantize(
    model: nn.Module | ExportedProgram,
    budget: float | Budget | Tolerance,
    *,
    calibration_data: Any = None,
    validation_data: Any = None,
    metric: Metric | None = None,
    example_inputs: Inputs | None = None,
    bits: int | Sequence[int] | None = None,
    activation_bits: int | Sequence[int] | None = 8,
    criterion: AnyCriterion = "infoq",
    observers: Sequence[Observer | str] | Literal["auto"] | None = None,
    encoder: Encoder | str | None = None,
    alpha: float = 1.0,
    refine: bool | Literal["search"] = True,
    search_passes: int | None = None,
    recovery: AnyRecovery = "fast",
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
    tie: Sequence[Sequence[str]] = (),
    outputs: OutputsOption = "auto",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dynamic: Dynamic = "auto",
    levels: Levels = "auto",
    executor: Executor | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> QuantizedModule:
    """Find every layer's bit-width under a budget and return the quantized model.

    Args:
        model: trained ``nn.Module``, ``fx.GraphModule`` or ``ExportedProgram``. It is not changed.
        budget: mean weight bit-width, or a :class:`Budget` with any number of limits, or a :class:`Tolerance`: the
            accuracy that may be lost, for which the smallest allocation is sought, see :func:`search_tolerance`.
        calibration_data: about 1,000 samples, see :func:`infoq_fx.core.data.read_data`. Without labels, the model's own
            predictions are used. None quantizes only weights, scored by their relative error, with a warning.
        validation_data: for a tolerance, samples to measure the loss on. None holds back every second calibration
            sample, which then calibrates, scores and recovers nothing.
        metric: for ``Tolerance(drop=)``, see :func:`search_tolerance`; None for top-1.
        example_inputs: a batch for capture; needed only without data and without an exported program.
        bits: candidate bit-widths of weights, 2 to 8, and 16 for float16. None for 2 to 8.
        activation_bits: candidate bit-widths of activations, 2 to 8, and 16 for float: a single one is used for all,
            several are searched together with the weights'; None leaves activations in float.
        criterion: sensitivity criterion: a registered name, an object with its own options and seed, or a function, see
            :class:`infoq_fx.FunctionCriterion`.
        observers: where sliced mutual information is measured, see :class:`infoq_fx.InfoQPaper`.
        encoder: X -> X_E for SMI(X_E; L), see :func:`infoq_fx.scoring.information.encoders.encode_inputs`.
        alpha: factor on activation scores relative to weight scores (Eq. 5).
        refine: run a few allocations and choose the best, see :func:`refine`; needs data. ``"search"`` then improves it
            by measured changes of its bit-widths.
        search_passes: forward passes over at most 512 samples that the search may take; None for 150.
        recovery: how accuracy is recovered at the chosen bit-widths, see :func:`recover`; needs data.
        ignore: glob patterns on module paths of layers to leave in float (everything below a matching module).
        pin: fixed bit-widths by glob pattern on module paths or site names.
        tie: groups of patterns on layers that get one bit-width in each parent module: ``[("*.q", "*.k", "*.v")]``.
        outputs: what the model's outputs mean, which decides how a loss is measured there: ``"auto"``, a reading
            (:class:`infoq_fx.Categorical`, :class:`infoq_fx.Bernoulli`, :class:`infoq_fx.Quantity`,
            :class:`infoq_fx.Ignored`) for all, a mapping from output name or position to a reading, its name or
            ``(reading, weight)``, or a function ``(float_outputs, outputs) -> nats [samples]``.
        seed: of all random numbers but those of criteria and recovery steps given as objects, which have their own.
        device: of the computations and of the result.
        levels: the integers of weights of up to 6 bits: ``"uniform"``, all of the bit-width; ``"mirrored"``, these or
            in some channels their negatives, with less error; ``"codebook"``, levels chosen for a weight, with least
            error; ``"auto"``, codebooks, but mirrored ones if BitOps are limited or minimized, since hardware that
            multiplies integers of few bits needs equal steps. QONNX files need uniform ones.
        dynamic: axes of the inputs, besides the samples, that may have any size in the quantized module and its file,
            as ``{"image": (2, 3)}``. ``"auto"`` frees those behind the channels (height and width, length) where the
            model's graph does not depend on them; None fixes all to the data's sizes. The data has one size anyway.
        executor: workers for scoring, any ``concurrent.futures.Executor``; None for threads of this process.
        cache_dir: folder for finished scores, from which an interrupted run resumes; a run with another budget or one
            more bit-width computes only new scores.
        memory_limit: bytes per process for batches, moments of layers and values between layers or for gradients. A
            single sample or layer may need more. None for half of the free memory in scoring; in recovery, values
            between layers beyond 512 MiB are then written to a temporary file.
        progress: show a progress bar on standard error.

    Returns:
        A graph module with the model's inputs and integer weights. :func:`infoq_fx.allocation_of` returns its
        allocation, :func:`infoq_fx.export_onnx` writes it to a file.

    Raises:
        UnsupportedModelError: the model cannot be captured, or has nothing to quantize.
        CalibrationDataError: the data cannot be used.
        OptionError: an argument is invalid.
        InfeasibleBudgetError: no allocation fits the budget; raised before scoring. Or none is within the tolerance.
    """
    check_model(model)
    check_device(device)
    check_alpha(alpha)
    check_memory_limit(memory_limit)
    passes = read_search_passes(refine, search_passes)
    chosen, steps = make_criterion(criterion, observers, encoder, seed), find_steps(recovery, seed)
    data, judged = divide_samples(calibration_data, validation_data, budget, metric, find_arguments(model))
    if data is None and chosen.needs_data:
        warnings.warn(
            "no calibration data: weights are scored by their own relative error and activations stay in float; "
            "give about 1,000 samples, with or without labels, for a much better allocation",
            stacklevel=2,
        )
        chosen = make_criterion("weight_mse", seed=seed)
    if levels == "auto" and isinstance(budget, Tolerance) and budget.minimize == "bitops":
        levels = "mirrored"
    prepared = prepare(
        model,
        data,
        example_inputs=example_inputs,
        bits=bits,
        activation_bits=activation_bits if data is not None else None,
        ignore=ignore,
        pin=pin,
        tie=tie,
        outputs=outputs,
        device=device,
        dynamic=dynamic,
        levels=levels,
        budget=budget.within if isinstance(budget, Tolerance) else budget,
    )
    resources = Resources(executor=executor, cache_dir=cache_dir, memory_limit=memory_limit, progress=progress)
    fitting = None if data is None else fit_data(prepared, data)
    search: dict[str, Any] = {"alpha": alpha, "refine": bool(refine), "search_passes": passes}
    if isinstance(budget, Tolerance):
        return quantize_within(prepared, budget, (metric, judged, fitting), chosen, steps, resources, **search)
    return quantize_prepared(prepared, budget, fitting, chosen, steps, resources, **search)


def prepare(
    model: nn.Module | ExportedProgram,
    calibration_data: Any = None,
    *,
    example_inputs: Inputs | None = None,
    bits: int | Sequence[int] | None = None,
    activation_bits: int | Sequence[int] | None = 8,
    ignore: Sequence[str] = (),
    pin: Mapping[str, int] | None = None,
    tie: Sequence[Sequence[str]] = (),
    outputs: OutputsOption = "auto",
    device: torch.device | str = "cpu",
    dynamic: Dynamic = "auto",
    levels: Levels = "auto",
    budget: float | Budget | None = None,
) -> PreparedModel:
    """Capture a model, insert configurable quantizers and observers, and calibrate them for every bit-width.

    Arguments and errors are those of :func:`quantize`; ``budget``, if given, is only checked to be feasible, before
    calibration.
    """
    check_model(model)
    home = check_device(device)
    if torch.get_default_dtype() != torch.float32:
        raise OptionError(
            f"torch's default dtype is {torch.get_default_dtype()}: call torch.set_default_dtype(torch.float32) first; "
            "the model itself may have any floating-point dtype"
        )
    weight_candidates = check_bits(DEFAULT_BITS if bits is None else bits, "bits")
    candidates = None if activation_bits is None else check_bits(activation_bits, "activation_bits")
    check_patterns(ignore, pin, tie)
    for pattern, fixed in (pin or {}).items():
        check_bits(fixed, f"pin[{pattern!r}]")
    data = None if calibration_data is None else read_data(calibration_data, find_arguments(model))
    if data is None and candidates is not None:
        raise CalibrationDataError(
            "activations cannot be quantized without calibration data: give data, or activation_bits=None"
        )
    inputs = choose_example_inputs(model, data, example_inputs)
    captured = capture(model, inputs, device=home, dynamic=dynamic)
    examples = name_examples(captured, inputs, home)
    graph_module = run_passes(captured.graph_module, NORMAL_FORM)
    plan = find_sites(
        graph_module,
        examples,
        bits=weight_candidates,
        activation_bits=candidates,
        ignore=ignore,
        pin=pin,
        tie=tie,
        levels=choose_levels(levels, counts_bitops=limits_bitops(budget)),
    )
    warn_of_float_weights(plan, stacklevel=3)
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
        form=captured.form,
        free_axes=captured.free_axes,
    )
    held = CalibrationData({}, None, False) if data is None else fit_data(prepared, data)
    shown = CalibrationData(examples, None, False) if data is None else held
    found = run_samples(graph_module, shown, fixed=captured.batch_size)
    choice = choose_readings(
        graph_module, found.outputs, captured.output_names, outputs, labels=found.labels, inputs=found.inputs
    )
    notes = describe_choice(choice, captured.output_names)
    prepared = replace(prepared, readings=choice.readings, output_notes=notes, loss_function=choice.function)
    size = choose_batch_size(prepared)
    equalizer = None if data is None else find_depthwise(prepared, held, batch_size=size)
    calibrate(prepared, held, batch_size=size, equalizer=equalizer)
    move_to_disk(graph_module)
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

    ``recovery`` is the recovery planned for the chosen bit-widths, see :func:`recover`. If it includes second-order
    rounding, criteria that run the quantized model (``"infoq"``, ``"output_kl"``, ``"output_sqnr"``, ``"loss"``,
    ``"accuracy"``) use weights rounded in the same way (see ``infoq_fx.recovery.candidates``), since the loss with
    rounding to nearest does not predict the loss after recovery. With ``"none"``, weights are rounded to nearest.

    Scores do not depend on the executor, the number of threads, the cache or, from 1 GiB on, the memory limit, to the
    last digit. Ctrl-C raises KeyboardInterrupt with a message that says where the finished scores are and how to
    resume.
    """
    check_prepared(prepared, "score")
    chosen, steps = make_criterion(criterion, observers, encoder, seed), find_steps(recovery, seed)
    arguments = ForwardArguments.exactly(prepared.input_names)
    data = None if calibration_data is None else fit_data(prepared, read_data(calibration_data, arguments))
    candidates = None if data is None else find_candidates(prepared, data, steps, memory_limit=memory_limit)
    resources = Resources(executor=executor, cache_dir=cache_dir, memory_limit=memory_limit, progress=progress)
    measured = None if data is None else data.hold_back(prepared.batch_size or 1)[0]
    return measure_sensitivity(prepared, measured, chosen, resources, candidates)[0]


def refine(
    prepared: PreparedModel,
    table: SensitivityTable,
    budget: float | Budget,
    calibration_data: Any,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    recovery: AnyRecovery = "fast",
    search_passes: int = 0,
) -> Allocation:
    """Choose the best of a few allocations within the budget by running them on calibration data.

    :func:`infoq_fx.allocate` assumes that the damages of single sites add up; this function does not. The allocations
    are those with the least total of the scores, of their powers 0.75, 0.5 and 0.25, and of the weights' relative
    errors, and the uniform allocation. The best is the one whose outputs diverge least from the float model's, in nats
    per sample: ``lost_nats`` of the result.

    Weights are rounded as by :func:`score` for the same ``recovery``. Cost: at most seven forward passes over at most
    512 samples, without labels, and the rounding of weights.

    With ``search_passes``, a search then changes a few bit-widths at a time, as measured on other samples, as long as
    less is lost. Its result is taken only if it also loses less on the samples that the proposals were judged on.

    Args:
        prepared: the prepared model of the table.
        table: scores of any criterion.
        budget: mean weight bit-width, or a :class:`Budget`.
        calibration_data: see :func:`quantize`.
        alpha: factor on activation scores relative to weight scores (Eq. 5).
        pin: fixed bit-widths by site name.
        recovery: planned for the chosen bit-widths, see :func:`score`.
        search_passes: forward passes over at most 512 samples that the search may take; 0 for no search.

    Raises:
        OptionError: an argument is invalid, or a candidate has no score.
        CalibrationDataError: the data cannot be used.
        InfeasibleBudgetError: a limit cannot be met.
    """
    check_prepared(prepared, "refine")
    check_table(table)
    check_alpha(alpha)
    check_count("search_passes", search_passes, 0)
    steps = find_steps(recovery)
    arguments = ForwardArguments.exactly(prepared.input_names)
    data = fit_data(prepared, read_data(calibration_data, arguments))
    candidates = find_candidates(prepared, data, steps)
    measured, held = data.hold_back(prepared.batch_size or 1)
    return choose_allocation(
        prepared,
        table,
        budget,
        held,
        alpha=alpha,
        pin=pin,
        candidates=candidates,
        search_passes=search_passes,
        search_data=measured,
    )


def recover(
    prepared: PreparedModel,
    allocation: Allocation,
    calibration_data: Any,
    recovery: AnyRecovery = "fast",
    *,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> PreparedModel:
    """Recover accuracy at the bit-widths of an allocation, by better weights, biases and scales in the same graph.

    Levels of ``recovery`` are ``"none"``; ``"fast"``, second-order rounding with the mean error compensated by the
    biases (the default of :func:`quantize`); and ``"best"``, which adds block reconstruction and output tuning. It can
    also be the name of a step in :data:`infoq_fx.RECOVERY_STEPS`, a step object with its own options, or a list of
    these, which run in order.

    A step is undone, and this is logged, if it does not bring the outputs closer to the float model's. The distance is
    the mean KL divergence of the outputs over every fifth sample (at most 256), which no step sees.

    Args:
        prepared: calibrated; it is not changed and can be used with other allocations.
        allocation: bit-widths of all sites.
        calibration_data: see :func:`quantize`; labels are not read.
        recovery: a level, a step, or a list of steps.
        seed: of all random numbers; steps given as objects have their own.
        cache_dir: folder for finished parts of long steps, from which an interrupted run resumes.
        memory_limit: bytes for what the steps hold, see :func:`quantize`.
        progress: show a progress bar on standard error.

    Returns:
        The prepared model for :func:`convert` with the same allocation. Its ``recovered_by`` names the steps that
        helped. ``recover`` can be called on it again, and still measures against the same float model.

    Raises:
        OptionError: a step is unknown, an option is out of range, or the allocation is of another model.
        CalibrationDataError: the data cannot be used.
    """
    check_prepared(prepared, "recover")
    check_memory_limit(memory_limit)
    steps = find_steps(recovery, seed)
    check_allocation(prepared, allocation)
    arguments = ForwardArguments.exactly(prepared.input_names)
    data = fit_data(prepared, read_data(calibration_data, arguments))
    folder = None if cache_dir is None else Path(cache_dir)
    found = recover_accuracy(
        prepared, allocation.bits, data, steps, cache_dir=folder, memory_limit=memory_limit, progress=progress
    )
    tried = (*prepared.recovery_tried, *(step.name for step in steps))
    return replace(found, recovery_tried=tried) if steps else found


def convert(prepared: PreparedModel, allocation: Allocation) -> QuantizedModule:
    """Convert a prepared model to the quantized model of an allocation; ``prepared`` is not changed.

    Warns if the scores behind the allocation assume a recovery that ``prepared`` has not been through.

    Raises:
        OptionError: the allocation lacks a site, or has a bit-width that the site was not calibrated for.
    """
    check_prepared(prepared, "convert")
    check_allocation(prepared, allocation)
    warn_of_codebooks(prepared, allocation, stacklevel=3)
    warn_of_other_recovery(allocation, [*prepared.recovered_by, *prepared.recovery_tried], stacklevel=3)
    return convert_prepared(prepared, allocation, None)
