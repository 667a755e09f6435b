"""Exported programs are made functional: node by node where they hold everyday operations, else by torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from infoq_fx.graph.capture import capture
from infoq_fx.graph.program import drafts
from infoq_fx.graph.program.exporting import export_quietly
from infoq_fx.graph.program.functionalization import EVERYDAY_OPERATIONS, copy_functional, make_functional

X = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
ONES = torch.ones(4)


class Calls(nn.Module):
    """Applies functions to its input, each by itself."""

    def __init__(self, *functions: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> list[Tensor | tuple[Tensor, ...]]:
        return [function(x) for function in self.functions]


def layers(x: Tensor) -> list[Tensor]:
    line, box = x[:, :, 0], x.unsqueeze(2)
    return [
        F.conv1d(line, ONES.expand(4, 4)[:, :, None]),
        F.conv1d(line, ONES.expand(4, 4)[:, :, None], padding="same"),
        F.conv2d(x, torch.ones(4, 4, 1, 1)),
        F.conv2d(x, torch.ones(4, 4, 3, 3), padding="same"),
        F.conv3d(box, torch.ones(4, 4, 1, 1, 1)),
        F.conv_transpose1d(line, torch.ones(4, 4, 1)),
        F.conv_transpose2d(x, torch.ones(4, 4, 1, 1)),
        F.conv_transpose3d(box, torch.ones(4, 4, 1, 1, 1)),
        F.linear(x, torch.ones(3, 8)),
        x @ x,
        torch.bmm(line, line.transpose(1, 2)),
        torch.addmm(torch.ones(8), x[0, 0], x[0, 1]),
        torch.einsum("bchw,bchv->bcwv", x, x),
        F.scaled_dot_product_attention(x, x, x),
        F.embedding(torch.zeros(2, 3, dtype=torch.int64), torch.ones(9, 3)),
    ]


def pointwise(x: Tensor) -> list[Tensor]:
    functions = (F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu, F.relu6, F.selu)
    more = (F.silu, F.softplus, torch.abs, torch.erf, torch.exp, torch.log, torch.neg, torch.reciprocal, torch.rsqrt)
    last = (torch.sigmoid, torch.sqrt, torch.square, torch.tanh)
    return [
        *(function(x) for function in (*functions, *more, *last)),
        *(F.prelu(x, torch.ones(1)), F.threshold(x, 0.1, 0.2), F.glu(x, 1), x.clamp(0, 1), x.clamp_min(0)),
        *(x + x, x - x, x * x, x / x, torch.rsub(x, 1.0), x**2, torch.maximum(x, x)),
        *(torch.where(x.bool(), x, x), x.masked_fill(x == 0, 0.0), x.masked_fill(x != 0, 0.0)),
    ]


def pooled(x: Tensor) -> list[Tensor]:
    line = x[:, :, 0]
    return [
        *(F.adaptive_avg_pool1d(line, 1), F.adaptive_avg_pool2d(x, 1), F.avg_pool1d(line, 2), F.avg_pool2d(x, 2)),
        *(F.max_pool1d(line, 2), F.max_pool2d(x, 2), x.amax(1), x.mean(), x.mean(1), x.sum(1), x.cumsum(1)),
        *(F.group_norm(x, 2), F.instance_norm(x), F.layer_norm(x, (8,)), F.rms_norm(x, (8,))),
        *(x.softmax(1), x.log_softmax(1)),
    ]


def moved(x: Tensor) -> list[Tensor]:
    return [
        *(torch.cat([x, x], 1), torch.stack([x, x], 1), F.pad(x, (1, 1)), x.flip(2), torch.roll(x, 1, 2)),
        *(F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.channel_shuffle(x, 2)),
        *(x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1)),
        *(F.interpolate(x, scale_factor=2, mode=mode) for mode in ("nearest", "bilinear", "bicubic")),
        *(x.split(2, 1)[1], x.split([1, 3], 1)[1], x.unbind(1)[1], x[:, :1].squeeze(1), x[:, :1].expand(-1, 4, -1, -1)),
        *(x.permute(0, 2, 3, 1), x.view(-1, 4, 64), x[:, x[0, 0, 0].long() % 2]),
        *(torch.ones(x.shape[0], 2) + 1, torch.zeros(x.shape[0], 2) + 1),
    ]


def test_everyday_operations_stay_when_torch_makes_a_program_functional() -> None:
    program = export_quietly(Calls(*(lambda x, f=f: tuple(f(x)) for f in (layers, pointwise, pooled, moved))), (X,))
    before = [node.target for node in program.graph.nodes if node.op == "call_function"]
    after = make_functional(program)
    left = [node.target for node in after.graph.nodes if node.op == "call_function"]
    asserts = {torch.ops.aten._assert_tensor_metadata.default}
    assert EVERYDAY_OPERATIONS - set(before) - asserts == set(), "not tried here"
    assert {x for x in EVERYDAY_OPERATIONS if before.count(x) != left.count(x)} == set()


def run_both(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    graph_module = capture(model.eval(), (X,)).graph_module
    own, captured = model(X.clone()), graph_module(X.clone())
    return list(own), list(captured)


def is_copied(model: nn.Module) -> bool:
    return copy_functional(export_quietly(model, (X,))) is not None


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "new": lambda a, b: torch.relu(a),
    "sum": lambda a, b: a + b,
    "joined": lambda a, b: torch.cat([a, b], 1)[:, 2:6],
    "relu_": lambda a, b: a.relu_(),
    "add_": lambda a, b: a.add_(b),
    "mul_": lambda a, b: a.mul_(0.5),
    "hardtanh_": lambda a, b: F.hardtanh(a, -1.0, 1.0, inplace=True),
    "dropout": lambda a, b: F.dropout(a, 0.5, training=False),
    "dropout_": lambda a, b: F.dropout(a, 0.5, training=False, inplace=True),
    "slice": lambda a, b: a[:, :],
    "view": lambda a, b: a.reshape(-1, 4, 8, 8),
    "flatten": lambda a, b: a.flatten(1).unflatten(1, (4, 8, 8)),
    "squeeze": lambda a, b: a.unsqueeze(1).squeeze(1),
    "transpose": lambda a, b: a.transpose(2, 3).contiguous(),
    "contiguous": lambda a, b: a.contiguous(),
    "chunk": lambda a, b: torch.cat(a.chunk(2, 1)[::-1], 1),
    "half_": lambda a, b: a.chunk(2, 1)[0].mul_(2.0).repeat(1, 2, 1, 1),
}
"""Operations on two of the values so far; names with "_" change the first in place."""


class Program(nn.Module):
    """Runs steps, each on values of earlier ones, and returns all of them."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x * 1.5]
        for name, first, second in self.steps:
            values.append(STEPS[name](values[first % len(values)], values[second % len(values)]))
        return [value + 0 for value in values]


