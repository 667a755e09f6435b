import copy
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ResidualNet, randomise_norms
from torch import fx, nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.numerics import fake_quantize
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.input_moments import InputMoments, average_moments, measure_moments
from infoq_fx.recovery.ladder import RECOVERY_STEPS, find_steps, recover_accuracy
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.parameters import fork, set_parameter
from infoq_fx.recovery.second_order import ideal_rows, quadratic_error, round_rows
from infoq_fx.recovery.segments import find_segments
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.adaround import _DropQuantize
from infoq_fx.recovery.steps.bias_correction import BiasCorrection
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction, _Block
from infoq_fx.recovery.steps.output_tuning import OutputTuning
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding
from infoq_fx.recovery.unfolding import input_rows, rows_to_weight, weight_to_rows
from infoq_fx.runtime.forward import RunOptions, compute_float_logits, compute_logits
from infoq_fx.runtime.outputs import diverge, measure_spread
from infoq_fx.types import QParams, QuantSpec

BENCH = StepContext(batch_size=16)


def prepare(model, x, **options):
    prepared = infoq_fx.prepare(model.eval(), x, **options)
    return prepared, read_data(x).named(prepared.input_names)


@pytest.fixture(scope="module")
def residual():
    """A trained-like residual network, prepared, with its data and an allocation of 2 and 3 bits."""
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet())
    prepared, data = prepare(model, torch.randn(96, 1, 8, 8), bits=(2, 3, 8))
    sites = [site for site in prepared.inventory.sites if site.kind == "weight"]
    bits = {site.name: 8 for site in prepared.inventory.sites} | {s.name: 2 + i % 2 for i, s in enumerate(sites)}
    return prepared, data, bits


def nats(prepared, data, bits):
    reference = compute_float_logits(prepared.origin or prepared, data, batch_size=16)
    return float(diverge(reference, compute_logits(prepared, data, bits), measure_spread(reference)).mean())


def state_of(prepared):
    return {name: value.clone() for name, value in prepared.graph_module.state_dict().items()}


