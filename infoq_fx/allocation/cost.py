"""Costs of an allocation and the limits of a budget, in exact integers: bits, bytes, BitOps and user-defined costs."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from typing import Any, Protocol, TypeAlias

from infoq_fx.core.targets import CHAIN_BYTES, LEVELS_BYTES, MIRROR_BYTES, NODE_BYTES
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.types import (
    CODEBOOK_BITS,
    FLOAT16_BITS,
    FLOAT_BITS,
    MAX_BITS,
    MIN_BITS,
    Budget,
    Cost,
    Inventory,
    Operation,
    QuantSite,
)

__all__ = [
    "COSTS",
    "CostRow",
    "OperationCost",
    "activation_bytes",
    "bound_own_cost",
    "broken_limits",
    "build_cost_row",
    "limits_bitops",
    "measure_cost",
    "operation_bitops",
    "packs_weights",
    "weight_bytes",
]

_SCALE_BYTES = 4


_Products: TypeAlias = Mapping[tuple[str, str], Mapping[tuple[int, int], int]]


class OperationCost(Protocol):
    """A user-defined cost of one operation at the bits of its operands, such as a measured latency.

    The cost of an allocation is the sum over its operations. Numbers are taken as the decimals that they print as, so
    that sums and limits are exact; few digits keep the integer program fast. The cost may depend on the bits in any
    way.
    """

    def __call__(self, operation: Operation, left_bits: int | None, right_bits: int | None, /) -> float:
        """Return a finite number of at least 0, the same for the same arguments.

        Args:
            operation: its ``name`` is the layer's module path, ``macs`` its multiply-accumulates for one sample.
            left_bits: of the weight, or of the first activation of a matrix product; None is float, which the
                bit-width 16 is too.
            right_bits: of the activation that enters, or of the second one of a matrix product; None is float.
        """
        ...


COSTS: dict[str, OperationCost] = {}
"""User-defined costs by name; ``Budget(costs={name: limit})`` limits them."""


@dataclass(frozen=True)
class CostRow:
    """One limit in exact integers: ``sum(linear) + sum(pairs * left bits * right bits) + sum(products) <= limit``.

    ``linear`` is the cost of a (site, bit-width), ``pairs`` the multiply-accumulates that two sites share, ``products``
    the cost of two sites at (left bits, right bits) if it has another form. A cost of 1 is the integer ``unit``.
    """

    limit: int
    linear: Mapping[tuple[str, int], int]
    pairs: Mapping[tuple[str, str], int]
    products: _Products = field(default_factory=dict)
    unit: int = 1

    @property
    def grows_with_bits(self) -> bool:
        """Whether no site costs more at fewer bits; False if there are any ``products``, which are not examined."""
        by_site: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for (site, bits), cost in self.linear.items():
            by_site[site].append((bits, cost))
        rising = all(a[1] <= b[1] for held in by_site.values() for a, b in itertools.pairwise(sorted(held)))
        return rising and not self.products

    @property
    def least(self) -> int:
        """A lower bound on the cost of every allocation: the sum of each site's and each product's least cost."""
        low: dict[object, int] = {}
        for (site, _), cost in self.linear.items():
            low[site] = min(cost, low.get(site, cost))
        return sum(low.values()) + sum(min(table.values()) for table in self.products.values())


def weight_bytes(site: QuantSite, bits: int, *, is_packed: bool = True) -> int:
    """Return the bytes of a weight at ``bits``, with its scales (float32, one per channel or one in all).

    Levels of a codebook take a byte each, and channels that may be mirrored a bit. A weight of 16 bits, in float16,
    has no scales. A weight of fewer than 8 bits takes a byte a value where it is so small that the operators that
    unpack it take more than packing saves.

    Args:
        site: of the weight.
        bits: its bit-width.
        is_packed: whether the file packs weights, see :func:`packs_weights`.
    """
    if bits == FLOAT16_BITS:
        return _packed_bytes(site.numel, bits)
    channels = _count_channels(site)
    if not is_packed or _saved_bytes(site, bits) <= 0:
        return _packed_bytes(site.numel, max(bits, MAX_BITS)) + _SCALE_BYTES * channels
    return _packed_bytes(site.numel, bits) + _SCALE_BYTES * channels + _level_bytes(site, bits)


def packs_weights(inventory: Inventory) -> bool:
    """Return whether weights of few bits take less in a file: not in a network of a few hundred weights.

    The operators that unpack the weights of one bit-width then take more than packing all of them saves.
    """
    saved = (_saved_bytes(site, MIN_BITS) for site in inventory.sites if site.kind == "weight")
    return sum(max(0, each) for each in saved) > CHAIN_BYTES


def activation_bytes(site: QuantSite, bits: int) -> int:
    """Return the bytes of one sample's activation packed at ``bits``."""
    return _packed_bytes(site.numel, bits)