# Where torch makes a program functional, torch 2.9 takes dropout at inference for a copy; it is the same tensor.
TRIED = sorted(STEPS.keys() - ({"dropout"} if TorchVersion(torch.__version__) < (2, 10) else set()))
steps = st.lists(st.tuples(st.sampled_from(TRIED), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=8)


def assert_same(program: list[tuple[str, int, int]]) -> None:
    own, captured = run_both(Program(program))
    assert all(torch.equal(a, b) for a, b in zip(own, captured, strict=True))


@settings(max_examples=12, deadline=None)
@given(steps)
def test_values_that_change_in_place_are_seen_by_every_name_of_them(program: list[tuple[str, int, int]]) -> None:
    assert_same(program)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(steps)
def test_values_that_change_in_place_at_length(program: list[tuple[str, int, int]]) -> None:
    assert_same(program)


@pytest.mark.parametrize(
    ("program", "copied"),
    [
        ([("relu_", 0, 0), ("add_", 0, 1), ("sum", 1, 2)], True),
        ([("dropout", 0, 0), ("relu_", 1, 1), ("sum", 0, 1)], True),
        ([("relu_", 0, 0), ("slice", 0, 0), ("sum", 0, 2)], True),
        ([("slice", 0, 0), ("relu_", 0, 0), ("sum", 0, 1)], False),
        ([("view", 0, 0), ("mul_", 1, 1), ("sum", 0, 1)], False),
        ([("half_", 0, 0), ("sum", 0, 1)], False),
    ],
)
def test_only_tensors_of_their_own_are_changed_by_the_copy(program: list[tuple[str, int, int]], copied: bool) -> None:
    model = Program(program)
    assert is_copied(model) == copied
    assert_same(program)


def test_an_input_that_changes_in_place_is_left_to_torch() -> None:
    model = Calls(lambda x: x.relu_() + 1)
    assert not is_copied(model)
    own, captured = run_both(model)
    assert torch.equal(own[0], captured[0])


def test_a_sum_in_place_keeps_its_dtype() -> None:
    model = Calls(lambda x: (x * 4).long().mul_(2).float(), lambda x: (x * 1).add_((x * 3).long()))
    own, captured = run_both(model)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(own, captured, strict=True))


