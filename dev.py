"""One command on an empty machine: `python dev.py demo` shows what the pack does, `python dev.py test` checks it.

Standard library only. Both commands make `.venv`, install what is needed and find a ComfyUI: `--comfyui PATH`,
the environment variable COMFYUI_PATH, a `custom_nodes/` folder around this checkout, `~/ComfyUI`, else a clone of
a pinned version. Without any of these they go on without ComfyUI.
"""
import argparse
import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).absolute().parent  # not resolved: a checkout linked into custom_nodes/ belongs to that ComfyUI
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
COMFYUI_SOURCE, COMFYUI_TAG = "https://github.com/comfyanonymous/ComfyUI", "v0.3.64"


# --- ComfyUI -----------------------------------------------------------------------------------------------------

def find_comfyui(asked):
    """Folder of a ComfyUI, or None. A place that somebody named must be one; the others are only tried."""
    asked = asked or os.environ.get("COMFYUI_PATH")
    if asked == "none":
        return None
    if asked:
        path = Path(asked).expanduser().absolute()
        if not is_comfyui(path):
            sys.exit(f"{path} is not a ComfyUI (it has no main.py beside a comfy/ folder); "
                     f"give the folder that holds ComfyUI's main.py, or 'none' to go on without")
        return path
    places = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    places += [Path.home() / "ComfyUI", ROOT / ".comfyui"]
    return next((path for path in places if is_comfyui(path)), None) or clone_comfyui()


def is_comfyui(path):
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def clone_comfyui():
    """Shallow clone of the pinned tag into .comfyui/, or None, soon, where there is no git or no network."""
    part = ROOT / ".comfyui.part"  # renamed when complete, so that an interrupted clone is never taken for a ComfyUI
    shutil.rmtree(part, ignore_errors=True)
    quietly = {"check": True, "env": {**os.environ, "GIT_TERMINAL_PROMPT": "0"}, "stdin": subprocess.DEVNULL,
               "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.run(["git", "ls-remote", "--exit-code", COMFYUI_SOURCE, f"refs/tags/{COMFYUI_TAG}"],
                       timeout=20, **quietly)
        say(f"cloning ComfyUI {COMFYUI_TAG} into .comfyui")
        subprocess.run(["git", "clone", "--depth", "1", "--branch", COMFYUI_TAG, COMFYUI_SOURCE, part],
                       timeout=300, **quietly)
    except (OSError, subprocess.SubprocessError):
        return None
    return part.rename(ROOT / ".comfyui")


# --- the environment ---------------------------------------------------------------------------------------------

def requirements(comfyui):
    """What pip is asked for. The tests and the demo make no sound, so ComfyUI's torchaudio is left out."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = ["torch", "torchvision"]
    for key in ("dependencies", "dev"):  # a TOML array of strings is a Python list; tomllib is missing in Python 3.10
        wanted += ast.literal_eval(re.search(rf"^{key} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])
    if comfyui:
        lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted += [line.strip() for line in lines if re.match(r"\s*[a-zA-Z]", line) and "torchaudio" not in line]
        wanted.append("requests")  # ComfyUI imports it, and used to get it through another package
    return wanted


def install(wanted):
    """Make .venv hold `wanted`; a stamp in it lists what was asked for last, so that a second run does nothing."""
    stamp = VENV / "installed.txt"
    if PYTHON.exists() and stamp.is_file() and set(wanted) <= set(stamp.read_text().splitlines()):
        return
    say("installing into .venv (the first time this takes minutes: torch is large)")
    stamp.unlink(missing_ok=True)
    try:
        if not PYTHON.exists() or subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
            subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)  # none yet, or half of one
        subprocess.run([PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"could not set up .venv (exit code {error.returncode}, its message is above)")
    stamp.write_text("\n".join(wanted))


def say(line):
    print(f"[dev] {line}", flush=True)


def venv_python(*arguments, **environment):
    """Exit code of the venv's Python, run in the repository root."""
    env = {**os.environ, "PYTHONUTF8": "1", **environment}
    return subprocess.run([PYTHON, *map(str, arguments)], cwd=ROOT, env=env).returncode


# --- a real ComfyUI, as a process --------------------------------------------------------------------------------

