"""A stopped run goes on to the same end."""

import pytest
import torch
from finetuned import assert_same, convert, loader_of, prepared_of, quick, small
from networks import ResidualNet, randomise_norms

from infoq_fx.errors import OptionError
from infoq_fx.finetuning import training_loop as loop


class Stop:
    """Interrupts a run in a later epoch."""

    def __init__(self, monkeypatch, after):
        measure, self.calls = loop.measure_loss, 0

        def count(*arguments):
            self.calls += 1
            if self.calls > after:
                raise KeyboardInterrupt
            return measure(*arguments)

        monkeypatch.setattr("infoq_fx.finetuning.finetuning.measure_loss", count)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda x: x, loader_of], ids=["tensor", "loader"])
def test_a_stopped_run_goes_on_to_the_same_end(make, tmp_path, monkeypatch):
    quantized, x = small()
    path = tmp_path / "checkpoint.pt"
    whole = quick(quantized, make(x), epochs=3)
    with monkeypatch.context() as patch:
        Stop(patch, after=3)  # once before, and the first two epochs
        with pytest.raises(KeyboardInterrupt, match=r"after 2 of 3 epochs; the same call with checkpoint=.* resumes"):
            quick(quantized, make(x), epochs=3, checkpoint=path)
    torch.manual_seed(99)
    counted = Stop(monkeypatch, after=99)
    again = quick(convert(prepared_of("residual")[2]), make(x), epochs=3, checkpoint=path)
    assert counted.calls == 1
    assert_same(again, whole)
    assert_same(quick(quantized, make(x), epochs=3, checkpoint=path), whole)
    assert counted.calls == 1
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_without_a_checkpoint_a_stopped_run_says_what_would_have_helped(monkeypatch):
    quantized, x = small()
    Stop(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt, match="after 0 of 2 epochs; with checkpoint=PATH"):
        quick(quantized, x)


def test_a_checkpoint_of_another_call_is_refused(tmp_path):
    quantized, x = small()
    path = tmp_path / "checkpoint.pt"
    quick(quantized, x, epochs=1, checkpoint=path)
    before = path.read_bytes()
    other = convert(prepared_of("residual")[2], weight_bits=3)
    for data, options, named in (
        (x, {"epochs": 2}, r"differs in: epochs=1 instead of 2; repeat that call"),
        (x, {"learning_rate": 0.1, "seed": 3}, r"learning_rate=0.01 instead of 0.1, seed=0 instead of 3"),
        (x + 1, {}, "differs in: the data"),
        (x, {"teacher": randomise_norms(ResidualNet()).eval()}, "differs in: the float model"),
    ):
        with pytest.raises(OptionError, match=named):
            quick(quantized, data, **{"epochs": 1, "checkpoint": path, **options})
    with pytest.raises(OptionError, match="differs in: the quantized model"):
        quick(other, x, epochs=1, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"text", "cannot read"),
        ({"format": "other"}, "is not a checkpoint of finetune"),
        (None, None),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, message, tmp_path):
    quantized, x = small()
    path = tmp_path / "checkpoint.pt"
    if content is None:
        with pytest.raises(OptionError, match="there is no folder"):
            quick(quantized, x, checkpoint=tmp_path / "nowhere" / "checkpoint.pt")
        return
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(OptionError, match=message):
        quick(quantized, x, checkpoint=path)
