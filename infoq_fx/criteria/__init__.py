"""Sensitivity criteria: one a file, one Protocol, one dict."""

from __future__ import annotations

from collections.abc import Callable

from infoq_fx.criteria.eagl import EAGL
from infoq_fx.criteria.infoq import InfoQ
from infoq_fx.criteria.protocol import Criterion, Measure, Plain, Work
from infoq_fx.errors import unknown_name_error

__all__ = ["CRITERIA", "EAGL", "Criterion", "InfoQ", "Measure", "Plain", "Work", "find_criterion"]

CRITERIA: dict[str, Callable[[], Criterion]] = {"infoq": InfoQ, "eagl": EAGL}


def find_criterion(criterion: Criterion | str) -> Criterion:
    """A criterion from its registered name, or the object itself.

    Raises:
        OptionError: an unknown name.
    """
    if not isinstance(criterion, str):
        return criterion
    if criterion not in CRITERIA:
        raise unknown_name_error("criterion", criterion, CRITERIA)
    return CRITERIA[criterion]()
