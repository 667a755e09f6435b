"""Turns a model into a calibrated :class:`~infoq_fx.PreparedModel`: capture, graph passes, sites, calibration.

In: an ``nn.Module``, a traced graph or an exported program. Out: its functional ATen graph with a quantizer at every
site and an observer at every named tensor. The user's model is never changed. Each graph pass is one file in
``passes``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
