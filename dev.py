"""One command on an empty machine: `python dev.py demo` shows what the pack does, `python dev.py test` checks it, `python dev.py pictures`
makes all pictures that its pages show anew, and says which look different now.

Standard library only. All find a ComfyUI: `--comfyui PATH` (more than one for `test`), the environment variable COMFYUI_PATH, a
`custom_nodes/` folder around this checkout, `~/ComfyUI`, each with a `ComfyUI-next` beside it, else a clone of a pinned version.
Without any of these they go on without ComfyUI. They run in the environment that has torch already, that ComfyUI's own or the Python
that runs this, and in a `.venv` on top of it where something is missing there; nothing is ever installed outside of `.venv`.
"""
import argparse
import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from pathlib import Path

ROOT = Path(__file__).absolute().parent  # not resolved: a checkout linked into custom_nodes/ belongs to that ComfyUI
COMFYUI_SOURCE, COMFYUI_TAG = "https://github.com/comfyanonymous/ComfyUI", "v0.33.0"
BIN = "Scripts/python.exe" if os.name == "nt" else "bin/python"
STUBS = ROOT / "tests/stubs"
HEARTBEAT = 5  # seconds between two lines about what takes long

PAGE = "tests.browser.pictures"
PICTURES = {  # all that pages, templates and the registry show: the module that makes them, and its arguments; None: drawn by hand
    "example_workflows/*.jpg": PAGE,
    "web/docs/img/*.png": PAGE,
    "docs/before_after.png": "tiny_digits.demo --comfyui {comfyui} --picture {to}",
    "docs/photographs.png": "tiny_photos.demo --picture {to}",
    "docs/parts.png": "benchmarks.mosaic --picture {to}",
    "benchmarks/safety.png": "benchmarks.safety --plot {to}",
    "assets/*.svg": None,
}


def say(line):
    print(f"[dev] {line}", flush=True)


def told(doing, command, limit=float("inf"), **options):
    """Run a command to its end, or for `limit` seconds; every few seconds a line says what it does, and its last lines come out where it
    fails.
    """
    say(doing)
    began, spoke, last = time.monotonic(), time.monotonic(), deque(maxlen=30)
    process = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", **options)
    reader = threading.Thread(target=lambda: last.extend(process.stdout), daemon=True)
    reader.start()
    try:
        while process.poll() is None and time.monotonic() - began < limit:
            if time.monotonic() - spoke > HEARTBEAT:
                spoke = time.monotonic()
                say(f"  {spoke - began:.0f} s: {last[-1].strip()[:110] if last else doing}")
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)
    if process.returncode:
        sys.exit(f"{''.join(last)}could not go on {doing} (exit code {process.returncode}, its last lines are above)")


# --- ComfyUI -----------------------------------------------------------------------------------------------------

