"""Values of nodes by batch are given back as they were, from memory or from a file."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from infoq_fx.errors import CalibrationDataError
from infoq_fx.quantization.numerics import fake_quantize
from infoq_fx.runtime.held_values import HeldValues
from infoq_fx.types import QParams, QuantSpec

NODE = fx.Graph().placeholder("x")
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])


@given(st.lists(st.integers(0, 4), max_size=4), DTYPES, st.randoms(use_true_random=False), st.booleans())
def test_a_tensor_comes_back_with_its_layout(shape, dtype, random, is_on_disk):
    x = torch.randint(0, 2, shape).to(dtype)
    x = x.permute(random.sample(range(x.ndim), x.ndim))
    held = HeldValues(0 if is_on_disk else 1 << 20)
    held.add({NODE: x})
    found = held.read(0, [NODE])[NODE]
    assert found.dtype == dtype
    assert torch.equal(found, x)
    assert not x.numel() or [s for n, s in zip(x.shape, found.stride(), strict=True) if n > 1] == [
        s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1
    ]


def test_what_is_beyond_the_limit_is_on_disk_and_threads_read_it():
    held = HeldValues(250)
    for index in range(20):
        held.add({NODE: torch.full((25,), float(index)), None: index})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: held.read(index, [NODE, None]), range(20)))
    assert [(int(x[NODE].sum()), x[None]) for x in found] == [(25 * index, index) for index in range(20)]
    assert len(held) == 20


@pytest.mark.parametrize("limit", [0, 4 * 30, 1 << 20])
@pytest.mark.parametrize("layout", ["plain", "channels last", "strided"])
def test_quantized_values_come_back_from_integers(limit, layout):
    qparams = QParams(QuantSpec(bits=8, symmetric=False), torch.tensor(0.125), torch.tensor(3, dtype=torch.int32))
    x = 20 * torch.randn(2, 3, 4, 5)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.permute(1, 3, 0, 2)
    y = fake_quantize(x, qparams)
    held = HeldValues(limit)
    held.add({NODE: y}, {NODE: qparams})
    found = held.read(0, [NODE])[NODE]
    assert torch.equal(found, y)
    assert found.stride() == y.stride()
    bad = torch.full((3,), torch.nan)
    held = HeldValues(0)
    held.add({NODE: bad}, {NODE: qparams})
    assert held.read(0, [NODE])[NODE].isnan().all()


def test_a_full_disk_is_told(monkeypatch):
    def fail(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infoq_fx.runtime.held_values.tempfile.TemporaryFile", fail)
    with pytest.raises(CalibrationDataError, match="No space left on device; give fewer samples, or set TMPDIR"):
        HeldValues(0).add({NODE: torch.ones(3)})
