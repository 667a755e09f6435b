"""Criteria of the literature against independent implementations of their definitions."""

import math
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.quantization import numerics
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria.alps import ALPS, Finetuning
from infoq_fx.scoring.criteria.hawq_v2 import HAWQv2
from infoq_fx.scoring.criteria.limpq import LIMPQ
from infoq_fx.scoring.criteria.mpqco import MPQCO
from infoq_fx.scoring.criteria.ompq import OMPQ, orthogonality
from infoq_fx.scoring.gradients import read_labelled, shuffled_batches

QUICK = {
    "hawq_v2": HAWQv2(samples=8),
    "mpqco": MPQCO(samples=8),
    "ompq": OMPQ(samples=8),
    "limpq": LIMPQ(steps=2, batch_size=4),
    "alps": ALPS(steps=2, batch_size=4, samples=8),
}
WEIGHTS = ("0.weight", "2.weight")


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).eval()


def prepare(model, x, labels=None, bits=(2, 4, 8), **options):
    prepared = infoq_fx.prepare(model, (x, labels) if labels is not None else x, bits=bits, **options)
    return prepared, read_data((x, labels) if labels is not None else x).named(prepared.input_names)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(5)
    x, labels = torch.randn(24, 5), torch.randint(0, 3, (24,))
    model = net()
    return model, x, labels, *prepare(model, x, labels, activation_bits=(2, 8))


def measure(criterion, prepared, data, run_options=None, batch_size=8):
    measured_by = pickle.loads(
        pickle.dumps(criterion.begin(prepared, data, batch_size=batch_size, run_options=RunOptions()))
    )
    sites = [s for s in prepared.inventory.sites if s.is_searched and s.kind in criterion.kinds and len(s.bits) > 1]
    return criterion.score(prepared, measured_by(prepared, data, sites, run_options or RunOptions()))


def weight_error(model, prepared, site, bits):
    quantizer = next(q for _, q in prepared.quantizer_nodes() if q.site.name == site)
    weight = model.get_parameter(site).detach()
    return (numerics.fake_quantize(weight, quantizer.qparams_at(bits)) - weight).double()


# HAWQ-V2


def exact_average_trace(model, x, labels, site):
    def loss(weight):
        return functional.cross_entropy(torch.func.functional_call(model, {site: weight}, x), labels)

    weight = model.get_parameter(site).detach()
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), weight.numel())
    return float(hessian.trace()) / weight.numel()


@pytest.mark.parametrize("batch_size", [24, 12])
def test_hawq_v2_estimates_the_exact_trace(batch_size, small):
    model, x, labels, prepared, data = small
    criterion = HAWQv2(probes=300, samples=24)
    found = criterion.begin(prepared, data, batch_size=batch_size, run_options=RunOptions())
    for site in WEIGHTS:
        error = found.standard_error[site]
        expected = exact_average_trace(model, x, labels, site)
        assert error < 0.07 * expected
        assert found.average_trace[site] == pytest.approx(expected, abs=4 * error)


def test_hawq_v2_is_trace_times_squared_error(small):
    model, _, _, prepared, data = small
    criterion = HAWQv2(samples=24)
    found = criterion.begin(prepared, data, batch_size=8, run_options=RunOptions())
    for site, by_bits in measure(criterion, prepared, data).items():
        for bits, score in by_bits.items():
            power = float(weight_error(model, prepared, site, bits).square().sum())
            assert score.value == pytest.approx(max(0.0, found.average_trace[site]) * power, rel=1e-5)
            assert score.standard_error == pytest.approx(found.standard_error[site] * power, rel=1e-5)


def test_the_standard_error_of_hawq_v2_is_the_spread_over_seeds(small):
    _, _, _, prepared, data = small
    runs = [HAWQv2(seed=s, samples=16).begin(prepared, data, batch_size=4, run_options=RunOptions()) for s in range(40)]
    for site in WEIGHTS:
        spread = np.std([run.average_trace[site] for run in runs], ddof=1)
        claimed = math.sqrt(np.mean([run.standard_error[site] ** 2 for run in runs]))
        assert claimed == pytest.approx(spread, rel=0.35)


