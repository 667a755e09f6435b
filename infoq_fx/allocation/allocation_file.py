"""Saves and loads allocations as JSON files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from infoq_fx.core.atomic_files import load_value, save_json
from infoq_fx.errors import OptionError
from infoq_fx.types import FLOAT16_BITS, MAX_BITS, MIN_BITS, Allocation, Budget, Cost, MeasuredLoss, Score

__all__ = ["decode_allocation", "describe_allocation", "load_allocation", "save_allocation"]

_FORMAT = "infoq_fx.Allocation"
_VERSION = 1


def describe_allocation(allocation: Allocation) -> dict[str, Any]:
    """Return an allocation as values that JSON can store."""
    return asdict(allocation)


def decode_allocation(held: Mapping[str, Any]) -> Allocation:
    """Rebuild an allocation from the values of :func:`describe_allocation`.

    Raises:
        OptionError: a bit-width is not an integer from 2 to 8, nor 16.
        KeyError, TypeError, ValueError, AttributeError: the values are not those of an allocation.
    """
    values = dict(held)
    for name, width in values["bits"].items():
        if type(width) is not int or not (MIN_BITS <= width <= MAX_BITS or width == FLOAT16_BITS):
            raise OptionError(f"its allocation gives site {name!r} {width!r} bits")
    # Earlier versions could count weights as a file of another kind stores them.
    limits = {name: value for name, value in (values["budget"] or {}).items() if name != "container"}
    values["budget"] = Budget(**limits) if limits else None
    values["cost"] = None if values["cost"] is None else Cost(**values["cost"])
    values["recovered_by"] = tuple(values["recovered_by"])
    values["ties"] = tuple(tuple(tie) for tie in values.get("ties", ()))
    values["scores"] = {name: Score(**score) for name, score in values["scores"].items()}
    values["loss"] = None if values.get("loss") is None else MeasuredLoss(**values["loss"])
    return Allocation(**values)


def save_allocation(allocation: Allocation, path: str | os.PathLike[str]) -> None:
    """Write an allocation as readable JSON, atomically: the whole file or nothing.

    Args:
        allocation: what :func:`infoq_fx.allocate` or :func:`infoq_fx.refine` found.
        path: file to write, replaced if it exists.

    Raises:
        OptionError: the file cannot be written.
    """
    document = {"format": _FORMAT, "version": _VERSION, **describe_allocation(allocation)}
    save_json(path, document, "the allocation")


def load_allocation(path: str | os.PathLike[str]) -> Allocation:
    """Read an allocation that :func:`save_allocation` wrote; all numbers are restored exactly.

    Raises:
        OptionError: the file cannot be read, or was not written by :func:`save_allocation`.
    """
    advice = "make one with infoq-fx allocate, or infoq_fx.save_allocation"
    return load_value(path, (_FORMAT, _VERSION), _decode_file, "an allocation", advice)


def _decode_file(document: dict[str, Any]) -> Allocation:
    return decode_allocation({key: value for key, value in document.items() if key not in ("format", "version")})
