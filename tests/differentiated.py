"""Networks for criteria that differentiate or train."""

import pickle

from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.quantization import numerics
from infoq_fx.runtime.forward import RunOptions

WEIGHTS = ("0.weight", "2.weight")


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).eval()


def prepare(model, x, labels=None, bits=(2, 4, 8), **options):
    prepared = infoq_fx.prepare(model, (x, labels) if labels is not None else x, bits=bits, **options)
    return prepared, read_data((x, labels) if labels is not None else x).named(prepared.input_names)


def measure(criterion, prepared, data, run_options=None, batch_size=8, begin_options=None):
    measured_by = pickle.loads(
        pickle.dumps(criterion.begin(prepared, data, batch_size=batch_size, run_options=begin_options or RunOptions()))
    )
    sites = [s for s in prepared.inventory.sites if s.is_searched and s.kind in criterion.kinds and len(s.bits) > 1]
    return criterion.score(prepared, measured_by(prepared, data, sites, run_options or RunOptions()))


def weight_error(model, prepared, site, bits):
    quantizer = next(q for _, q in prepared.quantizer_nodes() if q.site.name == site)
    weight = model.get_parameter(site).detach()
    return (numerics.fake_quantize(weight, quantizer.qparams_at(bits)) - weight).double()
