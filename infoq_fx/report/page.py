"""Writes the report: allocations over a range of budgets as one self-contained HTML file."""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from infoq_fx.auditing.result import Audit
from infoq_fx.conversion.quantized import QuantizedModule, provenance_of
from infoq_fx.core.atomic_files import write_atomically
from infoq_fx.core.tabular import html_table
from infoq_fx.core.version import __version__
from infoq_fx.errors import ExportError, MissingExtraError, OptionError
from infoq_fx.report.document import build_document
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation

__all__ = ["write_report"]


def write_report(
    source: SensitivityTable | QuantizedModule,
    path: str | os.PathLike[str],
    *,
    allocation: Allocation | None = None,
    audit: Audit | None = None,
    accuracies: Mapping[str, tuple[Allocation, float]] | None = None,
    budgets: int = 60,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    title: str = "Bit-widths under a budget",
) -> Path:
    """Write a report with a slider over budgets: one HTML file that opens in a browser without network access.

    It shows the bits of every layer, the predicted damage against size and BitOps with the uniform allocations, the
    sensitivity of every layer and bit-width with standard errors, the file size in each container, the settings, and,
    if given, measured accuracies and their correlation with the scores. All allocations are computed here by
    :func:`infoq_fx.allocate`; the page only looks them up. The same arguments write the same file.

    The charts are drawn by Vega-Lite, whose JavaScript is part of ``vl-convert-python`` (``infoq-fx[report]``).

    Args:
        source: a sensitivity table, or a module that :func:`infoq_fx.quantize` returned, which includes its table.
        path: file to write, replaced if it exists.
        allocation: an allocation to show with the curve; a module's own is always shown.
        audit: what :func:`infoq_fx.audit` returned for the same model: its accuracies and correlations are shown.
        accuracies: measured top-1 in percent, each with its allocation, by the name to show.
        budgets: number of slider positions, for size and for BitOps each.
        alpha: factor on activation scores relative to weight scores, see :func:`infoq_fx.allocate`.
        pin: fixed bit-widths, see :func:`infoq_fx.allocate`.
        title: heading of the page.

    Returns:
        The path.

    Raises:
        OptionError: an argument cannot be used, the module has no table, or an allocation is of another model.
        MissingExtraError: ``infoq-fx[report]`` is not installed.
        ExportError: the file cannot be written.
    """
    table, own = _find_table(source)
    library = _load_library()
    shown = {"this model": own} if own is not None else {}
    if allocation is not None:
        shown["the given allocation"] = allocation
    document = build_document(
        table,
        shown=shown,
        audit=audit,
        accuracies=accuracies or {},
        budgets=budgets,
        alpha=alpha,
        pin=pin,
    )
    target = Path(path)
    try:
        write_atomically(target, _fill(table, document, library, title))
    except OSError as error:
        raise ExportError(f"cannot write the report {os.fspath(path)!r}: {error}; give a path in a folder") from error
    return target


def _find_table(source: SensitivityTable | QuantizedModule) -> tuple[SensitivityTable, Allocation | None]:
    if isinstance(source, SensitivityTable):
        return source, None
    provenance = provenance_of(source)
    if provenance is None:
        raise OptionError(
            f"write_report() got a {type(source).__name__}; give a sensitivity table or what quantize() returned"
        )
    if provenance.table is None:
        raise OptionError(
            "the module was made by convert() from an allocation alone and has no sensitivity table: give the "
            "table, write_report(table, path, allocation=infoq_fx.allocation_of(quantized))"
        )
    return provenance.table, provenance.allocation


@functools.cache
def _load_library() -> str:
    """Vega-Embed, Vega-Lite and Vega as one script without network access; takes several seconds the first time."""
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError(
            'the page needs vl-convert-python for its charts: pip install "infoq-fx[report]"'
        ) from error
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    versions = f"Vega {vl_convert.get_vega_version()}, Vega-Lite {vl_convert.get_vegalite_versions()[-1]}"
    # The wrapper keeps the bundle's top-level names local; an end tag inside the script would end it.
    wrapped = f"(() => {{\n{bundle}\n}})();".replace("</script", "<\\/script")
    return f"/* {versions}, https://vega.github.io, BSD-3-Clause, University of Washington. */\n{wrapped}"


def _fill(table: SensitivityTable, document: Mapping[str, object], library: str, title: str) -> str:
    files = resources.files("infoq_fx.report")
    rows = [("setting", "value"), *((name, str(value)) for name, value in table.settings.items())]
    weights = [site.numel for site in table.inventory.sites if site.kind == "weight"]
    activations = [s for s in table.inventory.sites if s.kind == "activation" and s.is_searched and len(s.bits) > 1]
    searched = f" and {len(activations)} activations" if activations else ""
    parts = {
        "title": html.escape(title),
        "version": __version__,
        "lead": html.escape(
            f"{len(weights)} layers with {sum(weights):,} weights{searched}, scored by {table.criterion!r}. Every "
            "position of the slider shows the best allocation within that budget."
        ),
        "settings": html_table(f"How the scores were measured (infoq_fx {__version__})", rows, left=2),
        "footer": html.escape(
            f"Made by infoq_fx {__version__}. Charts: Vega-Lite (BSD-3-Clause). This file does not use the network."
        ),
        "css": files.joinpath("page.css").read_text(encoding="utf-8"),
        "script": files.joinpath("page.js").read_text(encoding="utf-8"),
        "library": library,
        "data": _embed(json.dumps(document, allow_nan=False, separators=(",", ":"))),
        "scores": _embed(table.to_json()),
    }
    template = files.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _embed(text: str) -> str:
    """Escape JSON for a script element, which must not contain an end tag."""
    return text.replace("<", "\\u003c")
