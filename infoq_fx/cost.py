"""What bit-widths cost: bytes and BitOps in exact integers."""

from __future__ import annotations

from collections.abc import Mapping

from infoq_fx.errors import unknown_name_error
from infoq_fx.spec import FLOAT_BITS, Cost, Inventory, Operation, QuantSite

__all__ = ["activation_bytes", "measure_cost", "operation_bitops", "weight_bytes"]

_SCALE_BYTES = 4


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


def measure_cost(inventory: Inventory, bits: Mapping[str, int]) -> Cost:
    """Every cost of giving each site its bits.

    A model without quantized weights stays as it is: ``weight_bits`` 32 and ``compression`` 1.

    Args:
        inventory: what the prepared model holds.
        bits: bit-width by site name, for all sites.

    Returns:
        The costs in the units of :class:`~infoq_fx.spec.Budget`; both ratios are correctly rounded quotients
        of exact integers.

    Raises:
        OptionError: a site has no bit-width, or an operation names a site that the inventory lacks.
    """
    weights = [site for site in inventory.sites if site.kind == "weight"]
    activations = [site for site in inventory.sites if site.kind == "activation" and site.is_searched]
    numel = sum(site.numel for site in weights)
    total_bits = sum(site.numel * _look_up(bits, site.name) for site in weights)
    float_bits = FLOAT_BITS * (numel + inventory.ignored_weights)
    stored_bits = total_bits + FLOAT_BITS * inventory.ignored_weights
    return Cost(
        weight_bits=total_bits / numel if numel else float(FLOAT_BITS),
        compression=float_bits / stored_bits if stored_bits else 1.0,
        size_bytes=sum(weight_bytes(site, bits[site.name]) for site in weights) + inventory.float_bytes,
        bitops=sum(
            operation_bitops(
                operation, _operand_bits(bits, operation.left), _operand_bits(bits, operation.right)
            )
            for operation in inventory.operations
        ),
        activation_bytes=sum(activation_bytes(site, _look_up(bits, site.name)) for site in activations),
    )


def _packed_bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def _operand_bits(bits: Mapping[str, int], name: str | None) -> int | None:
    return None if name is None else _look_up(bits, name)


def _look_up(bits: Mapping[str, int], name: str) -> int:
    if name not in bits:
        raise unknown_name_error("site without bits", name, bits)
    return bits[name]
