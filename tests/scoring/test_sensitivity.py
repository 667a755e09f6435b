"""Scores do not depend on threads, memory or blocks; criteria of a user's own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import ResidualNet, randomise_norms
from scored import BITS, CRITERION, entries, score

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.runtime.forward import RunOptions, choose_batch_size
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.types import Measurement, Score


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "memory_limit", [None, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (100_000, 1 << 30))]
)
def test_threads_and_memory_change_no_digit(threads, memory_limit, prepared_and_data, table):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = score(*prepared_and_data, memory_limit=memory_limit)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.scores == table.scores


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


@pytest.mark.slow
def test_quantize_takes_the_same_resources(prepared_and_data, tmp_path):
    _, data = prepared_and_data
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    options = {"calibration_data": data, "bits": BITS, "recovery": "none", "progress": False, "cache_dir": tmp_path}
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
