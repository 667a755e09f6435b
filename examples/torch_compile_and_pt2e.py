"""Use an allocation in PyTorch's own flows: FX passes, torch.compile, .pt2 files, and PT2E of torchao for ExecuTorch.

Run it:  python examples/torch_compile_and_pt2e.py
"""

from pathlib import Path

import torch
from torch.fx.passes.infra.pass_manager import PassManager

import infoq_fx
from infoq_fx.demo import digits, train_digits_net

(images, labels), (test_images, test_labels) = digits()
model = train_digits_net(images, labels, epochs=3)


def top1(predict):
    with torch.no_grad():
        return 100 * float((predict(test_images).argmax(1) == test_labels).double().mean())


# FX: a pass for a pass manager.
manager = PassManager([infoq_fx.InfoqPass(4.0, images[:256], criterion="weight_mse", progress=False)])
quantized = manager(torch.fx.symbolic_trace(model)).graph_module
allocation = infoq_fx.allocation_of(quantized)
print(f"float: {top1(model):.1f} %, at a mean of {allocation.cost.weight_bits:.2f} bits: {top1(quantized):.1f} %")

# A file that torch.export.load can read, too.
infoq_fx.save_quantized(quantized, Path("digits.pt2"))
loaded = infoq_fx.load_quantized("digits.pt2")
print(f"from {Path('digits.pt2').stat().st_size:,} bytes on disk: {top1(loaded):.1f} %")

# torch.compile: of the quantized module, or of the float model with a backend. Omit inner= to use Inductor.
print(f"compiled: {top1(torch.compile(quantized, fullgraph=True, backend='aot_eager')):.1f} %")
backend = infoq_fx.backend(allocation, images[:256], inner="aot_eager", progress=False)
print(f"by the backend: {top1(torch.compile(model, backend=backend, fullgraph=True)):.1f} %")

# PT2E: the usual steps of torchao and ExecuTorch, with these bit-widths and ranges.
try:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
except ImportError:
    print('PT2E: pip install "infoq-fx[torchao]"')
else:
    free_batch = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (images[:8],), dynamic_shapes=free_batch).module()
    prepared = prepare_pt2e(exported, infoq_fx.InfoqQuantizer(quantized, output_bits=8, convolution_bits=8))
    prepared(images[:256])
    print(f"by torchao: {top1(convert_pt2e(prepared)):.1f} %")
