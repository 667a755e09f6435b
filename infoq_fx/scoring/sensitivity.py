"""Scores all sites at all bit-widths into a sensitivity table, with a cache, workers and a memory limit."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import available_memory_bytes
from infoq_fx.core.option_checks import check_memory_limit
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.forward import (
    RunOptions,
    bytes_per_sample,
    choose_gradient_bytes,
    choose_perturbed_batch_size,
)
from infoq_fx.scoring.cache import MeasurementCache
from infoq_fx.scoring.criteria import AnyCriterion, find_criterion
from infoq_fx.scoring.criterion import Criterion, Measure
from infoq_fx.scoring.workers import count_workers, map_blocks, pack_job
from infoq_fx.table import SensitivityTable
from infoq_fx.types import BASELINE_BITS, FLOAT16_BITS, Measurement, Plain, QuantSite

__all__ = ["Resources", "describe_measurements", "measure_sensitivity", "runs_weights"]

_BLOCK_RUNS = 128  # runs that an interrupt may lose; each block runs a part of the baseline again
_WORKER_BLOCK_RUNS = 16
_MEMORY_SHARE = 0.5
_SMALLEST_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of scoring: workers, cache, memory and progress bar; none of them changes a score.

    Args:
        executor: any ``concurrent.futures.Executor``: blocks of sites are scored by its workers. None scores in this
            process, in as many threads as torch has. The executor is not shut down.
        cache_dir: folder where every (site, bit-width) is stored as soon as it is measured; a later run reuses
            measurements of the same weights, graph, data and settings by the same version, and measures the rest.
        memory_limit: bytes that one process may take for scoring, above model and data; None for half of the
            available memory (divided by the workers of a local executor).
        progress: show a progress bar over (site, bit-width) on standard error.
    """

    executor: Executor | None = None
    cache_dir: str | os.PathLike[str] | None = None
    memory_limit: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_memory_limit(self.memory_limit)
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise OptionError(
                f"executor is a {type(self.executor).__name__}; give a concurrent.futures.Executor, such as "
                "ProcessPoolExecutor(4) or a Dask client's get_executor()"
            )


