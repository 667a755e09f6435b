"""Quantized models to be trained."""

import functools
import pickle

import torch
from networks import Attention, NormFirst, ResidualNet, randomise_norms
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import infoq_fx
from infoq_fx.finetuning.finetuning import finetune
from infoq_fx.finetuning.training_data import Form, open_source
from infoq_fx.quantization.custom_ops import quantize_dequantize_op
from infoq_fx.types import Allocation

IMAGES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))


class Tied(nn.Module):
    """An embedding whose table is the head too, and a layer that is to stay in float."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.left = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.left(functional.gelu(self.mix(self.table(x)))).mean(1)
        return functional.linear(x, self.table.weight)


CASES = {
    "residual": (ResidualNet, IMAGES, {}),
    "attention": (Attention, torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(6)), {}),
    "norm_first": (NormFirst, IMAGES, {}),
    "weights_only": (ResidualNet, IMAGES, {"activation_bits": None}),
    "tied": (Tied, torch.randint(0, 11, (40, 5), generator=torch.Generator().manual_seed(7)), {"ignore": ["left"]}),
}


def convert(prepared, weight_bits=2, activation_bits=4):
    bits = {}
    for index, site in enumerate(prepared.inventory.sites):
        wanted = activation_bits if site.kind == "activation" else weight_bits if index % 3 else 8
        bits[site.name] = wanted if wanted in site.bits else 8
    return infoq_fx.convert(prepared, Allocation(bits=bits))


@functools.cache
def prepared_of(name):
    torch.manual_seed(3)
    build, x, options = CASES[name]
    model = randomise_norms(build()).eval()
    return (
        model,
        x,
        infoq_fx.prepare(
            model, x, **{"bits": (2, 3, 8), "activation_bits": (4, 8), "outputs": "categorical", **options}
        ),
    )


def reload(quantized):
    return pickle.loads(pickle.dumps(quantized))


def constants(module):
    return sorted(n.args[1:] for n in module.graph.nodes if n.target is quantize_dequantize_op)


def assert_same(first, second):
    """The same numbers under the same names."""
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name
    assert constants(first) == constants(second)
    assert infoq_fx.allocation_of(first).bits == infoq_fx.allocation_of(second).bits


def small():
    """A conversion that loses much, and inputs; a run takes a tenth of a second."""
    return convert(prepared_of("residual")[2]), torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quick(quantized, data, **options):
    return finetune(quantized, data, **{"epochs": 2, "progress": False, **options})


def loader_of(x):
    return DataLoader(TensorDataset(x), batch_size=25, shuffle=True)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)


def open_numbers(count, make=lambda x: x, **options):
    x = torch.arange(float(count))[:, None]
    form = Form({"x": x[:2]}, needs_labels=False)
    return open_source(make(x), options.pop("validation", None), form, batch_size=32, seed=0, **options)
