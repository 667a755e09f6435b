"""Measures first and second moments of a layer's input, in the reference and in the quantized model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Pair
from infoq_fx.recovery.segments import Layer, Segment
from infoq_fx.recovery.unfolding import input_rows

__all__ = ["InputMoments", "average_moments", "measure_moments"]


@dataclass(frozen=True)
class InputMoments:
    """Moments of ``count`` rows of a layer's input, float64: x in the reference and x^ in the quantized model.

    ``mean`` E x and ``mean_quantized`` E x^ are ``[groups, columns]``. ``second`` E x^ x^^T and ``cross`` E x x^^T
    are ``[groups, columns, columns]``, minus the products of the means if they are centred.
    """

    count: int
    mean: Tensor
    mean_quantized: Tensor
    second: Tensor
    cross: Tensor

    def centre(self) -> InputMoments:
        """Return covariances in place of second moments, for layers whose bias corrects the mean error."""
        outer = self.mean_quantized[:, None, :]
        return InputMoments(
            self.count,
            self.mean,
            self.mean_quantized,
            self.second - self.mean_quantized[:, :, None] * outer,
            self.cross - self.mean[:, :, None] * outer,
        )


def measure_moments(
    runner: LayerwiseRunner, segment: Segment, layer: Layer, rows: int
) -> tuple[InputMoments, InputMoments]:
    """Measure the moments over each half of the samples, from about ``rows`` rows in all.

    The runner must be at the segment's start. Batches go to the two halves in turn; a single batch is used for both.
    """
    most = max(1, math.ceil(rows / runner.samples))

    def read(_: int, pair: Pair) -> InputMoments:
        x, found = input_rows(layer, pair.reference, most), input_rows(layer, pair.quantized, most)
        products = x.mean(1), found.mean(1), found.mT @ found / x.shape[1], x.mT @ found / x.shape[1]
        return InputMoments(x.shape[1], *(product.double() for product in products))

    parts = runner.collect(segment, layer.source, read)
    return average_moments(parts[::2]), average_moments(parts[1::2] or parts)


def average_moments(parts: Sequence[InputMoments]) -> InputMoments:
    """Return the moments of all rows together, added in order so that threads do not change the result."""
    count = sum(part.count for part in parts)

    def average(values: Iterable[Tensor]) -> Tensor:
        total = sum(value * (part.count / count) for value, part in zip(values, parts, strict=True))
        assert isinstance(total, Tensor)
        return total

    return InputMoments(
        count,
        average(part.mean for part in parts),
        average(part.mean_quantized for part in parts),
        average(part.second for part in parts),
        average(part.cross for part in parts),
    )
