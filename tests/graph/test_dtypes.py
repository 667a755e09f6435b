"""Models of half and double precision: quantized in float32, called in their own dtype."""

import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import infoq_fx

pytestmark = pytest.mark.slow  # of models that few have


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).relu().mean((2, 3))))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = Net().bfloat16(), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.body(x.to(torch.bfloat16)).float())


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x).float()


class Masked(nn.Module):
    """Attention scores of float64 with the lowest number of that dtype at masked positions."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, mask):
        scores = (self.fc(x) @ x.transpose(1, 2)).masked_fill(mask, torch.finfo(x.dtype).min)
        return self.head((scores.softmax(-1) @ x).mean(1))


def quantize(model, data):
    return infoq_fx.quantize(
        model.eval(), 8.0, calibration_data=data, bits=8, recovery="none", refine=False, progress=False
    )


def is_near(found, expected):
    found, expected = found.double(), expected.double()
    return bool((found - expected).norm() < 0.06 * expected.norm())


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16, torch.float64], ids=str
)
def test_a_model_of_another_dtype_is_taken_in_float32(dtype, tmp_path, caplog):
    model, x = Net().to(dtype), X.to(dtype)
    with caplog.at_level(logging.WARNING):
        quantized = quantize(model, x)
    assert [str(dtype).removeprefix("torch.") in record.message for record in caplog.records] == [True]
    assert all(p.dtype == dtype for p in model.parameters())
    with torch.no_grad():
        found, expected = quantized(x), model(x)
    assert found.dtype == dtype
    assert is_near(found, expected)
    assert quantized(x=x).dtype == dtype
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    in_file = torch.float32 if dtype == torch.bfloat16 else dtype
    (result,) = onnxruntime.InferenceSession(path).run(None, {"x": x.to(in_file).numpy()})
    assert torch.from_numpy(result).dtype == in_file
    np.testing.assert_allclose(result.astype(np.float64), found.double().numpy(), atol=0.02)
    assert infoq_fx.verify_onnx(path, quantized, x).is_sound


@pytest.mark.slow
@pytest.mark.parametrize("make", [Mixed, Autocast])
def test_parts_of_half_precision_are_taken_in_float32(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    quantized = quantize(model, X)
    with torch.no_grad():
        assert is_near(quantized(X), model(X))
        assert quantized(X).dtype == torch.float32
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, X).is_sound
    assert not any(node.meta["val"].dtype == torch.bfloat16 for node in tensors_of(quantized))


def tensors_of(module):
    return [node for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def test_a_half_precision_model_takes_data_of_float32():
    model = Net().half()
    quantized = quantize(model, X)
    with torch.no_grad():
        assert quantized(X).dtype == torch.float32
        assert is_near(quantized(X), model(X.half()))
        assert quantized(X.half()).dtype == torch.float16


@pytest.mark.slow
def test_data_of_float64_is_taken_in_float32_by_a_model_of_float32(tmp_path, caplog):
    model = Net()
    quantized = quantize(model, X.double().numpy())
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert ["float64" in message for message in told] == [True]
    with torch.no_grad():
        assert torch.equal(quantized(X.double()), quantized(X))
        assert quantized(X).dtype == torch.float32
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert onnxruntime.InferenceSession(path).get_inputs()[0].type == "tensor(float)"
    assert infoq_fx.verify_onnx(path, quantized, X.double()).is_sound


def test_lowest_numbers_of_float64_stay_finite(tmp_path):
    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(32, 5, 6, dtype=torch.float64)
    mask = torch.rand(32, 1, 5) > 0.7
    mask[:, :, 0] = False
    quantized = quantize(model, {"x": x, "mask": mask})
    with torch.no_grad():
        assert is_near(quantized(x, mask), model(x, mask))


class Added(nn.Module):
    """A mask of zeros and minus infinity is added to the scores."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, mask):
        scores = self.fc(x) @ x.transpose(1, 2) + mask
        return self.head((scores.softmax(-1) @ x).mean(1))


def test_masks_of_minus_infinity_are_inputs():
    torch.manual_seed(0)
    model, x = Added(), torch.randn(32, 5, 6)
    mask = torch.zeros(32, 1, 5).masked_fill(torch.rand(32, 1, 5) > 0.7, -torch.inf)
    mask[:, :, 0] = 0
    quantized = quantize(model, {"x": x, "mask": mask})
    with torch.no_grad():
        assert is_near(quantized(x, mask), model(x, mask))
    with pytest.raises(infoq_fx.CalibrationDataError, match="NaN or infinity"):
        quantize(nn.Linear(5, 2), mask[:, 0])


def test_another_default_dtype_is_refused_at_the_door():
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(infoq_fx.OptionError, match="default dtype"):
            infoq_fx.prepare(nn.Linear(3, 2).float(), torch.randn(8, 3).float())
    finally:
        torch.set_default_dtype(torch.float32)
