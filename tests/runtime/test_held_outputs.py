"""A loss that keeps what it reads of the float model's outputs gives what the loss itself gives, to the last bit."""

import pytest
import torch

from infoq_fx.core.readings import Bernoulli, Categorical, Ignored, OutputLoss, Quantity
from infoq_fx.runtime.held_outputs import HeldLoss, HeldOutputs, measure_variances

READINGS = (Categorical(axis=1), Bernoulli(axis=1), Quantity(axis=1), Ignored())


def make(samples=10):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(samples, 6, 5, generator=generator) for _ in range(8)]
    draw[0][2, 3] = -torch.inf
    reference = HeldOutputs(tuple(draw[:4]))
    return reference, draw[4:], OutputLoss(READINGS, measure_variances(READINGS, reference))


@pytest.mark.parametrize("limit_bytes", [None, 0, 16 * 4 * 4 * 30])
def test_every_batch_has_the_nats_of_the_loss_itself(limit_bytes, monkeypatch):
    reference, found, loss = make()
    held, encoded = HeldLoss(reference, loss, limit_bytes), []
    encode = OutputLoss.encode
    monkeypatch.setattr(OutputLoss, "encode", lambda self, x, *rest: encoded.append(x) or encode(self, x, *rest))
    for _ in range(2):
        for start in range(0, 10, 4):
            rows = [x[start : start + 4] for x in found]
            assert torch.equal(held(start, rows), loss(reference.rows(start, 4), rows))
    of_held = len(encoded) - 2 * 6
    assert of_held == {None: 3 + 6, 0: 6 + 6}.get(limit_bytes, 1 + 2 * 2 + 6)


def test_a_function_of_the_users_is_called_with_the_outputs():
    reference, found, loss = make()
    own = OutputLoss(loss.readings, loss.variances, lambda p, q: (p[0] - q[0]).square().flatten(1).sum(1).nan_to_num())
    held = HeldLoss(reference, own)
    assert torch.equal(held(4, [x[4:] for x in found]), own(reference.rows(4, 6), [x[4:] for x in found]))
