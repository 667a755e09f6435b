"""Finished results of audits and searches on disk, each in a file of its own."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infoq_fx.core.atomic_files import read_json, write_atomically
from infoq_fx.errors import OptionError

__all__ = ["kept_folder", "load_result", "result_path", "store_result"]

_VERSION = 1


@contextmanager
def kept_folder(cache_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The user's folder, or a temporary one for this audit, through which criteria share measurements."""
    if cache_dir is not None:
        yield Path(cache_dir)
        return
    with tempfile.TemporaryDirectory(prefix="infoq_fx_audit_") as folder:
        yield Path(folder)


def result_path(folder: Path, key: str, kind: str = "audit") -> Path:
    """Return where the result of a key is kept; ``kind`` names the folder and the format of the file."""
    return folder / kind / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def load_result(path: Path) -> dict[str, Any]:
    """Return a kept result; empty if there is none that can be used."""
    try:
        return read_json(path, _format_of(path), _VERSION) if path.exists() else {}
    except OptionError:  # cut short or of another release: measure again
        return {}


def store_result(path: Path, document: Mapping[str, Any]) -> None:
    """Keep a result: the whole file or nothing.

    Raises:
        OptionError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": _format_of(path), "version": _VERSION, **document}) + "\n")
    except OSError as error:
        raise OptionError(f"cannot write the cache {str(path.parent)!r}: {error}; give another cache_dir") from error


def _format_of(path: Path) -> str:
    return f"infoq_fx.{path.parent.name}"
