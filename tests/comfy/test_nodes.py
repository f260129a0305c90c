"""Each node, called as ComfyUI's executor calls it."""
import os
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_sampling import stopped

from safe_denoiser import Bank, NegationSet, save_bank

IDS = {
    "LoadNegationSet": "Load Negation Set", "NegationSetFromImages": "Negation Set from Images",
    "BuildNegationBank": "Build Negation Bank", "SaveNegationBank": "Save Negation Bank", "LoadNegationBank": "Load Negation Bank",
    "SampleReferenceBank": "Sample Reference Bank", "Apply": "Apply Safe Denoiser", "KSampler": "Safe KSampler",
    "LoadOpenCLIP": "Load OpenCLIP", "CurateNegationSet": "Curate Negation Set", "SplitNegationSet": "Split Negation Set",
    "CheckImages": "Check Images", "FillBlockedImages": "Fill Blocked Images", "SemanticPosterior": "Semantic Posterior",
    "CombineNegationSets": "Combine Negation Sets", "Report": "Safe Denoiser Report", "ClassCondition": "Class Condition",
    "DescribeNegationSet": "Describe Negation Set", "GuardPrompt": "Guard Prompt", "GuardModel": "Guard Model (SLD)",
    "LearnUnwantedCondition": "Learn Unwanted Condition", "SaveUnwantedCondition": "Save Unwanted Condition",
    "LoadUnwantedCondition": "Load Unwanted Condition", "KeepOut": "Keep Out",
    "LoadTinyWorld": "Load Tiny World",
}


@pytest.fixture
def sets(comfy):
    """input/negation_sets, empty before and after."""
    import folder_paths

    folder = Path(folder_paths.get_input_directory()) / "negation_sets"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def paint(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.effect_noise((40, 40), 80).save(folder / name)


def test_ids_and_names_are_the_contract(pack):
    schemas = {node_id: node.GET_SCHEMA() for node_id, node in pack.items()}
    assert {key: schema.display_name for key, schema in schemas.items()} == {f"SafeDenoiser{key}": name for key, name in IDS.items()}


def test_every_input_and_output_explains_itself(pack):
    for node_id, node in pack.items():
        schema = node.GET_SCHEMA()
        assert len(schema.description) > 40, node_id
        for thing in [*schema.inputs, *schema.outputs]:
            assert thing.tooltip and len(thing.tooltip) > 10, (node_id, thing.id)


def test_a_set_with_its_preview(run, sets):
    paint(sets / "people/alice", "a.png", "b.png")
    (sets / "people/alice/c.png").write_bytes(b"")
    size = sum(path.stat().st_size for path in (sets / "people/alice").iterdir())
    describe = f"people/alice: 2 pictures, 1 skipped, {size / 1024:.3g} KB"
    for style, images in (("blurred", 1), ("shown", 1), ("off", 0)):
        output = run("LoadNegationSet", folder="people/alice", preview=style)
        assert len(output.result[0]) == 2 and output.result[1] == describe + "\nskipped c.png: empty file"
        assert len(output.ui["images"] if output.ui else []) == images
    assert len(run("LoadNegationSet", folder="people/alice", max_images=1, preview="off").result[0]) == 1


def test_the_combo_lists_every_folder_with_pictures(pack, sets):
    paint(sets / "people/alice", "a.png")
    (sets / "no_pictures").mkdir()
    options = pack["SafeDenoiserLoadNegationSet"].GET_SCHEMA().inputs[0].options
    assert options == ["choose a set", "no_pictures", "people/alice", "tiny_ones_and_fours", "tiny_sevens", "tiny_trucks"]
    banks = pack["SafeDenoiserLoadNegationBank"].GET_SCHEMA().inputs[0].options
    assert banks == ["tiny_photos_reference.safetensors", "tiny_reference.safetensors"]


def test_zip_files_and_saved_banks_are_sets(pack, run, tiny, sets, comfy):
    import folder_paths

    paint(sets / "people", "a.png", "b.png")
    with zipfile.ZipFile(sets / "packed.zip", "w") as archive:
        for path in sorted((sets / "people").iterdir()):
            archive.write(path, f"inside/{path.name}")
    banks = Path(folder_paths.get_output_directory()) / "negation_banks"
    run("SaveNegationBank", negation_bank=tiny.bank, filename_prefix="sevens")
    options = pack["SafeDenoiserLoadNegationSet"].GET_SCHEMA().inputs[0].options
    assert options == ["choose a set", "packed.zip", "people", "sevens_00001_.safetensors", "tiny_ones_and_fours", "tiny_sevens",
                       "tiny_trucks"]

    def load(name, **choices):
        assert pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder=name) is True
        output = run("LoadNegationSet", folder=name, **choices)
        assert len(output.ui["images"]) == 1
        return output.result[0]

    assert load("packed.zip").fingerprints == load("people").fingerprints
    saved = load("sevens_00001_.safetensors")
    bank = run("BuildNegationBank", negation_set=saved, vae=tiny.vae, latent=tiny.latent()).result[0]
    assert torch.equal(bank.latents, tiny.bank.latents) and bank.names == tiny.bank.names and bank.metadata["space"] == "vae"
    assert len(load("sevens_00001_.safetensors", max_images=3)) == 3
    save_bank(Bank(torch.rand(2, 16, 4, 4)), sets / "strange.safetensors")
    with pytest.raises(ValueError, match="a bank in the space of an unknown model, not of a VAE; choose one that Save Negation Bank wrote"):
        load("strange.safetensors")
    for name in ("gone.zip", "gone.safetensors"):
        message = pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder=name)
        place = f"ComfyUI/input/negation_sets/{name}"
        assert message == f"negation set {name!r} is not on this machine; put the file there: {place}, then press R"
    shutil.rmtree(banks)


