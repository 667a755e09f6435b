"""Reports of results: an HTML page with a budget slider, and figures.

In: a :class:`~infoq_fx.SensitivityTable` or a quantized module. Out: a self-contained page, or matplotlib figures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
