"""What criteria that differentiate or train have in common."""

import math
import threading

import pytest
import torch
from differentiated import measure, prepare
from torch import nn
from torch.nn import functional

from infoq_fx.core.data import read_data
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria.literature.alps import ALPS
from infoq_fx.scoring.criteria.literature.hawq_v2 import HAWQv2
from infoq_fx.scoring.criteria.literature.limpq import LIMPQ
from infoq_fx.scoring.criteria.literature.mpqco import MPQCO
from infoq_fx.scoring.criteria.literature.ompq import OMPQ
from infoq_fx.scoring.gradients import read_labelled, shuffled_batches

QUICK = {
    "hawq_v2": HAWQv2(samples=8),
    "mpqco": MPQCO(samples=8),
    "ompq": OMPQ(samples=8),
    "limpq": LIMPQ(steps=2, batch_size=4),
    "alps": ALPS(steps=2, batch_size=4, samples=8),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(6, 18), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(self.norm(functional.scaled_dot_product_attention(q, k, v)).mean(1))


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(2)
    return prepare(Attention().eval(), torch.randn(16, 4, 6), torch.randint(0, 3, (16,)))


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_attention_is_scored(criterion, attention):
    scores = measure(criterion, *attention)
    assert set(scores) == {"qkv.weight", "head.weight"}
    assert criterion.name == "alps" or scores["qkv.weight"][2].value > scores["qkv.weight"][8].value


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.first(x).relu().reshape(4, 6))


@pytest.fixture(scope="module")
def fixed():
    torch.manual_seed(2)
    program = torch.export.export(FixedBatch().eval(), (torch.randn(4, 6),))
    return prepare(program, torch.randn(20, 6), torch.randint(0, 3, (20,)))


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_a_graph_of_fixed_batches_is_scored(criterion, fixed):
    prepared, data = fixed
    assert prepared.batch_size == 4
    scores = measure(criterion, prepared, data, batch_size=4)
    assert all(math.isfinite(score.value) for by_bits in scores.values() for score in by_bits.values())


