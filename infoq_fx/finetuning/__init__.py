"""Gradients through a quantized model: learned step sizes, the training loop, and ``finetune``.

In: a quantized module and data. Out: a quantized module with better integers, at the same bit-widths. Output tuning, a
step of ``recovery``, trains with the same loop, which is why this room comes before that one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
