"""Logits of classifiers with one output, and how far two of them are apart: what tests of such networks ask for."""

import torch

from infoq_fx.core.readings import Categorical, Quantity, measure_nats
from infoq_fx.runtime.forward import choose_batch_size, hold_float_outputs, hold_outputs


def compute_logits(prepared, data, bits=None, *, batch_size=None, run_options=None):
    return hold_outputs(prepared, data, bits, batch_size=batch_size, run_options=run_options).tensors[0]


def compute_float_logits(prepared, data, *, batch_size=None, run_options=None):
    size = batch_size or choose_batch_size(prepared)
    return hold_float_outputs(prepared, data, batch_size=size, run_options=run_options).tensors[0]


def measure_spread(logits):
    return logits.double().var(0, correction=0)


def diverge(reference, found, spread=None):
    reading = Categorical() if reference.shape[1] > 1 else Quantity()
    return measure_nats(reading, reference, found, torch.ones(1) if spread is None else spread)
