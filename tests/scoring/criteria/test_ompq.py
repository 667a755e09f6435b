"""OMPQ against its definition."""

import numpy as np
import pytest
import torch
from differentiated import measure, prepare
from torch import nn

from infoq_fx.scoring.criteria.literature.ompq import OMPQ, orthogonality


def orm_by_definition(f, g):
    return np.linalg.norm(g.T @ f) ** 2 / (np.linalg.norm(f.T @ f) * np.linalg.norm(g.T @ g))


@pytest.mark.parametrize("is_centred", [True, False])
def test_ompq_is_the_definition(is_centred, monkeypatch):
    torch.manual_seed(5)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(20, 1, 8, 8)
    prepared, data = prepare(model, x)
    beta = 0.7
    outputs, value = [], x
    for layer in model:
        value = layer(value)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            rows = value.detach().flatten(1).double().numpy()
            outputs.append(rows - rows.mean(0) if is_centred else rows)
    gamma = [sum(orm_by_definition(f, g) for g in outputs) - 1 for f in outputs]
    theta = np.exp(-beta * (np.array(gamma) - min(gamma)))
    importance = [theta[i:].mean() for i in range(3)]
    scores = measure(OMPQ(beta=beta, is_centred=is_centred), prepared, data)
    for site, expected in zip(("0.weight", "2.weight", "5.weight"), importance, strict=True):
        for bits in (2, 4, 8):
            # The 8-bit model's outputs are not quite the float model's.
            assert scores[site][bits].value == pytest.approx((8 - bits) * expected, rel=0.02)
    monkeypatch.setattr("infoq_fx.scoring.criteria.literature.ompq._GROUP_BYTES", 1)
    assert measure(OMPQ(beta=beta, is_centred=is_centred), prepared, data) == scores


@pytest.mark.parametrize("is_centred", [True, False])
def test_orthogonality_needs_only_the_products_of_samples(is_centred):
    outputs = [3 + torch.randn(12, n, dtype=torch.float64) for n in (5, 30)]
    found = orthogonality(torch.stack([f @ f.T for f in outputs]), is_centred=is_centred)
    f, g = ((f - is_centred * f.mean(0)).numpy() for f in outputs)
    expected = [[1.0, orm_by_definition(f, g)], [orm_by_definition(g, f), 1.0]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_ompq_counts_a_constant_layer_as_like_no_other():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second((self.first(x) * 0).relu())

    prepared, data = prepare(Constant().eval(), torch.randn(16, 4))
    scores = measure(OMPQ(), prepared, data)
    assert scores["first.weight"][2].value == scores["second.weight"][2].value == 6.0
