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
from infoq_fx.finetuning import finetuning
from infoq_fx.finetuning.finetuning import _count_returns, finetune
from infoq_fx.types import Allocation


@functools.cache
def digits_of():
    """A trained network, images, labels and a conversion to 2 bits that loses nearly everything."""
    (images, labels), (test_images, test_labels) = digits()
    model = train_digits_net(images, labels, epochs=2)
    prepared = infoq_fx.prepare(model, images[:256], bits=(2, 8), levels="uniform")
    bits = {site.name: 2 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    return model, infoq_fx.convert(prepared, Allocation(bits=bits)), (images, labels), (test_images, test_labels)


def divergence(model, quantized, x):
    """Mean KL divergence in nats, by the formula."""
    with torch.no_grad():
        p, q = model(x).double().softmax(1), quantized(x).double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def top1(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_was_finetuned_runs_in_onnxruntime(tmp_path):
    _, x, prepared = prepared_of("norm_first")
    tuned = quick(convert(prepared), x)
    session = onnxruntime.InferenceSession(infoq_fx.export_onnx(tuned, tmp_path / "tuned.onnx"))
    (found,) = session.run(None, {"x": x.numpy()})
    assert float((torch.from_numpy(found) - tuned(x)).abs().max()) < 0.01 * float(tuned(x).std())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_with_any_threads():
    quantized, x = small()
    limited = functools.partial(quick, memory_limit=200_000)
    first = limited(quantized, x, seed=1, learning_rate=0.05)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(
            limited(reload(quantized), x, seed=1, learning_rate=0.05, teacher=prepared_of("residual")[2]), first
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), random_state)
    other = limited(quantized, x, seed=2, learning_rate=0.05)
    assert not torch.equal(other.get_buffer("head.weight_scale"), first.get_buffer("head.weight_scale")) or not (
        torch.equal(other(x), first(x))
    )


def test_the_best_epoch_is_kept_and_nothing_is_made_worse(caplog):
    quantized, x = small()
    caplog.set_level(logging.INFO)
    for rate in (50.0, 1e4):
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
    assert sum(losses[6:]) < sum(losses[:6])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_labels_teach_where_they_are_asked_for():
    _, quantized, (images, labels), test = digits_of()
    read, options = reload(quantized), {"epochs": 3, "batch_size": 16, "learning_rate": 0.05}
    alone = quick(read, (images[:200], labels[:200]), label_weight=1, **options)
    mixed = quick(quantized, (images[:200], labels[:200]), label_weight=0.5, **options)
    wrong = quick(read, (images[:200], (labels[:200] + 1) % 10), label_weight=1, **options)
    before, *after = (top1(m, *test) for m in (quantized, alone, mixed, wrong))
    assert min(after[:2]) > before + 0.2
    assert after[2] < after[0] - 0.2


def test_a_memory_limit_changes_no_more_than_the_order_of_sums(residual, monkeypatch):
    sizes, gradients = [], []
    compute = finetuning.compute_gradients

    def record(training, batch, spread):
        sizes.append(training.run_size)
        gradients.append(compute(training, batch, spread))
        return [gradient.clone() for gradient in gradients[-1]]

    monkeypatch.setattr(finetuning, "compute_gradients", record)
    for limit in (None, 1):
        quick(residual, IMAGES, epochs=1, memory_limit=limit)
    half = len(sizes) // 2
    assert sizes[0] > 1
    assert sizes[half] == 1
    for whole, in_parts in zip(gradients[0], gradients[half], strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-6)
    with pytest.raises(OptionError, match="memory_limit=0"):
        quick(residual, IMAGES, memory_limit=0)


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
