import torch
from logits import compute_float_logits, compute_logits
from recovered import CONTEXT

from infoq_fx.recovery.steps.bias_correction import BiasCorrection


def test_bias_correction_leaves_no_mean_error(residual):
    prepared, data, bits = residual
    recovered = BiasCorrection().recover(prepared, bits, data, CONTEXT)
    reference = compute_float_logits(prepared, data, batch_size=16).mean(0)
    assert torch.allclose(compute_logits(recovered, data, bits).mean(0), reference, atol=1e-3)  # biases are integers
    assert not torch.allclose(compute_logits(prepared, data, bits).mean(0), reference, atol=1e-2)