def operation_bitops(operation: Operation, left_bits: int | None, right_bits: int | None) -> int:
    """Return multiply-accumulates times the bits of both operands, for one sample; None is an operand in float32.

    Reference:
        InfoQ, Eq. 2.
    """
    left = FLOAT_BITS if left_bits is None else left_bits
    right = FLOAT_BITS if right_bits is None else right_bits
    return operation.macs * left * right


def measure_cost(inventory: Inventory, bits: Mapping[str, int], names: Iterable[str] = ()) -> Cost:
    """Compute the cost of an allocation, in every unit.

    A model without quantized weights has ``weight_bits`` 32 and ``compression`` 1.

    Args:
        inventory: of the prepared model.
        bits: bit-width by site name, for all sites.
        names: costs in :data:`COSTS` to compute as well.

    Returns:
        The costs in the units of :class:`~infoq_fx.types.Budget`; both ratios are correctly rounded quotients
        of exact integers.

    Raises:
        OptionError: a site has no bit-width, an operation names a site that the inventory lacks, or a
            user-defined cost is unknown or not a number.
    """
    weights = [site for site in inventory.sites if site.kind == "weight"]
    activations = [site for site in inventory.sites if site.kind == "activation" and site.is_searched]
    numel = sum(site.numel for site in weights)
    total_bits = sum(site.numel * _look_up(bits, site.name) for site in weights)
    float_bits = FLOAT_BITS * (numel + inventory.ignored_weights)
    stored_bits = total_bits + FLOAT_BITS * inventory.ignored_weights
    is_packed = packs_weights(inventory)
    return Cost(
        weight_bits=total_bits / numel if numel else float(FLOAT_BITS),
        compression=float_bits / stored_bits if stored_bits else 1.0,
        size_bytes=sum(weight_bytes(site, bits[site.name], is_packed=is_packed) for site in weights)
        + inventory.float_bytes,
        bitops=sum(
            operation_bitops(operation, _operand_bits(bits, operation.left), _operand_bits(bits, operation.right))
            for operation in inventory.operations
        ),
        activation_bytes=sum(activation_bytes(site, _look_up(bits, site.name)) for site in activations),
        costs={name: float(_measure_own(inventory, bits, name)) for name in names},
    )


def build_cost_row(
    inventory: Inventory,
    name: str,
    limit: float,
    choices: Mapping[str, tuple[int, ...]],
) -> CostRow:
    """Build the row of one limit of the budget over the sites that have several choices.

    The cost of all other sites is subtracted from the limit. The costs of tied sites are added up under the first site
    of their tie; a product of two of them depends on its bits alone.

    Args:
        inventory: of the prepared model.
        name: of the limit, a field of :class:`~infoq_fx.types.Budget` or one of its ``costs``.
        limit: its value.
        choices: candidate bit-widths of each site, for all sites but those tied to an earlier one.
    """
    if name not in Budget.__dataclass_fields__:
        return _build_own_row(inventory, name, limit, choices)
    costs: defaultdict[tuple[str | None, int], int] = defaultdict(int)
    pairs: defaultdict[tuple[str, str], int] = defaultdict(int)
    if name == "bitops":
        _count_bitops(inventory, choices, costs, pairs)
    else:
        kind, measure = _SITE_COSTS[name]
        if name == "size_bytes":
            measure = functools.partial(weight_bytes, is_packed=packs_weights(inventory))
        leaders = inventory.leaders
        for site in inventory.sites:
            if site.kind == kind and (site.is_searched or kind == "weight"):
                for b in choices[leaders[site.name]]:
                    costs[leaders[site.name], b] += measure(site, b)
    linear: dict[tuple[str, int], int] = {}
    remaining = _integer_limit(inventory, name, limit)
    for (site_name, b), cost in costs.items():
        if site_name is None or len(choices[site_name]) == 1:
            remaining -= cost
        else:
            linear[site_name, b] = cost
    return CostRow(remaining, linear, pairs)


