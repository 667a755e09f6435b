"""Gradients, updates and averages."""

import math

import pytest
import torch
from finetuned import convert, open_numbers, prepared_of
from torch.nn import functional

from infoq_fx.core.readings import Categorical, OutputLoss
from infoq_fx.finetuning import training_loop as loop
from infoq_fx.finetuning.retraining import to_trainable
from infoq_fx.finetuning.trainable import LearnedStepQuantizer
from infoq_fx.finetuning.training_data import Samples


def make_training(student, source, settings, run_size, ask=None):
    """A training against the classes of a single output."""
    loss = OutputLoss((Categorical(),), (None,))
    learned = loop.list_learned(student, 1.0)
    return loop.Training(student, learned, source, settings, ask, loss, (0,), 0, torch.device("cpu"), run_size)


def training_of(student, settings, steps=8):
    source = open_numbers(40)
    source = type(source)(**{**vars(source), "steps": steps})
    return make_training(student, source, settings, run_size=8)


def test_updates_are_adams(residual):
    student, other = to_trainable(residual), to_trainable(residual)
    training = training_of(student, loop.Settings(1, 1.0, 32, 0.0, 0), steps=8)
    ones = [loop.Learned(o.parameter, torch.tensor(0.01), o.is_step) for o in training.learned]
    training = type(training)(**{**vars(training), "learned": ones})
    ours = loop.begin_optimizer(training.learned)
    adam = torch.optim.Adam(other.parameters(), lr=1.0, betas=(0.9, 0.99), eps=1e-12)
    generator = torch.Generator().manual_seed(0)
    for done in range(8):
        adam.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * done / 8)) / 2
        gradients = [1e-4 * torch.randn(p.shape, generator=generator) for p in student.parameters()]
        for parameter, gradient in zip(other.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        adam.step()
        with torch.no_grad():
            loop.update(training, ours, gradients, done)
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_large_gradients_are_clipped_by_norm_those_of_steps_apart(residual):
    moved = []
    for factor in (1e6, 1.0, 1e-6):
        training = training_of(to_trainable(residual), loop.Settings(1, 1.0, 32, 0.0, 0))
        optimizer = loop.begin_optimizer(training.learned)
        gradients = [torch.full_like(o.parameter, factor if o.is_step else 10.0) for o in training.learned]
        with torch.no_grad():
            loop.update(training, optimizer, [gradient.clone() for gradient in gradients], 0)
        means = [optimizer.adam.state[unit]["exp_avg"] for unit in optimizer.units]
        for is_step in (True, False):
            chosen = [i for i, learned in enumerate(training.learned) if learned.is_step == is_step]
            before, after = (
                float(torch.cat([found[i].flatten() for i in chosen]).norm()) for found in (gradients, means)
            )
            assert after == pytest.approx(0.1 * min(1.0, before), rel=1e-4)
        moved.append(training.student.get_parameter("head.weight").detach().clone())
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])


def test_reaches_are_in_units_that_suit_a_parameter():
    student = to_trainable(convert(prepared_of("norm_first")[2]))
    named = {name: o for (name, _), o in zip(student.named_parameters(), loop.list_learned(student, 0.1), strict=True)}
    steps = {f"{name}.scale": m for name, m in student.named_modules() if isinstance(m, LearnedStepQuantizer)}
    for name, learned in named.items():
        is_levels = name.endswith(".levels")
        assert learned.is_step == (name in steps or is_levels)
        if is_levels:
            assert float(learned.reach) == pytest.approx(0.1 * 0.05)
        elif learned.is_step:
            torch.testing.assert_close(learned.reach, 0.005 * steps[name].scale.detach().abs())
    weight = named["conv.weight"]
    quantizer = steps["quantizers.conv.weight.quantizer.scale"]
    rms = float(weight.parameter.detach().square().mean().sqrt())
    gaps = quantizer.level_unit * quantizer.qparams().scale  # about between neighbouring levels
    assert weight.reach.flatten().tolist() == pytest.approx([0.1 * min(abs(float(s)), rms) for s in gaps])
    norm = named["norm.weight"]
    assert float(norm.reach) == pytest.approx(0.03 * float(norm.parameter.detach().abs().mean()))


def test_averages_look_back_over_an_epoch(residual):
    training = training_of(to_trainable(residual), loop.Settings(3, 0.1, 32, 0.0, 0), steps=4)
    optimizer = loop.begin_optimizer(training.learned)
    index = max(range(len(training.learned)), key=lambda i: training.learned[i].parameter.numel())
    generator, expected = torch.Generator().manual_seed(0), torch.zeros(())
    for done in range(12):
        gradients = [torch.randn(o.parameter.shape, generator=generator) for o in training.learned]
        with torch.no_grad():
            loop.update(training, optimizer, gradients, done)
        now = training.learned[index].parameter.detach().clone()
        share = 1 / (done + 1) if done < 4 else 1 / 4  # of the first epoch the plain mean
        expected = (1 - share) * expected + share * now
        torch.testing.assert_close(optimizer.average[index], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(now, expected, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_the_mean_loss_in_parts_or_not(residual, temperature):
    student = to_trainable(residual)
    source = open_numbers(40)
    x = torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        reference = prepared_of("residual")[0](x)
    batch = Samples({"x": x}, torch.arange(20) % 5, (reference,))
    settings = loop.Settings(1, 1.0, 32, 0.25, 0, temperature)
    found = []
    for size in (20, 6):
        training = make_training(student, source, settings, size, ask=lambda samples: samples.reference)
        found.append(loop.compute_gradients(training, batch, map))
    out = student(x)
    logs, shares = (out / temperature).log_softmax(1), (reference / temperature).softmax(1)
    loss = 0.75 * temperature**2 * functional.kl_div(logs, shares, reduction="batchmean")
    loss = loss + 0.25 * functional.cross_entropy(out, batch.labels)
    for a, b, c in zip(*found, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-3, atol=1e-5)
