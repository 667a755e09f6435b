import copy
import json

import numpy as np
import pytest
import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.auditing.comparison import _Timed
from infoq_fx.auditing.result import AuditRow
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.runtime.forward import hold_outputs
from infoq_fx.scoring import sensitivity
from infoq_fx.scoring.criteria import CRITERIA as CRITERIA_BY_NAME

OPTIONS = dict(bits=(2, 3, 4, 8), progress=False)
CRITERIA = ["infoq", "weight_mse", "output_kl"]
BUDGETS = [4.0, infoq_fx.Budget(compression=11.0)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    model = randomise_norms(ResidualNet()).eval()
    with torch.no_grad():
        model.head.bias -= model(torch.randn(200, 1, 8, 8)).mean(0)
    return model


@pytest.fixture(scope="module")
def samples(model):
    torch.manual_seed(6)
    images = torch.randn(160, 1, 8, 8)
    with torch.no_grad():
        return images, model(images).argmax(1)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def found(model, samples, cache_dir):
    return infoq_fx.audit(model, samples, CRITERIA, BUDGETS, cache_dir=cache_dir, **OPTIONS)


@pytest.fixture(scope="module")
def prepared(model, samples):
    return infoq_fx.prepare(model, tuple(x[::2] for x in samples), bits=(2, 3, 4, 8))


def test_top1_is_that_of_the_converted_model_on_samples_kept_back(found, prepared, samples):
    images, labels = samples
    for row in found.rows:
        for budget, allocation in row.allocations.items():
            with torch.no_grad():
                hits = infoq_fx.convert(prepared, allocation)(images[1::2]).argmax(1) == labels[1::2]
            assert np.mean(row.hits[budget] != hits.numpy()) <= 0.03
            assert row.top1(budget).value == pytest.approx(100 * row.hits[budget].mean())


@pytest.mark.slow
def test_lost_nats_are_the_divergence_from_the_float_model(model, samples):
    images, labels = samples
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.head.weight *= 300
        sure.head.bias *= 300
    found = infoq_fx.audit(sure, samples, ["weight_mse"], [2.5], correlate=False, **OPTIONS)
    prepared = infoq_fx.prepare(sure, (images[::2], labels[::2]), bits=(2, 3, 4, 8))
    for row in found.rows:
        with torch.no_grad():
            log_q = infoq_fx.convert(prepared, row.allocations["2.5 bits"])(images[1::2]).double().log_softmax(1)
            log_p = sure(images[1::2]).double().log_softmax(1)
        wanted, other = (
            torch.nn.functional.kl_div(a, b, reduction="none", log_target=True).sum(1).numpy()
            for a, b in ((log_q, log_p), (log_p, log_q))
        )
        assert abs(other.mean() / wanted.mean() - 1) > 0.1  # the two divergences differ
        assert row.nats["2.5 bits"].mean() == pytest.approx(wanted.mean(), rel=0.02)
        lost = row.lost_nats("2.5 bits")
        assert (lost.value, lost.standard_error) == pytest.approx(
            (row.nats["2.5 bits"].mean(), row.nats["2.5 bits"].std() / np.sqrt(80))
        )
        assert f"{lost.value:.3g} ± {lost.standard_error:.1g}" in str(found)


def test_the_float_model_is_what_top1_is_beside(found):
    assert found.float_top1 == 100.0
    assert found.evaluation_samples == 80


@pytest.mark.slow
def test_allocations_can_be_measured_behind_recovery(model, prepared, samples, tmp_path):
    images, labels = samples
    options = OPTIONS | {"recovery": "fast", "correlate": False, "cache_dir": tmp_path}
    found = infoq_fx.audit(model, samples, ["weight_mse"], [2.5], **options)
    plain = infoq_fx.audit(model, samples, ["weight_mse"], [2.5], **options | {"recovery": "none"})
    allocation = found.rows[0].allocations["2.5 bits"]
    assert allocation.bits == plain.rows[0].allocations["2.5 bits"].bits
    recovered = infoq_fx.recover(prepared, allocation, images[::2], progress=False)
    with torch.no_grad():
        hits = infoq_fx.convert(recovered, allocation)(images[1::2]).argmax(1) == labels[1::2]
    assert np.mean(found.rows[0].hits["2.5 bits"] != hits.numpy()) <= 0.03
    assert found.rows[0].top1("2.5 bits").value > plain.rows[0].top1("2.5 bits").value
    again = infoq_fx.audit(model, samples, ["weight_mse"], [2.5], **options)
    assert np.array_equal(again.rows[0].hits["2.5 bits"], found.rows[0].hits["2.5 bits"])


@pytest.mark.slow
def test_rows_are_the_criteria_then_the_uniform_allocation_then_the_default_of_quantize(found, model, samples):
    assert [row.name for row in found.rows] == ["infoq", "weight_mse", "output_kl", "uniform", "infoq, refined"]
    assert found.budgets == ("4 bits", "compression=11")
    uniform = found.rows[3].allocations["4 bits"].bits
    assert {b for name, b in uniform.items() if name in found.tables["infoq"].scores} == {4}
    assert found.rows[3].cpu_seconds is None
    images, labels = (x[::2] for x in samples)
    whole = infoq_fx.quantize(model, 4.0, calibration_data=(images, labels), recovery="none", **OPTIONS)
    assert infoq_fx.allocation_of(whole).bits == found.rows[4].allocations["4 bits"].bits


def test_correlation_is_with_the_measured_drop_at_low_bits(found):
    pairs = [
        (score.value, found.accuracy_drops[site][bits].value)
        for site, by_bits in found.tables["weight_mse"].scores.items()
        for bits, score in by_bits.items()
        if bits <= 4
    ]
    assert len(pairs) == 18
    row = found.rows[1]
    assert row.correlation == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])
    assert row.correlation_error == pytest.approx((1 - row.correlation**2) / np.sqrt(17))
    assert row.images == 0
    assert found.rows[0].images == 80


