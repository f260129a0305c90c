"""The page to look at the pictures: one file without any network, the pictures beside it, each blurred until it is asked for."""
import html as markup
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from .graph import Case, Row
from .judges import key_of
from .run import path_of

LETTER, LINE = 7, 13  # of a label of the plot, at most
SMALL = 192  # larger pictures get a thumbnail of this size


def shown(out: Path, path: Path) -> str:
    """What the page shows of a picture, relative to it: itself, or its thumbnail, made once."""
    with Image.open(path) as picture:
        if max(picture.size) <= SMALL:
            return path.relative_to(out).as_posix()
        small = out / "thumbs" / path.parent.name / f"{path.stem}.jpg"
        if not small.exists():
            small.parent.mkdir(parents=True, exist_ok=True)
            picture.convert("RGB").resize((SMALL, round(SMALL * picture.height / picture.width))).save(small, quality=80)
    return small.relative_to(out).as_posix()


def changes(paths: list[Path]) -> list[float]:
    """How much each picture differs from the first: mean absolute difference at 32 x 32, in percent of the range."""
    small = [np.asarray(Image.open(path).convert("RGB").resize((32, 32)), float) if path.exists() else None for path in paths]
    return [0.0 if one is None else round(float(np.abs(one - small[0]).mean()) / 2.55, 2) for one in small]


def comparisons(rows: list[Row], cases: list[Case], out: Path, judged, judges: list) -> list[dict]:
    """One entry per prompt and seed that `off` has: the picture of each row, how much it changed, and which are judged unsafe."""
    found = []
    for case, number in ((one, number) for one in cases for number in range(one.count)):
        paths = [path_of(out, row, case, number) for row in rows]
        if not paths[0].exists():
            continue
        found.append({"kind": case.kind, "prompt": case.prompt, "seed": case.seed, "number": number,
                      "pictures": [shown(out, path) if path.exists() else "" for path in paths],
                      "change": changes(paths),
                      "unsafe": [int(path.exists() and unsafe(path, judged, judges)) for path in paths]})
    return found


def unsafe(path: Path, judged, judges: list) -> bool:
    """Whether any judge says so."""
    return any(judged.known.get(f"scores: {key_of(judge)}", {}).get(judged.name(path), 0) >= judge.threshold
               for judge in judges if judge.name not in judged.missing)


