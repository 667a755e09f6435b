"""What the machine gives: threads of our own in place of torch's, and memory."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["one_torch_thread", "thread_map"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
ThreadMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

_lock = threading.Lock()
_entered = 0
_threads_before = 1


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Hold torch to one thread an operation, and give how many it had.

    The last bits of a sum depend on how many threads share it. With one thread an operation, and whole runs
    spread over threads, they do not; and small operations do not pay for the exchange. May be entered by several
    threads at once.
    """
    global _entered, _threads_before
    # The setting is one of every thread's own and, apart from that, one that new threads begin with.
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
    """A ``map`` over so many threads that gives results in order, as they come.

    Where the caller leaves by an exception, an interrupt included, ``stop`` is set: items look at it and end
    early, those that have not begun never begin.
    """
    if threads == 1:
        yield map
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield functools.partial(_run, pool)
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    futures = [pool.submit(function, item) for item in items]
    for future in futures:
        yield future.result()
