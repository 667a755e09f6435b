"""Models without classes: metric, nats and SQNR of every output, in the audit, in checks of files and on the page."""

import math

import pytest
import torch
from torch import nn

import infoq_fx


class Upscaler(nn.Module):
    """An image of twice the size, with a name and a missing value beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        image = nn.functional.pixel_shuffle(self.second(self.first(x).relu()), 2)
        return {"aux": None, "image": image, "kind": "x2"}


def psnr(outputs, labels):
    assert outputs["aux"] is None
    assert outputs["kind"] == "x2"
    assert outputs["image"].shape == labels.shape
    return 10 * math.log10(float(labels.square().mean() / (outputs["image"] - labels).square().mean()))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, images = Upscaler().eval(), torch.randn(96, 1, 6, 6)
    with torch.no_grad():
        targets = model(images)["image"]
    return model, images, targets + 0.05 * torch.randn_like(targets)


@pytest.fixture(scope="module")
def found(case):
    model, images, targets = case
    return infoq_fx.audit(
        model, (images, targets), ["infoq", "weight_mse"], [4.0, 3.0], bits=(2, 3, 4, 8), metric=psnr, progress=False
    )


def test_the_audit_measures_the_metric_nats_and_sqnr(case, found):
    model, images, targets = case
    assert math.isnan(found.float_top1)
    with torch.no_grad():
        assert found.float_metric == pytest.approx(psnr({**model(images[1::2])}, targets[1::2]), abs=1e-4)
    for row in found.rows:
        for budget in found.budgets:
            assert row.top1(budget) is None
            assert row.lost_nats(budget).value > 0
            assert set(row.sqnr_db[budget]) == {"image"}
            # All noise that there is comes from the targets and from quantization.
            power, noise = (10 ** (-x / 10) for x in (row.sqnr_db[budget]["image"], found.float_metric))
            assert row.metrics[budget] == pytest.approx(-10 * math.log10(power + noise), abs=0.5)
        assert row.sqnr_db[found.budgets[0]]["image"] > row.sqnr_db[found.budgets[1]]["image"]
    best = min(found.rows, key=lambda row: row.lost_nats(found.budgets[1]).value)
    assert found.recommended.lost_nats(found.budgets[1]).value <= best.lost_nats(found.budgets[1]).value * 1.5
    text = str(found)
    assert "no classes on 48 samples" in text
    assert "SQNR of 'image', dB" in text
    assert "\npsnr " in text


def test_the_page_shows_it(found, tmp_path):
    from infoq_fx.report.document import build_document

    table = found.tables["infoq"]
    document = build_document(table, shown={}, audit=found, accuracies={}, budgets=5, alpha=1.0, pin=None)
    assert document["accuracy_name"] == document["metric_name"] == "psnr"
    assert document["float_accuracy"] == found.float_metric
    row = next(row for row in found.rows if row.name == "infoq")
    shown = next(one for one in document["measured"] if one["label"] == "infoq")
    budget = shown["budget"]
    assert shown["accuracy"] == shown["metric"] == row.metrics[budget]
    assert shown["nats"] == row.lost_nats(budget).value
    assert shown["sqnr_db"] == row.sqnr_db[budget]["image"]
    assert document["measured_note"].startswith("Psnr on 48 samples")


@pytest.mark.slow
def test_verification_measures_it_for_module_and_file(case, tmp_path):
    model, images, targets = case
    quantized = infoq_fx.quantize(model, 4.0, calibration_data=images, recovery="none", refine=False, progress=False)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    result = infoq_fx.verify_onnx(path, quantized, (images, targets), metric=psnr)
    with torch.no_grad():
        assert result.module_metric == pytest.approx(psnr(quantized(images), targets), abs=1e-4)
    assert all(level.metric == pytest.approx(result.module_metric, abs=0.1) for level in result.levels)
    assert f"module   psnr {result.module_metric:.4g}" in str(result)
    assert [one.name for one in result.levels[0].outputs] == ["image"]


@pytest.mark.slow
def test_default_criteria_that_cannot_judge_a_model_are_left_out(case, caplog):
    model, images, _ = case
    found = infoq_fx.audit(model, images, budgets=[4.0], bits=(2, 4, 8), correlate=False, progress=False)
    assert {"infoq", "weight_mse"} <= {row.name for row in found.rows}
    assert "criterion 'hawq_v2' is left out: " in caplog.text
    with pytest.raises(infoq_fx.InfoqError, match="hawq_v2"):
        infoq_fx.audit(model, images, ["hawq_v2"], [4.0], bits=(2, 4, 8), correlate=False, progress=False)
