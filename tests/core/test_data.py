import itertools
import tempfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from infoq_fx.core.data import CalibrationData, read_classes, read_data
from infoq_fx.errors import CalibrationDataError

X, Y = torch.arange(24.0).reshape(12, 2), torch.arange(12) % 3


def batches_of(x, y, size=5):
    return [(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        {"0": X, "labels": Y},
        batches_of(X, Y),
        iter(batches_of(X, Y)),
        DataLoader(TensorDataset(X, Y), batch_size=5),
        [[X[:4], Y[:4]], [X[4:], Y[4:]]],
        [(X, list(range(3)) * 4)],
    ],
    ids=["pair", "numpy", "dict", "list", "iterator", "DataLoader", "lists", "label_list"],
)
def test_every_form_reads_the_same(data):
    read = read_data(data)
    assert torch.equal(read.inputs["0"], X)
    assert torch.equal(read.labels, Y)
    assert read.samples == 12
    assert torch.equal(torch.cat([batch["0"] for batch in read.batches(5)]), X)


@pytest.mark.parametrize("data", [X, [X[:7], X[7:]], [(X,)], (X, None), np.asarray(X)], ids=str)
def test_labels_may_be_missing(data):
    read = read_data(data)
    assert read.labels is None
    assert torch.equal(read.inputs["0"], X)


def test_several_inputs_by_position_and_by_name():
    by_position = read_data([((X, 2 * X), Y)]).named(("a", "b"))
    by_name = read_data({"b": 2 * X, "a": X, "labels": Y}).named(("a", "b"))
    for read in (by_position, by_name):
        assert list(read.inputs) == ["a", "b"]
        assert torch.equal(read.inputs["b"], 2 * X)
    with pytest.raises(CalibrationDataError, match=r"'a', 'b'; give those that the model takes: 'x'"):
        read_data({"a": X, "b": X}).named(("x",))


def test_one_sample_still_makes_a_batch_of_two():
    (example,) = read_data(X[:1]).example_inputs
    assert torch.equal(example, X[[0, 0]])


def endless():
    return ((torch.zeros(64, 2), torch.zeros(64, dtype=torch.int64)) for _ in itertools.count())


def endless_empty():
    return (torch.zeros(0, 2) for _ in itertools.count())


BAD = {
    "empty_list": ([], "is empty"),
    "empty_tensor": (torch.zeros(0, 3), "is empty"),
    "endless": (endless(), "has not ended after 20,"),
    "endless_of_nothing": (endless_empty(), "has not ended"),
    "nan": (torch.tensor([[1.0], [float("nan")]]), "NaN or infinity"),
    "inf": ([X, X.log()], "batch 1 holds NaN or infinity"),
    "too_few_labels": ((X, Y[:5]), "12 samples but 5 labels"),
    "text": ("images", "batch 0 holds str"),
    "number": (3, "is a int"),
    "path_batch": ([{"x": "a.png"}], "holds str"),
    "scalar_input": ([(torch.tensor(1.0),)], "no batch dimension"),
    "ragged": ([X, torch.zeros(3, 5)], "batch 1 is torch.float32"),
    "mixed_dtype": ([X, X.double()], "float64"),
    "labels_sometimes": ([(X, Y), X], "other inputs or labels"),
    "two_lengths": ([((X, X[:3]), Y)], "different numbers of samples"),
    "meta": (torch.zeros(4, 2, device="meta"), "meta device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_says_what_is_wrong(name):
    data, message = BAD[name]
    with pytest.raises(CalibrationDataError, match=message):
        read_data(data)


@pytest.mark.parametrize("labels", [torch.tensor([0, 5]), torch.tensor([-1, 0])], ids=["above", "below"])
def test_labels_out_of_range(labels):
    with pytest.raises(CalibrationDataError, match="but the model has 5 classes"):
        read_classes(read_data((X[:2], labels)).labels, 5)


def test_much_data_is_spooled_to_disk_and_mapped(monkeypatch):
    batches = [
        ({"x": torch.randn(n, 3, 4), "t": torch.arange(n, dtype=torch.bfloat16)}, torch.arange(n)) for n in (5, 2, 7)
    ]
    expected = read_data(batches)
    monkeypatch.setattr("infoq_fx.core.data._HELD_BYTES", 100)
    found = read_data(iter(batches))
    assert all(
        torch.equal(found.inputs[name], x) and found.inputs[name].dtype == x.dtype
        for name, x in expected.inputs.items()
    )
    assert torch.equal(found.labels, expected.labels)
    assert found.is_positional == expected.is_positional
    found.inputs["x"][0] = 0  # a copy of one's own
    assert torch.equal(expected.inputs["x"][1:], found.inputs["x"][1:])


def test_spooled_data_may_have_no_labels(monkeypatch):
    monkeypatch.setattr("infoq_fx.core.data._HELD_BYTES", 10)
    found = read_data([torch.ones(2, 3), torch.zeros(4, 3)])
    assert found.samples == 6
    assert found.labels is None
    assert found.inputs["0"].sum() == 6


def test_a_full_disk_is_said(monkeypatch):
    def full(**_):
        raise OSError("No space left on device")

    monkeypatch.setattr("infoq_fx.core.data._HELD_BYTES", 10)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(CalibrationDataError, match=r"No space left.*TMPDIR"):
        read_data([torch.ones(2, 3), torch.zeros(4, 3)])


def test_one_batch_is_not_copied():
    x = torch.ones(4, 3)
    assert read_data(x).inputs["0"].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("has_labels", [False, True])
def test_large_selections_are_mapped_from_disk(monkeypatch, has_labels, is_full):
    inputs = {"ids": torch.arange(40).reshape(20, 2), "x": torch.randn(20, 3, 5)}
    labels = torch.arange(20) if has_labels else None
    data, rows = CalibrationData(inputs, labels, False), torch.tensor([3, 3, 19, 0, 7, 11, 12])
    monkeypatch.setattr("infoq_fx.core.data._HELD_BYTES", 200)
    written = []

    def open_file(**options):
        written.append(options)
        if is_full:
            raise OSError("No space left on device")
        return opened(**options)

    opened = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", open_file)
    found = data.select(rows)
    assert written
    for name, x in inputs.items():
        assert found.inputs[name].dtype == x.dtype
        assert torch.equal(found.inputs[name], x[rows])
    assert found.labels is None if labels is None else torch.equal(found.labels, labels[rows])
    assert not found.is_positional
