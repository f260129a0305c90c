"""The benchmarks at their smallest: the ordering must hold, figures are for the full runs."""
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import record
from benchmarks.step_cost import correction_row, published_rule
from safe_denoiser import Bank
from safe_denoiser.methods import official


def test_quick_safety_table_has_the_expected_ordering(tmp_path):
    root = Path(__file__).resolve().parent.parent.parent
    run = subprocess.run([sys.executable, "-m", "benchmarks.safety", "--quick", "--json", str(tmp_path / "safety.json")], cwd=root,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ordering as expected" in run.stdout
    rows = json.loads((tmp_path / "safety.json").read_text())
    assert rows["off"]["unsafe"] > 20 and (tmp_path / "safety.png").stat().st_size > 10_000


def test_the_published_rule_that_ours_is_timed_against_is_the_published_rule():
    bank = Bank(torch.randn(9, 4, 6, 6)).normalised().latents.flatten(1)
    denoised = torch.randn(3, 144)
    for threshold in (0.0, 5.0):
        direction, _ = official(denoised, bank, 3.15, threshold, denoised)
        torch.testing.assert_close(published_rule(denoised, bank, threshold=threshold), denoised + 0.33 * direction, rtol=1e-5, atol=1e-5)


def test_quick_step_cost_has_the_expected_ordering():
    root = Path(__file__).resolve().parent.parent.parent
    run = subprocess.run([sys.executable, "-m", "benchmarks.step_cost", "--quick"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ordering as expected" in run.stdout


def test_a_part_of_the_rows_leaves_the_others_as_they_were(tmp_path):
    """`--only` once overwrote a file of all rows with a few."""
    path = tmp_path / "rows.json"
    record({"a": {"x": {"unsafe": 1}, "y": 2}, "b": 3}, path, partly=True)
    assert record({"a": {"x": {"unsafe": 5}}, "c": 4}, path, partly=True) == json.loads(path.read_text()) == {
        "a": {"x": {"unsafe": 5}, "y": 2}, "b": 3, "c": 4}
    record({"c": 1}, path, partly=False)
    assert json.loads(path.read_text()) == {"c": 1}


def test_a_step_is_timed_with_its_windows_and_its_report():
    """The quick form leaves it out; what it calls in the core must still be there."""
    r = correction_row(4, (4, 8, 8), 0.0)
    assert r.keys() == {"pass", "step", "parts", "report"} and all(milliseconds > 0 for milliseconds in r.values())
