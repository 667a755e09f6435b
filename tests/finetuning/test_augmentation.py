"""Augmented inputs are crops and mixes of the images, the same for a seed, and the float model is asked about them."""

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.errors import OptionError
from infoq_fx.finetuning import augmentation
from infoq_fx.finetuning.augmentation import augment_images, find_augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_values_stay_within_those_of_the_batch_and_shapes_are_kept():
    images, ids = torch.rand(64, 3, 20, 14), torch.arange(64)
    found = augment_images({"x": images, "id": ids}, generator())
    assert found["x"].shape == images.shape
    assert found["x"].dtype == images.dtype
    assert torch.equal(found["id"], ids)
    assert float(found["x"].min()) >= float(images.min()) - 1e-6
    assert float(found["x"].max()) <= float(images.max()) + 1e-6
    assert torch.equal(found["x"], augment_images({"x": images}, generator())["x"])
    assert not torch.equal(found["x"], augment_images({"x": images}, generator(1))["x"])


def test_crops_of_a_ramp_are_parts_of_it_of_a_quarter_or_more(monkeypatch):
    monkeypatch.setattr(augmentation, "_MIXED", 0.0)
    monkeypatch.setattr(augmentation, "_PASTED", 0.0)
    ramp = torch.linspace(0, 1, 64)[None, None, None, :].expand(400, 1, 64, 64)
    found = augment_images({"x": ramp}, generator())["x"][:, 0, 32]
    slopes = found[:, 48] - found[:, 16]  # half of the crop's width
    whole = float(ramp[0, 0, 0, 48] - ramp[0, 0, 0, 16])
    assert 0.4 * whole < float(slopes.abs().min()) < 0.6 * whole
    assert float(slopes.abs().max()) <= 1.001 * whole
    assert 0.4 < float((slopes < 0).float().mean()) < 0.6  # mirrored


def test_a_third_is_mixed_and_a_third_has_a_patch_of_another():
    images = torch.arange(900.0)[:, None, None, None].expand(900, 1, 16, 16)
    found = augment_images({"x": images}, generator())["x"]
    kinds = torch.tensor([len(image.unique()) for image in (found * 8).round()])
    is_own = (found - images).abs().amax((1, 2, 3)) < 1e-2
    assert 0.25 < float((kinds > 1).float().mean()) < 0.4  # of two images
    assert 0.25 < float(((kinds == 1) & ~is_own).float().mean()) < 0.4
    assert 0.25 < float(is_own.float().mean()) < 0.45


def test_two_images_of_a_sample_are_changed_alike():
    images = torch.rand(8, 3, 16, 16)
    found = augment_images({"left": images, "right": images + 1}, generator())
    torch.testing.assert_close(found["left"] + 1, found["right"])


@pytest.mark.parametrize(
    ("augment", "label_weight", "message"),
    [("pictures", 0.0, "'images'"), (3, 0.0, "'images'"), ("images", 0.5, "label_weight")],
)
def test_other_options_are_refused(augment, label_weight, message):
    with pytest.raises(OptionError, match=message):
        find_augment(augment, label_weight)


def test_tokens_are_no_images():
    with pytest.raises(OptionError, match="tokens"):
        augment_images({"tokens": torch.zeros(4, 12, dtype=torch.long)}, generator())


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    images = torch.randn(160, 1, 8, 8)
    quantized = infoq_fx.quantize(model, 2.0, calibration_data=images, bits=(2,), recovery="none", progress=False)
    return quantized, images


def test_the_float_model_answers_for_the_augmented_inputs(case):
    quantized, images = case
    seen = []

    def negate(inputs, generator):
        seen.append(float(torch.rand((), generator=generator)))
        return {name: -x for name, x in inputs.items()}

    before = {name: x.clone() for name, x in quantized.state_dict().items()}
    found = infoq_fx.finetune(quantized, images, epochs=4, augment=negate, progress=False)
    assert len(set(seen)) > 4  # the generator goes on within an epoch
    with torch.no_grad():
        reference, held = quantized_origin(quantized)(images[4::5]), images[4::5]
        lost = [float((module(held) - reference).square().mean()) for module in (quantized, found)]
    assert lost[1] < lost[0]
    assert all(torch.equal(x, before[name]) for name, x in quantized.state_dict().items())
    again = infoq_fx.finetune(quantized, images, epochs=4, augment=negate, progress=False)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in found.state_dict().items())


def test_augmented_inputs_that_are_not_finite_are_refused(case):
    def spoil(inputs, generator):
        return {name: x / 0 for name, x in inputs.items()}

    with pytest.raises(OptionError, match="augment returned NaN or infinity for input"):
        infoq_fx.finetune(*case, epochs=1, augment=spoil, progress=False)


def quantized_origin(quantized):
    from infoq_fx.conversion.quantized import provenance_of
    from infoq_fx.finetuning.trainable import float_copy

    return float_copy(provenance_of(quantized).prepared)


def test_another_form_is_refused(case):
    quantized, images = case
    with pytest.raises(OptionError, match="augment returned inputs of another form"):
        infoq_fx.finetune(quantized, images, epochs=1, augment=lambda inputs, _: {"y": images}, progress=False)
