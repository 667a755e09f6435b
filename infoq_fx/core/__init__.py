"""Services that do not depend on quantization: data, files, threads, memory, compilation.

In: what a user gives (samples, paths, options). Out: checked values and small services.
Every other package may import this one; it imports only ``errors``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
