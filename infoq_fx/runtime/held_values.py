"""Values of nodes for every batch: in memory up to a limit, the others as integers or in a temporary file."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from infoq_fx.errors import CalibrationDataError
from infoq_fx.quantization.numerics import dequantize, quantize, quantize_in_one_pass
from infoq_fx.runtime.integer_convolution import QuantizedTensor
from infoq_fx.types import QParams

__all__ = ["HeldValues", "ValuesByBatch"]

_NO_QPARAMS: Mapping[fx.Node, QParams] = {}


class ValuesByBatch(Protocol):
    """Values of some nodes by batch; any of them may be read by several threads at once."""

    def __len__(self) -> int:
        """Number of batches."""

    def read(self, index: int, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
        """Values of a batch, of those of the nodes that are held."""


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's values are in the file; ``order`` are its axes in the order of memory."""

    start: int
    count: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Packed:
    """A fake quantized tensor as its integers, which are held in memory or stored."""

    integers: Tensor | _Stored
    qparams: QParams


@dataclass(frozen=True)
class _Integers:
    """A tensor of integers, which are held in memory or stored."""

    integers: Tensor | _Stored
    scale: float
    zero_point: int


class HeldValues:
    """Holds the values of some nodes by batch, and gives them back as they were, layout in memory included.

    Several threads may read at once; one adds.

    Args:
        limit_bytes: what tensors may take in memory. Of those beyond it, fake quantized ones become integers, which
            take a quarter. What still does not fit is written to a temporary file without a name, which goes with the
            object.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._batches: list[dict[fx.Node, Any]] = []
        self._file: Any = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, values: Mapping[fx.Node, Any], quantized: Mapping[fx.Node, QParams] = _NO_QPARAMS) -> None:
        """Take the values of the next batch.

        Args:
            values: by node.
            quantized: of the nodes whose values are fake quantized activations, their qparams.

        Raises:
            CalibrationDataError: the disk for temporary files is full.
        """
        self._batches.append({node: self._keep(value, quantized.get(node)) for node, value in values.items()})

    def read(self, index: int, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
        """Return values of a batch, of those of the nodes that are held."""
        return {node: self._read(value) for node, value in self._batches[index].items() if node in nodes}

    def _keep(self, value: Any, qparams: QParams | None) -> Any:
        if isinstance(value, QuantizedTensor):
            return _Integers(self._keep(value.q, None), value.scale, value.zero_point)
        if not isinstance(value, Tensor) or self._take_room(value):
            return value
        if qparams is not None and _can_pack(value):
            q = quantize_in_one_pass(value, qparams) if value.device.type == "cpu" else quantize(value, qparams)
            return _Packed(q if self._take_room(q) else self._write(q), qparams)
        return self._write(value)

    def _take_room(self, x: Tensor) -> bool:
        needed = x.numel() * x.element_size()
        if needed > self._room:
            return False
        self._room -= needed
        return True

    def _read(self, held: Any) -> Any:
        if isinstance(held, _Packed):
            return dequantize(self._read(held.integers), held.qparams)
        if isinstance(held, _Integers):
            return QuantizedTensor(self._read(held.integers), held.scale, held.zero_point)
        return self._read_file(held) if isinstance(held, _Stored) else held

    def _write(self, x: Tensor) -> _Stored:
        order = tuple(sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True))
        packed = x.detach().permute(order).contiguous().cpu()
        content: Any = packed.reshape(-1).view(torch.uint8).numpy().data if x.numel() else b""
        try:
            with self._lock:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="infoq_fx_")  # noqa: SIM115  # closed with this object
                    weakref.finalize(self, self._file.close)
                start = self._file.seek(0, os.SEEK_END)
                self._file.write(content)
        except OSError as error:
            raise CalibrationDataError(
                f"values between layers cannot be written to {tempfile.gettempdir()!r}: {error}; give fewer samples, "
                "or set TMPDIR to a larger disk"
            ) from error
        return _Stored(start, len(content), tuple(packed.shape), order, x.dtype, x.device)

    def _read_file(self, stored: _Stored) -> Tensor:
        with self._lock:
            self._file.seek(stored.start)
            content = bytearray(self._file.read(stored.count))
        values = torch.from_numpy(np.frombuffer(content, np.uint8)).view(stored.dtype)
        inverse = sorted(range(len(stored.order)), key=stored.order.__getitem__)
        return values.reshape(stored.shape).permute(inverse).to(stored.device)


def _can_pack(x: Tensor) -> bool:
    """Whether a fake quantized tensor comes back from its integers as it was: dense, and without NaN."""
    is_dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return is_dense and x.dtype == torch.float32 and math.isfinite(float(x.sum()))
