"""Activations in float that the minimized cost does not count: the smallest file, then as few floats as that needs."""

from dataclasses import replace

import pytest
import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx import Budget, Tolerance
from infoq_fx.core.data import read_data
from infoq_fx.scoring.sensitivity import Resources
from infoq_fx.tolerance import search as search_module
from infoq_fx.tolerance import steps as steps_module
from infoq_fx.tolerance.float_activations import has_free_floats
from infoq_fx.tolerance.measurement import Validation
from infoq_fx.types import Score

pytestmark = pytest.mark.usefixtures("free_unpacking")
NEEDED = "head.input"


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(5)
    return infoq_fx.prepare(randomise_norms(ResidualNet()).eval(), torch.randn(32, 1, 8, 8), activation_bits=(8, 16))


def make_search(prepared, tolerance, lost_by):
    """Scores of activations say that only one needs float; ``lost_by`` is what each loses at 8 bits in truth."""
    table = infoq_fx.score(
        infoq_fx.prepare(ResidualNet().eval(), torch.randn(32, 1, 8, 8)), criterion="weight_mse", progress=False
    )
    scores = dict(table.scores)
    for site in prepared.inventory.sites:
        if site.kind == "activation" and len(site.bits) > 1:
            scores[site.name] = {8: Score(lost_by.get(site.name, 0.0)), 16: Score(0.0)}
    held = read_data(torch.zeros(16, 1, 8, 8)).named(prepared.input_names)
    return steps_module.Search(
        validation=Validation(prepared, held, tolerance),
        table=replace(table, inventory=prepared.inventory, scores=scores),
        data=held,
        steps=(),
        candidates=None,
        alpha=1.0,
        pin={},
        refine=False,
        resources=Resources(progress=False),
    )


@pytest.fixture
def truth(monkeypatch):
    """What an allocation loses: of its weights, and of each activation at 8 bits."""
    lost_by = {}

    def lose(allocation):
        weights = sum(4.0**-b for name, b in allocation.bits.items() if name.endswith("weight"))
        return weights + sum(value for name, value in lost_by.items() if allocation.bits[name] == 8)

    def measure(search, allocation, path):
        return search.validation.make_loss(lose(allocation), 0.0), search.prepared

    monkeypatch.setattr(steps_module, "_measure", measure)
    return lost_by


@pytest.mark.slow
def test_the_smallest_file_has_no_more_floats_than_it_needs(prepared, truth):
    tolerance = Tolerance(nats=0.1)
    with_all = search_module._run(make_search(prepared, tolerance, {})).allocation.cost.size_bytes
    truth[NEEDED] = 0.2  # more than may be lost
    found = search_module._run(make_search(prepared, tolerance, truth))
    floats = {name for name, bits in found.allocation.bits.items() if bits == 16}
    assert floats == {NEEDED}
    assert found.allocation.cost.size_bytes <= 1.05 * with_all
    assert found.allocation.loss.value <= 0.1 < found.allocation.loss.smaller_value
    assert len(found.steps) <= 12


@pytest.mark.parametrize(
    ("tolerance", "is_free"),
    [
        (Tolerance(nats=1.0), True),
        (Tolerance(nats=1.0, minimize="weight_bits", within=Budget(compression=4.0)), True),
        (Tolerance(nats=1.0, minimize="bitops"), False),
        (Tolerance(nats=1.0, within=Budget(bitops=1e12)), False),
        (Tolerance(nats=1.0, within=Budget(activation_bytes=1e9)), False),
    ],
    ids=str,
)
def test_floats_are_free_where_nothing_counts_them(tolerance, is_free, prepared):
    assert has_free_floats(make_search(prepared, tolerance, {})) == is_free
