"""Options of the test run, and the ComfyUI that it runs against (`python dev.py test` finds one and names it in the environment)."""
import os
from pathlib import Path

import pytest

COMFYUI = os.environ.get("SAFE_DENOISER_COMFYUI") or ""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "tests/comfy" in Path(item.fspath).as_posix():
            item.add_marker(pytest.mark.comfy)
            if not COMFYUI:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