def test_leads_are_those_of_the_best_mean_top1(found):
    leader = found.leader
    assert leader.mean_top1 == max(row.mean_top1 for row in found.rows if row.name != "uniform")
    assert found.lead_over(leader.name).value == 0
    lead = found.lead_over("uniform")
    differences = np.mean([100.0 * leader.hits[b] - 100.0 * found.rows[3].hits[b] for b in found.rows[3].hits], axis=0)
    assert lead.value == pytest.approx(differences.mean())
    text = str(found)
    assert f"take {found.recommended.name!r}" in text
    assert all(row.name in text for row in found.rows)


def test_of_criteria_that_top1_does_not_tell_apart_it_recommends_the_one_that_loses_the_fewest_nats():
    hits = {"good": np.ones(400, bool), "same": np.arange(400) > 1, "bad": np.arange(400) > 200}
    nats = {"good": 0.2, "same": 0.1, "bad": 0.05}

    def make(nats):
        rows = [
            AuditRow(name=n, hits={"b": h}, nats={"b": np.full(400, nats[n])} if nats else {}, allocations={"b": None})
            for n, h in hits.items()
        ]
        return infoq_fx.Audit(
            rows=tuple(rows), budgets=("b",), tables={}, accuracy_drops={}, float_top1=100.0, evaluation_samples=400
        )

    made = make(nats)
    assert made.leader.name == "good"
    assert made.indistinguishable() == ["same"]
    assert made.recommended.name == "same"
    assert "take 'same'" in str(made)
    assert str(made).endswith("(2 standard errors): good, same")
    assert make(nats | {"same": 0.3}).recommended.name == "good"
    assert make({}).recommended.name == "good"


