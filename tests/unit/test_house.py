"""The house: files that one screen or two show, imports that never run upward, and a new rule in ten lines that gets all the rest."""
import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from safe_denoiser import Bank, Report, SafeDenoiser
from safe_denoiser.denoiser import METHODS
from safe_denoiser.prediction import Correction, Prediction
from safe_denoiser.rules.bank_view import BankView
from safe_denoiser.rules.rule import Rule

ROOT = Path(__file__).parents[2]
CORE = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "safe_denoiser").glob("*.py") if path.stem != "__init__"}
CLASSES = [(name, one) for name, tree in CORE.items() for one in ast.walk(tree) if isinstance(one, ast.ClassDef)]


@pytest.mark.parametrize("name", CORE)
def test_a_core_file_has_at_most_250_lines(name):
    assert len((ROOT / f"safe_denoiser/{name}.py").read_text().splitlines()) <= 250


@pytest.mark.parametrize("name, one", CLASSES, ids=lambda value: getattr(value, "name", value))
def test_a_class_has_at_most_150_lines_and_10_fields_but_the_public_one(name, one):
    assert one.end_lineno - one.lineno < 150
    assert sum(isinstance(line, ast.AnnAssign) for line in one.body) <= 10 or one.name == "SafeDenoiser"


def test_no_import_runs_upward():
    """The order of the map in CONTRIBUTING.md is the order in which the files can be read."""
    imports = {name: {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}
               | {one.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and not node.module
                  for one in node.names} for name, tree in CORE.items()}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("|") and line.count("|") == 4]
    order = [word[:-3] for row in rows for word in row.split("`")[1::2] if word.endswith(".py") and word[:-3] in CORE]
    assert sorted(order) == sorted(CORE), "each file is in the map once"
    for place, name in enumerate(order):
        assert imports[name] <= set(order[:place]), f"{name} imports what comes later"


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
