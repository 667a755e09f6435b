"""The whole search on a small network: what is returned, what is kept, what is refused."""

import logging
from dataclasses import replace

import pytest
import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx import Budget, InfeasibleBudgetError, OptionError, Tolerance
from infoq_fx.core.data import read_data
from infoq_fx.scoring.sensitivity import Resources
from infoq_fx.tolerance import steps as steps_module
from infoq_fx.tolerance.measurement import Validation
from infoq_fx.types import Score

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny

OPTIONS = dict(progress=False)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(5)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(240, 1, 8, 8)
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)
        return model, (images, model(images).argmax(1))


@pytest.fixture(scope="module")
def prepared(case):
    return infoq_fx.prepare(case[0], tuple(x[::2] for x in case[1]), bits=(2, 3, 4, 8))


@pytest.fixture(scope="module")
def table(prepared):
    return infoq_fx.score(prepared, criterion="weight_mse", progress=False)


def halves(case):
    return [tuple(x[start::2] for x in case[1]) for start in (0, 1)]


def points_lost(case, module):
    """Of the second half, whose labels are the float model's own classes."""
    _, (images, labels) = halves(case)
    with torch.no_grad():
        return 100 * float((module(images).argmax(1) != labels).double().mean())


@pytest.fixture
def counted(monkeypatch):
    """Calls that recover and measure."""
    calls = []
    for name in ("recover_accuracy", "measure_loss"):
        original = getattr(steps_module, name)

        def call(*arguments, name=name, original=original, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(steps_module, name, call)
    return calls


def test_the_smallest_that_passes_is_returned_and_loses_what_it_says(case, prepared, table):
    fitted, judged = halves(case)
    tolerance = Tolerance(drop=3.0)
    found = infoq_fx.search_tolerance(prepared, table, tolerance, fitted, validation_data=judged, **OPTIONS)
    module = infoq_fx.convert(found.recovered, found.allocation)
    loss = found.allocation.loss
    assert loss.value == pytest.approx(points_lost(case, module))
    assert loss.value <= 3.0
    smallest = min((step for step in found.steps if step.passes), key=lambda step: step.cost)
    assert found.allocation.cost.size_bytes == smallest.cost
    failed = [step for step in found.steps if not step.passes and step.cost < smallest.cost]
    assert loss.smaller_value == max(failed, key=lambda step: step.cost).loss.value > 3.0
    assert smallest.cost < 1.05 * max(step.limit for step in failed)
    assert 3 <= len(found.steps) <= 8
    assert str(loss) in str(found)
    assert str(loss) in infoq_fx.summarize(module)
    assert f"{smallest.cost:,}" in str(found)


@pytest.mark.slow
def test_steps_are_kept_so_that_nothing_is_measured_twice(case, prepared, table, tmp_path, counted, caplog):
    fitted, judged = halves(case)

    def search(**changed):
        options = {"validation_data": judged, "cache_dir": tmp_path, "refine": False, **OPTIONS, **changed}
        counted.clear()
        return infoq_fx.search_tolerance(prepared, table, Tolerance(nats=2e-7), fitted, **options)

    first = search()
    assert counted.count("measure_loss") == len(first.steps)
    again = search()
    assert not counted
    assert again.steps == first.steps
    module, other = (infoq_fx.convert(found.recovered, found.allocation) for found in (first, again))
    with torch.no_grad():
        assert torch.equal(module(judged[0]), other(judged[0]))
    # A step that was cut short, and the kept model of the result.
    records = sorted((tmp_path / "tolerance").glob("*.json"), key=lambda path: path.stat().st_mtime)
    records[-1].write_text(records[-1].read_text()[:40])
    search()
    assert counted == ["recover_accuracy", "measure_loss"]
    for path in (tmp_path / "tolerance").glob("*.pt"):
        path.write_bytes(b"cut short")
    with caplog.at_level(logging.INFO, logger="infoq_fx"):
        search()
    assert counted == ["recover_accuracy"]
    # Other samples, recovery or another measure are other steps.
    search(validation_data=tuple(x[::2] for x in judged))
    assert counted.count("measure_loss") > 1
    search(recovery="bias_correction")
    assert counted.count("measure_loss") > 1


def test_another_tolerance_shares_the_steps(case, prepared, table, tmp_path, counted):
    fitted, judged = halves(case)
    options = {"validation_data": judged, "cache_dir": tmp_path, "refine": False, "recovery": "none", **OPTIONS}
    infoq_fx.search_tolerance(prepared, table, Tolerance(drop=6.0), fitted, **options)
    counted.clear()
    found = infoq_fx.search_tolerance(prepared, table, Tolerance(drop=7.0), fitted, **options)
    assert counted.count("measure_loss") < len(found.steps)
    assert found.allocation.loss.limit == 7.0


@pytest.mark.slow
def test_quantize_holds_back_half_of_the_data_which_calibrates_nothing(case, monkeypatch, caplog):
    seen = {}
    prepare = infoq_fx.api.prepare

    def remember(model, data, **options):
        seen["calibration"] = data
        return prepare(model, data, **options)

    monkeypatch.setattr("infoq_fx.api.prepare", remember)
    with caplog.at_level(logging.INFO, logger="infoq_fx"):
        quantized = infoq_fx.quantize(
            case[0], Tolerance(drop=8.0, minimize="bitops"), calibration_data=case[1], bits=(3, 4, 8), **OPTIONS
        )
    assert torch.equal(next(iter(seen["calibration"].inputs.values())), case[1][0][::2])
    assert "120 of 240 samples are held back to validate, and calibrate nothing" in caplog.text
    loss = infoq_fx.allocation_of(quantized).loss
    assert loss.value == pytest.approx(points_lost(case, quantized))
    assert loss.value <= 8.0
    assert loss.samples == 120
    limits = infoq_fx.allocation_of(quantized).budget.limits
    assert list(limits) == ["bitops"]


@pytest.mark.slow
def test_limits_besides_hold_and_what_is_in_vain_says_what_is_reached(case, prepared, table):
    fitted, judged = halves(case)
    options = {"validation_data": judged, "recovery": "none", **OPTIONS}

    def search(tolerance, **changed):
        return infoq_fx.search_tolerance(prepared, table, tolerance, fitted, **{**options, **changed})

    found = search(Tolerance(drop=60.0, minimize="size_bytes", within=Budget(weight_bits=3.0)))
    assert all(step.allocation.cost.weight_bits <= 3.0 for step in found.steps)
    with pytest.raises(InfeasibleBudgetError) as caught:
        search(Tolerance(sqnr_db=90.0))
    text = str(caught.value)
    assert text.startswith("sqnr_db=90 is out of reach on 120 samples: with all sites at 8 bits it has an SQNR of ")
    assert text.endswith(
        "lower sqnr_db to what is reached, or add 16 to bits= (and to activation_bits=), so that the "
        "worst layers stay in float"
    )
    with pytest.raises(InfeasibleBudgetError, match=r"best bit-widths within weight_bits=3 it loses .* raise drop"):
        search(Tolerance(drop=0.0, within=Budget(weight_bits=3.0)))
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable"):
        search(Tolerance(drop=1.0, within=Budget(weight_bits=1.0)))
    narrow = infoq_fx.prepare(case[0], fitted, bits=(2, 4))
    known = infoq_fx.score(narrow, criterion="weight_mse", progress=False)
    with pytest.raises(InfeasibleBudgetError, match=r"with all sites at 4 bits .* or allow more bits"):
        infoq_fx.search_tolerance(narrow, known, Tolerance(sqnr_db=90.0), fitted, **options)


def test_in_vain_with_float_among_the_candidates_says_what_8_bits_and_what_floats_reach(prepared, table, monkeypatch):
    sites = tuple(replace(s, bits=(*s.bits, 16)) if len(s.bits) > 1 else s for s in prepared.inventory.sites)
    scores = {name: {**by_bits, 16: Score(0.0)} for name, by_bits in table.scores.items()}
    wide = replace(table, inventory=replace(prepared.inventory, sites=sites), scores=scores)
    tolerance = Tolerance(nats=1e-9, within=Budget(size_bytes=1700))
    held = read_data(torch.zeros(16, 1, 8, 8)).named(prepared.input_names)
    search = steps_module.Search(
        validation=Validation(prepared, held, tolerance),
        table=wide,
        data=held,
        steps=(),
        candidates=None,
        alpha=1.0,
        pin={},
        refine=False,
        resources=Resources(progress=False),
    )
    measured = {}

    def measure(search, allocation, path):
        measured.update(allocation.bits)
        return search.validation.make_loss(0.4, 0.1), prepared

    monkeypatch.setattr(steps_module, "_measure", measure)
    best = infoq_fx.allocate(wide, tolerance.within)
    step = steps_module.ToleranceStep(limit=1.0, cost=1.0, allocation=best, loss=search.validation.make_loss(0.2, 0.1))
    text = str(steps_module.explain_failure(search, [step]))
    assert set(measured.values()) == {8}
    assert (
        "with all sites at 8 bits it loses 0.4 ± 0.1 nats a sample, with 8 bits and the worst layers in float" in text
    )
    assert "within size_bytes=1700 it loses 0.2 ± 0.1 nats a sample; raise nats to what is reached" in text
    assert "add 16" not in text


def test_a_cost_of_ones_own_that_does_not_grow_with_the_bits(case, prepared, table, monkeypatch):
    fitted, judged = halves(case)
    milliseconds = {2: 3.0, 3: 2.5, 4: 1.0, 8: 4.0}
    monkeypatch.setitem(infoq_fx.COSTS, "ms", lambda operation, left, right: milliseconds[left])
    options = {"validation_data": judged, "recovery": "none", **OPTIONS}
    tolerance = Tolerance(drop=100.0, minimize="ms")
    found = infoq_fx.search_tolerance(prepared, table, tolerance, fitted, **options)
    chosen = min((step for step in found.steps if step.passes), key=lambda step: step.cost)
    assert chosen.cost == sum(milliseconds[chosen.allocation.bits[op.left]] for op in prepared.inventory.operations)
    assert chosen.cost < 1.2 * len(prepared.inventory.operations)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(budget=4.0, metric=len), OptionError, "metric= is given and the budget is 4.0"),
        (dict(budget=4.0, validation_data=torch.zeros(9, 1, 8, 8)), OptionError, "validation_data= is given"),
        (dict(budget=Tolerance(nats=0.1), metric=len), OptionError, "the tolerance is nats=; give drop="),
        (dict(budget=Tolerance(drop=1.0), metric=3), OptionError, "metric=3; give a function"),
        (dict(budget=Tolerance(drop=1.0, minimize="ms")), OptionError, "unknown cost in Tolerance"),
        (dict(budget=Tolerance(drop=1.0), labels=None), infoq_fx.CalibrationDataError, "needs labels"),
        (
            dict(budget=Tolerance(drop=1.0), labels=torch.zeros(240, 3)),
            infoq_fx.CalibrationDataError,
            "labels fit no output with classes; give a metric",
        ),
        (dict(budget=Tolerance(drop=1.0), calibration_data=None), infoq_fx.CalibrationDataError, "give calibration"),
        (
            dict(budget=Tolerance(nats=1.0), calibration_data=torch.zeros(8, 1, 8, 8)),
            infoq_fx.CalibrationDataError,
            "there are 8 samples; give at least 16, or validation_data=",
        ),
    ],
)
def test_errors_come_before_anything_is_scored(case, options, error, text, monkeypatch):
    monkeypatch.setattr("infoq_fx.tolerance.search.measure_sensitivity", None)
    model, (images, labels) = case
    given = dict(options)
    data = given.pop("calibration_data", (images, given.pop("labels", labels)))
    with pytest.raises(error, match=text):
        infoq_fx.quantize(model, given.pop("budget"), calibration_data=data, bits=(4, 8), **given, **OPTIONS)


def test_the_stage_checks_what_it_is_given(case, prepared, table):
    fitted, judged = halves(case)
    with pytest.raises(OptionError, match=r"tolerance=3\.0; give a Tolerance"):
        infoq_fx.search_tolerance(prepared, table, 3.0, fitted, validation_data=judged)
    with pytest.raises(OptionError, match="give what prepare"):
        infoq_fx.search_tolerance(case[0], table, Tolerance(drop=1.0), fitted, validation_data=judged)
