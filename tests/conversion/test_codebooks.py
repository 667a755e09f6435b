"""Weights with codebooks or mirrored ranges on every way that a quantized module takes."""

import importlib.util
import itertools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.allocation.cost import weight_bytes
from infoq_fx.cli.inputs import _choose_levels, take_levels
from infoq_fx.conversion.quantized import find_wide_weights, provenance_of
from infoq_fx.types import Allocation, QuantSite

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return randomise_norms(ResidualNet()).eval()


def allocate(prepared, widths):
    weights = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    bits = dict(zip(weights, itertools.cycle(widths), strict=False))
    return Allocation(bits={**{site.name: 8 for site in prepared.inventory.sites}, **bits})


@pytest.fixture(scope="module", params=["codebook", "mirrored"])
def quantized(request, model):
    prepared = infoq_fx.prepare(model, IMAGES, levels=request.param)
    allocation = allocate(prepared, (2, 4, 6, 3, 7))
    return infoq_fx.convert(infoq_fx.recover(prepared, allocation, IMAGES, progress=False), allocation)


def integers_of(module):
    bits = infoq_fx.allocation_of(module).bits
    return {name: (x, bits[name]) for name, x in module.named_buffers() if name in bits}


def test_every_weight_has_as_many_levels_as_its_bits_allow(quantized):
    for q, bits in integers_of(quantized).values():
        assert q.dtype == torch.int8
        assert len(q.unique()) <= 1 << bits
    wide = set(find_wide_weights(quantized))
    assert wide
    assert not any(bits > 6 for name, (_, bits) in integers_of(quantized).items() if name in wide)
    scales = torch.cat([x for name, x in quantized.named_buffers() if name.endswith("weight_scale")])
    is_mirrored = provenance_of(quantized).inventory.levels == "mirrored"
    assert bool((scales < 0).any()) == is_mirrored


@pytest.mark.slow
def test_the_summary_counts_codebooks(model):
    for levels, is_told in (("codebook", True), ("mirrored", False)):
        prepared = infoq_fx.prepare(model, IMAGES, levels=levels)
        told = infoq_fx.summarize(infoq_fx.convert(prepared, allocate(prepared, (3,))))
        assert ("weights have a codebook of integer levels" in str(told)) == is_told


@pytest.mark.slow
def test_files_have_positive_scales_and_as_few_bits(quantized, tmp_path):
    plain = infoq_fx.export_onnx(quantized, tmp_path / "plain.onnx", container="int8")
    held = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(plain).graph.initializer}
    assert all((held[name] > 0).all() for name in held if name.endswith("_scale"))
    packed = infoq_fx.export_onnx(quantized, tmp_path / "packed.onnx")
    stored = sum(x.numel() * bits for x, bits in integers_of(quantized).values()) / 8
    codes = [x for x in onnx.load(packed).graph.initializer if x.data_type == onnx.TensorProto.UINT8]
    channels = sum(len(x) for x, _ in integers_of(quantized).values())
    # The bits of the weights, a bit and a scale of a byte for each channel, and padding.
    assert sum(onnx.numpy_helper.to_array(x).nbytes for x in codes) <= stored + 1.125 * channels + 100


@pytest.mark.parametrize("container", ["exact", pytest.param("int8", marks=pytest.mark.slow)])
def test_onnxruntime_computes_the_same(container, quantized, tmp_path):
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", container=container)
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_array_equal(found, quantized(IMAGES).numpy())


def test_files_and_compilers_keep_them(quantized, tmp_path):
    infoq_fx.save_quantized(quantized, tmp_path / "model.pt2")
    again = infoq_fx.load_quantized(tmp_path / "model.pt2")
    exported = torch.export.export(quantized, (IMAGES,)).module()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), quantized(IMAGES))
        assert torch.equal(exported(IMAGES), quantized(IMAGES))
    assert find_wide_weights(again) == find_wide_weights(quantized)


