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
        """Return the sum of the samples' losses, a float64 scalar."""
        errors = []
        for site, variance in self.variances.items():
            of_sample = ours[site].numel() // ours[site].shape[0]
            errors.append(mse_loss(ours[site], theirs[site], reduction="sum") / (of_sample * variance))
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
        OptionError: there are none.
    """
    float_model = copy_with(prepared.origin or prepared, _tap)
    sites = {
        module.site.name
        for module in student.modules()
        if isinstance(module, LearnedStepQuantizer) and module.site.kind == "activation"
    }
    moments: dict[str, Tensor] = {}
    for inputs in batches:
        samples = next(iter(inputs.values())).shape[0]
        for site, x in run_with_features(float_model, inputs)[1].items():
            if site in sites and x.is_floating_point() and x.ndim and x.shape[0] == samples:
                flat = x.detach().double().flatten()
                found = torch.stack([flat.new_tensor(flat.numel()), flat.sum(), flat.square().sum()])
                moments[site] = moments[site] + found if site in moments else found
    variances = {site: float(square / count - (total / count) ** 2) for site, (count, total, square) in moments.items()}
    variances = {site: variance for site, variance in variances.items() if variance > 0}
    if not variances:
        raise OptionError(
            f"feature_weight={weight:g} compares activations, and the quantized model has none in common with its "
            "float model; give feature_weight=0, or teacher= what prepare() returned"
        )
    return FeatureLoss(float_model, variances, weight)


def run_with_features(
    module: fx.GraphModule, inputs: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Run a student or a tapped float model: its outputs, and its activations by site before they are quantized."""
    reader = _Reader(module)
    outputs = flatten_tensors(reader.run(*inputs.values()))
    return tuple(outputs), reader.found


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