def broken_limits(cost: Cost, budget: Budget) -> list[str]:
    """Return the names of the limits that a cost does not meet.

    Costs are correctly rounded, as a limit written as a decimal is: 33 bits in 10 weights meet 3.3.
    """
    return [
        name
        for name, limit in budget.limits.items()
        if (cost[name] < limit if name == "compression" else cost[name] > limit)
    ]


def limits_bitops(*budgets: object) -> bool:
    """Return whether one of some budgets, or what else was given as one, limits BitOps."""
    return any(isinstance(budget, Budget) and budget.bitops is not None for budget in budgets)


def bound_own_cost(row: CostRow, limit: float) -> float:
    """Return a lower bound on a user-defined cost, at any bits, from its row and the limit that it was built for."""
    return float(Fraction(_largest_rounded(limit, row.unit) - row.limit + row.least, row.unit))


_SITE_COSTS: Mapping[str, tuple[str, Callable[[QuantSite, int], int]]] = {
    "weight_bits": ("weight", lambda site, bits: site.numel * bits),
    "compression": ("weight", lambda site, bits: site.numel * bits),
    "size_bytes": ("weight", weight_bytes),
    "activation_bytes": ("activation", activation_bytes),
}


def _saved_bytes(site: QuantSite, bits: int) -> int:
    """What packing a weight saves beside a byte a value, less its own operators."""
    nodes = NODE_BYTES
    if bits <= CODEBOOK_BITS:
        nodes += {"uniform": 0, "mirrored": MIRROR_BYTES, "codebook": LEVELS_BYTES}[site.levels]
    return site.numel - _packed_bytes(site.numel, bits) - nodes - _level_bytes(site, bits)


def _level_bytes(site: QuantSite, bits: int) -> int:
    """Bytes of a codebook's levels, or of a bit for each channel that may be mirrored."""
    if bits > CODEBOOK_BITS or site.levels == "uniform":
        return 0
    return 1 << bits if site.levels == "codebook" else _packed_bytes(_count_channels(site), 1)


def _count_channels(site: QuantSite) -> int:
    return 1 if site.channel_axis is None else site.shape[site.channel_axis]


def _packed_bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def _operand_bits(bits: Mapping[str, int], name: str | None) -> int | None:
    return None if name is None else _look_up(bits, name)


def _look_up(bits: Mapping[str, int], name: str) -> int:
    if name not in bits:
        raise unknown_name_error("site without bits", name, bits)
    return bits[name]


def _lead_operands(inventory: Inventory) -> Iterator[tuple[Operation, str | None, str | None]]:
    """Every operation with its operands, tied sites as the first of their tie."""
    leaders = inventory.leaders
    for operation in inventory.operations:
        left, right = (None if side is None else leaders.get(side, side) for side in (operation.left, operation.right))
        yield operation, left, right


def _count_bitops(
    inventory: Inventory,
    choices: Mapping[str, tuple[int, ...]],
    costs: dict[tuple[str | None, int], int],
    pairs: dict[tuple[str, str], int],
) -> None:
    for operation, left, right in _lead_operands(inventory):
        lefts = (FLOAT_BITS,) if left is None else choices[left]
        rights = (FLOAT_BITS,) if right is None else choices[right]
        if left is not None and left == right:
            for b in lefts:
                costs[left, b] += operation_bitops(operation, b, b)
        elif left is not None and right is not None and len(lefts) > 1 and len(rights) > 1:
            pairs[min(left, right), max(left, right)] += operation.macs
        elif len(rights) == 1:
            for b in lefts:
                costs[left, b] += operation_bitops(operation, b, rights[0])
        else:
            for b in rights:
                costs[right, b] += operation_bitops(operation, lefts[0], b)


def _integer_limit(inventory: Inventory, name: str, limit: float) -> int:
    """The largest integer total that meets a limit, in the units of the row: bits, bytes or BitOps."""
    numel = sum(site.numel for site in inventory.sites if site.kind == "weight")
    ignored_bits = FLOAT_BITS * inventory.ignored_weights
    float_bits = FLOAT_BITS * numel + ignored_bits
    if name == "weight_bits":
        return _largest(math.floor(numel * Fraction(limit)), lambda total: total / numel <= limit)
    if name == "compression":
        return (
            _largest(math.floor(float_bits / Fraction(limit)), lambda total: float_bits / total >= limit) - ignored_bits
        )
    return math.floor(limit) - (inventory.float_bytes if name == "size_bytes" else 0)


