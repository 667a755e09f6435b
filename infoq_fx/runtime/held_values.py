"""Values of nodes for every batch: in memory up to a limit, the others in a temporary file."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from infoq_fx.errors import CalibrationDataError

__all__ = ["HeldValues"]


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's values are in the file; ``order`` are its axes in the order of memory."""

    start: int
    count: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class HeldValues:
    """Holds the values of some nodes by batch, and gives them back as they were, layout in memory included.

    Several threads may read at once; one adds.

    Args:
        limit_bytes: what tensors may take in memory. Those beyond it are written to a temporary file without a name,
            which goes with the object.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._batches: list[dict[fx.Node, Any]] = []
        self._file: Any = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[fx.Node, Any]]:
        return (self[index] for index in range(len(self)))

    def add(self, values: Mapping[fx.Node, Any]) -> None:
        """Take the values of the next batch.

        Raises:
            CalibrationDataError: the disk for temporary files is full.
        """
        self._batches.append({node: self._keep(value) for node, value in values.items()})

    def __getitem__(self, index: int) -> dict[fx.Node, Any]:
        return {
            node: self._read(value) if isinstance(value, _Stored) else value
            for node, value in self._batches[index].items()
        }

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        needed = value.numel() * value.element_size()
        if needed <= self._room:
            self._room -= needed
            return value
        return self._write(value)

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

    def _read(self, stored: _Stored) -> Tensor:
        with self._lock:
            self._file.seek(stored.start)
            content = bytearray(self._file.read(stored.count))
        values = torch.from_numpy(np.frombuffer(content, np.uint8)).view(stored.dtype)
        inverse = sorted(range(len(stored.order)), key=stored.order.__getitem__)
        return values.reshape(stored.shape).permute(inverse).to(stored.device)
