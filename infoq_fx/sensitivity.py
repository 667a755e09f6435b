"""The loop over sites and bit-widths that fills a sensitivity table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from infoq_fx.criteria import Criterion, find_criterion
from infoq_fx.data import CalibrationData
from infoq_fx.errors import CalibrationDataError
from infoq_fx.prepared import PreparedModel
from infoq_fx.spec import Measurement, QuantSite
from infoq_fx.table import SensitivityTable

__all__ = ["choose_batch_size", "measure_sensitivity"]

_BATCH_BYTES = 256 << 20
_MAX_BATCH = 64
_BLOCK_RUNS = 64


def measure_sensitivity(
    prepared: PreparedModel,
    data: CalibrationData | None,
    criterion: Criterion | str,
    *,
    progress: bool = True,
) -> tuple[SensitivityTable, list[Measurement]]:
    """Score every searched site at every candidate bit-width.

    Args:
        prepared: calibrated.
        data: by the model's input names, on the model's device; None for a criterion that needs none.
        criterion: a registered name or an object.
        progress: show a bar over (site, bit-width) on standard error.

    Returns:
        The table, and the criterion's own measurements behind it.

    Raises:
        OptionError: an unknown criterion.
        CalibrationDataError: the criterion needs data and there is none.
    """
    found = find_criterion(criterion)
    if found.needs_data and data is None:
        raise CalibrationDataError(f"criterion {found.name!r} needs calibration data; without data use 'eagl'")
    sites = [s for s in prepared.inventory.sites if s.is_searched and len(s.bits) > 1]
    batch_size = choose_batch_size(prepared)
    measurements: list[Measurement] = []
    total = sum(len(site.bits) for site in sites)
    form = "{l_bar}{bar}| {n:.0f}/{total} bit-widths [{elapsed}<{remaining}]"
    with tqdm(total=total, disable=not progress, desc=f"scoring ({found.name})", bar_format=form) as bar:
        for block in _blocks(sites):
            measurements += found.measure(prepared, data, block, batch_size=batch_size, advance=bar.update)
    table = SensitivityTable(
        criterion=found.name,
        inventory=prepared.inventory,
        scores=found.score(prepared, measurements),
        settings=_settings_of(found, data),
    )
    return table, measurements


def choose_batch_size(prepared: PreparedModel) -> int:
    """Samples a batch so that the values a run keeps stay near 256 MiB; the same on every machine."""
    if prepared.batch_size is not None:
        return prepared.batch_size
    per_sample = 4 * sum(site.numel for site in prepared.inventory.sites if site.kind == "activation")
    if per_sample == 0:
        per_sample = 8 * max(operation.macs for operation in prepared.inventory.operations) // 100
    return max(2, min(_MAX_BATCH, _BATCH_BYTES // max(1, per_sample)))


def _blocks(sites: Sequence[QuantSite]) -> list[list[QuantSite]]:
    """Blocks of consecutive sites whose runs are stored together: memory does not grow with the number of sites."""
    blocks: list[list[QuantSite]] = []
    runs = math.inf
    for site in sites:
        if runs + len(site.bits) > _BLOCK_RUNS:
            blocks.append([])
            runs = 0
        blocks[-1].append(site)
        runs += len(site.bits)
    return blocks


def _settings_of(criterion: Criterion, data: CalibrationData | None) -> dict[str, Any]:
    plain = {k: v for k, v in vars(criterion).items() if isinstance(v, str | int | float | bool) or v is None}
    plain.pop("name", None)
    return {**plain, "samples": None if data is None else data.samples}
