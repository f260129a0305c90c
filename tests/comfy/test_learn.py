"""Learn, save and load an unwanted condition: in the tiny world through ComfyUI, as its executor runs nodes (under inference mode)."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_digits.world import TinyDigits


@pytest.fixture(scope="module")
def world():
    return TinyDigits()


@pytest.fixture
def learn(run, tiny):
    def call(**choices):
        with torch.inference_mode():
            return run("LearnUnwantedCondition", **{**dict(model=tiny.model, negation_bank=tiny.bank, neutral=tiny.empty, steps=40,
                                                           reference_bank=tiny.reference), **choices})
    return call


@pytest.fixture
def fresh(comfy, tmp_path, monkeypatch, pack):
    """A user directory without anything learned."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path


def calls_of(model, monkeypatch):
    """Counts the model's calls from now on."""
    count, network = [0], model.model.diffusion_model
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *args, **kwargs: (count.__setitem__(0, count[0] + 1), forward(*args, **kwargs))[1])
    return count


def test_learned_from_a_folder_it_keeps_out_what_a_prompt_keeps_out(learn, comfy, run, tiny, world, fresh):
    before = {name: value.clone() for name, value in tiny.model.model.state_dict().items()}
    unwanted, text, plot = learn().result
    assert text.startswith("learned from 40 pictures in ") and "yes, clearly" in text, text
    assert plot.shape[0] == 1 and plot.shape[-1] == 3
    assert all(torch.equal(before[name], value) for name, value in tiny.model.model.state_dict().items())

    def sevens(**conditions):
        model = run("Apply", model=tiny.model, **conditions).result[0] if conditions else tiny.model
        latent = comfy.KSampler().sample(model=model, seed=5, steps=12, cfg=2.0, sampler_name="euler", scheduler="simple",
                                         positive=tiny.straight, negative=tiny.empty, denoise=1.0, latent_image=tiny.latent(64))[0]
        pixels = tiny.vae.decode(latent["samples"]).movedim(-1, 1)
        return float((world.digits(pixels) == 7).float().mean())

    assert sevens() >= 0.2
    assert sevens(unwanted=unwanted, neutral=tiny.empty) <= 0.02


def test_the_same_seed_is_the_same_tensor_and_the_second_time_comes_from_disk(learn, tiny, fresh, monkeypatch):
    first = learn(steps=12)
    count = calls_of(tiny.model, monkeypatch)
    kept = learn(steps=12)
    assert count == [0] and kept.result[1].splitlines()[1] == first.result[1].splitlines()[1]
    for path in (fresh / "safe_denoiser/conditions").iterdir():
        path.unlink()
    again = learn(steps=12)
    assert count[0] > 0
    for one in (kept, again):
        assert torch.equal(one.result[0][0][0], first.result[0][0][0])
        assert torch.equal(one.result[0][0][1]["pooled_output"], first.result[0][0][1]["pooled_output"])
    other = learn(steps=12, seed=1)
    assert not torch.equal(other.result[0][0][1]["pooled_output"], first.result[0][0][1]["pooled_output"])


@pytest.mark.parametrize("count", (40, 12), ids=("held out", "folds"))
@pytest.mark.parametrize("stop", (5, 14))
def test_stopped_and_gone_on_with_it_is_as_if_it_had_not_been(stop, count, learn, tiny, fresh, monkeypatch):
    import comfy.model_management

    bank = tiny.bank.sample(count)
    whole = learn(steps=20, negation_bank=bank).result[0]
    for path in (fresh / "safe_denoiser/conditions").iterdir():
        path.unlink()
    teller, calls = sys.modules["pack.nodes.condition.learn"].Teller, [0]
    tell = teller.__call__

    def interrupt(*args):
        calls[0] += 1
        if calls[0] == stop:
            raise comfy.model_management.InterruptProcessingException
        tell(*args)

    monkeypatch.setattr(teller, "__call__", interrupt)
    said = []
    monkeypatch.setattr("pack.nodes.progress.Live.send", lambda self, text: said.append(text))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        learn(steps=20, negation_bank=bank)
    assert re.fullmatch(r"stopped at \d+ of \d+; press Run to go on", said[-1])
    assert list((fresh / "safe_denoiser/conditions").iterdir())
    counted = calls_of(tiny.model, monkeypatch)
    gone_on = learn(steps=20, negation_bank=bank).result[0]
    assert torch.equal(gone_on[0][0], whole[0][0]) and torch.equal(gone_on[0][1]["pooled_output"], whole[0][1]["pooled_output"])
    after = counted[0]
    for path in (fresh / "safe_denoiser/conditions").iterdir():
        path.unlink()
    counted[0] = 0
    learn(steps=20, negation_bank=bank)
    assert after < counted[0]


def test_a_budget_in_seconds_ends_it_and_a_larger_one_goes_on(learn, fresh):
    text = learn(seconds=1, steps=5000).result[1]
    assert 1 <= int(text.split(" steps")[0].split()[-1]) <= 5000


def test_what_means_everything_is_refused(learn, tiny, fresh):
    """The model's own samples are what it draws anyway: there is nothing to learn from them that they alone have."""
    with pytest.raises(ValueError, match="no condition was found"):
        learn(negation_bank=tiny.reference, reference_bank=tiny.reference, steps=10)


