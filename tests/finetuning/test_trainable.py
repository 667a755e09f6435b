import functools
import math
import pickle

import pytest
import torch
from logits import compute_logits
from networks import Attention, NormFirst, ResidualNet, randomise_norms
from torch.nn import functional

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.trainable import LearnedStepQuantizer, float_copy, trainable_copy, weights_by_site
from infoq_fx.quantization import numerics
from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import QParams, QuantSite, QuantSpec

IMAGES = torch.randn(48, 1, 8, 8)
MODELS = {
    "residual": (ResidualNet, IMAGES),
    "attention": (Attention, torch.randn(48, 5, 8)),
    "norm_first": (NormFirst, IMAGES),
}


@functools.cache
def prepared_of(name):
    torch.manual_seed(3)
    build, x = MODELS[name]
    model = randomise_norms(build()).eval()
    return model, x, infoq_fx.prepare(model, x, bits=(2, 8), activation_bits=(4, 8))


@pytest.fixture(params=MODELS)
def case(request):
    return prepared_of(request.param)


@pytest.fixture
def residual():
    return prepared_of("residual")[2]


def quantizers(module):
    return {m.site.name: m for m in module.modules() if isinstance(m, LearnedStepQuantizer)}


def test_the_float_copy_is_the_model_with_gradients_everywhere(case):
    model, x, prepared = case
    copied = float_copy(prepared)
    torch.testing.assert_close(copied(x), model(x), rtol=1e-4, atol=1e-5)
    assert not [m for m in copied.modules() if isinstance(m, Quantizer | Observe)]
    copied(x).square().sum().backward()
    for name, parameter in copied.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    statistics = {name for name, _ in copied.named_buffers() if "running" in name}
    assert statistics == ({"norm.running_mean", "norm.running_var"} if isinstance(model, NormFirst) else set())


def test_gradients_are_those_of_the_model():
    model, x, prepared = prepared_of("attention")
    copied = float_copy(prepared)
    model.zero_grad()
    model(x).square().sum().backward()
    copied(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in copied.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_weights_are_found_by_site(case):
    _, x, prepared = case
    copied = float_copy(prepared)
    weights = weights_by_site(prepared, copied)
    assert set(weights) == {site.name for site in prepared.inventory.sites if site.kind == "weight"}
    assert all(weights[s.name].shape == s.shape for s in prepared.inventory.sites if s.kind == "weight")
    with torch.no_grad():
        next(iter(weights.values())).zero_()
    assert bool((copied(x) - float_copy(prepared)(x)).any())


@pytest.mark.parametrize("bits", [{}, "mixed"])
def test_the_trainable_copy_begins_where_the_prepared_model_is(bits, case):
    _, x, prepared = case
    sites = prepared.inventory.sites
    chosen = {site.name: site.bits[0] for site in sites[::2]} if bits else {}
    data = read_data(x).named(prepared.input_names)
    copied = trainable_copy(prepared, chosen)
    expected = compute_logits(prepared, data, chosen, batch_size=len(x))
    found = copied(x).detach()
    # Sums in another order move single roundings.
    assert float((found - expected).abs().mean()) < 0.01 * float(expected.std())
    assert {name: q.spec.bits for name, q in quantizers(copied).items()} == {
        s.name: chosen.get(s.name, 8) for s in sites
    }
    copied(x).square().sum().backward()
    assert all(p.grad is not None for p in copied.parameters())


def test_training_lowers_the_loss_and_leaves_the_prepared_model_alone(residual, images):
    prepared = residual
    before = {name: value.clone() for name, value in prepared.graph_module.state_dict().items()}
    copied = trainable_copy(prepared, {"blocks.0.conv1.weight": 2})
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(copied(images[0]), images[1])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    first = trainable_copy(prepared, {"blocks.0.conv1.weight": 2})
    moved = [name for name, p in copied.named_parameters() if not torch.equal(p, first.get_parameter(name))]
    assert any(name.endswith("quantizer.scale") for name in moved)
    assert any(name.endswith("conv1.weight") for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in prepared.graph_module.state_dict().items())


def test_qparams_may_be_given(residual):
    name = "stem.0.weight"
    spec = QuantSpec(bits=3, symmetric=True, channel_axis=0)
    given = QParams(spec, torch.full((6,), 0.25), torch.zeros(6, dtype=torch.int32))
    found = quantizers(trainable_copy(residual, qparams={name: given}))[name]
    assert found.spec == spec
    assert torch.equal(found.qparams().scale, given.scale)


@pytest.mark.parametrize(("bits", "message"), [({"stem": 4}, "unknown site"), ({"stem.0.weight": 3}, "calibrated for")])
def test_bits_that_cannot_be_had_are_refused(bits, message, residual):
    with pytest.raises(OptionError, match=message):
        trainable_copy(residual, bits)


def test_a_copy_may_be_made_and_trained_in_inference_mode(residual):
    with torch.inference_mode():
        copied = trainable_copy(residual)
    copied(IMAGES).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())


def test_a_copy_travels_by_pickle(residual):
    copied = trainable_copy(residual)
    again = pickle.loads(pickle.dumps(copied))
    assert torch.equal(again(IMAGES), copied(IMAGES))
    assert quantizers(again).keys() == quantizers(copied).keys()


