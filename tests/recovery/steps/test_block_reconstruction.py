"""Blocks that learn their rounding."""

import logging

import pytest
import torch
from recovered import CONTEXT, state_of

from infoq_fx.quantization.numerics import fake_quantize
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps import block_reconstruction
from infoq_fx.recovery.steps.adaround import _DropQuantize
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction, _Block
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.types import QParams, QuantSpec


@pytest.mark.parametrize("layout", ["plain", "channels last", "strided"])
def test_dropped_quantization_follows_its_definition(layout):
    qparams = QParams(QuantSpec(bits=3, symmetric=False), torch.tensor(0.25), torch.tensor(2, dtype=torch.int32))
    x = torch.randn(4, 6, 8, 10)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x[..., 1::2]
    x, grad = x.requires_grad_(), torch.randn(x.shape)
    y = _DropQuantize.apply(x, qparams, 0.3, 5)
    (found,) = torch.autograd.grad(y, x, grad)
    quantized = fake_quantize(x.detach(), qparams)
    is_float = (y == x) & (y != quantized)
    assert torch.equal(y, torch.where(is_float, x, quantized))
    assert 0.2 < is_float.double().mean() < 0.4
    assert torch.equal(found, grad * ((x > -0.5) & (x < 1.25)))
    assert torch.equal(_DropQuantize.apply(x, qparams, 0.0, 5), quantized)


@pytest.mark.parametrize(("samples", "held"), [(10 * 8, [4, 9]), (3 * 8, [0, 1, 2])])
def test_a_block_is_judged_on_what_it_does_not_learn_from(residual, monkeypatch, samples, held):
    prepared, data, bits = residual
    learned, judged = set(), set()
    loss = _Block._loss

    def record(self, block, index):
        (learned if torch.is_grad_enabled() else judged).add(index)
        return loss(self, block, index)

    monkeypatch.setattr(_Block, "_loss", record)
    BlockReconstruction(epochs=1).recover(prepared, bits, data.take(samples), CONTEXT)
    assert sorted(judged) == held
    assert sorted(learned) == [i for i in range(samples // 8) if samples < 40 or i not in held]


@pytest.mark.slow
def test_reconstruction_goes_on_where_it_stopped(residual, tmp_path, caplog):
    prepared, data, bits = residual
    step, kept = BlockReconstruction(epochs=1), StepContext(batch_size=16, cache_dir=tmp_path)
    whole = state_of(step.recover(prepared, bits, data, CONTEXT))
    learned = []

    class StoppedError(Exception):
        pass

    def stop(share):
        learned.append(share)
        if sum(learned) > 0.6:
            raise StoppedError

    with pytest.raises(StoppedError):
        step.recover(
            prepared, bits, data, StepContext(batch_size=16, cache_dir=tmp_path, run_options=RunOptions(advance=stop))
        )
    files = sorted(tmp_path.rglob("*.pt"))
    assert 0 < len(files) < 4
    files[0].write_bytes(b"cut short")
    with caplog.at_level(logging.WARNING):
        again = state_of(step.recover(prepared, bits, data, kept))
    assert "learning the block again" in caplog.text
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    # Another option, other bits or other data are other blocks.
    count = len(list(tmp_path.iterdir()))
    BlockReconstruction(epochs=1, seed=1).recover(prepared, bits, data, kept)
    step.recover(prepared, {**bits, "head.weight": 8}, data, kept)
    step.recover(prepared, bits, data.take(80), kept)
    assert len(list(tmp_path.iterdir())) == count + 3


def test_parts_of_a_shard_give_its_gradients_and_its_error(residual, monkeypatch):
    prepared, data, bits = residual
    first: dict[int, list] = {}
    errors: dict[int, list] = {}
    set_gradients, error = block_reconstruction._set_gradients, _Block._error
    for most in (1 << 30, 1):

        def record(parameters, grads, shards, most=most):
            set_gradients(parameters, grads, shards)
            first.setdefault(most, [parameter.grad.clone() for parameter in parameters])

        def record_error(self, spread, most=most):
            errors.setdefault(most, []).append(error(self, spread))
            return errors[most][-1]

        monkeypatch.setattr(block_reconstruction, "_set_gradients", record)
        monkeypatch.setattr(_Block, "_error", record_error)
        context = StepContext(batch_size=16, run_options=RunOptions(gradient_bytes=most))
        BlockReconstruction(epochs=1).recover(prepared, bits, data.take(78), context)
    for whole, in_parts in zip(first[1 << 30], first[1], strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-6)
    assert errors[1][0] == pytest.approx(errors[1 << 30][0], rel=1e-5)
