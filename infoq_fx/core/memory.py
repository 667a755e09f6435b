"""The memory available to this process, and its return to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import psutil

__all__ = ["available_memory_bytes", "return_free_memory"]


_GROWTH_BYTES = 128 << 20
_resident_bytes = 0  # when memory was returned last

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_memory_bytes() -> int:
    """Return the bytes available without swapping, on the machine or within the container's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    for path in _CGROUP_LIMITS:
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
        available = min(available, max(0, limit - int(psutil.Process().memory_info().rss)))
    return available


def return_free_memory() -> None:
    """Return free pages of the heap to the system, where the C library can (glibc) and the process has grown.

    It keeps tensors of up to 32 MiB in a heap; between steps that need tensors of other sizes, hundreds of megabytes of
    it are free and of no use. Pages that were returned cost time when they are used again, so that nothing is returned
    until the process takes 128 MiB more than after the last time.
    """
    global _resident_bytes
    trim, process = _find_trim(), psutil.Process()
    if trim is None:
        return
    if process.memory_info().rss > _resident_bytes + _GROWTH_BYTES:
        trim(0)
        _resident_bytes = process.memory_info().rss
    _resident_bytes = min(_resident_bytes, process.memory_info().rss)


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return None