class Branches(nn.Module):
    """A branch that carries the classes and one that carries almost nothing."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return 4 * self.used(x) + 1e-3 * self.idle(x)


@pytest.mark.parametrize("criterion", [HAWQv2(), MPQCO(), ALPS(steps=4)], ids=["hawq_v2", "mpqco", "alps"])
def test_a_layer_that_does_not_matter_scores_least(criterion):
    torch.manual_seed(4)
    model, x = Branches().eval(), torch.randn(96, 6)
    prepared, data = prepare(model, x)
    scores = measure(criterion, prepared, data)
    assert scores["idle.weight"][2].value < 0.1 * scores["used.weight"][2].value
    assert scores["used.weight"][4].value < scores["used.weight"][2].value


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_threads_and_the_global_generator_change_nothing(criterion, small):
    _, _, _, prepared, data = small
    torch.manual_seed(11)
    state = torch.get_rng_state()
    once = measure(criterion, prepared, data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    threaded = RunOptions(threads=3)
    sites = [s for s in prepared.inventory.sites if s.is_searched and s.kind in criterion.kinds and len(s.bits) > 1]
    steps = []
    measured_by = criterion.begin(prepared, data, batch_size=8, run_options=threaded)
    found = measured_by(prepared, data, sites, RunOptions(threads=3, advance=steps.append))
    assert criterion.score(prepared, found) == once
    assert sum(steps) == pytest.approx(sum(len(site.bits) for site in sites))


@pytest.mark.parametrize(
    "criteria",
    [[HAWQv2(seed=s, samples=8) for s in (0, 1)], [LIMPQ(seed=s, steps=2, batch_size=4) for s in (0, 1)],
     [ALPS(seed=s, steps=2, batch_size=4) for s in (0, 1)]],
    ids=["hawq_v2", "limpq", "alps"],
)  # fmt: skip
def test_seeds_decide(criteria, small):
    _, _, _, prepared, data = small
    first, second = (measure(criterion, prepared, data) for criterion in criteria)
    assert first != second
    assert measure(criteria[0], prepared, data) == first
    assert criteria[0].describe(prepared, data) != criteria[1].describe(prepared, data)


@pytest.mark.parametrize("criterion", QUICK.values(), ids=QUICK)
def test_no_data_is_refused(criterion, small):
    _, _, _, prepared, _ = small
    with pytest.raises(CalibrationDataError, match=criterion.name):
        criterion.begin(prepared, None, batch_size=8, run_options=RunOptions())


@pytest.mark.parametrize("name", [n for n in QUICK if n != "ompq"])
def test_labels_that_are_no_classes_are_refused(name, small):
    _, x, labels, prepared, _ = small
    data = read_data((x, labels + 7)).named(prepared.input_names)
    with pytest.raises(CalibrationDataError, match="labels range from 7"):
        QUICK[name].begin(prepared, data, batch_size=8, run_options=RunOptions())


@pytest.mark.parametrize(
    "make",
    [
        lambda: HAWQv2(probes=1),
        lambda: HAWQv2(samples=0),
        lambda: MPQCO(samples=0),
        lambda: OMPQ(samples=1),
        lambda: OMPQ(beta=-1.0),
        lambda: LIMPQ(steps=-1),
        lambda: LIMPQ(learning_rate=0.0),
        lambda: LIMPQ(initial="zeros"),
        lambda: ALPS(by="recall"),
        lambda: ALPS(learning_rate=math.inf),
    ],
)
def test_options_that_make_no_sense_are_refused(make):
    with pytest.raises(OptionError):
        make()


def test_a_training_that_diverges_says_so(small):
    _, _, _, prepared, data = small
    for criterion in (LIMPQ(learning_rate=1e30, steps=8), ALPS(learning_rate=1e30)):
        with pytest.raises(OptionError, match="lower it"):
            criterion.begin(prepared, data, batch_size=8, run_options=RunOptions())


@pytest.mark.parametrize("criterion", [LIMPQ(steps=10**7), ALPS(steps=10**7)], ids=["limpq", "alps"])
def test_stop_ends_a_training(criterion, small):
    _, _, _, prepared, data = small
    run_options = RunOptions()
    timer = threading.Timer(0.3, run_options.stop.set)
    timer.start()
    criterion.begin(prepared, data, batch_size=8, run_options=run_options)
    timer.join()


def test_without_labels_the_models_own_predictions_serve(small):
    model, x, _, prepared, _ = small
    data = read_data(x).named(prepared.input_names)
    chosen = read_labelled("mpqco", prepared, data, 6, batch_size=8, run_options=RunOptions())
    rows = torch.arange(6) * 24 // 6
    assert torch.equal(chosen.inputs[prepared.input_names[0]], x[rows])
    assert torch.equal(chosen.labels, model(x[rows]).argmax(1))


def test_batches_are_whole_and_every_epoch_has_another_order():
    batches = shuffled_batches(10, 4, torch.Generator().manual_seed(0))
    rows = [next(batches) for _ in range(4)]
    assert all(len(r) == 4 for r in rows)
    assert len(set(torch.cat(rows[:2]).tolist())) == len(set(torch.cat(rows[2:]).tolist())) == 8
    assert not torch.equal(torch.cat(rows[:2]), torch.cat(rows[2:]))


@pytest.mark.parametrize("name", ["hawq_v2", "limpq", "alps"])
def test_little_memory_changes_no_more_than_the_order_of_sums(name, small):
    _, _, _, prepared, data = small
    whole, in_parts = (
        measure(QUICK[name], prepared, data, begin_options=RunOptions(gradient_bytes=most)) for most in (1 << 30, 1)
    )
    for site, by_bits in whole.items():
        for bits, score in by_bits.items():
            assert in_parts[site][bits].value == pytest.approx(score.value, rel=1e-3, abs=1e-6)
