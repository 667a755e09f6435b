"""Scores are cached, and reused only for the same model, data and options."""

import copy
import dataclasses
import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scored import BITS, CRITERION, build, count_measured, entries, score

import infoq_fx

SCORING = """
import sys, torch
sys.path.insert(0, {tests!r})
import infoq_fx
from scored import build, CRITERION
prepared, data = build()
print("ready", flush=True)
infoq_fx.score(prepared, data, criterion=CRITERION, cache_dir={cache!r}, memory_limit=1, progress=False)
"""


def test_a_second_run_scores_nothing(prepared_and_data, table, tmp_path, monkeypatch):
    assert score(*prepared_and_data, cache_dir=tmp_path).scores == table.scores
    monkeypatch.setattr(infoq_fx.InfoQPaper, "begin", lambda *_, **__: pytest.fail("nothing is left to measure"))
    again = score(*prepared_and_data, cache_dir=tmp_path)
    assert again == table
    assert len(entries(tmp_path)) == sum(len(by_bits) for by_bits in table.scores.values())


@pytest.mark.slow
def test_one_more_bit_width_scores_only_that(prepared_and_data, table, tmp_path, monkeypatch):
    score(*prepared_and_data, cache_dir=tmp_path)
    measured = count_measured(monkeypatch)
    more, data = build(bits=(*BITS, 3))
    found = score(more, data, cache_dir=tmp_path)
    assert {bits for _, bits in measured} == {3}
    assert all(found.scores[site][bits] == value for site, by in table.scores.items() for bits, value in by.items())
    assert found.scores == score(more, data).scores


@pytest.mark.slow
def test_one_more_site_scores_only_that(prepared_and_data, tmp_path, monkeypatch):
    pinned, data = build(pin={"blocks.0.conv1": 8})
    score(pinned, data, cache_dir=tmp_path)
    measured = count_measured(monkeypatch)
    score(*prepared_and_data, cache_dir=tmp_path)
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
    options["monkeypatch"].setattr("infoq_fx.runtime.digest.__version__", "0.0.9")


CHANGES = [value for name, value in sorted(globals().items()) if name.startswith("change_")]


@pytest.fixture(scope="module")
def kept(prepared_and_data, tmp_path_factory):
    """A folder of finished measurements."""
    folder = tmp_path_factory.mktemp("kept")
    score(*prepared_and_data, cache_dir=folder)
    return folder


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_made_of_anything_else_is_not_used(change, prepared_and_data, kept, tmp_path, monkeypatch):
    prepared, data = copy.deepcopy(prepared_and_data)
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
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
        (damage, "are not numbers"),
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
    code = SCORING.format(tests=str(Path(__file__).parents[1]), cache=str(cache))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    while len(entries(cache)) < 3 and process.poll() is None:
        time.sleep(0.001)
    return process


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_interrupt_ends_soon_and_says_how_to_go_on(tmp_path):
    process = start_scoring(tmp_path)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    took = time.monotonic() - start
    if process.returncode != 0:  # it may have been done before
        assert f"the same call with cache_dir={str(tmp_path)!r} resumes from there" in errors
    assert took < 45  # includes the interpreter's exit, which took 15 s with three other jobs on two cores


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
