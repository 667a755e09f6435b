from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from logits import compute_float_logits, compute_logits, diverge, measure_spread
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.core.memory import copy_to_disk
from infoq_fx.errors import OptionError
from infoq_fx.quantization.numerics import dequantize
from infoq_fx.recovery import candidates as module
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.recovery.moments.input_moments import InputMoments, InputSamples
from infoq_fx.recovery.parameters import fork, set_parameter
from infoq_fx.recovery.segments import find_segments
from infoq_fx.runtime.forward import RunOptions


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    images = torch.randn(96, 1, 8, 8)
    prepared = infoq_fx.prepare(model, images, bits=(2, 3, 8), outputs="categorical")
    return prepared, read_data(images).named(prepared.input_names)


def weights_of(prepared):
    return [site for site in prepared.inventory.sites if site.kind == "weight"]


def mean_nats(prepared, data, bits):
    reference = compute_float_logits(prepared, data, batch_size=16)
    return diverge(reference, compute_logits(prepared, data, bits), measure_spread(reference)).mean()


def test_rounded_weights_are_integers_of_their_width_and_lose_less_than_the_nearest(residual):
    prepared, data = residual
    rounded = Candidates(prepared, data).round(prepared.inventory.sites, RunOptions())
    sites = weights_of(prepared)
    assert set(rounded.rounded) == {(site.name, bits) for site in sites for bits in (2, 3)}
    for (name, bits), found in rounded.rounded.items():
        site = next(site for site in sites if site.name == name)
        assert found.q.dtype == torch.int8
        assert tuple(found.q.shape) == site.shape
        assert len(found.q.unique()) <= 1 << bits
        assert set(found.q.unique().tolist()) <= set(found.qparams.levels.tolist())
    lost = [[float(mean_nats(model, data, {site.name: 2})) for site in sites] for model in (rounded, prepared)]
    assert sum(lost[0]) < 0.7 * sum(lost[1])


def test_scores_are_those_of_the_rounded_weights_put_in_place(residual):
    prepared, data = residual
    table = infoq_fx.score(prepared, data, criterion="output_kl", progress=False)
    nearest = infoq_fx.score(prepared, data, criterion="output_kl", recovery="none", progress=False)
    rounded = Candidates(prepared, data).round(prepared.inventory.sites, RunOptions()).rounded
    base = compute_logits(prepared, data, batch_size=16)
    for node, quantizer in prepared.quantizer_nodes():
        name = quantizer.site.name
        if quantizer.site.kind != "weight":
            continue
        changed, found = fork(prepared), rounded[name, 2]
        set_parameter(changed, str(node.all_input_nodes[0].target), dequantize(found.q, found.qparams))
        own = dict(changed.quantizer_nodes())
        (module,) = (module for module in own.values() if module.site.name == name)
        known = {bits: module.qparams_at(bits) for bits in module.calibrated_bits}
        module.set_qparams({**known, 2: found.qparams}, torch.device("cpu"))
        logits = compute_logits(changed, data, {name: 2}, batch_size=16)
        expected = float(diverge(base, logits, measure_spread(base)).mean())
        assert table.scores[name][2].value == pytest.approx(expected, rel=1e-4)
    assert table.scores["head.weight"][2].value < 0.7 * nearest.scores["head.weight"][2].value
    assert table.settings["weights"] == "rounded to second order"
    assert "weights" not in nearest.settings


def test_a_criterion_that_runs_no_weights_is_given_none(residual, monkeypatch):
    prepared, data = residual
    expected = infoq_fx.score(prepared, data, criterion="mpqco", recovery="none", progress=False)
    monkeypatch.setattr(Candidates, "round", None)  # rounding would fail
    assert infoq_fx.score(prepared, data, criterion="mpqco", progress=False) == expected


def test_a_finished_table_is_read_without_rounding_again(residual, tmp_path, monkeypatch):
    prepared, data = residual
    first = infoq_fx.score(prepared, data, cache_dir=tmp_path, progress=False)
    other = infoq_fx.score(prepared, data, recovery="none", cache_dir=tmp_path, progress=False)
    assert first.scores != other.scores  # each under a key of its own
    monkeypatch.setattr(Candidates, "round", None)
    assert infoq_fx.score(prepared, data, cache_dir=tmp_path, progress=False) == first


