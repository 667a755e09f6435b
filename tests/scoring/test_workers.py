"""Scores are the same to the last digit with any executor."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from scored import entries, score

from infoq_fx.scoring import workers


def make_process_pool(count):
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def make_loky():
    import loky

    return loky.ProcessPoolExecutor(2)


@pytest.mark.filterwarnings("ignore")  # the pools' own
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ThreadPoolExecutor(2), id="threads"),
        pytest.param(lambda: make_process_pool(1), id="process", marks=pytest.mark.slow),
        pytest.param(lambda: make_process_pool(3), id="processes", marks=pytest.mark.slow),
        pytest.param(make_loky, id="loky", marks=pytest.mark.slow),
    ],
)
def test_workers_change_no_digit(make, prepared_and_data, table, tmp_path):
    with make() as executor:
        found = score(*prepared_and_data, executor=executor, cache_dir=tmp_path, memory_limit=20_000)
        assert found.scores == table.scores
        assert executor.submit(int, "3").result() == 3  # it stays the caller's
    assert score(*prepared_and_data, cache_dir=tmp_path).scores == table.scores


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_loses_a_worker_and_no_score(prepared_and_data, table, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)
        victim = next(iter(pids.values()))

        def kill_in_the_middle():
            while not entries(tmp_path):
                time.sleep(0.002)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill_in_the_middle, daemon=True)
        killer.start()
        found = score(*prepared_and_data, executor=client.get_executor(), cache_dir=tmp_path, memory_limit=1)
        killer.join()
        assert victim not in client.run(os.getpid).values()
    assert found.scores == table.scores


@pytest.mark.slow
def test_workers_that_cannot_read_the_files_get_them_sent(prepared_and_data, table, monkeypatch):
    sent = []
    read = workers._read

    def read_elsewhere(folder):
        if (folder / "model").exists() and folder.name == current[0]:
            raise OSError("no such folder on this machine")
        return read(folder)

    class Remote(ThreadPoolExecutor):
        def submit(self, function, job, *args):
            current[0] = Path(job.folder).name
            sent.append(job.content is not None)
            return super().submit(function, pickle.loads(pickle.dumps(job)), *args)

    class Elsewhere(dict):
        def __setitem__(self, key, value):
            """Another process does not have it."""

    current = [""]
    monkeypatch.setattr(workers, "_here", Elsewhere())
    monkeypatch.setattr(workers, "_read", read_elsewhere)
    with Remote(1) as executor:
        found = score(*prepared_and_data, executor=executor, memory_limit=1)
    assert found.scores == table.scores
    assert any(sent)
    assert not all(sent)


@pytest.mark.slow
def test_threads_of_one_worker_load_the_job_once_and_before_they_run(prepared_and_data, table, monkeypatch):
    # Loading traces the graph, for which torch.fx patches every module of the process.
    loads, load = [], workers._load

    def count(job):
        loads.append(job.digest)
        time.sleep(0.2)
        return load(job)

    class Elsewhere(dict):
        def __setitem__(self, key, value):
            """Another process does not have it."""

    monkeypatch.setattr(workers, "_here", Elsewhere())
    monkeypatch.setattr(workers, "_load", count)
    with ThreadPoolExecutor(3) as executor:
        found = score(*prepared_and_data, executor=executor, memory_limit=1)
    assert found.scores == table.scores
    assert len(loads) == 1


class DyingPool(Executor):
    """Does one block, then breaks as a process pool does whose worker was killed."""

    def __init__(self):
        self.blocks = 0

    def submit(self, function, /, *args):
        future = Future()
        self.blocks += 1
        if self.blocks == 1:
            future.set_result(function(*args))
        else:
            future.set_exception(BrokenProcessPool("a worker was killed"))
        return future


@pytest.mark.slow
def test_a_broken_pool_is_carried_on_here(prepared_and_data, table, caplog):
    pool = DyingPool()
    found = score(*prepared_and_data, executor=pool, memory_limit=1)
    assert pool.blocks > 2
    assert "what is left is scored in this process" in caplog.text
    assert found.scores == table.scores
