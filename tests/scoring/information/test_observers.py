"""Observers at the outputs of models with several."""

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.scoring.information.observers import list_output_observers


class TwoHeads(nn.Module):
    """A trunk with two heads, and an output of integers."""

    def __init__(self):
        super().__init__()
        self.trunk, self.scores, self.boxes = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x):
        h = self.trunk(x).relu()
        return {"scores": self.scores(h), "boxes": self.boxes(h), "order": self.scores(h).argmax(1)}


@pytest.mark.parametrize("observers", [None, ["output"], "auto"])
def test_every_output_is_observed(observers):
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    prepared = infoq_fx.prepare(TwoHeads().eval(), x, bits=(2, 4, 8))
    assert list_output_observers(prepared) == ["output", "output_1"]
    table = infoq_fx.score(prepared, x, criterion="infoq_paper", observers=observers, recovery="none", progress=False)
    assert all(table.scores[f"{head}.weight"][2].value > 0 for head in ("scores", "boxes"))
