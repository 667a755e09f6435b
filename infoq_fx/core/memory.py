"""The memory available to this process."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_memory_bytes"]


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
