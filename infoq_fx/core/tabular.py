"""Formats rows of cells as aligned text and as an HTML table, and numbers with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["align_rows", "describe_ties", "format_with_error", "html_table"]

_SMALL = 1e-4  # errors below it are written with an exponent


def align_rows(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return one line per row with columns two spaces apart, the first ``left`` left-aligned, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_table(caption: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = (), left: int = 1) -> str:
    """Return an HTML table for a notebook; the first row and the first column are headers.

    Args:
        caption: title of the table.
        rows: cells as text, which is escaped.
        notes: lines below the table.
        left: number of left-aligned columns.
    """

    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        side = "left" if column < left else "right"
        return f'<{tag}{scope} style="text-align:{side}">{escape(text)}</{tag}>'

    head = "".join(cell("th", text, i, ' scope="col"') for i, text in enumerate(rows[0]))
    body = "".join(
        "<tr>"
        + cell("th", row[0], 0, ' scope="row"')
        + "".join(cell("td", text, i) for i, text in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows[1:]
    )
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        f'<div class="infoq-fx"><table><caption style="text-align:left"><b>{escape(caption)}</b></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}</div>"
    )


def describe_ties(ties: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a line for each group of sites with one bit-width."""
    return [f"tied to one bit-width: {', '.join(tie)}" for tie in ties]


def format_with_error(value: float, error: float | None) -> str:
    """Return a number with as many decimals as its error, which has one digit, or one decimal if it is 1 to 10."""
    if not error or not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.3g}"
    if error < _SMALL:
        return f"{value:.3g} ± {error:.1g}"
    decimals = 0 if error >= 10 else max(1, -math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
