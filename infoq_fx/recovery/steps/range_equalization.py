"""Cross-layer range equalization: moves factors between layers so that rounding all channels costs least."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import OptionError
from infoq_fx.graph.calibration import record_range
from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.passes.scale_equalization import find_scale_groups
from infoq_fx.quantization.histogram import Histogram, choose_activation_qparams
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.layerwise_runner import choose_samples
from infoq_fx.recovery.parameters import fork
from infoq_fx.recovery.ranges.equalization import equalize_groups, measure_channels, renew_qparams
from infoq_fx.recovery.ranges.groups import RangeGroup, add_factors, drop_factors, find_groups
from infoq_fx.recovery.segments import find_segments
from infoq_fx.recovery.step import StepContext

__all__ = ["RangeEqualization"]


@dataclass(frozen=True)
class RangeEqualization:
    r"""Multiplies the channels of a tensor where it is made and divides the input channels of its readers by the same.

    Activations have one scale per tensor: if the ranges of channels differ, the narrow ones get few levels. The row of
    a channel in the first weight and its bias are multiplied by a factor, and the second weight's values for it are
    divided by the factor. Factors are powers of two from 1 to 2^6, which are exact: the float model's outputs do not
    change by a bit (except for subnormal numbers), nor do the integers of the first weight, whose scales are multiplied
    too. They are those of least squared error of the second layers' outputs, see
    :func:`infoq_fx.recovery.ranges.factors.choose_factors`.

    The first may also be a layer norm, an RMS norm or a product with a parameter per channel, and several layers may
    read the tensor. Between them there may be ReLU, leaky ReLU, PReLU, pooling, means over space, products with another
    tensor (gates), quantizers and residual additions, whose tensors all share their factors; nothing else may read the
    values. No factor widens the range of the tensor over the data, or lets a value reach the bound of a clamp such as
    ReLU6. Behind GELU, SiLU and other curves, which no factor passes, a product with the factors is
    added to the graph.

    Factors are applied only if the error falls by more than 2 %, and by more than 20 % for a product that is added. The
    result has a different float model as its ``origin``, which later steps build on: this step must come first. The
    qparams of the weights and of the tensors between are recomputed for all bit-widths.

    :func:`infoq_fx.prepare` does this already for the inputs of depthwise layers, which costs nothing.

    Cost: about two forward passes of the float model over ``samples``; no labels.

    Reference:
        Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721,
        Section 4.1, Eq. 7-12. Powers of two and the choice by error are additions.

    Args:
        samples: largest number of samples, spread over the data.

    Raises:
        OptionError: an option is out of range, or, in ``recover``, another step has changed the weights.
    """

    samples: int = 512

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)

    @property
    def name(self) -> str:
        """``"range_equalization"``."""
        return "range_equalization"

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """See :class:`infoq_fx.recovery.RecoveryStep`."""
        _check_float(prepared)
        changed, used = replace(fork(prepared), origin=None), choose_samples(prepared, data, self.samples)
        add_factors(changed)
        groups = find_groups(changed, [layer for segment in find_segments(changed) for layer in segment.layers])
        with thread_map(context.run_options.threads, context.run_options.stop) as spread:
            size = context.batch_size
            measured = measure_channels(changed, groups, used, spread, batch_size=size)
            whole = measured
            if used.samples < data.samples:
                whole = measure_channels(changed, groups, data, spread, batch_size=size, values=0)
        ranges = {node: found.range for node, found in whole.items()}
        taken = [group for group, _ in equalize_groups(changed, groups, bits, measured, ranges)]
        context.run_options.advance(0.5)
        _calibrate_between(changed, taken, used, context)
        context.run_options.advance(0.5)
        drop_factors(changed)
        return fork(changed) if taken else fork(prepared)


def _check_float(prepared: PreparedModel) -> None:
    if prepared.origin is None:
        return
    module, origin = prepared.graph_module, prepared.origin.graph_module
    for node in module.graph.nodes:
        if node.op == "get_attr" and not torch.equal(read_tensor(module, node), read_tensor(origin, node)):
            raise OptionError("range_equalization comes before other steps; put it first in the list")


class _Counter(FloatInterpreter):
    """Fills the histograms of some quantizers."""

    def __init__(self, prepared: PreparedModel, histograms: Mapping[Quantizer, Histogram]) -> None:
        super().__init__(prepared)
        self._histograms, self._lock = histograms, threading.Lock()

    def see(self, quantizer: Quantizer, x: Tensor) -> None:
        if quantizer in self._histograms:
            with self._lock:
                self._histograms[quantizer].update(x)


def _calibrate_between(
    changed: PreparedModel, taken: Sequence[RangeGroup], data: CalibrationData, context: StepContext
) -> None:
    """New qparams for the tensors of the groups, from the equalized float model."""
    modules = dict(changed.quantizer_nodes())
    histograms = {modules[node]: Histogram() for group in taken for node in group.quantizers}
    counter = _Counter(changed, histograms)

    def run(batch: Mapping[str, Tensor]) -> None:
        with torch.inference_mode():
            copy.copy(counter).run(*batch.values())

    with thread_map(context.run_options.threads, context.run_options.stop) as spread:
        for _ in spread(run, data.batches(context.batch_size) if histograms else ()):
            pass
    groups = find_scale_groups(changed.graph_module)
    free = {module for node, module in modules.items() if node in groups}
    for quantizer, found in histograms.items():
        factor = 1.0 if quantizer in free else None  # scales of powers of two, as in calibration
        renew_qparams(quantizer, functools.partial(choose_activation_qparams, found, factor=factor))
        record_range(quantizer, found, factor)
