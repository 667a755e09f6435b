import logging

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx import Bernoulli, Categorical, Ignored, OptionError, Quantity


class Net(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.conv, self.out, self.end = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), end

    def forward(self, x):
        return self.end(self.out(self.conv(x).relu()))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.scores, self.boxes = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x):
        h = self.trunk(x).relu()
        return {"scores": self.scores(h), "boxes": self.boxes(h), "order": self.scores(h).argmax(1)}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(40, 6), nn.Linear(6, 40)

    def forward(self, tokens):
        return self.head(self.table(tokens))


def readings(model, data, **options):
    torch.manual_seed(0)
    return infoq_fx.prepare(model.eval(), data, bits=(4, 8), **options).readings


IMAGES = torch.randn(16, 3, 6, 6)


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        (lambda y: y.softmax(1), Categorical(axis=1, form="probabilities")),
        (lambda y: y.log_softmax(1), Categorical(axis=1, form="log_probabilities")),
        (lambda y: y.sigmoid(), Bernoulli(axis=1, form="probabilities")),
        (lambda y: y.softmax(-3).clone(), Categorical(axis=1, form="probabilities")),
        (lambda y: y, Quantity(axis=1)),
    ],
    ids=["softmax", "log_softmax", "sigmoid", "a copy of a softmax", "nothing"],
)
def test_the_end_of_the_graph_says_what_an_output_is(end, wanted):
    assert readings(Net(end), IMAGES) == (wanted,)


def test_labels_of_pixels_say_that_channels_are_classes():
    labels = torch.randint(0, 4, (16, 6, 6))
    assert readings(Net(lambda y: y), [(IMAGES, labels)]) == (Categorical(axis=1),)


def test_labels_that_fit_nothing_are_no_classes():
    assert readings(Net(lambda y: y), [(IMAGES, torch.randint(0, 4, (16, 5)))]) == (Quantity(axis=1),)


def test_a_head_over_all_tokens_has_classes_along_the_last_axis():
    assert readings(Tokens(), torch.randint(0, 40, (16, 7))) == (Categorical(axis=2),)


def test_every_output_has_a_reading_and_integers_are_ignored():
    found = readings(Heads(), torch.randn(16, 5))
    assert found == (Quantity(axis=1), Quantity(axis=1), Ignored())


def test_readings_can_be_given_by_name_position_and_weight():
    data = torch.randn(16, 5)
    wanted = (Categorical(axis=1), Quantity(axis=1, weight=0.5), Ignored())
    assert readings(Heads(), data, outputs={"scores": "categorical", "boxes": (Quantity(), 0.5)}) == wanted
    assert readings(Heads(), data, outputs={0: Categorical(), 1: Quantity(weight=0.5)}) == wanted


def test_confident_logits_are_taken_for_classes_and_it_is_logged(caplog):
    model = nn.Sequential(nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight.mul_(12)
    with caplog.at_level(logging.INFO, logger="infoq_fx"):
        assert readings(model, torch.randn(64, 5)) == (Categorical(axis=1),)
    assert "a guess" in caplog.text


def test_large_numbers_are_not_taken_for_logits():
    model = nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.mul_(4000)
    assert readings(model, torch.randn(64, 5)) == (Quantity(axis=1),)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"score": "quantity"}, "score.*scores"),
        ({"scores": "colour"}, "give 'auto', one of"),
        ({"scores": Categorical(axis=0)}, "along axis 0"),
        ("ignored", "no output is left to read"),
        (3, "give 'auto'"),
    ],
    ids=["a name", "a kind", "an axis", "nothing read", "a number"],
)
def test_what_cannot_be_read_is_refused(outputs, message):
    with pytest.raises(OptionError, match=message):
        readings(Heads(), torch.randn(16, 5), outputs=outputs)


def test_a_searched_site_that_reaches_no_read_output_is_named():
    data = torch.randn(64, 5)
    prepared = infoq_fx.prepare(Heads().eval(), data, bits=(2, 8), outputs={"boxes": "ignored"})
    with pytest.raises(OptionError, match=r"boxes\.weight.*reaches none of the outputs that are read \('scores'\)"):
        infoq_fx.score(prepared, data, progress=False)


