"""The command-line application: what all commands share, such as errors, exit codes and configuration files."""

from __future__ import annotations

import enum
import functools
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from infoq_fx.cli.configuration import write_configuration
from infoq_fx.core.version import __version__
from infoq_fx.errors import InfeasibleBudgetError, InfoqError, OptionError

__all__ = ["ExitCode", "Result", "app", "check_output", "command", "main", "say"]

_ORDER = ["demo", "score", "allocate", "quantize", "export", "verify", "audit", "report"]
_ARGUMENTS = {"drop": "max_drop", "nats": "max_nats", "sqnr_db": "min_sqnr", "weight_bits": "budget"}
_JSON, _DEBUG = "infoq_fx.json", "infoq_fx.debug"


class ExitCode(enum.IntEnum):
    """Exit codes of the program."""

    DONE = 0
    INPUT = 1
    USAGE = 2
    UNSOUND = 3
    INFEASIBLE = 4
    FAULT = 5
    INTERRUPTED = 130


_EXIT_CODES = (
    "Exit codes: 0 done; 1 an input cannot be used; 2 the command line cannot be parsed; 3 a file is unsound "
    "(quantize, verify); 4 no allocation fits the budget; 5 internal error; 130 interrupted."
)
_EPILOG = (
    "Example: infoq-fx quantize torchvision.models:resnet18 images/ --weights resnet18.pth --budget 4 -o model.onnx. "
    "Or in stages: score on a server, allocate on a laptop. Options may come from a TOML file (--config); the options "
    f"of every result are written next to it, such as model.onnx.toml. {_EXIT_CODES}"
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a command: text for people, a document for machines, and the file or folder that it wrote.

    ``settings`` is the file for the options, next to the output by default. The document holds values that JSON can
    store; ``exit_code`` is not 0 if the command finished with a bad result.
    """

    text: str
    document: Mapping[str, Any]
    output: Path | None = None
    settings: Path | None = None
    exit_code: int = ExitCode.DONE


class _Commands(TyperGroup):
    """The group of all commands, which turns errors into a message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order in which they are used."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, after reading the options that decide how errors are shown."""
        ctx.meta[_JSON], ctx.meta[_DEBUG] = "--json" in args, "--debug" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and turn errors into messages and exit codes."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            kept = str(interrupt).replace("the same call with cache_dir=", "the same command with --cache-dir ")
            _fail(ctx, interrupt, ExitCode.INTERRUPTED, f"interrupted: {kept}" if kept else "interrupted")
        except InfeasibleBudgetError as error:
            _fail(ctx, error, ExitCode.INFEASIBLE, f"error: {self._in_options(ctx, error)}")
        except InfoqError as error:
            _fail(ctx, error, ExitCode.INPUT, f"error: {self._in_options(ctx, error)}")
        except OSError as error:
            _fail(ctx, error, ExitCode.INPUT, f"error: {error}; check the path, its permissions and the space left")
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise
            reason = " ".join(str(error).split())[:500] or "no message"
            advice = "run it again with --debug and report the traceback"
            _fail(ctx, error, ExitCode.FAULT, f"error: internal error, {type(error).__name__}: {reason}; {advice}")

    def _in_options(self, ctx: Any, error: BaseException) -> str:
        """The message of an error on one line, with the command's options in place of arguments in Python."""
        given = self.commands.get(ctx.invoked_subcommand or "")
        flags = {p.name: p.opts[0] for p in (given.params if given else ()) if p.opts and p.opts[0].startswith("--")}
        named = {name: flags[flag] for name, flag in _ARGUMENTS.items() if flag in flags}
        known = {**named, **flags, "calibration_data": "DATA", "within": "the budget"}

        def write(found: re.Match[str]) -> str:
            flag, value = known.get(found["name"]), found["value"]
            return found[0] if flag is None else flag if value is None else f"{flag} {value}"

        text = " ".join(str(error).split())
        text = re.sub(r"\b(?:Budget|Tolerance)\((?P<name>\w+)=(?P<value>[^()]*)\)", write, text)
        return re.sub(
            r"(?:\bbudget )?(?<![\w.-])(?P<name>[a-z_]+)=(?:\[\.\.\.\])?(?P<value>(?=[^\s,;:)]))?", write, text
        )


app = typer.Typer(
    name="infoq-fx",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
    help="Find the bit-width of every layer within a budget and write a verified QDQ ONNX file.",
)


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """Register a function as a command of :data:`app`; its name is the function's, its help text the docstring.

    The result is printed as text or, with ``--json``, as the only document on standard output; the effective
    configuration is written next to the result.
    """

    @functools.wraps(function)
    def run(ctx: typer.Context, **options: Any) -> None:
        with _messages(options["debug"]):
            result = function(ctx, **options)
        document = {"command": ctx.info_name, "version": __version__, **result.document}
        if result.output is not None:
            kept = write_configuration(ctx, result.output, result.settings)
            document |= {"output": str(result.output), "configuration": str(kept)}
        typer.echo(json.dumps(document, indent=1, default=float) if options["json_output"] else result.text)
        if result.exit_code:
            raise typer.Exit(int(result.exit_code))

    app.command()(run)
    return run


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _shared(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


def say(message: str, *, progress: bool) -> None:
    """Print a line about the next stage on standard error, like the progress bars."""
    if progress:
        typer.echo(message, err=True)


def check_output(path: Path, option: str = "--output") -> Path:
    """Return the path of a result after checking that it can be written.

    Raises:
        OptionError: it is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise OptionError(f"{option} {str(path)!r} is a folder; give the path of a file in it")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{option} {str(path)!r} is in a folder that does not exist; make {str(path.parent)!r} first")
    return path


def check_output_folder(path: Path, option: str = "--output") -> Path:
    """Return the folder for results, after creating it if it does not exist.

    Raises:
        OptionError: it is a file, or it cannot be created.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"{option} {str(path)!r} cannot be created ({error.strerror}); give another folder"
        ) from error
    return path


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _messages(debug: bool) -> Iterator[None]:
    """Show warnings as single lines on standard error, and with ``--debug`` everything that the library logs."""
    handler = logging.StreamHandler(sys.stderr)
    logger, level = logging.getLogger("infoq_fx"), logging.getLogger("infoq_fx").level
    with warnings.catch_warnings():
        if debug:
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        else:
            warnings.showwarning = _show_warning
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _fail(ctx: Any, error: BaseException, code: ExitCode, message: str) -> None:
    """Print an error for people and, with ``--json``, for machines, and exit with the code."""
    if ctx.meta[_DEBUG]:
        typer.echo("".join(traceback.format_exception(error)), err=True)
    typer.echo(message, err=True)
    if ctx.meta[_JSON]:
        text = message.removeprefix("error: ") if isinstance(error, InfoqError) else str(error)
        said = {"kind": type(error).__name__, "message": text, "exit_code": int(code)}
        typer.echo(json.dumps({"version": __version__, "error": said}, indent=1))
    raise typer.Exit(int(code)) from None