def test_combined_sets_weigh_the_bank(run, tiny, sets):
    paint(sets / "a", "1.png", "2.png")
    paint(sets / "b", "3.png")
    loaded = [run("LoadNegationSet", folder=name, preview="off").result[0] for name in "ab"]
    negation_set, info = run("CombineNegationSets", set_1=loaded[0], set_3=loaded[1], weight_3=4.0).result
    assert info.startswith("combined: 3 pictures, 0 skipped, ")
    assert run("BuildNegationBank", negation_set=negation_set, vae=tiny.vae, latent=tiny.latent()).result[0].weights.tolist() == [1, 1, 4]
    alone, _ = run("CombineNegationSets", set_1=loaded[0], set_2=loaded[1], weight_1=0.0).result
    assert alone.names == ("3.png",)
    with pytest.raises(ValueError, match="at least one above 0"):
        run("CombineNegationSets", set_1=loaded[0], weight_1=0.0)


def test_the_sampling_node_tells_how_it_goes(run, tiny, sample, monkeypatch):
    """The page's script: some of the steps while it runs, and the verdict at the end."""
    import comfy.model_management as management
    from comfy_execution.utils import CurrentNodeContext

    sent = []
    def send(event, data, client):
        assert (event, data["prompt_id"], client) == ("safe_denoiser.text", "prompt", "page")
        sent.append((data["node"], data["text"]))

    server = SimpleNamespace(send_sync=send, client_id="page")
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    monkeypatch.setattr("pack.nodes.progress.SECONDS", 0)
    with CurrentNodeContext("prompt", "7"):
        _, report = sample.safe()
        assert {node for node, _ in sent} == {"7"}
        steered = [int((c >= 0.05).sum()) for c in report.values["correction"][:5]]
        during = {0: "nothing to steer in this step", 1: "steering 1 of 2 pictures", 2: "steering all pictures"}
        assert [text for _, text in sent] == [*map(during.get, steered), report.sentence]
        assert report.sentence.startswith("all pictures steered away, most by tiny_sevens_")
        sent.clear()
        sample.safe(settings=dict(strength=0.0))
        assert sent == [("7", "off: strength is 0")]
        sent.clear()
        with pytest.raises(management.InterruptProcessingException):
            sample.safe(settings=dict(strength=0.0), model=stopped(tiny.model))
        assert sent == [("7", "stopped")], "a run that failed says nothing of settings"
        sent.clear()
        server.client_id = None  # a prompt that no page has posted
        sample.safe()
        assert not sent, "to nobody is to everybody"
        server.client_id = "page"
    sent.clear()
    sample.safe()
    assert not sent, "outside a running workflow nobody is told"


@pytest.mark.parametrize("name", ["../secret", "people/../../secret", "link", ""])
def test_names_that_lead_out_are_refused(pack, run, sets, name):
    paint(sets.parent / "secret", "a.png")
    os.symlink(sets.parent / "secret", sets / "link")
    assert "leads out of ComfyUI's negation_sets folder" in pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder=name)
    with pytest.raises(ValueError, match="leads out of"):
        run("LoadNegationSet", folder=name)


