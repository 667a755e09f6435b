"""Quantization-aware training: learned step sizes, the training loop, and ``finetune``.

In: a quantized module and data. Out: a quantized module with better integers, at the same bit-widths. Output tuning, a
step of ``recovery``, uses the same training loop, so that ``recovery`` imports this package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
