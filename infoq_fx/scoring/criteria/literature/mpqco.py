"""MPQCO: the second-order change of the loss, from per-sample gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.threads import thread_map
from infoq_fx.finetuning.trainable import float_copy, weights_by_site
from infoq_fx.graph.float_interpreter import read_weight
from infoq_fx.quantization import numerics
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, KnownValues, Measure, Scores
from infoq_fx.scoring.gradients import Labelled, losses_of, read_labelled, with_gradients
from infoq_fx.types import Measurement, Plain, Score

__all__ = ["MPQCO"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements
_CHANGE = "loss_change_nats"


@dataclass(frozen=True)
class MPQCO:
    """Second-order change of the loss under the error of a layer's weights, in nats per sample.

    ``mean over samples of (g_n . d)^2 / 2`` with d = Q(w) - w and g_n the gradient of sample n's cross-entropy in the
    float model: the quadratic term d' H d / 2 of the loss's Taylor expansion with H in Gauss-Newton form. The loss is
    -log p of the label's probability, whose second derivative by p is 1 / p^2, so that H is the mean of g_n g_n'.
    The linear term is left out, since it is small for a trained model. The standard error is over the samples.
    Activations are not scored.

    Cost: one forward and one backward pass of ``samples`` samples, one at a time, for all layers and bit-widths
    together; labels, or the model's own predictions. Memory: the errors of all weights at all their bit-widths.

    Args:
        samples: spread evenly over the data.

    Reference:
        "Towards Mixed-Precision Quantization of Neural Networks via Constrained Optimization", arXiv 2110.06554,
        Section 3.
    """

    samples: int = 256
    name: str = "mpqco"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight",)

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the number of samples."""
        return {
            "measure": "Gauss-Newton change of the loss",
            "algorithm_version": _ALGORITHM_VERSION,
            "gradient_samples": self.samples,
        }

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Run every sample through the float model, forward and backward.

        Raises:
            CalibrationDataError: there is no data, or a label is not a class of the model.
        """
        chosen = read_labelled(self.name, prepared, data, self.samples, batch_size=batch_size, run_options=run_options)
        changes = _measure_changes(prepared, chosen, run_options)
        return KnownValues(
            {run: {_CHANGE: mean, f"{_CHANGE}:standard_error": error} for run, (mean, error) in changes.items()}
        )

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the mean change and its standard error."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            value, error = found.values[_CHANGE], found.values[f"{_CHANGE}:standard_error"]
            scores.setdefault(found.site, {})[found.bits] = Score(value, error)
        return scores


def _measure_changes(
    prepared: PreparedModel, chosen: Labelled, run_options: RunOptions
) -> dict[tuple[str, int], tuple[float, float]]:
    """Mean and standard error of ``(g_n . d)^2 / 2`` of every weight site at every bit-width."""
    errors, runs = _weight_errors(prepared)
    module = float_copy(prepared)
    weights = [weights_by_site(prepared, module)[name] for name in errors]
    total, squares = torch.zeros(2, len(runs), dtype=torch.float64)

    def project(batch: Labelled) -> list[Tensor]:
        return [] if run_options.stop.is_set() else list(_project(module, weights, list(errors.values()), batch))

    with thread_map(run_options.threads, run_options.stop) as spread:
        for found in spread(project, chosen.batches(prepared.batch_size or 1)):
            for products in found:
                changes = products.square() / 2
                total += changes
                squares += changes.square()
    mean = total / chosen.samples
    error = ((squares / chosen.samples - mean.square()).clamp_min(0) / chosen.samples).sqrt()
    return dict(zip(runs, zip(mean.tolist(), error.tolist(), strict=True), strict=True))


def _project(
    module: fx.GraphModule, weights: Sequence[Tensor], errors: Sequence[Tensor], batch: Labelled
) -> Iterator[Tensor]:
    """Gradients of each sample's loss times all weight errors, float64 ``[runs]``.

    A graph with a fixed batch size runs the whole batch forward once, and backward for every sample.
    """
    with with_gradients():
        losses = losses_of(module, batch)[0]
        for index, loss in enumerate(losses):
            retain = index + 1 < len(losses)
            gradients = torch.autograd.grad(loss, weights, retain_graph=retain, materialize_grads=True)
            yield torch.cat([d @ g.flatten() for d, g in zip(errors, gradients, strict=True)]).double().cpu()


def _weight_errors(prepared: PreparedModel) -> tuple[dict[str, Tensor], list[tuple[str, int]]]:
    """``Q(w) - w`` by weight site, float32 ``[bit-widths, weights]``, and the (site, bit-width) of all rows."""
    errors, runs = {}, []
    for node, quantizer in prepared.quantizer_nodes():
        site = quantizer.site
        if site.kind != "weight":
            continue
        weight = read_weight(prepared, node)
        rows = [(numerics.fake_quantize(weight, quantizer.qparams_at(b)) - weight).flatten() for b in site.bits]
        errors[site.name] = torch.stack(rows)
        runs += [(site.name, bits) for bits in site.bits]
    return errors, runs
