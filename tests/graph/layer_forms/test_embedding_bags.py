"""Bags of embeddings as embeddings and reductions: torch's own values."""

import itertools

import pytest
import torch
from torch import nn

from infoq_fx.graph.capture import capture
from infoq_fx.graph.layer_forms.normal_form import NORMAL_FORM
from infoq_fx.graph.passes.pass_manager import run_passes

ATEN = torch.ops.aten


class Rows(nn.Module):
    """Bags of one size, as ``nn.EmbeddingBag`` takes them without offsets."""

    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, **options)

    def forward(self, x):
        return self.bag(x)


class Ragged(Rows):
    """The samples' entries one after the other; bags of 2, of 4, ..., whatever the samples."""

    def forward(self, x):
        counts = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        ends = torch.cumsum(counts, 0)
        starts = ends - counts + (torch.arange(x.shape[0]) > 0)  # the first bag has one entry more
        if self.bag.include_last_offset:
            starts = torch.cat([starts, ends[-1:]])
        return self.bag(x.reshape(-1), starts)


class Weighted(Rows):
    def forward(self, x):
        return self.bag(x, per_sample_weights=x.float() / 7)


CASES = [
    *(
        (Rows, {"mode": mode, **other})
        for mode, other in itertools.product(("sum", "mean", "max"), ({}, {"padding_idx": 3}))
    ),
    *((Ragged, {"mode": mode, "padding_idx": 3}) for mode in ("sum", "mean", "max")),
    (Ragged, {"mode": "mean", "include_last_offset": True}),
    (Weighted, {"mode": "sum"}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_bags_have_the_same_values(kind, options):
    torch.manual_seed(0)
    model, ids = kind(**options).eval(), torch.randint(0, 20, (5, 6))
    ids[2] = 3  # a bag of padding alone
    captured = capture(model, {"x": ids})
    graph_module = run_passes(captured.graph_module, NORMAL_FORM)
    targets = [node.target for node in graph_module.graph.nodes]
    assert targets.count(ATEN.embedding.default) == 1
    assert (ATEN.arange.default in targets) == (kind is Ragged)
    for x in (ids, torch.cat([ids, ids.flip(1)])):
        torch.testing.assert_close(graph_module(x), model(x))
