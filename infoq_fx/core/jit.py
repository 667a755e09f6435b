"""Compiles loops to machine code, cached on disk; the only module that imports numba."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["jit", "usable_threads"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function, **options: Any) -> _Function:
    """Compile a function at its first call for each combination of argument types; later processes load the result.

    The function runs without the GIL, and divisions by 0 give infinity or NaN.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return cast(_Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache is writable: compile in every process
        return cast(_Function, numba.njit(**options)(function))


def usable_threads() -> int:
    """Return the number of threads that numba is set to use, over which estimates are spread."""
    _start_threads()
    return int(numba.get_num_threads())


@functools.cache
def _start_threads() -> None:
    """Start the threads of numba from a separate thread.

    Starting them raises the number of OpenMP threads of the thread that asks, which is also torch's: a
    ``torch.set_num_threads(1)`` of the caller would be lost.
    """
    starter = threading.Thread(target=numba.get_num_threads)
    starter.start()
    starter.join()