def test_a_negative_trace_counts_as_none(small):
    _, _, _, prepared, _ = small
    found = [
        infoq_fx.scoring.criterion.Measurement(
            "0.weight", 2, {"average_trace": -1.0, "average_trace:standard_error": 0.5, "squared_error": 2.0}
        )
    ]
    score = HAWQv2().score(prepared, found)["0.weight"][2]
    assert (score.value, score.standard_error) == (0.0, 1.0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(6, 18), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(self.norm(functional.scaled_dot_product_attention(q, k, v)).mean(1))


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(2)
    return prepare(Attention().eval(), torch.randn(16, 4, 6), torch.randint(0, 3, (16,)))


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_attention_is_scored(criterion, attention):
    scores = measure(criterion, *attention)
    assert set(scores) == {"qkv.weight", "head.weight"}
    assert criterion.name == "alps" or scores["qkv.weight"][2].value > scores["qkv.weight"][8].value


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.first(x).relu().reshape(4, 6))


@pytest.fixture(scope="module")
def fixed():
    torch.manual_seed(2)
    program = torch.export.export(FixedBatch().eval(), (torch.randn(4, 6),))
    return prepare(program, torch.randn(20, 6), torch.randint(0, 3, (20,)))


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_a_graph_of_fixed_batches_is_scored(criterion, fixed):
    prepared, data = fixed
    assert prepared.batch_size == 4
    scores = measure(criterion, prepared, data, batch_size=4)
    assert all(math.isfinite(score.value) for by_bits in scores.values() for score in by_bits.values())


# MPQCO


def test_mpqco_is_half_the_mean_squared_projection(small):
    model, x, labels, prepared, data = small
    scores = measure(MPQCO(), prepared, data)
    for site in WEIGHTS:
        for bits in (2, 4, 8):
            error = weight_error(model, prepared, site, bits)
            changes = []
            for row, label in zip(x, labels, strict=True):
                loss = functional.cross_entropy(model(row[None]), label[None])
                (gradient,) = torch.autograd.grad(loss, model.get_parameter(site))
                changes.append(float((gradient.double() * error).sum()) ** 2 / 2)
            assert scores[site][bits].value == pytest.approx(np.mean(changes), rel=1e-3)
            assert scores[site][bits].standard_error == pytest.approx(np.std(changes) / math.sqrt(24), rel=1e-3)


def test_mpqco_of_a_linear_model_in_closed_form():
    torch.manual_seed(5)
    x, labels = torch.randn(32, 6), torch.randint(0, 4, (32,))
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    prepared, data = prepare(model, x, labels)
    error = weight_error(model, prepared, "0.weight", 2)
    residual = model(x).detach().double().softmax(1) - functional.one_hot(labels, 4)
    expected = ((residual * (x.double() @ error.T)).sum(1) ** 2 / 2).mean()
    assert measure(MPQCO(), prepared, data)["0.weight"][2].value == pytest.approx(float(expected), rel=1e-4)


# OMPQ


def orm_by_definition(f, g):
    return np.linalg.norm(g.T @ f) ** 2 / (np.linalg.norm(f.T @ f) * np.linalg.norm(g.T @ g))


@pytest.mark.parametrize("is_centred", [True, False])
def test_ompq_is_the_definition(is_centred, monkeypatch):
    torch.manual_seed(5)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(20, 1, 8, 8)
    prepared, data = prepare(model, x)
    beta = 0.7
    outputs, value = [], x
    for layer in model:
        value = layer(value)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            rows = value.detach().flatten(1).double().numpy()
            outputs.append(rows - rows.mean(0) if is_centred else rows)
    gamma = [sum(orm_by_definition(f, g) for g in outputs) - 1 for f in outputs]
    theta = np.exp(-beta * (np.array(gamma) - min(gamma)))
    importance = [theta[i:].mean() for i in range(3)]
    scores = measure(OMPQ(beta=beta, is_centred=is_centred), prepared, data)
    for site, expected in zip(("0.weight", "2.weight", "5.weight"), importance, strict=True):
        for bits in (2, 4, 8):
            # The 8-bit model's outputs are not quite the float model's.
            assert scores[site][bits].value == pytest.approx((8 - bits) * expected, rel=0.02)
    monkeypatch.setattr("infoq_fx.scoring.criteria.ompq._GROUP_BYTES", 1)
    assert measure(OMPQ(beta=beta, is_centred=is_centred), prepared, data) == scores


