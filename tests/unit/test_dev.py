"""dev.py: which ComfyUIs and which environment it takes, and that what it makes is complete or not there."""
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import dev

NAMED = sys.version_info[:2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory, and a checkout elsewhere."""
    monkeypatch.setattr(dev.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(dev, "ROOT", tmp_path / "checkout")
    monkeypatch.setattr(dev, "clone_comfyui", lambda: None)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "home"


def comfyui(path: Path, version="1.2.3", requirements="") -> Path:
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    (path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (path / "requirements.txt").write_text(requirements)
    return path


def test_a_comfyui_and_the_one_beside_it_are_found(home, monkeypatch):
    assert dev.find_comfyui(None) == []
    ours = comfyui(home / "ComfyUI")
    assert dev.find_comfyui(None) == [ours]
    later = comfyui(home / "ComfyUI-next", "2.0")
    assert dev.find_comfyui(None) == [ours, later] and dev.comfyui_version(later) == "2.0"
    around = comfyui(home / "mine")
    monkeypatch.setattr(dev, "ROOT", around / "custom_nodes/pack")
    assert dev.find_comfyui(None) == [around], "a checkout in custom_nodes belongs to the ComfyUI around it"
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join(map(str, (later, ours))))
    assert dev.find_comfyui(None) == [later, ours]
    assert dev.find_comfyui([str(around)]) == [around] and dev.find_comfyui(["none"]) == []
    with pytest.raises(SystemExit, match="is not a ComfyUI"):
        dev.find_comfyui([str(home)])


def test_what_is_asked_for(home, monkeypatch):
    monkeypatch.setattr(dev, "ROOT", Path(dev.__file__).parent)
    place = comfyui(home / "ComfyUI", requirements="torchaudio\n  torchaudio>=2\n# a remark\naiohttp>=3.11\n  einops\n")
    assert {"aiohttp>=3.11", "einops", "requests", "torch"} <= set(dev.requirements(place, "demo"))
    assert not any("torchaudio" in line for line in dev.requirements(place, "test"))
    for_tests = set(dev.requirements(None, "test")) - set(dev.requirements(None, "demo"))
    assert {"pytest", "open-clip-torch"} <= {line.partition(">")[0] for line in for_tests}


def test_a_python_is_asked_what_it_lacks():
    found = dev.look(sys.executable, ["pytest", "numpy>=1.0", "numpy<1", "no-such-package-at-all"])
    assert found["missing"] == ["numpy<1", "no-such-package-at-all"] and tuple(found["version"]) == NAMED and found["torch"]
    assert dev.look("/no/such/python", []) is None


@pytest.fixture
def with_torch(home):
    """A ComfyUI whose own environment has a torch, which is nothing but a name."""
    place = comfyui(home / "ComfyUI")
    venv.create(place / "venv", with_pip=True)
    packages = Path(dev.look(place / "venv" / dev.BIN, [])["paths"][-1])
    for name in ("torch", "torchvision"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("here = True")
        (packages / f"{name}-9.9.dist-info").mkdir()
        (packages / f"{name}-9.9.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    return place


def test_the_environment_of_a_comfyui_is_used_and_nothing_is_put_into_it(with_torch, home, monkeypatch, capsys):
    """As it is, where it has all; else with an environment on top, which sees its torch."""
    python, ours = with_torch / "venv" / dev.BIN, home / "ours"
    monkeypatch.setattr(dev, "requirements", lambda *_: ["torch", "torchvision"])
    assert dev.environment(with_torch, "demo", ours) == python and not ours.exists()

    asked = []
    monkeypatch.setattr(dev, "requirements", lambda *_: ["torch", "wanted-package"])
    told = dev.told
    monkeypatch.setattr(dev, "told", lambda doing, command, **options: asked.append(command) if "pip" in command else told(doing, command))
    made = dev.environment(with_torch, "demo", ours)
    assert made == ours / dev.BIN and asked[0][-1] == "wanted-package", "only what is missing is installed"
    seen = subprocess.run([made, "-c", "import torch; print(torch.here, torch.__file__)"], capture_output=True, text=True).stdout
    assert seen.startswith(f"True {with_torch}") and "on top of" in capsys.readouterr().out


def test_what_was_interrupted_is_not_there(home, monkeypatch):
    def interrupted(doing, command, **options):
        Path(command[-1]).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(dev, "told", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dev.install(home / "ours", ["torch"], None, None)
    assert not (home / "ours").exists()


def test_what_takes_long_is_told_and_what_fails_shows_its_last_lines(monkeypatch, capfd):
    monkeypatch.setattr(dev, "HEARTBEAT", 0.2)
    dev.told("waiting", [sys.executable, "-c", "import time; print('at work', flush=True); time.sleep(1)"])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "[dev] waiting" and any(line.endswith("at work") for line in lines[1:])
    with pytest.raises(SystemExit, match="(?s)what went wrong.*could not go on waiting"):
        dev.told("waiting", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])


@pytest.mark.parametrize("git", ["fails", "takes for ever", "is interrupted", "works"])
def test_a_clone_is_there_whole_or_not_at_all(git, tmp_path, monkeypatch, capsys):
    """And where there is none, the commands go on without ComfyUI."""
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev.subprocess, "run", lambda *_, **__: None)  # the tag is there
    told = dev.told

    def clone(doing, command, limit, **options):
        comfyui(Path(command[-1]))
        if git == "is interrupted":
            raise KeyboardInterrupt
        script = {"fails": "raise SystemExit('no network')", "takes for ever": "import time; time.sleep(60)", "works": ""}[git]
        assert limit == 300
        told(doing, [sys.executable, "-c", script], limit=1 if git == "takes for ever" else limit)

    monkeypatch.setattr(dev, "told", clone)
    if git == "is interrupted":
        with pytest.raises(KeyboardInterrupt):
            dev.clone_comfyui()
    else:
        assert dev.clone_comfyui() == (tmp_path / ".comfyui" if git == "works" else None)
        assert ("could not go on cloning" in capsys.readouterr().out) == (git != "works")
    assert [path.name for path in tmp_path.iterdir()] == ([".comfyui"] if git == "works" else [])


def test_the_counts_of_a_test_run(tmp_path):
    (tmp_path / "t.xml").write_text('<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"><testcase>'
                                    '<skipped type="pytest.skip" message="no ComfyUI"/></testcase></testsuite></testsuites>')
    assert dev.outcome(tmp_path / "t.xml") == "2 passed, 1 failed, 2 skipped (1 because: no ComfyUI)"


def test_the_stub_of_torchaudio_imports_and_makes_no_sound():
    script = ("import torchaudio, torchaudio.functional as F; from torchaudio.transforms import MelScale\n"
              "torchaudio.compliance.kaldi\ntry: MelScale(3)\nexcept RuntimeError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(dev.STUBS)})
    assert done.stderr == "" and "makes no sound" in done.stdout
