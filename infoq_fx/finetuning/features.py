"""Features: activations inside both models that finetuning compares, besides their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import mse_loss

from infoq_fx.errors import OptionError
from infoq_fx.finetuning.trainable import LearnedStepQuantizer, copy_with
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer

__all__ = ["FeatureLoss", "check_feature_weight", "find_features", "run_with_features"]

_ROUND_OFF, _LEAST = 1e-10, 1e-30


@dataclass(frozen=True)
class FeatureLoss:
    """The squared error of a student's activations, before they are quantized, against those of the float model.

    ``float_model`` has a tap at every activation site. ``variances`` are those of its values by site, for the sites
    that both models have; the error at each is relative to it. ``weight`` multiplies their mean.

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, Eq. 3, here at all layers at once and
        without a regressor, since both models have the same shapes.
    """

    float_model: fx.GraphModule
    variances: Mapping[str, float]
    weight: float

    def measure(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of the samples, a float64 scalar."""
        errors = [mse_loss(ours[site], theirs[site]) / variance for site, variance in self.variances.items()]
        return self.weight * torch.stack(errors).double().mean()


def check_feature_weight(feature_weight: Any, label_weight: float) -> float:
    """Return the weight of the loss of features as a float.

    Raises:
        OptionError: it is no number from 0 up, or no float model is compared with.
    """
    is_number = isinstance(feature_weight, int | float) and not isinstance(feature_weight, bool)
    if not is_number or not 0 <= feature_weight < float("inf"):
        raise OptionError(f"feature_weight={feature_weight!r}; give a number from 0 up")
    if feature_weight and label_weight == 1:
        raise OptionError(
            f"feature_weight={feature_weight:g} compares with the float model, which label_weight=1 leaves out; give "
            "a smaller label_weight"
        )
    return float(feature_weight)


def find_features(
    prepared: PreparedModel, student: fx.GraphModule, batches: Iterable[Mapping[str, Tensor]], weight: float
) -> FeatureLoss:
    """Find the activations that a student has in common with the float model it comes from, and their variances.

    Args:
        prepared: what the student was converted from.
        student: a trainable module.
        batches: of inputs, in the order of the model's; variances are measured on them.
        weight: of the loss.

    Raises:
        OptionError: there are none, or those of the float model have other shapes.
    """
    float_model = copy_with(prepared.origin or prepared, _tap).to(next(student.parameters()).device)
    moments: dict[str, Tensor] = {}
    for index, inputs in enumerate(batches):
        theirs = run_with_features(float_model, inputs)[1]
        if not index:
            ours = run_with_features(student, inputs)[1]
            _check_shapes(ours, theirs)
        for site in ours.keys() & theirs.keys():
            x = theirs[site].detach().double().flatten()
            found = torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum()])
            moments[site] = moments[site] + found if site in moments else found
    variances = {site: _find_variance(*moments[site].tolist()) for site in sorted(moments)}
    variances = {site: variance for site, variance in variances.items() if variance > 0}
    if not variances:
        raise OptionError(
            f"feature_weight={weight:g} compares activations that are quantized, and the model has none that vary; "
            "give feature_weight=0"
        )
    return FeatureLoss(float_model, variances, weight)


def run_with_features(
    module: fx.GraphModule, inputs: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Run a student or a tapped float model: its outputs, and its activations by site before they are quantized."""
    reader = _Reader(module)
    outputs = flatten_tensors(reader.run(*inputs.values()))
    return tuple(outputs), reader.found


def _check_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for site, x in ours.items():
        if site not in theirs or theirs[site].shape != x.shape:
            found = list(theirs[site].shape) if site in theirs else "missing"
            raise OptionError(
                f"the activation {site!r} is {found} in the float model and {list(x.shape)} in the quantized one; give "
                "as teacher what the quantized model was converted from"
            )


def _find_variance(count: float, total: float, square: float) -> float:
    """The variance of values by their sums; 0 where it is round-off, or a square of float32 would not hold it."""
    mean_square = square / count if count else 0.0
    variance = mean_square - (total / count) ** 2 if count else 0.0
    return variance if variance > _ROUND_OFF * mean_square and _LEAST < variance < 1 / _LEAST else 0.0


def _tap(quantizer: Quantizer) -> nn.Module | None:
    return _Tap(quantizer.site.name) if quantizer.site.kind == "activation" else None


class _Tap(nn.Module):
    """Passes its input on; its place is that of a site."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site_name = site

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Reader(GraphInterpreter):
    """Runs a graph and keeps the inputs of taps and activation quantizers."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, _Tap):
            self.found[module.site_name] = args[0]
        elif isinstance(module, LearnedStepQuantizer) and module.site.kind == "activation":
            self.found[module.site.name] = args[0]
        return module(*args, **kwargs)
