"""Outputs of one axis, infinite values behind masks, and models that mix the samples of a batch."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import infoq_fx


class Head(nn.Module):
    def __init__(self, end, columns=5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.end = nn.Linear(10, 16), nn.Linear(16, columns), end
        self.register_buffer("mask", torch.tensor([0, 0, 0, float("-inf"), 0]))

    def forward(self, x):
        return self.end(self, self.second(self.first(x).relu()))


def column(model, y):
    return y[:, 0]


def probability(model, y):
    return y[:, 0].sigmoid()


def masked(model, y):
    return y + model.mask


X = torch.randn(96, 10, generator=torch.Generator().manual_seed(1))


def quantize(model, data, **options):
    return infoq_fx.quantize(model.eval(), 4.0, calibration_data=data, bits=(2, 4, 8), progress=False, **options)


@pytest.mark.parametrize("end", [column, probability])
def test_an_output_of_one_axis_is_one_column(end, tmp_path):
    model = Head(end)
    quantized = quantize(model, X)
    table = quantized.meta["infoq"].table
    assert all(score.value > 0 for by_bits in table.scores.values() for bits, score in by_bits.items() if bits < 8)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, X).is_sound


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("categorical", "bernoulli", "quantity")]


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["auto", *OTHERS])
def test_values_behind_a_mask_do_not_count(reading, tmp_path):
    model = Head(masked)
    quantized = quantize(model, X, outputs=reading)
    table = quantized.meta["infoq"].table
    assert all(np.isfinite(s.value) for by_bits in table.scores.values() for s in by_bits.values())
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, X).is_sound
    found = onnxruntime.InferenceSession(path).run(None, {"x": X.numpy()})[0]
    assert np.isneginf(found[:, 3]).all()
    assert np.isfinite(np.delete(found, 3, 1)).all()


class SharedState(nn.Module):
    """Takes the first sample's state for all samples."""

    def __init__(self):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, state):
        new = torch.tanh(self.i(x) + self.h(state[0]))
        return self.o(new), new[None]


def test_a_model_that_mixes_the_samples_of_a_batch_is_refused():
    states = torch.tanh(torch.randn(64, 1, 1, 16))
    data = [(X[i : i + 1], states[i]) for i in range(64)]
    with pytest.raises(infoq_fx.UnsupportedModelError, match="depends on the order of the samples in the batch"):
        quantize(SharedState(), data)


def test_one_sample_is_enough():
    assert infoq_fx.prepare(Head(masked).eval(), X[:1]).readings


class Constant(nn.Module):
    """A layer that no input reaches, and one that is called on a vector."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(10))
        self.a, self.b, self.c = nn.Linear(10, 16), nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.c((self.b(x) * self.a(self.p)).relu())


def test_layers_that_no_input_reaches_are_rounded_to_nearest():
    quantized = quantize(Constant(), X)
    with torch.no_grad():
        assert quantized(X).shape == (96, 4)


def test_layers_on_vectors_are_rounded():
    class PerSample(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 4)

        def forward(self, x):
            return torch.stack([self.b(self.a(x[i]).relu()) for i in range(2)])

    program = torch.export.export(PerSample().eval(), (X[:2],))
    assert quantize_program(program)(X[:2]).shape == (2, 4)


def quantize_program(program):
    return infoq_fx.quantize(program, 4.0, calibration_data=X, bits=(2, 4, 8), progress=False)
