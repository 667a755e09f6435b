"""What of a batch is an input, and what a label, follows from what the model's forward takes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.graph.model_inputs import find_arguments

A, B, Y = torch.randn(12, 3), torch.randn(12, 3), torch.randint(0, 3, (12,))
IDS, MASK = torch.randint(0, 9, (12, 5)), torch.ones(12, 5, dtype=torch.int64)


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, a, b):
        return a + b


class Perhaps(nn.Module):
    def forward(self, ids, mask=None, labels=None):
        return ids


class Target(nn.Module):
    def forward(self, source, target):
        return source + target


class Class(nn.Module):
    def forward(self, x, y=None):
        return x


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, *xs):
        return self.fc(torch.cat(xs, 1))


def loader(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=4)


@pytest.mark.parametrize(
    ("model", "data", "inputs", "has_labels"),
    [
        (One(), loader(A, Y), ["0"], True),
        (One(), (A, Y), ["0"], True),
        (Two(), loader(A, B), ["0", "1"], False),
        (Two(), (A, B), ["0", "1"], False),
        (Two(), (A, Y), ["0", "1"], False),
        (Two(), loader(A, B, Y), ["0", "1"], True),
        (Two(), (A, B, Y), ["0", "1"], True),
        (Two(), [((A, B), Y)], ["0", "1"], True),
        (Two(), [((A, B), None)], ["0", "1"], False),
        (Two(), {"a": A, "b": B, "y": Y}, ["a", "b"], True),
        (Perhaps(), loader(IDS, MASK), ["0", "1"], False),
        (Perhaps(), loader(IDS, Y), ["0"], True),
        (Perhaps(), loader(IDS, MASK, Y), ["0", "1"], True),
        (Perhaps(), {"ids": IDS, "labels": Y}, ["ids"], True),
        (Target(), {"source": A, "target": B}, ["source", "target"], False),
        (Class(), {"x": A, "y": Y}, ["x", "y"], False),
        (One(), {"x": A, "y": Y}, ["x"], True),
        (Many(), loader(A, B), ["0", "1"], False),
        (Many(), loader(A, B, A), ["0", "1", "2"], False),
        (One(), [A, B], ["0"], False),
    ],
)
def test_inputs_and_labels_are_told_apart_by_the_arguments(model, data, inputs, has_labels):
    found = read_data(data, find_arguments(model))
    assert list(found.inputs) == inputs
    assert (found.labels is not None) == has_labels
    assert found.samples == (24 if isinstance(data, list) and data == [A, B] else 12)


@pytest.mark.parametrize("labels", [B, torch.eye(3)[Y], torch.zeros(12, 4, 4, dtype=torch.int64)])
def test_labels_of_any_shape_are_carried(labels):
    found = read_data([(A, labels)] * 2, find_arguments(One()))
    assert torch.equal(found.labels, torch.cat([labels, labels]))
    assert found.samples == 24


def test_labels_that_are_no_tensor_say_that_they_may_be_left_out():
    with pytest.raises(infoq_fx.CalibrationDataError, match="leave the labels out"):
        read_data([(A, [{"boxes": A[:1]}] * 12)], find_arguments(One()))


def test_two_equal_tensors_are_no_two_batches_of_a_model_with_one_input():
    found = read_data((A, B), find_arguments(One()))
    assert found.samples == len(A)
    assert torch.equal(found.inputs["0"], A)
    assert torch.equal(found.labels, B)


@pytest.mark.slow
def test_all_stages_read_an_input_called_like_labels(tmp_path):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.table = nn.Linear(3, 4), nn.Embedding(3, 4)

        def forward(self, x, y):
            return self.fc(x) + self.table(y)

    data = {"x": A, "y": Y}
    prepared = infoq_fx.prepare(Net(), data)
    assert prepared.input_names == ("x", "y")
    table = infoq_fx.score(prepared, data, criterion="output_sqnr", progress=False)
    allocation = infoq_fx.refine(prepared, table, 4.0, data)
    quantized = infoq_fx.convert(infoq_fx.recover(prepared, allocation, data, progress=False), allocation)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, data).is_sound


@pytest.mark.slow
def test_a_forward_of_any_number_of_inputs(tmp_path):
    torch.manual_seed(0)
    quantized = infoq_fx.quantize(Many(), 8.0, calibration_data=loader(A, B), bits=8, progress=False)
    assert quantized(A[:1], B[:1]).shape == (1, 3)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, loader(A, B)).is_sound


def test_entries_that_the_model_does_not_take_are_named():
    with pytest.raises(
        infoq_fx.CalibrationDataError, match=r"has 'image_id', and the model's forward takes 'x': leave"
    ):
        infoq_fx.prepare(One().eval(), [{"x": A, "image_id": Y}])
