"""Batches of a training, and the samples that are held back."""

import pytest
import torch
from finetuned import Regression, assert_same, convert, open_numbers, quick, small
from torch.utils.data import DataLoader, Dataset, TensorDataset

import infoq_fx
from infoq_fx.errors import CalibrationDataError, OptionError


class Growing(Dataset):
    """Remembers how often each sample was asked for, and gives another version every time."""

    def __init__(self, x):
        self.x, self.asked = x, [0] * len(x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked[index] += 1
        return self.x[index] + 1e-3 * torch.rand(())


def test_a_loader_is_iterated_again_every_epoch():
    quantized, x = small()
    dataset = Growing(x)
    state = torch.get_rng_state()
    tuned = quick(quantized, DataLoader(dataset, batch_size=30), epochs=3)
    assert dataset.asked == [4] * 100  # in advance, and every epoch
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(tuned, quick(quantized, DataLoader(Growing(x), batch_size=30), epochs=3))
    dataset = Growing(x)
    quick(quantized, DataLoader(dataset, batch_size=30), epochs=3, validation_data=x[:20])
    assert dataset.asked == [3] * 100


def test_a_generator_is_read_once():
    quantized, x = small()
    assert_same(quick(quantized, (part for part in x.split(30))), quick(quantized, x))


def rows(samples):
    return set(samples.inputs["x"][:, 0].int().tolist())


@pytest.mark.parametrize(("count", "held"), [(5, 1), (63, 12), (64, 16), (79, 19), (80, 16), (101, 20)])
def test_evenly_spread_samples_are_held_back(count, held):
    source = open_numbers(count)
    kept = sorted(rows(source.held_back))
    assert len(kept) == held
    assert len(set(map(int.__sub__, kept[1:], kept))) <= 1
    assert rows(source.training) == set(range(count)) - set(kept)
    batches = list(source.batches(0))
    assert len(batches) == source.steps
    assert {batch.count for batch in batches} == {min(32, count - held)}
    shuffled = [b.inputs["x"][:, 0].tolist() for b in batches]
    assert shuffled == [b.inputs["x"][:, 0].tolist() for b in source.batches(0)]
    assert shuffled != [b.inputs["x"][:, 0].tolist() for b in source.batches(1)] or count == 5


@pytest.mark.parametrize("whole", [1, 4])
def test_what_a_loader_gives_in_order_is_held_back_in_every_epoch(whole):
    source = open_numbers(103, lambda x: DataLoader(TensorDataset(x), batch_size=24), whole=whole)
    held = rows(source.held_back)
    assert held == set(range(4, 103, 5))
    for epoch in (0, 1):
        batches = list(source.batches(epoch))
        seen = set.union(*(rows(batch) for batch in batches))
        assert not seen & held
        assert len(seen) >= 80 - 4 * whole
        assert all(batch.count % whole == 0 for batch in batches)


def test_of_a_long_loader_few_samples_are_held_back():
    source = open_numbers(11_000, lambda x: DataLoader(TensorDataset(x), batch_size=500))
    kept = sorted(rows(source.held_back))
    assert kept == list(range(9, 11_000, 10))


def test_validation_data_is_what_is_held_back():
    source = open_numbers(40, validation=torch.full((7, 1), 5.0))
    assert source.held_back.count == 7
    assert source.training.count == 40


@pytest.mark.slow
def test_data_that_cannot_be_used_is_refused():
    quantized, x = small()
    labels = torch.arange(100) % 5
    for data, options, message in (
        (x[:, :, :4], {}, r"input 'x' takes torch.float32 \['samples', 1, 8, 8\], the data has .* resize"),
        (x.double(), {}, "float64"),
        (x[:4], {}, "too few samples: every fifth is held back"),
        ([], {}, "empty"),
        (DataLoader(TensorDataset(x[:4])), {}, "too few samples"),
        (x, {"label_weight": 0.5}, "asks for labels and the data has none"),
        ((x, labels + 1), {"label_weight": 0.5}, "labels range from 1 to 5, but the model has 5 classes"),
        (x, {"validation_data": x.double()}, "float64"),
        (3, {}, "calibration data is a int"),
    ):
        with pytest.raises(CalibrationDataError, match=message):
            quick(quantized, data, **options)
    single = convert(infoq_fx.prepare(Regression().eval(), x, bits=(2, 8)))
    with pytest.raises(OptionError, match="fit no output that is read as classes"):
        quick(single, (x, labels), label_weight=0.5)
