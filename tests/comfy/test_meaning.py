"""The nodes that know what pictures mean, on the tiny CLIP."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dev import ROOT
from safe_denoiser import NegationSet
from safe_denoiser.meaning.clip import load_clip
from tiny_digits.train import WORDS
from tiny_digits.world import CLIP, digits_data

WEIGHTS = CLIP / "open_clip_model.safetensors"
IMPORT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu, args.base_directory = True, sys.argv[2]
import nodes, comfy.samplers, latent_preview, aiohttp.web  # of its server, too
import comfy_api.latest, comfy_execution.utils, comfy_execution.graph_utils
sys.path.pop(0)
import asyncio, importlib.util, pathlib
root = pathlib.Path(sys.argv[3])
asyncio.run(asyncio.sleep(0))
began = time.process_time()
spec = importlib.util.spec_from_file_location("pack", root / "__init__.py", submodule_search_locations=[str(root)])
module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
[node.GET_SCHEMA() for node in found]
print(len(found), time.process_time() - began, [name for name in ("open_clip", "timm", "torchvision") if name in sys.modules])
"""


def test_importing_the_pack_is_quick_and_leaves_open_clip_alone(tmp_path, pack):
    """At most 0.3 s of processor time beyond ComfyUI's own; `pack` was imported here already, so that its files are compiled."""
    command = [sys.executable, "-c", IMPORT, os.environ["SAFE_DENOISER_COMFYUI"], str(tmp_path), str(ROOT)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    count, seconds, imported = ran.stdout.splitlines()[-1].split(" ", 2)
    assert int(count) >= 18 and float(seconds) <= 0.3, seconds
    assert "open_clip" not in imported, imported


@pytest.fixture(scope="module")
def clip(run):
    return run("LoadOpenCLIP", weights="tiny_clip").result[0]


@pytest.fixture(scope="module")
def digits():
    """Held-out digits, (500, 32, 32, 3), and labels: 50 of each digit."""
    pixels, labels = digits_data()[2:]
    return SimpleNamespace(images=pixels.movedim(1, -1), labels=labels)


@pytest.fixture(scope="module")
def mixed(digits):
    """Ten of each digit; names tell which."""
    rows = [i for digit in range(10) for i in (digits.labels == digit).nonzero()[:10, 0].tolist()]
    pictures = NegationSet.from_images(digits.images[rows])
    return NegationSet(tuple(f"{int(digits.labels[i])}_{i}.png" for i in rows), pictures.fingerprints, pictures.readers)


# --- loading -------------------------------------------------------------------------------------------------------

def options(pack):
    return pack["SafeDenoiserLoadOpenCLIP"].GET_SCHEMA().inputs[0].options


def test_the_list_has_folders_files_and_what_fits_of_clip_vision(pack, run, clip):
    import folder_paths

    models = Path(folder_paths.models_dir)
    own, vision = models / "open_clip", models / "clip_vision"
    try:
        for folder in (own / "deep", vision):
            folder.mkdir(parents=True)
        shutil.copy(WEIGHTS, own / "deep/plain.safetensors")
        shutil.copy(WEIGHTS, vision / "whole.safetensors")
        save_file({"vision_model.embeddings.class_embedding": torch.zeros(3)}, vision / "half.safetensors")
        (vision / "broken.safetensors").write_bytes(b"nothing")
        assert options(pack) == ["deep/plain.safetensors", "tiny_clip", "whole.safetensors", "pretrained tag"]
        with pytest.raises(ValueError, match="'whole.safetensors' is not loaded: .*too few weights; choose the architecture"):
            run("LoadOpenCLIP", weights="whole.safetensors", architecture="ViT-S-32-alt")
    finally:
        shutil.rmtree(own)
        shutil.rmtree(vision)
    assert options(pack) == ["tiny_clip", "pretrained tag"]
    assert "ViT-B-32" in pack["SafeDenoiserLoadOpenCLIP"].GET_SCHEMA().inputs[1].options


def test_the_node_loads_what_the_core_loads(clip, digits, comfy):
    import comfy.model_management as management

    management.unload_all_models()
    embeddings = clip.pixels(digits.images[:5])
    assert torch.equal(embeddings, load_clip(CLIP).pixels(digits.images[:5]))
    assert any(loaded.model.model is clip.model for loaded in management.current_loaded_models), "ComfyUI counts its memory"


def test_embeddings_are_kept_on_disk_beside_the_latents(clip, mixed, comfy):
    import folder_paths

    folder = Path(folder_paths.get_user_directory()) / "safe_denoiser/embeddings"
    clip.pictures(mixed.take(range(3)))
    assert len(list(folder.glob("*.safetensors"))) >= 3 and clip.cache.folder == folder


def test_nothing_is_downloaded_unless_asked(pack, run, monkeypatch, comfy):
    import folder_paths

    node, folder, fetched, sent = pack["SafeDenoiserLoadOpenCLIP"], Path(folder_paths.models_dir) / "open_clip", [], []

    def fetch(architecture, pretrained, target):
        fetched.append((architecture, pretrained))
        assert sent, "said before it is done"
        shutil.copytree(CLIP, target)

    monkeypatch.setattr("pack.nodes.meaning.clip.published", lambda architecture, tag: ("laion/CLIP/weights.safetensors", 605_000_000))
    monkeypatch.setattr("pack.nodes.meaning.clip.fetch", fetch)
    monkeypatch.setattr("pack.nodes.progress.Live.send", lambda self, text: sent.append(text))
    assert node.validate_inputs(weights="pretrained tag") is True
    with pytest.raises(FileNotFoundError) as missing:
        run("LoadOpenCLIP", weights="pretrained tag")
    assert str(missing.value) == (
        "CLIP 'ViT-B-32' with the tag 'laion2b_s34b_b79k' is not on this machine; put its weights into ComfyUI/models/open_clip, as "
        "ViT-B-32-laion2b_s34b_b79k.safetensors, and choose that file; or switch allow_download on, and allow it on this machine: make an "
        "empty file ComfyUI/user/safe_denoiser/allow_download, or start ComfyUI with SAFE_DENOISER_ALLOW_DOWNLOAD=1")
    with pytest.raises(FileNotFoundError, match="allow it on this machine"):
        run("LoadOpenCLIP", weights="pretrained tag", allow_download=True)  # as a shared workflow may bring it along
    assert not fetched
    monkeypatch.setenv("SAFE_DENOISER_ALLOW_DOWNLOAD", "1")
    try:
        for _ in range(2):
            loaded = run("LoadOpenCLIP", weights="pretrained tag", allow_download=True).result[0]
        assert sent == ["fetching laion/CLIP/weights.safetensors\n605 MB"] and fetched == [("ViT-B-32", "laion2b_s34b_b79k")]
        assert loaded.pixels(torch.rand(1, 32, 32, 3)).shape == (1, 64)
        run("LoadOpenCLIP", weights="pretrained tag")
        assert "ViT-B-32-laion2b_s34b_b79k" in options(pack)
    finally:
        shutil.rmtree(folder)
    assert "leads out of" in node.validate_inputs(weights="../x")
    assert node.validate_inputs(weights="gone.safetensors") == (
        "open clip 'gone.safetensors' is not on this machine; put the file there: ComfyUI/models/open_clip/gone.safetensors, then press R")
    with pytest.raises(ValueError, match="leads out of"):
        run("LoadOpenCLIP", weights="pretrained tag", pretrained="/../../../secret")


# --- choosing ------------------------------------------------------------------------------------------------------

def digits_of(negation_set):
    return [int(name[0]) for name in negation_set.names]


def test_curate_by_text(run, clip, mixed):
    output = run("CurateNegationSet", clip=clip, negation_set=mixed, text="a seven", against="a digit", duplicates=0.0)
    kept, info = output.result
    assert digits_of(kept).count(7) >= 9 and len(kept) <= 12
    assert info.startswith(f"{len(kept)} kept, {100 - len(kept)} dropped\n") and len(info.splitlines()) == 101
    assert info.splitlines()[1].endswith(": kept") and info.splitlines()[-1].endswith(": dropped, below 0.5")
    assert len(output.ui["images"]) == 1
    few = run("CurateNegationSet", clip=clip, negation_set=mixed, text="a seven", top_k=5, diverse_k=2, threshold=0.0, preview="off")
    assert len(few.result[0]) == 2 and few.ui is None and set(digits_of(few.result[0])) == {7}
    with pytest.raises(ValueError, match="none of 100 pictures scores 0.99999.* or more; the best is .*png with .*lower the threshold"):
        run("CurateNegationSet", clip=clip, negation_set=mixed, text="round digits", against="straight digits", threshold=0.999999)


def test_curate_by_example_and_without(run, clip, mixed, digits):
    sevens = NegationSet.from_images(digits.images[digits.labels == 7][20:])
    kept = run("CurateNegationSet", clip=clip, negation_set=mixed, example=sevens, threshold=0.0, top_k=8).result[0]
    assert digits_of(kept).count(7) >= 7
    twice = NegationSet(mixed.names + ("twin.png",), mixed.fingerprints + ("twin",), mixed.readers + mixed.readers[:1])
    cleaned, info = run("CurateNegationSet", clip=clip, negation_set=twice, duplicates=0.99).result
    assert "twin.png" not in cleaned.names and "twin.png: dropped, twin of 0_" in info
    with pytest.raises(ValueError, match="both text and example say what to keep; leave text empty or disconnect example"):
        run("CurateNegationSet", clip=clip, negation_set=mixed, text="a seven", example=sevens)


def test_one_folder_gives_both_sets(run, clip, mixed):
    choices = dict(clip=clip, negation_set=mixed, unwanted="a seven\na four", wanted="round digits")
    negation, retain, info = run("SplitNegationSet", **choices).result
    assert len(negation) + len(retain) == 100 and info.startswith(f"{len(negation)} unwanted, {len(retain)} wanted, 0 unsure\n")
    assert {4, 7} <= set(digits_of(negation)) and {0, 6, 8} <= set(digits_of(retain)) and not {4, 7} & set(digits_of(retain))
    sure = run("SplitNegationSet", **choices, sure=0.99).result
    assert len(sure[0]) + len(sure[1]) < 100 and set(digits_of(sure[1])) <= {0, 6, 8, 9}
    with pytest.raises(ValueError, match="the texts split 100 pictures into .*; choose texts that tell them apart"):
        run("SplitNegationSet", **choices | dict(wanted="a seven\na four"), sure=1.0)


# --- describing ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def describe(run, clip):
    """Describe Negation Set with the names of the digits, as ComfyUI's executor calls it: text and table."""
    def call(negation_set, **choices):
        return run("DescribeNegationSet", **dict(clip=clip, negation_set=negation_set, phrases="\n".join(WORDS), preview="off") | choices)
    return call


def set_of(digits, *wanted, start=0, count=50):
    return NegationSet.from_images(torch.cat([digits.images[digits.labels == digit][start:start + count] for digit in wanted]))


@pytest.mark.parametrize("digit", range(10))
def test_a_folder_of_one_digit_gives_its_name(describe, digits, tiny, digit):
    """Against a retain set of the others, against what the model makes by itself, and against both."""
    shown, others = set_of(digits, digit), set_of(digits, *(other for other in range(10) if other != digit), count=10)
    decoded = tiny.vae.decode(tiny.reference.latents)
    contrasts = {"90 of contrast": dict(retain_set=others), "100 of contrast": dict(images=decoded),
                 "190 of contrast": dict(retain_set=others, images=decoded), "no contrast": {}}
    for given, contrast in contrasts.items():
        text, table = describe(shown, **contrast).result
        assert text == WORDS[digit] and table.startswith(f"50 pictures, {given}: 1 of 10 phrases chosen")
        assert table.splitlines()[1].endswith(", chosen") and f" {WORDS[digit]}: best for " in table.splitlines()[1]
        assert ("connect retain_set or images" in table) == (not contrast)


def test_a_list_of_pictures_is_described_once(pack, describe, digits, tiny):
    shown, decoded = set_of(digits, 3), tiny.vae.decode(tiny.reference.latents)
    assert pack["SafeDenoiserDescribeNegationSet"].GET_SCHEMA().is_input_list
    assert describe(shown, images=[*decoded.split(30)]).result == describe(shown, images=decoded).result


def test_where_nothing_separates_the_text_is_empty_and_the_table_says_why(describe, digits):
    first, second = (set_of(digits, *range(10), start=start, count=25) for start in (0, 25))
    output = describe(first, retain_set=second, preview="shown")
    assert output.result[0] == "" and output.result[1].startswith("250 pictures, 250 of contrast: no phrase describes the set and ")
    assert len(output.ui["images"]) == 1
    text, table = describe(first.take([0]), retain_set=second.take([3])).result
    assert text == "" and "too few to tell 10 phrases from chance" in table


def test_the_phrases_of_the_list_count(describe, digits):
    shown, others = set_of(digits, 3, 7), set_of(digits, 1, 2, 4)
    assert set(describe(shown, retain_set=others).result[0].split(", ")) == {"three", "seven"}
    assert describe(shown, retain_set=others, count=1).result[0] in ("three", "seven")
    assert describe(shown, retain_set=others, phrases="\n\n seven\nSeven\n\none\nfour\n").result[0] == "seven"
    for phrases, count in (("", 0), ("\n \n", 0), ("seven", 1)):
        with pytest.raises(ValueError, match=f"phrases has {count} different lines, .*; write two or more"):
            describe(shown, retain_set=others, phrases=phrases)
    with pytest.raises(ValueError, match="holds latents and no picture"):
        describe(NegationSet.from_latents(torch.rand(2, 4, 2, 2)))


def test_the_built_in_phrases_are_a_list_that_works(pack, describe, digits):
    schema = pack["SafeDenoiserDescribeNegationSet"].GET_SCHEMA()
    built_in = {one.id: one for one in schema.inputs}["phrases"]
    lines = built_in.default.split("\n")
    assert built_in.multiline and len(lines) >= 40 and len({line.lower() for line in lines}) == len(lines)
    assert all(line == line.strip() and line for line in lines)
    text, table = describe(set_of(digits, 7), retain_set=set_of(digits, 1, 4), phrases=f"{built_in.default}\nseven\none\nfour").result
    assert text == "seven" and len(table.splitlines()) == len(lines) + 4


def test_the_sheet_shows_pictures_of_each_phrase(describe, digits, monkeypatch):
    seen = []
    monkeypatch.setattr("pack.safe_denoiser.pictures.contact_sheets.sheet",
                        lambda shown, *args: seen.append(args) or Image.new("RGB", (8, 8)))
    shown, others = set_of(digits, 3, 7), set_of(digits, 1, 2, 4)
    output = describe(shown, retain_set=others, preview="blurred")
    (rows, lines, blurred, captions), sharp = seen
    assert sharp == (rows, lines, False, captions) and len(output.ui["safe_denoiser_sharp"]) == 1, "the page shows which it likes"
    assert len(output.ui["images"]) == 1 and blurred and lines == [output.result[0]] and 16 <= len(rows) == len(set(rows)) <= 24
    assert all(re.fullmatch(r"[01]\.\d\d \w+", caption) for caption in captions)
    assert sum(caption.endswith("three") for caption in captions) == sum(caption.endswith("seven") for caption in captions) == 8
    assert describe(shown, retain_set=others).ui is None and len(seen) == 2, "off draws nothing"


def test_the_table_is_on_the_node(describe, digits, monkeypatch):
    sent = []
    monkeypatch.setattr("pack.nodes.progress.Live.send", lambda self, text: sent.append(text))
    tables = [describe(set_of(digits, 7, count=count), retain_set=set_of(digits, 1, count=count)).result[1] for count in (20, 1)]
    assert sent == tables


# --- checking ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checks(run, clip, digits):
    """Check Images on 20 sevens and 20 ones, with other sevens as the negation set and other digits as the retain set."""
    sevens, ones = digits.images[digits.labels == 7], digits.images[digits.labels == 1]
    retain = NegationSet.from_images(torch.cat([digits.images[digits.labels == 4], ones[20:]]))
    inputs = dict(images=torch.cat([sevens[:20], ones[:20]]), clip=clip, negation_set=NegationSet.from_images(sevens[20:]),
                  false_alarms=0.05)

    def call(**choices):
        return run("CheckImages", **inputs | dict(retain_set=retain) | choices).result
    return call


def blocker(value):
    return type(value).__name__ == "ExecutionBlocker"


def test_check_passes_and_blocks(checks):
    latent = {"samples": torch.rand(40, 16, 4, 4), "noise_mask": torch.rand(1, 1, 32, 32), "batch_index": list(range(40))}
    passed, blocked, report, checked, again, all_passed, each_passed = checks(latent=latent)
    count = int(checked.blocked.sum())
    assert all_passed is False and each_passed == (~checked.blocked).tolist()
    for video in (torch.rand(1, 16, 3, 4, 4), torch.rand(1, 16, 40, 4, 4)):
        with pytest.raises(ValueError, match="latent is that of a video"):
            checks(latent={"samples": video})
    assert checked.blocked[:20].sum() >= 18 and checked.blocked[20:].sum() <= 2
    assert len(passed) == 40 - count and len(blocked) == count and report.splitlines()[0] == f"{40 - count} passed, {count} refused"
    first = int(checked.blocked.nonzero()[0])
    assert re.search(rf"image {first}: blocked: looks like \S+ \(score -?0\.\d+, limit -?0\.\d+\)", report)
    assert torch.equal(again["samples"], latent["samples"][checked.blocked]) and again["noise_mask"].shape == (1, 1, 32, 32)
    assert "batch_index" not in again
    assert not checks(cover="black")[1].any() and blocked.std() > 0
    one = checks(latent={"samples": torch.zeros(1, 16, 4, 4)})[4]
    assert one["samples"].shape == (count, 16, 4, 4), "an empty latent of one serves a batch"


def test_no_empty_batches(checks):
    latent = {"samples": torch.rand(40, 16, 4, 4)}
    passed, blocked, _, checked, again, all_passed, each_passed = checks(threshold=1.0, retain_set=None, latent=latent)
    assert all_passed is True and each_passed == [True] * 40
    assert len(passed) == 40 and blocker(blocked) and blocker(again) and not checked.blocked.any()
    passed, blocked, _, checked, again, *_ = checks(threshold=-1.0, retain_set=None, latent=latent)
    assert blocker(passed) and len(blocked) == len(again["samples"]) == 40
    assert blocker(checks()[4]), "no latent, nothing to sample again"


def test_fill_asks_for_more_only_where_something_is_blocked(pack, run, checks):
    node = pack["SafeDenoiserFillBlockedImages"]
    none, some = checks(threshold=1.0, retain_set=None)[3], checks()[3]
    assert node.check_lazy_status(checked=none) == [] and node.check_lazy_status(checked=some) == ["again"]
    assert node.check_lazy_status(checked=some, again=none) == []
    assert next(one for one in node.GET_SCHEMA().inputs if one.id == "again").lazy
    images, passed, blocked, report, _, all_passed, each_passed = run("FillBlockedImages", checked=none).result
    assert all_passed is True and each_passed == [True] * 40
    assert torch.equal(images, none.pictures) and torch.equal(passed, images) and blocker(blocked)
    ones = checks(images=none.pictures[19:19 + int(some.blocked.sum())])[3]
    images, passed, blocked, report, filled, _, each_passed = run("FillBlockedImages", checked=some, again=ones).result
    assert each_passed == (~filled.blocked).tolist()
    assert len(images) == 40 and report.startswith(f"{40 - int(filled.blocked.sum())} passed, {int(ones.blocked.sum())} refused\n")
    assert f"image {int(some.blocked.nonzero()[0])}: blocked: " in report and "; again: passed (" in report


# --- semantic posterior --------------------------------------------------------------------------------------------

def test_the_semantic_posterior_steers_while_sampling(run, tiny, sample, clip, comfy):
    retain = run("LoadNegationSet", folder="tiny_ones_and_fours", max_images=40, preview="off").result[0]
    keep = run("BuildNegationBank", negation_set=retain, vae=tiny.vae, latent=tiny.latent()).result[0]
    semantic = run("SemanticPosterior", clip=clip, negation_set=tiny.negation_set, retain_set=retain, vae=tiny.vae, every=2).result[0]
    banks = dict(negation_bank=tiny.bank, retain_bank=keep)
    latents, reports = [], []
    for choice in (None, semantic, semantic):
        model, report = run("Apply", model=tiny.model, **banks, semantic=choice).result
        latents.append(sample.stock(model=model))
        reports.append(report.values["posterior"])
    assert torch.equal(latents[1], latents[2]) and not torch.equal(latents[0], latents[1]), "each run begins anew"
    assert len(reports[1]) == 6 and (reports[0] != reports[1]).any()
    with pytest.raises(ValueError, match="the semantic posterior needs a retain bank"):
        run("Apply", model=tiny.model, negation_bank=tiny.bank, semantic=semantic)
