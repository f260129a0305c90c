"""The house: stations that import in one order, files that one screen or two show, and a new rule in ten lines that gets all the rest."""
import ast
import re
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from safe_denoiser import Bank, Report, SafeDenoiser
from safe_denoiser.denoiser import METHODS
from safe_denoiser.prediction import Correction, Prediction
from safe_denoiser.rules.bank_view import BankView
from safe_denoiser.rules.rule import Rule

ROOT = Path(__file__).parents[2]
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
         for part in ("safe_denoiser", "nodes") for path in sorted((ROOT / part).rglob("*.py"))}
CLASSES = [(name, one) for name, tree in FILES.items() for one in ast.walk(tree) if isinstance(one, ast.ClassDef)]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def table(heading):
    """The cells of each row below a heading of CONTRIBUTING.md."""
    part = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def stations():
    """Each file of the map, and its place in the order: a folder is one place, a file beside the folders has its own."""
    found, place = [], 0
    for _, *cells in table("The map"):
        for top, cell in zip(("safe_denoiser", "nodes"), cells):
            folder = ""
            for word in re.findall("`(.+?)`", cell):
                place += 1 if not folder else 0
                if word.endswith("/"):
                    folder = word
                else:
                    found.append((f"{top}/{folder}{word}", place))
    return found


def imported(name):
    """The files that a file imports, wherever it does; names that are taken from a package are files of it, or its own."""
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = Path(name).parents[node.level - 1] if node.level <= len(Path(name).parents) else None
            base = base.joinpath(*node.module.split(".")) if node.module else base
            for path in (base.with_suffix(".py") if base.name else base, *(base / f"{one.name}.py" for one in node.names)):
                if path.as_posix() in FILES:
                    yield path.as_posix()


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_at_most_250_lines_and_a_function_60(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 250
    functions = [one for one in ast.walk(FILES[name]) if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [one.name for one in functions if one.end_lineno - one.lineno >= 60]


@pytest.mark.parametrize("name, one", CLASSES, ids=lambda value: getattr(value, "name", value))
def test_a_class_has_at_most_150_lines_and_10_fields_but_the_public_one(name, one):
    assert one.end_lineno - one.lineno < 150
    assert sum(isinstance(line, ast.AnnAssign) for line in one.body) <= 10 or one.name == "SafeDenoiser"


@pytest.mark.parametrize("folder", sorted({Path(name).parent.as_posix() for name in FILES}))
def test_a_folder_has_at_most_twelve_files_and_a_line_that_says_what_for(folder):
    assert sum(Path(name).parent.as_posix() == folder for name in FILES) <= 12
    first = FILES[f"{folder}/__init__.py"].body
    assert ast.get_docstring(FILES[f"{folder}/__init__.py"]) and (folder in ("safe_denoiser", "nodes") or len(first) == 1)


def test_each_file_is_in_the_map_once():
    assert sorted(name for name, _ in stations()) == sorted(name for name in FILES if not name.endswith("__init__.py"))


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__init__.py")])
def test_imports_run_down_the_map(name):
    place = dict(stations())
    top = name.partition("/")[0]  # the nodes come after the whole core
    wrong = [other for other in imported(name) if other in place and other.startswith(f"{top}/") and place[other] > place[name]]
    assert not wrong and (top == "nodes" or not any(other.startswith("nodes/") for other in imported(name)))


def test_imports_run_in_no_circle():
    TopologicalSorter({name: [*imported(name)] for name in FILES}).prepare()


def test_ten_questions_are_answered_by_one_link_each():
    rows = table("Where is ...?")
    assert len(rows) == 10
    for question, answer in rows:
        (shown, link), = re.findall(r"\[(.+?)\]\((.+?)\)", answer)
        assert question.endswith("?") and link.endswith(shown) and link in FILES, question
        for name in re.findall(r"`(\w+)(?:\.\w+)?`", answer.partition(";")[0]):
            assert name in {getattr(one, "name", "") for one in FILES[link].body}, (question, name)


def test_the_glossary_has_at_most_twenty_lines_and_each_word_once():
    words = [word.strip(" *") for row in table("One word for one thing") for word in row[0].split(",")]
    assert len(table("One word for one thing")) <= 20 and len(words) == len(set(words))


@dataclass(frozen=True, eq=False)
class AwayFromMean(Rule):
    """The rule of CONTRIBUTING.md."""

    view: BankView

    def correct(self, p: Prediction, memory: dict) -> Correction:
        unsafe = self.view.densities.of(self.view.bank, p)
        r = torch.full_like(p.sigma, 0.1)
        return Correction(r[:, None] * (p.denoised - unsafe.mean), r, unsafe.weights.argmax(1), r > 1, unsafe.omitted)


@pytest.fixture
def away(monkeypatch):
    monkeypatch.setitem(METHODS, "away_from_mean", AwayFromMean)
    banks = torch.randn(2, 12, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def made(**settings):
        return SafeDenoiser(Bank(banks[0]), method="away_from_mean", reference=Bank(banks[1]), **{"parts": 1, **settings})

    return made


def test_it_is_what_contributing_shows():
    lines = ast.get_source_segment(Path(__file__).read_text(), next(
        node for node in ast.parse(Path(__file__).read_text()).body if getattr(node, "name", "") == "AwayFromMean")).splitlines()
    code = [line for line in lines if line.strip() and '"""' not in line]
    shown = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(code) <= 10 and all(line in shown for line in code)


def test_a_rule_of_ten_lines_has_window_rows_and_report(away):
    x, denoised = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([5.0, 1.0, 0.1])
    safe, step = away(sigma_start=2.0, sigma_end=0.5).safe(x, denoised, sigma)
    assert torch.equal(safe[[0, 2]], denoised[[0, 2]]) and not torch.equal(safe[1], denoised[1])
    assert step.active.tolist() == [False, True, False]
    denoised[1, 0, 0, 0] = float("nan")
    assert away().safe(x, denoised, sigma)[1].fallback.tolist() == [False, True, False]
    assert "corrected 1 of 1 model calls, posterior up to 0.10" in Report([step]).verdict


def test_a_rule_of_ten_lines_has_masks(away):
    x, denoised = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :, :4] = 1
    safe = away().safe(x, denoised, 1.0, mask=mask)[0] - denoised
    assert not safe[1].any() and not safe[0, ..., 4:].any() and safe[0, ..., :4].any()
    elsewhere = x + (1 - mask) * torch.randn(x.shape)
    torch.testing.assert_close(away().safe(elsewhere, denoised, 1.0, mask=mask)[0] - denoised, safe, msg="what is not sampled counts")


def test_a_rule_of_ten_lines_has_parts_and_frames(away):
    x, denoised = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole, parts = (away(parts=parts) for parts in (1, 2))
    assert not whole.inside and len(parts.inside) == 9
    assert not torch.allclose(whole.safe(x, denoised, 1.0)[0], parts.safe(x, denoised, 1.0)[0])
    for one in (whole, parts):
        video = one.safe(x[None].movedim(1, 2), denoised[None].movedim(1, 2), 1.0)[0]
        torch.testing.assert_close(video.movedim(2, 1)[0], one.safe(x, denoised, 1.0)[0])
