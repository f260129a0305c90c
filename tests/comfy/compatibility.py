"""The table of model families in docs/compatibility.md, as test runs on several ComfyUIs make it, each its own column."""
import os
import re
from pathlib import Path

from families import FAMILIES, REFUSED

from dev import ROOT, comfyui_version

PAGE, BEGIN, END = ROOT / "docs/compatibility.md", "<!-- families: written by the test run -->\n", "<!-- /families -->"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def read() -> tuple[list[str], dict[str, dict[str, str]]]:
    """Versions of the columns, and each family's cells by column."""
    head, _, *rows = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()
    columns = cells(head)
    return [column[1:] for column in columns if re.match(r"v\d", column)], {cells(row)[0]: dict(zip(columns, cells(row))) for row in rows}


def write(outcomes: dict[str, str]) -> None:
    """Add or renew the column of the ComfyUI that was tested. A family that failed, or that the release lacks, has a dash."""
    version = comfyui_version(Path(os.environ["SAFE_DENOISER_COMFYUI"]))
    versions, before = read()
    versions = sorted({*versions, version}, key=lambda one: [*map(int, re.findall(r"\d+", one))])
    head = ["family", "class", "predicts", "latent", *(f"v{one}" for one in versions), "what to know"]
    lines = [head, ["---"] * len(head)]
    for name, family in (FAMILIES | REFUSED).items():
        outcome, old = outcomes.get(f"family: {name}", "—"), before.get(name, {})
        kind = re.search(r"\((\w+), (\w+), ", outcome)
        told = {**{f"v{one}": old.get(f"v{one}", "—") for one in versions}, f"v{version}": re.split(r"[ :]", outcome)[0]}
        why = re.search("audio or a 3-D shape|maps one picture to another", outcome)
        lines.append([name, family.config, kind[2] if kind else old.get("predicts", "—"), " × ".join(map(str, family.latent)),
                      *(told[f"v{one}"] for one in versions), family.note or (why[0] if why else old.get("what to know", ""))])
    text = PAGE.read_text(encoding="utf-8")
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    PAGE.write_text(text.split(BEGIN)[0] + BEGIN + table + END + text.split(END)[1], encoding="utf-8")