def test_a_missing_bit_width_is_rounded_as_among_all_others(residual, tmp_path):
    prepared, data = residual
    whole = Candidates(prepared, data).round(prepared.inventory.sites, RunOptions(threads=2)).rounded
    candidates, (_, second, *_) = Candidates(prepared, data), weights_of(prepared)
    alone = candidates.round([second], RunOptions()).rounded
    assert {name for name, _ in alone} == {second.name}
    for key, found in alone.items():
        assert torch.equal(found.q, whole[key].q)
        assert torch.equal(found.qparams.scale, whole[key].qparams.scale)
    assert candidates.round([second], RunOptions()).rounded[second.name, 2] is alone[second.name, 2]
    assert candidates.cpu_seconds > 0


def test_workers_get_the_rounded_weights(residual):
    prepared, data = residual
    here = infoq_fx.score(prepared, data, progress=False)
    with ThreadPoolExecutor(2) as executor:
        assert infoq_fx.score(prepared, data, executor=executor, progress=False) == here


def test_refine_compares_what_recovery_would_leave(residual):
    prepared, data = residual
    table = infoq_fx.score(prepared, data, progress=False)
    chosen = infoq_fx.refine(prepared, table, 2.5, data)
    rounded = Candidates(prepared, data).round(prepared.inventory.sites, RunOptions())
    assert chosen.lost_nats == pytest.approx(float(mean_nats(rounded, data, chosen.bits)), rel=1e-6)
    assert chosen.lost_nats < infoq_fx.refine(prepared, table, 2.5, data, recovery="none").lost_nats


def test_what_cannot_be_rounded_so_is_rounded_to_nearest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.randn(32, 2, 2, 2)
    prepared = infoq_fx.prepare(model, images, bits=(2, 8))
    data = read_data(images).named(prepared.input_names)
    assert {name for name, _ in Candidates(prepared, data).round(prepared.inventory.sites, RunOptions()).rounded} == {
        "3.weight"
    }
    assert infoq_fx.score(prepared, images, progress=False).scores["0.weight"][2].value > 0
    with pytest.raises(OptionError, match=r"unknown recovery .fats.; .* .fast."):
        infoq_fx.score(prepared, images, recovery="fats", progress=False)


class Attention(nn.Module):
    """torch's attention, whose output projection reads rows of tokens first: ``[tokens * samples, features]``."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(48, 4, batch_first=True), nn.Linear(48, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_rows_of_tokens_are_counted_whatever_their_order():
    """64 rows are more than 48 columns, though one row a sample would be few: moments, not the rows themselves."""
    torch.manual_seed(0)
    data = torch.randn(2, 32, 48)
    prepared = infoq_fx.prepare(Attention().eval(), data, bits=4)
    candidates = Candidates(prepared, read_data(data).named(prepared.input_names))
    sites = {layer.site.name: layer for segment in find_segments(prepared) for layer in segment.layers}
    moments = candidates._measure_moments(list(sites.values()), RunOptions())
    counts = {name: (type(found), found.count) for name, found in moments.items()}
    assert counts["attention.out_proj.weight"] == (InputMoments, 64)
    assert counts["attention.in_proj_weight"] == (InputMoments, 64)
    assert counts["head.weight"] == (InputSamples, 2)


def test_rounded_weights_on_disk_are_those_in_memory(residual, monkeypatch):
    prepared, data = residual
    kept = Candidates(prepared, data).round(prepared.inventory.sites, RunOptions()).rounded
    copied = []
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(module, "copy_to_disk", lambda q: copied.extend(q) or copy_to_disk(q))
    on_disk = Candidates(prepared, data).round(prepared.inventory.sites, RunOptions()).rounded
    assert 0 < sum(q.numel() for q in copied) >= sum(x.q.numel() for x in kept.values()) - 1000
    assert all(torch.equal(kept[run].q, found.q) for run, found in on_disk.items())
