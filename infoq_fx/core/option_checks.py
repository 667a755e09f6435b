"""Checks of numeric options."""

from __future__ import annotations

import math

from infoq_fx.errors import OptionError

__all__ = ["check_count", "check_rate"]


def check_count(option: str, value: int, least: int) -> None:
    """Check that an option is an integer of at least ``least``.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{option}={value!r}; give an integer of at least {least}")


def check_rate(option: str, value: float) -> None:
    """Check that an option is a positive finite number.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{option}={value!r}; give a positive finite number")
