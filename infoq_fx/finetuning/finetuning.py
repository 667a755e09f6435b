"""Quantization-aware finetuning of a quantized model, towards the float model's outputs, labels or both."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from infoq_fx.conversion.quantized import Provenance, QuantizedModule, provenance_of, wrap_quantized
from infoq_fx.core.data import read_classes
from infoq_fx.core.option_checks import check_count, check_memory_limit, check_rate
from infoq_fx.core.readings import Categorical, OutputLoss, Reading
from infoq_fx.core.threads import ThreadMap, one_torch_thread, thread_map
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.augmentation import Augment, find_augment, name_augment
from infoq_fx.finetuning.checkpoint import Checkpoint, TrainingState, load_state, read_numbers, save_state
from infoq_fx.finetuning.features import check_feature_weight, find_features
from infoq_fx.finetuning.retraining import TrainableModule, to_quantized, to_trainable
from infoq_fx.finetuning.trainable import float_copy
from infoq_fx.finetuning.training_data import Form, Samples, Source, digest_tensors, open_source
from infoq_fx.finetuning.training_loop import (
    Settings,
    Training,
    begin_optimizer,
    choose_run_size,
    compute_gradients,
    hold_reference,
    list_learned,
    measure_loss,
    place,
    run_student,
    update,
)
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import choose_gradient_bytes
from infoq_fx.runtime.held_outputs import HeldOutputs, measure_variances
from infoq_fx.runtime.outputs import find_labelled

__all__ = ["finetune"]

_BACK_OFF, _WORSE, _HARM = 0.3, 1.01, 1.5
_MOVES_FACTORS = "range_equalization"  # the step that leaves another float model, with the same outputs
_CONVERTED_FROM = "the prepared or recovered model that the quantized one was converted from"
_SHARE_OF_COMPARED = 2  # of the memory: the float model's activations, and differences


def finetune(
    quantized: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | PreparedModel | None = None,
    validation_data: Any = None,
    epochs: int = 20,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    label_weight: float = 0.0,
    temperature: float = 4.0,
    feature_weight: float = 0.0,
    augment: Augment | Literal["images"] | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    progress: bool = True,
) -> QuantizedModule:
    """Finetune the weights, biases and step sizes of a quantized model, at the same bit-widths.

    The model is trained to match the float model's outputs. The loss is the KL divergence of the float model's outputs
    from the quantized model's, in nats per sample (the mean over tokens or pixels), so that labels are not needed. A
    part of the samples is held out. After each epoch, the averages of the parameters over about an epoch are evaluated
    on them. The result has the averages of least loss; if none is better than ``quantized``, it is a copy of that.

    The optimizer is Adam with gradients clipped to a norm of 1. The learning rate warms up over the first twentieth of
    the updates and then decays to 0 by a half cosine. If the loss after an epoch is at least 1.5 times the initial
    loss, or stays above it by 1 % or more for an eighth of all epochs, training continues from the best parameters
    with 0.3 times the learning rate: small data sets need smaller updates. The same seed gives the same result with
    any number of threads.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned. It is not changed; training runs
            on its device.
        data: see :func:`infoq_fx.core.data.read_data`; use a thousand samples or more. They are held in memory and
            shuffled. Only a ``DataLoader`` is iterated again every epoch, so that it can augment: it has its own
            batches, and is iterated once in advance if there is no ``validation_data``.
        teacher: the float model, or what :func:`infoq_fx.prepare` returned; None for the one that ``quantized`` was
            made from. Required if ``quantized`` was loaded from a file, which does not contain it.
        validation_data: held-out samples, in place of every fifth sample of ``data``.
        epochs: number of passes over the data.
        learning_rate: largest change per update, in units of the step size of its channel for a weight, of a twentieth
            of its initial value for a step size, and of 0.3 times the root mean square of the tensor (at least 0.003)
            for other parameters. A model that lost nearly all accuracy learns faster with 0.03.
        batch_size: samples per update.
        label_weight: 0 for the float model's outputs only, 1 for the labels' cross-entropy only, or a mixture of both.
        temperature: divisor of both models' outputs in the loss, which is multiplied by its square. Above 1, the float
            model's probabilities of the less likely classes have more influence, which helps if there are few samples
            per class. The loss on held-out samples always uses 1.
        feature_weight: of another loss, the squared error of all activations before they are quantized, relative to
            their variance; their mean is multiplied by it. Every layer is then told what to compute, and not the
            outputs alone, which few samples say little about: 10 helps where activations have few bits. It costs a run
            of the float model for every batch. ``teacher`` is then None, or the prepared or recovered model that
            ``quantized`` was converted from.
        augment: changes the inputs of every batch at random, and the float model says what comes out of them: a
            training on few samples can then be longer. ``"images"`` crops, mirrors and mixes images, see
            :func:`infoq_fx.finetuning.augmentation.augment_images`; a function of your own takes the inputs by name and
            a ``torch.Generator``, and returns inputs of the same shapes. Not with labels. The float model then runs for
            every batch.
        seed: of the order of samples, of the augmentation, and of a loader's random numbers from torch.
        checkpoint: file that is written after every epoch; the same call resumes from it. It is valid only for the same
            parameters of both models, the same data (of a loader: the held-out samples) and the same options.
        memory_limit: bytes that batches may take besides model, optimizer and data, for each thread about half of it:
            a batch runs in parts, whose gradients are added up. A single sample may need more. The result is the same
            but for the order of sums, and always the same for one limit. None for 1 GiB.
        progress: show a progress bar on standard error.

    Returns:
        A quantized module, which can be exported and finetuned again.

    Raises:
        OptionError: the module is not a quantized module, an option is out of range, there is no teacher, or the
            checkpoint is of another call.
        CalibrationDataError: the data cannot be used.
        KeyboardInterrupt: interrupted; the message says how to resume.

    Reference:
        "Learned Step Size Quantization", arXiv 1902.08153, with a float model as teacher as in "Apprentice", arXiv
        1711.05852; the temperature is that of "Distilling the Knowledge in a Neural Network", arXiv 1503.02531,
        Section 2; the averages are those of "Averaging Weights Leads to Wider Optima", arXiv 1803.05407.
    """
    check_count("epochs", epochs, 1)
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    check_rate("learning_rate", learning_rate)
    if isinstance(label_weight, bool) or not isinstance(label_weight, int | float) or not 0 <= label_weight <= 1:
        raise OptionError(f"label_weight={label_weight!r}; give a number from 0 (no labels) to 1 (only labels)")
    changed = find_augment(augment, label_weight)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise OptionError(
            f"checkpoint={str(path)!r}: there is no folder {str(path.parent)!r}; make it, or give another"
        )
    check_rate("temperature", temperature)
    check_memory_limit(memory_limit)
    weight = check_feature_weight(feature_weight, label_weight)
    settings = Settings(epochs, float(learning_rate), batch_size, float(label_weight), seed, float(temperature), weight)
    with one_torch_thread() as threads, torch.inference_mode(False), torch.no_grad():
        student = to_trainable(quantized).to(memory_format=torch.channels_last)
        provenance = provenance_of(quantized)
        assert provenance is not None
        threads = threads if next(student.parameters()).device.type == "cpu" else 1
        float_model = _find_teacher(teacher, provenance) if label_weight < 1 else None
        compared = _find_compared(teacher, provenance, settings)
        form = Form(provenance.example_inputs, needs_labels=label_weight > 0)
        whole = provenance.batch_size or 1
        source = open_source(data, validation_data, form, batch_size=batch_size, seed=seed, whole=whole)
        source = replace(source, augment=changed)
        made_of = _digest_call(student, float_model, source, settings, provenance)
        file = None if path is None else Checkpoint(path, made_of)
        with thread_map(threads, threading.Event()) as spread:
            run_bytes = choose_gradient_bytes(memory_limit, next(student.parameters()).device)
            training = _prepare(student, float_model, source, settings, provenance, spread, run_bytes, compared)
            state = _train(training, file, spread, progress=progress)
    return _finish(quantized, training, state)


def _find_teacher(teacher: nn.Module | PreparedModel | None, provenance: Provenance) -> nn.Module:
    given = provenance.prepared if teacher is None else teacher
    if given is None:
        raise OptionError(
            "the float model is not known: a quantized module that was loaded from a file does not contain it; give "
            "teacher=model, or labels and label_weight=1"
        )
    if isinstance(given, PreparedModel):
        return float_copy(given.origin or given)
    if not isinstance(given, nn.Module):
        raise OptionError(f"teacher is a {type(given).__name__}; give the float nn.Module, or what prepare() returned")
    return copy.deepcopy(given)


def _find_compared(
    teacher: nn.Module | PreparedModel | None, provenance: Provenance, settings: Settings
) -> PreparedModel | None:
    """The prepared model whose activations are compared; None if none are."""
    if not settings.feature_weight:
        return None
    given = provenance.prepared if teacher is None else teacher
    asked = f"feature_weight={settings.feature_weight:g} compares activations inside the float model"
    if not isinstance(given, PreparedModel):
        raise OptionError(
            f"{asked}, and teacher is a {type(given).__name__}; give what prepare() returned, or leave teacher out"
        )
    own = provenance.prepared
    if own is not None and not _is_same_model(given, own):
        raise OptionError(
            f"{asked}, and the given teacher has other parameters than that; leave teacher out, or give "
            f"{_CONVERTED_FROM}"
        )
    has_moved = _MOVES_FACTORS in provenance.allocation.recovered_by and _MOVES_FACTORS not in given.recovered_by
    if own is None and has_moved:
        raise OptionError(
            f"{asked}, which {_MOVES_FACTORS} changed behind the given teacher; leave teacher out, or give "
            f"{_CONVERTED_FROM}"
        )
    return given


def _is_same_model(given: PreparedModel, own: PreparedModel) -> bool:
    """Whether two prepared models have the same float model."""
    if given is own:
        return True
    states = [(found.origin or found).graph_module.state_dict() for found in (given, own)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(x.cpu(), states[1][name].cpu()) for name, x in states[0].items() if isinstance(x, Tensor)
    )


def _digest_call(
    student: TrainableModule,
    float_model: nn.Module | None,
    source: Source,
    settings: Settings,
    provenance: Provenance,
) -> dict[str, str | float]:
    """Everything that determines the result of training."""
    bits = [(f"{name} {width}", torch.zeros(0)) for name, width in sorted(provenance.allocation.bits.items())]
    of_teacher = {} if float_model is None else float_model.state_dict()
    return {
        "the quantized model": digest_tensors([*sorted(student.state_dict().items()), *bits]),
        "the float model": digest_tensors(sorted(of_teacher.items())),
        "the data": digest_tensors(source.tensors()),
        "the augmentation": name_augment(source.augment),
        **dataclasses.asdict(settings),
    }


def _prepare(
    student: TrainableModule,
    float_model: nn.Module | None,
    source: Source,
    settings: Settings,
    provenance: Provenance,
    spread: ThreadMap,
    run_bytes: int,
    compared: PreparedModel | None,
) -> Training:
    device = next(student.parameters()).device
    examples = place(provenance.example_inputs, device)
    size = provenance.batch_size or settings.batch_size
    if provenance.batch_size is None and device.type == "cpu":
        share = _SHARE_OF_COMPARED if compared is not None else 1
        size = choose_run_size(student, examples, settings.batch_size, run_bytes // share)
    read = provenance.read_outputs
    readings = tuple(provenance.readings[index] for index in read)
    ask: Callable[[Samples], tuple[Tensor, ...]] | None = None
    variances: tuple[Tensor | None, ...] = (None,) * len(read)
    if float_model is not None:
        ask = functools.partial(_ask, float_model.to(device).eval(), read, device)
    first = next(source.held_back.split(size))
    outputs = run_student(student, first.inputs, read, device)
    _check_outputs(outputs, None if ask is None else ask(first))
    labelled = _find_labels(readings, outputs, source)
    if ask is not None:
        held, kept = hold_reference(source.held_back, ask, size, spread), source.training
        assert held.reference is not None
        variances = measure_variances(readings, HeldOutputs(held.reference))
        if kept is not None and source.augment is None:
            kept = hold_reference(kept, ask, size, spread)
        source = replace(source, held_back=held, training=kept)
    loss = OutputLoss(readings, variances, provenance.loss_function)
    features = None
    if compared is not None:
        parts = (place(part.inputs, device) for part in source.held_back.split(size))
        features = find_features(compared, student, parts, settings.feature_weight)
    learned = list_learned(student, settings.learning_rate)
    return Training(student, learned, source, settings, ask, loss, read, labelled, device, size, features)


def _ask(float_model: nn.Module, read: Sequence[int], device: torch.device, samples: Samples) -> tuple[Tensor, ...]:
    """The float model's outputs that are read."""
    inputs = {name: x.to(device) for name, x in samples.inputs.items()}
    with torch.inference_mode(False), torch.no_grad():
        outputs = flatten_tensors(float_model(**inputs) if samples.by_name else float_model(*inputs.values()))
    if max(read) >= len(outputs):
        raise OptionError(
            f"the teacher has {len(outputs)} outputs, the quantized model reads number {max(read)}; give the float "
            "model that it was made from"
        )
    return tuple(outputs[index] for index in read)


