import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal, kl_divergence

from infoq_fx.core import readings
from infoq_fx.core.readings import (
    Bernoulli,
    Categorical,
    Ignored,
    OutputLoss,
    Quantity,
    check_metric,
    decode_reading,
    describe_reading,
    draw_log_likelihood,
    measure_cross_entropy,
    measure_metric,
    measure_nats,
)
from infoq_fx.errors import OptionError

SHAPES = [((5, 7), 1), ((5, 7, 3), 1), ((5, 3, 7), 2), ((5, 7, 2, 3), 1)]


def pair(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 for _ in range(2))


def averaged(nats, axis, *, summed):
    nats = nats.sum(axis) if summed else nats
    return nats.reshape(len(nats), -1).mean(1)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("form", ["logits", "log_probabilities", "probabilities"])
def test_classes_are_compared_at_every_position(shape, axis, form):
    p, q = pair(shape)
    wanted = kl_divergence(*(TorchCategorical(logits=x.double().movedim(axis, -1)) for x in (p, q)))
    given_form = {
        "logits": lambda x: x,
        "log_probabilities": lambda x: x.log_softmax(axis),
        "probabilities": lambda x: x.softmax(axis),
    }
    found = measure_nats(Categorical(axis=axis, form=form), *(given_form[form](x) for x in (p, q)))
    torch.testing.assert_close(found, averaged(wanted, 0, summed=False), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_independent_values_are_summed_at_every_position(shape, axis, form):
    p, q = pair(shape)
    wanted = kl_divergence(*(TorchBernoulli(logits=x.double()) for x in (p, q)))
    found = measure_nats(
        Bernoulli(axis=axis, form=form), *(x if form == "logits" else x.double().sigmoid() for x in (p, q))
    )
    torch.testing.assert_close(found, averaged(wanted, axis, summed=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_quantities_are_gaussians_of_the_channels_variance(shape, axis):
    p, q = pair(shape)
    variance = torch.rand(shape[axis], dtype=torch.float64) + 0.5
    view = [-1 if i == axis else 1 for i in range(len(shape))]
    wanted = kl_divergence(*(Normal(x.double(), variance.sqrt().view(view)) for x in (p, q)))
    found = measure_nats(Quantity(axis=axis), p, q, variance)
    torch.testing.assert_close(found, averaged(wanted, axis, summed=True))


def test_what_a_softmax_does_not_see_counts_in_a_quantity():
    values = torch.randn(6, 4)
    assert float(measure_nats(Categorical(), values, values + 100).max()) == pytest.approx(0, abs=1e-9)
    assert float(measure_nats(Quantity(), values, values + 100, torch.ones(4)).min()) == pytest.approx(20_000)


def test_pixels_that_change_class_are_not_averaged_away():
    # Half of the pixels change class one way and half the other way: the mean of the logits over pixels stays.
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 0, 0], logits[:, 1, 1] = 4.0, 4.0
    assert float(measure_nats(Categorical(axis=1), logits, logits.flip(2))) > 1


def test_infinite_logits_of_masks_are_no_probability():
    p, q = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[0.5, 1.0, -math.inf]])
    wanted = kl_divergence(TorchCategorical(logits=p[:, :2].double()), TorchCategorical(logits=q[:, :2].double()))
    torch.testing.assert_close(measure_nats(Categorical(), p, q), wanted)


def test_a_temperature_divides_the_logits_and_multiplies_the_loss():
    p, q = pair((4, 5))
    wanted = 4.0 * measure_nats(Categorical(), p / 2, q / 2)
    torch.testing.assert_close(measure_nats(Categorical(), p, q, temperature=2.0), wanted)


def test_a_constant_channel_counts_little():
    p, q = torch.zeros(8, 2), torch.zeros(8, 2)
    p[:, 1] = torch.randn(8)
    q[:, 1], q[:, 0] = p[:, 1], 0.01
    assert float(measure_nats(Quantity(), p, q, p.double().var(0, correction=0)).max()) < 1


def test_the_loss_is_the_weighted_sum_over_the_outputs_that_are_read():
    outputs, others = ([torch.randn(5, 3), torch.randn(5, 2, 4), torch.randn(5, 9)] for _ in range(2))
    readings = Categorical(weight=2.0), Quantity(axis=1, weight=0.5), Ignored()
    variances = (None, torch.ones(2), None)
    loss = OutputLoss(readings, variances)
    parts = [measure_nats(r, p, q, v) for r, p, q, v in zip(readings, outputs, others, variances, strict=True)]
    torch.testing.assert_close(loss(outputs, others), 2 * parts[0] + 0.5 * parts[1])


def test_a_function_takes_the_place_of_all_readings():
    loss = OutputLoss((Quantity(),), (None,), lambda reference, found: (reference[0] - found[0]).abs().sum(1))
    torch.testing.assert_close(
        loss([torch.ones(2, 3)], [torch.zeros(2, 3)]), torch.full((2,), 3.0, dtype=torch.float64)
    )


