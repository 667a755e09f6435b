import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from infoq_fx.core import memory
from infoq_fx.core.memory import available_memory_bytes
from infoq_fx.core.threads import one_torch_thread, thread_map


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_torch_has_one_thread_within_and_its_own_after(two_threads):
    with one_torch_thread() as outer:
        assert (outer, torch.get_num_threads()) == (2, 1)
        with one_torch_thread() as inner:
            assert inner == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_several_threads_may_be_within(two_threads):
    inside, leave, seen = threading.Event(), threading.Event(), []

    def hold():
        with one_torch_thread():
            inside.set()
            leave.wait()
            seen.append(torch.get_num_threads())

    def ask():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    thread = threading.Thread(target=hold)
    with one_torch_thread():
        thread.start()
        inside.wait()
        assert ask() == 1
    assert torch.get_num_threads() == 2
    assert ask() == 1  # the other is still within, and its threads begin with one
    leave.set()
    thread.join()
    assert seen == [1]
    assert torch.get_num_threads() == ask() == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(threads):
    with thread_map(threads, threading.Event()) as spread:
        assert list(spread(lambda x: x * x, range(20))) == [x * x for x in range(20)]
        assert list(spread(str, [1])) == ["1"]


def test_leaving_by_an_exception_stops_what_runs_and_what_waits():
    stop, begun = threading.Event(), []

    def run_options(item):
        begun.append(item)
        if item == 0:
            raise KeyboardInterrupt
        stop.wait(20)

    with pytest.raises(KeyboardInterrupt), thread_map(2, stop) as spread:
        list(spread(run_options, range(50)))
    assert stop.is_set()
    assert len(begun) < 10


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    free = available_memory_bytes()
    assert free > 0
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (limit, Path("no such file")))
    assert available_memory_bytes() > free // 2
    limit.write_text("1000\n")
    assert available_memory_bytes() == 0