def _check_outputs(outputs: Sequence[Tensor], reference: Sequence[Tensor] | None) -> None:
    for ours, theirs in zip(outputs, reference or (), strict=False):
        if ours.shape != theirs.shape:
            raise OptionError(
                f"the teacher's output for {len(ours)} samples has shape {list(theirs.shape)}, the quantized model's "
                f"{list(ours.shape)}; give the float model that it was made from"
            )


def _find_labels(readings: tuple[Reading, ...], outputs: tuple[Tensor, ...], source: Source) -> int | None:
    """The index of the output that the labels are for, None without labels; labels that are no classes are refused."""
    parts = [part for part in (source.held_back, source.training) if part is not None and part.labels is not None]
    if not parts:
        return None
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    index = find_labelled(readings, outputs, labels)
    if index is None:
        shapes = ", ".join(f"{list(x.shape[1:])} ({reading})" for x, reading in zip(outputs, readings, strict=True))
        raise OptionError(
            f"label_weight needs classes, and labels {list(labels.shape[1:])} a sample fit no output that is "
            f"read as classes: {shapes}; give label_weight=0, or say which output has classes (outputs=...)"
        )
    reading = readings[index]
    assert isinstance(reading, Categorical)
    read_classes(labels, outputs[index].shape[reading.axis])
    return index


