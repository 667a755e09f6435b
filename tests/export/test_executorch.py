"""An allocation through PT2E into ExecuTorch's XNNPACK kernels, and run there."""

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.types import Allocation

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install executorch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def lower(model, x, weight_bits):
    """The converted module, the nodes that XNNPACK left to other kernels, and the file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = infoq_fx.prepare(model, x, levels="uniform")  # kernels of fewer than 8 bits need equal steps
    sites = prepared.inventory.sites
    weights = [site.name for site in sites if site.kind == "weight"]
    bits = {site.name: 8 for site in sites} | {n: weight_bits[i % len(weight_bits)] for i, n in enumerate(weights)}
    quantized = infoq_fx.convert(prepared, Allocation(bits=bits))
    quantizer = infoq_fx.InfoqQuantizer(quantized, output_bits=8, convolution_bits=8)
    draft = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    draft(x)
    converted = convert_pt2e(draft)
    program = to_edge_transform_and_lower(torch.export.export(converted, (x,)), partitioner=[XnnpackPartitioner()])
    nodes = program.exported_program().graph.nodes
    left = {str(getattr(node.target, "_op", node.target)) for node in nodes if node.op == "call_function"}
    left = {name for name in left if "executorch_call_delegate" not in name and "getitem" not in name}
    return quantized, converted, left, program.to_executorch().buffer


def run(file, x):
    from executorch.runtime import Runtime

    return Runtime.get().load_program(file).load_method("forward").execute([x])[0]


@pytest.mark.parametrize("weight_bits", [(8,), (4,), (8, 4), (2, 3, 5)], ids=str)
def test_linear_layers_run_in_xnnpack(weight_bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    x = torch.randn(64, 16)
    quantized, converted, left, file = lower(model, x, weight_bits)
    assert not left
    found = run(file, x)
    step = float((found.max() - found.min()) / 255)
    assert float((found - converted(x)).abs().max()) <= 1.01 * step
    assert float((found - quantized(x)).abs().max()) <= 2 * step


def test_four_bit_linear_layers_make_the_file_smaller():
    model, x = nn.Sequential(nn.Linear(256, 256)).eval(), torch.randn(32, 256)
    sizes = [len(lower(model, x, (bits,))[-1]) for bits in (8, 4)]
    assert sizes[1] < 0.65 * sizes[0]


@pytest.mark.parametrize("weight_bits", [(8,), (4,), (8, 4)], ids=str)
def test_a_residual_network_runs_in_xnnpack(weight_bits):
    torch.manual_seed(1)
    model, x = randomise_norms(ResidualNet(channels=8)).eval(), torch.randn(64, 1, 8, 8)
    quantized, converted, left, file = lower(model, x, weight_bits)
    assert left <= {"aten.mean.dim"}
    found = run(file, x)
    step = float((found.max() - found.min()) / 255)
    assert float((found - converted(x)).abs().max()) <= 2.01 * step
    assert float((found.argmax(1) == quantized(x).argmax(1)).double().mean()) > 0.9
