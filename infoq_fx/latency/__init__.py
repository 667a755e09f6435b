"""Times the layers of a model in a runtime, as a cost that budgets limit.

In: a :class:`~infoq_fx.PreparedModel`. Out: a :class:`~infoq_fx.LatencyCost` for :data:`infoq_fx.COSTS`, which is saved
and loaded as JSON, so that a table from another device serves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
