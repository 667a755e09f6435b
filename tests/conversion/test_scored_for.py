"""Tables and allocations know which recovery their scores are for, and conversion warns where it did not happen."""

import dataclasses
import json
import warnings

import pytest
import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.graph.model_inputs import fit_data
from infoq_fx.pipeline import quantize_prepared
from infoq_fx.recovery.ladder import find_steps
from infoq_fx.scoring.sensitivity import Resources

pytestmark = pytest.mark.slow  # one warning in every way to it

ROUNDING = "second_order_rounding"


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(1)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(48, 1, 8, 8)
    prepared = infoq_fx.prepare(model, images, bits=(3, 4, 8))
    tables = {
        recovery: infoq_fx.score(prepared, images, criterion="output_kl", recovery=recovery, progress=False)
        for recovery in ("fast", "none")
    }
    return model, images, prepared, tables


@pytest.fixture
def allocation(case):
    return infoq_fx.allocate(case[3]["fast"], 4.0)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "the scores behind" in str(one.message)]


def test_a_table_and_its_allocations_know_what_they_were_scored_for(case, allocation, tmp_path):
    _, images, prepared, tables = case
    assert tables["fast"].scored_for == tables["fast"].settings["recovery"] == ROUNDING
    assert tables["none"].scored_for == "none"
    by_weights = infoq_fx.score(prepared, images, criterion="weight_mse", progress=False)
    assert by_weights.scored_for is None
    assert allocation.scored_for == ROUNDING
    assert infoq_fx.refine(prepared, tables["none"], 4.0, images, recovery="none").scored_for == "none"
    tables["fast"].save(tmp_path / "scores.json")
    assert infoq_fx.SensitivityTable.load(tmp_path / "scores.json").scored_for == ROUNDING
    infoq_fx.save_allocation(allocation, tmp_path / "allocation.json")
    assert infoq_fx.load_allocation(tmp_path / "allocation.json") == allocation


def test_allocations_of_earlier_versions_load(allocation, tmp_path):
    infoq_fx.save_allocation(allocation, tmp_path / "allocation.json")
    held = json.loads((tmp_path / "allocation.json").read_text())
    del held["scored_for"]
    (tmp_path / "old.json").write_text(json.dumps(held))
    old = infoq_fx.load_allocation(tmp_path / "old.json")
    assert old == dataclasses.replace(allocation, scored_for=None)


def test_without_the_recovery_that_scores_assume_there_is_one_warning(case, allocation):
    _, _, prepared, _ = case
    with pytest.warns(UserWarning, match=r"call recover\(prepared, allocation, data\)") as caught:
        infoq_fx.convert(prepared, allocation)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("recovery", ["range_equalization", "bias_correction", "output_tuning"])
def test_steps_that_round_nothing_are_no_such_recovery(case, allocation, recovery):
    prepared = dataclasses.replace(case[2], recovered_by=(recovery,))
    assert len(warned(lambda: infoq_fx.convert(prepared, allocation))) == 1


def test_where_recovery_was_tried_nothing_is_said(case, allocation):
    _, images, prepared, _ = case
    recovered = infoq_fx.recover(prepared, allocation, images, progress=False)
    assert recovered.recovery_tried == (ROUNDING,)
    assert not warned(lambda: infoq_fx.convert(recovered, allocation))
    undone = dataclasses.replace(recovered, recovered_by=())  # a step that did not help
    assert not warned(lambda: infoq_fx.convert(undone, allocation))
    for steps in (("block_reconstruction",), ("a step of ones own",)):
        assert not warned(lambda s=steps: infoq_fx.convert(dataclasses.replace(prepared, recovered_by=s), allocation))


def test_where_the_scores_fit_or_do_not_matter_nothing_is_said(case):
    _, images, prepared, tables = case
    by_weights = infoq_fx.score(prepared, images, criterion="weight_mse", progress=False)
    all_at_8 = dataclasses.replace(
        infoq_fx.allocate(tables["fast"], 8.0), bits={site.name: 8 for site in prepared.inventory.sites}
    )
    for found in (infoq_fx.allocate(tables["none"], 4.0), infoq_fx.allocate(by_weights, 4.0), all_at_8):
        assert not warned(lambda a=found: infoq_fx.convert(prepared, a))


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["none", "fast", "bias_correction"])
def test_quantize_says_nothing(case, recovery):
    model, images, _, _ = case
    options = {"calibration_data": images, "bits": (3, 4, 8), "progress": False}
    assert not warned(lambda: infoq_fx.quantize(model, 4.0, recovery=recovery, **options))


@pytest.mark.parametrize("recovery", ["none", "fast"])
def test_a_table_that_is_given_has_to_fit(case, recovery):
    _, images, prepared, tables = case
    data = fit_data(prepared, read_data(images))

    def run():
        steps, resources = find_steps(recovery), Resources(progress=False)
        quantize_prepared(prepared, 4.0, data, tables["fast"], steps, resources)

    assert len(warned(run)) == (recovery == "none")
