"""Chooses bit-widths by scores of single sites and of pairs: a quadratic program of 0-1 choices.

A local search finds the result; it is exact for small programs, which HiGHS solves as a linear program of products.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from infoq_fx.allocation.integer_program import solve_with_highs
from infoq_fx.allocation.lagrangian_bound import CandidateScores
from infoq_fx.table import PairScores
from infoq_fx.types import MAX_BITS, Budget, Inventory

__all__ = ["join_pairs", "minimize_pairs", "total_of_pairs"]

_MOST_PRODUCTS = 600
_SCALE = 1e5  # of the objective, so that the solver's absolute tolerances are small
_KICKS, _KICKED = 40, 3
_GAIN = 1e-12  # relative, that a step must have
_LOGGER = logging.getLogger(__name__)

_Bits: TypeAlias = dict[str, int]
_Doubles: TypeAlias = NDArray[np.float64]
_Picks: TypeAlias = NDArray[np.int64]


def minimize_pairs(
    inventory: Inventory,
    budget: Budget,
    scores: CandidateScores,
    pairs: PairScores,
    known: Iterable[_Bits],
    fits: Callable[[_Bits], bool],
) -> _Bits:
    """Return one candidate per site with the least total of single scores and pairs within every limit.

    The local search changes one or two sites at a time, as long as the total falls, from every known allocation and
    from random changes of the best one. Where sites with several candidates have at most 600 products of candidates,
    the result is exact.

    Args:
        inventory: of the prepared model.
        budget: the limits.
        scores: of every candidate; of a tie only its first site, see :func:`join_pairs`.
        pairs: by two sites of ``scores`` and their bits; missing ones are 0.
        known: allocations within the limits.
        fits: whether an allocation is within the limits.
    """
    form = _read_form(scores, pairs)
    found = [_descend(form, form.read(bits), fits) for bits in known]
    best = min(found, key=form.total)
    generator = random.Random(0)
    for _ in range(_KICKS):
        tried = _descend(form, _kick(form, best, fits, generator), fits)
        if form.total(tried) < form.total(best) - _GAIN * abs(form.total(best)):
            best = tried
    bits = form.bits(best)
    if 0 < form.products <= _MOST_PRODUCTS:
        unit = _SCALE / max(abs(form.total(best)), 1e-30)
        scaled = {name: {b: unit * value for b, value in by_bits.items()} for name, by_bits in scores.items()}
        both = {pair: {b: unit * value for b, value in by_bits.items()} for pair, by_bits in pairs.items()}
        exact = solve_with_highs(inventory, budget, scaled, both)
        if exact is not None and form.total(form.read(exact)) < form.total(best):
            _LOGGER.debug("the local search missed the best allocation by pairs of sites")
            bits = exact
    return _spend(form, bits, fits)


def total_of_pairs(pairs: PairScores, bits: Mapping[str, int]) -> float:
    """Return the sum of the pairs' scores at the bits of all sites."""
    return math.fsum(by_bits.get((bits[i], bits[j]), 0.0) for (i, j), by_bits in pairs.items())


def join_pairs(
    leaders: Mapping[str, str], scores: CandidateScores, pairs: PairScores
) -> tuple[dict[str, dict[int, float]], dict[tuple[str, str], dict[tuple[int, int], float]]]:
    """Return single scores and pairs of the first sites of all ties, with the pairs within a tie among the former.

    Args:
        leaders: the first site of the tie of every site.
        scores: single scores, already summed over ties.
        pairs: of all sites.
    """
    single = {name: dict(by_bits) for name, by_bits in scores.items()}
    joined: dict[tuple[str, str], defaultdict[tuple[int, int], float]] = {}
    for (left, right), by_bits in pairs.items():
        i, j = leaders[left], leaders[right]
        for (a, b), value in by_bits.items():
            if a not in single[i] or b not in single[j]:
                continue
            if i == j:
                single[i][a] += value if a == b else 0.0
            elif (j, i) in joined:
                joined[j, i][b, a] += value
            else:
                joined.setdefault((i, j), defaultdict(float))[a, b] += value
    return single, {pair: dict(by_bits) for pair, by_bits in joined.items()}


