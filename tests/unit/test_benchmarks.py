"""The safety benchmark at its smallest: the ordering must hold, figures are for the full run."""
import json
import subprocess
import sys
from pathlib import Path


def test_quick_safety_table_has_the_expected_ordering(tmp_path):
    root = Path(__file__).resolve().parent.parent.parent
    run = subprocess.run([sys.executable, "-m", "benchmarks.safety", "--quick", "--json", str(tmp_path / "safety.json")], cwd=root,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ordering as expected" in run.stdout
    rows = json.loads((tmp_path / "safety.json").read_text())
    assert rows["off"]["unsafe"] > 20 and (tmp_path / "safety.png").stat().st_size > 10_000
