"""The tolerance: how much accuracy may be lost, what is made as small as possible, and within which limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from infoq_fx.allocation.cost import COSTS, bound_own_cost, build_cost_row, measure_cost
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.types import Budget, Inventory

__all__ = ["MINIMIZED", "Tolerance", "check_tolerance", "limit_cost", "read_range"]

_MEASURES = ("drop", "nats", "sqnr_db")
MINIMIZED = ("size_bytes", "bitops", "activation_bytes", "weight_bits")
"""What can be minimized, besides costs of one's own."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The accuracy that may be lost, as the budget: the smallest allocation that loses no more is sought.

    Exactly one of ``drop``, ``nats`` and ``sqnr_db`` is given. All are measured on validation samples, for the
    converted model with recovered weights, against the float model on the same samples.

    Args:
        drop: how far the metric may fall below the float model's. Without a metric of your own it is top-1, and the
            unit is a point of its percentage; for your own metric it is the unit that the metric returns: 0.01 if it
            returns shares, 0.1 for a tenth of a dB.
        nats: what may be lost at the outputs, in nats per sample (the mean KL divergence from the float model's
            outputs, see :class:`infoq_fx.Categorical`); needs no labels.
        sqnr_db: the least signal-to-quantization-noise ratio in dB, over all samples, of the outputs that are
            quantities, or of all outputs that are read if none is; needs no labels. The worst output counts.
        minimize: what to make as small as possible: ``"size_bytes"``, ``"bitops"``, ``"activation_bytes"``,
            ``"weight_bits"`` or a cost of your own by its name in :data:`infoq_fx.COSTS`.
        within: limits that hold besides.

    Raises:
        OptionError: not exactly one of the three is given, or an argument is invalid.
    """

    drop: float | None = None
    nats: float | None = None
    sqnr_db: float | None = None
    minimize: str = "size_bytes"
    within: Budget | None = None

    def __post_init__(self) -> None:
        given = [name for name in _MEASURES if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "nothing to keep"
            raise OptionError(f"Tolerance() has {found}; give exactly one of {', '.join(_MEASURES)}")
        limit = self.limit
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise OptionError(f"Tolerance({given[0]}={limit!r}); give a finite number of at least 0")
        if not isinstance(self.minimize, str) or self.minimize == "compression":
            raise OptionError(
                f"Tolerance(minimize={self.minimize!r}); give one of {', '.join(MINIMIZED)}, or the name of a cost in "
                "infoq_fx.COSTS"
            )
        if self.within is not None and not isinstance(self.within, Budget):
            raise OptionError(f"Tolerance(within={self.within!r}); give a Budget, such as Budget(size_bytes=200_000)")

    @property
    def measure(self) -> Literal["drop", "nats", "sqnr_db"]:
        """The name of the loss that is limited."""
        return "drop" if self.drop is not None else "nats" if self.nats is not None else "sqnr_db"

    @property
    def limit(self) -> float:
        """The limit of the loss."""
        value: float = getattr(self, self.measure)
        return value

    def __str__(self) -> str:
        within = "" if self.within is None else f", within {self.within}"
        return f"the least {self.minimize} at {self.measure}={self.limit:g}{within}"


def check_tolerance(tolerance: Any) -> Tolerance:
    """Return a tolerance after checking that it is one.

    Raises:
        OptionError: it is something else, such as the class.
    """
    if not isinstance(tolerance, Tolerance):
        found = "the class Tolerance" if tolerance is Tolerance else repr(tolerance)
        raise OptionError(f"tolerance={found}; give a Tolerance, such as Tolerance(drop=1.0)")
    return tolerance


def limit_cost(tolerance: Tolerance, limit: float) -> Budget:
    """Return the budget of a step: the minimized cost is at most ``limit``, and the limits besides hold."""
    name, within = tolerance.minimize, tolerance.within
    given: dict[str, Any] = {} if within is None else {f.name: getattr(within, f.name) for f in fields(within)}
    least = limit if within is None else min(limit, within.limits.get(name, limit))
    if name in MINIMIZED:
        return Budget(**{**given, name: least})
    return Budget(**{**given, "costs": {**given.get("costs", {}), name: least}})


def read_range(tolerance: Tolerance, inventory: Inventory, pin: Mapping[str, int]) -> tuple[float, float]:
    """Return the least that the minimized cost can be, and what it is with all sites at their most bits.

    Raises:
        OptionError: the cost is unknown, or the bit-widths do not change it.
    """
    name = tolerance.minimize
    if name not in (*MINIMIZED, *COSTS):
        raise unknown_name_error("cost in Tolerance(minimize=)", name, [*MINIMIZED, *COSTS])
    own = () if name in MINIMIZED else (name,)
    choices = {site.name: (pin[site.name],) if site.name in pin else site.bits for site in inventory.sites}
    most = measure_cost(inventory, {site: bits[-1] for site, bits in choices.items()}, own)[name]
    if own:
        row = build_cost_row(inventory, name, most, choices)
        least = bound_own_cost(row, most)
    else:
        least = measure_cost(inventory, {site: bits[0] for site, bits in choices.items()})[name]
    if not least < most:
        raise OptionError(
            f"Tolerance(minimize={name!r}): it is {most:g} at all candidate bit-widths; give bits= or "
            "activation_bits= that change it, or minimize another cost"
        )
    return least, most