@pytest.mark.parametrize("is_centred", [True, False])
def test_orthogonality_needs_only_the_products_of_samples(is_centred):
    outputs = [3 + torch.randn(12, n, dtype=torch.float64) for n in (5, 30)]
    found = orthogonality(torch.stack([f @ f.T for f in outputs]), is_centred=is_centred)
    f, g = ((f - is_centred * f.mean(0)).numpy() for f in outputs)
    expected = [[1.0, orm_by_definition(f, g)], [orm_by_definition(g, f), 1.0]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_ompq_counts_a_constant_layer_as_like_no_other():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second((self.first(x) * 0).relu())

    prepared, data = prepare(Constant().eval(), torch.randn(16, 4))
    scores = measure(OMPQ(), prepared, data)
    assert scores["first.weight"][2].value == scores["second.weight"][2].value == 6.0


# LIMPQ


def limpq_by_hand(model, x, labels, prepared, *, steps, rate, seed, batch):
    """An independent implementation of the training, for ``net()`` with quantized weights only."""
    weights = {site: model.get_parameter(site).detach().clone().requires_grad_() for site in WEIGHTS}
    biases = [model.get_parameter(name).detach().clone().requires_grad_() for name in ("0.bias", "2.bias")]
    scales = {}
    for site, weight in weights.items():
        mean, deviation = float(weight.detach().mean()), float(weight.detach().std(correction=0))
        for bits in (2, 4, 8):
            first = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2 ** (bits - 1)
            scales[site, bits] = torch.tensor(first, requires_grad=True)

    def quantize(site, bits):
        w, low, high = weights[site], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        g = 1 / math.sqrt(w.numel() * high)
        s = (scales[site, bits] - g * scales[site, bits]).detach() + g * scales[site, bits]
        ratio = (w / s).clamp(low, high)
        return (ratio + (ratio.round() - ratio).detach()) * s

    def loss(rows, bits):
        hidden = functional.gelu(functional.linear(x[rows], quantize(WEIGHTS[0], bits[0]), biases[0]))
        return functional.cross_entropy(
            functional.linear(hidden, quantize(WEIGHTS[1], bits[1]), biases[1]), labels[rows]
        )

    generator = torch.Generator().manual_seed(seed)
    batches = shuffled_batches(len(x), batch, generator)
    groups = [[*weights.values(), *biases], list(scales.values())]
    speed = {id(p): torch.zeros_like(p) for group in groups for p in group}
    for step in range(steps):
        rows = next(batches)
        total = sum(loss(rows, (bits, bits)) for bits in (2, 4, 8))
        drawn = [(2, 4, 8)[int(torch.randint(3, (), generator=generator))] for _ in WEIGHTS]
        total = total + loss(rows, drawn)
        for group in groups:
            gradients = torch.autograd.grad(total, group, retain_graph=True, materialize_grads=True)
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            for p, gradient in zip(group, gradients, strict=True):
                speed[id(p)] = 0.9 * speed[id(p)] + gradient * min(1, 1 / (norm + 1e-6))
        with torch.no_grad():
            for group in groups:
                for p in group:
                    p -= rate * (1 + math.cos(math.pi * step / steps)) / 2 * speed[id(p)]
    return {key: float(scale.detach()) for key, scale in scales.items()}


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_limpq_is_the_training_by_hand(steps):
    torch.manual_seed(5)
    x, labels = torch.randn(24, 5), torch.randint(0, 3, (24,))
    model = net()
    prepared, data = prepare(model, x, labels, activation_bits=None)
    options = {"steps": steps, "seed": 3}
    expected = limpq_by_hand(model, x, labels, prepared, rate=0.02, batch=8, **options)
    scores = measure(LIMPQ(learning_rate=0.02, batch_size=8, **options), prepared, data)
    assert {(s, b) for s, by in scores.items() for b in by} == set(expected)
    for (site, bits), step in expected.items():
        assert scores[site][bits].value == pytest.approx(step, rel=1e-4), (site, bits)


def test_limpq_begins_with_lsq_steps_at_activations_or_with_the_same_everywhere(small):
    _, x, _, prepared, data = small
    first = measure(LIMPQ(steps=0, batch_size=24), prepared, data)["0.input"]
    zero_points = {b: int(q.qparams_at(b).zero_point) for _, q in prepared.quantizer_nodes() for b in (2, 8)
                   if q.site.name == "0.input"}  # fmt: skip
    for bits, zero_point in zero_points.items():
        above = 2**bits - 1 - zero_point
        assert first[bits].value == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(above), rel=1e-5)
    same = measure(LIMPQ(steps=0, initial="same"), prepared, data)
    assert all(score.value == pytest.approx(0.1 / b) for by_bits in same.values() for b, score in by_bits.items())