@given(st.integers(0, 10_000), st.sampled_from([Categorical(), Bernoulli(), Quantity()]))
def test_nats_are_zero_for_equal_outputs_and_positive_for_others(seed, reading):
    p, q = pair((3, 4), seed)
    assert float(measure_nats(reading, p, p, torch.ones(4)).abs().max()) < 1e-12
    assert float(measure_nats(reading, p, q, torch.ones(4)).min()) > 0


def test_cross_entropy_leaves_out_unlabelled_positions():
    output, labels = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2, -1], [2, 2, -1, -1]])
    log_p = output.log_softmax(1)
    wanted = [-(log_p[0, 0, 0] + log_p[0, 1, 1] + log_p[0, 2, 2]) / 3, -(log_p[1, 2, 0] + log_p[1, 2, 1]) / 2]
    torch.testing.assert_close(measure_cross_entropy(Categorical(axis=1), output, labels), torch.stack(wanted))


@pytest.mark.parametrize("reading", [Categorical(), Bernoulli(), Quantity()], ids=lambda r: type(r).__name__)
def test_squared_gradients_of_drawn_likelihoods_are_the_fisher_information(reading):
    value = torch.tensor([[0.3, -0.8, 1.1]])
    variance = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    generator, total, draws = torch.Generator().manual_seed(0), torch.zeros(3), 20_000
    rows = value.repeat(draws, 1).requires_grad_()
    draw_log_likelihood(reading, rows, variance, generator).backward()
    total = rows.grad.square().mean(0)
    p = value.softmax(1)[0] if isinstance(reading, Categorical) else value.sigmoid()[0]
    wanted = 1 / variance.float() if isinstance(reading, Quantity) else p * (1 - p)
    torch.testing.assert_close(total, wanted, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    "reading", [Categorical(axis=2, form="probabilities"), Bernoulli(weight=0.5), Quantity(), Ignored()], ids=str
)
def test_a_reading_survives_its_description(reading):
    assert decode_reading(describe_reading(reading)) == reading


def test_a_description_of_nothing_is_refused():
    with pytest.raises(OptionError, match="describes no reading"):
        decode_reading({"kind": "colour"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantity(weight=-1.0),
        lambda: Quantity(weight=math.nan),
        lambda: Categorical(form="odds"),
        lambda: Bernoulli(form="log_probabilities"),
        lambda: Categorical(axis="1"),
        lambda: Quantity(axis=1.5),
    ],
)
def test_what_is_no_reading_is_refused(make):
    with pytest.raises(OptionError, match="of a reading; give"):
        make()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, q: 0.0, "gives float for 3 samples; return a tensor"),
        (lambda p, q: p[0], r"gives \[3, 4\] for 3 samples; return"),
        (lambda p: p[0], "fails with TypeError"),
        (lambda p, q: -(p[0] - q[0]).square().sum(1), "return nats of 0 or more"),
    ],
)
def test_functions_that_give_no_nats_are_refused(function, message):
    loss = OutputLoss((Quantity(),), (None,), function)
    with pytest.raises(OptionError, match=message):
        loss([torch.zeros(3, 4)], [torch.ones(3, 4)])


def test_rounding_below_zero_is_taken_and_nan_is_not():
    p, q = [torch.zeros(3, 4)], [torch.ones(3, 4)]
    tiny = OutputLoss((Quantity(),), (None,), lambda a, b: torch.full((3,), -1e-7))
    assert torch.equal(tiny(p, q), torch.full((3,), -1e-7).double())
    with pytest.raises(OptionError, match="return nats of 0 or more"):
        OutputLoss((Quantity(),), (None,), lambda a, b: torch.full((3,), math.nan))(p, q)


@pytest.mark.parametrize("found", [None, "high", torch.ones(2), [1.0]])
def test_a_metric_gives_one_number(found):
    def accuracy(outputs, labels):
        return found

    with pytest.raises(OptionError, match=r"the metric accuracy returned .*; give a function that returns one number"):
        measure_metric(accuracy, None, None)
    assert measure_metric(lambda outputs, labels: torch.tensor(0.5), None, None) == 0.5
    with pytest.raises(OptionError, match="metric='map'; give a function"):
        check_metric("map")


@pytest.mark.parametrize("reading", [Categorical(axis=2), Bernoulli(axis=2), Quantity(axis=2)])
def test_parts_of_the_samples_have_the_nats_of_the_whole(reading, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 7, 5, 9, generator=draw)
    loss = OutputLoss((reading,), (None,))
    whole = loss([p], [q])
    assert readings.split_samples([p]) == [slice(0, 7)]
    monkeypatch.setattr(readings, "_VALUES_AT_ONCE", 100)
    assert readings.split_samples([p]) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert readings.split_samples([torch.zeros(2, 300), torch.zeros(2)]) == [slice(0, 1), slice(1, 2)]
    assert torch.equal(loss([p], [q]), whole)