def test_a_prompt_of_several_parts_is_refused(learn, tiny, fresh):
    with pytest.raises(ValueError, match="2 parts"):
        learn(neutral=tiny.empty + tiny.straight)


def test_it_takes_less_memory_where_there_is_little_and_says_what_is_missing(learn, pack, fresh, monkeypatch):
    module, tried = sys.modules["pack.nodes.condition.learn"], []
    differentiable = module.differentiable

    def small(model, checkpointed):
        tried.append(checkpointed)
        if len(tried) < enough:
            raise module.OUT_OF_MEMORY("no memory")
        return differentiable(model, checkpointed)

    monkeypatch.setattr(module, "differentiable", small)
    enough = 3
    plain = learn(steps=10).result[0]
    assert tried == [False, True, False]
    enough, tried[:] = 9, []
    with pytest.raises(ValueError, match="does not fit into memory; learn at a smaller size"):
        learn(steps=11)
    monkeypatch.undo()
    assert torch.allclose(learn(steps=10, seed=0).result[0][0][1]["pooled_output"], plain[0][1]["pooled_output"], atol=1e-4)


# --- files ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def written(run, learn, tiny, fresh, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    unwanted, text, _ = learn(steps=10).result
    run("SaveUnwantedCondition", unwanted=unwanted, model=tiny.model, filename_prefix="sevens")
    return unwanted, text, next((tmp_path / "output/unwanted_conditions").iterdir())


def test_saved_and_loaded_it_is_the_same(run, tiny, written, pack):
    unwanted, text, path = written
    assert path.name in pack["SafeDenoiserLoadUnwantedCondition"].define_schema().inputs[0].options
    loaded, said = run("LoadUnwantedCondition", condition=path.name, model=tiny.model).result
    assert torch.equal(loaded[0][0], unwanted[0][0]) and said == text
    assert torch.equal(loaded[0][1]["pooled_output"], unwanted[0][1]["pooled_output"])


def test_it_is_refused_on_another_model_unless_asked(run, tiny, written):
    unwanted, _, path = written
    other = run("LoadTinyWorld", world="digits").result[0]
    other.model.diffusion_model.final_layer.linear.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="another model"):
        run("LoadUnwantedCondition", condition=path.name, model=other)
    loaded, text = run("LoadUnwantedCondition", condition=path.name, model=other, other_model=True).result
    assert torch.equal(loaded[0][0], unwanted[0][0]) and "other weights" in text


def test_a_lora_on_the_model_makes_it_no_other(run, tiny, written):
    patched = tiny.model.clone()
    key = next(key for key in patched.model_state_dict() if key.endswith("final_layer.linear.weight"))
    patched.add_patches({key: ("diff", (torch.ones_like(patched.model_state_dict()[key]),))}, 0.1)
    assert run("LoadUnwantedCondition", condition=written[2].name, model=patched).result[0]


@pytest.mark.parametrize("change, message", [
    (lambda tensors, header: tensors.update(area=torch.ones(1, 4)), "does not hold area"),
    (lambda tensors, header: tensors.update(rows=torch.full((1, 1, 16), float("nan"))), "NaN"),
    (lambda tensors, header: tensors.update(rows=torch.ones(3, 1, 16)), "one row"),
    (lambda tensors, header: tensors.pop("rows"), "rows of text"),
    (lambda tensors, header: header.update(numbers='{"strength": 3}'), "does not hold strength"),
    (lambda tensors, header: header.update(numbers='{"guidance": "__import__"}'), "does not hold guidance"),
    (lambda tensors, header: header.update(numbers="[" * 100_000), "cannot be read"),
    (lambda tensors, header: header.update(version="99"), "update the pack"),
    (lambda tensors, header: header.update(format="pt"), "not a condition"),
])
def test_a_strangers_file_can_do_nothing(change, message, run, tiny, written):
    path = written[2]
    tensors = load_file(path)
    header = {"format": "safe_denoiser.condition", "version": "1", "numbers": "{}", "about": "{}"}
    change(tensors, header)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=message):
        run("LoadUnwantedCondition", condition=path.name, model=tiny.model, other_model=True)


def test_what_a_file_says_of_itself_is_printable_text(run, tiny, written):
    path = written[2]
    save_file(load_file(path), path, {"format": "safe_denoiser.condition", "version": "1",
                                      "about": json.dumps({"text": "\x1b[31mred\0" + "x" * 10})})
    text = run("LoadUnwantedCondition", condition=path.name, model=tiny.model, other_model=True).result[1]
    assert "\x1b" not in text and "\0" not in text


@pytest.mark.parametrize("name", ("../x.safetensors", "/etc/passwd", "nowhere.safetensors"))
def test_names_lead_nowhere(pack, name):
    assert pack["SafeDenoiserLoadUnwantedCondition"].validate_inputs(condition=name) is not True


def test_rubbish_is_no_condition(run, tiny, written):
    Path(written[2]).write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        run("LoadUnwantedCondition", condition=written[2].name, model=tiny.model)
