"""Prompt files as they are published: CSV, TSV, JSON, JSON lines or plain text; columns are found by their names."""
import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

# What a column may be called, the most telling name first: a file of attacks also has the harmless prompt that it began from.
NAMES = {
    "prompt": ("adv_prompt", "adversarial_prompt", "sensitive prompt", "unsafe_prompt", "prompt", "caption", "text", "title"),
    "seed": ("evaluation_seed", "seed", "sd_seed"),
    "cfg": ("evaluation_guidance", "guidance", "guidance_scale", "sd_guidance_scale", "cfg"),
    "concept": ("concept", "categories", "category", "class", "classes", "artist", "label_str"),
}


@dataclass(frozen=True)
class Prompt:
    text: str
    seed: int | None = None
    cfg: float | None = None
    concept: str = ""


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, which columns they came from, and the file's hash."""

    name: str
    sha256: str
    columns: dict[str, str]
    prompts: tuple[Prompt, ...]
    skipped: int = 0

    def __str__(self):
        taken = ", ".join(f"{what} from {column!r}" for what, column in self.columns.items()) or "one prompt per line"
        return f"{self.name}: {len(self.prompts)} prompts, {taken}" + f"; {self.skipped} empty lines left out" * bool(self.skipped)


def read(path: Path, column: str = "") -> PromptFile:
    """Read a prompt file. `column` names the prompts' column where none of the known names is there.

    Raises:
        ValueError: no column holds prompts, or there is no prompt.
    """
    raw = Path(path).read_bytes()
    rows = records(raw.decode("utf-8-sig"), Path(path).suffix.lower())
    columns = columns_of(rows, column) if isinstance(rows[0] if rows else "", dict) else {}
    found = [Prompt(row.strip()) if isinstance(row, str) else prompt_of(row, columns) for row in rows]
    prompts = tuple(one for one in found if one.text)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; it needs one per line, or a column of {', '.join(NAMES['prompt'])}")
    return PromptFile(Path(path).name, hashlib.sha256(raw).hexdigest(), columns, prompts, len(found) - len(prompts))


def records(text: str, suffix: str) -> list:
    """Lines of plain text, or a dict per row."""
    if suffix in (".jsonl", ".ndjson"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if suffix == ".json":
        return flat(json.loads(text))
    if suffix in (".csv", ".tsv"):
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","))
    return text.splitlines()


def flat(value) -> list:
    """The rows of a JSON file: a list, or the longest list inside (`annotations` of COCO's captions)."""
    if isinstance(value, list):
        return value
    lists = [flat(one) for one in value.values() if isinstance(one, dict | list)] if isinstance(value, dict) else []
    return max(lists, key=len, default=[])


def columns_of(rows: list[dict], column: str = "") -> dict[str, str]:
    """Which column is taken for what, by its name, whatever its case, with blanks or with underscores."""
    names = {str(name).strip().lower().replace(" ", "_"): name for name in rows[0] if name}
    wanted = NAMES | ({"prompt": (column.lower(),)} if column else {})
    found = {what: next((names[one.replace(" ", "_")] for one in known if one.replace(" ", "_") in names), None)
             for what, known in wanted.items()}
    if found["prompt"] is None:
        raise ValueError(f"no column holds prompts: there are {', '.join(map(repr, names.values()))}; name one with --column")
    return {what: name for what, name in found.items() if name is not None}


def prompt_of(row: dict, columns: dict[str, str]) -> Prompt:
    def number(what, kind):
        try:
            return kind(float(row[columns[what]]))
        except (KeyError, TypeError, ValueError):  # an empty cell: the command's own number
            return None

    text = row.get(columns["prompt"])
    text = text[0] if isinstance(text, list) and text else text
    return Prompt(str(text or "").strip(), number("seed", int), number("cfg", float), str(row.get(columns.get("concept")) or ""))
