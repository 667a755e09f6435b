import functools

import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.runtime.run_plan import plan_perturbed_run, plan_whole_run


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        y = functional.relu6(self.first(x))
        return self.head(functional.relu(self.second(y) + y)).mean((2, 3))


@functools.cache
def prepare():
    torch.manual_seed(0)
    return infoq_fx.prepare(Block().eval(), torch.randn(16, 2, 4, 4))


def quantizer_node(prepared, name):
    return next(node for node, quantizer in prepared.quantizer_nodes() if quantizer.site.name == name)


def targets(nodes):
    return {node.target for node in nodes if node.op == "call_function"}


def test_clips_and_additions_go_into_the_quantizer_that_reads_them():
    prepared = prepare()
    plan = plan_whole_run(prepared, [prepared.observer_nodes()["output"]])
    left = targets(plan.nodes)
    for merged in (torch.ops.aten.add.Tensor, torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default):
        assert merged not in left
    head = plan.merged[quantizer_node(prepared, "head.input")]
    assert len(head.sources) == 2
    assert head.clip == (0.0, float("inf"))
    (clamp,) = prepared.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.hardtanh.default)
    assert plan.merged[quantizer_node(prepared, "second.input")].clip == clamp.args[1:]
    assert clamp.args[1] == 0
    assert 4 < clamp.args[2] < 9  # 6, times the factor of the tensor


def test_what_is_observed_is_still_computed():
    prepared = prepare()
    named = prepared.observer_nodes()
    observed = named["head.input"]
    plan = plan_whole_run(prepared, [observed, named["output"]])
    assert observed in plan.nodes
    assert torch.ops.aten.add.Tensor in targets(plan.nodes)
    # The sum is there: the quantizer does not add once more.
    (source,) = plan.merged[quantizer_node(prepared, "head.input")].sources
    assert source.target is torch.ops.aten.add.Tensor


def test_equal_quantizers_of_one_value_run_once_but_for_the_perturbed_one():
    prepared = prepare()
    plan = plan_whole_run(prepared, [prepared.observer_nodes()["output"]])
    assert plan.repeats
    for node, first in plan.repeats.items():
        assert plan.merged[node] == plan.merged[first]
        perturbed = plan_perturbed_run(
            prepared,
            next(q.site.name for n, q in prepared.quantizer_nodes() if n is node),
            [prepared.observer_nodes()["output"]],
        )
        assert node not in perturbed.repeats
        assert node not in perturbed.repeats.values()


def test_a_run_ends_with_the_last_observer():
    prepared = prepare()
    named = prepared.observer_nodes()
    plan = plan_perturbed_run(prepared, "first.weight", [named["second"]])
    assert plan.nodes[-1] is named["second"]
