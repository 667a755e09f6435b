"""What bit-widths cost, and what a budget leaves for them: bytes and BitOps in exact integers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from infoq_fx.errors import unknown_name_error
from infoq_fx.spec import FLOAT_BITS, Budget, Cost, Inventory, Operation, QuantSite
from infoq_fx.targets import find_container

__all__ = [
    "CostRow",
    "activation_bytes",
    "broken_limits",
    "build_cost_row",
    "measure_cost",
    "operation_bitops",
    "weight_bytes",
]

_SCALE_BYTES = 4


@dataclass(frozen=True)
class CostRow:
    """One limit in exact integers: ``sum(linear) + sum(pairs * left bits * right bits) <= limit``.

    ``linear`` is the cost of a (site, bit-width), ``pairs`` the multiply-accumulates that two sites share.
    """

    limit: int
    linear: Mapping[tuple[str, int], int]
    pairs: Mapping[tuple[str, str], int]


def weight_bytes(site: QuantSite, bits: int) -> int:
    """Bytes of a weight packed at ``bits``, with its scales (float32, one a channel or one in all)."""
    channels = 1 if site.channel_axis is None else site.shape[site.channel_axis]
    return _packed_bytes(site.numel, bits) + _SCALE_BYTES * channels


def activation_bytes(site: QuantSite, bits: int) -> int:
    """Bytes of one sample's activation packed at ``bits``."""
    return _packed_bytes(site.numel, bits)


def operation_bitops(operation: Operation, left_bits: int | None, right_bits: int | None) -> int:
    """Multiply-accumulates times the bits of both operands, one sample; None is an operand in float.

    Reference:
        InfoQ, Eq. 2.
    """
    left = FLOAT_BITS if left_bits is None else left_bits
    right = FLOAT_BITS if right_bits is None else right_bits
    return operation.macs * left * right


def measure_cost(inventory: Inventory, bits: Mapping[str, int], container: str | None = None) -> Cost:
    """Every cost of giving each site its bits.

    A model without quantized weights stays as it is: ``weight_bits`` 32 and ``compression`` 1.

    Args:
        inventory: what the prepared model holds.
        bits: bit-width by site name, for all sites.
        container: count weights as this container stores them; None counts their own bits. BitOps stay those of the
            bit-widths.

    Returns:
        The costs in the units of :class:`~infoq_fx.spec.Budget`; both ratios are correctly rounded quotients
        of exact integers.

    Raises:
        OptionError: a site has no bit-width, an operation names a site that the inventory lacks, or an unknown
            container.
    """
    stored = _stored_bits(container)
    weights = [site for site in inventory.sites if site.kind == "weight"]
    activations = [site for site in inventory.sites if site.kind == "activation" and site.is_searched]
    numel = sum(site.numel for site in weights)
    total_bits = sum(site.numel * stored(_look_up(bits, site.name)) for site in weights)
    float_bits = FLOAT_BITS * (numel + inventory.ignored_weights)
    stored_bits = total_bits + FLOAT_BITS * inventory.ignored_weights
    return Cost(
        weight_bits=total_bits / numel if numel else float(FLOAT_BITS),
        compression=float_bits / stored_bits if stored_bits else 1.0,
        size_bytes=sum(weight_bytes(site, stored(bits[site.name])) for site in weights) + inventory.float_bytes,
        bitops=sum(
            operation_bitops(operation, _operand_bits(bits, operation.left), _operand_bits(bits, operation.right))
            for operation in inventory.operations
        ),
        activation_bytes=sum(activation_bytes(site, _look_up(bits, site.name)) for site in activations),
    )


def build_cost_row(
    inventory: Inventory,
    name: str,
    limit: float,
    choices: Mapping[str, tuple[int, ...]],
    container: str | None = None,
) -> CostRow:
    """A limit of the budget as a row over the sites that have several choices.

    What all the others cost is taken off the limit.

    Args:
        inventory: what the prepared model holds.
        name: the limit, a field of :class:`~infoq_fx.spec.Budget`.
        limit: its value.
        choices: bit-widths open to each site, for all sites.
        container: as for :func:`measure_cost`.
    """
    stored = _stored_bits(container)
    costs: defaultdict[tuple[str | None, int], int] = defaultdict(int)
    pairs: defaultdict[tuple[str, str], int] = defaultdict(int)
    if name == "bitops":
        _count_bitops(inventory, choices, costs, pairs)
    else:
        kind, measure = _SITE_COSTS[name]
        for site in inventory.sites:
            if site.kind == kind and (site.is_searched or kind == "weight"):
                width = stored if kind == "weight" else int
                costs.update({(site.name, b): measure(site, width(b)) for b in choices[site.name]})
    linear: dict[tuple[str, int], int] = {}
    remaining = _integer_limit(inventory, name, limit)
    for (site_name, b), cost in costs.items():
        if site_name is None or len(choices[site_name]) == 1:
            remaining -= cost
        else:
            linear[site_name, b] = cost
    return CostRow(remaining, linear, pairs)


def broken_limits(cost: Cost, budget: Budget) -> list[str]:
    """Names of the limits that a cost does not meet.

    Costs are correctly rounded, as a limit that someone wrote down is: 33 bits in 10 weights meet 3.3.
    """
    return [
        name
        for name, limit in budget.limits.items()
        if (getattr(cost, name) < limit if name == "compression" else getattr(cost, name) > limit)
    ]


_SITE_COSTS: Mapping[str, tuple[str, Callable[[QuantSite, int], int]]] = {
    "weight_bits": ("weight", lambda site, bits: site.numel * bits),
    "compression": ("weight", lambda site, bits: site.numel * bits),
    "size_bytes": ("weight", weight_bytes),
    "activation_bytes": ("activation", activation_bytes),
}


def _stored_bits(container: str | None) -> Callable[[int], int]:
    return int if container is None else find_container(container).stored_bits


def _packed_bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def _operand_bits(bits: Mapping[str, int], name: str | None) -> int | None:
    return None if name is None else _look_up(bits, name)


def _look_up(bits: Mapping[str, int], name: str) -> int:
    if name not in bits:
        raise unknown_name_error("site without bits", name, bits)
    return bits[name]


def _count_bitops(
    inventory: Inventory,
    choices: Mapping[str, tuple[int, ...]],
    costs: dict[tuple[str | None, int], int],
    pairs: dict[tuple[str, str], int],
) -> None:
    for operation in inventory.operations:
        left, right = operation.left, operation.right
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
    """The largest whole total that meets a limit, in the units of the row: bits, bytes or BitOps."""
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
