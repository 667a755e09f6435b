"""Layer after layer, the float model and the quantized one side by side."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from logits import compute_float_logits, compute_logits
from recovered import CONTEXT
from torch import fx

from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, SegmentRunner
from infoq_fx.recovery.parameters import fork, set_parameter
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "branches"])
def test_a_walk_ends_where_whole_runs_end(name, request):
    case = request.getfixturevalue(name)
    prepared, data = case[:2]
    bits = case[2] if len(case) > 2 else {s.name: 4 for s in prepared.inventory.sites if s.kind == "weight"}
    runner = LayerwiseRunner(fork(prepared), bits, data, CONTEXT)
    *most, last = runner.segments
    for segment in most:
        runner.advance(segment)
    output = next(iter(reversed(prepared.graph_module.graph.nodes))).all_input_nodes[0].name
    node = next(n for n in last.nodes if n.name == output)
    pairs = list(runner.collect(node, lambda _, pair: pair))
    in_float = compute_float_logits(prepared, data, batch_size=16)
    assert torch.allclose(torch.cat([pair.reference for pair in pairs]), in_float, atol=1e-5)
    assert torch.allclose(
        torch.cat([pair.quantized for pair in pairs]), compute_logits(prepared, data, bits), atol=1e-5
    )


class ActivationsOnly(fx.Interpreter):
    def call_module(self, target, args, kwargs):
        module = self.module.get_submodule(target)
        is_activation = isinstance(module, Quantizer) and module.site.kind == "activation"
        return module.quantize_at(args[0], 8) if is_activation else args[0]


def test_a_reference_with_float_weights_has_quantized_activations(residual):
    prepared, data, bits = residual
    changed = fork(prepared)
    runner = LayerwiseRunner(changed, bits, data, CONTEXT, reference="float_weights")
    for segment in runner.segments:  # what is rounded on the way is not the reference's
        for layer in segment.layers:
            set_parameter(changed, layer.weight, 2 * read_tensor(changed.graph_module, layer.weight))
    *most, last = runner.segments
    for segment in most:
        runner.advance(segment)
    output = next(iter(reversed(prepared.graph_module.graph.nodes))).all_input_nodes[0].name
    node = next(n for n in last.nodes if n.name == output)
    found = torch.cat([pair.reference for pair in runner.collect(node, lambda _, pair: pair)])
    with torch.inference_mode():
        expected = ActivationsOnly(prepared.graph_module).run(*data.inputs.values())
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, compute_float_logits(prepared, data, batch_size=16), atol=1e-4)


@pytest.mark.parametrize("step", [SecondOrderRounding(), BlockReconstruction(epochs=1, fisher=True)])
def test_recovery_from_disk_is_that_from_memory(step, residual):
    prepared, data, bits = residual
    in_memory, on_disk = (
        step.recover(prepared, bits, data, replace(CONTEXT, held_bytes=size)) for size in (1 << 30, 0)
    )
    expected = dict(in_memory.graph_module.named_parameters())
    for name, x in on_disk.graph_module.named_parameters():
        assert torch.equal(x, expected[name])


def test_recovery_does_not_depend_on_the_batch_size(residual):
    prepared, data, bits = residual
    found = [SecondOrderRounding().recover(prepared, bits, data, StepContext(batch_size=size)) for size in (3, 16, 64)]
    expected = dict(found[0].graph_module.named_parameters())
    for other in found[1:]:
        for name, x in other.graph_module.named_parameters():
            assert torch.allclose(x, expected[name], atol=1e-6)


def test_every_node_runs_once_in_each_model(residual, monkeypatch):
    prepared, data, bits = residual
    runs = Counter()
    run_node = SegmentRunner.run_node

    def count(self, node):
        runs[node] += node.op != "get_attr"
        return run_node(self, node)

    monkeypatch.setattr(SegmentRunner, "run_node", count)
    runner = LayerwiseRunner(fork(prepared), bits, data, CONTEXT)
    for layer in runner.visit():
        list(runner.collect(layer.source, lambda _, pair: pair))
    layers = {layer.node for layer in runner.layers}
    batches = len(runner.batch_samples)
    assert all(count <= 2 * batches for node, count in runs.items() if node in layers)