def _largest(start: int, fits: Callable[[int], bool]) -> int:
    while not fits(start):
        start -= 1
    while fits(start + 1):
        start += 1
    return start


def _measure_own(inventory: Inventory, bits: Mapping[str, int], name: str) -> Fraction:
    operands = ((op, _operand_bits(bits, op.left), _operand_bits(bits, op.right)) for op in inventory.operations)
    return sum((_evaluate(name, *given) for given in operands), Fraction(0))


def _evaluate(name: str, operation: Operation, left_bits: int | None, right_bits: int | None) -> Fraction:
    """A user-defined cost as the exact decimal that it prints as."""
    if name not in COSTS:
        raise OptionError(
            f"Budget limits {name!r}, which is not a known cost; put a function (operation, left_bits, right_bits) -> "
            f"cost into infoq_fx.COSTS[{name!r}] first"
        )
    left, right = (None if bits == FLOAT16_BITS else bits for bits in (left_bits, right_bits))
    value: Any = COSTS[name](operation, left, right)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise OptionError(
            f"cost {name!r} is {value!r} for {operation.name!r} at {left_bits} and {right_bits} bits; return a finite "
            "number of at least 0"
        )
    return Fraction(str(float(value)))


def _build_own_row(inventory: Inventory, name: str, limit: float, choices: Mapping[str, tuple[int, ...]]) -> CostRow:
    """The row of a user-defined cost, in the largest unit that all its numbers are multiples of."""
    constant = Fraction(0)
    linear: defaultdict[tuple[str, int], Fraction] = defaultdict(Fraction)
    products: dict[tuple[str, str], defaultdict[tuple[int, int], Fraction]] = {}
    for operation, left, right in _lead_operands(inventory):
        lefts = (None,) if left is None else choices[left]
        rights = (None,) if right is None else choices[right]
        table: dict[tuple[Any, Any], Fraction]
        if left is not None and left == right:
            table = {(b, b): _evaluate(name, operation, b, b) for b in choices[left]}
        else:
            table = {(i, j): _evaluate(name, operation, i, j) for i in lefts for j in rights}
        if left is not None and right is not None and left != right and len(lefts) > 1 and len(rights) > 1:
            key = min(left, right), max(left, right)
            held = products.setdefault(key, defaultdict(Fraction))
            for (i, j), cost in table.items():
                held[(i, j) if key[0] == left else (j, i)] += cost
        elif len(lefts) > 1 or len(rights) > 1:
            for (i, j), cost in table.items():
                site, b = (left, i) if len(lefts) > 1 else (right, j)
                linear[str(site), int(b or 0)] += cost
        else:
            constant += sum(table.values())
    for key in [key for key, held in products.items() if _is_separable(held)]:
        held = products.pop(key)
        first, second = min(held)
        for (i, j), cost in held.items():
            if j == second:
                linear[key[0], i] += cost
            if i == first:
                linear[key[1], j] += cost - held[first, second]
    values = [constant, *linear.values(), *(cost for held in products.values() for cost in held.values())]
    unit = math.lcm(*(value.denominator for value in values))
    return CostRow(
        _largest_rounded(limit, unit) - int(constant * unit),
        {key: int(cost * unit) for key, cost in linear.items()},
        {},
        {key: {bits: int(cost * unit) for bits, cost in held.items()} for key, held in products.items()},
        unit,
    )


def _is_separable(table: Mapping[tuple[int, int], Fraction]) -> bool:
    """Whether a cost of two sites is a sum of one cost of each."""
    first, second = min(table)
    return all(c - table[first, j] - table[i, second] + table[first, second] == 0 for (i, j), c in table.items())


def _largest_rounded(limit: float, unit: int) -> int:
    """The largest total, in 1 / ``unit``, whose rounded value meets the limit."""
    exact = Fraction(limit)
    total = math.floor((exact + (Fraction(math.nextafter(limit, math.inf)) - exact) / 2) * unit)
    while float(Fraction(total, unit)) > limit:
        total -= 1
    return total
