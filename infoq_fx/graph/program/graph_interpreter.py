"""The base of all interpreters of graphs in this package."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["GraphInterpreter"]


class GraphInterpreter(fx.Interpreter):
    """Runs a graph node by node, also while another thread captures or exports a model.

    torch's own interpreter records the node that it runs in a place that all threads share, and ``torch.export`` reads
    that record while it traces.
    """

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the values of its arguments."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)
