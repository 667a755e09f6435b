import copy
import itertools
import pickle
import shutil

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import infoq_fx
from infoq_fx.quantization.custom_ops import _decompose_quantize_dequantize, dequantize_op, quantize_dequantize_op
from infoq_fx.types import Allocation


@pytest.fixture(scope="module")
def quantized_and_images():
    from networks import ResidualNet, randomise_norms

    torch.manual_seed(1)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(48, 1, 8, 8)
    prepared = infoq_fx.prepare(model, images, levels="uniform")
    bits = {s.name: 3 + i % 4 if s.kind == "weight" else 8 for i, s in enumerate(prepared.inventory.sites)}
    return infoq_fx.convert(prepared, Allocation(bits=bits, criterion="by hand")), images


def test_ops_pass_torchs_own_checks():
    x = torch.randn(3, 4)
    torch.library.opcheck(quantize_dequantize_op, (x, 0.1, 7, 5, "site"), test_utils=["test_schema", "test_faketensor"])
    q, scale = torch.randint(-8, 8, (3, 4), dtype=torch.int8), torch.rand(3)
    torch.library.opcheck(dequantize_op, (q, scale, 0, 4, "site"), test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 5, 3, 4).permute(0, 2, 1, 3), torch.randn(2, 5, 3, 4)[:, :, 1], torch.randn(3, 1).expand(3, 4)],
    ids=["permuted", "strided", "expanded"],
)
def test_the_memory_layout_is_what_compilers_were_promised(x):
    assert quantize_dequantize_op(x, 0.1, 3, 8, "s").stride() == torch.empty_like(x).stride()


def test_ops_compute_onnx_arithmetic():
    x = torch.tensor([-10.0, -0.05, 0.0, 0.05, 0.15, 0.25, 100.0])
    expected = (torch.round(x / 0.1) + 2).clamp(0, 31).sub(2) * 0.1  # halves go to even
    torch.testing.assert_close(quantize_dequantize_op(x, 0.1, 2, 5, "s"), expected)
    q, scale = torch.tensor([[1, 2], [-3, 4]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    assert dequantize_op(q, scale, 0, 4, "s").tolist() == [[0.5, 1.0], [-6.0, 8.0]]
    assert dequantize_op(q, scale, 1, 4, "s").tolist() == [[0.5, 4.0], [-1.5, 8.0]]


def test_weights_are_integers_within_their_bits(quantized_and_images):
    quantized, _ = quantized_and_images
    bits = infoq_fx.allocation_of(quantized).bits
    weights = {name: b for name, b in quantized.named_buffers() if name in bits}
    assert len(weights) == 6
    for name, weight in weights.items():
        assert weight.dtype == torch.int8
        assert weight.min() >= -(1 << (bits[name] - 1))
        assert weight.max() < 1 << (bits[name] - 1)
    assert not [p for p in quantized.parameters() if p.ndim > 1]


def annotated(module):
    """What the nodes say of themselves; a pickled graph lists its parameters in another order."""
    return sorted((node.meta["infoq"] for node in module.graph.nodes if "infoq" in node.meta), key=str)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_the_same_module(copied, quantized_and_images):
    quantized, images = quantized_and_images
    again = copied(copied(quantized))
    assert isinstance(again, infoq_fx.QuantizedModule)
    assert torch.equal(again(images), quantized(images))
    stored, restored = dict(quantized.named_buffers()), dict(again.named_buffers())
    assert {name: b.dtype for name, b in restored.items()} == {name: b.dtype for name, b in stored.items()}
    assert infoq_fx.allocation_of(again) == infoq_fx.allocation_of(quantized)
    assert annotated(again) == annotated(quantized)
    layers = [note["operand_bits"] for note in annotated(again) if "operand_bits" in note]
    assert len(layers) == 6
    assert {bits for pair in layers for bits in pair} >= {3, 8}


def test_torch_export_saves_and_loads_it(quantized_and_images, tmp_path):
    quantized, images = quantized_and_images
    program = torch.export.export(quantized, (images[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert torch.equal(loaded.module()(images), quantized(images))
    weights = {k: b for k, b in infoq_fx.allocation_of(quantized).bits.items() if k.endswith(".weight")}
    for source in (loaded, loaded.module()):
        found = infoq_fx.allocation_of(source).bits
        assert {k: b for k, b in found.items() if k.endswith(".weight")} == weights


def test_torch_compile_takes_it_whole(quantized_and_images):
    quantized, images = quantized_and_images
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), quantized(images), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_it_whole(quantized_and_images):
    quantized, images = quantized_and_images
    compiled = torch.compile(quantized, fullgraph=True)
    with inductor_config.patch(fx_graph_cache=False):  # code of an older release may lie there
        found, code = run_and_get_code(compiled, images)
    torch.testing.assert_close(found, quantized(images), rtol=0, atol=0.05)
    assert code
    lines = [line.strip() for text in code for line in text.splitlines()]
    assert not [x for x in lines if "torch.ops.infoq_fx" in x and not x.startswith("#")]  # no opaque call is left


def test_what_inductor_fuses_is_what_the_op_computes():
    x = torch.cat([torch.randn(4000) * 3, torch.arange(-40, 40) * 0.05, torch.tensor([-0.0, 1e9, -1e9])])
    for scale, zero_point, bits in ((0.1, 7, 4), (0.05, 128, 8), (0.34375, 0, 2)):
        expected = quantize_dequantize_op(x, scale, zero_point, bits, "site")
        assert torch.equal(_decompose_quantize_dequantize(x, scale, zero_point, bits, "site"), expected)


def test_no_allocation_in_a_float_model():
    with pytest.raises(infoq_fx.OptionError, match="holds no quantized site"):
        infoq_fx.allocation_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_the_op_keeps_the_strides_that_its_fake_promises(order):
    """Views behind it were traced with those: a transformer's query is a transposed view, for one."""
    x = torch.randn(2, 3, 4, 5).permute(order)
    y = torch.ops.infoq_fx.quantize_dequantize(x, 0.5, 100, 8, "x")
    assert y.stride() == torch.empty_like(x, device="meta").stride()
    torch.testing.assert_close(y, torch.ops.infoq_fx.quantize_dequantize(x.contiguous(), 0.5, 100, 8, "x"))
