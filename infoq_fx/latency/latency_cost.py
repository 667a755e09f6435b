"""The latencies of a model's layers as a cost of one's own, saved and loaded as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from infoq_fx.core.atomic_files import load_value, save_json
from infoq_fx.core.tabular import align_rows, html_table
from infoq_fx.errors import OptionError, nearest_names
from infoq_fx.types import Operation

__all__ = ["FileLatency", "LatencyCost", "load_latency"]

_FORMAT = "infoq_fx.LatencyCost"
_VERSION = 1


@dataclass(frozen=True)
class FileLatency:
    """A file whose whole latency was measured, and the sum of its layers' latencies in the table.

    Args:
        name: which layers of the file run in integers.
        whole_ms: measured latency of one run of the file.
        sum_ms: the table's latency of it, the rest included.
    """

    name: str
    whole_ms: float
    sum_ms: float

    @property
    def missed(self) -> float:
        """The share of the whole latency that the sum misses; below 0 if the sum is larger."""
        return 1.0 - self.sum_ms / self.whole_ms


@dataclass(frozen=True, kw_only=True)
class LatencyCost:
    """The latency of every operation in a runtime, in integers and in float; a cost for :data:`infoq_fx.COSTS`.

    The cost of an allocation is the latency of one run of the model on one sample, in milliseconds: the sum over its
    operations and the constant rest, which counts with the first operation. An operation runs in integers if both of
    its operands are quantized, at any bit-widths of 8 and less; otherwise it runs in float, slower if its weight is
    stored in integers, as onnxruntime then dequantizes it in every run.

    Args:
        target: of :data:`infoq_fx.TARGETS`, the runtime.
        runtime: its name and version.
        threads: that the runtime used.
        integer_ms: latency of each operation in integers, by its name in the inventory, with what the runtime fuses
            into it and what follows it up to the next layer.
        weight_only_ms: the same with the weight in integers and the activation in float.
        float_ms: the same in float.
        rest_ms: latency of what no layer covers.
        files: measured latencies of whole files beside the sums of the table.

    Raises:
        OptionError: a latency is not a finite number of at least 0, or the tables have different operations.
    """

    target: str
    runtime: str
    threads: int
    integer_ms: Mapping[str, float]
    weight_only_ms: Mapping[str, float]
    float_ms: Mapping[str, float]
    rest_ms: float = 0.0
    files: tuple[FileLatency, ...] = field(default=())

    def __post_init__(self) -> None:
        tables: list[Mapping[str, Any]] = [self.integer_ms, self.weight_only_ms, self.float_ms]
        if not self.integer_ms or any(table.keys() != self.integer_ms.keys() for table in tables):
            counts = ", ".join(str(len(table)) for table in tables)
            raise OptionError(f"the latencies are of {counts} operations; give all three for the same, one or more")
        for table in (*tables, {"the rest": self.rest_ms}):
            for name, value in table.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise OptionError(f"the latency of {name!r} is {value!r} ms; give a finite number of at least 0")

    def __call__(self, operation: Operation, left_bits: int | None, right_bits: int | None) -> float:
        """Return the latency of an operation in milliseconds; None is an operand in float.

        Raises:
            OptionError: the operation is not in the table.
        """
        if operation.name not in self.integer_ms:
            near = nearest_names(operation.name, self.integer_ms)
            raise OptionError(
                f"the latencies have no operation {operation.name!r}, the nearest are {near}; "
                "give those that infoq_fx.measure_latency made of this one"
            )
        table = self.float_ms
        if left_bits is not None:
            table = self.weight_only_ms if right_bits is None else self.integer_ms
        return table[operation.name] + (self.rest_ms if operation.name == next(iter(table)) else 0.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the latencies as readable JSON, atomically: the whole file or nothing.

        Args:
            path: file to write, replaced if it exists.

        Raises:
            OptionError: the file cannot be written.
        """
        document = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        save_json(path, document, "the latencies")

    def __str__(self) -> str:
        return "\n".join([self._describe(), *align_rows(self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(self._describe(), self._rows(), self._notes())

    def _describe(self) -> str:
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        return f"latencies in ms of one sample in {self.runtime}, {threads}"

    def _rows(self) -> list[list[str]]:
        tables = (self.integer_ms, self.weight_only_ms, self.float_ms)
        rows = [["operation", "integers", "weight only", "float"]]
        rows += [[name, *(f"{table[name]:.4f}" for table in tables)] for name in self.integer_ms]
        return [*rows, ["the rest", *[f"{self.rest_ms:.4f}"] * len(tables)]]

    def _notes(self) -> list[str]:
        return [
            f"{file.name}: {file.whole_ms:.4g} ms measured, sum {file.sum_ms:.4g} ms ({-100 * file.missed:+.1f} %)"
            for file in self.files
        ]


def load_latency(path: str | os.PathLike[str]) -> LatencyCost:
    """Read latencies that :meth:`LatencyCost.save` wrote, on this device or another.

    Raises:
        OptionError: the file cannot be read, or holds something else.
    """
    advice = "make them with infoq_fx.measure_latency"
    return load_value(path, (_FORMAT, _VERSION), _decode, "latencies", advice)


def _decode(document: Mapping[str, Any]) -> LatencyCost:
    values = {key: value for key, value in document.items() if key not in ("format", "version")}
    return LatencyCost(**{**values, "files": tuple(FileLatency(**held) for held in values["files"])})