def test_absolute_names_are_refused(pack, run, sets):
    paint(sets.parent / "secret", "a.png")
    for node, argument, name in (("LoadNegationSet", "folder", sets.parent / "secret"),
                                 ("LoadNegationBank", "bank", sets / "x.safetensors")):
        assert "leads out of" in pack[f"SafeDenoiser{node}"].validate_inputs(**{argument: str(name)})
        with pytest.raises(ValueError, match="leads out of"):
            run(node, **{argument: str(name)})


def test_a_missing_set_names_the_folder_to_create(pack, sets, monkeypatch):
    def says(place):
        message = pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder="gone")
        return message == f"negation set 'gone' is not on this machine; create {place} and put the pictures into it, then press R"

    assert says("ComfyUI/input/negation_sets/gone"), "as artists call it, wherever that is"
    with monkeypatch.context() as patch:
        patch.setattr("folder_paths.base_path", str(sets / "elsewhere"))  # as with --input-directory
        assert says((sets / "gone").as_posix())
    (sets / "empty").mkdir()
    assert pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder="empty") is True


def test_fingerprint_changes_with_the_folder_only(pack, sets):
    node = pack["SafeDenoiserLoadNegationSet"]
    paint(sets / "s", "a.png")
    first = node.fingerprint_inputs(folder="s", max_images=0, preview="off")
    assert node.fingerprint_inputs(folder="s", max_images=0, preview="off") == first
    paint(sets / "s", "b.png")
    second = node.fingerprint_inputs(folder="s", max_images=0, preview="off")
    os.utime(sets / "s/a.png", (5, 5))
    assert len({str(first), str(second), str(node.fingerprint_inputs(folder="s", max_images=0, preview="off"))}) == 3


def counting(vae, monkeypatch):
    calls, encode = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: calls.append(tuple(pixels.shape)) or encode(pixels))
    return calls


def test_build_encodes_one_by_one_and_never_twice(run, tiny, sets, monkeypatch):
    paint(sets / "s", "a.png", "b.png", "c.png")
    calls = counting(tiny.vae, monkeypatch)

    def build():
        calls.clear()
        negation_set = run("LoadNegationSet", folder="s", preview="off").result[0]
        return run("BuildNegationBank", negation_set=negation_set, vae=tiny.vae, latent=tiny.latent(2, 64, 32)).result[0]

    bank = build()
    assert bank.latents.shape == (3, 16, 4, 8) and bank.names == ("a.png", "b.png", "c.png") and bank.metadata["space"] == "vae"
    assert calls == [(1, 32, 64, 3)] * 3
    again = build()
    assert not calls and torch.equal(again.latents, bank.latents)
    paint(sets / "s", "d.png")
    build()
    assert len(calls) == 1


def test_an_interrupt_while_encoding_passes_and_keeps_the_cache(run, tiny, sets, monkeypatch):
    import comfy.model_management as management

    paint(sets / "s", *(f"{i}.png" for i in range(4)))
    negation_set = run("LoadNegationSet", folder="s", preview="off").result[0]
    calls = counting(tiny.vae, monkeypatch)
    encode = tiny.vae.encode

    def stop_after_second(pixels):
        latent = encode(pixels)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return latent

    monkeypatch.setattr(tiny.vae, "encode", stop_after_second)
    with pytest.raises(management.InterruptProcessingException):
        run("BuildNegationBank", negation_set=negation_set, vae=tiny.vae, latent=tiny.latent())
    assert len(calls) == 2
    run("BuildNegationBank", negation_set=negation_set, vae=tiny.vae, latent=tiny.latent())
    assert len(calls) == 4, "the two that were encoded are not encoded again"


def test_images_of_the_graph_become_a_set(run, tiny):
    negation_set = run("NegationSetFromImages", images=torch.rand(3, 32, 32, 3), preview="off").result[0]
    assert run("BuildNegationBank", negation_set=negation_set, vae=tiny.vae, latent=tiny.latent()).result[0].latents.shape == (3, 16, 4, 4)


def test_save_and_load(run, tiny, comfy):
    import folder_paths

    folder = Path(folder_paths.get_output_directory()) / "negation_banks"
    for number in (1, 2):
        run("SaveNegationBank", negation_bank=tiny.bank, filename_prefix="sevens")
        assert (folder / f"sevens_{number:05}_.safetensors").is_file()
    read = run("LoadNegationBank", bank="sevens_00001_.safetensors").result[0]
    assert torch.equal(read.latents, tiny.bank.latents) and read.metadata == tiny.bank.metadata
    (folder / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="'broken.safetensors' is not a readable safetensors file"):
        run("LoadNegationBank", bank="broken.safetensors")
    shutil.rmtree(folder)


