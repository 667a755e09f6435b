"""A quantized module learns from its float model or from labels, and is never left worse."""

import copy
import dataclasses
import functools
import logging
import math
import re

import onnxruntime
import pytest
import torch
from finetuned import IMAGES, Regression, assert_same, convert, loader_of, prepared_of, quick, reload, small
from torch import Tensor, nn

import infoq_fx
from infoq_fx.demo import digits, train_digits_net
from infoq_fx.errors import OptionError
from infoq_fx.finetuning import training_loop as loop
from infoq_fx.finetuning.finetuning import _count_returns, finetune
from infoq_fx.types import Allocation


@functools.cache
def digits_of():
    """A trained network, images, labels and a conversion to 2 bits that loses nearly everything."""
    (images, labels), (test_images, test_labels) = digits()
    model = train_digits_net(images, labels, epochs=2)
    prepared = infoq_fx.prepare(model, images[:256], bits=(2, 8))
    bits = {site.name: 2 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    return model, infoq_fx.convert(prepared, Allocation(bits=bits)), (images, labels), (test_images, test_labels)


<<<<<<< HEAD
@pytest.fixture
def residual():
    return convert(prepared_of("residual")[2])


def reload(quantized):
    return pickle.loads(pickle.dumps(quantized))


def constants(module):
    return sorted(n.args[1:] for n in module.graph.nodes if n.target is quantize_dequantize_op)


def assert_same(first, second):
    """The same numbers under the same names."""
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name
    assert constants(first) == constants(second)
    assert infoq_fx.allocation_of(first).bits == infoq_fx.allocation_of(second).bits


def train(module, x, steps=6, lr=0.02):
    """A custom training loop, towards another function."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).cos().sum().backward()
        optimizer.step()
    return module


# From the quantized module to the trainable one and back.


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
    assert set(found) == (expected | steps | twins) - merged
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
            low, high = -(2 ** (node.args[3] - 1)), 2 ** (node.args[3] - 1) - 1
            assert integers.dtype == torch.int8
            assert low <= int(integers.min()) <= int(integers.max()) <= high
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


# The quantizer, against numerics.fake_quantize_ste and by the letter.


def layouts(x):
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "strided"])
@pytest.mark.parametrize("gradient", ["contiguous", "channels last", "expanded"])
@pytest.mark.parametrize(("bits", "zero"), [(2, 0), (4, 5), (8, 255)])
def test_the_kernels_are_the_formulas(layout, gradient, bits, zero):
    x = layouts(3 * torch.randn(5, 6, 7, 3))[layout].detach().requires_grad_()
    spec = QuantSpec(bits=bits, symmetric=False)
    zero_point = torch.tensor(min(zero, spec.quant_max), dtype=torch.int32)
    module = LearnedStepQuantizer(
        QuantSite("x", "activation", (6, 7, 3), (bits,)), QParams(spec, torch.tensor(0.25), zero_point)
    )
    outer = torch.randn(5, 1, 7, 3).expand(5, 6, 7, 3)
    outer = outer if gradient == "expanded" else layouts(outer.contiguous())[gradient]
    step = torch.tensor(0.25, requires_grad=True)
    expected = numerics.fake_quantize_ste(x, step, zero_point, spec.quant_min, spec.quant_max)
    wanted, wanted_step = torch.autograd.grad(expected, [x, step], outer)
    y = module(x)
    assert torch.equal(y, expected)
    found, found_step = torch.autograd.grad(y, [x, module.scale], outer)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found_step, module.gradient_scale * wanted_step, rtol=1e-4, atol=1e-5)


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


# finetune


def small():
    """A conversion that loses much, and inputs; a run takes a tenth of a second."""
    return convert(prepared_of("residual")[2]), torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quick(quantized, data, **options):
    return finetune(quantized, data, **{"epochs": 2, "progress": False, **options})


=======
>>>>>>> 7a43a985727f9515d71dc1dd24efadbe11217675
def divergence(model, quantized, x):
    """Mean KL divergence in nats, by the formula."""
    with torch.no_grad():
        p, q = model(x).double().softmax(1), quantized(x).double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def top1(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def test_two_bits_learn_what_the_float_model_says(caplog):
    model, quantized, (images, _), test = digits_of()
    caplog.set_level(logging.INFO)
    images, before = images[:300], copy.deepcopy(quantized)
    tuned = finetune(quantized, images, epochs=6, batch_size=16, learning_rate=0.03, progress=False)
    assert_same(quantized, before)
    assert top1(quantized, *test) < 0.5
    assert top1(tuned, *test) > 0.75
    assert infoq_fx.allocation_of(tuned).recovered_by == ("finetune",)
    assert infoq_fx.allocation_of(tuned).bits == infoq_fx.allocation_of(quantized).bits
    # The log has the right losses of the held-out samples.
    held = images[4::5]
    epoch, after, first = re.search(r"epoch (\d) is the best: (\S+) nats .* (\S+) before", caplog.text).groups()
    assert float(first) == pytest.approx(divergence(model, quantized, held), rel=1e-2)
    assert float(after) == pytest.approx(divergence(model, tuned, held), rel=1e-2)
    assert int(epoch) > 1
    assert float(after) < float(first) / 2


def test_what_was_finetuned_runs_in_onnxruntime(tmp_path):
    _, x, prepared = prepared_of("norm_first")
    tuned = quick(convert(prepared), x)
    session = onnxruntime.InferenceSession(infoq_fx.export_onnx(tuned, tmp_path / "tuned.onnx"))
    (found,) = session.run(None, {"x": x.numpy()})
    assert float((torch.from_numpy(found) - tuned(x)).abs().max()) < 0.01 * float(tuned(x).std())


def test_the_same_seed_gives_the_same_numbers_with_any_threads(monkeypatch):
    quantized, x = small()
    monkeypatch.setattr(loop, "_RUN_BYTES", 100_000)
    first = quick(quantized, x, seed=1, learning_rate=0.05)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(quick(reload(quantized), x, seed=1, learning_rate=0.05, teacher=prepared_of("residual")[2]), first)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), random_state)
    other = quick(quantized, x, seed=2, learning_rate=0.05)
    assert not torch.equal(other.get_buffer("head.weight_scale"), first.get_buffer("head.weight_scale")) or not (
        torch.equal(other(x), first(x))
    )


def test_the_best_epoch_is_kept_and_nothing_is_made_worse(caplog):
    quantized, x = small()
    for rate in (50.0, 1e30):
        kept = quick(quantized, x, learning_rate=rate)
        assert_same(kept, quantized)
        assert kept is not quantized
        assert infoq_fx.allocation_of(kept) == infoq_fx.allocation_of(quantized)
    assert "the model is not changed" in caplog.text


def test_a_rate_that_does_harm_falls_until_it_helps(caplog):
    quantized, x = small()
    caplog.set_level(logging.INFO)
    tuned = quick(quantized, x, learning_rate=3.0, epochs=12)
    losses = [float(v) for v in re.findall(r"epoch \d+ of 12: (\S+) nats", caplog.text)]
    best, first = (float(v) for v in re.search(r"best: (\S+) nats .* (\S+) before", caplog.text).groups())
    worse = [loss > first for loss in losses]
    assert len(losses) == 12
    assert worse[0]
    assert best == min(losses) < first
    assert sum(worse[6:]) < sum(worse[:6])
    assert infoq_fx.allocation_of(tuned).recovered_by[-1] == "finetune"


@pytest.mark.parametrize(
    ("later", "epochs", "returns"),
    [
        ([0.9, 0.8, 0.7], 20, 0),
        ([1.2, 1.2, 0.9, 1.2, 1.2], 20, 0),  # two bad epochs in a row are accepted, three are not
        ([1.2, 1.2, 1.2], 20, 1),
        ([1.2] * 6, 20, 2),
        ([1.5], 20, 1),  # 1.5 times the first at once
        ([1.2, math.nan, 1.2, 1.2], 20, 1),
        ([1.2, 0.9, 1.02], 8, 2),  # an eighth of 8 epochs is one
        ([1.009] * 8, 8, 0),  # not worse by 1 %
    ],
)
def test_the_best_numbers_are_put_back_where_it_is_no_use_to_go_on(later, epochs, returns):
    assert _count_returns((1.0, *later), epochs) == returns


<<<<<<< HEAD
class Stop:
    """Interrupts a run in a later epoch."""

    def __init__(self, monkeypatch, after):
        measure, self.calls = loop.measure_loss, 0

        def count(*arguments):
            self.calls += 1
            if self.calls > after:
                raise KeyboardInterrupt
            return measure(*arguments)

        monkeypatch.setattr("infoq_fx.finetuning.finetuning.measure_loss", count)


def loader_of(x):
    return DataLoader(TensorDataset(x), batch_size=25, shuffle=True)


@pytest.mark.parametrize("make", [lambda x: x, loader_of], ids=["tensor", "loader"])
def test_a_stopped_run_goes_on_to_the_same_end(make, tmp_path, monkeypatch):
    quantized, x = small()
    path = tmp_path / "checkpoint.pt"
    whole = quick(quantized, make(x), epochs=3)
    with monkeypatch.context() as patch:
        Stop(patch, after=3)  # once before, and the first two epochs
        with pytest.raises(KeyboardInterrupt, match=r"after 2 of 3 epochs; the same call with checkpoint=.* resumes"):
            quick(quantized, make(x), epochs=3, checkpoint=path)
    torch.manual_seed(99)
    counted = Stop(monkeypatch, after=99)
    again = quick(convert(prepared_of("residual")[2]), make(x), epochs=3, checkpoint=path)
    assert counted.calls == 1
    assert_same(again, whole)
    assert_same(quick(quantized, make(x), epochs=3, checkpoint=path), whole)
    assert counted.calls == 1
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_without_a_checkpoint_a_stopped_run_says_what_would_have_helped(monkeypatch):
    quantized, x = small()
    Stop(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt, match="after 0 of 2 epochs; with checkpoint=PATH"):
        quick(quantized, x)


def test_a_checkpoint_of_another_call_is_refused(tmp_path):
    quantized, x = small()
    path = tmp_path / "checkpoint.pt"
    quick(quantized, x, epochs=1, checkpoint=path)
    before = path.read_bytes()
    other = convert(prepared_of("residual")[2], weight_bits=3)
    for data, options, named in (
        (x, {"epochs": 2}, r"differs in: epochs=1 instead of 2; repeat that call"),
        (x, {"learning_rate": 0.1, "seed": 3}, r"learning_rate=0.01 instead of 0.1, seed=0 instead of 3"),
        (x + 1, {}, "differs in: the data"),
        (x, {"teacher": randomise_norms(ResidualNet()).eval()}, "differs in: the float model"),
    ):
        with pytest.raises(OptionError, match=named):
            quick(quantized, data, **{"epochs": 1, "checkpoint": path, **options})
    with pytest.raises(OptionError, match="differs in: the quantized model"):
        quick(other, x, epochs=1, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"text", "cannot read"),
        ({"format": "other"}, "is not a checkpoint of finetune"),
        (None, None),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, message, tmp_path):
    quantized, x = small()
    path = tmp_path / "checkpoint.pt"
    if content is None:
        with pytest.raises(OptionError, match="there is no folder"):
            quick(quantized, x, checkpoint=tmp_path / "nowhere" / "checkpoint.pt")
        return
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(OptionError, match=message):
        quick(quantized, x, checkpoint=path)


=======
>>>>>>> 7a43a985727f9515d71dc1dd24efadbe11217675
def test_a_teacher_may_be_the_model_itself_or_a_prepared_one(caplog):
    model, x, prepared = prepared_of("residual")
    read = reload(convert(prepared))
    with pytest.raises(OptionError, match=r"the float model is not known: .* give teacher=model"):
        quick(read, x)
    with pytest.raises(OptionError, match="teacher is a int; give the float"):
        quick(read, x, teacher=3)
    with pytest.raises(OptionError, match=r"the teacher's output for \d samples has shape .*, the quantized model's"):
        quick(read, x, teacher=nn.Flatten())
    model.train()
    rate = {"learning_rate": 0.05}
    ours, theirs = quick(read, x, teacher=prepared, **rate), quick(read, x, teacher=model, **rate)
    assert model.training
    model.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05)
    changed = dataclasses.replace(prepared_of("norm_first")[2], origin=prepared)
    assert_same(quick(read, x, teacher=changed, **rate), ours)
    assert divergence(model, ours, x) < divergence(model, read, x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, left, right):
        return {"logits": self.head((self.a(left) + self.b(right)).relu()), "hidden": self.b(right)}


def test_inputs_go_by_name_or_in_order():
    model = TwoInputs().eval()
    left, right = torch.randn(60, 6), torch.randn(60, 4)
    prepared = infoq_fx.prepare(model, {"left": left, "right": right}, bits=(2, 8))
    read = reload(convert(prepared))
    by_name = quick(read, {"right": right, "left": left}, teacher=model)
    in_order = quick(read, [((left, right), None)], teacher=model)
    assert_same(by_name, in_order)
    assert not torch.equal(by_name.get_buffer("a.weight_scale"), read.get_buffer("a.weight_scale")) or not torch.equal(
        by_name(left, right)["logits"], read(left, right)["logits"]
    )


class PerPixel(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, outputs, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize(
    ("build", "data", "is_fixed"),
    [
        (PerPixel, Tensor.clone, True),
        (PerPixel, loader_of, True),
        (PerPixel, Tensor.clone, False),
        (Regression, Tensor.clone, False),
    ],
    ids=["fixed batch", "fixed batch, loader", "pixels", "a single number"],
)
def test_other_kinds_of_models_learn_too(build, data, is_fixed, caplog):
    model, x = build(), torch.randn(400 if build is Regression else 100, 1, 8, 8)
    program = torch.export.export(model.eval(), (x[:4],)) if is_fixed else model
    quantized = convert(infoq_fx.prepare(program, x, bits=(2, 8)))
    caplog.set_level(logging.INFO)
    tuned = quick(quantized, data(x), epochs=20 if build is Regression else 6)
    first, after = (float(v) for v in re.search(r"best: (\S+) nats .* (\S+) before", caplog.text).groups()[::-1])
    assert after < first
    # By formulas of its own on all samples: for a single number the squared error, for pixels their mean divergence.
    with torch.no_grad():
        found = [torch.cat([m(part) for part in x.split(4)]) for m in (model, quantized, tuned)]
    if isinstance(model, Regression):
        before, now = ((found[0] - y).square().mean() for y in found[1:])
    else:
        p = found[0].softmax(1)
        before, now = ((p * (p.log() - y.log_softmax(1))).sum(1).mean() for y in found[1:])
    assert now < before


def test_labels_teach_where_they_are_asked_for():
    _, quantized, (images, labels), test = digits_of()
    read, options = reload(quantized), {"epochs": 3, "batch_size": 16, "learning_rate": 0.05}
    alone = quick(read, (images[:200], labels[:200]), label_weight=1, **options)
    mixed = quick(quantized, (images[:200], labels[:200]), label_weight=0.5, **options)
    wrong = quick(read, (images[:200], (labels[:200] + 1) % 10), label_weight=1, **options)
    before, *after = (top1(m, *test) for m in (quantized, alone, mixed, wrong))
    assert min(after[:2]) > before + 0.2
    assert after[2] < after[0] - 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"temperature": 0.0},
        {"label_weight": -0.1},
        {"label_weight": 1.5},
        {"label_weight": True},
    ],
)
def test_options_out_of_range_are_refused(options, residual):
    name, value = next(iter(options.items()))
    with pytest.raises(OptionError, match=f"{name}={value!r}; give"):
        quick(residual, IMAGES, **options)


def test_only_a_quantized_module_is_finetuned():
    with pytest.raises(OptionError, match="pass what quantize"):
        quick(nn.Linear(2, 2), IMAGES)


def test_a_bar_shows_where_it_is(capsys):
    quantized, x = small()
    quick(quantized, x, progress=True)
    assert "4/4" in capsys.readouterr().err
    quick(quantized, x)
    assert capsys.readouterr().err == ""
