"""Groups of tensors that share factors: through clamps and residual additions, and not where something else reads."""

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.recovery.ranges.groups import find_groups
from infoq_fx.recovery.segments import find_segments


class Stage(nn.Module):
    """Two residual blocks behind a stem; ``leak`` is what else reads the sum."""

    def __init__(self, leak="none"):
        super().__init__()
        self.leak = leak
        self.stem, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1)
        self.up = nn.ModuleList(nn.Conv2d(6, 8, 1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(8, 6, 1) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.relu6(up(x)))
        if self.leak == "output":
            return self.head(x), x
        if self.leak == "constant":
            x = x + 1
        if self.leak == "parameter":
            x = x + self.scale
        if self.leak == "sigmoid":
            x = x * torch.sigmoid(x)
        if self.leak == "square":
            x = x * x
        return self.head(x)


def groups_of(model, x):
    prepared = infoq_fx.prepare(model.eval(), x, bits=(4, 8), activation_bits=(4, 8), levels="uniform")
    layers = [layer for segment in find_segments(prepared) for layer in segment.layers]
    return {
        (tuple(first.name for first in group.firsts), tuple(second.site.name for second in group.seconds)): group
        for group in find_groups(prepared, layers)
    }


INSIDE = {(f"up.{i}.weight",): (f"down.{i}.weight",) for i in range(2)}


def test_residual_additions_join_a_stage():
    found = groups_of(Stage(), torch.randn(16, 2, 5, 5))
    stage = ("stem.weight", "down.0.weight", "down.1.weight"), ("up.0.weight", "up.1.weight", "head.weight")
    assert set(found) == {*INSIDE.items(), stage}
    assert len(found[stage].quantizers) >= 3
    assert not found[stage].clamps
    for pair in INSIDE.items():
        assert len(found[pair].clamps) == 1
        assert set(found[pair].axes.values()) == {1}


@pytest.mark.parametrize(
    "leak",
    ["output", "square", *(pytest.param(x, marks=pytest.mark.slow) for x in ("constant", "parameter", "sigmoid"))],
)
def test_what_factors_do_not_commute_with_ends_a_group(leak):
    assert set(groups_of(Stage(leak), torch.randn(16, 2, 5, 5))) == set(INSIDE.items())


class Product(nn.Module):
    """A product of two layers, which takes the factors of one of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.a(x) * self.b(x))


def test_a_product_takes_the_factors_of_one_operand():
    found = groups_of(Product(), torch.randn(16, 4))
    assert set(found) == {(("a.weight",), ("out.weight",))}