def test_the_reference_bank_is_sampled_once(run, tiny, monkeypatch):
    import comfy.sample

    calls, sample = [], comfy.sample.sample
    monkeypatch.setattr(comfy.sample, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))

    def reference(**choices):
        calls.clear()
        settings = dict(count=5, steps=3, scheduler="simple", batch_size=2) | choices
        return run("SampleReferenceBank", **(dict(model=tiny.model, latent=tiny.latent(), conditioning=tiny.empty) | settings)).result[0]

    state = torch.get_rng_state()
    first = reference()
    assert len(calls) == 3 and first.latents.shape == (5, 16, 4, 4) and first.metadata["space"] == "vae"
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(reference().latents, first.latents) and not calls
    for count, more in ((4, 0), (5, 0), (7, 2), (5, 0)):
        grown = reference(count=count).latents
        assert len(grown) == count and len(calls) == more and torch.equal(grown[:5], first.latents[:count]), "only what is missing"
    for change in (dict(seed=1), dict(steps=4), dict(latent=tiny.latent(1, 48, 32)), dict(conditioning=tiny.straight)):
        reference(**change)
        assert calls, change
    lora = tiny.model.clone()
    lora.add_patches({"diffusion_model.x_embedder.proj.bias": (torch.ones(192),)})
    assert not torch.equal(reference(model=lora).latents, first.latents) and calls
    assert torch.equal(reference().latents, first.latents) and not calls, "loading a LoRA does not change the key of the plain model"


def test_the_reference_bank_tells_how_long_it_takes_and_counts_what_is_kept(run, tiny, monkeypatch):
    import comfy.utils

    sent, bar = [], []
    monkeypatch.setattr("pack.nodes.progress.Live.send", lambda self, text: sent.append(text))
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, total=None, preview=None: bar.append(value))
    given = dict(model=tiny.model, latent=tiny.latent(), conditioning=tiny.empty, steps=2, batch_size=2, seed=4321)
    run("SampleReferenceBank", count=4, **given)
    assert re.fullmatch(r"2 of 4, \d+ s left", sent[0]) and sent[1:] == ["4 of 4", "4 samples, 4 of them new"]
    assert bar[-1] == 8 and bar == sorted(bar)
    sent.clear(), bar.clear()
    run("SampleReferenceBank", count=6, **given)
    assert sent == ["6 of 6", "6 samples, 2 of them new"] and bar[:2] == [4, 8] and bar[-1] == 12


def test_an_interrupt_while_sampling_the_reference_stores_nothing(run, tiny):
    import comfy.model_management as management

    settings = dict(model=tiny.model, latent=tiny.latent(), conditioning=tiny.empty, count=2, steps=3, seed=77)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        run("SampleReferenceBank", **settings)
    assert len(run("SampleReferenceBank", **settings).result[0]) == 2


def test_class_condition(run):
    (context, extra), = run("ClassCondition", class_index=3, classes=8).result[0]
    assert context.shape == (1, 1, 8) and not context.any() and extra["pooled_output"].tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    (_, extra), = run("ClassCondition", class_index=-1, classes=8).result[0]
    assert not extra["pooled_output"].any()
    with pytest.raises(ValueError, match="class_index is 8 but there are 8 classes; choose 0 to 7, or -1"):
        run("ClassCondition", class_index=8, classes=8)


class DigitWords:
    """A text encoder that knows the words of the tiny model's classes."""

    WORDS = ("", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "straight", "curly", "round")

    def __init__(self, run):
        self.run = run

    def tokenize(self, text):
        return self.WORDS.index(text) - 1

    def encode_from_tokens_scheduled(self, tokens):
        return self.run("ClassCondition", class_index=tokens).result[0]


def test_the_model_itself_describes_a_bank(run, tiny, monkeypatch):
    sent, phrases = [], "\n".join(DigitWords.WORDS[1:11])
    monkeypatch.setattr("pack.nodes.progress.Live.send", lambda self, text: sent.append(text))
    given = dict(model=tiny.model, text_encoder=DigitWords(run), negation_bank=tiny.bank, reference_bank=tiny.reference)
    output = run("DescribeNegationSet", phrases=phrases, **given)
    text, table = output.result
    assert text.startswith("seven") and table.splitlines()[1].endswith(", chosen") and " seven: best for " in table.splitlines()[1]
    assert re.fullmatch(r"10 phrases: about \d+ calls of the model, 8 pictures each", sent[0]), "its cost is told beforehand"
    assert sent[1:] == [table] and output.ui["text"] == (table,)
    halves = [replace(tiny.reference, latents=tiny.reference.latents[i::2]) for i in (0, 1)]
    text, table = run("DescribeNegationSet", phrases=phrases, **given | dict(negation_bank=halves[0], reference_bank=halves[1])).result
    assert text == "" and "no phrase describes the set and separates it" in table, "a mixed folder has no name"