@pytest.mark.slow
def test_a_second_audit_pays_only_for_what_is_new(found, model, samples, cache_dir, monkeypatch):
    given, first = dict(cache_dir=cache_dir, **OPTIONS), found
    monkeypatch.setattr(sensitivity, "_measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("infoq_fx.auditing.judge.hold_outputs", lambda *_, **__: pytest.fail("ran again"))
    monkeypatch.setattr("infoq_fx.auditing.comparison.choose_allocation", lambda *_, **__: pytest.fail("refined again"))
    again = infoq_fx.audit(model, samples, CRITERIA, BUDGETS, **given)
    assert str(again) == str(first)  # CPU seconds among it: those of the run that measured
    assert [row.allocations for row in again.rows] == [row.allocations for row in first.rows]
    # Criteria that read the same measurements share them.
    monkeypatch.setattr("infoq_fx.auditing.judge.hold_outputs", hold_outputs)
    more = infoq_fx.audit(model, samples, ["infoq", "loss", "accuracy"], BUDGETS[:1], **given)
    assert more.rows[0].hits["4 bits"].tolist() == first.rows[0].hits["4 bits"].tolist()
    assert more.rows[2].cpu_seconds == more.rows[1].cpu_seconds > 0


@pytest.mark.slow
def test_behind_recovery_a_second_audit_rounds_no_weights_again(model, samples, tmp_path, monkeypatch):
    given = OPTIONS | dict(cache_dir=tmp_path, recovery="fast", correlate=False)
    first = infoq_fx.audit(model, samples, ["infoq"], BUDGETS[:1], **given)
    monkeypatch.setattr("infoq_fx.recovery.candidates.Candidates._round", lambda *_: pytest.fail("rounded again"))
    again = infoq_fx.audit(model, samples, ["infoq"], BUDGETS[:1], **given)
    assert again.rows[-1].allocations == first.rows[-1].allocations
    with pytest.raises(pytest.fail.Exception, match="rounded again"):
        infoq_fx.audit(model, samples, ["infoq"], [3.0], **given)


@pytest.mark.slow
def test_what_was_kept_without_nats_or_is_damaged_is_run_again(model, samples, tmp_path):
    given = dict(cache_dir=tmp_path, correlate=False, **OPTIONS)
    first = infoq_fx.audit(model, samples, ["infoq"], BUDGETS[:1], **given)
    for path in (tmp_path / "audit").iterdir():
        document = json.loads(path.read_text())
        document.pop("nats", None)
        document.get("allocation", {}).pop("bits", None)
        path.write_text(json.dumps(document))
    again = infoq_fx.audit(model, samples, ["infoq"], BUDGETS[:1], **given)
    assert [row.allocations for row in again.rows] == [row.allocations for row in first.rows]
    assert np.array_equal(again.rows[0].nats["4 bits"], first.rows[0].nats["4 bits"])


def by_size(prepared, data, site, bits):
    return site.numel * 4.0**-bits


@pytest.mark.slow
def test_functions_take_part(model, samples):
    found = infoq_fx.audit(model, samples, [by_size], [3.0], correlate=False, **OPTIONS)
    assert found.rows[0].correlation is None
    assert "by_size" in str(found)
    assert found.recommended.name == "by_size"
    scores = found.tables["by_size"].scores["head.weight"]
    assert scores[2].value == 30 * 4.0**-2


BAD = {
    "twice": (dict(criteria=["eagl", "eagl"]), OptionError, "twice"),
    "text": (dict(criteria="eagl"), OptionError, "give a list"),
    "unknown": (dict(criteria=["egal"]), OptionError, "nearest of"),
    "no_criterion": (dict(criteria=[3]), OptionError, "a function"),
    "no_budget": (dict(budgets=[]), OptionError, "got no budget; give at least one"),
    "out_of_reach": (dict(budgets=[1.0]), infoq_fx.InfeasibleBudgetError, "smallest reachable 2"),
    "few": (dict(calibration_data=torch.randn(2, 1, 8, 8)), CalibrationDataError, "needs 4 samples"),
    "evaluation": (dict(evaluation_data=torch.randn(8, 1, 8, 5)), CalibrationDataError, "resize or convert"),
    "activations": (dict(criteria=["eagl"], activation_bits=(4, 8)), OptionError, "scores no activations"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do(name, samples):
    given, kind, message = BAD[name]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    options = dict(calibration_data=samples, criteria=["weight_mse"], budgets=[4.0], **OPTIONS) | given
    with pytest.raises(kind, match=message):
        infoq_fx.audit(model, **options)


def test_a_timed_criterion_takes_as_many_samples_as_it_does_alone():
    criterion = infoq_fx.InfoQ()
    assert _Timed(criterion, None).choose_samples == criterion.choose_samples
    assert not hasattr(_Timed(CRITERIA_BY_NAME["weight_mse"](), None), "choose_samples")
