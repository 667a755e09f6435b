"""Formats the ranges of activations, as text and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence

from infoq_fx.allocation.summary import Summary
from infoq_fx.core.tabular import align_rows, html_table
from infoq_fx.quantization.activation_ranges import OUTLIER_REMEDY, ActivationRange

__all__ = ["summarize_activations"]

_HEAD = ("activation", "peak / std", "lost at 8 bits", "outliers")


def summarize_activations(ranges: Sequence[ActivationRange]) -> Summary:
    """Return a table of activations, in the order given, and how to go on where some have outliers."""
    rows = [_HEAD, *(_describe(activation) for activation in ranges)]
    found = sum(activation.has_outliers for activation in ranges)
    notes = [f"{found} of {len(ranges)} activations have outliers{f': {OUTLIER_REMEDY}' if found else ''}"]
    return Summary("\n".join([*align_rows(rows), *notes]), html_table("Activations", rows, notes))


def _describe(activation: ActivationRange) -> tuple[str, ...]:
    outliers = "yes" if activation.has_outliers else "-"
    return activation.site, f"{activation.peak:.1f}", f"{100 * activation.error:.2g} %", outliers
