"""The frozen dataclasses that the stages pass to each other: sites, qparams, scores, budgets, allocations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from infoq_fx.core.tabular import align_rows, describe_ties, format_with_error, html_table
from infoq_fx.errors import OptionError, unknown_name_error

if TYPE_CHECKING:  # budgets and allocations are read and made without torch
    import torch

__all__ = [
    "BASELINE_BITS",
    "CODEBOOK_BITS",
    "FLOAT16_BITS",
    "FLOAT_BITS",
    "LARGEST_LEVEL",
    "MAX_BITS",
    "MIN_BITS",
    "Allocation",
    "Budget",
    "Cost",
    "Inventory",
    "MeasuredLoss",
    "Measurement",
    "Operation",
    "Plain",
    "QParams",
    "QuantSite",
    "QuantSpec",
    "RoundedWeight",
    "Score",
    "WeightLevels",
    "check_bits",
]

Plain = str | int | float | bool | None
"""A value of a measurement's settings; JSON stores it unchanged."""

MIN_BITS = 2
MAX_BITS = 8
BASELINE_BITS = 8
FLOAT16_BITS = 16
"""The candidate that is no integer: a weight in float16, an activation in float."""
FLOAT_BITS = 32
CODEBOOK_BITS = 6
"""The largest bit-width of a weight with a codebook; more levels are nearly uniform."""
LARGEST_LEVEL = 63
"""The largest size of a codebook's levels: 16-bit sums of two products with 8-bit activations do not overflow."""

WeightLevels = Literal["uniform", "mirrored", "codebook"]
"""The integers of a weight: all of its bit-width; these, or in some channels their negatives; or chosen ones."""


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized: bit-width, symmetric or affine, per channel or per tensor.

    Invariants: ``quant_min <= q <= quant_max`` and ``x ~ (q - zero_point) * scale``. Symmetric means signed
    integers with ``zero_point == 0``; affine means unsigned integers. ``channel_axis`` is the axis along which
    each slice has its own scale; None means one scale for the whole tensor.

    With 16 bits the tensor stays in float: a weight is stored in float16, in units of its scale, and an activation is
    not changed.

    With ``has_codebook`` the integers are any ``2**bits`` levels from -63 to 63, see :attr:`QParams.levels`. With
    ``has_signs`` the scale of a channel may be negative: its range is mirrored, at 3 bits from -3 to 4 in place of -4
    to 3.
    """

    bits: int
    symmetric: bool
    channel_axis: int | None = None
    has_codebook: bool = False
    has_signs: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays in float."""
        return self.bits == FLOAT16_BITS

    @property
    def quant_min(self) -> int:
        """Smallest integer: ``-2**(bits-1)`` when symmetric, else 0; -63 with a codebook."""
        if self.has_codebook:
            return -LARGEST_LEVEL
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """Largest integer: ``2**(bits-1) - 1`` when symmetric, else ``2**bits - 1``; 63 with a codebook."""
        if self.has_codebook:
            return LARGEST_LEVEL
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclass(frozen=True)
class QParams:
    """Quantization parameters of a tensor: scale and zero point under ``spec``.

    ``scale`` is float32, of shape ``[channels]`` (per channel) or ``[]`` (per tensor), positive, or
    negative where the spec allows signs;
    ``zero_point`` is int32 of the same shape, within ``quant_min`` and ``quant_max``. ``levels`` are the integers of a
    codebook, int8 ``[2**bits]`` in ascending order; None for all integers from ``quant_min`` to ``quant_max``.
    """

    spec: QuantSpec
    scale: torch.Tensor
    zero_point: torch.Tensor
    levels: torch.Tensor | None = None


@dataclass(frozen=True)
class RoundedWeight:
    """A weight rounded to integers: ``q`` is int8 of the weight's shape, in the range of ``qparams.spec``."""

    q: torch.Tensor
    qparams: QParams