def test_describing_names_what_is_not_connected(run, tiny):
    given = dict(model=tiny.model, text_encoder=DigitWords(run), negation_bank=tiny.bank, reference_bank=tiny.reference)
    for name in ("text_encoder", "negation_bank", "reference_bank"):
        with pytest.raises(ValueError, match=f"model is connected, and {name} is not; .*, so connect all of them"):
            run("DescribeNegationSet", **given | {name: None})
    with pytest.raises(ValueError, match="and text_encoder and negation_bank and reference_bank are not;"):
        run("DescribeNegationSet", model=tiny.model)
    for alone in ({}, dict(negation_set=tiny.negation_set)):
        with pytest.raises(ValueError, match=r"connect clip \(from Load OpenCLIP\) and negation_set, or model, text_encoder"):
            run("DescribeNegationSet", **alone)
    one = replace(tiny.bank, latents=tiny.bank.latents[:1], names=())
    with pytest.raises(ValueError, match=r"the set has 1, the others are .*connect banks of two or more"):
        run("DescribeNegationSet", phrases="one\nseven", **given | dict(negation_bank=one))


def test_the_report_node(run, tiny, sample):
    _, report = sample.safe()
    output = run("Report", report=report, negation_set=tiny.negation_set)
    plot, table = output.result
    assert plot.shape == (1, 480, 870, 3) and "corrected 6 of 6 model calls" in table
    assert len(output.ui["images"]) == 1 and output.ui["text"] == (table,)
    assert run("Report", report=report).result[0].shape == (1, 480, 720, 3)
    assert "6 model calls, window open in calls 1 to 6 (sigma 1.000 to " in table
    noise = NegationSet.from_images((torch.rand(40, 64, 64, 3) > 0.5).float())
    off, shown = (run("Report", report=report, negation_set=noise, preview=style).result[0] for style in ("off", "shown"))
    assert off.shape == (1, 480, 720, 3), "off draws no pictures"
    sharpness = [picture[0, 50:450, 740:850].diff(dim=1).abs().mean()
                 for picture in (run("Report", report=report, negation_set=noise).result[0], shown)]
    assert sharpness[1] > 5 * sharpness[0], "blurred unless asked"


def test_prototypes_make_a_smaller_bank_and_the_report_still_names_pictures(run, tiny, sample):
    small = run("BuildNegationBank", negation_set=tiny.negation_set, vae=tiny.vae, latent=tiny.latent(), prototypes=6).result[0]
    assert small.latents.shape == (6, 16, 4, 4) and set(small.names) < set(tiny.negation_set.names)
    assert small.weights.sum() == pytest.approx(40, rel=1e-4) and small.metadata["space"] == "vae"
    _, report = sample.safe(dict(negation_bank=small, reference_bank=tiny.reference))
    named = {tiny.negation_set.names[i] for i in report.pushed_most()}
    assert named and named <= set(small.names), "numbers are those of the pictures, not of the prototypes"


def test_a_large_bank_gets_an_index(run, tiny, monkeypatch):
    monkeypatch.setattr(sys.modules["pack.nodes.bank.negation_bank"], "SEARCHED", 40)
    bank = run("BuildNegationBank", negation_set=tiny.negation_set, vae=tiny.vae, latent=tiny.latent()).result[0]
    assert bank.clusters is not None and tiny.bank.clusters is None and torch.equal(bank.latents, tiny.bank.latents)


def test_the_report_is_that_of_the_samples(tiny, sample, run):
    """Where ComfyUI kept the sampler's result and made the patched model anew, and where it kept the results of several runs."""
    from comfy_execution.utils import CurrentNodeContext

    def patched(node="7"):
        with CurrentNodeContext("prompt", node):
            return run("Apply", model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference).result

    def table(report, samples):
        return run("Report", report=report, samples={"samples": samples}).result[1]

    model, report = patched()
    six, eight = (sample.stock(model=model, steps=steps) for steps in (6, 8))
    assert len(report.steps) == 8 and "8 of 8" in table(report, eight) and "6 of 6" in table(report, six)
    _, anew = patched()
    assert not anew.steps and "6 of 6" in table(anew, six) and "8 of 8" in table(anew, eight)
    for other, samples in ((anew, six + 1), (patched("8")[1], six)):
        assert "its result was kept from before" in table(other, samples)
