"""Several steps after each other, each kept only where it helps."""

import copy
import logging

import pytest
import torch
from recovered import state_of
from torch import fx

import infoq_fx
from infoq_fx.errors import OptionError
from infoq_fx.graph.layers import read_tensor
from infoq_fx.recovery.ladder import RECOVERY_STEPS, find_steps, recover_accuracy
from infoq_fx.recovery.parameters import fork, set_parameter
from infoq_fx.recovery.steps.bias_correction import BiasCorrection
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction
from infoq_fx.recovery.steps.output_tuning import OutputTuning
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding


class Worse:
    name = "worse"

    def recover(self, prepared, bits, data, context):
        changed = fork(prepared)
        with torch.no_grad():
            set_parameter(changed, "head.weight", -read_tensor(changed.graph_module, "head.weight"))
        return changed


def test_a_step_that_makes_it_worse_is_undone(residual, caplog):
    prepared, data, bits = residual
    with caplog.at_level(logging.INFO):
        found = recover_accuracy(prepared, bits, data, [Worse(), SecondOrderRounding(), Worse()], progress=False)
    assert found.recovered_by == ("second_order_rounding",)
    assert caplog.text.count("worse is undone") == 2
    only = recover_accuracy(prepared, bits, data, [SecondOrderRounding()], progress=False)
    other = state_of(only)
    assert all(torch.equal(value, other[name]) for name, value in state_of(found).items())
    assert recover_accuracy(prepared, bits, data, [Worse()], progress=False) is prepared


@pytest.mark.parametrize("better", [True, False])
def test_of_both_ways_to_meet_activations_of_few_bits_the_better_is_kept(better, residual, monkeypatch):
    prepared, data, bits = residual
    seen, shares = [], []

    def recover(step, prepared, bits, data, context):
        seen.append(step.compensate)
        context.run_options.advance(1.0)
        changed = fork(prepared)
        weight = read_tensor(prepared.origin.graph_module if prepared.origin else prepared.graph_module, "head.weight")
        with torch.no_grad():
            set_parameter(changed, "head.weight", weight * (1.0 if step.compensate is better else -1.0))
            set_parameter(changed, "head.bias", read_tensor(changed.graph_module, "head.bias") + 1e-6)
        return changed

    monkeypatch.setattr(SecondOrderRounding, "recover", recover)
    monkeypatch.setattr(
        "infoq_fx.recovery.ladder._advance", lambda bar, variants, share: shares.append(share / variants)
    )
    monkeypatch.setattr("infoq_fx.recovery.steps.second_order_rounding.few_bit_activations", lambda *_: ["head.input"])
    worse = fork(prepared)
    with torch.no_grad():
        set_parameter(worse, "head.weight", 0 * read_tensor(worse.graph_module, "head.weight"))
    found = recover_accuracy(worse, bits, data, [SecondOrderRounding()], progress=False)
    assert seen == [True, False]
    assert sum(shares) == 1.0
    assert torch.equal(
        read_tensor(found.graph_module, "head.weight"), read_tensor(prepared.graph_module, "head.weight")
    )
    recover_accuracy(worse, bits, data, [SecondOrderRounding(compensate=better)], progress=False)
    recover_accuracy(worse, bits, data, [SecondOrderRounding(reference="float_model")], progress=False)
    assert seen[2:] == [better, "auto"]
    for wrong in ("maybe", 0, None):
        with pytest.raises(OptionError, match="compensate="):
            SecondOrderRounding(compensate=wrong)


def test_held_back_samples_are_not_fitted(residual):
    prepared, data, bits = residual
    seen = []

    class Look(Worse):
        def recover(self, prepared, bits, data, context):
            seen.append(data.inputs["x"])
            return prepared

    recover_accuracy(prepared, bits, data, [Look()], progress=False)
    x = data.inputs["x"]
    assert torch.equal(seen[0], x[torch.arange(len(x)) % 5 != 4])
    recover_accuracy(prepared, bits, data.take(9), [Look()], progress=False)
    assert len(seen[1]) == 9


def test_find_steps():
    assert find_steps("none") == []
    rounding = [SecondOrderRounding(), SecondOrderRounding(reference="float_model")]
    assert find_steps("fast") == rounding[:1]
    assert find_steps("best") == [*rounding, BlockReconstruction(), OutputTuning()]
    chosen = SecondOrderRounding(sweeps=0)
    assert find_steps([chosen, "bias_correction"]) == [chosen, BiasCorrection()]
    assert all(build().name == name for name, build in RECOVERY_STEPS.items())
    with pytest.raises(OptionError, match="'second_order_rounding'"):
        find_steps("second_order")
    with pytest.raises(OptionError, match="is not a step"):
        find_steps(3)


@pytest.mark.slow
def test_recover_in_stages_is_what_quantize_does(residual_net, images):
    options = dict(bits=(2, 3, 4), progress=False)
    whole = infoq_fx.quantize(residual_net, 3.0, calibration_data=images, **options)
    allocation = infoq_fx.allocation_of(whole)
    assert allocation.recovered_by == ("second_order_rounding",)
    prepared = infoq_fx.prepare(residual_net, images, bits=(2, 3, 4))
    recovered = infoq_fx.recover(prepared, allocation, images, progress=False)
    staged = infoq_fx.convert(recovered, allocation)
    assert all(torch.equal(value, staged.state_dict()[name]) for name, value in whole.state_dict().items())
    plain = infoq_fx.quantize(residual_net, 3.0, calibration_data=images, recovery="none", **options)
    assert infoq_fx.allocation_of(plain).recovered_by == ()
    nearest = infoq_fx.score(prepared, images, recovery="none", progress=False)
    expected = infoq_fx.refine(prepared, nearest, 3.0, images, recovery="none")
    assert infoq_fx.allocation_of(plain).bits == expected.bits
    table = infoq_fx.score(prepared, images, progress=False)
    assert allocation.bits == infoq_fx.refine(prepared, table, 3.0, images).bits
    with pytest.raises(OptionError, match="the allocation gives site"):
        infoq_fx.recover(prepared, infoq_fx.Allocation(bits={}), images)
    again = copy.deepcopy(recovered.graph_module)
    assert isinstance(again, fx.GraphModule)
