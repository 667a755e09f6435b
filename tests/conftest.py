"""Shared by all tests: small models, one thread where the test itself is small, and the real data if it is there."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

REAL_MODELS = Path(__file__).parents[2] / "shared" / "data" / "real_models.py"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_models() -> ModuleType:
    """Pretrained models and real images that are not part of the project."""
    if not REAL_MODELS.exists():
        pytest.skip(f"real models are not here: no {REAL_MODELS.parent.name}/{REAL_MODELS.name} beside the project")
    spec = importlib.util.spec_from_file_location("real_models", REAL_MODELS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_models"] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def start_chromium():
    """A headless Chromium: Playwright's own, or one that is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason='no browser driver: pip install "infoq-fx[test]"')
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium here: playwright install --with-deps chromium")
        # Its sandbox refuses to run as root.
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chromium():
    with start_chromium() as browser:
        yield browser


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += x
        return functional.relu(out)


class ResidualNet(nn.Module):
    """Two residual blocks on 8x8 images of one channel, 5 classes, dropout; the tests' work-horse."""

    def __init__(self, channels=6, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))


def randomise_norms(model):
    """Batch norms with statistics and affine maps that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


@pytest.fixture
def residual_net():
    torch.manual_seed(1)
    return randomise_norms(ResidualNet()).eval()


@pytest.fixture
def images():
    """64 images [64, 1, 8, 8] and labels [64]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 5, (64,), generator=generator)