@dataclass(frozen=True)
class QuantSite:
    """One tensor, weight or activation, with its own bit-width.

    ``shape`` is the weight's shape, or the activation's shape without its batch dimension. ``bits`` are the
    candidate bit-widths, ascending, 16 for float; a single candidate is a fixed bit-width. ``is_searched`` is False for
    tensors that are quantized only so that integer kernels fuse (operands of residual additions, outputs of
    convolutions): they stay at 8 bits and have no score. Whatever its bit-width, a site is in float where one of those
    in ``follows`` is: for such a tensor an operand of the convolution that makes it, the same tensor as another layer
    reads it, or the other operand and the sum of the addition that alone reads it; for the input of a single layer its
    weight; for the second operand of a product the first. ``levels`` are the integers that a weight of up to
    :data:`CODEBOOK_BITS` bits may have.
    """

    name: str
    kind: Literal["weight", "activation"]
    shape: tuple[int, ...]
    bits: tuple[int, ...]
    channel_axis: int | None = None
    is_searched: bool = True
    follows: tuple[str, ...] = ()
    levels: WeightLevels = "uniform"

    @property
    def numel(self) -> int:
        """Number of elements of the weight, or of the activation for one sample."""
        return math.prod(self.shape)

    @property
    def baseline_bits(self) -> int:
        """Bit-width in the baseline that other sites are measured in: 8, or 16 for a site that is fixed there."""
        return FLOAT16_BITS if min(self.bits) > MAX_BITS else BASELINE_BITS


@dataclass(frozen=True)
class Operation:
    """The multiply-accumulates (MACs) of one node for one sample, and the sites of its two operands.

    ``left`` is the weight where there is one. An operand that is None is not quantized and counts 32 bits.
    """

    name: str
    macs: int
    left: str | None
    right: str | None


@dataclass(frozen=True)
class Inventory:
    """The sites and operations of a prepared model: all that costs are computed from.

    ``sites`` are in graph order. ``float_bytes`` is the size of every parameter and buffer that stays float32
    (biases, norms, ignored layers). ``ignored_weights`` is the number of weights that stay in float: those of
    ignored layers, and parameters of two or more dimensions that no layer multiplies (position embeddings). ``ties``
    are groups of weight sites that get one bit-width; the sites of a group have the same candidates.

    Raises:
        OptionError: a tie holds fewer than two sites, one that is in another tie or is no weight of the inventory, or
            sites with different candidates.
    """

    sites: tuple[QuantSite, ...]
    operations: tuple[Operation, ...]
    float_bytes: int
    ignored_weights: int = 0
    ties: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        candidates = {site.name: site.bits for site in self.sites if site.kind == "weight"} if self.ties else {}
        tied = [name for tie in self.ties for name in tie]
        for tie in self.ties:
            for name in tie:
                if name not in candidates:
                    raise unknown_name_error("weight in ties", name, candidates)
            if len(tie) < 2 or len({candidates[name] for name in tie}) > 1 or any(tied.count(name) > 1 for name in tie):
                found = ", ".join(f"{name!r} with {candidates[name]}" for name in tie)
                raise OptionError(
                    f"the tie of {found or 'no site'} is not one of several weights with equal candidates, each in one "
                    "tie; correct it, or let prepare(tie=...) make it"
                )

    def __getitem__(self, name: str) -> QuantSite:
        return {site.name: site for site in self.sites}[name]

    def complete_floats(self, bits: Mapping[str, int]) -> dict[str, int]:
        """Return the bit-widths with 16 for all sites that follow one in float, whatever their own bit-width is.

        Sites that are not named and are fixed at 16 bits count as in float too.
        """
        completed = {**{site.name: FLOAT16_BITS for site in self.sites if min(site.bits) > MAX_BITS}, **bits}
        grown = True
        while grown:
            in_float = {name for name, width in completed.items() if width == FLOAT16_BITS}
            grown = False
            for site in self.sites:
                if site.name not in in_float and not in_float.isdisjoint(site.follows):
                    completed[site.name], grown = FLOAT16_BITS, True
        return completed

    @property
    def levels(self) -> WeightLevels:
        """The integers that weights of few bits may have."""
        return next((site.levels for site in self.sites if site.kind == "weight"), "uniform")

    @property
    def leaders(self) -> dict[str, str]:
        """The first site of the tie that each site is in, or the site itself."""
        first = {name: tie[0] for tie in self.ties for name in tie}
        return {site.name: first.get(site.name, site.name) for site in self.sites}

    def spread(self, bits: Mapping[str, int]) -> dict[str, int]:
        """Return the bits of every site, from those of the first site of each tie."""
        return {name: bits[leader] for name, leader in self.leaders.items()}


