"""Runs graph passes in order, and names the pass that fails."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from infoq_fx.errors import InfoqError, UnsupportedModelError

__all__ = ["GraphPass", "bind_options", "run_passes"]


GraphPass = Callable[[fx.GraphModule], bool]


def run_passes(graph_module: fx.GraphModule, passes: Sequence[GraphPass]) -> fx.GraphModule:
    """Run passes in order, with lint and recompile after each that changed the graph.

    Args:
        graph_module: edited in place.
        passes: each takes the graph module and returns whether it changed it.

    Returns:
        The same graph module, without dead nodes.

    Raises:
        UnsupportedModelError: a pass failed; the message names it and those that ran before.
    """
    done: list[str] = []
    for graph_pass in passes:
        name = getattr(graph_pass, "__name__", type(graph_pass).__name__)
        try:
            if graph_pass(graph_module):
                graph_module.graph.eliminate_dead_code()
                graph_module.graph.lint()
                graph_module.recompile()
        except InfoqError:
            raise
        except Exception as error:
            before = ", ".join(done) or "none"
            raise UnsupportedModelError(
                f"pass {name} failed (passes done: {before}): {error}; leave that layer in float with ignore=[...]"
            ) from error
        done.append(name)
    graph_module.delete_all_unused_submodules()
    return graph_module


def bind_options(graph_pass: Any, **options: Any) -> Any:
    """Return a pass with its keyword options bound, under the same name."""
    bound = functools.partial(graph_pass, **options)
    functools.update_wrapper(bound, graph_pass)
    return bound
