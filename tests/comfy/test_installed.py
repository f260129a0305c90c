"""What the README says of installing: a clone, `pip install -r requirements.txt`, and every template that needs no other model runs."""
import importlib.metadata as metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev import BIN, ROOT, Server
from tests.comfy.test_workflows import load, to_prompt
from tests.conftest import runs_here

OURS = ("open_clip_torch", "timm", "ftfy")  # what ComfyUI does not bring: the requirement, and what comes with it


def without_ours(folder):
    """A view of this environment's packages, torch and what ComfyUI wants, without those that the pack has to bring. Of several of one
    name the first counts, as on the path.
    """
    taken = {file.parts[0] for name in OURS for file in metadata.files(name) or []}
    for place in (Path(path) for path in sys.path if path.endswith("-packages")):
        for entry in place.iterdir():
            name = entry.name.partition("-")[0] if entry.suffix == ".dist-info" else entry.name
            if not {name, entry.name} & taken and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
        taken |= {name for entry in place.iterdir() for name in (entry.name, entry.name.partition("-")[0])}
    return folder


@pytest.mark.slow
def test_a_clone_and_its_requirements_are_enough(tmp_path):
    venv, below = tmp_path / "venv", tmp_path / "below"
    below.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / BIN
    packages = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    (packages / "below.pth").write_text(str(without_ours(below)))
    ask = [python, "-c", "import torch, open_clip"]
    assert b"open_clip" in subprocess.run(ask, capture_output=True).stderr, "it is not there yet"
    told = subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", "-r", ROOT / "requirements.txt"],
                          capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert not list(packages.glob("torch-*")) and not list(packages.glob("torchvision-*")), "torch stays as it is"
    subprocess.run(ask, check=True)
    ran = []
    with Server(os.environ["SAFE_DENOISER_COMFYUI"], tmp_path / "base", python=python) as server:
        there = server.get("/object_info")
        for path in sorted((ROOT / "example_workflows").glob("*.json")):
            if runs_here(json.loads(path.read_text(encoding="utf-8")), there):
                server.run(to_prompt(load(path.stem), there))
                ran.append(path.stem)
    print(f"\n{len(ran)} templates ran: {'; '.join(ran)}")
    assert "1 Try it" in ran and len(ran) >= 8
