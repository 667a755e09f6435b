"""Clamp operations, which limit a tensor to a range, and their bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

__all__ = ["CLAMPS", "constant_bounds", "read_bounds", "set_bounds"]

_ATEN = torch.ops.aten
CLAMPS: dict[Any, tuple[float | None, float | None]] = {
    _ATEN.hardtanh.default: (-1.0, 1.0),
    _ATEN.clamp.default: (None, None),
    _ATEN.relu6.default: (0.0, 6.0),
}
"""Clamps with two bounds, each with its default bounds; None is no bound."""

_ONE_SIDED: dict[Any, tuple[float | None, float | None]] = {
    _ATEN.relu.default: (0.0, None),
    _ATEN.clamp_min.default: (None, None),
}


def read_bounds(node: fx.Node) -> tuple[Any, Any]:
    """Return the lower and the upper bound of a clamp, None where there is none; a bound may be a node."""
    low, high = {**CLAMPS, **_ONE_SIDED}[node.target]
    found: list[Any] = [*node.args[1:3], *(None,) * (3 - len(node.args))]
    names = ("min_val", "max_val") if node.target is _ATEN.hardtanh.default else ("min", "max")
    given = [node.kwargs.get(name, value) for name, value in zip(names, found, strict=True)]
    return (low if given[0] is None else given[0], high if given[1] is None else given[1])


def constant_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Return the bounds of a clamp or ReLU as numbers, infinite where there is none; None for every other node."""
    if node.target not in CLAMPS and node.target not in _ONE_SIDED:
        return None
    low, high = read_bounds(node)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def set_bounds(node: fx.Node, low: float | None, high: float | None) -> None:
    """Set the bounds of a clamp in ``CLAMPS``."""
    node.target = _ATEN.clamp.default if node.target is _ATEN.clamp.default else _ATEN.hardtanh.default
    node.args, node.kwargs = (node.args[0], low, high), {}
