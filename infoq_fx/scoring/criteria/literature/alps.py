"""ALPS: the loss or accuracy that a short finetuning does not recover."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count, check_rate
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import unknown_name_error
from infoq_fx.finetuning.trainable import trainable_copy
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.scoring.gradients import (
    WORST_LOSS,
    Labelled,
    add_gradients,
    check_trained,
    choose_part,
    clipped_step,
    losses_of,
    make_optimizer,
    read_labelled,
    shuffled_batches,
    spread_samples,
    with_gradients,
)
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, QuantSite, Score

__all__ = ["ALPS"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements
_MEASURES = {"loss": "finetuned_loss_increase_nats", "accuracy": "finetuned_accuracy_drop"}


@dataclass(frozen=True)
class ALPS:
    """Loss after a short finetuning with one site at fewer bits, minus that of the 8-bit model finetuned equally.

    Weights, biases and step sizes are trained (LSQ) from the calibrated model with the same batches in the same order
    every time; all other sites are at 8 bits. The unit is nats per sample, or points of accuracy with
    ``by="accuracy"``, measured on the samples that training draws from, as in the source; 0 where it falls, and at 8
    bits. The standard error is over the samples.

    Cost: ``steps`` forward and backward passes of ``batch_size`` samples and a forward pass of ``samples`` samples per
    (site, bit-width); labels, or the model's own predictions. By far the most expensive criterion: the source trains
    an epoch for each layer; the defaults here suit a small model on a CPU.

    Args:
        by: ``"loss"`` or ``"accuracy"``; both are measured, so that the other one comes from the cache.
        steps: training steps.
        batch_size: samples per training step; a graph with a fixed batch size uses that.
        samples: for training and evaluation, spread evenly over the data.
        learning_rate: constant; momentum 0.9, gradients clipped to a norm of 1.
        seed: of the batches.

    Reference:
        "Efficient and Effective Methods for Mixed Precision Neural Network Quantization for Faster,
        Energy-efficient Inference", arXiv 2301.13330, Section 3.
    """

    by: Literal["loss", "accuracy"] = "loss"
    steps: int = 8
    batch_size: int = 32
    samples: int = 256
    learning_rate: float = 0.005
    seed: int = 0
    name: str = "alps"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")

    def __post_init__(self) -> None:
        if self.by not in _MEASURES:
            raise unknown_name_error("measure in by", self.by, _MEASURES)
        check_count("steps", self.steps, 0)
        check_count("batch_size", self.batch_size, 1)
        check_count("samples", self.samples, 1)
        check_rate("learning_rate", self.learning_rate)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return all training options; ``by`` does not affect the measurements."""
        return {
            "measure": "finetuned outputs",
            "algorithm_version": _ALGORITHM_VERSION,
            "steps": self.steps,
            "training_batch_size": self.batch_size,
            "training_samples": self.samples,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Finetune the 8-bit model.

        Raises:
            CalibrationDataError: there is no data, or a label is not a class of the model.
            OptionError: the training diverged.
        """
        chosen = read_labelled(self.name, prepared, data, self.samples, batch_size=batch_size, run_options=run_options)
        size = min(prepared.batch_size or self.batch_size, chosen.samples)
        part = min(size, choose_part(prepared, run_options))
        training = Finetuning(self.steps, size, self.learning_rate, self.seed, part)
        baseline = training.run(prepared, chosen, {}, run_options, lambda share: None)
        check_trained(self.name, float(baseline[0].mean()), self.learning_rate)
        return FinetunedMeasure(training, replace(chosen, inputs={}), baseline)

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the increase of the loss or the drop of the accuracy, at least 0."""
        key = _MEASURES[self.by]
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            value, error = found.values[key], found.values[f"{key}:standard_error"]
            scores.setdefault(found.site, {})[found.bits] = Score(max(0.0, value), error)
        return scores


@dataclass(frozen=True)
class Finetuning:
    """Options of the finetuning, and the finetuning itself; ``part`` samples of a batch run at once."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    part: int

    def run(
        self,
        prepared: PreparedModel,
        chosen: Labelled,
        bits: Mapping[str, int],
        run_options: RunOptions,
        advance: Callable[[float], None],
    ) -> Tensor:
        """Train a copy, and return each sample's loss in nats and accuracy in points, float64 ``[2, samples]``.

        Args:
            prepared: calibrated.
            chosen: samples to train and evaluate on.
            bits: bit-width by site; sites that are not named are at 8 bits.
            run_options: its ``stop`` ends the training early.
            advance: called with shares of progress that add up to 1.
        """
        generator = torch.Generator().manual_seed(self.seed)
        rows = shuffled_batches(chosen.samples, self.batch_size, generator)
        share = 1 / (self.steps + 1)
        with with_gradients():
            module = trainable_copy(prepared, bits)
            optimizer = make_optimizer([list(module.parameters())], self.learning_rate)
            for _ in range(self.steps):
                if run_options.stop.is_set():
                    break
                optimizer.zero_grad()
                add_gradients(module, chosen.take(next(rows)), self.part)
                clipped_step(optimizer)
                advance(share)
        found = torch.zeros(2, chosen.samples, dtype=torch.float64)
        with torch.no_grad():
            for start, batch in enumerate(chosen.batches(self.part)):
                if run_options.stop.is_set():
                    break
                losses, output = losses_of(module, batch)
                right = (output.argmax(batch.reading.axis) == batch.labels).double().reshape(batch.samples, -1).mean(1)
                place = slice(start * self.part, start * self.part + batch.samples)
                found[:, place] = torch.stack([losses.double(), 100.0 * right]).cpu()
        advance(share)
        return found


@dataclass(frozen=True)
class FinetunedMeasure:
    """Finetunes with one site at fewer bits and compares with the finetuned 8-bit model, sample by sample."""

    training: Finetuning
    labelled: Labelled
    baseline: Tensor
    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure both differences for every (site, bit-width)."""
        samples = self.labelled.samples
        chosen = replace(self.labelled, inputs=spread_samples("alps", prepared, data, samples).inputs)
        lock = threading.Lock()

        def advance(share: float) -> None:
            with lock:
                run_options.advance(share)

        def measure(run: tuple[str, int]) -> Measurement:
            found = self.training.run(prepared, chosen, dict([run]), run_options, advance)
            return Measurement(*run, self._compare(found))

        runs = [(site.name, bits) for site in sites for bits in site.bits]
        with thread_map(run_options.threads, run_options.stop) as spread:
            measured = spread(measure, [run for run in runs if run[1] != BASELINE_BITS])
            lowered = {(found.site, found.bits): found for found in measured}
        for run in runs:
            if run[1] == BASELINE_BITS:
                lowered[run] = Measurement(*run, self._compare(self.baseline))
                run_options.advance(1.0)
        return [lowered[run] for run in runs]

    def _compare(self, found: Tensor) -> dict[str, float]:
        # A training that diverged counts as the worst loss.
        losses = found[0].nan_to_num(WORST_LOSS, posinf=WORST_LOSS).clamp_max(WORST_LOSS)
        differences = torch.stack([losses - self.baseline[0], self.baseline[1] - found[1]])
        values = {}
        for key, rows in zip(_MEASURES.values(), differences, strict=True):
            values[key] = float(rows.mean())
            values[f"{key}:standard_error"] = float(rows.std(correction=0)) / math.sqrt(len(rows))
        return values