@dataclass(frozen=True)
class Score:
    """Sensitivity of one (site, bit-width): smaller is less sensitive; unit and meaning depend on the criterion."""

    value: float
    standard_error: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """What a criterion measured for one (site, bit-width), as named numbers."""

    site: str
    bits: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on the cost of an allocation: one or several, all upper limits but ``compression``, a lower limit.

    Args:
        weight_bits: mean bit-width over the weights of all quantized layers.
        compression: float32 bits over bits of all weights (the paper's W-C); those that stay in float, as of
            ignored layers, count 32 bits.
        size_bytes: bytes of everything the model stores: weights packed at their bit-widths, as container ``"exact"``
            stores them (a byte each where they are too few for that), their scales (4 bytes per channel) and all
            other parameters (biases and ignored layers, 4 bytes each). A file stores most scales and biases in less,
            and has the graph besides; :func:`infoq_fx.summarize` says both for a file.
        bitops: sum over multiply-accumulates of weight bits times activation bits, for one sample (Eq. 2); a tensor
            left in float by the bit-width 16 counts 16 bits, one that is not quantized at all 32.
        activation_bytes: sum of the bytes of all searched activation sites, for one sample.
        costs: limits on user-defined costs, by their names in :data:`infoq_fx.COSTS`, each in its own unit.

    Raises:
        OptionError: there is no limit, or a limit is not a positive finite number.
    """

    weight_bits: float | None = None
    compression: float | None = None
    size_bytes: float | None = None
    bitops: float | None = None
    activation_bytes: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        limits = self.limits
        for name in self.costs:
            if name in self.__dataclass_fields__:
                raise OptionError(f"Budget(costs={{{name!r}: ...}}) names a built-in limit; give Budget({name}=...)")
        if not limits:
            names = ", ".join(f.name for f in fields(self) if f.name != "costs")
            raise OptionError(f"Budget() has no limit; give at least one of {names}")
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise OptionError(f"Budget({name}={value!r}) is not a number; give one above 0")
            if not math.isfinite(value) or value <= 0:
                raise OptionError(f"Budget({name}={value!r}) is not a valid limit; give a positive finite number")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "costs"}
        return {**{name: value for name, value in given.items() if value is not None}, **self.costs}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.limits.items())


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of an allocation, in the units of :class:`Budget`; ``costs`` holds the user-defined costs it limits."""

    weight_bits: float
    compression: float
    size_bytes: int
    bitops: int
    activation_bytes: int
    costs: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __getitem__(self, name: str) -> float:
        value: float = self.costs[name] if name in self.costs else getattr(self, name)
        return value


@dataclass(frozen=True, kw_only=True)
class MeasuredLoss:
    """What an allocation loses on validation samples, with recovered weights, and what the next smaller one loses.

    Args:
        measure: what ``value``, its error and ``limit`` count: ``"drop"`` points of the metric below the float model's,
            ``"nats"`` lost at the outputs per sample, ``"sqnr_db"`` the SQNR in dB, of which more is better.
        limit: the tolerance.
        value: measured.
        standard_error: of the value, from paired differences over samples; None if not known.
        samples: number of validation samples.
        metric: name of the metric of a drop, such as ``"top-1"``.
        smaller_value: of the next smaller allocation that was tried and failed; None if there is none. Its error is
            ``smaller_error``.
    """

    measure: Literal["drop", "nats", "sqnr_db"]
    limit: float
    value: float
    standard_error: float | None
    samples: int
    metric: str = ""
    smaller_value: float | None = None
    smaller_error: float | None = None

    @property
    def passes(self) -> bool:
        """Whether the value is within the tolerance."""
        return self.value >= self.limit if self.measure == "sqnr_db" else self.value <= self.limit

    def describe(self) -> str:
        """Return the value with its error and unit."""
        shown = format_with_error(self.value, self.standard_error)
        if self.measure == "sqnr_db":
            return f"has an SQNR of {shown} dB"
        of_drop = "points of top-1" if self.metric == "top-1" else f"of {self.metric}"
        return f"loses {shown} {'nats a sample' if self.measure == 'nats' else of_drop}"

    def __str__(self) -> str:
        text = f"{self.describe()} on {self.samples} samples"
        if self.smaller_value is None:
            return text
        verb = "has" if self.measure == "sqnr_db" else "loses"
        return f"{text}; the next smaller {verb} {format_with_error(self.smaller_value, self.smaller_error)}"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A bit-width for every site, and how it was found.

    ``bits`` maps every site to its bit-width. ``score`` is the objective of Eq. 5 and ``standard_error`` its error.
    ``uniform_*`` describe the best uniform weight bit-width that fits the same budget (None: none fits), scored
    by the same table. ``lost_nats`` is the information lost at the output with all sites at their bits, if it was
    measured (with weights as they were scored). ``recovered_by`` names the recovery steps behind the parameters of
    the model that it was read from. ``scored_for`` is the recovery that its scores were measured for, ``"none"`` for
    weights rounded to nearest, None if that does not matter or is not known. ``ties`` are the groups of sites that were
    given one bit-width. ``loss`` is what it lost on validation samples, if it was found for a
    :class:`infoq_fx.Tolerance`. Fields other than ``bits`` are None or empty when the allocation was read back from a
    graph alone.
    """

    bits: Mapping[str, int]
    criterion: str | None = None
    budget: Budget | None = None
    score: float | None = None
    standard_error: float | None = None
    cost: Cost | None = None
    uniform_bits: int | None = None
    uniform_score: float | None = None
    lost_nats: float | None = None
    recovered_by: tuple[str, ...] = ()
    scored_for: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    loss: MeasuredLoss | None = None

    def __str__(self) -> str:
        return "\n".join([self._describe(), *align_rows(self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(self._describe(), self._rows(), self._notes())

    def _describe(self) -> str:
        found = "" if self.criterion is None else f" by {self.criterion!r}"
        within = "" if self.budget is None else f" within {self.budget}"
        return f"bit-widths{found}{within}"

    def _rows(self) -> list[list[str]]:
        # Sites without a score are fixed; where none has one, all are shown.
        rows = [["site", "bits", "score", "± error"]]
        for name in self.scores or self.bits:
            score = self.scores.get(name)
            found = ["-", "-"] if score is None else [f"{score.value:.3g}", f"{score.standard_error:.2g}"]
            rows.append([name, str(self.bits[name]), *found])
        return rows

    def _notes(self) -> list[str]:
        notes = []
        if fixed := len(self.bits) - len(self.scores) if self.scores else 0:
            notes.append(f"and {fixed} sites at fixed bits")
        notes += describe_ties(self.ties)
        if self.cost is not None:
            notes.append(f"{self.cost.weight_bits:.3g} bits a weight, {self.cost.size_bytes:,} bytes")
        if self.score is not None:
            notes.append(f"score {self.score:.4g} ± {self.standard_error or 0.0:.2g}")
        if self.loss is not None:
            notes.append(str(self.loss))
        return notes


def check_bits(bits: Any, option: str) -> tuple[int, ...]:
    """Return candidate bit-widths as an ascending tuple without repeats.

    Raises:
        OptionError: there are none, or one is neither an integer from 2 to 8 nor 16 (float).
    """
    given = tuple(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else (bits,)
    known = f"integers from {MIN_BITS} to {MAX_BITS}, or {FLOAT16_BITS} for float"
    if not given:
        raise OptionError(f"{option} is empty; give {known}")
    for value in given:
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if not (is_integer and (MIN_BITS <= value <= MAX_BITS or value == FLOAT16_BITS)):
            raise OptionError(f"{option} holds {value!r}; give {known}")
    return tuple(sorted({int(value) for value in given}))
