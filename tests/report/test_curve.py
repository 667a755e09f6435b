"""The report's values: curves, costs of containers, contents of the page, and that it needs no network access."""

import dataclasses
import json
import math
import pickle
import re
import sys
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from browser import read_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import SMALL, make_table, weight

import infoq_fx
from infoq_fx import Allocation, Budget, allocate
from infoq_fx.allocation.cost import measure_cost, weight_bytes
from infoq_fx.auditing.result import AuditRow
from infoq_fx.report import page
from infoq_fx.report.curve import container_bytes, damage_scale, describe_allocation, find_uniforms, trace_curve
from infoq_fx.types import MeasuredLoss, Score

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny

REPORT = pytest.importorskip("vl_convert", reason='the page needs "infoq-fx[report]"') and infoq_fx.write_report


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    options = dict(criterion="weight_mse", recovery="none", progress=False)
    return infoq_fx.quantize(model, 4.0, calibration_data=torch.randn(32, 6), **options)


@pytest.mark.parametrize("name", ["size_bytes", "bitops"])
def test_the_curve_is_what_allocate_finds_from_the_least_to_where_the_limit_no_longer_binds(name):
    curve = trace_curve(SMALL, name, budgets=12)
    smallest = measure_cost(SMALL.inventory, {site.name: site.bits[0] for site in SMALL.inventory.sites})
    assert curve.limits[0] == getattr(smallest, name)
    assert len(curve.limits) == 12
    steps = np.diff(curve.limits)
    assert steps.max() - steps.min() <= 1
    for limit, found in zip(curve.limits, curve.allocations, strict=True):
        assert found == allocate(SMALL, Budget(**{name: limit}))
    scores = [found.score for found in curve.allocations]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == allocate(SMALL, Budget(**{name: 1e12})).score
    assert scores[-2] > scores[-1]


def test_a_curve_keeps_to_pins_and_alpha():
    curve = trace_curve(SMALL, budgets=4, alpha=3.0, pin={"conv": 5})
    assert {found.bits["conv"] for found in curve.allocations} == {5}
    assert curve.allocations[1] == allocate(SMALL, Budget(size_bytes=curve.limits[1]), alpha=3.0, pin={"conv": 5})


def test_uniform_allocations_are_scored_by_the_table():
    for bits, found in find_uniforms(SMALL).items():
        assert found.bits["conv"] == found.bits["fc"] == bits
        assert found.score == pytest.approx(
            math.fsum(SMALL.scores[n][b].value for n, b in found.bits.items() if n in SMALL.scores)
        )
        assert found.cost == measure_cost(SMALL.inventory, found.bits)
        best = allocate(SMALL, Budget(size_bytes=found.cost.size_bytes))
        assert best.score <= found.score
        assert (best.uniform_bits, best.uniform_score) == (bits, pytest.approx(found.score))


def test_an_allocation_of_another_model_is_refused():
    with pytest.raises(infoq_fx.OptionError, match="'conv' None bits"):
        describe_allocation(SMALL, Allocation(bits={"other": 4}))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(2, 8)), min_size=1, max_size=5), st.integers(0, 99))
