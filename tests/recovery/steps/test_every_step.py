"""What every step keeps to."""

import math
from dataclasses import replace

import pytest
import torch
from networks import ResidualNet, randomise_norms
from recovered import nats, prepare, state_of

from infoq_fx.errors import OptionError
from infoq_fx.recovery.ladder import recover_accuracy
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.bias_correction import BiasCorrection
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction
from infoq_fx.recovery.steps.output_tuning import OutputTuning
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding
from infoq_fx.runtime.forward import RunOptions

pytestmark = pytest.mark.slow  # every step by every rule

EVERY_STEP = [
    BiasCorrection(),
    SecondOrderRounding(),
    BlockReconstruction(epochs=10),
    OutputTuning(epochs=10, learning_rate=0.01, batch_size=16),
]


@pytest.mark.parametrize("step", EVERY_STEP, ids=lambda step: step.name)
def test_a_step_changes_a_copy_and_only_numbers(residual, step):
    prepared, data, bits = residual
    before = state_of(prepared)
    shares = []
    recovered = step.recover(
        prepared, bits, data, StepContext(batch_size=16, run_options=RunOptions(advance=shares.append))
    )
    after = prepared.graph_module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert math.isclose(sum(shares), 1)
    assert recovered.origin is prepared
    assert [str(n) for n in recovered.graph_module.graph.nodes] == [str(n) for n in prepared.graph_module.graph.nodes]
    assert {k: v.shape for k, v in recovered.graph_module.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    assert nats(recovered, data, bits) < 0.9 * nats(prepared, data, bits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [replace(s, epochs=1) if hasattr(s, "epochs") else s for s in EVERY_STEP], ids=lambda s: s.name
)
def test_threads_change_nothing(residual, step):
    prepared, data, bits = residual
    one, three = (
        step.recover(prepared, bits, data, StepContext(batch_size=8, run_options=RunOptions(threads=threads)))
        for threads in (1, 3)
    )
    other = state_of(three)
    assert all(torch.equal(value, other[name]) for name, value in state_of(one).items())


@pytest.fixture(scope="module")
def fixed_batch():
    torch.manual_seed(1)
    x = torch.randn(60, 1, 8, 8)
    program = torch.export.export(randomise_norms(ResidualNet()).eval(), (x[:6],))
    return prepare(program, x, bits=(2, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        BiasCorrection(samples=16),
        SecondOrderRounding(samples=16),
        BlockReconstruction(samples=16, epochs=1),
        OutputTuning(samples=16, epochs=1),
    ],
    ids=lambda step: step.name,
)
def test_a_graph_with_a_fixed_batch_is_run_in_such_batches(step, fixed_batch):
    prepared, data = fixed_batch
    bits = {site.name: 2 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    recovered = recover_accuracy(prepared, bits, data, [step], progress=False)
    assert recovered.recovered_by in ((step.name,), ())
    step.recover(prepared, bits, data, StepContext(batch_size=6))


@pytest.mark.parametrize(
    "build",
    [
        lambda: SecondOrderRounding(samples=0),
        lambda: SecondOrderRounding(sweeps=-1),
        lambda: SecondOrderRounding(rows=1.5),
        lambda: BiasCorrection(samples=0),
        lambda: SecondOrderRounding(reference="float"),
        lambda: BlockReconstruction(epochs=0),
        lambda: BlockReconstruction(drop=1.0),
        lambda: BlockReconstruction(learning_rate=0.0),
        lambda: BlockReconstruction(strength=float("nan")),
        lambda: OutputTuning(epochs=0),
        lambda: OutputTuning(scale_rate=-1.0),
        lambda: OutputTuning(scale_rate=float("nan")),
        lambda: OutputTuning(temperature=float("nan")),
    ],
)
def test_options_out_of_range(build):
    with pytest.raises(OptionError, match=r"^\w+=.*; give "):
        build()