def measure_sensitivity(
    prepared: PreparedModel,
    data: CalibrationData | None,
    criterion: AnyCriterion,
    resources: Resources | None = None,
    candidates: Candidates | None = None,
) -> tuple[SensitivityTable, list[Measurement]]:
    """Score every searched site at every candidate bit-width.

    After an interrupt (Ctrl-C) or an error, finished measurements are kept in ``cache_dir``, or in a new folder that
    the message names; the same call with that ``cache_dir`` resumes from there.

    Args:
        prepared: calibrated.
        data: by the model's input names, on the model's device; None for a criterion that needs none.
        criterion: a registered name, an object or a function.
        resources: workers, cache, memory and progress.
        candidates: rounded weights to measure with, if the criterion runs them; None for rounding to nearest.

    Returns:
        The table, and the criterion's measurements behind it.

    Raises:
        OptionError: the criterion is unknown, or the resources cannot be used.
        CalibrationDataError: the criterion needs data and there is none.
        KeyboardInterrupt: interrupted; the message says how to resume.
    """
    found, given = find_criterion(criterion), resources or Resources()
    if found.needs_data and data is None:
        raise CalibrationDataError(f"criterion {found.name!r} needs calibration data; give some, or take 'weight_mse'")
    sites = [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    for site in sites:
        if site.kind not in found.kinds:
            raise OptionError(
                f"criterion {found.name!r} scores no {site.kind}s, and {site.name!r} is searched over {site.bits}: fix "
                f"{site.kind}s at one bit-width, or take a criterion such as 'infoq' that scores both"
            )
        if max(site.bits) == FLOAT16_BITS and not getattr(found, "scores_float", False):
            raise OptionError(
                f"criterion {found.name!r} scores no tensors in float, and {site.name!r} is searched over {site.bits}: "
                "take 'infoq', or leave 16 out of the bit-widths"
            )
    choose = getattr(found, "choose_bits", None)
    if choose is not None:
        sites = [replace(site, bits=choose(site)) for site in sites]
    if data is not None:
        count = getattr(found, "choose_samples", None)
        most = getattr(found, "samples", None) if count is None else count(prepared, sites, data.samples)
        data = data if most is None else _take_samples(prepared, data, most, found.name)
    limit = _choose_memory_limit(given)
    batch_size = choose_perturbed_batch_size(prepared, limit)
    candidates = candidates if runs_weights(found) else None
    described = describe_measurements(found, prepared, data, candidates)
    settings = {"criterion": found.name, **described}
    key = digest_run(prepared, data, described, batch_size=batch_size)
    folder = None if given.cache_dir is None else Path(given.cache_dir)
    cache = MeasurementCache(folder, key, {q.site.name: q for _, q in prepared.quantizer_nodes()})
    cache.describe(settings)
    measured = {(m.site, m.bits): m for m in cache.load(sites)}
    missing = _without(sites, measured)
    form = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    total, title = sum(len(site.bits) for site in sites), f"scoring ({found.name})"
    with tqdm(
        total=total,
        initial=len(measured),
        disable=not given.progress,
        desc=title,
        unit="bit-width",
        bar_format=form,
    ) as bar:
        finished = _Finished(measured, cache, bar)
        with finished.kept(total):
            if missing:
                if candidates is not None:
                    bar.set_description("rounding weights")
                    also = sites if getattr(found, "runs_pairs", False) else missing
                    prepared = _round(candidates, also, prepared)
                    bar.set_description(title)
                _measure(prepared, data, found, missing, given, limit, batch_size, finished)
    ordered = [measured[site.name, bits] for site in sites for bits in site.bits if (site.name, bits) in measured]
    score_pairs = getattr(found, "score_pairs", None)
    table = SensitivityTable(
        criterion=found.name,
        inventory=prepared.inventory,
        scores=found.score(prepared, ordered),
        settings={
            **settings,
            **_name_recovery(found, data, candidates),
            "samples": None if data is None else data.samples,
            "outputs": "; ".join(prepared.output_notes),
        },
        pairs={} if score_pairs is None else score_pairs(prepared, ordered),
    )
    return table, ordered


def describe_measurements(
    criterion: Criterion,
    prepared: PreparedModel,
    data: CalibrationData | None,
    candidates: Candidates | None = None,
) -> dict[str, Plain]:
    """Return the settings that determine a criterion's measurements, without its name if it gives ``"measure"``."""
    with one_torch_thread():
        described = dict(criterion.describe(prepared, data))
    if candidates is not None and runs_weights(criterion):
        described |= candidates.describe()
    return described if "measure" in described else {"criterion": criterion.name, **described}


def _name_recovery(
    criterion: Criterion, data: CalibrationData | None, candidates: Candidates | None
) -> dict[str, Plain]:
    """The setting that says which recovery the scores are for, of criteria that run rounded weights."""
    if data is None or not runs_weights(criterion):
        return {}
    return {"recovery": "none" if candidates is None else candidates.recovery}


def runs_weights(criterion: Criterion) -> bool:
    """Return whether a criterion runs the model with weights at candidate bit-widths."""
    return bool(getattr(criterion, "runs_weights", False))


def _round(candidates: Candidates, sites: Sequence[QuantSite], prepared: PreparedModel) -> PreparedModel:
    is_on_cpu = prepared.device.type == "cpu"
    with one_torch_thread() as threads:
        return candidates.round(sites, RunOptions(threads=threads if is_on_cpu else 1))


def _take_samples(prepared: PreparedModel, data: CalibrationData, most: int, name: str) -> CalibrationData:
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise OptionError(f"criterion {name!r} has samples={most!r}; give a number of at least 1, or None for all")
    taken = data.spread(most)
    return taken.take(taken.samples - taken.samples % (prepared.batch_size or 1) or (prepared.batch_size or 1))


def _choose_memory_limit(resources: Resources) -> int:
    if resources.memory_limit is not None:
        return resources.memory_limit
    workers = 1 if resources.executor is None else count_workers(resources.executor) or 1
    return max(_SMALLEST_LIMIT_BYTES, int(_MEMORY_SHARE * available_memory_bytes()) // workers)


def _without(sites: Sequence[QuantSite], measured: Mapping[tuple[str, int], Measurement]) -> list[QuantSite]:
    """The sites with only those candidates that are not measured yet."""
    left = [replace(s, bits=tuple(bits for bits in s.bits if (s.name, bits) not in measured)) for s in sites]
    return [site for site in left if site.bits]


def _measure(
    prepared: PreparedModel,
    data: CalibrationData | None,
    criterion: Criterion,
    sites: Sequence[QuantSite],
    resources: Resources,
    limit: int,
    batch_size: int,
    finished: _Finished,
) -> None:
    with one_torch_thread() as threads:
        threads = threads if prepared.device.type == "cpu" else 1
        run_options = RunOptions(threads=threads, gradient_bytes=choose_gradient_bytes(limit, prepared.device))
        measure = criterion.begin(prepared, data, batch_size=batch_size, run_options=run_options)
        room = limit - batch_size * bytes_per_sample(prepared)
        most = _BLOCK_RUNS if resources.executor is None else _WORKER_BLOCK_RUNS
        blocks = _cut_blocks(sites, measure, max(0, room), most)
        here = functools.partial(_measure_here, prepared, data, measure, threads=threads, finished=finished)
        if resources.executor is None:
            for local in blocks:
                here(local)
            return
        workers = count_workers(resources.executor)
        share = max(1, (os.cpu_count() or 1) // workers) if workers else 1
        with pack_job(prepared, data, measure) as job:
            for block, found in map_blocks(resources.executor, job, blocks, share):
                if found is None:
                    here(block)
                else:
                    finished.add(found)


def _measure_here(
    prepared: PreparedModel,
    data: CalibrationData | None,
    measure: Measure,
    block: Sequence[QuantSite],
    *,
    threads: int,
    finished: _Finished,
) -> None:
    finished.add(measure(prepared, data, block, RunOptions(threads=threads, advance=finished.advance)))


def _cut_blocks(sites: Sequence[QuantSite], measure: Measure, room: int, most: int) -> list[list[QuantSite]]:
    """Blocks of consecutive sites whose runs are stored together, within ``room`` bytes or a single run each.

    Memory thus grows neither with the number of sites nor with the number of bit-widths.
    """
    blocks: list[list[QuantSite]] = []
    runs, taken = most, room
    for site in sites:
        weight_bytes = 4 * site.numel if site.kind == "weight" else 0
        for bits in site.bits:
            needed = 0 if bits == BASELINE_BITS else measure.run_bytes + weight_bytes
            if not blocks or (needed and (runs + 1 > most or taken + needed > room)):
                blocks.append([])
                runs = taken = 0
            runs, taken = runs + bool(needed), taken + needed
            block = blocks[-1]
            if block and block[-1].name == site.name:
                block[-1] = replace(site, bits=(*block[-1].bits, bits))
            else:
                block.append(replace(site, bits=(bits,)))
    return blocks


class _Finished:
    """Collects finished measurements in the cache, the results and the progress bar."""

    def __init__(self, measured: dict[tuple[str, int], Measurement], cache: MeasurementCache, bar: tqdm[None]) -> None:
        self._measured, self._cache, self._bar = measured, cache, bar

    def advance(self, share: float) -> None:
        """Advance the bar within a block, in units of (site, bit-width)."""
        self._bar.update(min(share, self._bar.total - self._bar.n))

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Store the measurements of a block."""
        for measurement in measurements:
            self._cache.store(measurement)
            self._measured[measurement.site, measurement.bits] = measurement
        self._bar.update(len(self._measured) - self._bar.n)

    @contextmanager
    def kept(self, total: int) -> Iterator[None]:
        """Keep finished measurements if an error or an interrupt ends the scoring, and say how to resume."""
        try:
            yield
        except BaseException as error:
            message = self._keep(total)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(message) from None
            error.add_note(message)
            raise

    def _keep(self, total: int) -> str:
        done = f"{len(self._measured)} of {total} bit-widths were scored"
        if not self._measured:
            return f"scoring stopped before anything was finished (0 of {total} bit-widths)"
        cache = self._cache
        if cache.folder is None:
            cache = replace(cache, folder=Path(tempfile.mkdtemp(prefix="infoq_fx_scores_")))
            try:
                for measurement in self._measured.values():
                    cache.store(measurement)
            except OptionError as error:
                logging.getLogger(__name__).warning("%s", error)
                return f"{done} and could not be kept; give cache_dir"
        return f"{done} and are kept; the same call with cache_dir={str(cache.folder)!r} resumes from there"