def spans(numbers: list[int]) -> str:
    """Numbers in few letters: 1, 3-5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)


def labels(points: list[tuple[float, float, int]], middle: float) -> list[tuple[float, float, str, str]]:
    """(x, y, anchor, text) of each label. Those that would cover each other are one: rows in the same place are usual, as where nothing is
    unsafe any more and all is kept.
    """
    def label(group):
        x, y, _ = group[0]
        left = x > middle  # there is room to the left of it
        return x + (-6 if left else 6), y - 6, "end" if left else "start", spans([number for _, _, number in group])

    def box(group):
        x, y, anchor, text = label(group)
        return (x - LETTER * len(text) * (anchor == "end"), y - LINE, x + LETTER * len(text) * (anchor == "start"), y)

    groups = [[point] for point in points]
    while pair := next(((a, b) for a, b in combinations(groups, 2) if meet(box(a), box(b))), None):
        groups.remove(pair[1])
        pair[0].extend(pair[1])
    return [label(group) for group in groups]


def meet(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plot(lines: list[dict], judge: str) -> str:
    """Unsafe rate against harmless prompts kept, each row a point with its intervals, as SVG; lower right is better."""
    width, height, left, bottom = 560, 360, 50, 40

    def x(percent):
        return left + percent / 100 * (width - left - 20)

    def y(percent):
        return height - bottom - percent / 100 * (height - bottom - 20)

    marks, points = [], []
    for number, line in enumerate(lines, 1):
        a, b = line.get("kept") or (number == 1 and {"percent": 100, "low": 100, "high": 100}), line["unsafe"].get(judge)
        if a and b:
            said = f"{line['row']}: unsafe {b['percent']:.1f} %, kept {a['percent']:.1f} %"
            marks.append(f'<g class="point"><title>{markup.escape(said)}</title>'
                         f'<path d="M{x(a["low"]):.1f} {y(b["percent"]):.1f}H{x(a["high"]):.1f}M{x(a["percent"]):.1f} {y(b["low"]):.1f}'
                         f'V{y(b["high"]):.1f}"/><circle cx="{x(a["percent"]):.1f}" cy="{y(b["percent"]):.1f}" r="4"/></g>')
            points.append((x(a["percent"]), y(b["percent"]), number))
    marks += [f'<text class="label" x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{text}</text>'
              for across, down, anchor, text in labels(points, width / 2)]
    ticks = "".join(f'<text class="tick" x="{x(p):.0f}" y="{height - bottom + 16}" text-anchor="middle">{p}</text>'
                    f'<text class="tick" x="{left - 6}" y="{y(p) + 4:.0f}" text-anchor="end">{p}</text>' for p in (0, 25, 50, 75, 100))
    nothing = "" if marks else f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no row has both figures yet</text>'
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Unsafe rate against harmless prompts kept">'
            f'<path class="axis" d="M{left} 20V{height - bottom}H{width - 20}"/>{ticks}{"".join(marks)}{nothing}'
            f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">harmless prompts kept, %</text>'
            f'<text transform="translate(13 {height / 2}) rotate(-90)" text-anchor="middle">unsafe, % ({markup.escape(judge)})</text>'
            "</svg>")


def published(result: dict) -> str:
    """Figures of others below ours, each with whether it can be compared."""
    rows = ""
    for one in result.get("published", ()):
        cells = "".join(f"<td>{markup.escape(str(one[name]))}</td>" for name in ("row", "unsafe", "judge", "prompts", "source"))
        said = "<td>comparable" if one["comparable"] else '<td class="missing">not comparable: another judge or other prompts'
        rows += f"<tr>{cells}{said}</td></tr>"
    head = "".join(f"<th>{name}</th>" for name in ("published", "unsafe %", "judge", "prompts", "source", ""))
    return f'<table class="published"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>' if rows else ""


def html(result: dict, rows: list[Row], cases: list[Case], out: Path, judged, judges: list) -> str:
    from .result import cell

    names = list(result["judges"])
    more = {name: title for name, title in {"kept": "kept %", "direct": "direct %", "seconds": "seconds"}.items()
            if any(line.get(name) for line in result["rows"])}
    head = "".join(f"<th>{markup.escape(name)}</th>" for name in ("", "row", *(f"unsafe %, {name}" for name in names), *more.values()))
    body = "".join("<tr>" + "".join(f"<td>{markup.escape(text)}</td>" for text in (
        str(number), line["row"], *(cell(line["unsafe"].get(name)) for name in names), *(cell(line.get(name)) for name in more)))
        + (f'</tr><tr class="failed"><td></td><td colspan="9">failed: {markup.escape(line["failed"])}</td>' if line.get("failed") else "")
        + "</tr>" for number, line in enumerate(result["rows"], 1))
    told = next((name for name in reversed(names) if any(line["unsafe"].get(name) for line in result["rows"])), "no judge")
    data = json.dumps({"rows": [row.name for row in rows], "pictures": comparisons(rows, cases, out, judged, judges)})
    missing = "".join(f"<li>not measured: {markup.escape(name)}. {markup.escape(why)}</li>" for name, why in result["missing"].items())
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    for name, value in {"TITLE": markup.escape(result["title"]), "TABLE": f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>",
                        "MISSING": missing, "PUBLISHED": published(result), "PLOT": plot(result["rows"], told),
                        "DATA": data.replace("<", "\\u003c")}.items():
        text = text.replace(f"<!--{name}-->", value)
    return text
