"""The sensitivity table: the score of every (site, bit-width), to print, save and reuse."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from infoq_fx.core.atomic_files import load_value, write_atomically
from infoq_fx.core.tabular import align_rows, html_table
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.types import Inventory, Operation, QuantSite, Score

__all__ = ["PairScores", "SensitivityTable", "check_table"]

PairScores: TypeAlias = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]
"""Scores of two sites at two bit-widths, by the sites' names and by their bits in the same order."""

_FORMAT = "infoq_fx.SensitivityTable"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """The score of every (site, bit-width) under one criterion; smaller is less sensitive.

    Args:
        criterion: name of the criterion that scored.
        inventory: the sites and operations of the prepared model.
        scores: site name to bit-width to score; sites with a single candidate may be absent.
        settings: how the scores were measured: named values that JSON can store. ``"recovery"`` is the recovery that
            they are for, if they were measured with rounded weights; see :attr:`scored_for`.
        pairs: what two sites at two bit-widths lose beyond the sum of their scores, if the criterion says so; pairs
            that are not there lose nothing beyond it. :func:`infoq_fx.allocate` adds them to the total.

    Raises:
        OptionError: a scored site or one of a pair is not in the inventory, or a score is not finite.
    """

    criterion: str
    inventory: Inventory
    scores: Mapping[str, Mapping[int, Score]]
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    pairs: PairScores = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [site.name for site in self.inventory.sites]
        known = set(names)
        for name, by_bits in self.scores.items():
            if name not in known:
                raise unknown_name_error("site", name, names)
            for bits, score in by_bits.items():
                if not (math.isfinite(score.value) and math.isfinite(score.standard_error)):
                    raise OptionError(f"the score of {name!r} at {bits} bits is not finite: {score}; fix the criterion")
        for pair, by_bits_of_both in self.pairs.items():
            for name in pair:
                if name not in known:
                    raise unknown_name_error("site of a pair", name, names)
            for widths, value in by_bits_of_both.items():
                if not math.isfinite(value):
                    raise OptionError(f"the score of {pair} at {widths} bits is not finite: {value}; fix the criterion")

    @property
    def scored_for(self) -> str | None:
        """The recovery that the weights were rounded by for the scores, ``"none"`` for rounding to nearest.

        None if the criterion runs no rounded weights, or the table was saved by a version that did not record it.
        """
        found = self.settings.get("recovery")
        return None if found is None else str(found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as readable JSON, atomically: the whole file or nothing.

        Args:
            path: file to write, replaced if it exists.

        Raises:
            OptionError: the file cannot be written, or a setting is not a plain finite value.
        """
        text = self.to_json()
        try:
            write_atomically(Path(path), text)
        except OSError as error:
            raise OptionError(
                f"cannot write the sensitivity table {os.fspath(path)!r}: {error}; give another path"
            ) from error

    def to_json(self) -> str:
        """Return the JSON text that :meth:`save` writes.

        Raises:
            OptionError: a setting is not a plain finite value.
        """
        try:
            return json.dumps(_encode(self), indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"a sensitivity table with settings {dict(self.settings)} is not JSON: {error}; give plain values"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Read a table that :meth:`save` wrote; all numbers are restored exactly.

        Args:
            path: file to read.

        Raises:
            OptionError: the file cannot be read, is truncated, is not a sensitivity table or has another version.
        """
        advice = "score again, or give another file"
        return load_value(path, (_FORMAT, _VERSION), _decode, "a sensitivity table", advice)

    def __str__(self) -> str:
        return "\n".join([self._describe(), *align_rows(self._rows())])

    def _repr_html_(self) -> str:
        return html_table(self._describe(), self._rows())

    def _describe(self) -> str:
        scored = sum(bool(by_bits) for by_bits in self.scores.values())
        return (
            f"sensitivity by {self.criterion!r}: {scored} sites scored, {len(self.inventory.sites) - scored} at fixed "
            "bits; score ± standard error, smaller is less sensitive"
        )

    def _rows(self) -> list[list[str]]:
        columns = sorted({bits for by_bits in self.scores.values() for bits in by_bits})
        rows = [["site", "elements", *(f"{bits} bits" for bits in columns)]]
        for site in self.inventory.sites:
            if by_bits := self.scores.get(site.name):
                cells = [_describe_score(by_bits.get(bits)) for bits in columns]
                rows.append([site.name, f"{site.numel:,}", *cells])
        return rows


def check_table(table: Any) -> None:
    """Check that an argument is a table of scores.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(table, SensitivityTable):
        raise OptionError(
            f"the scores are a {type(table).__name__}; give what score() or SensitivityTable.load() returned"
        )


def _describe_score(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.3g}" + (f" ± {score.standard_error:.1g}" if score.standard_error else "")


def _encode(table: SensitivityTable) -> dict[str, Any]:
    # float() because a criterion may return numpy's float32, which json cannot write.
    scores = {
        name: {
            str(int(bits)): {"value": float(score.value), "standard_error": float(score.standard_error)}
            for bits, score in by_bits.items()
        }
        for name, by_bits in table.scores.items()
    }
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "criterion": table.criterion,
        "settings": dict(table.settings),
        "scores": scores,
        **({"pairs": _encode_pairs(table.pairs)} if table.pairs else {}),
        "inventory": asdict(table.inventory),
    }


def _encode_pairs(pairs: PairScores) -> list[dict[str, Any]]:
    return [
        {"sites": list(pair), "scores": [[*map(int, bits), float(value)] for bits, value in by_bits.items()]}
        for pair, by_bits in pairs.items()
    ]


def _decode(document: dict[str, Any]) -> SensitivityTable:
    scores = {
        name: {int(bits): Score(float(s["value"]), float(s["standard_error"])) for bits, s in by_bits.items()}
        for name, by_bits in document["scores"].items()
    }
    return SensitivityTable(
        criterion=document["criterion"],
        inventory=_decode_inventory(document["inventory"]),
        scores=scores,
        settings=dict(document["settings"]),
        pairs={
            (str(first), str(second)): {(int(a), int(b)): float(value) for a, b, value in found["scores"]}
            for found in document.get("pairs", ())
            for first, second in [found["sites"]]
        },
    )


def _decode_inventory(document: dict[str, Any]) -> Inventory:
    sites = tuple(_decode_site(site) for site in document["sites"])
    operations = tuple(Operation(**operation) for operation in document["operations"])
    ties = tuple(tuple(tie) for tie in document.get("ties", ()))  # earlier versions had none
    return Inventory(**{**document, "sites": sites, "operations": operations, "ties": ties})


def _decode_site(document: dict[str, Any]) -> QuantSite:
    has_codebook = document.pop("has_codebook", False)  # of earlier versions
    given = {"levels": "codebook", **document} if has_codebook else document
    return QuantSite(**{**given, **{key: tuple(given.get(key, ())) for key in ("shape", "bits", "follows")}})
