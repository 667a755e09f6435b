"""Weights with codebooks on every way that a quantized module takes."""

import importlib.util
import itertools
import math

import numpy as np
import onnxruntime
import pytest
import torch
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.allocation.cost import weight_bytes
from infoq_fx.cli.inputs import _choose_levels, take_levels
from infoq_fx.conversion.quantized import find_codebooks
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


@pytest.fixture(scope="module")
def quantized(model):
    prepared = infoq_fx.prepare(model, IMAGES)
    allocation = allocate(prepared, (2, 4, 6, 3, 7))
    return infoq_fx.convert(infoq_fx.recover(prepared, allocation, IMAGES, progress=False), allocation)


def integers_of(module):
    bits = infoq_fx.allocation_of(module).bits
    return {name: (x, bits[name]) for name, x in module.named_buffers() if name in bits}


def test_every_weight_has_as_many_levels_as_its_bits_allow(quantized):
    for q, bits in integers_of(quantized).values():
        assert q.dtype == torch.int8
        assert len(q.unique()) <= 1 << bits
    with_codebooks = set(find_codebooks(quantized))
    assert with_codebooks
    assert not any(bits > 6 for name, (_, bits) in integers_of(quantized).items() if name in with_codebooks)
    assert "weights have a codebook of integer levels" in infoq_fx.summarize(quantized)


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
    assert find_codebooks(again) == find_codebooks(quantized)


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


@pytest.mark.slow
def test_finetuning_moves_the_levels(model):
    prepared = infoq_fx.prepare(model, IMAGES)
    plain = infoq_fx.convert(prepared, allocate(prepared, (2,)))
    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    tuned = infoq_fx.finetune(plain, images, epochs=5, learning_rate=0.1, progress=False)
    before, after = integers_of(plain), integers_of(tuned)
    assert all(len(q.unique()) <= 1 << bits for q, bits in after.values())
    moved = [name for name in before if before[name][0].unique().tolist() != after[name][0].unique().tolist()]
    assert moved


@pytest.mark.slow
def test_budgets_of_bitops_take_equal_steps(model):
    budget = infoq_fx.Budget(bitops=3e6)
    prepared = infoq_fx.prepare(model, IMAGES, budget=budget)
    assert not any(site.has_codebook for site in prepared.inventory.sites)
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
    for needs_uniform in ({"bitops": 1e6}, {"target": "qonnx"}, {"minimize": "bitops"}):
        with pytest.raises(infoq_fx.OptionError, match="--levels uniform"):
            take_levels({"levels": "auto", **needs_uniform}, inventory)


def test_a_codebook_costs_a_byte_a_level():
    plain, learned = (QuantSite("w", "weight", (4, 100), (3,), 0, has_codebook=has) for has in (False, True))
    assert weight_bytes(learned, 3) == weight_bytes(plain, 3) + 8
    assert weight_bytes(learned, 7) == weight_bytes(plain, 7)
    small = QuantSite("w", "weight", (4, 20), (3,), 0, has_codebook=True)
    assert weight_bytes(small, 3) == weight_bytes(small, 8)  # packing and levels would take more than they save


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, "auto"),
        ({"target": "qonnx"}, "uniform"),
        ({"minimize": "bitops"}, "uniform"),
        ({"target": "qonnx", "levels": "codebook"}, "codebook"),
    ],
)
def test_the_command_line_takes_what_the_target_needs(options, levels):
    assert _choose_levels({"levels": "auto", **options}) == levels
