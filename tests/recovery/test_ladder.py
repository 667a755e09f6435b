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