# What the paper says of one value: Eq. 1 to 3 and 5 and Section 2.2, by the letter.


def quantized(v, s, low, high):
    return round(min(max(v / s, low), high)) * s


def step_gradient(v, s, low, high):
    ratio = v / s
    if ratio <= low:
        return low
    return high if ratio >= high else -ratio + round(ratio)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_step_gradients_of_a_weight_are_the_papers(bits):
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(bits))
    spec = QuantSpec(bits=bits, symmetric=True, channel_axis=0)
    qparams = choose_weight_qparams(weight, spec)
    module = LearnedStepQuantizer(QuantSite("w", "weight", (3, 40), (bits,), 0), qparams)
    x = weight.clone().requires_grad_()
    y = module(x)
    assert torch.equal(y, numerics.fake_quantize(weight, qparams))
    outer = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    (y * outer).sum().backward()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    g = 1 / math.sqrt(40 * high)
    for c in range(3):
        s, row = float(qparams.scale[c]), weight[c].tolist()
        assert y[c].tolist() == pytest.approx([quantized(v, s, low, high) for v in row], abs=1e-6)
        wanted = sum(o * step_gradient(v, s, low, high) for o, v in zip(outer[c].tolist(), row, strict=True))
        assert float(module.scale.grad[c]) == pytest.approx(g * wanted, rel=1e-4, abs=1e-6)
        passed = [o if low < v / s < high else 0.0 for o, v in zip(outer[c].tolist(), row, strict=True)]
        assert x.grad[c].tolist() == pytest.approx(passed)


def test_gradients_of_a_codebook_are_those_of_its_values():
    generator = torch.Generator().manual_seed(0)
    weight, outer = (torch.randn(3, 40, generator=generator) for _ in range(2))
    spec = QuantSpec(bits=2, symmetric=True, channel_axis=0, has_codebook=True)
    qparams = choose_weight_qparams(weight, spec)
    module = LearnedStepQuantizer(QuantSite("w", "weight", (3, 40), (2,), 0, levels="codebook"), qparams)
    x = weight.clone().requires_grad_()
    y = module(x)
    assert torch.equal(y, numerics.fake_quantize(weight, qparams))
    (y * outer).sum().backward()
    q, step = numerics.quantize(weight, qparams), qparams.scale[:, None]
    unit = 32  # the power of two nearest to the distance of 4 levels from -63 to 63
    assert torch.equal(module.scale, unit * qparams.scale)
    assert torch.equal(unit * module.levels, qparams.levels.float())
    by_level = [unit * float((outer * step)[q == level].sum()) for level in qparams.levels]
    assert module.levels.grad.tolist() == pytest.approx([module.gradient_scale * g for g in by_level], rel=1e-4)
    ratio, limits = weight / step, (int(qparams.levels[0]), int(qparams.levels[-1]))
    is_inside = (ratio > limits[0]) & (ratio < limits[1])
    torch.testing.assert_close(x.grad, outer * is_inside)
    slope = torch.where(is_inside, q - ratio, q.float())
    torch.testing.assert_close(module.scale.grad, module.gradient_scale * (outer * slope).sum(1) / unit)


def test_learned_levels_are_integers_in_order():
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=2, symmetric=True, channel_axis=0, has_codebook=True)
    qparams = choose_weight_qparams(weight, spec)
    module = LearnedStepQuantizer(QuantSite("w", "weight", (3, 40), (2,), 0, levels="codebook"), qparams)
    with torch.no_grad():
        module.levels.copy_(torch.tensor([3.4, -70.0, 62.6, 0.2]) / 32)
    assert module.qparams().levels.tolist() == [-63, 0, 3, 63]
    assert torch.equal(module(weight), numerics.fake_quantize(weight, module.qparams()))


def test_step_gradient_of_an_activation_counts_the_values_of_one_sample():
    spec = QuantSpec(bits=4, symmetric=False)
    qparams = QParams(spec, torch.tensor(0.5), torch.tensor(5, dtype=torch.int32))
    module = LearnedStepQuantizer(QuantSite("x", "activation", (4, 6), (4,)), qparams)
    x = 3 * torch.randn(7, 4, 6)
    module(x).sum().backward()
    wanted = sum(step_gradient(v, 0.5, -5, 10) for v in x.flatten().tolist())
    assert float(module.scale.grad) == pytest.approx(wanted / math.sqrt(24 * 10), rel=1e-4)
    assert torch.equal(module(x), numerics.fake_quantize(x, qparams))


def test_a_step_stays_positive_and_comes_back():
    site, spec = QuantSite("x", "activation", (4,), (4,)), QuantSpec(bits=4, symmetric=False)
    module = LearnedStepQuantizer(site, QParams(spec, torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)))
    with torch.no_grad():
        module.scale.fill_(-3.0)
    assert float(module.qparams().scale) == 0.5 / 1024
    y = module(torch.tensor([1.0, 2.0]))
    assert bool(torch.isfinite(y).all())
    y.sum().backward()
    assert float(module.scale.grad) > 0