class Pooled(nn.Module):
    """Logits, and what has no entry for each sample: a loss, anchors, rows of all samples, pairs of samples."""

    def __init__(self, *kept):
        super().__init__()
        self.fc, self.kept = nn.Linear(6, 4), kept

    def forward(self, x):
        y = self.fc(x)
        found = {
            "loss": y.square().mean(),
            "logits": y,
            "anchors": torch.arange(2.0) + 0,
            "rows": y.reshape(-1, 2),
            "pairs": y @ y.T,
        }
        return {name: found[name] for name in self.kept or found}


def test_outputs_without_an_entry_for_each_sample_are_ignored():
    torch.manual_seed(0)
    x = torch.randn(33, 6)
    prepared = infoq_fx.prepare(Pooled().eval(), x, outputs={"logits": "categorical"})
    kept = [
        name
        for name, reading in zip(prepared.output_names, prepared.readings, strict=True)
        if not isinstance(reading, Ignored)
    ]
    assert kept == ["logits"]
    assert any("'loss' is ignored (has no entry for each sample)" in line for line in prepared.output_notes)
    table = infoq_fx.score(prepared, x, recovery="none", progress=False)
    assert table.scores["fc.weight"][2].value > 0
    with pytest.raises(infoq_fx.OptionError, match="outputs reads 'anchors', which has no entry for each sample"):
        infoq_fx.prepare(Pooled().eval(), x, outputs={"anchors": "quantity"})
    with pytest.raises(infoq_fx.OptionError, match=r"left to read of 'rows' \(has no entry for each sample\); give"):
        infoq_fx.prepare(Pooled("rows").eval(), x)


def test_one_output_with_an_entry_for_each_sample_is_read_like_an_only_one():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = Pooled("loss", "logits").eval()
    with torch.no_grad():
        model.fc.weight.mul_(20)
    assert isinstance(infoq_fx.prepare(model, x).readings[1], Categorical)


@pytest.mark.slow
def test_labels_belong_to_one_output():
    torch.manual_seed(0)
    x, labels = torch.randn(96, 5), torch.randint(0, 3, (96,))
    assert infoq_fx.prepare(Heads().eval(), [(x, labels)]).readings[:2] == (Categorical(axis=1), Quantity(axis=1))
    assert infoq_fx.prepare(Heads().eval(), [(x, torch.full((96,), -1))]).readings[:2] == (Quantity(), Quantity())
    assert infoq_fx.prepare(nn.Linear(5, 64).eval(), [(x, labels)]).readings == (Quantity(axis=1),)  # an embedding
    model = nn.Linear(5, 64).eval()
    with torch.no_grad():
        model.weight.mul_(30)
        found = model(x).argmax(1)
    assert infoq_fx.prepare(model, [(x, found)]).readings == (Categorical(axis=1),)


def test_an_output_has_one_reading():
    with pytest.raises(OptionError, match="outputs gives 'scores' two readings, as 'scores' and 0; leave one out"):
        infoq_fx.prepare(Heads().eval(), torch.randn(16, 5), outputs={"scores": "quantity", 0: "categorical"})


def test_an_output_without_values_is_ignored():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            y = self.head(x)
            return {"logits": y, "nothing": y[:, :0]}

    data = torch.randn(16, 4)
    prepared = infoq_fx.prepare(Net(), data)
    assert any("'nothing' is ignored (has no values)" in line for line in prepared.output_notes)
    quantized = infoq_fx.quantize(Net(), 4.0, calibration_data=data, progress=False)
    assert quantized(data)["nothing"].shape == (16, 0)
    with pytest.raises(infoq_fx.OptionError, match="outputs reads 'nothing', which has no values"):
        infoq_fx.prepare(Net(), data, outputs={"nothing": "quantity"})


def test_one_number_a_sample_has_no_classes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            return self.head(x)[:, 0]

    with pytest.raises(infoq_fx.OptionError, match="no classes; give 'bernoulli' or 'quantity'"):
        infoq_fx.prepare(Net(), torch.randn(16, 4), outputs={"output": "categorical"})
