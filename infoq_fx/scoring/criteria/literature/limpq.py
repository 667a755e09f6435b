"""LIMPQ: learned step sizes, one per bit-width, as indicators of importance."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count, check_rate
from infoq_fx.errors import unknown_name_error
from infoq_fx.finetuning.trainable import LearnedStepQuantizer, copy_with
from infoq_fx.graph.float_interpreter import read_weight
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, KnownValues, Measure, Scores
from infoq_fx.scoring.gradients import (
    Labelled,
    add_gradients,
    check_trained,
    choose_part,
    clipped_step,
    make_optimizer,
    read_labelled,
    shuffled_batches,
    with_gradients,
)
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, QParams, QuantSite, QuantSpec, Score

__all__ = ["LIMPQ"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements
_SMALLEST_STEP = 1e-8
_INITIAL = ("statistics", "same")


@dataclass(frozen=True)
class LIMPQ:
    """Step size that a site has learned at a bit-width, in the unit of its tensor.

    Every searched site has one step size for the whole tensor at each candidate bit-width. All are trained together,
    with the weights and biases of a copy of the model: in each training step the batch runs with all sites at the
    lowest bit-width, at the next one, and so on, then once with bit-widths drawn at random; the gradients of these
    runs are summed for one update. A site that lacks a bit-width uses its nearest one. Other sites are at 8 bits. The
    score is the learned step size, times ``alpha`` for a weight. It has no standard error; compare several seeds.

    Cost: (bit-widths + 1) forward and backward passes of ``batch_size`` samples per training step, no run per (site,
    bit-width); labels, or the model's own predictions. The authors train for epochs, with batch norms; here these
    are folded, and the defaults are for a short run on a CPU.

    Args:
        steps: training steps.
        batch_size: samples per training step; a graph with a fixed batch size uses that.
        samples: number of samples that batches are drawn from, spread evenly over the data.
        learning_rate: of the first step, decayed to 0 by a half cosine; momentum 0.9, gradients clipped to a norm of
            1, separately for step sizes and other parameters.
        alpha: factor on the scores of weights relative to activations, if both are searched.
        initial: initial step sizes. ``"statistics"``, as in the authors' code: ``max |mean +- 3 deviations| /
            2^(b - 1)`` of a weight, ``2 mean |x| / sqrt(levels above zero)`` of an activation in the first batch.
            ``"same"``, the paper's alternative: 0.1 / b everywhere, which only a long training outweighs.
        seed: of the batches and of the random bit-widths.

    Reference:
        "Mixed-Precision Neural Network Quantization via Learned Layer-wise Importance", arXiv 2203.08368, Section 3;
        code at 1hunters/LIMPQ.
    """

    steps: int = 24
    batch_size: int = 32
    samples: int = 1024
    learning_rate: float = 0.01
    alpha: float = 1.0
    initial: Literal["statistics", "same"] = "statistics"
    seed: int = 0
    name: str = "limpq"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("batch_size", self.batch_size, 1)
        check_count("samples", self.samples, 1)
        check_rate("learning_rate", self.learning_rate)
        check_rate("alpha", self.alpha)
        if self.initial not in _INITIAL:
            raise unknown_name_error("initial step", self.initial, _INITIAL)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return all training options and the candidates of all sites, since all step sizes are learned together."""
        candidates = ";".join(f"{site.name}:{site.bits}" for site in _searched(prepared))
        return {
            "measure": "learned steps",
            "algorithm_version": _ALGORITHM_VERSION,
            "steps": self.steps,
            "training_batch_size": self.batch_size,
            "training_samples": self.samples,
            "learning_rate": self.learning_rate,
            "initial": self.initial,
            "seed": self.seed,
            "candidates": hashlib.blake2b(candidates.encode(), digest_size=8).hexdigest(),
        }

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Train the step sizes of all sites.

        Raises:
            CalibrationDataError: there is no data, or a label is not a class of the model.
            OptionError: the training diverged.
        """
        chosen = read_labelled(self.name, prepared, data, self.samples, batch_size=batch_size, run_options=run_options)
        size = min(prepared.batch_size or self.batch_size, chosen.samples)
        with with_gradients():
            first = chosen.take(torch.arange(size))
            module = _indicator_copy(prepared, _first_steps(prepared, first, self.initial))
            part = choose_part(prepared, run_options)
            check_trained(self.name, self._train(module, chosen, size, part, run_options), self.learning_rate)
        indicators = _indicators(module)
        return KnownValues(
            {(one.site.name, bits): {"step": one.learned(bits)} for one in indicators for bits in one.site.bits}
        )

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the learned step sizes."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            factor = self.alpha if prepared.inventory[found.site].kind == "weight" else 1.0
            scores.setdefault(found.site, {})[found.bits] = Score(factor * found.values["step"])
        return scores

    def _train(self, module: fx.GraphModule, chosen: Labelled, size: int, part: int, run_options: RunOptions) -> float:
        """Train, ``part`` samples of a batch at once, and return the last loss."""
        last = torch.zeros(())
        generator = torch.Generator().manual_seed(self.seed)
        indicators = _indicators(module)
        widths = sorted({bits for indicator in indicators for bits in indicator.site.bits})
        steps = [found.scale for found in module.modules() if isinstance(found, LearnedStepQuantizer)]
        known = {id(parameter) for parameter in steps}
        others = [parameter for parameter in module.parameters() if id(parameter) not in known]
        # Clipped apart from the weights: under a common norm the step sizes, of much smaller gradients, would not move.
        optimizer = make_optimizer([others, steps], self.learning_rate)
        batches = shuffled_batches(chosen.samples, size, generator)
        for step in range(self.steps):
            if run_options.stop.is_set():
                break
            batch = chosen.take(next(batches))
            optimizer.zero_grad()
            for width in widths:
                for indicator in indicators:
                    indicator.bits = min(indicator.site.bits, key=lambda b: (abs(b - width), -b))
                add_gradients(module, batch, part)
            for indicator in indicators:
                drawn = torch.randint(len(indicator.site.bits), (), generator=generator)
                indicator.bits = indicator.site.bits[int(drawn)]
            last = add_gradients(module, batch, part)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            clipped_step(optimizer)
        return float(last)


class _Indicator(nn.Module):
    """The quantizers of one site, one per bit-width; ``bits`` is the bit-width in use."""

    def __init__(self, site: QuantSite, quantizers: Mapping[int, LearnedStepQuantizer]) -> None:
        super().__init__()
        self.site, self.bits = site, site.bits[-1]
        self._quantizers = nn.ModuleDict({str(bits): quantizer for bits, quantizer in quantizers.items()})

    def learned(self, bits: int) -> float:
        """The step at a bit-width."""
        quantizer = self._quantizers[str(bits)]
        assert isinstance(quantizer, LearnedStepQuantizer)
        return float(quantizer.qparams().scale)

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize at the bit-width in use."""
        y: Tensor = self._quantizers[str(self.bits)](x)
        return y


