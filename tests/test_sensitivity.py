"""Scores must not depend on how they were come by, and nothing that was finished may be lost."""

import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.runtime.forward import RunOptions, choose_batch_size
from infoq_fx.scoring import workers
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.types import Measurement, Score

BITS = (2, 4, 8)
SCORING = """
import sys, torch
sys.path.insert(0, {tests!r})
import infoq_fx
from test_sensitivity import build, CRITERION
prepared, data = build()
print("ready", flush=True)
infoq_fx.score(prepared, data, criterion=CRITERION, cache_dir={cache!r}, memory_limit=1, progress=False)
"""
CRITERION = infoq_fx.InfoQPaper(slices=16)


def build(bits=BITS, **options):
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(96, 1, 8, 8, generator=generator), torch.randint(0, 5, (96,), generator=generator)
    return infoq_fx.prepare(model, data, bits=bits, **options), data


@pytest.fixture(scope="module")
def prepared_and_data():
    return build()


@pytest.fixture(scope="module")
def table(prepared_and_data):
    return score(*prepared_and_data)


def score(prepared, data, **options):
    return infoq_fx.score(prepared, data, **{"criterion": CRITERION, "progress": False, **options})


def entries(folder):
    return sorted(path for path in Path(folder).rglob("*.json") if path.name != "about.json")


# The same to the last digit -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("memory_limit", [None, 1, 100_000, 1 << 30])
def test_threads_and_memory_change_no_digit(threads, memory_limit, prepared_and_data, table):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = score(*prepared_and_data, memory_limit=memory_limit)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.scores == table.scores


def make_process_pool():
    return ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn"))


def make_loky():
    import loky

    return loky.ProcessPoolExecutor(2)


@pytest.mark.filterwarnings("ignore")  # the pools' own
@pytest.mark.parametrize(
    "make", [lambda: ThreadPoolExecutor(2), make_process_pool, make_loky], ids=["threads", "processes", "loky"]
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


def test_a_broken_pool_is_carried_on_here(prepared_and_data, table, caplog):
    pool = DyingPool()
    found = score(*prepared_and_data, executor=pool, memory_limit=1)
    assert pool.blocks > 2
    assert "what is left is scored in this process" in caplog.text
    assert found.scores == table.scores


# Never lost -----------------------------------------------------------------------------------------


def count_measured(monkeypatch):
    from infoq_fx.scoring.information.measurement import InformationMeasure

    measured, original = [], InformationMeasure.__call__

    def call(self, prepared, data, sites, run_options):
        measured.extend((site.name, bits) for site in sites for bits in site.bits)
        return original(self, prepared, data, sites, run_options)

    monkeypatch.setattr(InformationMeasure, "__call__", call)
    return measured


def test_a_second_run_scores_nothing(prepared_and_data, table, tmp_path, monkeypatch):
    assert score(*prepared_and_data, cache_dir=tmp_path).scores == table.scores
    monkeypatch.setattr(infoq_fx.InfoQPaper, "begin", lambda *_, **__: pytest.fail("nothing is left to measure"))
    again = score(*prepared_and_data, cache_dir=tmp_path)
    assert again == table
    assert len(entries(tmp_path)) == sum(len(by_bits) for by_bits in table.scores.values())


def test_one_more_bit_width_scores_only_that(prepared_and_data, table, tmp_path, monkeypatch):
    score(*prepared_and_data, cache_dir=tmp_path)
    measured = count_measured(monkeypatch)
    more, data = build(bits=(*BITS, 3))
    found = score(more, data, cache_dir=tmp_path)
    assert {bits for _, bits in measured} == {3}
    assert all(found.scores[site][bits] == value for site, by in table.scores.items() for bits, value in by.items())
    assert found.scores == score(more, data).scores


def test_one_more_site_scores_only_that(tmp_path, monkeypatch):
    pinned, data = build(pin={"blocks.0.conv1": 8})
    score(pinned, data, cache_dir=tmp_path)
    measured = count_measured(monkeypatch)
    score(*build(), cache_dir=tmp_path)
    assert {site for site, _ in measured} == {"blocks.0.conv1.weight"}


def change_a_weight(prepared, data, options):
    with torch.no_grad():
        prepared.graph_module.get_parameter("head.weight")[0, 0] += 1e-3


def change_the_data(prepared, data, options):
    data[0][0, 0, 0, 0] += 1e-3


def change_a_label(prepared, data, options):
    data[1][0] = (data[1][0] + 1) % 5


def change_the_seed(prepared, data, options):
    options["criterion"] = dataclasses.replace(CRITERION, seed=1)


def change_the_slices(prepared, data, options):
    options["criterion"] = dataclasses.replace(CRITERION, slices=17)


def change_the_observers(prepared, data, options):
    options["criterion"] = dataclasses.replace(CRITERION, observers=["output"])


def change_the_encoder(prepared, data, options):
    options["criterion"] = dataclasses.replace(CRITERION, encoder=lambda x: x.flatten(1)[:, :3])


def change_the_version(prepared, data, options):
    options["monkeypatch"].setattr("infoq_fx.scoring.cache.__version__", "0.0.9")


CHANGES = [value for name, value in sorted(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_made_of_anything_else_is_not_used(change, tmp_path, monkeypatch):
    prepared, data = build()
    score(prepared, data, cache_dir=tmp_path)
    options = {"monkeypatch": monkeypatch}
    change(prepared, data, options)
    options.pop("monkeypatch")
    measured = count_measured(monkeypatch)
    found = score(prepared, data, cache_dir=tmp_path, **options)
    assert len(measured) == sum(len(by_bits) for by_bits in found.scores.values())
    assert found.scores == score(prepared, data, **options).scores


def test_an_encoder_is_known_by_what_it_does(prepared_and_data, tmp_path, monkeypatch):
    for _ in range(2):
        criterion = dataclasses.replace(CRITERION, encoder=lambda x: x.flatten(1)[:, :3])
        score(*prepared_and_data, criterion=criterion, cache_dir=tmp_path)
        measured = count_measured(monkeypatch)
    assert not measured


def truncate(path):
    path.write_text(path.read_text()[:-20])


def swap_site(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "site": "another.weight"}))


def damage(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "values": {"a": "b"}}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "cut short"),
        (swap_site, "another run"),
        (damage, "no numbers"),
        (lambda path: path.write_text("{}"), "format marker"),
        (lambda path: path.write_bytes(pickle.dumps([1])), "binary"),
    ],
    ids=["truncated", "other site", "damaged", "foreign", "pickle"],
)
def test_a_spoilt_file_is_named_and_measured_again(spoil, reason, prepared_and_data, table, tmp_path, caplog):
    score(*prepared_and_data, cache_dir=tmp_path)
    victim = entries(tmp_path)[5]
    original = victim.read_text()
    spoil(victim)
    with caplog.at_level(logging.WARNING):
        assert score(*prepared_and_data, cache_dir=tmp_path).scores == table.scores
    assert victim.name in caplog.text
    assert reason in caplog.text
    assert victim.read_text() == original


