"""Models to be recovered, and what they lose."""

from logits import compute_float_logits, compute_logits, diverge, measure_spread
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.recovery.step import StepContext

CONTEXT = StepContext(batch_size=16)


def prepare(model, x, **options):
    prepared = infoq_fx.prepare(model.eval() if isinstance(model, nn.Module) else model, x, **options)
    return prepared, read_data(x).named(prepared.input_names)


def nats(prepared, data, bits):
    reference = compute_float_logits(prepared.origin or prepared, data, batch_size=16)
    return float(diverge(reference, compute_logits(prepared, data, bits), measure_spread(reference)).mean())


def state_of(prepared):
    return {name: value.clone() for name, value in prepared.graph_module.state_dict().items()}


class Branches(nn.Module):
    """All kinds of layers: strided, dilated, grouped, depthwise, padded 'same', transposed, 1-D, linear on tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8)
        self.transposed = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.tokens = nn.Linear(6, 5)
        self.sequence = nn.Conv1d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.first(x).relu()).relu()).relu()
        x = self.tokens(self.transposed(x).relu().flatten(2).transpose(1, 2)).relu()
        return self.head(self.sequence(x.transpose(1, 2)).relu().mean(2))
