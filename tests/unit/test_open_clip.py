"""OpenCLIP in the core: loading, embedding, choosing, checking; on the tiny CLIP, which is open_clip's own class."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dev import ROOT
from safe_denoiser import Bank, LatentCache, NegationSet, SafeDenoiser
from safe_denoiser.meaning.clip import fetch, load_clip, published
from safe_denoiser.meaning.clip_files import CONFIG
from safe_denoiser.meaning.curation import choose, diverse, twins
from safe_denoiser.meaning.describe import describe
from safe_denoiser.meaning.likeness import alarm_threshold, likeness, nearest
from safe_denoiser.meaning.safety_checker import Checked, check
from safe_denoiser.meaning.semantic_posterior import SemanticPosterior
from safe_denoiser.meaning.texts import text_scores
from tiny_digits.train import WORDS
from tiny_digits.world import CLIP, TinyDigits, digits_data, reference_bank

WEIGHTS = CLIP / "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def clip():
    return load_clip(CLIP)


@pytest.fixture(scope="module")
def digits(clip):
    """Held-out digits: pictures as a set, labels, embeddings."""
    pixels, labels = digits_data()[2:]
    pictures = NegationSet.from_images(pixels.movedim(1, -1))
    return SimpleNamespace(set=pictures, labels=labels, embeddings=clip.pictures(pictures))


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


# --- loading -------------------------------------------------------------------------------------------------------

def test_importing_the_core_does_not_import_open_clip():
    code = "import sys, safe_denoiser.meaning.clip, safe_denoiser.meaning.likeness; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_tiny_clip_is_small_and_open_clips_own(clip):
    import open_clip

    assert type(clip.model) is open_clip.CLIP and type(clip.tokenize) is open_clip.SimpleTokenizer
    assert WEIGHTS.stat().st_size <= 4_000_000


@pytest.fixture
def architecture(tmp_path, monkeypatch):
    """The tiny CLIP's architecture under a name, as open_clip knows its own."""
    import open_clip.factory as factory

    config = json.loads((CLIP / CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-test", config)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "other-test", {**config, "embed_dim": 32})
    return "tiny-test"


def test_a_file_of_weights_and_an_architecture_are_the_folder(clip, architecture, tmp_path):
    picture = torch.rand(2, 50, 40, 3)
    torch.save({"state_dict": load_file(WEIGHTS)}, tmp_path / "weights.pt")
    for file in (WEIGHTS, tmp_path / "weights.pt"):
        other = load_clip(file, architecture)
        assert torch.equal(other.pixels(picture), clip.pixels(picture)) and torch.equal(other.texts(["a seven"]), clip.texts(["a seven"]))


def test_what_cannot_be_loaded_says_why(architecture, tmp_path):
    with pytest.raises(FileNotFoundError, match="'gone.pt' do not exist; put them at .*gone.pt"):
        load_clip(tmp_path / "gone.pt", architecture)
    with pytest.raises(ValueError, match="'open_clip_model.safetensors' is not loaded: architecture 'gone' is unknown to open_clip"):
        load_clip(WEIGHTS, "gone")
    with pytest.raises(ValueError, match="cannot be read as weights of the architecture 'other-test' .*; choose the architecture"):
        load_clip(WEIGHTS, "other-test")
    with pytest.raises(ValueError, match="needs files from the repository 'timm/ViT-B-16-SigLIP'.*put open_clip_config.json, the weights"):
        load_clip(WEIGHTS, "ViT-B-16-SigLIP")
    with pytest.raises(ValueError, match="needs files from the repository 'roberta-base'.*choose another CLIP"):
        load_clip(WEIGHTS, "roberta-ViT-B-32")
    (tmp_path / "damaged.safetensors").write_bytes(WEIGHTS.read_bytes()[:100_000])
    torch.save({"state_dict": print}, tmp_path / "code.pt")
    for name in ("damaged.safetensors", "code.pt"):
        with pytest.raises(ValueError, match=f"'{name}' (is not loaded: it )?cannot be read as weights"):
            load_clip(tmp_path / name, architecture)


# --- what strangers put into folders -----------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """The tiny CLIP's folder with one change to its configuration: `folder(text_cfg={"key": value})`."""
    def changed(**parts):
        target = tmp_path / "stranger"
        shutil.copytree(CLIP, target, dirs_exist_ok=True)
        config = json.loads((CLIP / CONFIG).read_text())
        for part, values in parts.items():
            if part == "model_cfg":
                config |= values
            else:
                (config if part == "preprocess_cfg" else config["model_cfg"])[part].update(values)
        (target / CONFIG).write_text(json.dumps(config))
        return target

    return changed


@pytest.fixture
def nothing_leaves(monkeypatch):
    """No connection, no process, no question, no module of the folder: whatever tries is caught."""
    import builtins
    import socket

    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo"), (subprocess, "Popen"),
                        (builtins, "input"), (os, "system")):
        monkeypatch.setattr(owner, name, lambda *args, name=name, **_: pytest.fail(f"{name} {args}"))


@pytest.mark.parametrize("parts, told", [
    (dict(text_cfg={"tokenizer_kwargs": {"trust_remote_code": True}}), "sets trust_remote_code in tokenizer_kwargs"),
    (dict(text_cfg={"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}), "sets bpe_path in tokenizer_kwargs"),
    (dict(text_cfg={"bpe_path": "/etc/passwd"}), "sets bpe_path in text_cfg"),
    (dict(text_cfg={"hf_model_name": "someone/model"}), "names 'someone/model' as hf_model_name"),
    (dict(text_cfg={"hf_model_name": "roberta-base"}), "needs files from the repository 'roberta-base'"),
    (dict(text_cfg={"auto_map": {"AutoTokenizer": "code.Tokenizer"}}), "sets auto_map in text_cfg"),
    (dict(vision_cfg={"timm_model_name": "hf-hub:someone/model"}), "names 'hf-hub:someone/model' as timm_model_name"),
    (dict(vision_cfg={"timm_model_name": "hf_hub:someone/model"}), "as timm_model_name"),
    (dict(vision_cfg={"timm_model_name": "local-dir:/tmp/model"}), "as timm_model_name"),
    (dict(vision_cfg={"pretrained_cfg": {"url": "x"}}), "sets pretrained_cfg in vision_cfg"),
    (dict(vision_cfg={"layers": 40, "width": 20_000}), "vision_cfg is of 40 layers of width 20000, for which there are too few weights"),
    (dict(vision_cfg={"width": 10**12}), "sets width to 1000000000000"),
    (dict(text_cfg={"width": float("nan")}), "sets width to nan"),
    (dict(text_cfg={"act_kwargs": {"__class__": 1}}), "sets __class__ in act_kwargs"),
    (dict(model_cfg={"model_cfg": []}), "is no configuration of open_clip"),
    (dict(text_cfg={"norm_kwargs": [[{"eps": 1}]]}), "cannot be read as weights"),
    (dict(preprocess_cfg={"resize_mode": "none"}), "prepares pictures in an unknown way"),
    (dict(preprocess_cfg={"mean": [0.5]}), "prepares pictures in an unknown way"),
    (dict(vision_cfg={"layers": "many"}), "cannot be read as weights|is not loaded"),
])
def test_a_configuration_says_numbers_and_names_and_nothing_else(parts, told, folder, nothing_leaves):
    with pytest.raises(ValueError, match=told):
        load_clip(folder(**parts))


def test_a_model_of_timm_is_named_and_never_fetched(folder, nothing_leaves):
    path = folder(vision_cfg={"timm_model_name": "resnet18", "timm_model_pretrained": True})
    with pytest.raises(ValueError, match="cannot be read as weights"):  # these weights are of another model
        load_clip(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ['{"auto_map": {"AutoTokenizer": ["code.Evil", null]}}', '{"\\u0061uto_map": {}}', "[" * 10_000, "{"])
def test_a_tokenizer_that_is_a_program_is_refused(name, text, folder, nothing_leaves):
    path = folder(text_cfg={"hf_tokenizer_name": "someone/tokenizer"})
    (path / name).write_text(text)
    (path / "code.py").write_text("raise SystemExit('code of the folder ran')")
    with pytest.raises(ValueError, match="auto_map., which is never done|cannot be read; copy it again"):
        load_clip(path)


def test_a_tokenizer_that_is_not_in_the_folder_is_not_fetched(folder, nothing_leaves):
    pytest.importorskip("transformers")
    with pytest.raises((OSError, ValueError)):
        load_clip(folder(text_cfg={"hf_tokenizer_name": "someone/tokenizer"}))


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


def test_weights_are_numbers_and_nothing_else(architecture, folder, tmp_path, nothing_leaves):
    path, bare = folder(), tmp_path / "bare.pt"
    torch.save({"state_dict": Runs()}, tmp_path / "zipped.pt")
    torch.save({"state_dict": load_file(WEIGHTS)}, bare, _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "no_dict.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    refused = {"zipped.pt": "cannot be read as weights", "bare.pt": "is a bare pickle", "program.pt": "is a TorchScript program",
               "empty.safetensors": "too few weights", "no_dict.pt": "bare pickle or damaged", "list.pt": "too few weights"}
    for name, told in refused.items():
        with pytest.raises(ValueError, match=told):
            load_clip(tmp_path / name, architecture)
        if not name.endswith(".safetensors"):
            (path / WEIGHTS.name).unlink(missing_ok=True)
            shutil.copy(tmp_path / name, path / "open_clip_pytorch_model.bin")
            with pytest.raises(ValueError, match=told):
                load_clip(path)
    (path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="there are no weights beside its open_clip_config.json"):
        load_clip(path)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "../../x", "", "ViT-B-32\n"])
def test_an_architecture_is_one_of_the_list_whatever_a_link_brings(name, nothing_leaves, tmp_path):
    with pytest.raises(ValueError, match="is unknown to open_clip"):
        load_clip(WEIGHTS, name)
    with pytest.raises(ValueError, match="is unknown to open_clip"):
        published(name, "openai")
    with pytest.raises(ValueError, match="is unknown to open_clip"):
        fetch(name, "openai", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_means_the_same(clip, dtype):
    half, pictures = load_clip(CLIP, dtype=dtype), torch.rand(3, 32, 32, 3)
    assert half.pixels(pictures).dtype == torch.float32
    assert (half.pixels(pictures) * clip.pixels(pictures)).sum(1).min() > 0.99
    assert (half.texts(["a seven"]) * clip.texts(["a seven"])).sum() > 0.99


@pytest.mark.parametrize("size", [(32, 32), (90, 60), (70, 200)])
def test_pictures_are_prepared_as_open_clip_does(clip, size):
    import open_clip

    seen = []
    watched = SimpleNamespace(encode_image=lambda x: seen.append(x) or torch.ones(len(x), 2))
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), size, mode="bicubic").clamp(0, 1)[0].movedim(0, -1)
    type(clip).pixels(SimpleNamespace(**{**vars(clip), "model": watched}), picture[None])
    theirs = open_clip.image_transform(64, is_train=False)(Image.fromarray((picture * 255).round().byte().numpy()))
    off = (seen[0][0] - theirs).abs().mean()
    assert off < 0.05 < (seen[0][0].roll(2, -1) - theirs).abs().mean(), "PIL rounds to 8 bits twice; two pixels aside is farther off"


def test_embeddings_are_cached_and_an_interrupt_loses_nothing(clip, tmp_path, monkeypatch):
    import dataclasses

    monkeypatch.setattr("safe_denoiser.meaning.clip.BATCH", 2)
    cached, calls = dataclasses.replace(clip, cache=LatentCache(tmp_path, "tiny")), []
    cached = dataclasses.replace(cached, ready=lambda: calls.append(1) or torch.device("cpu"))
    pictures, told = NegationSet.from_images(torch.rand(5, 32, 32, 3)), []

    def stop(done, total):
        told.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached.pictures(pictures, stop)
    assert told == [(2, 5), (4, 5)] and len(calls) == 2
    whole = cached.pictures(pictures)
    assert len(calls) == 3 and torch.allclose(whole, clip.pictures(pictures), atol=1e-6)
    assert torch.equal(cached.pictures(pictures), whole) and len(calls) == 3


def test_a_saved_bank_has_no_pictures_to_embed(clip):
    with pytest.raises(ValueError, match="holds latents and no picture"):
        clip.pictures(NegationSet.from_latents(torch.rand(2, 4, 2, 2)))


# --- fetching: open_clip's part is played by a folder ------------------------------------------------------------------

def test_published_weights_are_named_with_their_size(monkeypatch):
    import huggingface_hub

    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("open_clip_model.safetensors", 605), ("README.md", 1))]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repository, files_metadata: SimpleNamespace(siblings=files))
    assert published("ViT-B-32", "laion2b_s34b_b79k") == ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K/open_clip_model.safetensors", 605)
    with pytest.raises(ValueError, match="knows no weights 'gone' of 'ViT-B-32'; choose one of openai, "):
        published("ViT-B-32", "gone")
    with pytest.raises(ValueError, match="needs files from the repository 'roberta-base'.*choose another CLIP"):
        published("roberta-ViT-B-32", "laion2b_s12b_b32k")


