"""Sensitivity scores: how much the model loses when one site alone is quantized to a bit-width.

In: a calibrated :class:`~infoq_fx.PreparedModel` and data. Out: a :class:`~infoq_fx.SensitivityTable`. Each criterion
is one file in ``criteria``; the estimators of mutual information are in ``information``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
