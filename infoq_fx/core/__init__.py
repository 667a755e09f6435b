"""What every room needs and that knows nothing of quantization: data, files, threads, memory, compilation.

In: what a user gives (samples, paths, options). Out: checked values and small services.
May be imported by every other room; imports none of them but ``errors``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
