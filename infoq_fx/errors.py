"""The package's exceptions, named by what the user can do about them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationDataError",
    "EncoderUnavailableError",
    "ExportError",
    "InfeasibleBudgetError",
    "InfoqError",
    "MissingExtraError",
    "OptionError",
    "UnsupportedModelError",
    "nearest_names",
    "unknown_name_error",
]


class InfoqError(Exception):
    """Base of every error that this package raises on purpose."""


class OptionError(InfoqError, ValueError):
    """An argument has a value that cannot be used: change the argument."""


class UnsupportedModelError(InfoqError):
    """The model cannot be captured or has nothing to quantize: change the model."""


class CalibrationDataError(InfoqError, ValueError):
    """The calibration data cannot be used: change the data."""


class InfeasibleBudgetError(InfoqError):
    """No allocation fits the budget: raise the budget or allow fewer bits."""


class ExportError(InfoqError):
    """The file could not be written or failed its checks; no file was left at the path."""


class EncoderUnavailableError(InfoqError):
    """The encoder of the input could not be loaded: install it, go online once, or pass another."""


class MissingExtraError(InfoqError, ImportError):
    """An optional package is not installed: install the extra that the message names."""


def nearest_names(asked: str, known: Iterable[str], count: int = 3) -> str:
    """Return the ``count`` names in ``known`` that are most similar to ``asked``, as readable text."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(asked, names, n=count, cutoff=0.3) or names[:count]
    return ", ".join(repr(name) for name in close) if close else "none"


def unknown_name_error(kind: str, asked: str, known: Iterable[str]) -> OptionError:
    """Return an :class:`OptionError` for an unknown name that lists the nearest known ones."""
    names = list(known)
    return OptionError(f"unknown {kind} {asked!r}; nearest of {len(names)}: {nearest_names(asked, names)}")