class Server:
    """The real ComfyUI on the CPU, in a process and a base directory of its own, with this pack as its custom node.

    >>> with Server(comfyui_path, base_directory) as server:                       # doctest: +SKIP
    ...     entry = server.run(prompt)
    ...     png = server.view(entry["outputs"]["9"]["images"][0])

    Nothing is written outside `base_directory`; what ComfyUI prints goes to `comfyui.log` in it.
    """

    def __init__(self, comfyui_path, base_directory, python=sys.executable):
        self.comfyui, self.base, self.python = Path(comfyui_path).absolute(), Path(base_directory).absolute(), python
        self.log = self.base / "comfyui.log"
        self.process = self.url = None

    def __enter__(self):
        self.lay_out()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [self.python, self.comfyui / "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
                   "--base-directory", self.base, "--disable-auto-launch", "--disable-api-nodes",
                   "--database-url", f"sqlite:///{(self.base / 'user/comfyui.db').as_posix()}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=self.base, stdout=log, stderr=subprocess.STDOUT,
                                            stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONUTF8": "1"})
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception):
        self.stop()

    def lay_out(self):
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        pack = self.base / "custom_nodes/comfyui-safe-denoiser"
        shutil.rmtree(pack, ignore_errors=True)
        shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(
            ".git", ".venv", ".comfyui*", "demo", "__pycache__", ".*_cache"))

    def wait_until_ready(self):
        self.wait_for(lambda: self.get("/system_stats"), seconds=180)
        if re.search(r"IMPORT FAILED\).*comfyui-safe-denoiser", self.tail(10_000)):
            raise RuntimeError(f"ComfyUI could not import this pack; its log ends\n{self.tail(80)}")

    def wait_for(self, answer, seconds):
        """Poll `answer()` until it is true; when ComfyUI ends or time runs out, the error holds the end of its log."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            try:
                if found := answer():
                    return found
            except OSError:  # it does not listen yet, or is about to end
                pass
            time.sleep(0.1)
        ended = self.process.poll()
        what = f"gave no answer within {seconds} s" if ended is None else f"ended with exit code {ended}"
        raise RuntimeError(f"ComfyUI {what}; its log ends\n{self.tail()}")

    def tail(self, lines=30):
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def request(self, path, body=None):
        """Bytes of the answer; an HTTP error carries ComfyUI's own words. No proxy: the server is on this machine."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"ComfyUI answered {path} with {error.code}: {error.read().decode()}") from error

    def get(self, path):
        return json.loads(self.request(path) or "null")

    def post(self, path, body):
        return json.loads(self.request(path, body) or "null")

    def view(self, image):
        """Bytes of the file behind an image record of a history entry."""
        return self.request("/view?" + urllib.parse.urlencode(image))

    def run(self, prompt, seconds=600):
        """Run a prompt in API format to its end; returns its history entry, or raises with the failing node's error."""
        answer = self.post("/prompt", {"prompt": prompt})
        if answer["node_errors"]:
            raise RuntimeError(f"ComfyUI refused some nodes: {answer['node_errors']}")
        path, key = f"/history/{answer['prompt_id']}", answer["prompt_id"]
        entry = self.wait_for(lambda: self.get(path).get(key), seconds)
        for kind, details in entry["status"]["messages"]:
            where = f"{details.get('node_type')} (node {details.get('node_id')})"
            if kind == "execution_error":
                raise RuntimeError(f"{where}: {details['exception_type']}: {details['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise RuntimeError(f"interrupted in {where}")
        return entry


# --- the two commands --------------------------------------------------------------------------------------------

def test(comfyui, arguments):
    """ruff, then pytest; the first exit code that is not 0."""
    results = VENV / "tests.xml"
    results.unlink(missing_ok=True)
    say("ruff check")
    style = venv_python("-m", "ruff", "check", "--output-format", "concise")
    say("pytest" + ("" if comfyui else ", without ComfyUI"))
    tests = venv_python("-m", "pytest", f"--junitxml={results}", *arguments, SAFE_DENOISER_COMFYUI=str(comfyui or ""))
    if results.exists():
        skipped = Counter(case.get("message") for case in ElementTree.parse(results).iter("skipped")
                          if case.get("type") == "pytest.skip")
        reasons = "; ".join(f"{count} because: {reason}" for reason, count in skipped.most_common())
        say(f"{skipped.total()} tests skipped" + (f" ({reasons})" if reasons else ""))
    if style:
        say("ruff check found errors, listed above pytest's output")
    return tests or style


def demo(comfyui, arguments):
    return venv_python("-m", "tiny_digits.demo", *(["--comfyui", comfyui] if comfyui else []), *arguments)


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever types the command may have any Python
        sys.exit(f"this needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # else pytest's --co would be taken for --comfyui
    parser.add_argument("command", choices=["demo", "test"], help="other arguments go to pytest, as --slow does")
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI's folder, or 'none' to do without")
    options, arguments = parser.parse_known_args()
    comfyui = find_comfyui(options.comfyui)
    say(f"ComfyUI: {comfyui}" if comfyui else "no ComfyUI: going on without (--comfyui PATH names one)")
    install(requirements(comfyui))
    sys.exit({"demo": demo, "test": test}[options.command](comfyui, arguments))


if __name__ == "__main__":
    main()
