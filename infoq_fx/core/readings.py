"""What an output of a model means, and how many nats it loses when another value takes its place.

Every output has a reading, which turns two values of the output into a Kullback-Leibler divergence in nats: at every
position (pixel, token, anchor), averaged over the positions. The loss of a run is the sum over the outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from infoq_fx.errors import OptionError

__all__ = [
    "READINGS",
    "Bernoulli",
    "Categorical",
    "Encoded",
    "Ignored",
    "LossFunction",
    "Metric",
    "OutputLoss",
    "Quantity",
    "Reading",
    "check_metric",
    "decode_reading",
    "describe_reading",
    "draw_log_likelihood",
    "measure_cross_entropy",
    "measure_metric",
    "measure_nats",
    "split_samples",
]

Metric = Callable[[Any, Tensor | None], float]
"""A metric of the user's own, larger is better: ``(outputs, labels) -> float`` over all samples."""
LossFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A loss of the user's own: ``(float_outputs, outputs) -> nats [samples]``."""

_SMALLEST_PROBABILITY = torch.finfo(torch.float32).tiny
_SMALLEST_VARIANCE = 1e-3  # of a channel, relative to the mean over the channels: a constant channel says nothing
_NO_VARIANCE = 1e-30
_VALUES_AT_ONCE = 2**17  # of an output: a megabyte in float64
_ROUNDING = 1e-4  # nats; a divergence computed in float32 may be below 0 by so much


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """An output that is a distribution over classes along an axis: E KL(p || q) in nats at every position.

    Args:
        axis: of the classes; the first axis is that of the samples.
        form: whether values are logits, log-probabilities or probabilities.
        weight: of this output in the loss.
    """

    axis: int = 1
    form: Literal["logits", "log_probabilities", "probabilities"] = "logits"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_reading(self, ("logits", "log_probabilities", "probabilities"))

    def __str__(self) -> str:
        return f"categorical {self.form.replace('_', '-')} along axis {self.axis}{_describe_weight(self.weight)}"


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """An output whose every value is an independent yes or no: the divergences of a position's values are summed.

    Args:
        axis: of the values that belong to one position.
        form: whether values are logits or probabilities.
        weight: of this output in the loss.
    """

    axis: int = 1
    form: Literal["logits", "probabilities"] = "logits"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_reading(self, ("logits", "probabilities"))

    def __str__(self) -> str:
        return f"independent {self.form}{_describe_weight(self.weight)}"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """An output of plain numbers, such as pixels, boxes or an embedding.

    Y is Gaussian around the float model's value, with the variance that the channel has over samples and positions:
    half the squared error over that variance, summed over the channels. Values that are infinite in the float model,
    as behind a mask, do not count.

    Args:
        axis: of the channels, each with a variance of its own.
        weight: of this output in the loss.
    """

    axis: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_reading(self)

    def __str__(self) -> str:
        return f"a quantity with channels along axis {self.axis}{_describe_weight(self.weight)}"


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """An output that is not read: it has no part in the loss."""

    def __str__(self) -> str:
        return "ignored"


Reading = Categorical | Bernoulli | Quantity | Ignored
READINGS: Mapping[str, type[Reading]] = {
    kind.__name__.lower(): kind for kind in (Categorical, Bernoulli, Quantity, Ignored)
}
"""The readings by the names that the command line and files have for them."""


