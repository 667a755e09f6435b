"""Baseline and perturbed runs of a prepared model, and the divergence of their outputs.

In: a :class:`~infoq_fx.PreparedModel`, data, bit-widths by site. Out: values of observed nodes, outputs, their
divergence in nats. A run does not change the model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
