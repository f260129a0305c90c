"""Libraries, installed by others, that are too old: logged in one line at load time. Nothing is ever installed here."""
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest() -> dict[str, str]:
    """The lowest version of each library with which the pack is tested, as pyproject.toml says; tomllib is not in every Python."""
    text = PROJECT.read_text(encoding="utf-8") if PROJECT.is_file() else ""
    named = text.partition("\ndependencies = [")[2].partition("]")[0]
    beside = text.partition("[tool.safe-denoiser.lowest]")[2].partition("\n\n")[0]
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', named) + re.findall(r'^([\w-]+) = "([\d.]+)"', beside, re.MULTILINE))


def too_old() -> str:
    """One line that names what is too old and what to do, or nothing."""
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]

    found = []
    for name, least in lowest().items():
        try:
            here = version(name)
        except PackageNotFoundError:  # open_clip: what needs it says so itself
            continue
        if numbers(here) < numbers(least):
            found.append(f"{name} {here} (needs {least} or newer)")
    return f"safe denoiser: too old: {', '.join(found)}; nodes may fail until you upgrade them in ComfyUI's Python" if found else ""