class Branches(nn.Module):
    """All kinds of layers: strided, dilated, grouped, depthwise, padded 'same', transposed, 1-D, linear on tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8)
        self.transposed = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.tokens = nn.Linear(6, 5)
        self.sequence = nn.Conv1d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.first(x).relu()).relu()).relu()
        x = self.tokens(self.transposed(x).relu().flatten(2).transpose(1, 2)).relu()
        return self.head(self.sequence(x.transpose(1, 2)).relu().mean(2))


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(2)
    model = Branches()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter)
    return prepare(model, torch.randn(48, 2, 8, 8), bits=(2, 4, 8))


# The chain of segments


@pytest.mark.parametrize("build", [ResidualNet, Branches])
def test_segments_are_the_graph_in_order(build):
    shape = (4, 1, 8, 8) if build is ResidualNet else (4, 2, 8, 8)
    prepared, _ = prepare(build(), torch.randn(shape))
    segments = find_segments(prepared)
    inner = [n for n in prepared.graph_module.graph.nodes if n.op not in ("placeholder", "output")]
    own = [node for segment in segments for node in segment.nodes]
    constants = {node for segment in segments for node in segment.constants}
    assert len(set(own)) == len(own)
    assert set(own) | constants == set(inner)
    layers = [layer.site.name for segment in segments for layer in segment.layers]
    assert sorted(layers) == sorted(s.name for s in prepared.inventory.sites if s.kind == "weight")
    known = {n for n in prepared.graph_module.graph.nodes if n.op == "placeholder"}
    for segment in segments:
        assert set(segment.entering) <= known
        known = set(segment.leaving)


def test_residual_blocks_stay_whole():
    prepared, _ = prepare(ResidualNet(), torch.randn(4, 1, 8, 8))
    found = [[layer.site.name for layer in segment.layers] for segment in find_segments(prepared)]
    blocks = [[f"blocks.{i}.conv1.weight", f"blocks.{i}.conv2.weight"] for i in range(2)]
    assert found == [["stem.0.weight"], *blocks, ["head.weight"]]


def test_long_segments_are_cut():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(20))

        def forward(self, x):
            seen = [x]
            for layer in self.layers:  # every value stays alive to the end
                seen.append(layer(seen[-1]).relu())
            return torch.stack(seen).sum((0, 3, 4))

    prepared, data = prepare(Wide(), torch.randn(4, 2, 2, 2))
    segments = find_segments(prepared)
    assert max(len(segment.layers) for segment in segments) <= 8
    runner = LayerwiseRunner(fork(prepared), {}, data, BENCH)
    for segment in runner.segments:
        runner.advance(segment)


@pytest.mark.parametrize("name", ["residual", "branches"])
def test_a_walk_ends_where_whole_runs_end(name, request):
    case = request.getfixturevalue(name)
    prepared, data = case[:2]
    bits = case[2] if len(case) > 2 else {s.name: 4 for s in prepared.inventory.sites if s.kind == "weight"}
    runner = LayerwiseRunner(fork(prepared), bits, data, BENCH)
    *most, last = runner.segments
    for segment in most:
        runner.advance(segment)
    output = next(iter(reversed(prepared.graph_module.graph.nodes))).all_input_nodes[0].name
    node = next(n for n in last.nodes if n.name == output)
    pairs = runner.collect(last, node, lambda _, pair: pair)
    in_float = compute_float_logits(prepared, data, batch_size=16)
    assert torch.allclose(torch.cat([pair.reference for pair in pairs]), in_float, atol=1e-5)
    assert torch.allclose(
        torch.cat([pair.quantized for pair in pairs]), compute_logits(prepared, data, bits), atol=1e-5
    )


class ActivationsOnly(fx.Interpreter):
    def call_module(self, target, args, kwargs):
        module = self.module.get_submodule(target)
        is_activation = isinstance(module, Quantizer) and module.site.kind == "activation"
        return module.quantize_at(args[0], 8) if is_activation else args[0]


def test_a_reference_with_float_weights_has_quantized_activations(residual):
    prepared, data, bits = residual
    changed = fork(prepared)
    runner = LayerwiseRunner(changed, bits, data, BENCH, reference="float_weights")
    for segment in runner.segments:  # what is rounded on the way is not the reference's
        for layer in segment.layers:
            set_parameter(changed, layer.weight, 2 * read_tensor(changed.graph_module, layer.weight))
    *most, last = runner.segments
    for segment in most:
        runner.advance(segment)
    output = next(iter(reversed(prepared.graph_module.graph.nodes))).all_input_nodes[0].name
    node = next(n for n in last.nodes if n.name == output)
    found = torch.cat([pair.reference for pair in runner.collect(last, node, lambda _, pair: pair)])
    with torch.inference_mode():
        expected = ActivationsOnly(prepared.graph_module).run(*data.inputs.values())
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, compute_float_logits(prepared, data, batch_size=16), atol=1e-4)


# Layers as matrices


def test_rows_give_the_layers_outputs(branches):
    prepared, data = branches
    runner = LayerwiseRunner(fork(prepared), {}, data, BENCH)
    seen = 0
    for segment in runner.segments:
        for layer in segment.layers:
            if not layer.op.is_transposed:
                rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight))
                pairs = zip(
                    runner.collect(segment, layer.source, lambda _, pair: pair.reference),
                    runner.collect(segment, layer.node, lambda _, pair: pair.reference),
                    strict=True,
                )
                for x, y in pairs:
                    found = input_rows(layer, x, 10**6) @ rows.mT  # groups, places, channels
                    y = y.movedim(1, -1) if layer.op.is_convolution else y
                    found = found.transpose(0, 1).reshape(-1, y.shape[-1])
                    bias = 0 if layer.bias is None else read_tensor(prepared.graph_module, layer.bias)
                    assert torch.allclose(found + bias, y.reshape(-1, y.shape[-1]), atol=1e-5)
                assert torch.equal(rows_to_weight(layer, rows), read_tensor(prepared.graph_module, layer.weight))
                assert len(set(map(tuple, input_rows(layer, x, 3)[0].tolist()))) <= 3 * len(x)
                assert input_rows(layer, x, 3).shape[1] <= 3 * len(x)
                seen += 1
        runner.advance(segment)
    assert seen == 6


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(2, 6, (2, 4), padding="same"),
        nn.Conv2d(2, 6, (3, 2), stride=(2, 3), padding=(2, 1), groups=2),
        nn.Conv2d(2, 8, 3, dilation=(1, 2), padding=(0, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding")  # torch's, of an even kernel
def test_rows_of_any_padding_give_the_outputs(convolution):
    x = torch.randn(12, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    prepared, data = prepare(convolution, x)
    (layer,) = [layer for segment in LayerwiseRunner(prepared, {}, data, BENCH).segments for layer in segment.layers]
    rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight))
    found = (input_rows(layer, x, 10**6) @ rows.mT).transpose(0, 1)
    with torch.no_grad():
        expected = convolution(x).movedim(1, -1)
    torch.testing.assert_close(found.reshape(expected.shape) + convolution.bias, expected)


def test_moments_are_those_of_numpy(residual):
    prepared, data, bits = residual
    runner = LayerwiseRunner(fork(prepared), bits, data, BENCH)
    runner.advance(runner.segments[0])
    segment, layer = runner.segments[1], runner.segments[1].layers[1]
    halves = measure_moments(runner, segment, layer, 10**9)
    found = average_moments(halves).centre()
    rows = runner.collect(
        segment,
        layer.source,
        lambda _, p: (input_rows(layer, p.reference, 10**6), input_rows(layer, p.quantized, 10**6)),
    )
    x, y = (torch.cat([pair[i] for pair in rows], 1)[0].double().numpy() for i in range(2))
    joint = np.cov(x, y, rowvar=False, bias=True)
    columns = x.shape[1]
    assert np.allclose(found.second[0], joint[columns:, columns:], atol=1e-6)
    assert np.allclose(found.cross[0], joint[:columns, columns:], atol=1e-6)
    assert np.allclose(found.mean[0], x.mean(0), atol=1e-6)
    assert found.count == len(x)
    half = average_moments([halves[0]])
    assert torch.equal(half.second, halves[0].second)


# Rounding


def random_problem(seed, groups=2, rows=3, columns=5, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 40, columns, generator=generator, dtype=torch.float64)
    if correlated:
        x = x @ torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    ideal = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    second = x.mT @ x / 40 + 0.01 * torch.eye(columns, dtype=torch.float64)
    return ideal, second


def brute_force(ideal, second, step, low, high):
    """Least error of every row over all integers."""
    columns = ideal.shape[2]
    grid = torch.cartesian_prod(*[torch.arange(low, high + 1)] * columns).to(ideal)
    difference = grid * step - ideal[:, :, None]
    return torch.einsum("grni,gij,grnj->grn", difference, second, difference).amin(2)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_comes_near_the_best_of_all_integers(seed):
    ideal, second = random_problem(seed)
    scales = torch.full((2, 3, 1), 0.8)
    nearest = torch.round(ideal / 0.8).clamp(-2, 1) * 0.8
    q, step = round_rows(ideal, second, scales, -2, 1, sweeps=8)
    assert set(q.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    assert torch.equal(step, scales[..., 0])
    found = quadratic_error(q.double() * 0.8 - ideal, second)
    best = brute_force(ideal, second, 0.8, -2, 1)
    plain = quadratic_error(nearest - ideal, second)
    assert bool((found >= best - 1e-6).all())
    assert float(found.sum()) < 0.9 * float(plain.sum())
    assert float(found.sum()) < 1.35 * float(best.sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 200), st.integers(2, 5))
def test_rounding_properties(seed, rows, columns, bits):
    ideal, second = random_problem(seed, 1, rows, columns)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scales = torch.tensor([0.3, 0.6]).expand(1, rows, 2)
    q, step = round_rows(ideal, second, scales, low, high, sweeps=2)
    assert bool((q == q.round()).all())
    assert low <= float(q.min())
    assert float(q.max()) <= high
    found = quadratic_error(q.double() * step[..., None] - ideal, second)
    for scale in (0.3, 0.6):
        one, _ = round_rows(ideal, second, torch.full((1, rows, 1), scale), low, high, sweeps=0)
        error = quadratic_error(one.double() * scale - ideal, second)
        assert bool((found <= error * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_rounding_follows_its_definition(rows):
    """Optimal Brain Surgeon literally: round a column, spread its error over the rest, take the column out."""
    ideal, second = random_problem(7, 2, rows, 9)
    scales = torch.rand(2, rows, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    found, _ = round_rows(ideal, second, scales, -4, 3, sweeps=0)
    step = scales[..., 0].double()
    for group in range(2):
        left, values = second[group].diagonal().argsort(descending=True, stable=True).tolist(), ideal[group].clone()
        while left:
            column, inverse = left[0], torch.linalg.inv(second[group][left][:, left])
            q = torch.round(values[:, column] / step[group]).clamp(-4, 3)
            assert torch.equal(found[group, :, column].double(), q)
            error = (values[:, column] - q * step[group]) / inverse[0, 0]
            values[:, left] -= error[:, None] * inverse[0]
            left = left[1:]


def test_descent_ends_where_no_single_change_helps():
    ideal, second = random_problem(8, 2, 40, 12)
    scales = torch.full((2, 40, 1), 0.7)
    q, step = round_rows(ideal, second, scales, -4, 3, sweeps=50)
    reached = quadratic_error(q.double() * step[..., None] - ideal, second)
    for column in range(12):
        for move in (-1, 1):
            other = q.double().clone()
            other[..., column] = (other[..., column] + move).clamp(-4, 3)
            error = quadratic_error(other * step[..., None] - ideal, second)
            assert bool((error >= reached - 1e-4).all())


def test_independent_columns_are_rounded_to_nearest():
    ideal, _ = random_problem(3)
    second = torch.diag_embed(torch.rand(2, 5, dtype=torch.float64) + 0.1)
    q, _ = round_rows(ideal, second, torch.full((2, 3, 1), 0.5), -4, 3, sweeps=3)
    assert torch.equal(q, torch.round(ideal / 0.5).clamp(-4, 3).float())


def test_the_ideal_is_the_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    arrives = x + 0.3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    rows, ridge = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64), 0.2
    moments = InputMoments(50, x.mean(0)[None], arrives.mean(0)[None], (arrives.mT @ arrives / 50)[None],
                      (x.mT @ arrives / 50)[None])  # fmt: skip
    found = ideal_rows(rows, moments, ridge * torch.eye(4, dtype=torch.float64)[None])[0]
    # The same as plain least squares with rows added that say V = W.
    design = torch.cat([arrives / math.sqrt(50), math.sqrt(ridge) * torch.eye(4, dtype=torch.float64)])
    target = torch.cat([x @ rows[0].mT / math.sqrt(50), math.sqrt(ridge) * rows[0].mT])
    assert torch.allclose(found.mT, torch.linalg.lstsq(design, target).solution)


# Steps


EVERY_STEP = [
    BiasCorrection(),
    SecondOrderRounding(),
    BlockReconstruction(epochs=30),
    OutputTuning(epochs=30, learning_rate=0.01, batch_size=16),
]


@pytest.mark.parametrize("step", EVERY_STEP, ids=str)
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


@pytest.mark.parametrize("step", [replace(s, epochs=1) if hasattr(s, "epochs") else s for s in EVERY_STEP], ids=str)
def test_threads_change_nothing(residual, step):
    prepared, data, bits = residual
    one, three = (
        step.recover(prepared, bits, data, StepContext(batch_size=8, run_options=RunOptions(threads=threads)))
        for threads in (1, 3)
    )
    other = state_of(three)
    assert all(torch.equal(value, other[name]) for name, value in state_of(one).items())


def test_second_order_rounding_is_what_conversion_stores(residual):
    prepared, data, bits = residual
    recovered = SecondOrderRounding().recover(prepared, bits, data, BENCH)
    quantized = infoq_fx.convert(recovered, infoq_fx.Allocation(bits=bits))
    stored = {k: v for k, v in quantized.state_dict().items() if v.dtype == torch.int8}
    assert set(stored) == {name for name in bits if name.endswith("weight")}
    for name, q in stored.items():
        assert int(q.min()) >= -(1 << (bits[name] - 1))
        assert int(q.max()) < 1 << (bits[name] - 1)
        scale = quantized.state_dict()[f"{name}_scale"].reshape(-1, *[1] * (q.ndim - 1))
        assert torch.allclose(q * scale, read_tensor(recovered.graph_module, name), atol=1e-6)
    x = data.inputs["x"]
    with torch.no_grad():  # biases, too, are already what conversion stores
        assert torch.allclose(quantized(x), compute_logits(recovered, data, bits), atol=1e-5)
    # The integers are the second-order ones, not the float weights rounded to nearest.
    plain = infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits)).state_dict()
    assert any(not torch.equal(plain[name], stored[name]) for name in stored)


@pytest.mark.parametrize("width", [2, 5, 6])
def test_what_activations_of_six_bits_cost_is_answered_only_for_the_float_model(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    data = torch.randn(64, 2, 8, 8)
    prepared, data = prepare(model, data, bits=(8,), activation_bits=(width, 8))
    with torch.no_grad():  # weights that 8 bits hold exactly
        for node, quantizer in prepared.quantizer_nodes():
            if quantizer.site.kind == "weight":
                path = str(node.all_input_nodes[0].target)
                set_parameter(prepared, path, quantizer.quantize_at(read_tensor(prepared.graph_module, path), 8))
    bits = {site.name: site.bits[0] for site in prepared.inventory.sites}
    moved = {}
    for reference in ("float_weights", "float_model"):
        recovered = SecondOrderRounding(reference=reference).recover(prepared, bits, data, BENCH)
        moved[reference] = max(
            float((read_tensor(recovered.graph_module, path) - read_tensor(prepared.graph_module, path)).abs().max())
            for path in ("0.bias", "2.bias", "4.bias")
        )
    assert moved["float_model"] > 0.001
    if width < 6:
        assert moved["float_weights"] > 0.5 * moved["float_model"]  # the first input has 8 bits
    else:
        assert moved["float_weights"] < 0.3 * moved["float_model"]


def test_second_order_rounding_takes_every_kind_of_layer(branches):
    prepared, data = branches
    bits = {site.name: 4 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    bits["transposed.weight"] = 8
    recovered = SecondOrderRounding().recover(prepared, bits, data, BENCH)
    assert nats(recovered, data, bits) < 0.6 * nats(prepared, data, bits)
    assert torch.equal(
        read_tensor(recovered.graph_module, "transposed.weight"),
        read_tensor(prepared.graph_module, "transposed.weight"),
    )
    for name in ("first", "grouped", "depthwise", "tokens", "sequence", "head"):
        weight = f"{name}.weight"
        assert not torch.equal(
            read_tensor(recovered.graph_module, weight), read_tensor(prepared.graph_module, weight)
        ), weight


def test_dead_inputs_do_no_harm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1:3] = torch.tensor([-1.0, 0.0])
    prepared, data = prepare(model, torch.randn(40, 2, 8, 8), bits=(3, 8))
    bits = {site.name: 3 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    recovered = SecondOrderRounding().recover(prepared, bits, data, BENCH)
    assert all(bool(value.isfinite().all()) for value in recovered.graph_module.state_dict().values())
    assert nats(recovered, data, bits) < nats(prepared, data, bits)


def test_bias_correction_leaves_no_mean_error(residual):
    prepared, data, bits = residual
    recovered = BiasCorrection().recover(prepared, bits, data, BENCH)
    reference = compute_float_logits(prepared, data, batch_size=16).mean(0)
    assert torch.allclose(compute_logits(recovered, data, bits).mean(0), reference, atol=1e-3)  # biases are integers
    assert not torch.allclose(compute_logits(prepared, data, bits).mean(0), reference, atol=1e-2)


@pytest.mark.parametrize(
    "step",
    [
        BiasCorrection(samples=16),
        SecondOrderRounding(samples=16),
        BlockReconstruction(samples=16, epochs=1),
        OutputTuning(samples=16, epochs=1),
    ],
)
def test_a_graph_with_a_fixed_batch_is_run_in_such_batches(step):
    torch.manual_seed(1)
    x = torch.randn(60, 1, 8, 8)
    program = torch.export.export(randomise_norms(ResidualNet()).eval(), (x[:6],))
    prepared = infoq_fx.prepare(program, x, bits=(2, 8))
    data = read_data(x).named(prepared.input_names)
    bits = {site.name: 2 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    recovered = recover_accuracy(prepared, bits, data, [step], progress=False)
    assert recovered.recovered_by in ((step.name,), ())
    step.recover(prepared, bits, data, StepContext(batch_size=6))


@pytest.mark.parametrize("layout", ["plain", "channels last", "strided"])
def test_dropped_quantization_follows_its_definition(layout):
    qparams = QParams(QuantSpec(bits=3, symmetric=False), torch.tensor(0.25), torch.tensor(2, dtype=torch.int32))
    x = torch.randn(4, 6, 8, 10)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x[..., 1::2]
    x, grad = x.requires_grad_(), torch.randn(x.shape)
    y = _DropQuantize.apply(x, qparams, 0.3, 5)
    (found,) = torch.autograd.grad(y, x, grad)
    quantized = fake_quantize(x.detach(), qparams)
    is_float = (y == x) & (y != quantized)
    assert torch.equal(y, torch.where(is_float, x, quantized))
    assert 0.2 < is_float.double().mean() < 0.4
    assert torch.equal(found, grad * ((x > -0.5) & (x < 1.25)))
    assert torch.equal(_DropQuantize.apply(x, qparams, 0.0, 5), quantized)


@pytest.mark.parametrize(("samples", "held"), [(10 * 8, [4, 9]), (3 * 8, [0, 1, 2])])
def test_a_block_is_judged_on_what_it_does_not_learn_from(residual, monkeypatch, samples, held):
    prepared, data, bits = residual
    learned, judged = set(), set()
    loss = _Block._loss

    def record(self, block, index):
        (learned if torch.is_grad_enabled() else judged).add(index)
        return loss(self, block, index)

    monkeypatch.setattr(_Block, "_loss", record)
    BlockReconstruction(epochs=1).recover(prepared, bits, data.take(samples), BENCH)
    assert sorted(judged) == held
    assert sorted(learned) == [i for i in range(samples // 8) if samples < 40 or i not in held]


def test_reconstruction_goes_on_where_it_stopped(residual, tmp_path, caplog):
    prepared, data, bits = residual
    step, kept = BlockReconstruction(epochs=1), StepContext(batch_size=16, cache_dir=tmp_path)
    whole = state_of(step.recover(prepared, bits, data, BENCH))
    learned = []

    class StoppedError(Exception):
        pass

    def stop(share):
        learned.append(share)
        if sum(learned) > 0.6:
            raise StoppedError

    with pytest.raises(StoppedError):
        step.recover(
            prepared, bits, data, StepContext(batch_size=16, cache_dir=tmp_path, run_options=RunOptions(advance=stop))
        )
    files = sorted(tmp_path.rglob("*.pt"))
    assert 0 < len(files) < 4
    files[0].write_bytes(b"cut short")
    with caplog.at_level(logging.WARNING):
        again = state_of(step.recover(prepared, bits, data, kept))
    assert "learning the block again" in caplog.text
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    # Another option, other bits or other data are other blocks.
    count = len(list(tmp_path.iterdir()))
    BlockReconstruction(epochs=1, seed=1).recover(prepared, bits, data, kept)
    step.recover(prepared, {**bits, "head.weight": 8}, data, kept)
    step.recover(prepared, bits, data.take(80), kept)
    assert len(list(tmp_path.iterdir())) == count + 3


# The whole


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


@pytest.mark.parametrize(
    "build",
    [
        lambda: SecondOrderRounding(samples=0),
        lambda: SecondOrderRounding(sweeps=-1),
        lambda: SecondOrderRounding(reference="float"),
        lambda: BlockReconstruction(epochs=0),
        lambda: BlockReconstruction(drop=1.0),
        lambda: BlockReconstruction(learning_rate=0.0),
        lambda: OutputTuning(epochs=0),
        lambda: OutputTuning(scale_rate=-1.0),
    ],
)
def test_options_out_of_range(build):
    with pytest.raises(OptionError, match="="):
        build()


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
