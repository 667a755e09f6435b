"""The graph as a chain of segments."""

import pytest
import torch
from recovered import CONTEXT, prepare
from torch import nn

from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.parameters import fork
from infoq_fx.recovery.segments import find_segments


@pytest.mark.parametrize("name", ["residual", pytest.param("branches", marks=pytest.mark.slow)])
def test_segments_are_the_graph_in_order(name, request):
    prepared = request.getfixturevalue(name)[0]
    segments = find_segments(prepared)
    inner = [n for n in prepared.graph_module.graph.nodes if n.op not in ("placeholder", "output")]
    own = [node for segment in segments for node in segment.nodes]
    constants = {node for segment in segments for node in segment.constants}
    assert len(set(own)) == len(own)
    assert set(own) | constants == set(inner)
    layers = [layer.site.name for segment in segments for layer in segment.layers]
    assert sorted(layers) == sorted(s.name for s in prepared.inventory.sites if s.kind == "weight")
    known = {n for n in prepared.graph_module.graph.nodes if n.op == "placeholder"}
    for segment in segments:
        assert set(segment.entering) <= known
        known = set(segment.leaving)


def test_residual_blocks_stay_whole(residual):
    found = [[layer.site.name for layer in segment.layers] for segment in find_segments(residual[0])]
    blocks = [[f"blocks.{i}.conv1.weight", f"blocks.{i}.conv2.weight"] for i in range(2)]
    assert found == [["stem.0.weight"], *blocks, ["head.weight"]]


@pytest.mark.slow
def test_long_segments_are_cut():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(12))

        def forward(self, x):
            seen = [x]
            for layer in self.layers:  # every value stays alive to the end
                seen.append(layer(seen[-1]).relu())
            return torch.stack(seen).sum((0, 3, 4))

    prepared, data = prepare(Wide(), torch.randn(4, 2, 2, 2))
    segments = find_segments(prepared)
    assert max(len(segment.layers) for segment in segments) <= 8
    runner = LayerwiseRunner(fork(prepared), {}, data, CONTEXT)
    for segment in runner.segments:
        runner.advance(segment)
