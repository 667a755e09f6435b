"""Bias correction: each layer's mean output error is added to its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Pair, choose_samples
from infoq_fx.recovery.parameters import fork, set_bias
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.step import StepContext

__all__ = ["BiasCorrection"]


@dataclass(frozen=True)
class BiasCorrection:
    """Adds to every bias the mean of the float layer's output minus that of the quantized one, per channel.

    Layers are corrected one after the other in graph order, so that each also corrects the remaining errors of the
    layers before it. Layers without a bias of their own are not changed.

    It helps if weights are rounded to nearest and the errors of a row do not cancel. After
    :class:`infoq_fx.recovery.SecondOrderRounding`, which corrects biases itself, there is nothing left to correct.

    Cost: about two forward passes of the float and of the quantized model over ``samples``; no labels.

    Raises:
        OptionError: ``samples`` below 1.

    Reference:
        Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721,
        Section 4.2 and Appendix D (the empirical form).
    """

    samples: int = 512

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    @property
    def name(self) -> str:
        """``"bias_correction"``."""
        return "bias_correction"

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """See :class:`infoq_fx.recovery.RecoveryStep`."""
        changed = fork(prepared)
        runner = LayerwiseRunner(changed, bits, choose_samples(prepared, data, self.samples), context)
        for layer in runner.visit():
            if layer.bias is not None:
                shift = _mean_error(runner, layer)
                set_bias(changed, layer, read_tensor(changed.graph_module, layer.bias) + shift, bits)
        return changed


def _mean_error(runner: LayerwiseRunner, layer: Layer) -> Tensor:
    """Mean of the float output minus that of the quantized one, float32 ``[channels]``."""

    def read(_: int, pair: Pair) -> tuple[Tensor, int]:
        assert isinstance(pair.quantized, Tensor)  # a layer's output
        difference = (pair.reference - pair.quantized).double()
        axis = 1 if layer.op.is_convolution else difference.ndim - 1
        others = [i for i in range(difference.ndim) if i != axis]
        return difference.sum(others), difference.numel() // difference.shape[axis]

    parts = list(runner.collect(layer.node, read))
    total = sum((found for found, _ in parts[1:]), parts[0][0])
    with torch.inference_mode(False):
        return (total / sum(count for _, count in parts)).float().clone()
