"""Atomic file writes, and JSON reads that say why a file cannot be used."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from infoq_fx.errors import OptionError

__all__ = ["check_format", "load_value", "read_json", "save_json", "write_atomically"]

_Value = TypeVar("_Value")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8; a previous file stays until the new one is complete.

    Raises:
        OSError: the folder cannot be written.
    """
    # os.replace is atomic only within one file system: the temporary file goes into the target's folder.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | os.PathLike[str], document: Mapping[str, Any], what: str) -> None:
    """Write a value as readable JSON, atomically: the whole file or nothing.

    Args:
        path: file to write, replaced if it exists.
        document: of values that JSON can store, with a format marker and a version.
        what: is written, for the message, as "the allocation".

    Raises:
        OptionError: the file cannot be written.
    """
    try:
        write_atomically(Path(path), json.dumps(document, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise OptionError(
            f"cannot write {what} {os.fspath(path)!r}: {error.strerror}; give a path in a folder that exists"
        ) from error


def load_value(
    path: str | os.PathLike[str],
    form: tuple[str, int],
    decode: Callable[[dict[str, Any]], _Value],
    what: str,
    advice: str,
) -> _Value:
    """Read a value from a JSON file.

    Args:
        path: of the file.
        form: its format marker and version.
        decode: makes the value from the document; it may raise OptionError, or whatever damaged values cause.
        what: is read, for the message, as "an allocation".
        advice: what to do if it cannot be read.

    Raises:
        OptionError: the file cannot be read, is cut short, or holds something else.
    """
    try:
        return decode(read_json(Path(path), *form))
    except OptionError as error:
        reason = str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"damaged: {type(error).__name__}: {error}"
    raise OptionError(f"cannot read {what} from {os.fspath(path)!r}: {reason}; {advice}")


def read_json(path: Path, marker: str, version: int) -> dict[str, Any]:
    """Read a JSON object that has a format marker and a version.

    Raises:
        OptionError: the file is missing, cut short, or of another format or version; the message says which.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise OptionError(str(error)) from error
    except json.JSONDecodeError as error:
        raise OptionError(f"not JSON, or cut short ({error})") from error
    except UnicodeDecodeError as error:
        raise OptionError("a binary file, not JSON") from error
    return check_format(document, marker, version)


def check_format(document: Any, marker: str, version: int) -> dict[str, Any]:
    """Return a JSON document after checking that it is an object with this format marker and version.

    Raises:
        OptionError: it has another format or version.
    """
    if not isinstance(document, dict) or document.get("format") != marker:
        raise OptionError(f"its format marker is not {marker!r}")
    if document.get("version") != version:
        raise OptionError(f"it has version {document.get('version')!r}; this release reads version {version}")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise OptionError(f"it holds {name}, which is not a valid value")
