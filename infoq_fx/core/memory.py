"""The memory available to this process, and its return to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import psutil

__all__ = ["available_memory_bytes", "return_free_memory"]


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
    """Return free pages of the heap to the system, where the C library can (glibc).

    It keeps tensors of up to 32 MiB in a heap; between steps that need tensors of other sizes, hundreds of megabytes of
    it are free and of no use.
    """
    trim = _find_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return None
