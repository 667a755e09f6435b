import numpy as np
import pytest
import torch

import infoq_fx
from infoq_fx.allocation.solver import propose
from infoq_fx.types import Score


@pytest.fixture(scope="module")
def prepared_and_data():
    from networks import ResidualNet, randomise_norms

    torch.manual_seed(3)
    model = randomise_norms(ResidualNet()).eval()
    images = torch.randn(80, 1, 8, 8)
    return infoq_fx.prepare(model, images, bits=(2, 3, 4, 8), outputs="categorical"), model, images


def random_table(prepared, seed):
    """Scores that know nothing of the model."""
    generator = np.random.default_rng(seed)
    sites = [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    scores = {s.name: {b: Score(float(generator.exponential() * 4.0 ** (5 - b))) for b in s.bits} for s in sites}
    return infoq_fx.SensitivityTable(criterion="random", inventory=prepared.inventory, scores=scores)


def lost_nats(prepared, allocation, model, images):
    """By the definition, from the converted model."""
    with torch.no_grad():
        p, q = (m(images).double().log_softmax(1) for m in (model, infoq_fx.convert(prepared, allocation)))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_best_proposal_is_taken_and_the_uniform_one_is_among_them(seed, prepared_and_data):
    prepared, model, images = prepared_and_data
    table = random_table(prepared, seed)
    errors = infoq_fx.score(prepared, criterion="weight_mse", progress=False).scores
    second = {name: {b: score.value for b, score in by_bits.items()} for name, by_bits in errors.items()}
    proposals = propose(table, 3.0, second=second)
    assert proposals[0] == infoq_fx.allocate(table, 3.0)
    uniform = {s.name: 3 if s.kind == "weight" else 8 for s in prepared.inventory.sites}
    assert any(proposal.bits == uniform for proposal in proposals)
    losses = [lost_nats(prepared, proposal, model, images) for proposal in proposals]
    chosen = infoq_fx.refine(prepared, table, 3.0, images, recovery="none")
    assert chosen.bits == proposals[int(np.argmin(losses))].bits
    assert chosen.lost_nats == pytest.approx(min(losses), rel=0.1)  # biases of the converted model are int32
    assert f"{chosen.lost_nats:.4g} nats" in infoq_fx.summarize(chosen, prepared.inventory)


def test_proposals_differ_fit_and_are_described_by_the_table(prepared_and_data):
    prepared, _, _ = prepared_and_data
    table = random_table(prepared, 7)
    proposals = propose(table, 2.6)
    assert len({tuple(sorted(p.bits.items())) for p in proposals}) == len(proposals) > 2
    for proposal in proposals:
        assert proposal.cost.weight_bits <= 2.6
        total = sum(table.scores[name][b].value for name, b in proposal.bits.items() if name in table.scores)
        assert proposal.score == pytest.approx(total)
        assert proposal.score >= proposals[0].score
        assert proposal.uniform_bits == 2


def test_pins_hold_in_every_proposal(prepared_and_data):
    prepared, _, images = prepared_and_data
    table = random_table(prepared, 8)
    assert all(p.bits["head.weight"] == 8 for p in propose(table, 4.0, pin={"head.weight": 8}))
    assert infoq_fx.refine(prepared, table, 4.0, images, pin={"head.weight": 8}).bits["head.weight"] == 8


def test_errors_come_before_anything_runs(prepared_and_data):
    prepared, _, images = prepared_and_data
    table = random_table(prepared, 9)
    with pytest.raises(infoq_fx.InfeasibleBudgetError, match="smallest reachable 2"):
        infoq_fx.refine(prepared, table, 1.5, images)
    with pytest.raises(infoq_fx.CalibrationDataError, match="resize or convert"):
        infoq_fx.refine(prepared, table, 3.0, images[:, :, :, :5].double())


def test_calls_that_share_runs_choose_alike_and_run_nothing_twice(prepared_and_data, monkeypatch):
    from infoq_fx.core.data import read_data
    from infoq_fx.scoring import refinement

    prepared, _, images = prepared_and_data
    data, table = read_data(images).named(prepared.input_names), random_table(prepared, 9)
    alone = [refinement.choose_allocation(prepared, table, budget, data) for budget in (3.0, 3.0, 2.6)]
    count, measure = [], refinement.measure_lost_nats
    monkeypatch.setattr(refinement, "measure_lost_nats", lambda *a, **k: count.append(a[2]) or measure(*a, **k))
    runs = refinement.begin_runs(prepared, data, None)
    shared = [refinement.choose_allocation(prepared, table, budget, data, runs=runs) for budget in (3.0, 3.0, 2.6)]
    assert shared == alone
    assert len({frozenset(bits.items()) for bits in count}) == len(count) == len(runs.known)


def test_scores_of_other_sites_are_refused_by_name(prepared_and_data, tmp_path):
    prepared, _, images = prepared_and_data
    path = tmp_path / "table.json"
    name = next(site.name for site in prepared.inventory.sites if ".add" in site.name)
    older = name.replace(".add", ".add_55")
    path.write_text(random_table(prepared, 0).to_json().replace(f'"{name}"', f'"{older}"'))
    table = infoq_fx.SensitivityTable.load(path)
    with pytest.raises(infoq_fx.OptionError, match=f"they have {older!r} where it has {name!r}.*score the model again"):
        infoq_fx.refine(prepared, table, 3.0, images, recovery="none")
