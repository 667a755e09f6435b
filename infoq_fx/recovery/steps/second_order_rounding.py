"""Second-order rounding: rounds each layer's weights so that their errors cancel in the layer's output."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import return_free_memory
from infoq_fx.core.option_checks import check_count
from infoq_fx.errors import OptionError
from infoq_fx.graph.calibration import weight_digits
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.codebooks import Floats, find_levels, table_of_levels
from infoq_fx.quantization.numerics import shorten_scale
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.layerwise_runner import (
    LayerwiseRunner,
    Reference,
    check_reference,
    choose_samples,
    few_bit_activations,
)
from infoq_fx.recovery.moments.input_moments import InputMoments, Inputs, average_moments, measure_moments
from infoq_fx.recovery.moments.unfolding import can_unfold, columns_of, rows_to_weight, weight_to_rows
from infoq_fx.recovery.parameters import fork, read_qparams, set_bias, set_parameter, set_qparams
from infoq_fx.recovery.second_order import round_rows
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.step import RecoveryStep, StepContext

__all__ = ["SecondOrderRounding", "scale_choices"]

_SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
_DAMPINGS = (0.01, 0.1, 1.0)
_LEAST_ROWS_PER_COLUMN, _MOST_ROWS_PER_COLUMN = 16, 512
_MOST_TO_TRY_ALL = 1024  # columns
_ROWS_TO_TRY = 128
_CLIPS = (0.8, 0.9, 1.0, 1.05, 1.1, 1.25, 1.4)


@dataclass(frozen=True)
class SecondOrderRounding:
    r"""Rounds the weights of a row together, so that their errors cancel in the layer's output.

    With x the input of a layer in the reference and x^ its input in the quantized model, after the layers already
    quantized, it chooses the integers q, the scale s of each output channel and the bias c that make::

        E | W x + b - s q x^ - c |^2

    small. The best bias for given integers is ``b + W E x - s q E x^``; the weights then need to fit the covariance of
    x^ only. Without rounding, the best weights would be V, a regression of the reference's output on x^, which also
    compensates for the errors of the layers before. V is rounded one column after the other, each column's error fed
    back to the later ones (GPTQ's form of Optimal Brain Surgeon), at each of seven scales. The best scale is kept for
    every channel. Then every integer is set to its best given all others, until none changes or ``sweeps`` are done.

    The reference ``"float_weights"`` has float weights, and its activations of 6 bits and more are quantized at their
    bit-widths; ``"float_model"`` is the float model. With the first, the weights compensate for their own rounding and
    for that of activations of up to 5 bits only. Compensating for all activations, layer by layer, may take the outputs
    further away: MobileNetV2 at a mean of 3 bits, activations at 8, ends 0.20 nats from the float model with the first
    and 0.27 with the second; with all weights at 8 bits, 0.04 and 0.07. On small networks trained on CIFAR-10 the
    second is better by up to 0.01 nats at 6 and 8 bits. Whether compensating for activations of fewer bits is worth it
    depends on the network, see ``compensate``.

    A ridge in units of the mean second moment draws V towards W for dead inputs and rare directions. A depthwise layer
    has one small problem per channel. Layers without a bias use second moments that are not centred. Transposed
    convolutions and weights in float are not changed, nor are layers of more than 8,192 columns and many input rows.

    Cost: a forward pass of the reference and one of the quantized model over ``samples``, and for every layer a
    covariance and the cube of its columns, or of its input rows if they are far fewer; no labels. Values between layers
    are kept for both models, those beyond 512 MiB in a temporary file.

    Reference:
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arXiv 2210.17323, Eq. 2 and 3 and Algorithm 1, with activation order. The regression on the quantized model's
        inputs, the choice of scale and bias within the problem and the coordinate descent are additions.

    Args:
        samples: largest number of samples, spread over the data.
        rows: number of input rows for the moments of a layer; at least 16 and at most 512 per column are used.
        sweeps: largest number of rounds of coordinate descent.
        reference: ``"float_weights"`` or ``"float_model"``, whose outputs are approximated.
        compensate: whether weights make up for the error of activations of fewer than 6 bits too. They then suppress
            directions in which rounding is most of what they see: ResNet-20 loses a quarter less, MobileNetV2 twice as
            much. ``"auto"`` tries both in :func:`infoq_fx.recover`, and keeps the better on samples held out.

    Raises:
        OptionError: an option is out of range.
    """

    samples: int = 1024
    rows: int = 16384
    sweeps: int = 8
    reference: Reference = "float_weights"
    compensate: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("rows", 1), ("sweeps", 0)):
            check_count(option, getattr(self, option), least)
        check_reference(self.reference)
        if not isinstance(self.compensate, bool) and self.compensate != "auto":
            raise OptionError(f"compensate={self.compensate!r}; give True, False or 'auto'")

    def variants(self, prepared: PreparedModel, bits: Mapping[str, int]) -> Sequence[RecoveryStep]:
        """Return the steps to try, of which the best is kept."""
        if self.compensate != "auto" or self.reference == "float_model" or not few_bit_activations(prepared, bits):
            return [self]
        return [replace(self, compensate=True), replace(self, compensate=False)]

    @property
    def name(self) -> str:
        """``"second_order_rounding"``."""
        return "second_order_rounding"

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """See :class:`infoq_fx.recovery.RecoveryStep`."""
        changed = fork(prepared)
        runner = LayerwiseRunner(
            changed,
            bits,
            choose_samples(prepared, data, self.samples),
            context,
            reference=self.reference,
            at_baseline=self.compensate is False,
        )
        for layer in runner.visit():
            if read_qparams(changed, layer, bits).spec.is_float:
                continue
            columns, halves = columns_of(layer), list[Inputs]()
            if can_unfold(layer):
                rows = max(min(self.rows, _MOST_ROWS_PER_COLUMN * columns), _LEAST_ROWS_PER_COLUMN * columns)
                halves = list(measure_moments(runner, layer, rows) or ())
            if halves:
                _round_layer(changed, layer, halves, bits, self)
            else:
                log = logging.getLogger(__name__)
                log.info(
                    "%s is left rounded to nearest: %d columns, transposed, or huge inputs", layer.site.name, columns
                )
        return changed


def scale_choices(
    prepared: PreparedModel, layer: Layer, bits: int, rows: Tensor, clips: Sequence[float] = _CLIPS
) -> Tensor:
    """Return candidate scales of a weight's rows, the calibrated ones times ``clips``: ``[groups, rows, clips]``."""
    scale = read_qparams(prepared, layer, bits).scale
    short = weight_digits(prepared, layer.quantizer, bits)
    choices = torch.stack([shorten_scale(scale * clip, short) for clip in clips], -1)
    return choices.reshape(rows.shape[0], rows.shape[1], len(clips))


def _round_layer(
    changed: PreparedModel,
    layer: Layer,
    halves: list[Inputs],
    bits: Mapping[str, int],
    options: SecondOrderRounding,
) -> None:
    origin = changed.origin or changed
    rows = weight_to_rows(layer, read_tensor(origin.graph_module, layer.weight)).double()
    qparams = read_qparams(changed, layer, bits)
    scale, shaped = qparams.scale, scale_choices(changed, layer, qparams.spec.bits, rows)
    problem = _Problem(rows, table_of_levels(find_levels(qparams)))
    is_centred = layer.bias is not None
    shrinkage, damping = _choose_ridges(
        problem, [half.centre() if is_centred else half for half in halves], scale.reshape(*rows.shape[:2], 1)
    )
    logging.getLogger(__name__).debug("%s: shrinkage %g, damping %g", layer.site.name, shrinkage, damping)
    return_free_memory()
    moments = average_moments(halves, are_centred=is_centred)
    halves.clear()
    used = moments.centre() if is_centred else moments  # the means stay
    q, step = problem.round(
        used, used.ideal_rows(rows, used.products(rows), shrinkage), shaped, damping, options.sweeps
    )
    rounded = q * step[..., None]
    set_parameter(changed, layer.weight, rows_to_weight(layer, rounded))
    set_qparams(changed, layer, replace(qparams, scale=step.reshape(scale.shape)))
    if layer.bias is not None:
        output = (rows @ moments.mean[..., None])[..., 0]
        found = (rounded.double() @ moments.mean_quantized[..., None])[..., 0]
        bias = read_tensor(origin.graph_module, layer.bias)
        set_bias(changed, layer, bias + (output - found).flatten().float(), bits)


def _choose_ridges(problem: _Problem, halves: Sequence[Inputs], scales: Tensor) -> tuple[float, float]:
    """The shrinkage and the damping of least error on each half of what was fitted to the other.

    Of 256 rows or more, 128 to 255 are tried, spread over the weight. A matrix of more than 1,024 columns takes long to
    factorize: the first half alone is fitted, and the error is taken to have a single minimum.
    """
    is_wide = isinstance(halves[0], InputMoments) and problem.rows.shape[2] > _MOST_TO_TRY_ALL
    tried = slice(None, None, max(1, problem.rows.shape[1] // _ROWS_TO_TRY))
    problem, scales = replace(problem, rows=problem.rows[:, tried]), scales[:, tried]
    # The errors of neighbouring choices differ by far more than the precision of float32.
    both = [(half, half.products(problem.rows)) for half in (half.narrow() for half in halves)]
    pairs = [(both[0], both[1])] if is_wide else [(both[0], both[1]), (both[1], both[0])]
    find_least = _descend_to_least if is_wide else _find_least

    def validate_ideal(shrinkage: float) -> float:
        return_free_memory()
        return sum(
            seen.output_error(wanted, fitted.ideal_rows(problem.rows, products, shrinkage))
            for (fitted, products), (seen, wanted) in pairs
        )

    shrinkage = find_least(_SHRINKAGES, validate_ideal)
    ideals = [fitted.ideal_rows(problem.rows, products, shrinkage) for (fitted, products), _ in pairs]

    def validate_rounded(damping: float) -> float:
        return_free_memory()
        error = 0.0
        for ((fitted, _), (seen, wanted)), ideal in zip(pairs, ideals, strict=True):
            q, step = problem.round(fitted, ideal, scales, damping, 0)
            error += seen.output_error(wanted, (q * step[..., None]).double())
        return error

    return shrinkage, find_least(_DAMPINGS, validate_rounded)


def _find_least(values: Sequence[float], measure: Callable[[float], float]) -> float:
    return min(values, key=measure)


def _descend_to_least(values: Sequence[float], measure: Callable[[float], float]) -> float:
    """From the middle of the values, in the direction of less, as long as it gets less."""
    measured = functools.cache(lambda index: measure(values[index]))
    at, step = (len(values) - 1) // 2, 1
    if at > 0 and measured(at - 1) < measured(at):
        at, step = at - 1, -1
    while 0 <= at + step < len(values) and measured(at + step) < measured(at):
        at += step
    return values[at]


@dataclass(frozen=True)
class _Problem:
    """Rows of a float weight ``[groups, rows, columns]`` to be rounded to levels; see :func:`round_rows`."""

    rows: Tensor
    nearest: Floats

    def round(
        self, moments: Inputs, ideal: Tensor, scales: Tensor, damping: float, sweeps: int
    ) -> tuple[Tensor, Tensor]:
        """Round the ideal rows: levels ``[groups, rows, columns]`` and scales ``[groups, rows]``."""
        return round_rows(ideal, moments.factorize(damping), scales, self.nearest, sweeps)