def test_alpha_weighs_weights_only(small):
    _, _, _, prepared, data = small
    once, twice = (measure(LIMPQ(steps=1, alpha=a), prepared, data) for a in (1.0, 2.0))
    for site, by_bits in once.items():
        factor = 2 if site.endswith("weight") else 1
        assert all(twice[site][bits].value == factor * score.value for bits, score in by_bits.items())


def test_limpq_is_described_by_the_candidates_of_all_sites(small):
    model, x, labels, prepared, data = small
    other, _ = prepare(model, x, labels, bits=(2, 3, 8), activation_bits=(2, 8))
    assert LIMPQ().describe(prepared, data) != LIMPQ().describe(other, data)


# ALPS


def test_alps_without_training_is_the_increase_of_the_loss(small):
    _, _, _, prepared, data = small
    scores = measure(ALPS(steps=0), prepared, data)
    expected = measure(infoq_fx.scoring.criteria.Loss(), prepared, data)
    for site, by_bits in expected.items():
        for bits, score in by_bits.items():
            assert scores[site][bits].value == pytest.approx(score.value, abs=1e-4)
            assert scores[site][bits].standard_error == pytest.approx(score.standard_error, abs=1e-4)


def test_alps_counts_the_accuracy_too(small):
    _, _, _, prepared, data = small
    scores = measure(ALPS(steps=0, by="accuracy"), prepared, data)
    expected = measure(infoq_fx.scoring.criteria.Accuracy(), prepared, data)
    assert {s: {b: v.value for b, v in by.items()} for s, by in scores.items()} == {
        s: {b: pytest.approx(v.value, abs=1e-6) for b, v in by.items()} for s, by in expected.items()
    }
    assert ALPS(by="accuracy").describe(prepared, data) == ALPS().describe(prepared, data)


