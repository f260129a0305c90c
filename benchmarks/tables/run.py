"""Sampling that can be stopped at any moment and goes on where it was: one picture is one file, written whole."""
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from .comfyui import OutOfMemory
from .graph import Case, Row, Setup, build

ROUNDS = (8, 32)  # pictures of each row that are drawn before those of the next: all rows have a first figure early


def path_of(out: Path, row: Row, case: Case, number: int) -> Path:
    return out / "pictures" / row.key / f"{case.key}-{number:04}.png"


def write(picture: np.ndarray, path: Path) -> None:
    """Whole or not at all, whenever the process is killed."""
    part = path.with_suffix(f".part{os.getpid()}")
    Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8)).save(part, "PNG")
    os.replace(part, path)


def mixed(cases: list[Case]) -> list[Case]:
    """One of each kind in turn, so that each column fills at the same pace."""
    kinds = dict.fromkeys(case.kind for case in cases)
    by_kind = [[case for case in cases if case.kind == kind] for kind in kinds]
    return [case for case in chain(*zip_longest(*by_kind)) if case]


def limited(cases: list[Case], limit: int) -> list[Case]:
    """The first `limit` pictures of each kind; 0: all."""
    left, kept = {}, []
    for case in cases:
        room = left.setdefault(case.kind, limit or 10**9)
        count = min(case.count, room)
        left[case.kind] -= count
        kept += [replace(case, count=count)] if count else []
    return kept


def chunks(cases: list[Case], batch: int) -> list[tuple[Case, int, int]]:
    """(case, first picture, how many): always cut at the same places, so that what is drawn again after a kill is the same."""
    return [(case, first, min(batch, case.count - first)) for case in mixed(cases) for first in range(0, case.count, batch)]


def work(rows: list[Row], cases: list[Case], batch: int) -> Iterator[tuple[Row, tuple[Case, int, int]]]:
    """Rows in turn, by rounds."""
    cut, begun = chunks(cases, batch), 0
    for pictures in (*ROUNDS, None):
        until = len(cut) if pictures is None else min(len(cut), begun + max(1, -(-pictures // batch)))
        for row in rows:
            yield from ((row, chunk) for chunk in cut[begun:until])
        begun = until


def missing(out: Path, row: Row, chunk: tuple[Case, int, int]) -> list[int]:
    case, first, length = chunk
    return [number for number in range(first, first + length) if not path_of(out, row, case, number).exists()]


class Progress:
    """A line every two seconds: what is done, how fast, how long it still takes."""

    def __init__(self, total: int, say: Callable[[str], None] = print):
        self.total, self.say, self.done, self.began, self.spoke = total, say, 0, time.monotonic(), 0.0

    def add(self, pictures: int, what: str) -> None:
        self.done += pictures
        now = time.monotonic()
        if now - self.spoke > 2 or self.done == self.total:
            self.spoke, rate = now, self.done / max(now - self.began, 1e-6)
            self.say(f"{self.done} of {self.total} pictures, {rate:.2g}/s, {lasting((self.total - self.done) / rate)} left: {what}")


def lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def sample(setup: Setup, rows: list[Row], cases: list[Case], runner, out: Path, batch: int, say=print) -> dict[str, str]:
    """Draw what is missing; returns by row why it failed. A row that fails is left, and the others go on."""
    failed, fits = {}, batch
    for row in rows:
        folder = out / "pictures" / row.key
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part*"):
            part.unlink()
    todo = [(row, chunk) for row, chunk in work(rows, cases, batch) if missing(out, row, chunk)]
    progress = Progress(sum(chunk[2] for _, chunk in todo), say)
    for row, chunk in todo:
        if row.name not in failed:
            try:
                fits = draw(setup, row, chunk, runner, out, fits, say)
            except Exception as error:  # anything that a node may raise
                failed[row.name] = f"{type(error).__name__}: {error}".strip()
                say(f"row {row.name!r} failed, the others go on: {failed[row.name]}")
        progress.add(chunk[2], row.name)
    return failed


def draw(setup: Setup, row: Row, chunk: tuple[Case, int, int], runner, out: Path, fits: int, say) -> int:
    """Draw the pictures of a chunk, in halves where memory does not suffice. Returns how many fit at a time."""
    case, *whole = chunk
    parts = [tuple(whole)]
    while parts:
        first, length = parts.pop(0)
        if length > fits:
            parts[:0] = [(first, length // 2), (first + length // 2, length - length // 2)]
            continue
        try:
            began = time.monotonic()
            pictures = runner.pictures(*build(setup, row, case, first, length))
        except OutOfMemory:
            if length == 1:
                raise
            fits = length // 2
            say(f"{length} pictures at a time do not fit into memory: {fits} from now on")
            parts.insert(0, (first, length))
            continue
        spent = {"pictures": length, "seconds": round(time.monotonic() - began, 4), "peak": runner.peak()}
        for number, picture in enumerate(pictures, first):
            if not path_of(out, row, case, number).exists():
                write(picture, path_of(out, row, case, number))
        with (out / "pictures" / row.key / "times.jsonl").open("a") as times:
            times.write(json.dumps(spent) + "\n")
    return fits


def times(out: Path, row: Row) -> list[dict]:
    """How long each batch took; a line that a kill has torn is left out."""
    path, found = out / "pictures" / row.key / "times.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
