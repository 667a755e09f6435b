"""Turns noisy measurements of a few bit-widths into scores of all: what is known of rounding noise fills the gaps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infoq_fx.types import BASELINE_BITS, FLOAT16_BITS, Score

__all__ = ["Evidence", "Noise", "follow_law", "shrink_losses"]

_LAW_SPREAD = 0.7  # of the loss with one more bit around the law, relative; its mean is about a quarter
_PAIRS_SPREAD = 0.5  # of a loss around that over pairs, relative
_SMALLEST_SHARE = 0.05
_NOTHING_NATS = 1e-12
_ROUND_OFF, _LEAST_SHARE_OF_LAW = 1e-6, 0.1
_CERTAIN = 3.0  # standard errors
_FARTHEST = 8.0  # standard errors below zero

_Losses = dict[int, Score]
Noise = Mapping[int, float]
"""Power of a site's rounding error by bit-width, relative to that of its values."""


@dataclass(frozen=True)
class Evidence:
    """The loss of one (site, bit-width) in nats as measured, and over pairs, where that was measured too."""

    loss: Score
    over_pairs: Score | None = None


def shrink_losses(
    measured: Mapping[str, Mapping[int, Evidence]],
    candidates: Mapping[str, Sequence[int]],
    noise: Mapping[str, Noise] | None = None,
) -> dict[str, _Losses]:
    """Estimate the loss of every site at all its candidate bit-widths.

    A loss is the mean of a few large values and many small ones: some samples are near a decision, most are not. Over
    pairs, every sample's change meets the decisions of all samples; this mean has a tenth of the noise, but no longer
    knows that some changes are larger where decisions are near. It is scaled by the ratio that the sums over all sites
    have at a bit-width, and the measured loss is shrunk towards it, according to its standard error. That error is at
    least the sites' median, relative to the loss over pairs: the error of a heavy tail looks small where the sample
    missed the tail.

    The loss is of second order in the rounding error, so that it follows the error's power. That of an activation is
    known from calibration: it falls to a quarter with each bit only where nothing is clipped, and much more slowly
    where a tensor has outliers, whose range few bits give up. That of a weight is taken as 4^-b: recovery changes it
    anyway. Losses of a site at two bit-widths and more are therefore moved half way, on a logarithmic scale, to the law
    through them. Without pairs, every loss is shrunk towards the prediction from the bit-width below. Bit-widths that
    were not measured follow the law; losses do not rise with the bits; at 8 bits nothing is lost.

    With 16 bits among the candidates the loss at 8 bits is what leaving the site in float recovers, and is part of the
    losses at fewer bits. It is 0 unless the measured value is above three standard errors: integer kernels are not
    given up on a guess.

    Args:
        measured: by site and bit-width.
        candidates: bit-widths by site; those below the least that was measured get no loss.
        noise: power of the rounding error by site and bit-width, in any unit; 4^-b for sites without it.
    """
    scales, losses = _fit_scales(measured), {}
    for site, found in measured.items():
        below = {bits: evidence for bits, evidence in sorted(found.items()) if bits <= BASELINE_BITS}
        integers = [bits for bits in candidates.get(site, ()) if bits <= BASELINE_BITS]
        known = (noise or {}).get(site, {})
        losses[site] = _fill(_shrink_site(below, scales, known), integers, known)
        if FLOAT16_BITS in found:
            losses[site] = _count_from_float(losses[site], found[FLOAT16_BITS].loss)
    return losses


def follow_law(loss: float, measured_bits: int, bits: int, noise: Noise | None = None) -> float:
    """Predict a loss at more bits from that at fewer: both are as the power of the error beyond that at 8 bits."""
    return loss * _excess_noise(bits, noise or {}) / _excess_noise(measured_bits, noise or {})


def _excess_noise(bits: int, noise: Noise) -> float:
    """Power of the rounding error beyond that at 8 bits, positive; the law of 4^-b where it is not known.

    It is taken to be at least a tenth of what that law makes of the power at the fewest bits: integers, which a few
    bits hold exactly, leave nothing but round-off.
    """
    base, law = noise.get(BASELINE_BITS, 0.0), 4.0**-bits - 4.0**-BASELINE_BITS
    known = {width: power - base for width, power in noise.items() if width < BASELINE_BITS}
    fewest = min(known, default=BASELINE_BITS)
    if bits not in known or known[fewest] <= _ROUND_OFF * noise[fewest]:
        return law
    least = _LEAST_SHARE_OF_LAW * known[fewest] * law / (4.0**-fewest - 4.0**-BASELINE_BITS)
    return max(least, min(power for width, power in known.items() if width <= bits))


@dataclass(frozen=True)
class _Scale:
    """What the loss over pairs is multiplied by, and the sites' median error relative to it."""

    factor: float
    relative_error: float


