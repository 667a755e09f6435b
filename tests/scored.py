"""A small network to be scored, and what was kept of it."""

from pathlib import Path

import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.scoring.information.measurement import InformationMeasure

BITS = (2, 4, 8)
CRITERION = infoq_fx.InfoQPaper(slices=16)


def build(bits=BITS, **options):
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(96, 1, 8, 8, generator=generator), torch.randint(0, 5, (96,), generator=generator)
    return infoq_fx.prepare(model, data, bits=bits, **options), data


def score(prepared, data, **options):
    return infoq_fx.score(prepared, data, **{"criterion": CRITERION, "progress": False, **options})


def entries(folder):
    return sorted(path for path in Path(folder).rglob("*.json") if path.name != "about.json")


def count_measured(monkeypatch):
    measured, original = [], InformationMeasure.__call__

    def call(self, prepared, data, sites, run_options):
        measured.extend((site.name, bits) for site in sites for bits in site.bits)
        return original(self, prepared, data, sites, run_options)

    monkeypatch.setattr(InformationMeasure, "__call__", call)
    return measured
