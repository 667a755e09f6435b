"""MPQCO against its definition."""

import math

import numpy as np
import pytest
import torch
from differentiated import WEIGHTS, measure, prepare, weight_error
from torch import nn
from torch.nn import functional

from infoq_fx.scoring.criteria.literature.mpqco import MPQCO


def test_mpqco_is_half_the_mean_squared_projection(small):
    model, x, labels, prepared, data = small
    scores = measure(MPQCO(), prepared, data)
    for site in WEIGHTS:
        for bits in (2, 4, 8):
            error = weight_error(model, prepared, site, bits)
            changes = []
            for row, label in zip(x, labels, strict=True):
                loss = functional.cross_entropy(model(row[None]), label[None])
                (gradient,) = torch.autograd.grad(loss, model.get_parameter(site))
                changes.append(float((gradient.double() * error).sum()) ** 2 / 2)
            assert scores[site][bits].value == pytest.approx(np.mean(changes), rel=1e-3)
            assert scores[site][bits].standard_error == pytest.approx(np.std(changes) / math.sqrt(24), rel=1e-3)


def test_mpqco_of_a_linear_model_in_closed_form():
    torch.manual_seed(5)
    x, labels = torch.randn(32, 6), torch.randint(0, 4, (32,))
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    prepared, data = prepare(model, x, labels)
    error = weight_error(model, prepared, "0.weight", 2)
    residual = model(x).detach().double().softmax(1) - functional.one_hot(labels, 4)
    expected = ((residual * (x.double() @ error.T)).sum(1) ** 2 / 2).mean()
    assert measure(MPQCO(), prepared, data)["0.weight"][2].value == pytest.approx(float(expected), rel=1e-4)
