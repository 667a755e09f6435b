"""The memory available to this process, and its return to the system."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["available_memory_bytes", "copy_out_of_heap", "copy_to_disk", "return_free_memory", "usual_bytes"]


_GROWTH_BYTES = 128 << 20
_resident_bytes = 0  # when memory was returned last

_ALIGNMENT = 64
_SHARE_OF_GPU = 8

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


def usual_bytes(device: torch.device, on_cpu: int) -> int:
    """Return the bytes that a part of a step may take without a memory limit: ``on_cpu``, more on a GPU.

    There it is an eighth of all its memory, not of what is free, so that results do not depend on other work.
    """
    import torch

    if device.type != "cuda":
        return on_cpu
    return max(on_cpu, torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_GPU)


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


def copy_out_of_heap(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors into memory that is not on the heap; those of a GPU are returned as they are.

    Small values of every batch that are kept cut the heap into pieces, in which the large values of the next batch find
    no room: it would grow by a batch's values each time.
    """
    import torch

    bytes_of = [x.numel() * x.element_size() if x.device.type == "cpu" else 0 for x in tensors]
    sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in bytes_of]
    buffer = mmap.mmap(-1, max(1, sum(sizes)))
    copies = []
    for x, size, offset in zip(tensors, sizes, itertools.accumulate(sizes, initial=0), strict=False):
        if size:
            copy = torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
            x = copy.copy_(x)
        copies.append(x)
    return copies


def copy_to_disk(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of the CPU into an unnamed temporary file that is mapped; without room on the disk, return them.

    The system may drop pages of the file that are not in use. The file goes with the last of the copies.
    """
    import numpy as np
    import torch

    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for x in tensors]
    try:
        with tempfile.TemporaryFile(prefix="infoq_fx_") as file:
            for bytes_of in flat:
                file.write(bytes_of.data)
                file.write(bytes(-len(bytes_of) % _ALIGNMENT))
            file.write(bytes(_ALIGNMENT))  # an empty file cannot be mapped
            file.flush()
            mapped = torch.from_numpy(np.memmap(file, np.uint8, "c"))  # on write a page is copied
    except OSError:
        return list(tensors)
    copies, offset = [], 0
    for x, bytes_of in zip(tensors, flat, strict=True):
        copies.append(mapped[offset : offset + len(bytes_of)].view(x.dtype).reshape(x.shape))
        offset += -(-len(bytes_of) // _ALIGNMENT) * _ALIGNMENT
    return copies


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return None
