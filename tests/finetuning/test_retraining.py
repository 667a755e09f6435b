"""From a quantized module to a trainable one and back."""

import copy
import io
import math
import pickle

import pytest
import torch
from finetuned import CASES, IMAGES, assert_same, convert, prepared_of, reload
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.conversion.quantized import provenance_of
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.retraining import BiasQuantizer, TrainableModule, to_quantized, to_trainable
from infoq_fx.finetuning.trainable import LearnedStepQuantizer, float_copy
from infoq_fx.quantization import numerics
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.quantization.histogram import scale_significant_bits, significant_bits_of
from infoq_fx.types import QParams, QuantSite, QuantSpec

pytestmark = pytest.mark.slow  # training loops of one's own


@pytest.fixture(params=CASES)
def case(request):
    _, x, prepared = prepared_of(request.param)
    return convert(prepared), x, prepared


def train(module, x, steps=6, lr=0.02):
    """A custom training loop, towards another function."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).cos().sum().backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("read", [lambda q: q, reload], ids=["converted", "read"])
def test_a_trainable_module_computes_what_the_quantized_one_does_and_goes_back_to_it(read, case):
    quantized, x, _ = case
    before = copy.deepcopy(quantized)
    trainable = to_trainable(read(quantized))
    assert torch.equal(trainable(x), quantized(x))
    again = to_quantized(trainable)
    assert isinstance(again, infoq_fx.QuantizedModule)
    assert_same(again, before)
    assert_same(quantized, before)
    assert torch.equal(again(x), quantized(x))
    assert infoq_fx.allocation_of(again) == infoq_fx.allocation_of(quantized)


def test_every_parameter_of_the_float_model_is_one_and_every_step(case):
    quantized, x, prepared = case
    trainable = to_trainable(quantized)
    train(trainable, x, steps=1)
    expected = set(dict(float_copy(prepared).named_parameters()))
    # A file stores what two layers share once for each.
    twins = {"table.weight_float", "twice.bias_of_linear_1"} & set(dict(trainable.named_parameters()))
    steps = {f"quantizers.{site}.quantizer.scale" for site in infoq_fx.allocation_of(quantized).bits}
    found = dict(trainable.named_parameters())
    merged = steps - set(found)  # sites that the conversion has made one
    levels = {name for name in found if name.endswith(".quantizer.levels")}
    assert set(found) - levels == (expected | steps | twins) - merged
    assert len(merged) < len(steps) / 2
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_a_tied_weight_is_trained_in_both_places():
    _, x, prepared = prepared_of("tied")
    quantized = convert(prepared)
    again = to_quantized(train(to_trainable(quantized), x))
    names = [name for name, value in quantized.state_dict().items() if not torch.equal(value, again.state_dict()[name])]
    assert {"table.weight", "left.weight", "left.bias", "mix.bias"} <= set(names)


@pytest.mark.parametrize("name", CASES)
def test_what_was_trained_is_what_is_exported(name):
    _, x, prepared = prepared_of(name)
    quantized = convert(prepared)
    trained = train(to_trainable(quantized), x)
    again = to_quantized(trained)
    assert float((again(x) - quantized(x)).abs().max()) > 0.01
    torch.testing.assert_close(again(x), trained(x), rtol=1e-4, atol=1e-5)
    for node in again.graph.nodes:
        if node.target is quantize_dequantize_op:
            assert is_short(node.args[1], scale_significant_bits(node.args[3], is_weight=False))
        if node.target is dequantize_op and node.args[3] <= 8:
            integers, scale = (again.get_buffer(str(operand.target)) for operand in node.all_input_nodes)
            assert integers.dtype == torch.int8
            assert len(integers.unique()) <= 2 ** node.args[3]
            terms = integers.numel() // integers.shape[node.args[2]]
            source = next(iter(node.users)).args[0]
            met = significant_bits_of(source.args[1]) if source.target is quantize_dequantize_op else None
            met = 1 if met == 1 else 4  # what a learned scale may have
            digits = scale_significant_bits(node.args[3], is_weight=True, terms=terms, of_input=met)
            assert all(is_short(float(s), digits) for s in scale)


def is_short(value, bits):
    return math.frexp(value)[0] * 2**bits % 1 == 0


TRAVELS = {
    "deepcopy": copy.deepcopy,
    "pickle": reload,
    "file": lambda m: torch.load(written(m), weights_only=False),
    "deepcopy of pickle": lambda m: copy.deepcopy(reload(m)),
}


def written(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("travel", TRAVELS.values(), ids=TRAVELS)
def test_it_goes_on_after_a_journey(travel, residual):
    trained = train(to_trainable(residual), IMAGES, steps=2)
    again = travel(trained)
    assert isinstance(again, TrainableModule)
    assert all(p.requires_grad for p in again.parameters())
    train(trained, IMAGES, steps=2)
    train(again, IMAGES, steps=2)
    assert_same(to_quantized(again), to_quantized(trained))


def test_a_state_dict_holds_what_was_learned(residual):
    trained = train(to_trainable(residual), IMAGES)
    fresh = to_trainable(reload(residual))
    fresh.load_state_dict(trained.state_dict())
    assert_same(to_quantized(fresh), to_quantized(trained))


def test_a_state_dict_brings_its_zero_points_along():
    site, spec = QuantSite("x", "activation", (4,), (4,)), QuantSpec(bits=4, symmetric=False)
    one, other = (
        LearnedStepQuantizer(site, QParams(spec, torch.tensor(0.5), torch.tensor(zero, dtype=torch.int32)))
        for zero in (0, 9)
    )
    one.load_state_dict(other.state_dict())
    x = torch.linspace(-9, 9, 50)
    assert torch.equal(one(x), other(x))
    assert float(one(x).detach().min()) == -4.5


def test_it_compiles_whole_with_the_same_gradients():
    quantized = convert(prepared_of("norm_first")[2])
    plain, compiled = to_trainable(quantized), to_trainable(quantized)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for module, forward in ((plain, plain), (compiled, run)):
        module.zero_grad()
        functional.cross_entropy(forward(IMAGES), torch.arange(40) % 4).backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert_same(to_quantized(run), quantized)


def test_it_takes_any_memory_layout():
    _, x, prepared = prepared_of("attention")
    plain = to_trainable(convert(prepared))
    assert torch.equal(plain(x.transpose(1, 2).contiguous().transpose(1, 2)), plain(x))


def test_a_wrapped_module_is_found(residual):
    trained = train(to_trainable(residual), IMAGES)
    wrapped = nn.Module()
    wrapped.module = trained
    assert_same(to_quantized(wrapped), to_quantized(trained))


def test_a_bias_that_would_not_fit_32_bits_gets_a_larger_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[2] *= 1e-12
        model[0].bias[2] = 3.0
    x = torch.randn(32, 8)
    quantized = convert(infoq_fx.prepare(model, x, bits=(2, 8)))
    trainable = to_trainable(quantized)
    torch.testing.assert_close(trainable(x), quantized(x))
    with torch.no_grad():
        trainable.get_parameter("0.bias")[2] *= 5
    again = to_quantized(trainable)
    assert 2**29 < int(again.get_buffer("0.bias").abs().max()) <= 2**30 + 1
    torch.testing.assert_close(again(x), trainable(x), rtol=1e-3, atol=1e-4)


def test_only_a_quantized_module_becomes_trainable(residual):
    with pytest.raises(OptionError, match="got a Linear; pass what quantize"):
        to_trainable(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="got a TrainableModule; pass what quantize"):
        to_trainable(to_trainable(residual))


def test_only_a_sound_trainable_module_becomes_quantized(residual):
    with pytest.raises(OptionError, match="got a Linear; pass what to_trainable"):
        to_quantized(nn.Linear(2, 2))
    broken = to_trainable(residual)
    with torch.no_grad():
        broken.get_parameter("head.weight")[0, 0] = math.nan
    with pytest.raises(OptionError, match=r"'head.weight' holds NaN .* lower its learning rate"):
        to_quantized(broken)


def test_a_file_does_not_hold_the_float_model(residual):
    provenance = provenance_of(residual)
    assert provenance.prepared is prepared_of("residual")[2]
    assert provenance_of(copy.deepcopy(residual)).prepared is provenance.prepared
    assert provenance_of(reload(residual)).prepared is None
    assert provenance_of(to_quantized(to_trainable(residual))).prepared is provenance.prepared
    assert b"PreparedModel" not in pickle.dumps(residual)
    assert b"PreparedModel" not in pickle.dumps(to_trainable(residual))


def test_a_short_step_is_rounded_and_its_gradient_passes():
    spec = QuantSpec(bits=8, symmetric=True, channel_axis=0)
    qparams = QParams(spec, torch.tensor([1.0, 1.4, 0.1, -1.0]), torch.zeros(4, dtype=torch.int32))
    module = LearnedStepQuantizer(QuantSite("w", "weight", (4, 3), (8,), 0), qparams, significant_bits=2)
    with torch.no_grad():
        module.smallest.copy_(torch.tensor([2.0**-10, 2.0**-10, 2.0**-10, 0.75]))
    assert module.qparams().scale.tolist() == [1.0, 1.5, 0.09375, 0.75]
    x = torch.randn(4, 3)
    assert torch.equal(module(x), numerics.fake_quantize(x, module.qparams()))
    module(x).sum().backward()
    assert bool(module.scale.grad.all())


def test_a_bias_is_a_multiple_of_both_steps():
    module = BiasQuantizer("b", 4, 2)
    bias = torch.tensor([0.3, -0.7], requires_grad=True)
    scales = torch.tensor(0.5), torch.tensor(1e-3), torch.tensor([0.25, 1.0]), torch.tensor([1e-3, 1e-3])
    found = module(bias, *scales)
    assert found.tolist() == [0.25, -0.5]
    (found * torch.tensor([2.0, 3.0])).sum().backward()
    assert bias.grad.tolist() == [2.0, 3.0]


def test_a_recovered_model_becomes_trainable_as_it_is():
    # Recovery gives scales of few terms more significant bits than calibration does.
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(40, 1, 8, 8)
    prepared = infoq_fx.prepare(model.eval(), x, bits=8)
    allocation = infoq_fx.Allocation(bits={site.name: 8 for site in prepared.inventory.sites})
    recovered = infoq_fx.recover(prepared, allocation, x, "second_order_rounding", progress=False)
    quantized = infoq_fx.convert(recovered, allocation)
    scales = [value for name, value in quantized.state_dict().items() if name.endswith("weight_scale")]
    assert any(bool((torch.frexp(scale).mantissa * 4 % 1 != 0).any()) for scale in scales)
    trainable = to_trainable(quantized)
    with torch.no_grad():
        assert torch.equal(trainable(x), quantized(x))
    assert_same(to_quantized(trainable), quantized)
