"""Values and gradients of quantizers whose steps are learned, by the formulas."""

import pytest
import torch

from infoq_fx.finetuning.trainable import LearnedStepQuantizer
from infoq_fx.quantization import numerics
from infoq_fx.types import QParams, QuantSite, QuantSpec


def layouts(x):
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "strided"])
@pytest.mark.parametrize("gradient", ["contiguous", "channels last", "expanded"])
@pytest.mark.parametrize(("bits", "zero"), [(2, 0), (4, 5), (8, 255)])
def test_the_kernels_are_the_formulas(layout, gradient, bits, zero):
    x = layouts(3 * torch.randn(5, 6, 7, 3))[layout].detach().requires_grad_()
    spec = QuantSpec(bits=bits, symmetric=False)
    zero_point = torch.tensor(min(zero, spec.quant_max), dtype=torch.int32)
    module = LearnedStepQuantizer(
        QuantSite("x", "activation", (6, 7, 3), (bits,)), QParams(spec, torch.tensor(0.25), zero_point)
    )
    outer = torch.randn(5, 1, 7, 3).expand(5, 6, 7, 3)
    outer = outer if gradient == "expanded" else layouts(outer.contiguous())[gradient]
    step = torch.tensor(0.25, requires_grad=True)
    expected = numerics.fake_quantize_ste(x, step, zero_point, spec.quant_min, spec.quant_max)
    wanted, wanted_step = torch.autograd.grad(expected, [x, step], outer)
    y = module(x)
    assert torch.equal(y, expected)
    found, found_step = torch.autograd.grad(y, [x, module.scale], outer)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found_step, module.gradient_scale * wanted_step, rtol=1e-4, atol=1e-5)
