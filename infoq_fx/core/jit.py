"""Compilation of loops to machine code, kept on disk: the only numba import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["jit", "usable_threads"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function, **options: Any) -> _Function:
    """Compile at the first call with each kind of arguments; later processes load the result.

    The function runs without the interpreter lock, and divisions by 0 give infinity or NaN.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return cast(_Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile every time
        return cast(_Function, numba.njit(**options)(function))


def usable_threads() -> int:
    """Threads that numba was told to use; estimates are spread over so many."""
    return int(numba.get_num_threads())