def test_containers_cost_what_their_integers_take(layers, float_bytes):
    sites = tuple(weight(f"w{i}", numel) for i, (numel, _) in enumerate(layers))
    inventory = make_table(sites, {}, float_bytes=float_bytes).inventory
    exact, int8 = container_bytes(inventory, {f"w{i}": bits for i, (_, bits) in enumerate(layers)}).values()
    around = 4 * len(layers) + float_bytes
    assert exact == sum(-(-numel * bits // 8) for numel, bits in layers) + around
    assert int8 == sum(numel for numel, _ in layers) + around
    assert exact <= int8


@pytest.mark.slow
def test_the_int8_container_is_what_the_file_stores(images, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    prepared = infoq_fx.prepare(model.eval(), images[0], bits=(2, 4, 8))
    bits = {site.name: site.bits[len(site.bits) // 2] for site in prepared.inventory.sites}
    infoq_fx.export_onnx(infoq_fx.convert(prepared, Allocation(bits=bits)), tmp_path / "m.onnx", container="int8")
    held = defaultdict(int)
    for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        held["weights" if values.dtype.itemsize == 1 and values.ndim > 1 else "rest"] += values.nbytes
    sites = [site for site in prepared.inventory.sites if site.kind == "weight"]
    scales = sum(weight_bytes(site, 8) - site.numel for site in sites)
    assert (
        held["weights"] == container_bytes(prepared.inventory, bits)["int8"] - scales - prepared.inventory.float_bytes
    )


@settings(deadline=None)
@given(st.lists(st.floats(-1e9, 1e9).map(lambda x: 0.0 if abs(x) < 1e-30 else x), max_size=9))
def test_the_damage_axis_covers_all_scores(values):
    linear_below, ticks = damage_scale(values)
    assert linear_below > 0
    assert ticks == sorted(ticks)
    assert 0.0 in ticks
    if any(values):
        assert ticks[-1] >= max(values) * (1 - 1e-9)
        assert ticks[-1] / linear_below == pytest.approx(10 ** round(math.log10(ticks[-1] / linear_below)))


@pytest.mark.slow
def test_the_page_holds_every_allocation_as_json(tmp_path):
    path = REPORT(SMALL, tmp_path / "report.html", budgets=7, title="<mine>")
    data = read_json(path)
    names = [site["name"] for site in data["sites"]]
    assert names == ["conv", "fc", "relu"]
    assert [axis["name"] for axis in data["axes"]] == ["size_bytes", "bitops"]
    for axis in data["axes"]:
        for point in axis["points"]:
            found = allocate(SMALL, Budget(**{axis["name"]: point["limit"]}))
            assert dict(zip(names, point["bits"], strict=True)) == {name: found.bits[name] for name in names}
            assert (point["score"], point["error"]) == (found.score, found.standard_error)
            assert (point["size_bytes"], point["bitops"]) == (found.cost.size_bytes, found.cost.bitops)
    assert "<title>&lt;mine&gt;</title>" in path.read_text()
    document = read_json(path, "report-scores")
    (tmp_path / "scores.json").write_text(json.dumps(document))
    assert infoq_fx.SensitivityTable.load(tmp_path / "scores.json") == SMALL
    again = REPORT(SMALL, tmp_path / "again.html", budgets=7, title="<mine>")
    assert again.read_bytes() == path.read_bytes()


def test_the_page_says_which_layers_are_tied(tmp_path):
    tied = replace(SMALL, inventory=replace(SMALL.inventory, ties=(("conv", "fc"),)))
    sites = read_json(REPORT(tied, tmp_path / "report.html", budgets=3))["sites"]
    assert {site["name"]: site["tie"] for site in sites} == {"conv": 1, "fc": 1, "relu": None}


def test_names_of_layers_cannot_end_a_script(tmp_path):
    name = '</script><img src="http://x.test/">'
    table = make_table((weight(name, 10, (2, 4)),), {name: {2: 1.0, 4: 0.0}})
    path = REPORT(table, tmp_path / "report.html", budgets=2)
    assert read_json(path)["sites"][0]["name"] == name
    assert name not in path.read_text()


class References(HTMLParser):
    """Every attribute that makes a browser fetch something, and the text of styles."""

    def __init__(self):
        super().__init__()
        self.found, self.styles, self.inside, self.policy = [], [], None, ""

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        given = dict(attrs)
        self.found += [v for k, v in attrs if k in {"src", "href", "srcset", "action", "data", "poster", "background"}]
        self.styles.append(given.get("style", ""))
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_data(self, data):
        if self.inside == "style":
            self.styles.append(data)


def test_nothing_on_the_page_is_to_be_fetched(tmp_path):
    parser = References()
    parser.feed(REPORT(SMALL, tmp_path / "report.html", budgets=2).read_text())
    assert set(parser.found) == {"#layers", "data:,"}
    assert parser.policy.startswith("default-src 'none';")
    assert "http" not in parser.policy
    assert not re.search(r"url\(|@import", "".join(parser.styles))


def test_a_quantized_module_remembers_its_table_also_after_pickle(quantized, tmp_path):
    for source in (quantized, pickle.loads(pickle.dumps(quantized))):
        data = read_json(REPORT(source, tmp_path / "report.html", budgets=5))
        own = infoq_fx.allocation_of(quantized)
        (shown,) = [found for found in data["others"] if found["label"] == "this model"]
        assert shown["all_bits"] == own.bits
        assert shown["size_bytes"] == own.cost.size_bytes
        assert shown["score"] == pytest.approx(own.score)
        assert data["criterion"] == "weight_mse"


def test_the_point_found_within_a_tolerance_is_marked_with_what_it_loses(tmp_path):
    loss = MeasuredLoss(measure="drop", limit=1.0, value=0.6, standard_error=0.3, samples=500, metric="top-1")
    found = dataclasses.replace(allocate(SMALL, 4.0), loss=loss)
    data = read_json(REPORT(SMALL, tmp_path / "report.html", allocation=found, budgets=5))
    (shown,) = [other for other in data["others"] if other["kind"] == "your allocation"]
    assert shown["label"] == "the given allocation"
    assert shown["note"] == "the given allocation loses 0.6 ± 0.3 points of top-1"


def test_accuracies_and_correlations_of_an_audit_are_on_it(tmp_path):
    found, uniform = allocate(SMALL, 4.0), find_uniforms(SMALL)[3]
    hits = {"4 bits": np.arange(50) < 40}
    row = AuditRow(
        name="test",
        hits=hits,
        allocations={"4 bits": found},
        correlation=0.5,
        correlation_error=0.1,
        rank_correlation=0.4,
    )
    drops = {"conv": {2: Score(3.0, 0.5), 3: Score(1.0, 0.25)}}
    audit = infoq_fx.Audit(
        rows=(row,),
        budgets=("4 bits",),
        tables={"test": SMALL},
        accuracy_drops=drops,
        float_top1=81.5,
        evaluation_samples=50,
    )
    path = REPORT(SMALL, tmp_path / "r.html", budgets=2, audit=audit, accuracies={"by hand": (uniform, 70.5)})
    data = read_json(path)
    assert [(m["label"], m["accuracy"], m["size_bytes"]) for m in data["measured"]] == [
        ("by hand", 70.5, uniform.cost.size_bytes),
        ("test", 80.0, found.cost.size_bytes),
    ]
    assert data["measured"][1]["error"] == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 50))
    assert data["float_accuracy"] == 81.5
    (correlation,) = data["correlations"]
    assert (correlation["r"], correlation["rank"]) == (0.5, 0.4)
    conv = SMALL.scores["conv"]
    assert correlation["points"] == [
        ["conv", bits, conv[bits].value, conv[bits].standard_error, drop.value, drop.standard_error]
        for bits, drop in drops["conv"].items()
    ]


BAD = {
    "one budget": (dict(budgets=1), infoq_fx.OptionError, "2 or more"),
    "another model": (dict(allocation=Allocation(bits={"x": 2})), infoq_fx.OptionError, "'conv' None bits"),
    "a share": (dict(accuracies={"a": (Allocation(bits={}), 120.0)}), infoq_fx.OptionError, "in percent"),
    "no module": (dict(source=torch.nn.Linear(2, 2)), infoq_fx.OptionError, "give a sensitivity table or what"),
    "no folder": (dict(path="/nowhere/at/all.html"), infoq_fx.ExportError, "give a path"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do(name, tmp_path):
    given, kind, message = BAD[name]
    options = dict(source=SMALL, path=tmp_path / "r.html", budgets=2) | given
    with pytest.raises(kind, match=message):
        REPORT(options.pop("source"), options.pop("path"), **options)
    assert not list(tmp_path.iterdir())


def test_a_module_without_a_table_says_how_to_make_the_page(quantized, tmp_path):
    prepared = infoq_fx.prepare(torch.nn.Sequential(torch.nn.Linear(6, 3)), torch.randn(16, 6))
    bits = {site.name: site.bits[-1] for site in prepared.inventory.sites}
    with pytest.raises(infoq_fx.OptionError, match=re.escape("write_report(table, path, allocation=")):
        REPORT(infoq_fx.convert(prepared, Allocation(bits=bits)), tmp_path / "r.html")


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page._load_library.cache_clear()
    with pytest.raises(infoq_fx.MissingExtraError, match=re.escape('pip install "infoq-fx[report]"')):
        REPORT(SMALL, tmp_path / "r.html")


def test_the_library_stays_inside_of_its_script(monkeypatch):
    bundle = 'const end = "</script>";'
    names = dict(javascript_bundle=lambda _: bundle, get_vega_version=lambda: "6", get_vegalite_versions=lambda: ["6"])
    monkeypatch.setitem(sys.modules, "vl_convert", SimpleNamespace(**names))
    page._load_library.cache_clear()
    assert "</script" not in page._load_library()
    page._load_library.cache_clear()