def find_comfyui(asked):
    """Folders of ComfyUIs, perhaps none. A place that somebody named must be one; the others are only tried."""
    asked = asked or [path for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
    if "none" in asked:
        return []
    for path in asked:
        if not is_comfyui(Path(path).expanduser()):
            sys.exit(f"{Path(path).expanduser().absolute()} is not a ComfyUI (it has no main.py beside a comfy/ folder); "
                     f"give the folder that holds ComfyUI's main.py, or 'none' to go on without")
    if asked:
        return [Path(path).expanduser().absolute() for path in asked]
    around = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    for place in (*around, Path.home() / "ComfyUI", ROOT / ".comfyui"):
        found = [path for path in (place, place.with_name(f"{place.name}-next")) if is_comfyui(path)]
        if found:
            return found
    return list(filter(None, [clone_comfyui()]))


def is_comfyui(path):
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def comfyui_version(path):
    return re.search(r'__version__ = "(.*?)"', (path / "comfyui_version.py").read_text(encoding="utf-8"))[1]


def clone_comfyui():
    """Shallow clone of the newest version that was tested into .comfyui/, or None, soon, where there is no git or no network."""
    part = ROOT / ".comfyui.part"  # renamed when complete, so that an interrupted clone is never taken for a ComfyUI
    shutil.rmtree(part, ignore_errors=True)
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(["git", "ls-remote", "--exit-code", COMFYUI_SOURCE, f"refs/tags/{COMFYUI_TAG}"], timeout=20, check=True, env=quiet,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    try:
        told(f"cloning ComfyUI {COMFYUI_TAG} into .comfyui",
             ["git", "clone", "--progress", "--depth", "1", "--branch", COMFYUI_TAG, COMFYUI_SOURCE, part], limit=300, env=quiet)
        return part.rename(ROOT / ".comfyui")
    except SystemExit as error:
        return say(error)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- the environment ---------------------------------------------------------------------------------------------

def requirements(comfyui, command):
    """What pip is asked for. The tests and the demo make no sound, so ComfyUI's torchaudio is left out."""
    wanted = ["torch", "torchvision", "numpy", "safetensors", "pillow"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for key in ("dependencies", "dev") if command == "test" else ():  # a TOML array of strings is a Python list; 3.10 has no tomllib
        wanted += ast.literal_eval(re.search(rf"^{key} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])
    if comfyui:
        lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted += [line.strip() for line in lines if re.match(r"\s*[a-zA-Z]", line) and "torchaudio" not in line]
        wanted.append("requests")  # ComfyUI imports it, and used to get it through another package
    return wanted


LOOK = """
import importlib.metadata as metadata, importlib.util as util, json, re, sys
try:
    from pip._vendor.packaging.requirements import Requirement
except ImportError:
    Requirement = None
def missing(line):
    wanted = Requirement(line) if Requirement else None
    if wanted and wanted.marker and not wanted.marker.evaluate():
        return False
    try:
        found = metadata.version(wanted.name if wanted else re.match(r"[\\w.-]+", line)[0])
    except metadata.PackageNotFoundError:
        return True
    return bool(wanted and not wanted.specifier.contains(found, prereleases=True))
print(json.dumps({"torch": bool(util.find_spec("torch")), "sound": bool(util.find_spec("torchaudio")), "version": sys.version_info[:2],
                  "paths": [path for path in sys.path if path.endswith("-packages")], "missing": [x for x in sys.argv[1:] if missing(x)]}))
"""


def look(python, wanted):
    """What a Python has of `wanted`, or None where it is no Python that works."""
    try:
        answer = subprocess.run([str(python), "-c", LOOK, *wanted], capture_output=True, text=True, timeout=60,
                                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
        return json.loads(answer.stdout) if answer.returncode == 0 else None
    except (OSError, subprocess.SubprocessError):
        return None


def environment(comfyui, command, venv):
    """The Python to run in, with all that is wanted: one that has it, else `venv` on top of one that has torch, else `venv` alone."""
    wanted, below = requirements(comfyui, command), None
    own = [comfyui / f"venv/{BIN}", comfyui / f".venv/{BIN}", comfyui.parent / "python_embeded/python.exe"] if comfyui else []
    for python in (*own, sys.executable, ROOT / ".venv" / BIN):
        found = look(python, wanted) if Path(python).is_file() and Path(python) != venv / BIN else None
        if not found or not found["torch"] or found["version"] < [3, 10]:
            continue
        if not found["missing"]:
            say(f"using {python}, which has all that is needed")
            return python
        below = below or (python, found)
    install(venv, wanted, *(below or (None, None)))
    return venv / BIN


def install(venv, wanted, python, below):
    """Make `venv` hold `wanted`, but for what the packages of `python`, below it, hold. It is complete or it is not there."""
    done, inside = venv / "installed.txt", look(venv / BIN, wanted) if (venv / BIN).is_file() else None
    if done.is_file() and inside and not inside["missing"]:
        return
    try:
        if not done.is_file() or not inside:  # none yet, or half of one
            shutil.rmtree(venv, ignore_errors=True)
            creator = python if python and not subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode \
                else sys.executable  # a portable ComfyUI's Python makes no environments
            told(f"making {venv.name}" + (f" on top of {python}, which has torch" if python else ""), [creator, "-m", "venv", venv])
            made = look(venv / BIN, [])
            if below and below["version"] == made["version"]:
                folder = Path(next(path for path in made["paths"] if path.startswith(str(venv))))
                (folder / "below.pth").write_text("\n".join(below["paths"]))
        done.unlink(missing_ok=True)
        missing = look(venv / BIN, wanted)["missing"]
        large = ": torch is large, this takes minutes the first time" if "torch" in missing else ""
        if missing:
            told(f"installing {len(missing)} packages into {venv.name}{large}",
                 [venv / BIN, "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check", *missing])
        done.write_text("\n".join(wanted))
    except BaseException:  # such as Ctrl-C; what was downloaded stays in pip's cache
        shutil.rmtree(venv, ignore_errors=True)
        raise


def start(python, *arguments, output=None, **environment):
    """A Python as a process, in the repository root; what it says goes to the file `output`, else to the screen."""
    environment = {**os.environ, "PYTHONUTF8": "1", **environment}
    if not look(python, [])["sound"]:  # newer ComfyUI imports torchaudio; nothing here makes a sound
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STUBS), environment.get("PYTHONPATH")]))
    return subprocess.Popen([str(python), *map(str, arguments)], cwd=ROOT, env=environment, stdout=output,
                            stderr=output and subprocess.STDOUT)


# --- a real ComfyUI ----------------------------------------------------------------------------------------------

class Api:
    """A running ComfyUI, by its API."""

    opener = urllib.request.build_opener()

    def __init__(self, url):
        self.url = url.rstrip("/")

    def request(self, path, body=None):
        """Bytes of the answer; an HTTP error carries ComfyUI's own words."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"ComfyUI answered {path} with {error.code}: {error.read().decode(errors='replace')}") from error

    def get(self, path):
        return json.loads(self.request(path) or "null")

    def post(self, path, body):
        return json.loads(self.request(path, body) or "null")

    def view(self, image):
        """Bytes of the file behind an image record of a history entry."""
        return self.request("/view?" + urllib.parse.urlencode(image))

    def queue(self, prompt):
        """Queue a prompt in API format; returns its id."""
        answer = self.post("/prompt", {"prompt": prompt})
        if answer["node_errors"]:
            raise RuntimeError(f"ComfyUI refused some nodes: {answer['node_errors']}")
        return answer["prompt_id"]

    def finished(self, key):
        """The history entry of a prompt, or None as long as it runs."""
        return self.get(f"/history/{key}").get(key)

    @staticmethod
    def checked(entry):
        """The history entry; raises with the failing node's error."""
        for kind, details in entry["status"]["messages"]:
            where = f"{details.get('node_type')} (node {details.get('node_id')})"
            if kind == "execution_error":
                raise RuntimeError(f"{where}: {details['exception_type']}: {details['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise RuntimeError(f"interrupted in {where}")
        return entry


class Server(Api):
    """The real ComfyUI on the CPU, in a process and a base directory of its own, with this pack as its custom node.

    >>> with Server(comfyui_path, base_directory) as server:                       # doctest: +SKIP
    ...     entry = server.run(prompt)
    ...     png = server.view(entry["outputs"]["9"]["images"][0])

    Nothing is written outside `base_directory`; what ComfyUI prints goes to `comfyui.log` in it. `arguments` are more of ComfyUI's own.
    """

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server is on this machine

    def __init__(self, comfyui_path, base_directory, *arguments, python=sys.executable):
        self.comfyui, self.base, self.python = Path(comfyui_path).absolute(), Path(base_directory).absolute(), python
        self.arguments = arguments
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
                   "--database-url", f"sqlite:///{(self.base / 'user/comfyui.db').as_posix()}", *self.arguments]
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
            ".git", ".venv*", ".comfyui*", "demo", "__pycache__", ".*_cache"))

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

    def run(self, prompt, seconds=600):
        """Run a prompt in API format to its end; returns its history entry, or raises with the failing node's error."""
        key = self.queue(prompt)
        return self.checked(self.wait_for(lambda: self.finished(key), seconds))