class Branches(nn.Module):
    """A branch that carries the classes and one that carries almost nothing."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return 4 * self.used(x) + 1e-3 * self.idle(x)


@pytest.mark.parametrize("criterion", [HAWQv2(), MPQCO(), ALPS(steps=4)], ids=["hawq_v2", "mpqco", "alps"])
def test_a_layer_that_does_not_matter_scores_least(criterion):
    torch.manual_seed(4)
    model, x = Branches().eval(), torch.randn(96, 6)
    prepared, data = prepare(model, x)
    scores = measure(criterion, prepared, data)
    assert scores["idle.weight"][2].value < 0.1 * scores["used.weight"][2].value
    assert scores["used.weight"][4].value < scores["used.weight"][2].value


def test_finetuning_makes_good_what_it_can():
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(96, 6)
    prepared, data = prepare(model, x)
    chosen = read_labelled("alps", prepared, data, 96, batch_size=32, run_options=RunOptions())
    losses = [
        float(
            Finetuning(steps, 32, 0.02, 0)
            .run(prepared, chosen, {"0.weight": 2}, RunOptions(), lambda share: None)[0]
            .mean()
        )
        for steps in (0, 20)
    ]
    assert losses[1] < 0.9 * losses[0]


# All


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_threads_and_the_global_generator_change_nothing(criterion, small):
    _, _, _, prepared, data = small
    torch.manual_seed(11)
    state = torch.get_rng_state()
    once = measure(criterion, prepared, data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    threaded = RunOptions(threads=3)
    sites = [s for s in prepared.inventory.sites if s.is_searched and s.kind in criterion.kinds and len(s.bits) > 1]
    steps = []
    measured_by = criterion.begin(prepared, data, batch_size=8, run_options=threaded)
    found = measured_by(prepared, data, sites, RunOptions(threads=3, advance=steps.append))
    assert criterion.score(prepared, found) == once
    assert sum(steps) == pytest.approx(sum(len(site.bits) for site in sites))


@pytest.mark.parametrize(
    "criteria",
    [[HAWQv2(seed=s, samples=8) for s in (0, 1)], [LIMPQ(seed=s, steps=2, batch_size=4) for s in (0, 1)],
     [ALPS(seed=s, steps=2, batch_size=4) for s in (0, 1)]],
    ids=["hawq_v2", "limpq", "alps"],
)  # fmt: skip
def test_seeds_decide(criteria, small):
    _, _, _, prepared, data = small
    first, second = (measure(criterion, prepared, data) for criterion in criteria)
    assert first != second
    assert measure(criteria[0], prepared, data) == first
    assert criteria[0].describe(prepared, data) != criteria[1].describe(prepared, data)


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_no_data_is_refused(criterion, small):
    _, _, _, prepared, _ = small
    with pytest.raises(CalibrationDataError, match=criterion.name):
        criterion.begin(prepared, None, batch_size=8, run_options=RunOptions())


@pytest.mark.parametrize("name", [n for n in QUICK if n != "ompq"])
def test_labels_that_are_no_classes_are_refused(name, small):
    _, x, labels, prepared, _ = small
    data = read_data((x, labels + 7)).named(prepared.input_names)
    with pytest.raises(CalibrationDataError, match="labels range from 7"):
        QUICK[name].begin(prepared, data, batch_size=8, run_options=RunOptions())


@pytest.mark.parametrize(
    "make",
    [
        lambda: HAWQv2(probes=1),
        lambda: HAWQv2(samples=0),
        lambda: MPQCO(samples=0),
        lambda: OMPQ(samples=1),
        lambda: OMPQ(beta=-1.0),
        lambda: LIMPQ(steps=-1),
        lambda: LIMPQ(learning_rate=0.0),
        lambda: LIMPQ(initial="zeros"),
        lambda: ALPS(by="recall"),
        lambda: ALPS(learning_rate=math.inf),
    ],
)
def test_options_that_make_no_sense_are_refused(make):
    with pytest.raises(OptionError):
        make()


def test_a_training_that_diverges_says_so(small):
    _, _, _, prepared, data = small
    for criterion in (LIMPQ(learning_rate=1e30, steps=8), ALPS(learning_rate=1e30)):
        with pytest.raises(OptionError, match="lower it"):
            criterion.begin(prepared, data, batch_size=8, run_options=RunOptions())


@pytest.mark.parametrize("criterion", [LIMPQ(steps=10**7), ALPS(steps=10**7)], ids=["limpq", "alps"])
def test_stop_ends_a_training(criterion, small):
    _, _, _, prepared, data = small
    run_options = RunOptions()
    timer = threading.Timer(0.3, run_options.stop.set)
    timer.start()
    criterion.begin(prepared, data, batch_size=8, run_options=run_options)
    timer.join()


def test_without_labels_the_models_own_predictions_serve(small):
    model, x, _, prepared, _ = small
    data = read_data(x).named(prepared.input_names)
    chosen = read_labelled("mpqco", prepared, data, 6, batch_size=8, run_options=RunOptions())
    rows = torch.arange(6) * 24 // 6
    assert torch.equal(chosen.inputs[prepared.input_names[0]], x[rows])
    assert torch.equal(chosen.labels, model(x[rows]).argmax(1))


def test_batches_are_whole_and_every_epoch_has_another_order():
    batches = shuffled_batches(10, 4, torch.Generator().manual_seed(0))
    rows = [next(batches) for _ in range(4)]
    assert all(len(r) == 4 for r in rows)
    assert len(set(torch.cat(rows[:2]).tolist())) == len(set(torch.cat(rows[2:]).tolist())) == 8
    assert not torch.equal(torch.cat(rows[:2]), torch.cat(rows[2:]))