def _fit_scales(measured: Mapping[str, Mapping[int, Evidence]]) -> dict[int, _Scale]:
    pairs: dict[int, list[tuple[Score, Score]]] = {}
    for found in measured.values():
        for bits, evidence in found.items():
            if evidence.over_pairs is not None and bits < BASELINE_BITS:
                pairs.setdefault(bits, []).append((evidence.loss, evidence.over_pairs))
    scales = {}
    for bits, known in pairs.items():
        over_pairs = [_positive_mean(x.value, x.standard_error) for _, x in known]
        total = max(math.fsum(over_pairs), _NOTHING_NATS)
        ratio = math.fsum(loss.value for loss, _ in known) / total
        doubt = math.sqrt(math.fsum(loss.standard_error**2 for loss, _ in known)) / total
        factor = max((ratio + doubt**2) / (1 + doubt**2), _SMALLEST_SHARE)  # 1 +- 1 before it was measured
        errors = [loss.standard_error / max(x, _NOTHING_NATS) for (loss, _), x in zip(known, over_pairs, strict=True)]
        scales[bits] = _Scale(factor, statistics.median(errors))
    return scales


def _shrink_site(found: Mapping[int, Evidence], scales: Mapping[int, _Scale], noise: Noise) -> _Losses:
    """The losses of one site by ascending bit-width."""
    losses: _Losses = {}
    below: int | None = None
    for bits, evidence in found.items():
        loss, over_pairs = evidence.loss, evidence.over_pairs
        if bits >= BASELINE_BITS:
            losses[bits] = Score(0.0)
        elif over_pairs is not None:
            mean, scale = _positive_mean(over_pairs.value, over_pairs.standard_error), scales[bits]
            error = max(loss.standard_error, scale.relative_error * mean)
            losses[bits] = _update(scale.factor * mean, _PAIRS_SPREAD, Score(loss.value, error))
        elif below is None:
            losses[bits] = Score(_positive_mean(loss.value, loss.standard_error), loss.standard_error)
        else:
            losses[bits] = _update(follow_law(losses[below].value, below, bits, noise), _LAW_SPREAD, loss)
        below = bits
    if any(evidence.over_pairs is not None for evidence in found.values()):
        losses = _move_to_law(losses, noise)
    return _without_rises(losses)


def _move_to_law(losses: _Losses, noise: Noise) -> _Losses:
    known = {bits: x for bits, x in losses.items() if bits < BASELINE_BITS and x.value > _NOTHING_NATS}
    if len(known) < 2:
        return losses
    first = min(known)
    law = {bits: follow_law(1.0, first, bits, noise) for bits in known}
    level = math.fsum(math.log(x.value / law[bits]) for bits, x in known.items()) / len(known)
    moved = {
        bits: Score(math.sqrt(x.value * math.exp(level) * law[bits]), x.standard_error) for bits, x in known.items()
    }
    return {bits: moved.get(bits, x) for bits, x in losses.items()}


def _without_rises(losses: _Losses) -> _Losses:
    least, found = math.inf, {}
    for bits, x in losses.items():
        least = min(least, x.value)
        found[bits] = Score(least, x.standard_error)
    return found


def _fill(losses: _Losses, candidates: Sequence[int], noise: Noise) -> _Losses:
    """The losses with those of candidates that were not measured, by the law from the nearest one below."""
    filled = dict(losses)
    for bits in sorted(set(candidates) - set(losses)):
        below = max((known for known in losses if known < bits), default=None)
        if bits >= BASELINE_BITS:
            filled[bits] = Score(0.0)
        elif below is not None:
            value = follow_law(losses[below].value, below, bits, noise)
            filled[bits] = Score(value, _LAW_SPREAD * value)
    return _without_rises(dict(sorted(filled.items())))


def _count_from_float(losses: _Losses, change: Score) -> _Losses:
    """Losses beyond those in float, from losses beyond those at 8 bits and the change from 8 bits to float."""
    lost, error = -change.value, change.standard_error
    if lost <= _CERTAIN * error:
        lost = error = 0.0
    beyond = {bits: Score(x.value + lost, math.hypot(x.standard_error, error)) for bits, x in losses.items()}
    return {**beyond, FLOAT16_BITS: Score(0.0)}


def _positive_mean(value: float, standard_error: float) -> float:
    """The mean of a loss that is known to be positive, measured as ``value`` with a normal error.

    It is the value itself where that is well above its error, and of the size of the error where the measurement says
    nothing: a site is not insensitive for want of evidence.
    """
    if standard_error <= 0:
        return max(value, 0.0)
    ratio = value / standard_error
    if ratio < -_FARTHEST:  # a normal tail: the mean is about the error over the distance
        return standard_error / -ratio
    hazard = math.exp(-ratio * ratio / 2) / math.sqrt(2 * math.pi) / (0.5 * math.erfc(-ratio / math.sqrt(2)))
    return value + standard_error * hazard


def _update(expected: float, spread: float, found: Score) -> Score:
    """The mean of the posterior, with a normal prior of mean ``expected`` and a relative ``spread``, and its error."""
    if expected < _NOTHING_NATS:
        return Score(expected, found.standard_error)
    prior = (spread * expected) ** -2
    data = max(found.standard_error, _NOTHING_NATS) ** -2
    value = (data * found.value + prior * expected) / (data + prior)
    return Score(max(value, _SMALLEST_SHARE * expected), (data + prior) ** -0.5)
