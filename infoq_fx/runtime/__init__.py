"""Baseline and perturbed runs of a prepared model, and what tells two outputs apart.

In: a :class:`~infoq_fx.PreparedModel`, data, bit-widths by site. Out: values of observed nodes, outputs, their
divergence in nats. A run changes nothing of the model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