@dataclass(frozen=True)
class OutputLoss:
    """The nats that a run loses at all outputs, against the float model.

    With Y drawn from the float model's own outputs, one Y_i for each output, and q the rest of the network, Barber and
    Agakov bound the information about the joint output from below:
    I(L; Y_1, ..., Y_k) >= H(Y_1, ..., Y_k) - E[-log q(Y_1, ..., Y_k | L)]. Given the input, the model draws the Y_i
    independently, so that log q is a sum over the outputs, and against the float model the bound falls by
    sum_i E KL(p_i || q_i). Averaging over positions counts an output once, whatever its size.

    ``readings`` and ``variances`` are those of the outputs in order; a variance is float64 ``[channels]`` for a
    quantity and None otherwise. ``function`` takes the place of all readings where the user gave one.

    Reference:
        "The IM Algorithm: A Variational Approach to Information Maximization", Barber and Agakov, NIPS 2003, Eq. 3.
    """

    readings: tuple[Reading, ...]
    variances: tuple[Tensor | None, ...]
    function: LossFunction | None = None

    def __call__(self, reference: Sequence[Tensor], found: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Sum the nats of all outputs, float64 ``[samples]``; outputs of both runs in order, the same samples."""
        if self.function is not None:
            return _call(self.function, reference, found)
        parts = []
        for part in split_samples(found):
            p, q = (self.encode([x[part] for x in run], temperature) for run in (reference, found))
            parts.append(self.compare(p, q, temperature))
        return torch.cat(parts)

    def encode(self, outputs: Sequence[Tensor], temperature: float = 1.0) -> tuple[Encoded, ...]:
        """Return what :meth:`compare` needs of a run, which may then be compared with several others."""
        return tuple(Encoded(r, x, temperature) for r, x in zip(self.readings, outputs, strict=True))

    def compare(self, reference: Sequence[Encoded], found: Sequence[Encoded], temperature: float = 1.0) -> Tensor:
        """Sum the nats of all outputs of two encoded runs; see :meth:`__call__`. There is no function."""
        total = torch.zeros(reference[0].samples, dtype=torch.float64, device=reference[0].device)
        for nats in self.compare_each(reference, found, temperature):
            total = total + nats
        return total

    def compare_each(
        self, reference: Sequence[Encoded], found: Sequence[Encoded], temperature: float = 1.0
    ) -> tuple[Tensor, ...]:
        """Return the nats of every output times its weight, each float64 ``[samples]``; there is no function."""
        return tuple(
            getattr(reading, "weight", 0.0) * _diverge(reading, p, q, variance, temperature)
            for reading, variance, p, q in zip(self.readings, self.variances, reference, found, strict=True)
        )


def split_samples(outputs: Sequence[Tensor]) -> list[slice]:
    """Return parts of the samples that are compared at once: what they take stays in a processor's cache.

    A sample's nats are the same in every part. Large values are in blocks that C libraries map anew each time.
    """
    samples, values = len(outputs[0]), max(1, *(x[:1].numel() for x in outputs))
    size = max(1, _VALUES_AT_ONCE // values)
    return [slice(start, min(samples, start + size)) for start in range(0, samples, size)]


class Encoded:
    """An output as rows ``[samples, positions, channels]`` of log-probabilities, logits or numbers, float64.

    They are computed when they are first read, and kept.
    """

    def __init__(self, reading: Reading, output: Tensor, temperature: float = 1.0) -> None:
        self.samples, self.device = len(output), output.device
        self._reading, self._output, self._temperature = reading, output, temperature

    @functools.cached_property
    def rows(self) -> Tensor:
        """Log-probabilities for a categorical reading, logits for a Bernoulli one, else the numbers."""
        if isinstance(self._reading, Ignored):
            return self._output.new_zeros(self.samples, 1, 1, dtype=torch.float64)
        rows = _channels_last_rows(self._output.double(), self._reading.axis)
        if isinstance(self._reading, Categorical):
            return _log_softmax(rows, self._reading.form, self._temperature)
        return _logits(rows, self._reading.form) / self._temperature if isinstance(self._reading, Bernoulli) else rows

    @functools.cached_property
    def probabilities(self) -> Tensor:
        """Of a categorical reading."""
        return self.rows.exp()

    @functools.cached_property
    def has_zeros(self) -> bool:
        """Whether a class is impossible somewhere."""
        return bool(self.rows.isneginf().any())


def measure_nats(
    reading: Reading, reference: Tensor, found: Tensor, variance: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Measure the divergence of one output from a reference, in nats, float64 ``[samples]``.

    Args:
        reading: what the output says.
        reference: the output of the model that Y is drawn from, ``[samples, ...]``.
        found: the output of another model for the same samples.
        variance: of a quantity's channels, ``[channels]``.
        temperature: logits are divided by it, and the divergence is multiplied by its square.
    """
    p, q = (Encoded(reading, x, temperature) for x in (reference, found))
    return _diverge(reading, p, q, variance, temperature)


def _diverge(reading: Reading, p: Encoded, q: Encoded, variance: Tensor | None, temperature: float) -> Tensor:
    if isinstance(reading, Ignored):
        return torch.zeros(p.samples, dtype=torch.float64, device=p.device)
    if isinstance(reading, Quantity):
        error = torch.where(torch.isfinite(p.rows), p.rows - q.rows, 0.0)
        nats = error.square() / (2 * _usable_variance(p.rows, variance))
    elif isinstance(reading, Categorical):
        nats = p.probabilities * (p.rows - q.rows)
        if p.has_zeros:
            nats = torch.where(p.rows.isneginf(), 0.0, nats)
        nats = temperature**2 * nats
    else:
        nats = temperature**2 * torch.where(torch.isfinite(p.rows), _bernoulli_nats(p.rows, q.rows), 0.0)
    return nats.sum(-1).mean(1)


def check_metric(metric: Any) -> None:
    """Check that a metric is a function, or None.

    Raises:
        OptionError: it is not.
    """
    if metric is not None and not callable(metric):
        raise OptionError(f"metric={metric!r}; give a function (outputs, labels) -> float, larger is better")


def measure_metric(metric: Metric, outputs: Any, labels: Tensor | None) -> float:
    """Return what the user's metric gives for the outputs of all samples.

    Raises:
        OptionError: that is not a number.
    """
    found: Any = metric(outputs, labels)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        name = getattr(metric, "__name__", type(metric).__name__)
        shown = f"a tensor of {list(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.60}"
        raise OptionError(
            f"the metric {name} returned {shown}; give a function that returns one number, larger is better"
        ) from error


def measure_cross_entropy(reading: Categorical, output: Tensor, labels: Tensor) -> Tensor:
    """Measure the cross-entropy of an output with class labels in nats, averaged over positions, ``[samples]``.

    Args:
        reading: where the classes are.
        output: ``[samples, ...]``.
        labels: int64, the output's shape without the axis of the classes; positions with a label below 0 do not count.
    """
    logits = output.float().movedim(reading.axis, 1)
    if reading.form == "probabilities":
        logits = logits.clamp_min(_SMALLEST_PROBABILITY).log()
    entropy = functional.cross_entropy(logits, labels.clamp_min(0), reduction="none")
    if entropy.ndim == 1:
        return entropy
    counted = (labels >= 0).to(entropy.dtype)
    return (entropy * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)


def draw_log_likelihood(
    reading: Reading, output: Tensor, variance: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Draw Y from an output, and return a scalar whose squared gradients have the Fisher information as their mean.

    The generator is of the CPU. The information is that of the nats averaged over positions, times the output's weight.
    """
    if isinstance(reading, Ignored):
        return output.sum() * 0
    rows = _channels_last_rows(output.float(), reading.axis)
    positions, values = rows.shape[1], rows.detach()
    if isinstance(reading, Categorical):
        log_q = _log_softmax(rows, reading.form, 1.0)
        drawn = torch.multinomial(log_q.detach().exp().flatten(0, 1).cpu(), 1, generator=generator).to(rows.device)
        likelihood = log_q.flatten(0, 1).gather(1, drawn).sum()
    elif isinstance(reading, Bernoulli):
        logits = _logits(rows, reading.form)
        noise = torch.rand(values.shape, generator=generator).to(rows.device)
        drawn = (noise < logits.detach().sigmoid()).to(rows.dtype)
        likelihood = -functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    else:
        deviation = _usable_variance(values, variance).sqrt().to(rows.dtype)
        noise = torch.randn(values.shape, generator=generator).to(rows.device)
        likelihood = (noise * rows / deviation).sum()  # its gradient is that of the Gaussian's log-density at the draw
    return math.sqrt(reading.weight / positions) * likelihood


def describe_reading(reading: Reading) -> dict[str, Any]:
    """Return a reading as plain values, for files."""
    return {"kind": type(reading).__name__.lower(), **asdict(reading)}


def decode_reading(described: Mapping[str, Any]) -> Reading:
    """Return the reading that :func:`describe_reading` described.

    Raises:
        OptionError: it describes none.
    """
    options = dict(described)
    try:
        reading: Reading = READINGS[options.pop("kind")](**options)
    except (KeyError, TypeError) as error:
        raise OptionError(
            f"{described!r} describes no reading of an output; give one of {', '.join(READINGS)}"
        ) from error
    return reading


def _check_reading(reading: Any, forms: Sequence[str] = ()) -> None:
    axis, weight = reading.axis, reading.weight
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise OptionError(f"axis={axis!r} of a reading; give an integer, 1 or more (0 is the axis of the samples)")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise OptionError(f"weight={weight!r} of a reading; give a positive number, or take Ignored()")
    if forms and reading.form not in forms:
        raise OptionError(f"form={reading.form!r} of a reading; give one of {', '.join(map(repr, forms))}")


def _call(function: LossFunction, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """The result of the user's loss, float64 ``[samples]``, on the CPU or wherever the function leaves it."""
    name = getattr(function, "__qualname__", "the function")
    try:
        nats = function(reference, found)
    except Exception as error:
        raise OptionError(f"outputs={name} fails with {type(error).__name__}: {error}; correct the function") from error
    samples = len(reference[0])
    if not isinstance(nats, Tensor) or nats.shape != (samples,):
        given = list(nats.shape) if isinstance(nats, Tensor) else type(nats).__name__
        raise OptionError(f"outputs={name} gives {given} for {samples} samples; return a tensor of nats [samples]")
    if not bool((nats >= -_ROUNDING).all()):
        raise OptionError(f"outputs={name} gives {float(nats.min()):g}; return nats of 0 or more, 0 for equal outputs")
    return nats.double()


def _describe_weight(weight: float) -> str:
    return "" if weight == 1 else f", weight {weight:g}"


def _channels_last_rows(x: Tensor, axis: int) -> Tensor:
    """``[samples, positions, channels]``; an output without channels, ``[samples]``, has one."""
    if x.ndim < 2:
        return x.reshape(len(x), 1, 1)
    return x.movedim(axis, -1).reshape(len(x), -1, x.shape[axis])


def _log_softmax(x: Tensor, form: str, temperature: float) -> Tensor:
    logits = x.clamp_min(_SMALLEST_PROBABILITY).log() if form == "probabilities" else x
    return (logits / temperature).log_softmax(-1)


def _logits(x: Tensor, form: str) -> Tensor:
    if form == "logits":
        return x
    inside = x.clamp(_SMALLEST_PROBABILITY, 1 - torch.finfo(torch.float32).eps / 2)
    return inside.log() - torch.log1p(-inside)


def _bernoulli_nats(p: Tensor, q: Tensor) -> Tensor:
    yes, no = p.sigmoid(), (-p).sigmoid()
    return yes * (functional.logsigmoid(p) - functional.logsigmoid(q)) + no * (
        functional.logsigmoid(-p) - functional.logsigmoid(-q)
    )


def _usable_variance(rows: Tensor, variance: Tensor | None) -> Tensor:
    if variance is None:
        return torch.ones(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    known = variance.to(rows.device, torch.float64)
    return known.clamp_min(max(_NO_VARIANCE, _SMALLEST_VARIANCE * float(known.mean())))
