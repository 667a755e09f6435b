"""Shared by all tests: small models, one thread for small tests, and pretrained models if they are available."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from browser import start_chromium
from networks import ResidualNet, randomise_norms

REAL_MODELS = Path(__file__).parents[2] / "shared" / "data" / "real_models.py"


@pytest.fixture(autouse=True)
def _seeded_and_on_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _one_registry_of_onnx_operators():
    """torch.onnx reads all its operators again for every file, which takes a quarter of a small export."""
    module = importlib.import_module("onnxscript._framework_apis.torch_2_5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_torchlib_ops", functools.cache(module.get_torchlib_ops))
        yield


@pytest.fixture(scope="session")
def real_models() -> ModuleType:
    """Pretrained models and real images that are not part of the project."""
    if not REAL_MODELS.exists():
        pytest.skip(f"pretrained models missing: no {REAL_MODELS.parent.name}/{REAL_MODELS.name} next to the project")
    spec = importlib.util.spec_from_file_location("real_models", REAL_MODELS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chromium():
    with start_chromium() as browser:
        yield browser


@pytest.fixture
def residual_net():
    torch.manual_seed(1)
    return randomise_norms(ResidualNet()).eval()


@pytest.fixture
def images():
    """64 images [64, 1, 8, 8] and labels [64]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 5, (64,), generator=generator)


@pytest.fixture(scope="module")
def free_unpacking():
    """Weights of any size are counted at their bits, as if the operators that unpack them took no bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infoq_fx.allocation.cost.CHAIN_BYTES", -1)
        patch.setattr("infoq_fx.allocation.cost.NODE_BYTES", -1)
        yield
