"""Histograms of activations, and the affine qparams of least squared error under them."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.quantization.pointwise import count_bins
from infoq_fx.types import QParams, QuantSpec

__all__ = [
    "MAX_BINS",
    "MAX_VALUES_PER_SAMPLE",
    "Histogram",
    "choose_activation_qparams",
    "coprime_stride",
    "find_activation_scale",
    "measure_noise",
    "measure_peak",
    "range_bits",
    "scale_significant_bits",
    "significant_bits_of",
]

MAX_BINS = 8192
MAX_VALUES_PER_SAMPLE = 4096

_MANY_TERMS = 576  # terms of a sum for which scale_significant_bits gives a weight's scale no extra bits
_MOST_DIGITS = 5
_LEAST_VARIANCE = 1e-12  # of the mean square; less is round-off

# Bin widths from 2**-126 up, and their inverses, are normal float32 numbers.
_SMALLEST_EXPONENT = -126


class Histogram:
    """One-pass histogram of an activation's values, from which qparams at any bit-width follow.

    Bin ``i`` counts the values in ``[first_bin + i, first_bin + i + 1) * bin_width``. The width is the
    smallest power of two for which ``MAX_BINS`` bins cover everything from ``minimum`` to ``maximum``, 0
    included. Bins are anchored at 0, so a growing range merges pairs exactly, and neither the order nor the
    chunking of the batches changes the result.

    Attributes:
        minimum: smallest value seen (inf before the first one); NaN or infinite if a value was.
        maximum: largest value seen, likewise.
        counts: int64 ``[bins]`` on the CPU; at most ``MAX_VALUES_PER_SAMPLE`` values of each sample.
        first_bin: index of the first bin, never positive.
        exponent: base-2 logarithm of the bin width.
    """

    def __init__(self) -> None:
        self.minimum = math.inf
        self.maximum = -math.inf
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.first_bin = 0
        self.exponent = _SMALLEST_EXPONENT

    @property
    def bin_width(self) -> float:
        """Width of every bin, in units of the activation."""
        return math.ldexp(1.0, self.exponent)

    @property
    def is_empty(self) -> bool:
        """Whether no value was seen yet."""
        return self.minimum > self.maximum

    @property
    def is_finite(self) -> bool:
        """Whether every value seen was finite; after one that was not, nothing more is counted."""
        return self.is_empty or (math.isfinite(self.minimum) and math.isfinite(self.maximum))

    def update(self, x: torch.Tensor) -> None:
        """Add a batch of values.

        Args:
            x: ``[samples, ...]``, any device and dtype; counted as float32.
        """
        if x.numel() == 0 or not self.is_finite:
            return
        samples = x.detach().to(torch.float32).reshape(x.shape[0] if x.ndim else 1, -1)
        low, high = (float(bound) for bound in torch.aminmax(samples))
        self.add(samples[:, :: coprime_stride(samples.shape[1], MAX_VALUES_PER_SAMPLE)], low, high)

    def add(self, counted: torch.Tensor, low: float, high: float) -> None:
        """Add a batch of which some values were taken.

        Args:
            counted: float32, those to count.
            low: the smallest of all values.
            high: the largest.
        """
        # Python's min and max keep a NaN that comes first.
        self.minimum, self.maximum = min(low, self.minimum), max(high, self.maximum)
        if not (math.isfinite(low) and math.isfinite(high)):
            return
        self._cover_range()
        if counted.device.type == "cpu":
            count_bins(counted.numpy(), math.ldexp(1.0, -self.exponent), self.first_bin, self.counts.numpy())
            return
        scaled = counted.to(torch.float64).mul_(math.ldexp(1.0, -self.exponent))
        bins = scaled.floor_().to(torch.int64).sub_(self.first_bin)
        self.counts += torch.bincount(bins.flatten(), minlength=len(self.counts)).cpu()

    def _cover_range(self) -> None:
        """Move the counts into the bins that the range seen so far requires."""
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        exponent = self.exponent
        if low < high:  # with nothing but zeros so far, the bins stay as narrow as they get
            exponent = max(exponent, math.frexp(max(-low, high))[1] - MAX_BINS.bit_length())
        while _bin_of(high, exponent) - _bin_of(low, exponent) >= MAX_BINS:
            exponent += 1
        first, last = _bin_of(low, exponent), _bin_of(high, exponent)
        # An arithmetic shift divides and floors; beyond 62 bits only the sign of an index is left.
        moved = (torch.arange(len(self.counts)) + self.first_bin) >> min(exponent - self.exponent, 62)
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        self.counts = counts.index_add_(0, moved - first, self.counts)
        self.first_bin, self.exponent = first, exponent


def scale_significant_bits(bits: int, is_weight: bool, terms: int | None = None, of_input: int | None = None) -> int:
    """Return how many significant bits a scale may have so that float32 sums over quantized values are exact.

    A product of an activation ``(q - zero_point) * scale`` with a weight then has at most 21 significant bits. Sums
    of such products, of both signs and seldom of full size, nearly always fit the 24 bits of float32 and are the
    same in every order. Two runtimes then agree to the last bit; otherwise they would round single values to
    different steps, and the differences would grow from layer to layer. The cost is a scale that differs from its
    best value by at most 3 to 12 % (weights at 8 bits: 25 %), where the squared error is flat.

    A sum of n terms grows by half a bit for each doubling of n. If the number of ``terms`` is known and small, as in
    a depthwise convolution, the bits saved go to the scales of the layer's weights. So do the bits that the scale of
    the layer's input does not use, if its number of significant bits (``of_input``) is known, such as 1 for a power
    of two.
    """
    if not is_weight:
        return min(_MOST_DIGITS, 12 - bits)
    spare = 0 if terms is None else max(0, round(0.5 * math.log2(_MANY_TERMS / terms)))
    spare += 0 if of_input is None else max(0, 4 - of_input)
    return min(_MOST_DIGITS, 10 - bits + spare)


def range_bits(spec: QuantSpec) -> int:
    """Return the bits of the integers' range, for :func:`scale_significant_bits`: 7 for a codebook's levels."""
    return 1 + spec.quant_max.bit_length() if spec.has_codebook else spec.bits


def significant_bits_of(scale: float) -> int:
    """Return the significant bits of a float32, from its first to its last 1: 1 for a power of two."""
    mantissa = int(math.frexp(scale)[0] * (1 << 24))
    return mantissa.bit_length() - ((mantissa & -mantissa).bit_length() - 1)


def find_activation_scale(histogram: Histogram, spec: QuantSpec) -> float:
    """Return the scale of least expected squared error, at most that of the full range, not rounded to few bits.

    Arguments and errors are those of :func:`choose_activation_qparams`; the scale is 1 for a tensor of zeros.
    """
    _check_affine(histogram, spec)
    if histogram.minimum == histogram.maximum == 0:
        return 1.0
    full = (max(histogram.maximum, 0.0) - min(histogram.minimum, 0.0)) / spec.quant_max
    return min(full, float(_search_affine(histogram, spec)[0]))


def choose_activation_qparams(
    histogram: Histogram, spec: QuantSpec, *, factor: float | None = None, of_zeros: float = 1.0
) -> QParams:
    """Choose the affine scale and zero point that minimise the expected squared error under a histogram.

    The values of a bin are taken as spread evenly over it. A grid search over scale and zero point, the full range
    included, is followed by a pattern search with shrinking steps, all in float64 on the CPU. With 16 bits, where the
    activation stays in float, the scale is 1.

    Args:
        histogram: of the activation.
        spec: affine, per tensor.
        factor: choose the qparams of the activation multiplied by this factor, with a power of two as the scale. The
            zero point is even if there are values of both signs: integer additions of onnxruntime round halves to
            even after they have added it.
        of_zeros: scale of a tensor of zeros.

    Returns:
        Scale and zero point on the CPU; 0 is always exactly representable.

    Raises:
        OptionError: ``spec`` is symmetric or per channel.
        CalibrationDataError: the histogram is empty, or saw NaN or infinite values.
    """
    _check_affine(histogram, spec)
    scale, zero_point = 1.0 if spec.is_float else of_zeros, 0
    if not spec.is_float and not histogram.minimum == histogram.maximum == 0:
        scale, zero_point = _round_affine(histogram, spec, _search_affine(histogram, spec), factor)
    limits = torch.finfo(torch.float32)
    # A smaller scale would be subnormal, which accelerators flush to zero.
    scale = min(max(scale, limits.tiny), 2.0**127 if factor else limits.max)
    return QParams(spec, torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32))


def measure_noise(histogram: Histogram, qparams: QParams, *, factor: float | None = None) -> float:
    """Return the expected squared error of qparams under a histogram, relative to the mean square of its values.

    ``factor`` is that of :func:`choose_activation_qparams`. It is 0 for a tensor that stays in float, or of which only
    zeros were counted.
    """
    if qparams.spec.is_float or histogram.minimum == histogram.maximum == 0:
        return 0.0
    table, mean_square = _cumulative_table(histogram)
    if mean_square == 0:  # of the values that were counted
        return 0.0
    scale = qparams.scale.double().cpu().reshape(1) / (1.0 if factor is None else factor)
    zero_point = qparams.zero_point.double().cpu().reshape(1)
    error = _expected_errors(table, histogram, mean_square, scale, zero_point, qparams.spec.quant_max)
    return max(0.0, float(error)) / mean_square


def measure_peak(histogram: Histogram) -> float:
    """Return the largest distance of a value from the mean, in standard deviations of the values that were counted.

    It is 0 for a constant tensor, and where only zeros were counted.
    """
    table, mean_square = _cumulative_table(histogram)
    if mean_square == 0:
        return 0.0
    mean = float(table[-1, 1])
    variance = max(mean_square - mean * mean, _LEAST_VARIANCE * mean_square)
    return max(histogram.maximum - mean, mean - histogram.minimum, 0.0) / math.sqrt(variance)


def _check_affine(histogram: Histogram, spec: QuantSpec) -> None:
    if spec.symmetric or spec.channel_axis is not None:
        raise OptionError(f"activations cannot take {spec}; give an affine QuantSpec for the whole tensor")
    if histogram.is_empty or not histogram.is_finite:
        found = "no value" if histogram.is_empty else "NaN or infinite values"
        raise CalibrationDataError(f"cannot choose qparams: the histogram saw {found}; check the calibration data")


def coprime_stride(numel: int, most: int) -> int:
    """Return the smallest stride that leaves at most ``most`` values; coprime to the size, it aligns with no axis."""
    stride = max(1, -(-numel // most))
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def _bin_of(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _search_affine(histogram: Histogram, spec: QuantSpec) -> torch.Tensor:
    """Scale and zero point ``[2]`` with the least expected squared error."""
    quant_max = spec.quant_max
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    full, zero = (high - low) / quant_max, round(-low / (high - low) * quant_max)
    table, mean_square = _cumulative_table(histogram)
    lowest = min(max(0.5 * math.sqrt(mean_square) / (high - low), 1e-4), 0.25)
    scales = full * torch.logspace(math.log2(lowest), 1.0, 64, base=2.0, dtype=torch.float64)
    is_one_sided = low == 0 or high == 0
    zeros = {zero} if is_one_sided else {zero, *(round(quant_max * i / 16) for i in range(17))}
    grid = torch.cartesian_prod(scales, torch.tensor(sorted(zeros), dtype=torch.float64))
    grid = torch.cat([torch.tensor([[full, zero]], dtype=torch.float64), grid])  # the full range wins ties
    best, step, shift = grid[0], math.log(2.0 / lowest) / 63, 0 if is_one_sided else max(1, quant_max // 16)
    for _ in range(12):
        errors = _expected_errors(table, histogram, mean_square, grid[:, 0], grid[:, 1], quant_max)
        best = grid[errors.argmin()]
        factors = torch.exp(step * torch.tensor([0.0, -1.0, -0.5, 0.5, 1.0], dtype=torch.float64))
        shifts = best[1] + torch.tensor(sorted({0, -shift, shift}, key=abs), dtype=torch.float64)
        grid = torch.cartesian_prod(best[0] * factors, shifts.clamp(0, quant_max))
        step, shift = step / 2, -(-shift // 2)
    return best


def _round_affine(histogram: Histogram, spec: QuantSpec, best: torch.Tensor, factor: float | None) -> tuple[float, int]:
    """Of the scales and zero points that are allowed those of least error, near the best of all."""
    quant_max, unit = spec.quant_max, 1.0 if factor is None else factor
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    significant_bits = 1 if factor is not None else scale_significant_bits(spec.bits, is_weight=False)
    grid = _short_grid(best * torch.tensor([unit, 1.0], dtype=torch.float64), significant_bits, quant_max)
    if low == 0 or high == 0:  # runtimes fuse a ReLU away where the zero point is the smallest integer
        grid = grid[grid[:, 1] == round(-low / (high - low) * quant_max)]
    elif factor is not None:
        grid = grid[grid[:, 1] % 2 == 0]
    table, mean_square = _cumulative_table(histogram)
    errors = _expected_errors(table, histogram, mean_square, grid[:, 0] / unit, grid[:, 1], quant_max)
    scale, zero_point = grid[errors.argmin()].tolist()
    return scale, int(zero_point)


def _short_grid(best: torch.Tensor, significant_bits: int, quant_max: int) -> torch.Tensor:
    """Scales of few significant bits around the best, with zero points that keep the low or high end, or between."""
    scale, zero = float(best[0]), float(best[1])
    exponent, count = math.frexp(scale)[1] - significant_bits, 1 << (significant_bits - 1)
    grid = []
    for short in (math.ldexp(n, exponent + o) for o in (-1, 0, 1) for n in range(count, 2 * count)):
        low, high = zero * scale / short, quant_max - (quant_max - zero) * scale / short
        zeros = {round(low + (high - low) * i / 8) + shift for i in range(9) for shift in (-1, 0, 1)}
        grid += [(short, z) for z in sorted({min(max(z, 0), quant_max) for z in zeros})]
    return torch.tensor(grid, dtype=torch.float64)


def _cumulative_table(histogram: Histogram) -> tuple[torch.Tensor, float]:
    """By bin: mass and moment below it, its mass, left end, width and half the inverse width; also the mean square."""
    mass = histogram.counts.double() / histogram.counts.sum()
    edges = (torch.arange(len(mass), dtype=torch.float64) + histogram.first_bin) * histogram.bin_width
    # The outermost values are known exactly: a constant tensor is a point, not a bin.
    left = edges.clamp_min(histogram.minimum)
    width = ((edges + histogram.bin_width).clamp_max(histogram.maximum) - left).clamp_min(0.0)
    half_inverse = torch.where(width > 0, 0.5 / width, 0.0)
    moment = mass * (left + 0.5 * width)
    columns = [mass.cumsum(0) - mass, moment.cumsum(0) - moment, mass, left, width, half_inverse]
    mean_square = float((mass * (left * left + left * width + width * width / 3)).sum())
    table = functional.pad(torch.stack(columns, 1), (0, 0, 1, 1))  # rows for values below and above the range
    table[-1, 0], table[-1, 1] = 1.0, moment.sum()
    return table, mean_square


def _expected_errors(
    table: torch.Tensor,
    histogram: Histogram,
    mean_square: float,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_max: int,
) -> torch.Tensor:
    """Expected squared errors ``[candidates]`` of affine qparams.

    Summed by parts over the levels, each is E[(x - top)^2] - 2 scale sum P(b), where b are the boundaries
    between levels and P(b) = E[max(b - x, 0)].
    """
    boundary = (torch.arange(quant_max, dtype=torch.float64) + 0.5 - zero_point[:, None]) * scale[:, None]
    row = torch.floor(boundary / histogram.bin_width) - (histogram.first_bin - 1)
    below, moment, mass, left, width, half_inverse = table[row.clamp_(0, len(table) - 1).long()].unbind(-1)
    beyond = (boundary - left).clamp_min_(0.0)
    within = torch.minimum(beyond, width)
    shortfall = boundary * below - moment + mass * (within * within * half_inverse + beyond - within)
    top = (quant_max - zero_point) * scale
    return mean_square - 2 * top * table[-1, 1] + top * top - 2 * scale * shortfall.sum(1)
