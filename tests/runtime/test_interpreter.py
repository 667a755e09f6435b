"""A perturbed run must equal a whole run of the same graph with that one site changed."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import ResidualNet, randomise_norms
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import CalibrationDataError
from infoq_fx.runtime.interpreter import SiteInterpreter
from infoq_fx.runtime.run_plan import plan_perturbed_run, plan_whole_run


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(functional.relu(self.first(x)))


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.shared(functional.relu(self.shared(x))) + x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x, y):
        return self.head(functional.relu(self.left(x) * self.right(y)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), functional.gelu(self.two(x))], 1))


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.qkv, self.head, self.fused = nn.Linear(3, 9), nn.Linear(3, 4), fused

    def forward(self, x):
        q, k, v = self.qkv(x.unflatten(-1, (2, 3)) * 3).chunk(3, -1)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(mixed.mean(1))


GRAPHS = {
    "residual": (lambda: randomise_norms(ResidualNet()), 1),
    "chain": (Chain, 1),
    "shared_weight": (SharedWeight, 1),
    "two_inputs": (TwoInputs, 2),
    "concat": (Concat, 1),
    "attention": (lambda: Attention(fused=True), 1),
    "matmul": (lambda: Attention(fused=False), 1),
}
PREPARED = {}


def prepare(name):
    if name not in PREPARED:
        torch.manual_seed(3)
        build, inputs = GRAPHS[name]
        shape = (32, 1, 8, 8) if name == "residual" else (32, 6)
        data = [(tuple(torch.randn(*shape) for _ in range(inputs)), None)]
        prepared = infoq_fx.prepare(build().eval(), data, activation_bits=(2, 4, 8))
        PREPARED[name] = prepared, read_data(data).named(prepared.input_names)
    return PREPARED[name]


def whole_run(prepared, inputs, site=None, bits=8):
    """The prepared module itself, its quantizers set by hand."""
    for _, quantizer in prepared.quantizer_nodes():
        quantizer.bits = bits if quantizer.site.name == site else 8
    with torch.no_grad():
        return prepared.graph_module(*inputs.values())


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_perturbed_run_equals_a_whole_run(name, data):
    prepared, calibration = prepare(name)
    searched = [site for site in prepared.inventory.sites if site.is_searched]
    site = data.draw(st.sampled_from(searched), label="site")
    bits = data.draw(st.sampled_from(site.bits), label="bits")
    observed = prepared.observer_nodes()["output"]
    plan = plan_perturbed_run(prepared, site.name, [observed])
    baseline_plan = plan_whole_run(prepared, {*plan.boundary, observed})
    interpreter = SiteInterpreter(prepared)
    batch = next(calibration.batches(32))
    known = interpreter.run_plan(baseline_plan, {}, inputs=batch)
    seen = {}
    interpreter.run_plan(plan, known, bits={site.name: bits}, read=seen.__setitem__)
    torch.testing.assert_close(seen[observed], whole_run(prepared, batch, site.name, bits), rtol=0, atol=1e-6)
    torch.testing.assert_close(known[observed], whole_run(prepared, batch), rtol=0, atol=1e-6)
    if bits == 2:
        assert not torch.equal(seen[observed], known[observed])


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(1)
    images = torch.randn(32, 1, 8, 8)
    prepared = infoq_fx.prepare(randomise_norms(ResidualNet()).eval(), images)
    return prepared, images


def test_only_what_lies_between_site_and_observers_runs_again(residual):
    prepared, _ = residual
    named = prepared.observer_nodes()
    late = plan_perturbed_run(prepared, "head.weight", [named["output"]])
    early = plan_perturbed_run(prepared, "stem.0.weight", [named["output"]])
    cut = plan_perturbed_run(prepared, "stem.0.weight", [named["blocks.0"]])
    assert len(late.nodes) < len(cut.nodes) < len(early.nodes)
    assert named["blocks.0"] in cut.nodes
    assert named["output"] not in cut.nodes
    upstream = plan_perturbed_run(prepared, "head.weight", [named["blocks.0"]])
    assert upstream.nodes == ()


def test_a_run_keeps_only_what_was_asked_for(residual):
    prepared, images = residual
    output = prepared.observer_nodes()["output"]
    interpreter = SiteInterpreter(prepared)
    left = interpreter.run_plan(plan_whole_run(prepared, [output]), {}, inputs={"x": images})
    assert set(left) == {output}


def test_running_changes_neither_the_known_values_nor_the_prepared_model(residual):
    prepared, images = residual
    output = prepared.observer_nodes()["output"]
    plan = plan_perturbed_run(prepared, "blocks.0.conv1.weight", [output])
    interpreter = SiteInterpreter(prepared)
    baseline_plan = plan_whole_run(prepared, {*plan.boundary, output})
    known = interpreter.run_plan(baseline_plan, {}, inputs={"x": images})
    copies = {node: value.clone() for node, value in known.items()}
    for bits in (2, 3, 2):
        interpreter.run_plan(plan, known, bits={"blocks.0.conv1.weight": bits})
    assert set(known) == set(copies)
    assert all(torch.equal(known[node], copies[node]) for node in known)


def test_an_activation_that_is_not_finite_names_its_site():
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(torch.log(self.first(x)))

    with pytest.raises(CalibrationDataError, match=r"'second\.input' is NaN or infinite"):
        infoq_fx.prepare(Overflows().eval(), torch.randn(16, 4))