def test_the_copy_has_the_operations_and_names_of_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Dropout(0.2))
    model = nn.Sequential(body, nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4), nn.SiLU(True))

    def capture_nodes() -> list[tuple[str, str]]:
        graph = capture(model.eval(), (X,)).graph_module.graph
        tensors = [node for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        return [(str(node.target), node.name) for node in tensors if node.target is not torch.ops.aten.clone.default]

    copied = capture_nodes()
    monkeypatch.setattr(drafts, "copy_functional", lambda program: None)
    assert capture_nodes() == copied


def test_sizes_of_the_batch_stay_free_behind_flatten_and_unflatten() -> None:
    model = Calls(lambda x: x.flatten(1).unflatten(1, (2, -1)), lambda x: x.flatten(0, 1))
    assert is_copied(model)
    graph_module = capture(model, (X,)).graph_module
    twice = torch.cat([X, X])
    assert all(torch.equal(a, b) for a, b in zip(model(twice), graph_module(twice), strict=True))


def test_the_copy_leaves_the_program_as_it_is() -> None:
    program = export_quietly(Program([("relu_", 0, 0), ("sum", 0, 1)]), (X,))
    before = program.graph_module.code
    functional = copy_functional(program)
    assert functional is not None
    assert "relu_." not in functional.graph_module.code
    assert "relu_." in program.graph_module.code == before


class Flagged(nn.Module):
    def forward(self, flag: bool, x: Tensor) -> Tensor:
        return x.flatten(1) if flag else x


def test_programs_may_have_arguments_that_are_no_tensors() -> None:
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(Flagged(), (True, X), dynamic_shapes=(None, batch))
    assert torch.equal(capture(program, (X,)).graph_module(X[:1]), X[:1].flatten(1))


@pytest.mark.parametrize("name", ["eq_", "ne_", "cumsum_"])
def test_operations_in_place_keep_the_dtype(name: str) -> None:
    def call(x: Tensor) -> Tensor:
        return getattr((x * 4).int() if name == "cumsum_" else x * 1, name)(1)

    own, captured = run_both(Calls(call))
    assert own[0].dtype == captured[0].dtype
    assert torch.equal(own[0], captured[0])


def test_parts_of_an_empty_tensor_are_as_many_as_asked() -> None:
    own, captured = run_both(Calls(lambda x: x[:, :0].chunk(2, 1)[1]))
    assert own[0].shape == captured[0].shape


class Layers(nn.Module):
    """One of several ways to handle an image behind a convolution."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.linear, self.way = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def cut_windows(m: nn.Module, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    y = m.conv(x).permute(0, 2, 3, 1).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    return m.linear(y.flatten(1, 2).flatten(2, 3)).mean((1, 2))


def halve(m: nn.Module, x: Tensor) -> Tensor:
    return sum(m.conv(x).transpose(2, 3).contiguous().chunk(2, 2))


def pair_rows(m: nn.Module, x: Tensor) -> Tensor:
    y = F.max_pool2d(m.conv(x), 2).transpose(2, 3).contiguous()
    return y.unflatten(2, (-1, 2)).sum(3).mean((2, 3))


def flatten_flat(m: nn.Module, x: Tensor) -> Tensor:
    return m.conv(x).view(int(x.shape[0]), -1).flatten(1)


@pytest.mark.parametrize(
    "way", [cut_windows, *(pytest.param(x, marks=pytest.mark.slow) for x in (halve, pair_rows, flatten_flat))]
)
def test_axes_stay_free_where_only_one_of_two_captures_can_be_copied(way: Callable[..., Tensor]) -> None:
    model = Layers(way).eval()
    captured = capture(model, (X,))
    assert captured.free_axes == {"x": (2, 3)}
    assert captured.batch_size is None
    large = torch.randn(3, 4, 12, 16)
    torch.testing.assert_close(captured.graph_module(large), model(large))
