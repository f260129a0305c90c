"""Options of the test run, and the ComfyUI that it runs against (`python dev.py test` finds one and names it in the environment)."""
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

COMFYUI = os.environ.get("SAFE_DENOISER_COMFYUI") or ""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "no ComfyUI" if not COMFYUI else "no chromium" if not CHROMIUM else \
    "no playwright" if not importlib.util.find_spec("playwright") else ""

# Of the example workflows:
NOT_HERE = {  # the user's own files: choices that no list on this machine can hold
    "v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors", "sd3.5_large_fp8_scaled.safetensors",
    "flux1-dev-fp8.safetensors", "flux1-redux-dev.safetensors", "sigclip_vision_patch14_384.safetensors", "sd21-unclip-h.ckpt",
    "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors", "flux1-dev-kontext_fp8_scaled.safetensors",
    "clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "unwanted.png", "unwanted.safetensors", "my_negation_set",
}
NEEDS = {"Tiny digits, check and branch": "ComfySwitchNode"}  # nodes of theirs that not every ComfyUI has


def runs_here(workflow, there):
    """Whether nothing is missing: no model of the user's own, no node."""
    kinds = {node["type"] for node in workflow["nodes"]} - {"MarkdownNote"}
    return kinds <= set(there) and not any(value in NOT_HERE for node in workflow["nodes"] for value in node["widgets_values"]
                                           if isinstance(value, str))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--write-compatibility", action="store_true", help="write what this run shows of model families into docs/")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "tests/comfy" in Path(item.fspath).as_posix():
            item.add_marker(pytest.mark.comfy)
            if not COMFYUI:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI"))
        if "tests/browser" in Path(item.fspath).as_posix():
            item.add_marker(pytest.mark.browser)
            if NO_BROWSER:
                item.add_marker(pytest.mark.skip(reason=NO_BROWSER))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