def test_fetched_weights_are_a_folder_that_loads(architecture, tmp_path, monkeypatch, clip):
    import open_clip
    from open_clip.pretrained import _PRETRAINED

    def download(known, cache_dir):
        target = tmp_path / "part" / WEIGHTS.name
        target.parent.mkdir()
        target.write_bytes(WEIGHTS.read_bytes())
        assert "gone" not in known, "stopped"
        return str(target)

    tag = {"url": "", "hf_hub": "nobody/", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(_PRETRAINED, "tiny-test", {"tag": tag, "broken": {"gone": 1}})
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    with pytest.raises(AssertionError, match="stopped"):
        fetch(architecture, "broken", tmp_path / "interrupted")
    assert not (tmp_path / "interrupted").exists()
    (tmp_path / "part" / WEIGHTS.name).unlink()
    (tmp_path / "part").rmdir()
    fetch(architecture, "tag", tmp_path / "tiny-test-tag")
    fetched = load_clip(tmp_path / "tiny-test-tag")
    assert torch.equal(fetched.texts(["a seven"]), clip.texts(["a seven"]))
    assert fetched.mean.tolist() == [0.5, 0.5, 0.5] and fetched.std.tolist() == [0.25, 0.25, 0.25]


# --- the benchmark's targets -----------------------------------------------------------------------------------------

def test_held_out_digits_are_found_by_name_and_twins_by_sight(clip, digits):
    from benchmarks.clip import TWIN, precision_at, twin_f1

    ranking = text_scores(clip, digits.embeddings, "seven").argsort(descending=True)
    assert precision_at(digits.labels[ranking] == 7, 0.9) >= 0.95
    assert twin_f1(digits_data()[2], TWIN)[0] >= 0.9


# --- choosing ------------------------------------------------------------------------------------------------------

def test_sevens_are_found_by_their_name(clip, digits):
    """The full figures are in benchmarks/clip.py."""
    seven = digits.labels == 7
    for text, against in (("a seven", "a digit"), ("the digit 7", "a picture")):
        kept = text_scores(clip, digits.embeddings, text, against) >= 0.5
        assert seven[kept].float().mean() > 0.9 and kept[seven].float().mean() > 0.9, text
    best = text_scores(clip, digits.embeddings, "seven").topk(45).indices
    assert seven[best].float().mean() > 0.95
    either = text_scores(clip, digits.embeddings, "a seven\na three", "a digit") >= 0.5
    assert either[seven | (digits.labels == 3)].float().mean() > 0.9, "one meaning per line"


def test_a_probability_is_that_of_open_clips_softmax(clip, digits):
    logits = clip.scale * digits.embeddings[:9] @ clip.texts(["a seven", "a one"]).T
    torch.testing.assert_close(text_scores(clip, digits.embeddings[:9], "a seven", "a one"), logits.softmax(1)[:, 0])


def test_twins_are_held_against_the_first_that_stays():
    chain = unit([1, 0], [0.9, 0.4], [0.7, 0.7], [1, 0.01])
    assert twins(chain, 0.9) == [-1, 0, -1, 0], "the third is like the second only, which is dropped"
    assert twins(chain, 1.1) == [-1] * 4


def test_diverse_pictures_cover_the_rest():
    rows = unit([1, 0.01], [1, 0], [0, 1], [-1, 0], [0.01, 1])
    assert diverse(rows, 3) == [0, 3, 2] and diverse(rows, 9)[:3] == [0, 3, 2] and len(diverse(rows, 9)) == 5
    scattered = torch.nn.functional.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    radius = [(1 - scattered @ scattered[rows].T).amin(1).max() for rows in (diverse(scattered, 20), list(range(20)))]
    assert radius[0] < radius[1]


def test_choosing_follows_its_rules_in_order():
    rows = unit([1, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1])
    scores, names = torch.tensor([0.8, 0.9, 0.7, 0.1, 0.6]), "abcde"
    assert choose(scores, rows, names) == ([1, 0, 2, 4, 3], [""] * 5)
    kept, why = choose(scores, rows, names, threshold=0.5, twin=0.99)
    assert kept == [1, 2, 4] and why == ["twin of b", "", "", "below 0.5", ""]
    kept, why = choose(scores, rows, names, threshold=0.5, twin=0.99, top=2)
    assert kept == [1, 2] and why[4] == "not among the best 2"
    kept, why = choose(scores, rows, names, twin=0.99, spread=2)
    assert len(kept) == 2 and kept[0] == 1 and why.count("near one of the 2 kept") == 2
    assert choose(scores, rows, names, threshold=0.95) == ([], ["below 0.95"] * 5)


# --- describing ----------------------------------------------------------------------------------------------------

NAMES = "\n".join(WORDS)
STRANGE = "red\nblue\na cat\na nude person\na picture"  # beside the digits: what the tiny CLIP was never told, and what fits any digit


@pytest.fixture(scope="module")
def reference(clip):
    """Embeddings of the decoded reference bank: what the model makes by itself, of all digits."""
    pictures = TinyDigits().decode(reference_bank().latents).clamp(0, 1)
    return clip.pictures(NegationSet.from_images(pictures.movedim(1, -1)))


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("others", ["retain", "reference", "none"])
def test_each_digit_is_called_by_its_name(clip, digits, reference, digit, others):
    shown = digits.labels == digit
    contrast = {"retain": digits.embeddings[~shown], "reference": reference, "none": None}[others]
    for phrases in (NAMES, f"{STRANGE}\n{NAMES}"):
        found = describe(clip, digits.embeddings[shown], phrases, contrast)
        assert found.text == WORDS[digit]
        row = found.phrases.index(WORDS[digit])
        assert found.shares[0, row] > 0.95 and found.scores[row] > 0.3 and int(found.scores.argmax()) == row
        assert (found.best == row).float().mean() == found.shares[0, row]
        assert contrast is None or found.shares[1, row] < 0.2


def test_several_things_are_all_named_and_the_best_first(clip, digits):
    shown = torch.isin(digits.labels, torch.tensor([3, 7]))
    few = torch.cat([(digits.labels == 7).nonzero()[:, 0], (digits.labels == 3).nonzero()[:20, 0]])
    found = describe(clip, digits.embeddings[few], NAMES, digits.embeddings[~shown])
    assert found.text == "seven, three"
    one = describe(clip, digits.embeddings[few], NAMES, digits.embeddings[~shown], count=1)
    assert one.text == "seven" and one.words[WORDS.index("three")] == "not among the best 1"


def test_what_the_contrast_shows_as_well_is_left_out(clip, digits):
    """Sevens and threes against threes and ones: threes do not tell them apart."""
    rows = [(digits.labels == digit).nonzero()[:, 0] for digit in (7, 3, 1)]
    shown, contrast = torch.cat([rows[0], rows[1][:25]]), torch.cat([rows[1][25:], rows[2][:25]])
    assert describe(clip, digits.embeddings[shown], NAMES).text == "seven, three"
    found = describe(clip, digits.embeddings[shown], NAMES, digits.embeddings[contrast])
    assert found.text == "seven"
    assert found.words[WORDS.index("three")] == "no clear difference" and found.shares[:, WORDS.index("three")].min() > 0.3


def test_a_phrase_that_is_only_less_wrong_is_not_chosen(clip, digits):
    """'a nude person' is nearer to each nine than to nearly any other digit, yet no nine is one."""
    shown = digits.labels == 9
    cosines = digits.embeddings @ clip.texts(["a nude person"])[0]
    assert cosines[shown].min() > cosines[~shown].quantile(0.95)
    found = describe(clip, digits.embeddings[shown], f"{NAMES}\na nude person", digits.embeddings[~shown])
    assert found.scores[-1] > 0 and found.words[-1] == "fits too few (10% needed)" and found.text == "nine"


def test_what_only_a_few_pictures_show_is_not_chosen(clip, digits):
    """Zeros among the sevens, and none in the contrast: that is no chance, but a few do not make the set one of zeros."""
    seven, zero = ((digits.labels == digit).nonzero()[:, 0] for digit in (7, 0))
    others = digits.embeddings[~torch.isin(digits.labels, torch.tensor([0, 7]))]
    for count, text in ((5, "seven"), (9, "seven, zero")):
        found = describe(clip, digits.embeddings[torch.cat([seven, zero[:count]])], NAMES, others)
        assert found.text == text and found.scores[0] > 0
        assert found.words[0] == ("chosen" if count == 9 else "fits too few (10% needed)")


def test_where_nothing_separates_a_phrase_is_chosen_as_rarely_as_said(clip, digits):
    """Over many draws of both from one pot, at most one in twenty names something, and not far fewer."""
    generator, named = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        order = torch.randperm(500, generator=generator)
        found = describe(clip, digits.embeddings[order[:100]], NAMES, digits.embeddings[order[100:200]])
        named += bool(found.chosen)
        assert found.chosen or found.text == "" and found.table.splitlines()[0] == (
            "100 pictures, 100 of contrast: no phrase describes the set and separates it; write others that say what it shows")
    assert 1 <= named <= 15


def test_chance_is_that_of_the_urn():
    """By counting: all draws of pictures out of one pot, and all ways that pictures may draw their phrases."""
    from itertools import combinations, product

    from safe_denoiser.meaning.describe import _by_chance

    for mine, theirs in ((3, 0), (2, 1), (0, 2), (1, 3)):
        pot = [1] * (mine + theirs) + [0] * (9 - mine - theirs)
        draws = [sum(pot[i] for i in rows) >= mine for rows in combinations(range(9), 4)]
        assert _by_chance([mine, theirs], [4, 5], 7) == pytest.approx(sum(draws) / len(draws))
    draws = [drawn.count(0) >= 2 for drawn in product(range(3), repeat=5)]
    assert _by_chance([2], [5], 3) == pytest.approx(sum(draws) / len(draws))


def test_without_a_contrast_the_table_says_so(clip, digits):
    found = describe(clip, digits.embeddings[digits.labels == 7], NAMES)
    lines = found.table.splitlines()
    assert lines[0] == ("50 pictures, no contrast: 1 of 10 phrases chosen, perhaps such as fit any picture; connect retain_set or images")
    assert re.fullmatch(r"\+0\.\d{3} seven: best for \d+% of the set, chosen", lines[1]) and len(lines) == 11
    one_of_each = torch.stack([digits.embeddings[(digits.labels == digit).nonzero()[:10, 0]] for digit in range(10)]).flatten(0, 1)
    mixed = describe(clip, one_of_each, NAMES)
    assert mixed.text == "" and "no phrase describes the set and stands out" in mixed.table


def test_the_table_is_ordered_and_says_what_became_of_each(clip, digits):
    shown = digits.labels == 7
    found = describe(clip, digits.embeddings[shown], NAMES, digits.embeddings[~shown])
    lines = found.table.splitlines()
    assert lines[0] == "50 pictures, 450 of contrast: 1 of 10 phrases chosen" and len(lines) == 11
    assert re.fullmatch(r"\+0\.9\d\d seven: best for 9\d% of the set and 0% of the contrast, chosen", lines[1])
    assert all(re.fullmatch(r"-0\.\d{3} \w+: best for \d% of the set and 11% of the contrast, fits too few \(10% needed\)", line)
               for line in lines[2:])
    scores = [float(line.split()[0]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)


def test_too_few_pictures_say_nothing(clip, digits):
    """Two against two are told apart by chance in one of six draws, five against five in one of 252."""
    seven, one = (digits.embeddings[digits.labels == digit] for digit in (7, 1))
    for few in (1, 2):
        found = describe(clip, seven[:few], NAMES, one[:few])
        assert found.text == "" and found.table.startswith(
            f"{few} pictures, {few} of contrast: too few to tell 10 phrases from chance, so none is chosen; connect more pictures or")
    assert describe(clip, seven[:5], NAMES, one[:5]).text == "seven"
    assert "too few to tell 10 phrases" in describe(clip, seven[:2], NAMES).table and describe(clip, seven[:3], NAMES).text == "seven"


def test_blank_lines_and_repeated_phrases_count_once(clip, digits):
    seven = digits.embeddings[digits.labels == 7]
    contrast = digits.embeddings[digits.labels != 7]
    plain = describe(clip, seven, "seven\none\na picture", contrast)
    same = describe(clip, seven, "\n  seven \n\n\none\nSeven\n\ta picture\r\none\n\n", contrast)
    assert same.phrases == ("seven", "one", "a picture") and same.text == plain.text == "seven" and same.table == plain.table


@pytest.mark.parametrize("phrases, count", [("", 0), (" \n\n", 0), ("seven", 1), ("seven\n SEVEN\n", 1)])
def test_fewer_than_two_phrases_are_refused(clip, digits, phrases, count):
    with pytest.raises(ValueError) as refused:
        describe(clip, digits.embeddings[:9], phrases, digits.embeddings[9:])
    assert str(refused.value) == (f"phrases has {count} different lines, and they are held against each other; write two or more: what the "
                                  f"pictures may show, and 'a picture'")


# --- checking ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_false_alarms_are_as_rare_as_asked(rate):
    """Over many draws of a retain set the share of alarms is at most `rate`, and not far below."""
    generator, alarms = torch.Generator().manual_seed(0), []

    def drawn(count, middle):
        return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator) + 2 * torch.eye(8)[middle], dim=1)

    unsafe, harmless = drawn(30, 0), drawn(3000, 1)
    for _ in range(100):
        retain = drawn(150, 1)
        alarms.append(float((likeness(harmless, unsafe, retain)[0] > alarm_threshold(unsafe, retain, rate)).float().mean()))
    assert 0.5 * rate < sum(alarms) / len(alarms) < 1.2 * rate
    few = drawn(2, 1)
    highest = (nearest(few, unsafe)[0] - nearest(few, few.flip(0), 1)[0].new_tensor(float(few[0] @ few[1]))).max()
    assert alarm_threshold(unsafe, few, 0.01) == pytest.approx(float(highest)), "too few to say: the largest"
    with pytest.raises(ValueError, match="retain_set has one picture"):
        alarm_threshold(unsafe, few[:1], 0.01)