@dataclass(frozen=True)
class _Form:
    """The program in arrays: every (site, bits) is an option; picks are the options of all sites, in order."""

    names: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    site_of: _Picks  # [options]
    single: _Doubles  # [options]
    cross: _Doubles  # [options, options], symmetric

    @property
    def products(self) -> int:
        """Number of products of candidates of two sites that have several."""
        counts = np.bincount(self.site_of)
        counts = counts[counts > 1]
        return int(counts.sum() ** 2 - (counts**2).sum()) // 2

    def read(self, bits: Mapping[str, int]) -> _Picks:
        index = {option: number for number, option in enumerate(self.options)}
        return np.array([index[name, bits[name]] for name in self.names])

    def bits(self, picks: _Picks) -> _Bits:
        return dict(self.options[pick] for pick in picks)

    def total(self, picks: _Picks) -> float:
        return float(self.single[picks].sum() + self.cross[np.ix_(picks, picks)].sum() / 2)

    def changes(self, picks: _Picks) -> _Doubles:
        """The change of the total with every two options in place of their sites' picks, ``[options, options]``.

        Infinite for two options of one site, unless they are the same.
        """
        field = self.single + self.cross[:, picks].sum(1)
        now = picks[self.site_of]
        alone = field - field[now]
        cross = self.cross
        both = cross - cross[now] - cross[:, now] + cross[np.ix_(now, now)]
        change = alone[:, None] + alone[None, :] + both
        same = self.site_of[:, None] == self.site_of[None, :]
        return np.where(same, np.where(np.eye(len(now), dtype=bool), alone[:, None], np.inf), change)


def _read_form(scores: CandidateScores, pairs: PairScores) -> _Form:
    options = tuple((name, bits) for name, by_bits in scores.items() for bits in by_bits)
    index, names = {option: number for number, option in enumerate(options)}, tuple(scores)
    place = {name: number for number, name in enumerate(names)}
    cross = np.zeros((len(options), len(options)))
    for (i, j), by_bits in pairs.items():
        for (a, b), value in by_bits.items():
            if (i, a) in index and (j, b) in index:
                left, right = index[i, a], index[j, b]
                cross[left, right] += value
                cross[right, left] += value
    single = np.array([scores[name][bits] for name, bits in options])
    return _Form(names, options, np.array([place[name] for name, _ in options]), single, cross)


def _descend(form: _Form, picks: _Picks, fits: Callable[[_Bits], bool]) -> _Picks:
    """Take the best change of one or two sites that fits, until none lowers the total."""
    while True:
        changes = np.triu(form.changes(picks))
        least = -_GAIN * max(abs(form.total(picks)), 1e-30)
        rows, columns = np.nonzero(changes < least)
        for which in np.argsort(changes[rows, columns], kind="stable"):
            tried = _with(form, picks, (int(rows[which]), int(columns[which])))
            if fits(form.bits(tried)):
                picks = tried
                break
        else:
            return picks


def _spend(form: _Form, bits: _Bits, fits: Callable[[_Bits], bool]) -> _Bits:
    """Raise bit-widths that cost nothing as far as the budget reaches, the lowest first, but not to float."""
    for name in sorted(form.names, key=lambda name: bits[name]):
        widths = [b for n, b in form.options if n == name and bits[name] < b <= MAX_BITS]
        for wider in sorted(widths, reverse=True):
            tried = {**bits, name: wider}
            if form.total(form.read(tried)) <= form.total(form.read(bits)) and fits(tried):
                bits = tried
                break
    return bits


def _kick(form: _Form, picks: _Picks, fits: Callable[[_Bits], bool], generator: random.Random) -> _Picks:
    """A few random changes of two sites that fit."""
    done = 0
    for _ in range(20 * _KICKED):
        options = generator.randrange(len(form.options)), generator.randrange(len(form.options))
        tried = _with(form, picks, options)
        if form.site_of[options[0]] != form.site_of[options[1]] and fits(form.bits(tried)):
            picks, done = tried, done + 1
        if done == _KICKED:
            break
    return picks


def _with(form: _Form, picks: _Picks, options: tuple[int, ...]) -> _Picks:
    changed = picks.copy()
    for option in options:
        changed[form.site_of[option]] = option
    return changed