def _train(training: Training, file: Checkpoint | None, spread: ThreadMap, *, progress: bool) -> TrainingState:
    settings, steps, log = training.settings, training.source.steps, logging.getLogger(__name__)
    is_new = file is None or not file.path.exists()
    state = _begin(training, spread) if file is None or is_new else load_state(file, training)
    bar = tqdm(total=settings.epochs * steps, disable=not progress, desc="finetuning", unit="update")
    with bar:
        bar.update(state.epoch * steps)
        try:
            while state.epoch < settings.epochs:
                rate = _BACK_OFF ** _count_returns(state.losses, settings.epochs)
                for step, batch in enumerate(training.source.batches(state.epoch)):
                    gradients = compute_gradients(training, batch, spread)
                    update(training, state.optimizer, gradients, state.epoch * steps + step, rate=rate)
                    bar.update()
                state = _judge(training, state, *_measure_average(training, state, spread))
                loss = state.losses[-1]
                bar.set_postfix_str(f"loss {state.losses[0]:.3g} -> {min(state.losses):.3g}")
                log.info("epoch %d of %d: %.4g nats per held-out sample", state.epoch, settings.epochs, loss)
                if file is not None:
                    save_state(file, training, state)
        except KeyboardInterrupt:
            how = "with checkpoint=PATH, the same call would resume"
            if file is not None and state.epoch:
                how = f"the same call with checkpoint={str(file.path)!r} resumes from there"
            raise KeyboardInterrupt(f"stopped after {state.epoch} of {settings.epochs} epochs; {how}") from None
    return state