def test_likeness_tells_shapes_between_the_sets_by_both():
    unsafe, retain = torch.eye(4)[:2], torch.eye(4)[2:]
    between = torch.nn.functional.normalize(torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]), dim=1)
    alone, row = likeness(between, unsafe)
    both, same = likeness(between, unsafe, retain)
    torch.testing.assert_close(alone, torch.tensor([0.5**0.5, 0.5**1.5, 0]))
    torch.testing.assert_close(both, torch.tensor([0.5**0.5, 0, -(0.5**0.5)]))
    assert torch.equal(row, same)


def test_check_covers_what_it_blocks(clip, digits):
    unsafe = digits.labels == 7
    rows = torch.cat([unsafe.nonzero()[:25, 0], (~unsafe).nonzero()[::12, 0]])
    pictures = torch.stack([digits.set.readers[i]() for i in rows])
    negation = digits.embeddings[unsafe][25:]
    retain = digits.embeddings[(~unsafe).nonzero()[1::3, 0]]
    threshold = alarm_threshold(negation, retain, 0.01)
    before = pictures.clone()
    for black in (False, True):
        checked = check(clip, pictures, negation, [f"seven_{i}" for i in range(25)], threshold, black, retain)
        assert checked.blocked[:25].float().mean() > 0.8 and checked.blocked[25:].float().mean() < 0.1
        assert torch.equal(checked.covered[~checked.blocked], pictures[~checked.blocked]) and torch.equal(pictures, before)
        covered = checked.covered[checked.blocked]
        assert not covered.any() if black else (
            covered.diff(dim=2).abs().mean() < 0.6 * pictures[checked.blocked].diff(dim=2).abs().mean())
        line = checked.lines[int(checked.blocked.nonzero()[0])]
        assert re.fullmatch(r"blocked: looks like seven_\d+ \(score -?0\.\d\d, limit -?0\.\d\d\)", line)
        assert checked.report.startswith(
            f"{len(rows) - int(checked.blocked.sum())} passed, {int(checked.blocked.sum())} refused\nimage 0: ")


