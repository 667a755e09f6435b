"""Keys of caches differ where what was measured would."""

import functools

import torch

from infoq_fx.runtime.digest import name_function


def test_functions_are_known_by_their_code_and_by_the_values_they_hold():
    def make(k):
        def metric(outputs, labels):
            return k

        return metric

    class Metric:
        def __init__(self, k):
            self.k = k

        def __call__(self, outputs, labels):
            return self.k

    def plain(outputs, labels, k=1):
        return [lambda: k for _ in outputs]

    pairs = [
        (make(1), make(1), make(2)),
        (Metric(1), Metric(1), Metric(2)),
        (functools.partial(plain, k=1), functools.partial(plain, k=1), functools.partial(plain, k=2)),
        (Metric(torch.ones(3)), Metric(torch.ones(3)), Metric(torch.zeros(3))),
        (lambda a: 1, lambda a: 1, lambda a: 2),
    ]
    for first, same, other in pairs:
        assert name_function(first) == name_function(same) != name_function(other)
    unknown = Metric(object.__new__(type("Slots", (), {"__slots__": ()})))
    assert name_function(unknown) == name_function(unknown)
