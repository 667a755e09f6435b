"""Reads options from a TOML file, and writes the effective options of a run next to its result."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from infoq_fx.core.atomic_files import write_atomically
from infoq_fx.core.version import __version__
from infoq_fx.errors import OptionError, unknown_name_error

__all__ = ["read_configuration", "write_configuration"]

_NOT_KEPT = {"config", "json_output", "debug", "progress", "help"}
_ABOUT = {"command", "version"}


def read_configuration(ctx: typer.Context, path: Path | None) -> Path | None:
    """Read a command's defaults from a TOML file; the command line takes precedence.

    Keys are the options' names with underscores. Those at the top apply to every command that has them, those in a
    table named after a command, such as ``[quantize]``, to that command.

    Raises:
        OptionError: the file cannot be read, or has a name or a value that no option takes.
    """
    if path is None:
        return None
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read --config {str(path)!r}: {error.strerror}; give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {str(path)!r} is not TOML: {error}; correct that place") from error
    commands = _commands(ctx)
    mine = str(ctx.info_name)
    everywhere = {name for names in commands.values() for name in names}
    defaults: dict[str, Any] = {}
    for key, value in document.items():
        if key in commands and isinstance(value, dict):
            _check_names(path, key, value, commands[key])
        elif key not in _ABOUT:
            _check_names(path, mine, [key], everywhere)
            defaults |= {_plain(key): value} if _plain(key) in commands[mine] else {}
    defaults |= {_plain(key): value for key, value in document.get(mine, {}).items()}
    ctx.default_map = {key: _as_typed(path, key, value) for key, value in defaults.items()}
    return path


def write_configuration(ctx: typer.Context, output: Path, path: Path | None = None) -> Path:
    """Write the effective options of a command next to its result, as TOML for ``--config``.

    Args:
        ctx: of the command that has run.
        output: the result.
        path: the file; None for the result's name with ``.toml`` appended.
    """
    path = path or output.with_name(output.name + ".toml")
    lines = [
        f"# What {output.name} was made with. Again:  infoq-fx {ctx.info_name} --config {path.name}",
        f"command = {_write_value(str(ctx.info_name))}",
        f"version = {_write_value(__version__)}",
        "",
        f"[{ctx.info_name}]",
    ]
    for name in _option_names(ctx.command):
        value = ctx.params.get(name)
        if value is not None and value not in ([], ()):
            lines.append(f"{name} = {_write_value(value)}")
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _commands(ctx: typer.Context) -> dict[str, list[str]]:
    """The option names of every command."""
    parent: Any = ctx.parent
    return {name: _option_names(command) for name, command in parent.command.commands.items()}


def _option_names(command: Any) -> list[str]:
    return [parameter.name for parameter in command.params if parameter.name not in _NOT_KEPT]


def _check_names(path: Path, command: str, keys: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for key in keys:
        if _plain(key) not in names:
            raise unknown_name_error(f"option of {command!r} in {str(path)!r}", key, sorted(names))


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _as_typed(path: Path, key: str, value: Any) -> Any:
    """A value as typed on the command line: numbers and groups separated by commas, and pairs with an equals sign."""
    if isinstance(value, dict):
        return [f"{name}={held}" for name, held in value.items()]
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return [",".join(map(str, item)) for item in value]
    if isinstance(value, list | str | int | float):
        return value
    raise OptionError(f"{key!r} in {str(path)!r} is a {type(value).__name__}; give a number, a text, or a list of them")


def _write_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_write_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_write_value(str(k))} = {_write_value(v)}' for k, v in value.items())}}}"
    # JSON strings are valid TOML, except for this character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