def checked(*blocked):
    pictures = torch.rand(len(blocked), 2, 2, 3)
    stop = torch.tensor(blocked)
    return Checked(pictures, stop, torch.where(stop.view(-1, 1, 1, 1), 0.0, pictures), tuple("blocked" if b else "passed" for b in blocked))


def test_blocked_pictures_are_filled_in_their_places():
    first, second, third = checked(True, False, True, True), checked(False, True, True), checked(True, False)
    whole = first.filled(second.filled(third))
    assert whole.blocked.tolist() == [False, False, True, False]
    assert torch.equal(whole.pictures[0], second.pictures[0]) and torch.equal(whole.pictures[1], first.pictures[1])
    assert torch.equal(whole.pictures[3], third.pictures[1]) and not whole.covered[2].any()
    assert whole.lines == ("blocked; again: passed", "passed", "blocked; again: blocked; again: blocked",
                           "blocked; again: blocked; again: passed")
    assert whole.report.startswith("3 passed, 1 refused\n")
    with pytest.raises(ValueError, match="3 pictures of .2, 2, 3. are blocked, but 2 of .2, 2, 3. came again; sample from the output"):
        first.filled(third)



# --- semantic posterior --------------------------------------------------------------------------------------------

@pytest.fixture
def semantic(clip, digits):
    """Of sevens against ones and fours; latents are pictures (3, 32, 32), so that nothing has to be decoded."""
    def rows(*wanted):
        return digits.embeddings[torch.isin(digits.labels, torch.tensor(wanted))]

    calls = []

    def decode(denoised):
        calls.append(1)
        return denoised.movedim(1, -1)

    return SimpleNamespace(calls=calls, make=lambda **options: SemanticPosterior(clip, decode, rows(7)[:25], rows(1, 4), **options))


