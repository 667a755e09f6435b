"""Ranks the activations of a calibrated model by what rounding to 8 bits costs them, and finds those with outliers."""

from __future__ import annotations

from dataclasses import dataclass

from infoq_fx.quantization.prepared import PreparedModel, check_prepared
from infoq_fx.types import BASELINE_BITS

__all__ = ["OUTLIER_REMEDY", "ActivationRange", "rank_activations"]


OUTLIER_REMEDY = (
    "let those stay in float that gain most, with activation_bits=(8, 16), or move factors between channels, with "
    "recovery=['range_equalization', 'fast']"
)
"""How to go on where activations have outliers."""

_LEAST_PEAK = 16.0  # in standard deviations; normally distributed values stay below 6
_LEAST_ERROR = 2.5e-4  # of the power of the values; normally distributed ones lose half of it


@dataclass(frozen=True, kw_only=True)
class ActivationRange:
    """How far the values of an activation reach on the calibration data, and what rounding them to 8 bits costs.

    Args:
        site: its name.
        is_searched: whether it has a bit-width of its own; others are quantized only so that integer kernels fuse.
        peak: the largest distance of a value from the mean, in standard deviations.
        error: mean squared error at 8 bits, relative to the mean square of the values.
    """

    site: str
    is_searched: bool
    peak: float
    error: float

    @property
    def has_outliers(self) -> bool:
        """Whether single values are far from all others and cost them levels.

        This is so with a peak of at least 16 and an error of at least 0.025 %, twice that of a normal distribution.
        """
        return self.peak >= _LEAST_PEAK and self.error >= _LEAST_ERROR


def rank_activations(prepared: PreparedModel) -> tuple[ActivationRange, ...]:
    """Return the ranges of all activations of a prepared model, those that lose most at 8 bits first.

    :func:`infoq_fx.summarize` shows them as text. A model that :func:`infoq_fx.recover` changed has its own ranges only
    if the step measured them again.

    Args:
        prepared: calibrated; without calibration data nothing is known, and the result is empty.

    Raises:
        OptionError: it is not a prepared model.
    """
    check_prepared(prepared, "rank_activations")
    found = [
        ActivationRange(
            site=module.site.name,
            is_searched=module.site.is_searched,
            peak=module.peak,
            error=module.noise[BASELINE_BITS],
        )
        for _, module in prepared.quantizer_nodes()
        if module.site.kind == "activation" and module.noise
    ]
    return tuple(sorted(found, key=lambda activation: -activation.error))
