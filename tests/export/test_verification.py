"""Verification of a file against its own module, and against another."""

import dataclasses
import math

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.errors import CalibrationDataError, ExportError, OptionError
from infoq_fx.export.output_comparison import _Sums, find_problem
from infoq_fx.export.verification_result import LevelResult, OutputResult
from infoq_fx.types import Allocation


def quantize_by_hand(model, data, bits=4):
    prepared = infoq_fx.prepare(model.eval(), data, bits=bits, outputs="categorical")
    return infoq_fx.convert(prepared, Allocation(bits={s.name: s.bits[0] for s in prepared.inventory.sites}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model = randomise_norms(ResidualNet())
    images = torch.randn(96, 1, 8, 8)
    quantized = quantize_by_hand(model, images)
    labels = quantized(images).argmax(1)
    labels[:24] = (labels[:24] + 1) % quantized(images).shape[1]
    path = infoq_fx.export_onnx(quantized, tmp_path_factory.mktemp("onnx") / "model.onnx")
    return quantized, path, images, labels


@pytest.mark.slow
def test_a_module_with_a_fixed_batch_asks_for_a_whole_one(tmp_path):
    x = torch.randn(24, 1, 8, 8)
    program = torch.export.export(randomise_norms(ResidualNet()).eval(), (x[:6],))
    quantized = infoq_fx.quantize(program, 8.0, calibration_data=x, recovery="none", refine=False, progress=False)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    with pytest.raises(CalibrationDataError, match="fixed to batches of 6, the data holds 5 samples; give at least 6"):
        infoq_fx.verify_onnx(path, quantized, x[:5])
    assert infoq_fx.verify_onnx(path, quantized, x[:8]).samples == 6


def test_its_own_file_is_sound(made):
    quantized, path, images, labels = made
    found = infoq_fx.verify_onnx(path, quantized, (images, labels))
    assert found.is_sound
    assert found.samples == 96
    assert found.module_top1 == 75.0
    off, default = found.levels
    assert (off.level, off.agreement, off.top1) == ("off", 1.0, 75.0)
    assert off.largest_error_steps < 1e-3
    assert default.level == "default"
    assert default.agreement > 0.9
    text = str(found)
    assert text.startswith("sound: the file computes what the module computes\nonnxruntime ")
    assert "off      top-1 75.0 %, agrees on 100.0 %" in text


@pytest.mark.parametrize("batch_size", [1, 7, 96])
def test_the_batch_size_changes_nothing_without_optimisation(made, batch_size):
    quantized, path, images, _ = made
    (off, _) = infoq_fx.verify_onnx(path, quantized, images, batch_size=batch_size).levels
    assert off.agreement == 1.0
    assert off.top1 is None


def test_the_file_of_another_module_is_not(made):
    _, path, images, _ = made
    torch.manual_seed(1)
    other = quantize_by_hand(randomise_norms(ResidualNet()), images)
    found = infoq_fx.verify_onnx(path, other, images)
    assert not found.is_sound
    assert found.verdict.startswith("not sound: without optimisation the file agrees with the module on ")
    assert "it belongs to another module" in found.verdict


@pytest.mark.slow
def test_errors_say_what_to_do(made, tmp_path):
    quantized, path, images, _ = made
    with pytest.raises(OptionError, match="is not a quantized module; pass what"):
        infoq_fx.verify_onnx(path, nn.Linear(2, 2), images)
    with pytest.raises(OptionError, match="unknown target 'onnxrt'; nearest of 4: 'qonnx', 'onnxruntime'"):
        infoq_fx.verify_onnx(path, quantized, images, target="onnxrt")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"refuses .*broken\.onnx.*export it again"):
        infoq_fx.verify_onnx(tmp_path / "broken.onnx", quantized, images)
    with pytest.raises(CalibrationDataError):
        infoq_fx.verify_onnx(path, quantized, (images, torch.full((96,), 99)))
    other, narrow = (quantize_by_hand(nn.Sequential(nn.Flatten(), nn.Linear(64, n)), images) for n in (4, 3))
    path = infoq_fx.export_onnx(narrow, tmp_path / "narrow.onnx")
    with pytest.raises(ExportError, match="made from another module"):
        infoq_fx.verify_onnx(path, other, images)
    with pytest.raises(ExportError, match="does not take the module's inputs"):
        infoq_fx.verify_onnx(path, quantized, images)


def test_an_output_of_one_value_agrees_within_a_step(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(64, 6)
    quantized = quantize_by_hand(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), data)
    found = infoq_fx.verify_onnx(infoq_fx.export_onnx(quantized, tmp_path / "m.onnx"), quantized, data)
    assert found.is_sound
    assert found.levels[0].agreement == 1.0


class WithConstant(nn.Module):
    """Gives a number for the whole batch, and a column that is the same for all samples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return y.square().mean(), y, 0 * y[:, :1] + 1.7


@pytest.mark.slow
def test_the_last_bits_of_a_constant_output_are_no_steps(tmp_path):
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        torch.manual_seed(seed)
        quantized = quantize_by_hand(WithConstant(), data)
        found = infoq_fx.verify_onnx(infoq_fx.export_onnx(quantized, tmp_path / "m.onnx"), quantized, data)
        assert found.is_sound, found.verdict


def test_another_constant_is_seen():
    for wanted, found, steps in ((1.7, 1.7 * (1 + 2**-23), 0.5), (1.7, 1.701, 500)):
        sums = _Sums()
        sums.add(None, torch.full((8, 3), wanted), torch.full((8, 3), found))
        assert (sums.finish("y").mean_error_steps > 2) == (steps > 2)


def level(name, agreement, mean_error_steps, largest_error_steps, top1=None):
    """The result for a file with one output."""
    errors = mean_error_steps, largest_error_steps
    output = OutputResult("output", 20.0, *errors, agreement, is_finite=math.isfinite(largest_error_steps))
    return LevelResult(name, agreement, *errors, top1, (output,))


@pytest.mark.parametrize(
    ("result", "is_problem"),
    [
        (level("off", 0.995, 0.1, 3.0), False),
        (level("off", 0.99, 0.1, 0.1), True),
        (level("off", 1.0, 2.0, 3.0), True),
        (level("default", 0.9, 0.1, 9.0), False),
        (level("default", 0.89, 0.1, 0.1), True),
        (level("default", 0.95, 0.1, 9.0, 80.0), False),
        (
            level("default", 0.95, 0.1, 9.0, 79.0),
            False,
        ),  # 10 of 50 changed predictions more wrong than right: chance
        (level("default", 0.95, 0.1, 9.0, 78.5), True),  # 15 more: not chance
        (level("default", 1.0, 0.1, math.inf, 80.0), True),
    ],
)
def test_what_is_sound(result, is_problem):
    top1 = None if result.top1 is None else 80.0
    assert (find_problem(result, top1, 1000) is not None) == is_problem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "bits"),
    [
        ("exact", 3),
        pytest.param("exact", 8, marks=pytest.mark.slow),
        pytest.param("int8", 3, marks=pytest.mark.slow),
        pytest.param("int8", 8, marks=pytest.mark.slow),
    ],
)
def test_openvino_computes_the_same(made, tmp_path, container, bits):
    pytest.importorskip("openvino", reason="OpenVINO is an extra")
    _, _, images, _ = made
    quantized = quantize_by_hand(randomise_norms(ResidualNet()), images, bits)
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx", container=container, target="openvino")
    found = infoq_fx.verify_onnx(path, quantized, images, target="openvino")
    assert found.target.startswith("OpenVINO ")
    assert [result.level for result in found.levels] == ["default"]
    assert found.is_sound, found


def test_a_verification_is_a_value(made):
    quantized, path, images, labels = made
    found = infoq_fx.verify_onnx(path, quantized, (images, labels))
    assert dataclasses.asdict(found)["levels"][0]["level"] == "off"
    assert found == infoq_fx.verify_onnx(path, quantized, (images, labels))
