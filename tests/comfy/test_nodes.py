"""Each node, called as ComfyUI's executor calls it."""
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

IDS = {
    "LoadNegationSet": "Load Negation Set", "NegationSetFromImages": "Negation Set from Images",
    "BuildNegationBank": "Build Negation Bank", "SaveNegationBank": "Save Negation Bank", "LoadNegationBank": "Load Negation Bank",
    "SampleReferenceBank": "Sample Reference Bank", "Apply": "Apply Safe Denoiser", "KSampler": "Safe KSampler",
    "Report": "Safe Denoiser Report", "ClassCondition": "Class Condition",
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
    for style, images in (("blurred", 1), ("shown", 1), ("off", 0)):
        output = run("LoadNegationSet", folder="people/alice", preview=style)
        assert len(output.result[0]) == 2 and output.result[1] == "people/alice: 2 pictures, 1 skipped\nskipped c.png: empty file"
        assert len(output.ui.as_dict()["images"] if output.ui else []) == images
    assert len(run("LoadNegationSet", folder="people/alice", max_images=1, preview="off").result[0]) == 1


def test_the_combo_lists_every_folder_with_pictures(pack, sets):
    paint(sets / "people/alice", "a.png")
    (sets / "no_pictures").mkdir()
    options = pack["SafeDenoiserLoadNegationSet"].GET_SCHEMA().inputs[0].options
    assert options == ["people/alice", "tiny_ones_and_fours", "tiny_sevens"]
    banks = pack["SafeDenoiserLoadNegationBank"].GET_SCHEMA().inputs[0].options
    assert banks == ["tiny_reference.safetensors"]


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


def test_a_missing_set_names_the_folder_to_create(pack, sets):
    message = pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder="gone")
    assert message == f"negation set 'gone' is not on this machine; create {sets / 'gone'}"
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

    def stop_at_second(pixels):
        if len(calls) == 1:
            management.interrupt_current_processing()
        return encode(pixels)

    monkeypatch.setattr(tiny.vae, "encode", stop_at_second)
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
    for change in (dict(seed=1), dict(count=4), dict(steps=4), dict(latent=tiny.latent(1, 48, 32)), dict(conditioning=tiny.straight)):
        reference(**change)
        assert calls, change
    lora = tiny.model.clone()
    lora.add_patches({"diffusion_model.x_embedder.proj.bias": (torch.ones(192),)})
    assert not torch.equal(reference(model=lora).latents, first.latents) and calls
    assert torch.equal(reference().latents, first.latents) and not calls, "loading a LoRA does not change the key of the plain model"


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


def test_the_report_node(run, tiny, sample):
    _, report = sample.safe()
    output = run("Report", report=report, negation_set=tiny.negation_set)
    plot, table = output.result
    assert plot.shape == (1, 480, 870, 3) and "corrected 6 of 6 model calls" in table
    assert len(output.ui["images"]) == 1 and output.ui["text"] == (table,)
    assert run("Report", report=report).result[0].shape == (1, 480, 720, 3)
