"""The command line ``infoq-fx``: one function per command; torch is imported only by commands that need it."""

from infoq_fx.cli import comparing, demonstrating, quantizing, stages
from infoq_fx.cli.application import ExitCode, app, main

__all__ = ["ExitCode", "app", "comparing", "demonstrating", "main", "quantizing", "stages"]
