"""LIMPQ against a training by hand."""

import math

import pytest
import torch
from differentiated import WEIGHTS, measure, net, prepare
from torch.nn import functional

from infoq_fx.scoring.criteria.literature.limpq import LIMPQ
from infoq_fx.scoring.gradients import shuffled_batches


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
