"""Threads over whole runs, in place of torch's threads within operations."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["one_torch_thread", "thread_map"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
ThreadMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

_AHEAD = 2  # results for each thread that may wait

_lock = threading.Lock()
_entered = 0
_threads_before = 1


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Limit torch to one thread per operation, and yield how many it had.

    The last bits of a sum depend on how many threads share it. With one thread per operation, and whole runs
    spread over threads, they do not; small operations also avoid the cost of synchronization. Several threads may
    enter at once.
    """
    global _entered, _threads_before
    # torch keeps this setting per thread, and a separate one that new threads start with.
    own = torch.get_num_threads()
    with _lock:
        if _entered == 0:
            _threads_before = own
        torch.set_num_threads(1)
        _entered += 1
        before = _threads_before
    try:
        yield before
    finally:
        with _lock:
            _entered -= 1
            torch.set_num_threads(own)
            others = threading.Thread(target=torch.set_num_threads, args=(1 if _entered else before,))
            others.start()
            others.join()


@contextmanager
def thread_map(threads: int, stop: threading.Event) -> Iterator[ThreadMap]:
    """Yield a ``map`` over ``threads`` threads that gives results in order, as they become ready.

    If the caller exits with an exception, an interrupt included, ``stop`` is set: running items check it and end
    early, and items that have not started are cancelled.
    """
    if threads == 1:
        yield map
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield functools.partial(_run, pool, _AHEAD * threads)
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(
    pool: ThreadPoolExecutor, ahead: int, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """Results in order; no more than ``ahead`` of them wait to be taken, and none is kept."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
