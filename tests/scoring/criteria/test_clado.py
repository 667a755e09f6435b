import numpy as np
import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.runtime.forward import RunOptions, hold_float_outputs, measure_lost_nats
from infoq_fx.runtime.held_outputs import HeldLoss, make_loss
from infoq_fx.scoring.criteria.literature.clado import CLADO, count_runs
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity

QUIET = Resources(progress=False)


class TwoHeads(nn.Module):
    """The first head is reached by the trunk alone, and the second by a layer that comes after the first head."""

    def __init__(self):
        super().__init__()
        self.trunk, self.first = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)
        self.side, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 5)

    def forward(self, x):
        x = self.trunk(x).relu()
        return self.first(x.flatten(1)), self.second(self.side(x).relu().flatten(1))


def build(model, size, samples=70):
    torch.manual_seed(1)
    images = torch.randn(samples, 1, size, size)
    prepared = infoq_fx.prepare(model.eval(), images, bits=(2, 3, 8), outputs="categorical")
    return prepared, read_data(images).named(prepared.input_names)


@pytest.fixture(scope="module", params=["residual", "two heads"])
def case(request):
    torch.manual_seed(4)
    return build(randomise_norms(ResidualNet()), 8) if request.param == "residual" else build(TwoHeads(), 6)


@pytest.mark.slow
def test_pairs_are_those_of_whole_runs(case):
    prepared, data = case
    criterion = CLADO(is_projected=False)
    table, _ = measure_sensitivity(prepared, data, criterion, QUIET)
    reference = hold_float_outputs(prepared, data, batch_size=32)
    loss = HeldLoss(reference, make_loss(prepared, reference))

    def lost(bits):
        options = {"batch_size": 32, "run_options": RunOptions()}
        return float(measure_lost_nats(prepared, data, bits, loss, **options).mean())

    base = lost({})
    assert len(table.pairs) == len(table.scores) * (len(table.scores) - 1) // 2
    for (i, j), by_bits in table.pairs.items():
        for (a, b), found in by_bits.items():
            alone = lost({i: a}), lost({j: b})
            assert table.scores[i][a].value == pytest.approx(max(0.0, alone[0] - base), abs=1e-9)
            assert found == pytest.approx(lost({i: a, j: b}) - sum(alone) + base, abs=1e-9)
    assert count_runs(prepared) == 2 * len(table.scores) + 4 * len(table.pairs)


def test_the_form_has_no_negative_eigenvalues_and_is_the_nearest_such(case):
    prepared, data = case
    raw, found = (measure_sensitivity(prepared, data, CLADO(is_projected=p), QUIET)[0] for p in (False, True))

    def form(table):
        runs = [(site, bits) for site, by_bits in table.scores.items() for bits in by_bits if bits < 8]
        matrix = np.diag([2 * table.scores[site][bits].value for site, bits in runs])
        for row, (i, a) in enumerate(runs):
            for column, (j, b) in enumerate(runs):
                matrix[row, column] += table.pairs.get((i, j), {}).get((a, b), 0.0)
                matrix[row, column] += table.pairs.get((j, i), {}).get((b, a), 0.0)
        return matrix

    # The residual network's form is indefinite, that of the two heads is positive already.
    assert (np.linalg.eigvalsh(form(raw)).min() < -1e-6) == (len(raw.scores) != 4)
    # The two candidates of a site have no term in common: neither the allocation nor the table knows one.
    values, vectors = np.linalg.eigh(form(raw))
    nearest = (vectors * values.clip(0)) @ vectors.T
    width = np.arange(len(nearest)) // 2
    nearest[(width[:, None] == width[None, :]) & ~np.eye(len(nearest), dtype=bool)] = 0
    np.testing.assert_allclose(form(found), nearest, atol=1e-7)


def test_too_many_pairs_are_refused_before_anything_is_run(case):
    prepared, data = case
    with pytest.raises(OptionError, match=rf"{count_runs(prepared)} times.*at most 10 are allowed: give fewer bits=.*"):
        measure_sensitivity(prepared, data, CLADO(most_runs=10), QUIET)


@pytest.mark.slow
def test_a_resumed_run_rounds_all_weights_and_finds_the_same(tmp_path):
    torch.manual_seed(4)
    prepared, data = build(randomise_norms(ResidualNet()), 8, samples=40)
    options = {"criterion": CLADO(), "progress": False, "cache_dir": tmp_path}
    whole = infoq_fx.score(prepared, data, **options)
    assert whole.settings["recovery"] == "second_order_rounding"
    kept = sorted(path for path in tmp_path.rglob("*.json") if path.name != "about.json")
    for path in kept[::2]:
        path.unlink()
    again = infoq_fx.score(prepared, data, **options)
    assert again == whole
    allocation = infoq_fx.allocate(again, 3.0)
    assert allocation.criterion == "clado"
    assert allocation.cost.weight_bits <= 3.0
