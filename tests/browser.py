"""The report's page as a file and in a headless Chromium."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest


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


def read_json(path, name="report-data"):
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)
