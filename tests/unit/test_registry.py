"""What the Comfy registry asks of pyproject.toml and of the archive, and the checks of `comfy node validate`."""
import re
import subprocess
import sys
from fnmatch import fnmatch
from xml.etree import ElementTree

import pytest

from dev import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RAW = "https://raw.githubusercontent.com/comfyui-safe-denoiser/comfyui-safe-denoiser/main/"


def test_the_project_section():
    project = PROJECT["project"]
    name = project["name"]
    assert len(name) < 100 and re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (ROOT / project["license"]["file"]).is_file()
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert 40 < len(project["description"]) < 200
    assert not {re.split(r"[<>=!~ \[]", one)[0] for one in project["dependencies"]} & {"torch", "torchvision"}


def test_requirements_are_those_of_the_project():
    """What ComfyUI-Manager and people install from is a copy of pyproject.toml's list."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["project"]["dependencies"]


def test_the_tool_comfy_section():
    comfy = PROJECT["tool"]["comfy"]
    assert set(comfy) == {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    assert comfy["PublisherId"] and comfy["DisplayName"] == "Safe Denoiser" and comfy["requires-comfyui"].startswith(">=")


@pytest.mark.parametrize("key, width, height", [("Icon", 400, 400), ("Banner", 1680, 720)])
def test_icon_and_banner_are_drawings_of_the_asked_shape(key, width, height):
    url = PROJECT["tool"]["comfy"][key]
    assert url.startswith(RAW)
    path = ROOT / url.removeprefix(RAW)
    drawing = ElementTree.parse(path).getroot()
    assert (drawing.get("width"), drawing.get("height"), drawing.get("viewBox")) == (str(width), str(height), f"0 0 {width} {height}")
    assert path.stat().st_size < 20_000 and drawing.get("aria-label")
    tags = {element.tag.rpartition("}")[2] for element in drawing.iter() if isinstance(element.tag, str)}
    assert not tags & {"script", "image", "foreignObject"}


def test_the_changelog_tells_of_this_version():
    section = re.search(rf"^## \[{re.escape(PROJECT['project']['version'])}\].*\n((?:(?!## ).*\n)*)",
                        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert section and len(section[1]) > 500


def test_the_security_rules_of_comfy_node_validate():
    """No exec, no eval, no two statements on a line."""
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", ".", "-q", "--select", "S102,S307,E702"], cwd=ROOT,
                             capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_archive_holds_what_runs_and_nothing_else():
    rules = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]

    def matches(path, rule):
        """As git reads a rule: without a slash before its end it matches at any depth."""
        parts, body = path.split("/")[:-1] if rule.endswith("/") else path.split("/"), rule.strip("/")
        if "/" not in rule.rstrip("/"):
            return any(fnmatch(part, body) for part in parts)
        return any(fnmatch("/".join(parts[:i + 1]), body) for i in range(len(parts)))

    def ships(path):
        return not any(matches(path, rule) for rule in rules)

    for path in ("__init__.py", "nodes/steering/sample.py", "safe_denoiser/bank/bank.py", "web/safe_denoiser.js",
                 "web/docs/SafeDenoiserReport.md",
                 "web/docs/SafeDenoiserReport/ja.md", "web/docs/img/SafeDenoiserReport.png",
                 "locales/zh/nodeDefs.json", "example_workflows/1 Try it.json", "example_workflows/1 Try it.jpg",
                 "tiny_digits/models/diffusion_models/tiny_digits.safetensors", "LICENSE", "requirements.txt",
                 "subgraphs/Sample safely.json", "subgraphs/Keep a folder out.json", "pyproject.toml"):
        assert (ROOT / path).is_file() and ships(path), path
    for path in ("tests/conftest.py", "benchmarks/safety.py", "dev.py", "assets/banner.svg", "tiny_digits/world.py",
                 "tiny_photos/world.py", ".github/workflows/test.yml"):
        assert (ROOT / path).is_file() and not ships(path), path