# --- the commands ------------------------------------------------------------------------------------------------

def outcome(results):
    """Counts of a junit report, and why tests were skipped."""
    if not results.exists():
        return "no report"
    tree = ElementTree.parse(results).getroot()
    count, failures, errors, skipped = (sum(int(suite.get(key, 0)) for suite in tree.iter("testsuite"))
                                        for key in ("tests", "failures", "errors", "skipped"))
    reasons = Counter(case.get("message") for case in tree.iter("skipped") if case.get("type") == "pytest.skip")
    why = "; ".join(f"{times} because: {reason}" for reason, times in reasons.most_common())
    return f"{count - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped" + (f" ({why})" if why else "")


def venv_of(comfyui, i):
    """Where the i-th of the ComfyUIs has what it lacks."""
    return ROOT / (".venv" if i == 0 else f".venv-{comfyui_version(comfyui)}")


def test(comfyuis, arguments):
    """ruff, then pytest on all ComfyUIs at once: all tests on the first, on the others those that need one. The first exit code that is
    not 0.
    """
    pythons = [environment(comfyui, "test", venv_of(comfyui, i)) for i, comfyui in enumerate(comfyuis or [None])]
    say("ruff check")
    codes = [start(pythons[0], "-m", "ruff", "check", "--output-format", "concise").wait()]
    lines = ["ruff check found errors, listed above pytest's output"] if codes[0] else []
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for i, (comfyui, python) in enumerate(zip(comfyuis or [None], pythons)):
            name = f"ComfyUI {comfyui_version(comfyui)}" if comfyui else "without ComfyUI"
            say(f"pytest, {name}" + (", at the same time; what it says comes afterwards" if i else ""))
            results, output = Path(folder) / f"{i}.xml", (Path(folder) / f"{i}.txt").open("w+", encoding="utf-8", errors="replace")
            again = ["-m", "comfy or browser"] if i else []
            jobs.append((name, results, output, start(
                python, "-m", "pytest", f"--junitxml={results}", *again, *arguments, output=output if i else None,
                SAFE_DENOISER_COMFYUI=str(comfyui or ""),
                OMP_NUM_THREADS="1")))  # threads of several processes wait for each other: five times as slow, with models as small
        for i, (name, results, output, process) in enumerate(jobs):
            code = process.wait()
            output.seek(0)
            print(output.read(), end="", flush=True)
            output.close()
            lines.append(f"{name}: {outcome(results)}")
            codes.append(0 if code == 5 and i else code)  # 5: none of the tests that were asked for needs a ComfyUI
    for line in lines:
        say(line)
    return next((code for code in codes if code), 0)


