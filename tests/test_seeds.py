"""One seed settles everything random of what is made from a name; objects bring their own."""

import dataclasses

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.errors import OptionError
from infoq_fx.recovery.ladder import RECOVERY_STEPS, find_steps
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction
from infoq_fx.scoring.criteria import HAWQv2, find_criterion, make_criterion


def has_seed(made):
    return any(field.name == "seed" for field in dataclasses.fields(made))


SEEDED = [name for name in infoq_fx.CRITERIA if has_seed(find_criterion(name))]
SEEDED_STEPS = [name for name in RECOVERY_STEPS if has_seed(RECOVERY_STEPS[name]())]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = torch.randn(64, 6)
    return model, (x, torch.randint(0, 4, (64,)))


def test_criteria_and_steps_with_a_seed_are_known():
    assert {"infoq", "infoq_paper", "hawq_v2", "limpq", "alps"} <= set(SEEDED)
    assert {"block_reconstruction", "output_tuning"} <= set(SEEDED_STEPS)


@pytest.mark.parametrize("name", list(infoq_fx.CRITERIA))
def test_the_seed_reaches_every_criterion_made_from_a_name(name):
    made = make_criterion(name, seed=7)
    assert not has_seed(made) or made.seed == 7
    assert make_criterion(name) == find_criterion(name)


@pytest.mark.parametrize("name", ["none", "fast", "best", *RECOVERY_STEPS])
def test_the_seed_reaches_every_step_made_from_a_name(name):
    steps = find_steps([name, "bias_correction"], 7)
    assert all(step.seed == 7 for step in steps if has_seed(step))
    assert [step.name for step in steps] == [*(step.name for step in find_steps(name)), "bias_correction"]


def test_objects_bring_their_own_seed():
    criterion, step = HAWQv2(seed=3), BlockReconstruction(seed=3)
    assert make_criterion(criterion, seed=7) is criterion
    assert find_steps([step, "output_tuning"], 7)[0] is step
    assert find_steps([step, "output_tuning"], 7)[1].seed == 7


@pytest.mark.parametrize("seed", [-1, 1.5, None, "1", True])
def test_a_seed_that_is_none_is_refused_before_anything_is_computed(seed, case, monkeypatch):
    model, data = case
    prepared = infoq_fx.prepare(model, data, bits=(4, 8))
    allocation = infoq_fx.Allocation(bits={site.name: 8 for site in prepared.inventory.sites})

    def fail(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr("infoq_fx.api.read_data", fail)
    for call in (
        lambda: infoq_fx.quantize(model, 4.0, calibration_data=data, seed=seed, recovery="best"),
        lambda: infoq_fx.score(prepared, data, seed=seed),
        lambda: infoq_fx.recover(prepared, allocation, data, "best", seed=seed),
    ):
        with pytest.raises(OptionError, match=r"seed=.*give an integer of at least 0"):
            call()


@pytest.mark.parametrize("name", ["hawq_v2", "infoq_paper"])
def test_scores_depend_on_the_seed_and_on_nothing_else(name, case):
    model, data = case
    prepared = infoq_fx.prepare(model, data, bits=(2, 8))
    first, again, other = (
        infoq_fx.score(prepared, data, criterion=name, seed=seed, recovery="none", progress=False).scores
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def outputs(case, seed, **options):
    model, data = case
    quantized = infoq_fx.quantize(model, 2.5, calibration_data=data, seed=seed, progress=False, **options)
    with torch.no_grad():
        return quantized(data[0])


@pytest.mark.slow
def test_the_seed_of_quantize_reaches_its_recovery(case):
    options = {"criterion": "weight_mse", "recovery": "block_reconstruction", "refine": False}
    first = outputs(case, 1, **options)
    assert torch.equal(first, outputs(case, 1, **options))
    assert not torch.equal(first, outputs(case, 2, **options))


@pytest.mark.slow
def test_recover_takes_a_seed_as_quantize_does(case):
    model, data = case
    prepared = infoq_fx.prepare(model, data, bits=(3, 8))
    bits = {site.name: 3 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    allocation = infoq_fx.Allocation(bits=bits)

    def run(seed):
        found = infoq_fx.recover(prepared, allocation, data, "block_reconstruction", seed=seed, progress=False)
        with torch.no_grad():
            return infoq_fx.convert(found, allocation)(data[0])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