def test_the_cache_says_what_it_was_made_with(prepared_and_data, tmp_path):
    score(*prepared_and_data, cache_dir=tmp_path)
    (about,) = tmp_path.rglob("about.json")
    told = json.loads(about.read_text())
    assert told["criterion"] == "infoq_paper"
    assert told["slices"] == 16
    assert infoq_fx.__version__ in told["made by"]


def start_scoring(cache):
    code = SCORING.format(tests=str(Path(__file__).parent), cache=str(cache))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    while len(entries(cache)) < 3 and process.poll() is None:
        time.sleep(0.001)
    return process


def test_a_killed_run_goes_on_where_it_was(prepared_and_data, table, tmp_path, monkeypatch):
    process = start_scoring(tmp_path)
    process.kill()
    process.communicate()
    kept = len(entries(tmp_path))
    measured = count_measured(monkeypatch)
    found = score(*prepared_and_data, cache_dir=tmp_path, memory_limit=1)
    assert kept >= 3
    assert len(measured) == sum(len(by_bits) for by_bits in table.scores.values()) - kept
    assert found.scores == table.scores


def test_an_interrupt_ends_soon_and_says_how_to_go_on(tmp_path):
    process = start_scoring(tmp_path)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    took = time.monotonic() - start
    if process.returncode != 0:  # it may have been done before
        assert f"the same call with cache_dir={str(tmp_path)!r} goes on from there" in errors
    assert took < 45  # with the end of the interpreter, which took 15 s beside three other jobs on two cores


