"""Scores from noisy measurements: sure ones stand, unsure ones follow what is known of rounding noise."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infoq_fx.scoring.shrinkage import Evidence, follow_law, shrink_losses
from infoq_fx.types import Score

LOSSES = st.floats(-0.01, 20)
SCORES = st.builds(Score, LOSSES, st.floats(0, 0.1))
EVIDENCE = st.one_of(st.builds(Evidence, SCORES), st.builds(Evidence, SCORES, SCORES))


def shrink(measured, candidates=range(2, 9)):
    """Of one site without pairs."""
    evidence = {bits: Evidence(score) for bits, score in measured.items()}
    return shrink_losses({"a": evidence}, {"a": tuple(candidates)})["a"]


@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.integers(2, 8), EVIDENCE, min_size=1), min_size=1))
def test_losses_fall_with_the_bits_and_stay_finite(measured):
    found = shrink_losses(measured, dict.fromkeys(measured, tuple(range(2, 9))))
    for site, losses in found.items():
        values = [losses[bits].value for bits in sorted(losses)]
        assert all(math.isfinite(x) for x in values)
        assert all(high >= low >= 0 for high, low in itertools.pairwise(values))
        assert sorted(losses) == list(range(min(measured[site]), 9))
        assert losses[8].value == 0


@given(st.dictionaries(st.integers(2, 7), EVIDENCE, min_size=1))
def test_errors_are_not_larger_than_measured_and_sites_are_in_any_order(found):
    measured = {"a": found, "b": dict(reversed(found.items()))}
    losses = shrink_losses(measured, {})
    assert losses["a"] == losses["b"]
    for bits, evidence in found.items():
        if evidence.over_pairs is None:
            assert losses["a"][bits].standard_error <= evidence.loss.standard_error + 1e-12


def test_without_pairs_a_sure_measurement_stands_and_an_unsure_one_follows_the_law():
    sure = shrink({2: Score(4.0, 0.0), 3: Score(0.8, 1e-9), 4: Score(0.3, 1e-9)})
    assert [sure[b].value for b in (2, 3, 4)] == pytest.approx([4.0, 0.8, 0.3])
    unsure = shrink({2: Score(4.0, 0.1), 3: Score(-3.0, 1e6), 5: Score(7.0, 1e6)})
    ratio = (4.0**-3 - 4.0**-8) / (4.0**-2 - 4.0**-8)
    assert unsure[3].value == pytest.approx(4.0 * ratio)
    assert unsure[5].value == pytest.approx(follow_law(4.0, 2, 5), rel=1e-6)
    # Between the two, weights are inverse variances.
    prior, data = (0.7 * 4.0 * ratio) ** -2, 0.5**-2
    middle = shrink({2: Score(4.0, 0.1), 3: Score(1.5, 0.5)})[3]
    assert middle.value == pytest.approx((data * 1.5 + prior * 4.0 * ratio) / (data + prior))
    assert middle.standard_error == pytest.approx((data + prior) ** -0.5)


def test_losses_follow_the_power_of_the_rounding_error_where_it_is_known():
    noise = {2: 0.4, 3: 0.2, 4: 0.11, 6: 0.05, 8: 0.01}
    measured = {"a": {2: Evidence(Score(3.9, 1e-9)), 3: Evidence(Score(1.9, 1e-9))}}
    found = shrink_losses(measured, {"a": tuple(noise)}, {"a": noise})["a"]
    assert [found[bits].value for bits in noise] == pytest.approx([3.9, 1.9, 1.0, 0.4, 0.0])
    # A tensor that no bit-width rounds says nothing, and one that more bits do not help loses as much with them.
    assert shrink_losses(measured, {"a": tuple(noise)}, {"a": dict.fromkeys(noise, 0.0)}) == shrink_losses(
        measured, {"a": tuple(noise)}
    )
    flat = shrink_losses(measured, {"a": tuple(noise)}, {"a": {**noise, 4: 0.3}})["a"]
    assert flat[4].value == flat[3].value


@pytest.mark.parametrize("round_off", [-1e-15, 0.0, 1e-15])
def test_round_off_where_a_few_bits_hold_a_tensor_exactly_is_no_law(round_off):
    exact = {2: 0.02, 3: round_off, 4: round_off, 8: 0.0}
    measured = {"a": {2: Evidence(Score(0.1, 0.02), Score(0.1, 0.002)), 3: Evidence(*[Score(0.1 / 16, 0.002)] * 2)}}
    found = shrink_losses(measured, {"a": tuple(exact)}, {"a": exact})["a"]
    assert 0.05 < found[2].value < 0.2
    assert found[4].value < 0.1 / 16
    outlier = {2: 0.9, 3: 0.5, 4: 0.3, 7: 1e-3, 8: 1e-3 - round_off}  # as much at 7 bits as at 8
    found = shrink_losses(measured, {"a": tuple(outlier)}, {"a": outlier})["a"]
    assert found[4].value == pytest.approx(found[3].value * 0.299 / 0.499)


def test_with_pairs_noise_is_replaced_by_what_all_samples_show():
    truth = {"a": 0.4, "b": 0.1, "c": 0.02}
    measured = {
        site: {
            2: Evidence(Score(loss * (1 + sign), loss), Score(loss / 2, 0.01 * loss)),
            3: Evidence(Score(loss / 4 * (1 - sign), loss), Score(loss / 8, 0.01 * loss)),
        }
        for (site, loss), sign in zip(truth.items(), (0.2, -1.0, 0.9), strict=True)
    }
    found = shrink_losses(measured, dict.fromkeys(truth, (2, 3, 4, 8)))
    for site, loss in truth.items():
        # The measurements are off by their own size, and the pairs by a factor of two for all sites alike.
        assert 0.5 * loss < found[site][2].value < 2 * loss
        assert found[site][4].value == pytest.approx(follow_law(found[site][3].value, 3, 4))
    sure = shrink_losses({"a": {2: Evidence(Score(3.0, 0.0), Score(1.0, 0.0))}}, {})["a"][2]
    assert sure.value == pytest.approx(3.0)


def test_bit_widths_below_the_least_measured_have_no_loss():
    assert sorted(shrink({4: Score(1.0, 0.1)}, (2, 4, 6, 8))) == [4, 6, 8]


@given(st.dictionaries(st.integers(2, 7), EVIDENCE), SCORES)
def test_float_counts_only_where_its_gain_is_certain(below, gain):
    evidence = {**below, 16: Evidence(Score(-gain.value, gain.standard_error))}
    found = shrink_losses({"a": evidence}, {"a": (*range(2, 9), 16)})["a"]
    plain = shrink_losses({"a": below}, {"a": tuple(range(2, 9))}).get("a", {})
    level = gain.value if gain.value > 3 * gain.standard_error else 0.0
    assert found[16] == Score(0.0)
    assert found[8].value == pytest.approx(level)
    for bits, loss in plain.items():
        assert found[bits].value == pytest.approx(loss.value + level)