def _measure_average(training: Training, state: TrainingState, spread: ThreadMap) -> tuple[float, dict[str, Tensor]]:
    """The loss with the averaged parameters, and these."""
    now = read_numbers(training)
    average = {name: mean.clone() for name, mean in zip(now, state.optimizer.average, strict=True)}
    training.student.load_state_dict(average, strict=False)
    loss = measure_loss(training, spread)
    training.student.load_state_dict(now, strict=False)
    return loss, average


def _judge(training: Training, state: TrainingState, loss: float, numbers: Mapping[str, Tensor]) -> TrainingState:
    """The state after an epoch with this loss and these parameters; may return to the best parameters."""
    losses, epochs = (*state.losses, loss), training.settings.epochs
    best = numbers if loss < min(state.losses) else state.best
    if _count_returns(losses, epochs) == _count_returns(state.losses, epochs):
        return replace(state, losses=losses, best=best)
    training.student.load_state_dict(best, strict=False)
    return TrainingState(losses, begin_optimizer(training.learned), best)


def _count_returns(losses: tuple[float, ...], epochs: int) -> int:
    """Count returns to the best parameters: after a loss far above the first, or an eighth of all epochs above it.

    Losses above the first one are accepted for a while, since later, smaller updates often more than compensate.
    """
    returns = worse = 0
    for loss in losses[1:]:
        worse = 0 if loss < _WORSE * losses[0] else worse + 1
        if worse == math.ceil(epochs / 8) or not loss < _HARM * losses[0]:
            returns, worse = returns + 1, 0
    return returns


def _begin(training: Training, spread: ThreadMap) -> TrainingState:
    return TrainingState((measure_loss(training, spread),), begin_optimizer(training.learned), read_numbers(training))


def _finish(quantized: nn.Module, training: Training, state: TrainingState) -> QuantizedModule:
    log, before, after = logging.getLogger(__name__), state.losses[0], min(state.losses)
    if not math.isfinite(state.losses[-1]):
        warnings.warn(f"finetuning diverged in epoch {state.epoch}: lower learning_rate", UserWarning, stacklevel=3)
    if not after < before:
        log.info("no epoch is better than %.4g nats per held-out sample: the model is not changed", before)
        unchanged = copy.deepcopy(quantized)
        assert isinstance(unchanged, QuantizedModule)
        return unchanged
    log.info(
        "epoch %d is the best: %.4g nats per held-out sample, %.4g before", state.losses.index(after), after, before
    )
    training.student.load_state_dict(state.best, strict=False)
    found = to_quantized(training.student)
    provenance = provenance_of(found)
    assert provenance is not None
    steps = (*provenance.allocation.recovered_by, "finetune")
    allocation = replace(provenance.allocation, recovered_by=steps)
    return wrap_quantized(found, replace(provenance, allocation=allocation))