@pytest.mark.parametrize("threads", [1, 2])
def test_without_a_cache_an_interrupted_run_leaves_one(threads, prepared_and_data, table, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("infoq_fx.scoring.sensitivity._BLOCK_RUNS", 4)
    calls = []
    real = infoq_fx.scoring.information.measurement._Projections.add

    def project(self, *args):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        real(self, *args)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("infoq_fx.scoring.information.measurement._Projections.add", project)
            with pytest.raises(
                KeyboardInterrupt, match=r"of 18 bit-widths were scored and are kept.*cache_dir='(.*)'"
            ) as found:
                score(*prepared_and_data)
    finally:
        torch.set_num_threads(before)
    folder = str(found.value).split("cache_dir='")[1].split("'")[0]
    assert entries(folder)
    measured = count_measured(monkeypatch)
    assert score(*prepared_and_data, cache_dir=folder).scores == table.scores
    assert 0 < len(measured) < 18


def test_an_error_is_noted_with_what_is_kept(prepared_and_data, monkeypatch, tmp_path):
    monkeypatch.setattr("infoq_fx.scoring.information.measurement._Projections.add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as found:
        score(*prepared_and_data, cache_dir=tmp_path)
    assert "before anything was finished" in found.value.__notes__[0]


# Work and resources ---------------------------------------------------------------------------------


class Halves:
    """A criterion of a user's own."""

    name, needs_data, kinds = "halves", False, ("weight", "activation")

    def describe(self, prepared, data):
        return {}

    def begin(self, prepared, data, *, batch_size, run_options):
        return HalvesMeasure()

    def score(self, prepared, measurements):
        scores = {}
        for m in measurements:
            scores.setdefault(m.site, {})[m.bits] = Score(m.values["half"])
        return scores


class HalvesMeasure:
    run_bytes = 0

    def __call__(self, prepared, data, sites, run_options):
        run_options.advance(sum(len(site.bits) for site in sites))
        return [Measurement(site.name, bits, {"half": bits / 2}) for site in sites for bits in site.bits]


def test_a_criterion_of_the_users_own_is_cached_and_sent_too(prepared_and_data, tmp_path):
    prepared, _ = prepared_and_data
    with ThreadPoolExecutor(2) as executor:
        found = score(prepared, None, criterion=Halves(), executor=executor, cache_dir=tmp_path)
    assert found.scores["head.weight"][4].value == 2.0
    assert len(entries(tmp_path)) == 18


def test_a_criterion_that_cannot_be_sent_is_refused(prepared_and_data):
    class Local(HalvesMeasure):
        pass

    class Unsendable(Halves):
        def begin(self, prepared, data, *, batch_size, run_options):
            return Local()

    with ThreadPoolExecutor(1) as executor, pytest.raises(OptionError, match="leave executor out"):
        score(prepared_and_data[0], None, criterion=Unsendable(), executor=executor)


def test_blocks_keep_within_the_memory(prepared_and_data):
    from infoq_fx.scoring.sensitivity import _cut_blocks

    prepared, data = prepared_and_data
    named = read_data(data).named(prepared.input_names)
    measure = CRITERION.begin(prepared, named, batch_size=32, run_options=RunOptions())
    sites = [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    runs = sum(bits != 8 for site in sites for bits in site.bits)
    for room in (0, 3 * measure.run_bytes + 30_000, 1 << 40):
        blocks = _cut_blocks(sites, measure, room, 100)
        assert [(s.name, b) for block in blocks for s in block for b in s.bits] == [
            (s.name, b) for s in sites for b in s.bits
        ]
        for block in blocks:
            needed = [measure.run_bytes + 4 * s.numel for s in block for b in s.bits if b != 8]
            assert len(needed) <= 1 or sum(needed) <= room
    assert len(_cut_blocks(sites, measure, 0, 100)) == runs
    assert len(_cut_blocks(sites, measure, 1 << 40, 5)) == -(-runs // 5)


def test_the_batch_follows_the_memory_only_where_it_must(prepared_and_data):
    prepared, _ = prepared_and_data
    assert choose_batch_size(prepared) == choose_batch_size(prepared, 1 << 30) == 64
    assert choose_batch_size(prepared, 100_000) < 64


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bar_counts_every_bit_width_once(threads, prepared_and_data, tmp_path, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        score(*prepared_and_data, cache_dir=tmp_path, progress=True)
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().err
    assert "18/18" in shown
    assert "bit-width/s" in shown or "s/bit-width" in shown
    for path in entries(tmp_path)[:4]:
        path.unlink()
    score(*prepared_and_data, cache_dir=tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "14/18" in shown
    assert "18/18" in shown
    score(*prepared_and_data, cache_dir=tmp_path)
    assert capsys.readouterr().err == ""


def test_quantize_takes_the_same_resources(prepared_and_data, tmp_path):
    _, data = prepared_and_data
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    options = {"calibration_data": data, "bits": BITS, "progress": False, "cache_dir": tmp_path}
    first = infoq_fx.quantize(model, 4.0, **options)
    kept = entries(tmp_path)
    second = infoq_fx.quantize(model, 3.0, **options)
    assert entries(tmp_path) == kept
    assert infoq_fx.allocation_of(first).cost.weight_bits <= 4
    assert infoq_fx.allocation_of(second).cost.weight_bits <= 3


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_memory_limit_is_a_number_of_bytes(limit):
    with pytest.raises(OptionError, match="memory_limit="):
        Resources(memory_limit=limit)


def test_an_executor_is_an_executor(prepared_and_data):
    with pytest.raises(OptionError, match=r"give a concurrent\.futures\.Executor"):
        score(*prepared_and_data, executor=4)


def test_a_cache_that_cannot_be_written_is_refused(prepared_and_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="give another cache_dir"):
        score(*prepared_and_data, cache_dir=tmp_path / "file")


def test_an_explicit_measurement_call_equals_the_table(prepared_and_data, table):
    prepared, data = prepared_and_data
    found, measurements = measure_sensitivity(
        prepared, read_data(data).named(prepared.input_names), CRITERION, Resources(progress=False)
    )
    assert found == table
    assert len(measurements) == 18
