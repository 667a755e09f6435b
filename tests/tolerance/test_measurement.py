"""What is measured on validation samples, against references computed here from the two models' outputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.core.readings import Categorical
from infoq_fx.tolerance.measurement import Validation, jackknife_error, measure_loss


class Upscaler(nn.Module):
    """A small image, and one of twice the size, with a missing value beside them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        small = self.second(self.first(x).relu())
        return {"aux": None, "small": small * 1.0, "image": nn.functional.pixel_shuffle(small, 2)}


def build(model, images, **options):
    prepared = infoq_fx.prepare(model, images, bits=(3, 8), **options)
    allocation = infoq_fx.Allocation(bits={site.name: site.bits[0] for site in prepared.inventory.sites})
    return prepared, infoq_fx.convert(prepared, allocation)


def measure(prepared, quantized, data, metric=None, **tolerance):
    held = read_data(data).named(prepared.input_names)
    return measure_loss(Validation(prepared, held, infoq_fx.Tolerance(**tolerance), metric), quantized)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(5)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(150, 1, 8, 8)
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)
        labels = model(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % 5
    prepared, quantized = build(model, (images, labels))
    with torch.no_grad():
        outputs = model(images), quantized(images)
    return prepared, quantized, (images, labels), outputs


def test_top1_is_in_points_with_the_error_of_the_paired_differences(classifier):
    prepared, quantized, (images, labels), outputs = classifier
    found = measure(prepared, quantized, (images, labels), drop=1.0)
    before, after = ((x.argmax(1) == labels).double().numpy() for x in outputs)
    assert found.value == pytest.approx(100 * (before.mean() - after.mean())) != 0
    assert found.standard_error == pytest.approx(100 * np.std(before - after, ddof=1) / math.sqrt(150))
    # The error of two separate accuracies would be larger.
    assert found.standard_error < 100 * math.hypot(before.std(), after.std()) / math.sqrt(150)
    assert (found.samples, found.metric, found.measure, found.limit) == (150, "top-1", "drop", 1.0)
    assert found.passes == (found.value <= 1.0)


def test_nats_are_the_divergence_from_the_float_model(classifier):
    prepared, quantized, (images, _), outputs = classifier
    found = measure(prepared, quantized, images, nats=1.0)
    log_p, log_q = (x.double().log_softmax(1) for x in outputs)
    each = (log_p.exp() * (log_p - log_q)).sum(1).numpy()
    assert found.value == pytest.approx(each.mean(), rel=1e-5)
    assert found.standard_error == pytest.approx(each.std(ddof=1) / math.sqrt(150), rel=1e-5)


def test_a_metric_of_ones_own_has_the_error_of_the_same_samples(classifier):
    prepared, quantized, data, _ = classifier

    def share(outputs, labels):
        return float((outputs.argmax(1) == labels).double().mean())

    own = measure(prepared, quantized, data, share, drop=0.01)
    top1 = measure(prepared, quantized, data, drop=1.0)
    assert own.value == pytest.approx(top1.value / 100)
    assert own.standard_error == pytest.approx(top1.standard_error / 100, rel=0.4)
    assert own.metric == "share"
    assert "of share" in str(own)


def test_a_metric_may_fail_for_a_part_of_the_samples_or_be_no_number(classifier):
    prepared, quantized, data, _ = classifier

    def only_whole(outputs, labels):
        if len(labels) != 150:
            raise ValueError("not all samples")
        return float(outputs.mean())

    found = measure(prepared, quantized, data, only_whole, drop=1.0)
    assert found.standard_error is None
    assert "±" not in str(found)
    values = iter([1.0] * 11 + [math.nan] * 11)
    lost = measure(prepared, quantized, data, lambda outputs, labels: next(values), drop=1.0)
    assert not lost.passes
    with pytest.raises(infoq_fx.OptionError, match="of the float model is nan; give one"):
        measure(prepared, quantized, data, lambda outputs, labels: math.nan, drop=1.0)


def test_labels_that_are_left_out_do_not_count():
    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        torch.randn(40, 1, 6, 6),
    )
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:, :3] = -1
    prepared, quantized = build(model.eval(), [(images, labels)], outputs=Categorical())
    found = measure(prepared, quantized, [(images, labels)], drop=1.0)
    with torch.no_grad():
        right = (quantized(images).argmax(1) == labels)[:, 3:].double()
    assert found.value == pytest.approx(100 - 100 * float(right.mean()))


@pytest.fixture(scope="module")
def upscaler():
    torch.manual_seed(0)
    model, images = Upscaler().eval(), torch.randn(90, 1, 6, 6)
    prepared, quantized = build(model, images)
    with torch.no_grad():
        return prepared, quantized, images, model(images), quantized(images)


def test_sqnr_is_that_of_the_worst_output_and_its_error_that_of_the_bootstrap(upscaler):
    prepared, quantized, images, wanted, found = upscaler
    measured = measure(prepared, quantized, images, sqnr_db=10.0)

    def sqnr(rows, name):
        x, y = wanted[name][rows].double(), found[name][rows].double()
        return 10 * math.log10(float(x.square().sum() / (x - y).square().sum()))

    every = torch.arange(90)
    name = min(("small", "image"), key=lambda name: sqnr(every, name))
    assert measured.value == pytest.approx(sqnr(every, name), abs=1e-3)
    drawn = [sqnr(torch.randint(90, (90,)), name) for _ in range(600)]
    assert measured.standard_error == pytest.approx(np.std(drawn), rel=0.2)
    assert measured.passes
    assert "has an SQNR of" in str(measured)


def test_a_metric_sees_the_structure_and_all_samples(upscaler):
    prepared, quantized, images, wanted, found = upscaler
    sizes = []

    def negative_error(outputs, labels):
        assert outputs["aux"] is None
        assert labels is None
        sizes.append(len(outputs["image"]))
        return -float(outputs["image"].abs().mean())

    value = measure(prepared, quantized, images, negative_error, drop=0.1).value
    assert value == pytest.approx(float(found["image"].abs().mean() - wanted["image"].abs().mean()), abs=1e-5)
    assert sizes[0] == 90
    assert sizes[1:11] == [81] * 10


def test_outputs_too_large_to_be_held_are_refused(upscaler):
    prepared, quantized, images, *_ = upscaler
    held = read_data(images).named(prepared.input_names)
    validation = Validation(prepared, held, infoq_fx.Tolerance(drop=0.1), lambda outputs, labels: 0.0, 4096)
    with pytest.raises(infoq_fx.CalibrationDataError, match="needs all of them at once"):
        measure_loss(validation, quantized)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=40))
def test_the_jackknife_of_a_mean_is_its_standard_error(values):
    count, total = len(values), math.fsum(values)
    parts = [(total - value) / (count - 1) for value in values]
    assert jackknife_error(parts) == pytest.approx(np.std(values, ddof=1) / math.sqrt(count), abs=1e-9)


def test_the_jackknife_says_when_there_is_no_error():
    assert jackknife_error([]) is None
    assert jackknife_error([1.0, math.nan]) is None
