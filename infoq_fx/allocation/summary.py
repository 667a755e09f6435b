"""Formats an allocation with its sites and costs, as text and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infoq_fx.allocation.cost import measure_cost, packs_weights, weight_bytes
from infoq_fx.core.tabular import align_rows, describe_ties, html_table
from infoq_fx.types import CODEBOOK_BITS, FLOAT16_BITS, MAX_BITS, Allocation, Cost, Inventory, QuantSite

__all__ = ["FileSize", "Summary", "summarize_allocation"]

_HEAD = ("layer", "kind", "elements", "bits", "score", "± error", "share of size")
_TEXT_COLUMNS = 2


@dataclass(frozen=True)
class FileSize:
    """The bytes of an exported file, external data included.

    Args:
        total_bytes: of the file.
        tensor_bytes: of the values of its initializers: weights, scales, biases and tables.
    """

    total_bytes: int
    tensor_bytes: int

    @property
    def graph_bytes(self) -> int:
        """Everything else: operators, names, metadata."""
        return self.total_bytes - self.tensor_bytes


class Summary(str):
    """Text that a notebook shows as a table."""

    html: str

    def __new__(cls, text: str, html: str) -> Summary:
        """Create from a text and the same content as HTML."""
        made = super().__new__(cls, text)
        made.html = html
        return made

    def _repr_html_(self) -> str:
        return self.html


def summarize_allocation(
    allocation: Allocation, inventory: Inventory, outputs: Sequence[str] = (), file: FileSize | None = None
) -> Summary:
    """Return a table of an allocation: its sites, its cost, and the best uniform bit-width for comparison.

    Args:
        allocation: bits for every site of the inventory.
        inventory: of the prepared model.
        outputs: a line for each output of the model, which says how it is read.
        file: of the exported file, to say how much of it is the graph.

    Returns:
        One line per weight site and per searched activation site, then lines of totals. ``share of size`` is the share
        of ``Cost.size_bytes``; the totals also give the size with a byte a weight.
    """
    cost = allocation.cost or measure_cost(inventory, allocation.bits)
    shown = [s for s in inventory.sites if s.kind == "weight" or (s.is_searched and len(s.bits) > 1)]
    is_packed = packs_weights(inventory)
    rows = [_HEAD, *(_describe_site(site, allocation, cost, is_packed) for site in shown)]
    notes = [*_describe_totals(allocation, inventory, cost, file), *outputs]
    text = "\n".join([*align_rows(rows, left=_TEXT_COLUMNS), *notes])
    caption = "Bit-widths" if allocation.budget is None else f"Bit-widths within {allocation.budget}"
    return Summary(text, html_table(caption, rows, notes, left=_TEXT_COLUMNS))


def _describe_site(site: QuantSite, allocation: Allocation, cost: Cost, is_packed: bool) -> tuple[str, ...]:
    bits, score = allocation.bits[site.name], allocation.scores.get(site.name)
    size = weight_bytes(site, bits, is_packed=is_packed) if site.kind == "weight" else 0
    share = f"{100 * size / cost.size_bytes:.1f} %" if site.kind == "weight" else "-"
    value, error = ("-", "-") if score is None else (f"{score.value:.3g}", f"{score.standard_error:.2g}")
    width = "16 (float)" if bits == FLOAT16_BITS else str(bits)
    return site.name, site.kind, f"{site.numel:,}", width, value, error, share


def _describe_totals(allocation: Allocation, inventory: Inventory, cost: Cost, file: FileSize | None) -> list[str]:
    whole = measure_cost(inventory, {name: max(MAX_BITS, bits) for name, bits in allocation.bits.items()}).size_bytes
    lines = [
        f"{cost.weight_bits:.3g} bits a weight ({cost.compression:.2f}x compression), "
        f"{cost.size_bytes:,} bytes without the graph ({whole:,} in 'int8'), {cost.bitops / 1e9:.4g} G BitOps, "
        f"{cost.activation_bytes:,} bytes of activations"
    ]
    if file is not None:
        lines.append(
            f"file: {file.total_bytes:,} bytes, {file.tensor_bytes:,} of tensors ({cost.size_bytes:,} counted, with "
            f"4 bytes a scale and a bias) and {file.graph_bytes:,} of graph and metadata"
        )
    if allocation.score is not None:
        spread = f" ± {allocation.standard_error:.2g}" if allocation.standard_error else ""
        lines.append(f"score {allocation.score:.4g}{spread}; {_describe_uniform(allocation)}")
    if allocation.lost_nats is not None:
        lines.append(f"measured together: {allocation.lost_nats:.4g} nats a sample lost at the output")
    lines += describe_ties(inventory.ties)
    lines += _describe_codebooks(allocation, inventory)
    if allocation.loss is not None:
        lines.append(f"measured after recovery: {allocation.loss}")
    if allocation.recovered_by:
        lines.append(f"recovered by {', '.join(allocation.recovered_by)}")
    return lines


def _describe_codebooks(allocation: Allocation, inventory: Inventory) -> list[str]:
    weights = [site for site in inventory.sites if site.kind == "weight"]
    count = sum(site.levels == "codebook" and allocation.bits[site.name] <= CODEBOOK_BITS for site in weights)
    return [f"{count} of {len(weights)} weights have a codebook of integer levels"] if count else []


def _describe_uniform(allocation: Allocation) -> str:
    if allocation.uniform_bits is None or allocation.uniform_score is None:
        return "no uniform bit-width to compare with"
    return f"uniform {allocation.uniform_bits} bits, the largest that fit, score {allocation.uniform_score:.4g}"
