"""Plots: they show the given values."""

import sys

import numpy as np
import pytest
from tables import SMALL

import infoq_fx
from infoq_fx import Allocation, Budget, allocate
from infoq_fx.auditing.result import AuditRow
from infoq_fx.report.curve import find_uniforms, trace_curve
from infoq_fx.report.plots import plot_allocation, plot_correlation, plot_pareto, plot_sensitivity
from infoq_fx.types import Score

pytest.importorskip("matplotlib", reason='pictures need "infoq-fx[plots]"')
pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny


def lines(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}


def test_sensitivity_has_a_line_with_error_bars_a_bit_width(tmp_path):
    figure = plot_sensitivity(SMALL)
    (axes,) = figure.axes
    drawn = {found.get_label(): found for found in axes.containers}
    names = [site.name for site in SMALL.inventory.sites if site.name in SMALL.scores]
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    for bits in range(2, 9):
        data, _, (bars,) = drawn[f"{bits} bits"].lines
        expected = [(x, SMALL.scores[name].get(bits)) for x, name in enumerate(names) if bits in SMALL.scores[name]]
        assert data.get_xydata().tolist() == [[x, score.value] for x, score in expected]
        for (x, score), bar in zip(expected, bars.get_segments(), strict=True):
            low, high = score.value - score.standard_error, score.value + score.standard_error
            assert bar == pytest.approx(np.array([[x, low], [x, high]]))
    figure.savefig(tmp_path / "sensitivity.png")


@pytest.mark.parametrize(("limit", "unit"), [("size_bytes", 1e3), ("bitops", 1e6)])
def test_the_pareto_picture_is_the_curve_and_the_uniform_allocations(limit, unit, tmp_path):
    mine = allocate(SMALL, Budget(size_bytes=150))
    figure = plot_pareto(SMALL, limit=limit, budgets=9, allocation=Allocation(bits=mine.bits))
    drawn = lines(figure)
    expected = {
        "best within a budget": trace_curve(SMALL, limit, budgets=9).allocations,
        "uniform": find_uniforms(SMALL).values(),
        "this allocation": [mine],
    }
    for label, allocations in expected.items():
        places = [[getattr(found.cost, limit) / unit, found.score] for found in allocations]
        assert drawn[label] == pytest.approx(np.array(places))
    figure.savefig(tmp_path / "pareto.png")


def test_the_allocation_picture_has_a_bar_a_site(tmp_path):
    found = allocate(SMALL, 3)
    figure = plot_allocation(found, SMALL.inventory)
    (axes,) = figure.axes
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert {names[x]: height for x, height in heights.items()} == {name: found.bits[name] for name in names}
    figure.savefig(tmp_path / "allocation.png")
    with pytest.raises(infoq_fx.OptionError, match="site without bits 'conv'"):
        plot_allocation(Allocation(bits={"fc": 3}), SMALL.inventory)


def make_audit(drops):
    row = AuditRow(name="test", hits={}, allocations={}, correlation=0.5, correlation_error=0.1, rank_correlation=0.4)
    return infoq_fx.Audit(
        rows=(row,), budgets=(), tables={"test": SMALL}, accuracy_drops=drops, float_top1=80.0, evaluation_samples=9
    )


def test_the_correlation_picture_has_a_point_a_layer_and_low_bit_width(tmp_path):
    drops = {"conv": {2: Score(3.0, 0.5), 8: Score(1.0, 0.25)}, "fc": {2: Score(4.0, 0.5)}}
    figure = plot_correlation(make_audit(drops))
    (axes,) = figure.axes
    drawn = {found.get_label(): found.lines[0].get_xydata().tolist() for found in axes.containers}
    assert drawn["2 bits"] == [[SMALL.scores[name][2].value, drops[name][2].value] for name in ("conv", "fc")]
    assert "8 bits" not in drawn
    assert "0.50 ± 0.10" in axes.get_title()
    figure.savefig(tmp_path / "correlation.png")


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(infoq_fx.OptionError, match="correlate=True"):
        plot_correlation(make_audit({}))
    with pytest.raises(infoq_fx.OptionError, match="unknown criterion of the audit 'infoq'; nearest of 1: 'test'"):
        plot_correlation(make_audit({"conv": {2: Score(1.0)}}), "infoq")
    with pytest.raises(infoq_fx.OptionError, match="'size_bytes' or 'bitops'"):
        plot_pareto(SMALL, limit="weight_bits")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(infoq_fx.MissingExtraError, match="plots"):
        plot_sensitivity(SMALL)