def latents_of(digits, digit, count=20):
    return torch.stack([digits.set.readers[i]() for i in (digits.labels == digit).nonzero()[25:25 + count, 0]]).movedim(-1, 1)


def test_the_semantic_posterior_knows_sevens(digits, semantic):
    level = torch.ones(20)
    assert (semantic.make()(latents_of(digits, 7), level) > 0).float().mean() > 0.9
    assert (semantic.make()(latents_of(digits, 1), level) < 0).float().mean() > 0.9


def test_it_looks_at_every_fourth_call_of_a_run_and_anew_in_the_next(digits, semantic):
    meant, sevens, ones = semantic.make(every=4), latents_of(digits, 7), latents_of(digits, 1)
    first = meant(sevens, torch.full((20,), 9.0))
    assert all(torch.equal(meant(ones, torch.full((20,), 9.0 - i)), first) for i in range(1, 4)) and len(semantic.calls) == 1
    later = meant(ones, torch.full((20,), 4.0))
    assert len(semantic.calls) == 2 and later.mean() < first.mean()
    meant(ones, torch.full((20,), 9.0))
    assert len(semantic.calls) == 3, "the noise level rose: another run"
    meant(ones[:3], torch.full((3,), 8.0))
    assert len(semantic.calls) == 4, "another batch"


def test_it_replaces_the_ratio_and_leaves_the_direction(digits, semantic):
    sevens, ones = latents_of(digits, 7), latents_of(digits, 1)
    settings = dict(bank=Bank(sevens), retain=Bank(ones), prior=0.4, evidence=0.0)
    x, sigma = torch.randn(20, 3, 32, 32), torch.full((20,), 2.0)
    meant = semantic.make()
    plain, _ = SafeDenoiser(**settings).safe(x, ones, sigma)
    moved, step = SafeDenoiser(**settings, semantic=meant).safe(x, ones, sigma)
    expected = torch.sigmoid(math.log(0.4 / 0.6) + semantic.make()(ones, sigma))
    torch.testing.assert_close(step.posterior, expected.clamp_max(0.95))
    along = torch.nn.functional.cosine_similarity((moved - ones).flatten(1), (plain - ones).flatten(1))
    assert along.min() > 0.999, "the direction is that of the banks"
    with pytest.raises(ValueError, match="the semantic posterior needs a retain bank, towards which to steer; connect one"):
        SafeDenoiser(Bank(sevens), semantic=meant)