class _Magnitude(nn.Module):
    """Returns an activation unchanged and records its mean magnitude."""

    def __init__(self, site: QuantSite) -> None:
        super().__init__()
        self.site, self.mean = site, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` unchanged."""
        self.mean = float(x.detach().abs().mean())
        return x


def _searched(prepared: PreparedModel) -> list[QuantSite]:
    return [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]


def _indicators(module: fx.GraphModule) -> list[_Indicator]:
    return [found for found in module.modules() if isinstance(found, _Indicator)]


def _indicator_copy(prepared: PreparedModel, first: Mapping[tuple[str, int], float]) -> fx.GraphModule:
    """A trainable copy with indicators of given initial step sizes at searched sites, and 8 bits at the others."""
    searched = {site.name for site in _searched(prepared)}

    def make(quantizer: Quantizer) -> nn.Module:
        site = quantizer.site
        if site.name not in searched:
            return LearnedStepQuantizer(site, quantizer.qparams_at(BASELINE_BITS))
        quantizers = {}
        for bits in site.bits:
            calibrated = quantizer.qparams_at(bits)
            spec = QuantSpec(bits=bits, symmetric=calibrated.spec.symmetric)
            step = calibrated.scale.new_tensor(first[site.name, bits])
            # A weight's zero points are all 0; an activation has only one.
            quantizers[bits] = LearnedStepQuantizer(site, QParams(spec, step, calibrated.zero_point.flatten()[0]))
        return _Indicator(site, quantizers)

    return copy_with(prepared, make)


def _first_steps(prepared: PreparedModel, batch: Labelled, initial: str) -> dict[tuple[str, int], float]:
    """Initial step sizes by searched site and bit-width."""
    searched = {site.name for site in _searched(prepared)}
    magnitudes = _mean_magnitudes(prepared, batch) if initial == "statistics" else {}
    steps = {}
    for node, quantizer in prepared.quantizer_nodes():
        site = quantizer.site
        for bits in site.bits if site.name in searched else ():
            if initial == "same":
                step = 0.1 / bits
            elif site.kind == "weight":
                deviation, mean = torch.std_mean(read_weight(prepared, node).double(), correction=0)
                step = float(abs(mean) + 3 * deviation) / 2 ** (bits - 1)
            else:
                qparams = quantizer.qparams_at(bits)
                above = max(1, qparams.spec.quant_max - int(qparams.zero_point))
                step = 2 * magnitudes[site.name] / math.sqrt(above)
            steps[site.name, bits] = max(step, _SMALLEST_STEP)
    return steps


def _mean_magnitudes(prepared: PreparedModel, batch: Labelled) -> dict[str, float]:
    """Mean ``|x|`` of every activation site in the float model."""
    module = copy_with(prepared, lambda quantizer: _Magnitude(quantizer.site))
    with torch.no_grad():
        module(*batch.inputs.values())
    return {found.site.name: found.mean for found in module.modules() if isinstance(found, _Magnitude)}
