"""The command line ``infoq-fx``: one command a function, and torch only where one needs it."""

from infoq_fx.cli import comparing, demonstrating, quantizing, stages
from infoq_fx.cli.application import ExitCode, app, main

__all__ = ["ExitCode", "app", "comparing", "demonstrating", "main", "quantizing", "stages"]