def test_qonnx_refuses_them(quantized, model, tmp_path):
    with pytest.raises(infoq_fx.OptionError, match="levels='uniform'"):
        infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", target="qonnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_pt2e_takes_them_over(quantized, model):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(model, (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    prepared = prepare_pt2e(exported, infoq_fx.InfoqQuantizer(quantized))
    with torch.no_grad():
        prepared(IMAGES)
        found, expected = convert_pt2e(prepared)(IMAGES), quantized(IMAGES)
    assert 10 * math.log10(float(expected.square().sum() / (found - expected).square().sum())) > 30


def test_a_trainable_copy_computes_the_same_and_keeps_signs(quantized):
    trainable = infoq_fx.to_trainable(quantized)
    with torch.no_grad():
        torch.testing.assert_close(trainable(IMAGES), quantized(IMAGES), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        trainable(IMAGES).square().mean().backward()
        optimizer.step()
    trained = infoq_fx.to_quantized(trainable)
    before, after = ({n: x for n, x in m.named_buffers() if n.endswith("weight_scale")} for m in (quantized, trained))
    assert all(torch.equal(before[name].sign(), after[name].sign()) for name in before)
    with torch.no_grad():
        torch.testing.assert_close(trainable(IMAGES), trained(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["fast", "best"])
def test_recovery_takes_mirrored_ranges(model, recovery):
    found = {}
    for levels in ("uniform", "mirrored"):
        prepared = infoq_fx.prepare(model, IMAGES, levels=levels)
        allocation = allocate(prepared, (2, 3))
        recovered = infoq_fx.recover(prepared, allocation, IMAGES, recovery, progress=False)
        with torch.no_grad():
            found[levels] = float((infoq_fx.convert(recovered, allocation)(IMAGES) - model(IMAGES)).square().mean())
    assert found["mirrored"] < found["uniform"]


@pytest.mark.slow
def test_finetuning_moves_the_levels(model):
    prepared = infoq_fx.prepare(model, IMAGES)
    plain = infoq_fx.convert(prepared, allocate(prepared, (2,)))
    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    tuned = infoq_fx.finetune(plain, images, teacher=prepared, epochs=5, learning_rate=0.03, progress=False)
    before, after = integers_of(plain), integers_of(tuned)
    assert all(len(q.unique()) <= 1 << bits for q, bits in after.values())
    moved = [name for name in before if before[name][0].unique().tolist() != after[name][0].unique().tolist()]
    assert moved


@pytest.mark.slow
def test_budgets_of_bitops_take_equal_steps(model):
    budget = infoq_fx.Budget(bitops=3e6)
    prepared = infoq_fx.prepare(model, IMAGES, budget=budget)
    assert prepared.inventory.levels == "mirrored"
    prepared = infoq_fx.prepare(model, IMAGES)
    table = infoq_fx.score(prepared, IMAGES, criterion="weight_mse", progress=False)
    allocation = infoq_fx.allocate(table, budget)
    with pytest.warns(UserWarning, match="limits BitOps, and weights have codebooks"):
        infoq_fx.convert(prepared, allocation)


@pytest.mark.slow
def test_scores_are_for_the_levels_of_the_model(model):
    uniform, learned = (infoq_fx.prepare(model, IMAGES, levels=levels) for levels in ("uniform", "codebook"))
    table = infoq_fx.score(learned, IMAGES, criterion="weight_mse", progress=False)
    assert infoq_fx.refine(learned, table, 4.0, IMAGES, recovery="none").bits
    with pytest.raises(infoq_fx.OptionError, match="levels 'codebook', the model was prepared with 'uniform'"):
        infoq_fx.refine(uniform, table, 4.0, IMAGES, recovery="none")
    tolerance = infoq_fx.Tolerance(nats=0.5)
    with pytest.raises(infoq_fx.OptionError, match="prepare it with levels='codebook', or score again"):
        infoq_fx.search_tolerance(uniform, table, tolerance, IMAGES, validation_data=IMAGES, progress=False)


def test_the_command_line_takes_the_levels_of_scores(model):
    inventory = infoq_fx.prepare(model, IMAGES).inventory
    options = {"levels": "auto"}
    take_levels(options, inventory)
    assert options["levels"] == "codebook"
    take_levels(options | {"levels": "uniform"}, inventory)  # asked for: the check of sites refuses it
    for needs, levels in (
        ({"bitops": 1e6}, "mirrored"),
        ({"target": "qonnx"}, "uniform"),
        ({"minimize": "bitops"}, "mirrored"),
    ):
        with pytest.raises(infoq_fx.OptionError, match=f"--levels {levels}"):
            take_levels({"levels": "auto", **needs}, inventory)


def test_codebooks_cost_a_byte_a_level_and_mirrors_a_bit_a_channel():
    plain, mirrored, learned = (
        QuantSite("w", "weight", (12, 100), (3,), 0, levels=levels) for levels in ("uniform", "mirrored", "codebook")
    )
    assert weight_bytes(mirrored, 3) == weight_bytes(plain, 3) + 2
    assert weight_bytes(learned, 3) == weight_bytes(plain, 3) + 8
    assert weight_bytes(learned, 7) == weight_bytes(mirrored, 7) == weight_bytes(plain, 7)
    small = QuantSite("w", "weight", (4, 20), (3,), 0, levels="codebook")
    assert weight_bytes(small, 3) == weight_bytes(small, 8)  # packing and levels would take more than they save


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, "codebook"),
        ({"target": "qonnx"}, "uniform"),
        ({"minimize": "bitops"}, "mirrored"),
        ({"bitops": 1e6, "target": "qonnx"}, "uniform"),
        ({"minimize": "bitops", "levels": "codebook"}, "codebook"),
    ],
)
def test_the_command_line_takes_what_the_target_needs(options, levels):
    assert _choose_levels({"levels": "auto", **options}) == levels


def test_the_command_line_refuses_levels_that_the_target_does_not_take():
    with pytest.raises(infoq_fx.OptionError, match="--levels mirrored is given with --target qonnx"):
        _choose_levels({"levels": "mirrored", "target": "qonnx"})


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "bits"), [(32, 2), (48, 3), (400, 3)])
def test_mirrored_channels_are_stored_where_that_makes_the_file_smaller(outputs, bits, tmp_path, monkeypatch):
    torch.manual_seed(0)
    data, sizes = torch.randn(64, 16), []
    prepared = infoq_fx.prepare(torch.nn.Sequential(torch.nn.Linear(16, outputs)).eval(), data, levels="mirrored")
    quantized = infoq_fx.convert(prepared, allocate(prepared, (bits,)))
    for _ in range(2):
        sizes.append(infoq_fx.export_onnx(quantized, tmp_path / "model.onnx").stat().st_size)
        monkeypatch.setattr("infoq_fx.export.qdq_onnx.packing._mirror", lambda weight: weight)
    assert sizes[0] < sizes[1] if outputs == 400 else sizes[0] == sizes[1]
