"""A cache of finished measurements on disk, one file each, keyed by everything that determines them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from infoq_fx.core.atomic_files import read_json, write_atomically
from infoq_fx.core.version import __version__
from infoq_fx.errors import OptionError
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.runtime.digest import _digest
from infoq_fx.types import Measurement, Plain, QuantSite

__all__ = ["MeasurementCache"]

_FORMAT = "infoq_fx.Measurement"
_VERSION = 1


@dataclass(frozen=True)
class MeasurementCache:
    """Cached measurements of one key, in ``folder/key``; a folder of None keeps nothing.

    ``key`` is the :func:`infoq_fx.runtime.digest.digest_run` of everything that all measurements share. The file of
    each (site, bit-width) adds its own qparams, so that other candidates may be added or removed.
    """

    folder: Path | None
    key: str
    quantizers: Mapping[str, Quantizer]

    def load(self, sites: Iterable[QuantSite]) -> Iterator[Measurement]:
        """Yield the cached measurements of these sites at their candidate bit-widths.

        A file that is cut short, damaged or of another run is named in a warning and measured again.
        """
        for site in sites if self.folder is not None else ():
            for bits in site.bits:
                path = self._path(site.name, bits)
                if not path.exists():
                    continue
                try:
                    yield self._read(path, site.name, bits)
                except OptionError as error:
                    logging.getLogger(__name__).warning("cannot use %s: %s; measuring again", path, error)

    def store(self, measurement: Measurement) -> None:
        """Write one measurement atomically: the whole file or nothing.

        Raises:
            OptionError: the folder cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(measurement.site, measurement.bits)
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "key": self.key,
            "site": measurement.site,
            "bits": measurement.bits,
            "values": {name: float(value) for name, value in measurement.values.items()},
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise OptionError(
                f"cannot write the cache {str(self.folder)!r}: {error}; give another cache_dir"
            ) from error

    def describe(self, settings: Mapping[str, Plain]) -> None:
        """Write the settings of the measurements next to them, for people to read."""
        if self.folder is None:
            return
        about = {"made by": f"infoq_fx {__version__}", "torch": torch.__version__, **settings}
        path = self.folder / self.key / "about.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise OptionError(
                f"cannot write the cache {str(self.folder)!r}: {error}; give another cache_dir"
            ) from error

    def _path(self, site: str, bits: int) -> Path:
        qparams = self.quantizers[site].qparams_at(bits)
        digest = _digest([site, str(bits), qparams.scale, qparams.zero_point])[:12]
        readable = re.sub(r"[^\w.-]", "_", site)[:120]
        assert self.folder is not None
        return self.folder / self.key / f"{readable}-{bits}bit-{digest}.json"

    def _read(self, path: Path, site: str, bits: int) -> Measurement:
        document = read_json(path, _FORMAT, _VERSION)
        found = document.get("key"), document.get("site"), document.get("bits")
        if found != (self.key, site, bits):
            raise OptionError(f"it was made for {found[1]!r} at {found[2]!r} bits of another run")
        values = document.get("values")
        if not isinstance(values, dict) or not all(isinstance(value, float) for value in values.values()):
            raise OptionError("damaged: its values are not numbers")
        return Measurement(site, bits, values)