def demo(comfyuis, arguments):
    comfyui = next(iter(comfyuis), None)
    python = environment(comfyui, "demo", ROOT / ".venv")
    return start(python, "-m", "tiny_digits.demo", *(["--comfyui", comfyui] if comfyui else []), *arguments).wait()


def pictures(comfyuis, arguments):
    """All of PICTURES, with the newest ComfyUI and its page."""
    if not comfyuis:
        sys.exit("most pictures are of ComfyUI's own page, and there is no ComfyUI; give its folder with --comfyui PATH")
    python = environment(comfyuis[-1], "test", venv_of(comfyuis[-1], len(comfyuis) - 1))
    return start(python, "-m", "tests.browser.pictures", *arguments, SAFE_DENOISER_COMFYUI=str(comfyuis[-1])).wait()


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever types the command may have any Python
        sys.exit(f"this needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # else pytest's --co would be taken for --comfyui
    parser.add_argument("command", choices=["demo", "test", "pictures"], help="other arguments go to pytest, as --slow does")
    parser.add_argument("--comfyui", metavar="PATH", action="append", help="a ComfyUI's folder, or 'none'; test takes several")
    options, arguments = parser.parse_known_args()
    try:
        comfyuis = find_comfyui(options.comfyui)
        for comfyui in comfyuis:
            say(f"ComfyUI {comfyui_version(comfyui)}: {comfyui}")
        if not comfyuis:
            say("no ComfyUI: going on without (--comfyui PATH names one)")
        sys.exit({"demo": demo, "test": test, "pictures": pictures}[options.command](comfyuis, arguments))
    except KeyboardInterrupt:
        say("stopped; nothing half-made is left")
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
