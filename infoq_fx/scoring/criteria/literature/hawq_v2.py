"""HAWQ-V2: the average curvature of the loss times the squared error of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import UnsupportedModelError
from infoq_fx.finetuning.trainable import float_copy, weights_by_site
from infoq_fx.graph.float_interpreter import read_weights
from infoq_fx.quantization import numerics
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.scoring.gradients import Labelled, choose_part, losses_of, read_labelled, with_gradients
from infoq_fx.types import Measurement, Plain, QuantSite, Score

__all__ = ["HAWQv2"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements
_BATCH = 32
_COPIES = 4  # of every value, about, in the graph of second derivatives


@dataclass(frozen=True)
class HAWQv2:
    """Average Hessian trace of a layer's weights times their squared error at a bit-width, in nats per sample.

    ``tr(H_i) / n_i * |Q(w_i) - w_i|^2`` with H_i the Hessian of the float model's mean cross-entropy with respect to
    the layer's n_i weights. The trace is estimated by Hutchinson's method, as the mean of ``v' H_i v`` over vectors v
    of random signs, drawn anew for every batch of 32 samples and for one layer at a time: vectors over all layers at
    once cost a sixth, but add the Hessian's blocks between layers, which average out a dozen times more slowly.
    Negative estimates count as 0. The standard error is over the probes, for these samples. Activations are not
    scored.

    Cost: a forward and a backward pass over ``samples`` samples; for each probe and layer another backward pass
    through these two, down to the layer; labels, or the model's own predictions. No run per (site, bit-width).

    Args:
        probes: random vectors per layer and batch, at least 2; the 8 batches of 256 samples have 16 in all.
        samples: spread evenly over the data.
        seed: of the random vectors.

    Reference:
        "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", arXiv 1911.03852, Section 3.
    """

    probes: int = 2
    samples: int = 256
    seed: int = 0
    name: str = "hawq_v2"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight",)

    def __post_init__(self) -> None:
        check_count("probes", self.probes, 2)
        check_count("samples", self.samples, 1)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return probes, samples and seed."""
        return {
            "measure": "Hessian trace",
            "algorithm_version": _ALGORITHM_VERSION,
            "probes": self.probes,
            "trace_samples": self.samples,
            "seed": self.seed,
        }

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Estimate the traces of all layers.

        Raises:
            CalibrationDataError: there is no data, or a label is not a class of the model.
            UnsupportedModelError: an operation of the model has no second derivative.
        """
        chosen = read_labelled(self.name, prepared, data, self.samples, batch_size=batch_size, run_options=run_options)
        size = prepared.batch_size or _BATCH
        part = prepared.batch_size or max(1, choose_part(prepared, run_options) // _COPIES)
        module = float_copy(prepared)
        weights = weights_by_site(prepared, module)
        generator = torch.Generator().manual_seed(self.seed)
        trace, variance = torch.zeros(2, len(weights), dtype=torch.float64)
        for batch in chosen.batches(size):
            if run_options.stop.is_set():
                break
            probes = [_random_signs(weight, generator) for _ in range(self.probes) for weight in weights.values()]
            found = torch.zeros(self.probes, len(weights), dtype=torch.float64)
            for some in batch.batches(part):
                products = self._probe(module, list(weights.values()), some, probes, run_options)
                found += products * (some.samples / batch.samples)
            share = batch.samples / chosen.samples
            trace += share * found.mean(0)
            variance += share**2 * found.var(0, correction=1) / self.probes
        counts = torch.tensor([weight.numel() for weight in weights.values()])
        averages, errors = (trace / counts).tolist(), (variance.sqrt() / counts).tolist()
        return TraceMeasure(dict(zip(weights, averages, strict=True)), dict(zip(weights, errors, strict=True)))

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the trace times the squared error, with the trace's standard error."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            values, power = found.values, found.values["squared_error"]
            trace, error = values["average_trace"], values["average_trace:standard_error"]
            scores.setdefault(found.site, {})[found.bits] = Score(max(0.0, trace) * power, error * power)
        return scores

    def _probe(
        self,
        module: fx.GraphModule,
        weights: Sequence[Tensor],
        batch: Labelled,
        probes: Sequence[Tensor],
        run_options: RunOptions,
    ) -> Tensor:
        """``v' H v`` of the batch's mean loss by probe v and layer, float64 ``[probes, layers]``."""
        # The fused forms of attention have no second derivative.
        with with_gradients(), sdpa_kernel(SDPBackend.MATH):
            loss = losses_of(module, batch)[0].mean()
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)

        def project(run: tuple[int, Tensor]) -> float:
            layer, signs = run[0] % len(weights), run[1]
            if run_options.stop.is_set() or not gradients[layer].requires_grad:
                return 0.0
            (product,) = torch.autograd.grad(
                gradients[layer], weights[layer], signs, retain_graph=True, materialize_grads=True
            )
            return float((product * signs).sum(dtype=torch.float64))

        try:
            with thread_map(run_options.threads, run_options.stop) as spread:
                found = list(spread(project, enumerate(probes)))
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"criterion {self.name!r} needs second derivatives, which the model does not have: {error}; take "
                "'mpqco', which needs first ones"
            ) from error
        return torch.tensor(found, dtype=torch.float64).reshape(self.probes, len(weights))


@dataclass(frozen=True)
class TraceMeasure:
    """Measures squared errors of the quantized weights; holds the average traces and their standard errors by site."""

    average_trace: Mapping[str, float]
    standard_error: Mapping[str, float]
    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure the squared error of every weight site at every bit-width; activation sites are skipped."""
        measured = []
        for site, quantizer, weight in read_weights(prepared, sites):
            for bits in site.bits:
                error = numerics.fake_quantize(weight, quantizer.qparams_at(bits)).double() - weight.double()
                values = {
                    "average_trace": self.average_trace[site.name],
                    "average_trace:standard_error": self.standard_error[site.name],
                    "squared_error": float(error.square().sum()),
                }
                measured.append(Measurement(site.name, bits, values))
                run_options.advance(1.0)
        return measured


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.float32) * 2 - 1
    return signs.to(like.device)
