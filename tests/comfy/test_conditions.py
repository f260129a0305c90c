"""The unwanted condition: evaluated in the guider's own batch, as the model predicts under it alone, and heard by nobody but the core."""
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, build, conditioning
from test_guiders import BIAS, GUIDERS, bent, guided, lora, neighbours, sample, setting
from test_sampling import stopped

OWN = {"CFGGuider": 2, "CFGGuider, cfg 1": 1, "BasicGuider": 1, "DualCFGGuider regular": 3, "DualCFGGuider nested": 3, "PerpNegGuider": 3,
       "DualModelGuider": 1}
AFTERWARDS = {"DualModelGuider": 1}  # evaluations of the other model
UNCONDITIONAL = {"CFGGuider", "DualCFGGuider regular", "PerpNegGuider", "DualModelGuider"}


@pytest.fixture(scope="module")
def models(tiny, comfy):
    return {"SD 3": tiny.model, "SD 1.5": build(FAMILIES["SD 1.5"]), "Wan 2.1": build(FAMILIES["Wan 2.1"])}


@pytest.fixture(scope="module")
def conditions(tiny, run):
    """Of a model: what must not come out, and what means nothing in particular."""
    def of(name):
        if name == "SD 3":
            return run("ClassCondition", class_index=7).result[0], run("ClassCondition", class_index=12).result[0]
        return conditioning(FAMILIES[name], 7), conditioning(FAMILIES[name], 8)
    return of


@pytest.fixture
def heard(pack, monkeypatch):
    """What the core was told in each call of `safe`, and what came out."""
    from pack.safe_denoiser import SafeDenoiser

    calls, safe = [], SafeDenoiser.safe

    def spy(self, x, denoised, sigma, alpha, mask=None, begins=True, **guides):
        result, step = safe(self, x, denoised, sigma, alpha, mask, begins=begins, **guides)
        guides = {name: y.clone() for name, y in guides.items()}
        calls.append(SimpleNamespace(x=x.clone(), sigma=sigma, denoised=denoised.clone(), mask=mask, guides=guides, result=result,
                                     step=step))
        return result, step

    monkeypatch.setattr(SafeDenoiser, "safe", spy)
    return calls


def counted(model):
    """A clone whose every evaluation of the network leaves its number of rows."""
    import comfy.patcher_extension

    rows, model = [], model.clone()

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    count.__module__ = "comfy.counted"  # as ComfyUI's own: beside another pack's the conditions have calls of their own
    model.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, count)
    return model, rows


def alone(model, condition, calls, shape):
    """What the model predicts under one condition at the x and sigma of each call, in a run of its own."""
    predictions = []

    class At:
        def sample(self, guider, sigmas, extra_args, callback, noise, *rest):
            predictions.extend(guider(call.x, call.timestep, **extra_args) for call in calls)
            return noise

    for call in calls:
        call.timestep = call.sigma.expand(shape[0])
    guider = guided("BasicGuider", model, (condition, None, None))
    sigmas = torch.tensor([float(call.sigma[0]) for call in calls] + [0.0])
    with torch.inference_mode():
        guider.sample(torch.zeros(shape), torch.zeros(shape), At(), sigmas, disable_pbar=True)
    return predictions


def agrees(model, calls, name, condition, shape):
    ends = [calls[0], calls[-1]]
    for call, wanted in zip(ends, alone(model, condition, ends, shape)):
        torch.testing.assert_close(call.guides[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, kind", [*(("SD 3", kind) for kind in GUIDERS), ("SD 1.5", "CFGGuider"), ("SD 1.5", "CFGGuider, cfg 1")])
def test_guiders(name, kind, models, tiny, run, conditions, heard, matrix):
    """One batch per step, with one row more per picture for each condition; and what the core hears is the model's own."""
    shape, prompts, *_ = setting(name, models[name], tiny)
    unwanted, neutral = conditions(name)
    stock = sample(guided(kind, models[name], prompts), shape)[1]
    for sampler, more in (("euler", {}), ("euler", {"neutral": neutral}), ("dpmpp_2m_cfg_pp", {}))[:1 if name == "SD 1.5" else 3]:
        heard.clear()
        patched, report = run("Apply", model=models[name], unwanted=unwanted, **more).result
        patched, rows = counted(patched)
        predictions, result = sample(guided(kind, patched, prompts), shape, sampler=sampler)
        negative = kind in UNCONDITIONAL or kind == "CFGGuider, cfg 1" and sampler.endswith("cfg_pp")  # these samplers ask for it
        asked = OWN[kind] + 1 + len(more) + (negative and kind not in UNCONDITIONAL)
        assert rows == [shape[0] * count for count in (asked, AFTERWARDS.get(kind, 0)) if count] * 4
        assert len(heard) == 4 and report.summary["corrected_calls"] == 4 and not report.notes
        wanted = {"unwanted": unwanted, "conditional": prompts[0]} | ({"unconditional": prompts[1]} if negative else {})
        wanted |= {"neutral": prompts[1]} if kind == "DualCFGGuider nested" else {}  # which keeps the negative one for itself
        for told, condition in (wanted | more).items():
            agrees(models[name], heard, told, condition, shape)
        assert all(set(call.guides) == set(wanted | more) for call in heard)
        assert all(torch.equal(call.result, used) for call, used in zip(heard, predictions))
        assert torch.isfinite(result).all() and not torch.equal(result, stock)
    matrix.name, matrix.outcome = f"unwanted condition, guider: {kind}", f"pass ({name})"


@pytest.mark.parametrize("kind", GUIDERS)
def test_off_is_stock_and_evaluates_nothing_more(kind, models, tiny, run, conditions):
    """Strength 0, and where the window is closed: the guider's own batch, and its own numbers."""
    shape, prompts, *_ = setting("SD 3", models["SD 3"], tiny)
    stock = sample(guided(kind, models["SD 3"], prompts), shape)[1]
    for settings in (dict(strength=0.0), dict(start=0.3, end=0.3)):
        patched, report = run("Apply", model=models["SD 3"], unwanted=conditions("SD 3")[0], **settings).result
        patched, rows = counted(patched)
        assert torch.equal(sample(guided(kind, patched, prompts), shape)[1], stock)
        assert rows == [shape[0] * count for count in (OWN[kind], AFTERWARDS.get(kind, 0)) if count] * 4
        assert report.summary["corrected_calls"] == 0 and not report.notes
        assert len(report.steps) == (0 if "strength" in settings else 4)


def test_in_the_window_only(models, tiny, run, conditions):
    shape, prompts, *_ = setting("SD 3", models["SD 3"], tiny)
    patched, report = run("Apply", model=models["SD 3"], unwanted=conditions("SD 3")[0], start=0.3, end=0.8).result
    patched, rows = counted(patched)
    sample(guided("CFGGuider", patched, prompts), shape, steps=8)
    active = [bool(step.active.all()) for step in report.steps]
    assert rows == [6 if on else 4 for on in active] and 0 < sum(active) < 8


def test_nothing_connected_adds_nothing(models, tiny, run):
    import comfy.patcher_extension

    patched, _ = run("Apply", model=models["SD 3"], negation_bank=tiny.bank).result
    wrappers = comfy.patcher_extension.WrappersMP
    kinds = (wrappers.OUTER_SAMPLE, wrappers.PREPARE_SAMPLING, wrappers.SAMPLER_SAMPLE, wrappers.PREDICT_NOISE, wrappers.APPLY_MODEL)
    assert {kind: len(found["safe_denoiser"]) for kind, found in patched.wrappers.items()} == dict.fromkeys(kinds, 1)


@pytest.mark.parametrize("node", ["Apply", "KSampler"])
def test_what_cannot_work_is_refused_at_once(node, run, tiny, sample_arguments, conditions):
    unwanted, neutral = conditions("SD 3")
    more = dict(model=tiny.model) if node == "Apply" else sample_arguments()
    for message, settings in (
            ("nothing says what must not come out; connect negation_bank", {}),
            ("nothing says what must not come out; connect negation_bank", dict(reference_bank=tiny.reference)),
            ("neutral is connected and unwanted is not", dict(negation_bank=tiny.bank, neutral=neutral)),
            *((f"method '{method}' steers by a negation bank, and none is connected", dict(method=method, unwanted=unwanted))
              for method in ("spell", "official", "official_sd3", "sgf"))):
        with pytest.raises(ValueError, match=message):
            run(node, **more, **settings)


def test_a_reference_bank_beside_the_condition_alone(run, tiny, sample, conditions):
    """It tells how unlike others the unwanted thing is; of another size it is refused."""
    from pack.safe_denoiser import Bank

    unwanted, _ = conditions("SD 3")
    alone, _ = sample.safe(dict(unwanted=unwanted))
    beside, report = sample.safe(dict(unwanted=unwanted, reference_bank=tiny.reference))
    assert not torch.equal(alone, beside) and report.summary["corrected_calls"] == 6 and report.pushed_most() == []
    with pytest.raises(ValueError, match="but the sampler runs at"):
        sample.safe(dict(unwanted=unwanted, reference_bank=Bank(torch.randn(9, 16, 8, 8))))


@pytest.fixture
def sample_arguments(sample):
    return sample.arguments


def test_weights_that_need_what_is_not_there(run, tiny, conditions):
    with pytest.raises(ValueError, match="weight 'witness' compares with the prediction under an unwanted condition, and none"):
        run("Apply", model=tiny.model, negation_bank=tiny.bank, weight="witness")
    with pytest.raises(ValueError, match="weight 'gate' steers by a negation bank, and none is connected"):
        run("Apply", model=tiny.model, unwanted=conditions("SD 3")[0], weight="gate")


def test_a_method_that_cannot_use_it_says_so(run, tiny, sample, conditions):
    banks = dict(negation_bank=tiny.bank)
    plain, _ = sample.safe(banks, dict(method="spell"))
    beside, report = sample.safe(banks | dict(unwanted=conditions("SD 3")[0]), dict(method="spell"))
    assert torch.equal(plain, beside)
    assert list(report.notes) == ["method spell does not know the unwanted condition, only safe_denoiser does"]


@pytest.mark.parametrize("banks", ["none", "negation", "all"])
def test_safe_ksampler_is_apply_and_ksampler(banks, run, tiny, sample, conditions):
    unwanted, neutral = conditions("SD 3")
    given = dict(unwanted=unwanted, neutral=neutral)
    given |= {} if banks == "none" else dict(negation_bank=tiny.bank)
    given |= dict(retain_bank=tiny.reference, reference_bank=tiny.reference) if banks == "all" else {}
    safe, report = sample.safe(given, batch=3)
    patched, _ = run("Apply", model=tiny.model, **given).result
    assert torch.equal(safe, sample.stock(model=patched, batch=3)) and report.summary["corrected_calls"] == 6
    assert not torch.equal(safe, sample.stock(batch=3)) and torch.isfinite(safe).all()


def test_patched_and_unpatched_in_turn_and_after_an_interrupt(run, tiny, sample, conditions):
    import comfy.model_management as management

    patched, report = run("Apply", model=tiny.model, unwanted=conditions("SD 3")[0]).result
    plain, safe = sample.stock(), sample.stock(model=patched)
    with pytest.raises(management.InterruptProcessingException):
        sample.stock(model=stopped(patched))
    for model, wanted in ((patched, safe), (tiny.model, plain), (tiny.model, plain), (patched, safe)):
        assert torch.equal(sample.stock(model=model), wanted)
    assert report.summary["corrected_calls"] == 6 and not torch.equal(plain, safe)


# --- several patches -----------------------------------------------------------------------------------------------

def test_two_apply_nodes_share_one_batch_and_add_up(models, tiny, run, conditions, heard, matrix):
    """Each corrects the same prediction by its own condition; the very same condition is evaluated once."""
    shape, prompts, *_ = setting("SD 3", models["SD 3"], tiny)
    pair = conditions("SD 3")

    def applied(*conditions, **settings):
        model = models["SD 3"]
        for condition in conditions:
            model, report = run("Apply", model=model, unwanted=condition, strength=0.5, **settings).result
        model, rows = counted(model)
        return *sample(guided("CFGGuider", model, prompts), shape), rows

    stock = sample(guided("CFGGuider", models["SD 3"], prompts), shape)[0][0]
    alone = [applied(condition)[0][0] for condition in pair]
    heard.clear()
    first, result, rows = applied(*pair)
    assert rows == [8] * 4 and len(heard) == 8
    other = applied(*pair[::-1])
    torch.testing.assert_close(other[1], result, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[0] - stock, alone[0] + alone[1] - 2 * stock, rtol=1e-4, atol=1e-4)
    heard.clear()
    assert applied(pair[0], pair[0])[2] == [6] * 4, "one evaluation for both"
    assert all(torch.equal(a.guides["unwanted"], b.guides["unwanted"]) for a, b in zip(heard[::2], heard[1::2]))
    matrix.name, matrix.outcome = "unwanted condition: two Apply nodes", "pass (SD 3, either order, one batch)"


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
def test_a_bank_and_a_condition_on_two_nodes(sampler, models, tiny, run, conditions):
    """Each as if it were alone, in either order: the one with the bank does not hear the condition of the other."""
    shape, prompts, negation, reference = setting("SD 3", models["SD 3"], tiny)
    inputs = (dict(negation_bank=negation, reference_bank=reference), dict(unwanted=conditions("SD 3")[0]))
    results = []
    for order in (inputs, inputs[::-1]):
        model = models["SD 3"]
        for one in order:
            model, _ = run("Apply", model=model, strength=0.5, **one).result
        results.append(sample(guided("CFGGuider", model, prompts), shape, sampler=sampler))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    stock = sample(guided("CFGGuider", models["SD 3"], prompts), shape)[0][0]
    alone = [sample(guided("CFGGuider", run("Apply", model=models["SD 3"], strength=0.5, **one).result[0], prompts), shape)[0][0]
             for one in inputs]
    if sampler == "euler":
        torch.testing.assert_close(results[0][0][0] - stock, alone[0] + alone[1] - 2 * stock, rtol=1e-4, atol=1e-4)


# --- neighbours ----------------------------------------------------------------------------------------------------

DEEP = {"context windows", "LoRA", "ModelSamplingSD3"}  # they change what the model itself predicts


@pytest.mark.parametrize("neighbour, batches", [
    ("PerturbedAttentionGuidance", [6, 2]), ("SelfAttentionGuidance", [6, 2]), ("SkipLayerGuidanceDiT", [6, 2]), ("RescaleCFG", [6]),
    ("TCFG", [6]), ("APG", [6]), ("FreSca", [6]), ("context windows", [3, 3]), ("LoRA", [6]), ("ModelSamplingSD3", [6])])
def test_neighbours(neighbour, batches, models, tiny, run, conditions, heard, matrix):
    """Their own questions to the model stay as they are; what changes the model changes what it predicts under the condition too."""
    name, changed = neighbours()[neighbour]
    shape, prompts, *_ = setting(name, models[name], tiny)
    unwanted = conditions(name)[0]
    for after in (False, True):
        heard.clear()
        model = models[name] if after else changed(models[name])
        patched, report = run("Apply", model=model, unwanted=unwanted).result
        patched, rows = counted(changed(patched) if after else patched)
        _, result = sample(guided("CFGGuider", patched, prompts), shape, steps=2)
        assert rows == batches * 2 and report.summary["corrected_calls"] == 2 and not report.notes
        agrees((changed if neighbour in DEEP else lambda model: model)(models[name]), heard, "unwanted", unwanted, shape)
        assert torch.isfinite(result).all()
    matrix.name, matrix.outcome = f"unwanted condition, neighbour: {neighbour}", f"pass ({name}, before and after)"


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize("neighbour", ["EasyCache", "LazyCache"])
def test_caches(neighbour, start, models, tiny, run, conditions, heard, matrix):
    """A call that skips the model goes on with the offset of the latest, as the cache does; each call is corrected all the same."""
    from pack.nodes.steering.separate_calls import MIXED, mixes

    name, changed = neighbours()[neighbour]
    shape, prompts, *_ = setting(name, models[name], tiny)
    for after in (False, True):
        heard.clear()
        model = models[name] if after else changed(models[name])
        patched, report = run("Apply", model=model, unwanted=conditions(name)[0], start=start).result
        patched, rows = counted(changed(patched) if after else patched)
        _, result = sample(guided("CFGGuider", patched, prompts), shape, steps=8)
        assert len(report.steps) == 8 and torch.isfinite(result).all()
        mixed = mixes(changed(model).model_options["transformer_options"]["easycache"])
        assert report.notes == ([MIXED] if mixed else [])
        assert not any(torch.equal(call.guides["unwanted"], call.guides["conditional"]) for call in heard if "unwanted" in call.guides)
        told = [call for call in heard if "conditional" in call.guides and bool(call.step.active.all())]
        assert len(told) == report.summary["corrected_calls"] == (8 if start == 0 else len(told)) > 0
        if neighbour == "LazyCache":
            assert len(rows) < 8, "the cache is at work"
            pairs = zip(told, told[1:])
            kept = [torch.allclose(a.guides["unwanted"] - a.x, b.guides["unwanted"] - b.x, atol=1e-5) for a, b in pairs]
            assert any(kept)
    matrix.name, matrix.outcome = f"unwanted condition, neighbour: {neighbour}", f"pass ({name}, before and after)"


@pytest.mark.parametrize("neighbour", ["EasyCache", "LazyCache"])
def test_a_cache_gives_the_prompt_its_own_prediction(neighbour, models, tiny, run, conditions):
    """At cfg 1 it holds one prompt. EasyCache of older ComfyUI would add to it what the unwanted condition changes in the same batch."""
    name, changed = neighbours()[neighbour]
    shape, prompts, *_ = setting(name, models[name], tiny)
    model = changed(models[name])
    stock = sample(guided("CFGGuider, cfg 1", model, prompts), shape, steps=8)[1]
    patched = run("Apply", model=model, unwanted=conditions(name)[0], strength=1e-6).result[0]
    torch.testing.assert_close(sample(guided("CFGGuider, cfg 1", patched, prompts), shape, steps=8)[1], stock, rtol=1e-4, atol=1e-4)


def hook(model, strength=0.3):
    import comfy.hooks

    return comfy.hooks.create_hook_model_as_lora({BIAS: model.model.state_dict()[BIAS] + bent(model, strength)}, None, 1.0, 0.0)


def hooked(condition, hooks):
    from comfy_extras.nodes_hooks import ConditioningSetProperties

    return ConditioningSetProperties().set_properties(condition, 1.0, "default", hooks=hooks)[0]


@pytest.mark.parametrize("prompt", ["plain", "hooked too"])
def test_a_lora_hook_on_the_condition(prompt, models, tiny, run, conditions, heard, matrix):
    """Other weights under this condition than under the prompts; what the core hears is what these weights predict."""
    model = models["SD 3"]
    shape, prompts, *_ = setting("SD 3", model, tiny)
    prompts = (hooked(prompts[0], hook(model, -0.5)), *prompts[1:]) if prompt == "hooked too" else prompts
    unwanted = conditions("SD 3")[0]
    condition = hooked(unwanted, hook(model))
    stock = sample(guided("CFGGuider", model, prompts), shape)[1]
    patched, report = run("Apply", model=model, unwanted=condition).result
    result = sample(guided("CFGGuider", patched, prompts), shape)[1]
    agrees(model, heard, "unwanted", condition, shape)
    agrees(model, heard, "conditional", prompts[0], shape)
    assert (heard[0].guides["unwanted"] - alone(model, unwanted, heard, shape)[0]).abs().max() > 1e-3, "the hook is at work"
    assert torch.equal(sample(guided("CFGGuider", model, prompts), shape)[1], stock), "nothing is left of it"
    assert torch.equal(sample(guided("CFGGuider", patched, prompts), shape)[1], result)
    off, _ = run("Apply", model=model, unwanted=condition, strength=0.0).result
    assert torch.equal(sample(guided("CFGGuider", off, prompts), shape)[1], stock)
    matrix.name, matrix.outcome = "unwanted condition: LoRA hook", "pass (SD 3)"


def test_a_scheduled_hook(models, tiny, run, conditions, heard):
    """Off at first, on from the middle of the schedule."""
    import comfy.hooks

    model, unwanted = models["SD 3"], conditions("SD 3")[0]
    shape, prompts, *_ = setting("SD 3", model, tiny)
    hooks, frames = hook(model), comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(frames)
    patched, _ = run("Apply", model=model, unwanted=hooked(unwanted, hooks)).result
    sample(guided("CFGGuider", patched, prompts), shape)
    plain = alone(model, unwanted, heard, shape)
    same = [torch.allclose(call.guides["unwanted"], y, atol=1e-5) for call, y in zip(heard, plain)]
    assert same[0] and not same[-1]


def control_net(value=0.5):
    """A ControlNet that adds a constant in the middle of the U-Net, and counts."""
    import comfy.controlnet

    class Constant(comfy.controlnet.ControlBase):
        def __init__(self):
            super().__init__()
            self.batches, self.cleaned, self.runs = [], 0, 0

        def pre_run(self, *args):
            super().pre_run(*args)
            self.runs += 1

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.batches.append((len(x_noisy), batched_number))
            return {"input": [], "output": [], "middle": [torch.full((len(x_noisy), 128, 4, 4), value)]}

        def cleanup(self):
            super().cleanup()
            self.cleaned += 1

    return Constant()


def controlled(condition, control):
    import node_helpers

    return node_helpers.conditioning_set_values(condition, {"control": control, "control_apply_to_uncond": False})


def test_a_controlnet_on_the_prompts_is_on_the_condition_too(models, tiny, run, conditions, heard, matrix):
    """Else the core would compare a picture under the ControlNet with one without it, in two model calls."""
    model, unwanted, control = models["SD 1.5"], conditions("SD 1.5")[0], control_net()
    shape, prompts, *_ = setting("SD 1.5", model, tiny)
    prompts = [controlled(prompt, control) for prompt in prompts]
    patched, rows = counted(run("Apply", model=model, unwanted=unwanted).result[0])
    sample(guided("CFGGuider", patched, prompts), shape, steps=2)
    assert rows == [6] * 2 and control.batches == [(6, 3)] * 2 and control.runs == 2 and control.cleaned == 1, "as without it"
    agrees(model, heard, "unwanted", controlled(unwanted, control_net()), shape)
    matrix.name, matrix.outcome = "unwanted condition: ControlNet", "pass (SD 1.5, a stand-in for its network)"


def test_a_controlnet_of_its_own(models, tiny, run, conditions, heard):
    model, own = models["SD 1.5"], control_net(-0.5)
    shape, prompts, *_ = setting("SD 1.5", model, tiny)
    condition = controlled(conditions("SD 1.5")[0], own)
    patched, rows = counted(run("Apply", model=model, unwanted=condition).result[0])
    sample(guided("CFGGuider", patched, [controlled(prompt, control_net()) for prompt in prompts]), shape, steps=2)
    assert own.batches == [(2, 1)] * 2 and own.runs == own.cleaned == 1
    agrees(model, heard, "unwanted", controlled(conditions("SD 1.5")[0], control_net(-0.5)), shape)


@pytest.mark.parametrize("whose", ["comfy_extras.nodes_own", "another pack"])
def test_patches_inside_the_model_take_it_for_the_positive_prompt(whose, models, tiny, run, conditions):
    """Image prompts and the like look up what to add by the place in the batch, and know two places; those of other packs one prompt."""
    shape, prompts, *_ = setting("SD 1.5", models["SD 1.5"], tiny)
    for kind, wanted in (("CFGGuider", [0, 0, 1]), ("CFGGuider, cfg 1", [0, 0]), ("DualCFGGuider nested", [0, 1, 2, 2])):
        seen, model = [], models["SD 1.5"].clone()

        def look(q, k, v, extra_options, seen=seen):
            seen.append(sorted(extra_options["cond_or_uncond"]))
            return q, k, v

        look.__module__ = whose
        model.set_model_attn2_patch(look)
        patched, _ = run("Apply", model=model, unwanted=conditions("SD 1.5")[0]).result
        sample(guided(kind, patched, prompts), shape, steps=1)
        if whose == "another pack":
            apart = [wanted[-1] if "nested" in kind else 0]
            assert apart in seen and sorted([*seen[0], *seen[-1]]) == wanted and all(one in (seen[0], apart) for one in seen)
        else:
            assert seen and all(one == wanted for one in seen)


# --- where and when it speaks --------------------------------------------------------------------------------------

def test_an_area_confines_the_correction(models, tiny, run, conditions, heard, comfy, matrix):
    """Outside its area ComfyUI's answer is zeros, which nobody may take for a prediction; and the prompts stay what they were."""
    shape, prompts, *_ = setting("SD 1.5", models["SD 1.5"], tiny)
    shape = (2, 4, 16, 16)
    unwanted = comfy.ConditioningSetArea().append(conditions("SD 1.5")[0], 64, 128, 0, 0, 1.0)[0]
    patched, report = run("Apply", model=models["SD 1.5"], unwanted=unwanted).result
    predictions, _ = sample(guided("CFGGuider", patched, prompts), shape, steps=2)
    left, right = (slice(None), slice(None), slice(None), slice(0, 8)), (slice(None), slice(None), slice(None), slice(8, 16))
    for call, used in zip(heard, predictions):
        assert torch.equal(used[right], call.denoised[right]) and not torch.equal(used[left], call.denoised[left])
        assert torch.isfinite(used).all() and call.mask[right].max() == 0 and call.mask[left].min() > 0
    agrees(models["SD 1.5"], heard, "conditional", prompts[0], shape)
    matrix.name, matrix.outcome = "unwanted condition: area, mask, range of steps", "pass (SD 1.5)"


def test_a_mask_confines_it_too(models, tiny, run, conditions, heard, comfy):
    shape, prompts, *_ = setting("SD 1.5", models["SD 1.5"], tiny)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    unwanted = comfy.ConditioningSetMask().append(conditions("SD 1.5")[0], mask, "default", 1.0)[0]
    patched, _ = run("Apply", model=models["SD 1.5"], unwanted=unwanted).result
    predictions, _ = sample(guided("CFGGuider", patched, prompts), shape, steps=2)
    for call, used in zip(heard, predictions):
        assert torch.equal(used[:, :, 4:], call.denoised[:, :, 4:]) and not torch.equal(used[:, :, :3], call.denoised[:, :, :3])


def test_an_area_of_the_prompt(models, tiny, run, conditions, heard, comfy):
    """As ComfyUI does for the negative prompt: the condition is evaluated in the prompt's area too, and speaks everywhere."""
    shape, prompts, *_ = setting("SD 1.5", models["SD 1.5"], tiny)
    shape = (2, 4, 16, 16)
    regional = prompts[0] + comfy.ConditioningSetArea().append(prompts[2], 64, 128, 0, 0, 1.0)[0]
    patched, report = run("Apply", model=models["SD 1.5"], unwanted=conditions("SD 1.5")[0]).result
    _, result = sample(guided("CFGGuider", patched, (regional, *prompts[1:])), shape, steps=2)
    assert all(call.mask is None for call in heard) and report.summary["corrected_calls"] == 2 and torch.isfinite(result).all()
    agrees(models["SD 1.5"], heard, "conditional", regional, shape)


@pytest.mark.parametrize("bank", [False, True])
def test_a_range_of_steps(bank, models, tiny, run, conditions, heard, comfy):
    """Outside its range it is not asked, and the bank, if there is one, works alone."""
    shape, prompts, negation, _ = setting("SD 3", models["SD 3"], tiny)
    unwanted = comfy.ConditioningSetTimestepRange().set_range(conditions("SD 3")[0], 0.4, 1.0)[0]
    banks = dict(negation_bank=negation) if bank else {}
    patched, report = run("Apply", model=models["SD 3"], unwanted=unwanted, **banks).result
    patched, rows = counted(patched)
    predictions, _ = sample(guided("CFGGuider", patched, prompts), shape, steps=8)
    on = [rows == 6 for rows in rows]
    assert 0 < sum(on) < 8 and set(rows) == {4, 6} and not report.notes and len(report.steps) == 8
    for asked, call, used, step in zip(on, heard, predictions, report.steps):
        assert torch.equal(used, call.denoised) == (not asked and not bank)
        assert bool(step.active.all()) == (asked or bank)
        assert asked == (step.active.all().item() and "unwanted" in call.guides)


# --- image to image, inpainting, video -----------------------------------------------------------------------------

@pytest.mark.parametrize("differential", [False, True])
def test_inpainting(differential, comfy, run, tiny, sample, conditions):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    mask = torch.linspace(0.05, 0.95, 32).expand(1, 1, 32, 32) if differential else mask
    latent = comfy.SetLatentNoiseMask().set_mask({"samples": tiny.bank.latents[5:6].repeat(2, 1, 1, 1)}, mask)[0]
    model = DifferentialDiffusion.execute(tiny.model).args[0] if differential else tiny.model
    stock = sample.stock(latent=latent, model=model)
    safe, report = sample.safe(dict(unwanted=conditions("SD 3")[0]), latent=latent, model=model)
    assert report.summary["corrected_calls"] == 6 and not report.summary["fallbacks"] and torch.isfinite(safe).all()
    assert not torch.equal(safe, stock)
    if not differential:
        torch.testing.assert_close(safe[..., 2:], latent["samples"][..., 2:], rtol=1e-4, atol=1e-4)


def test_an_inpainting_model_sees_the_same_picture_under_each_condition(tiny, run, heard, comfy):
    """The picture to fill is given with the prompts alone; without it the condition would speak of another one."""
    import node_helpers
    from comfy.samplers import calculate_sigmas, sampler_object

    model, family = build(FAMILIES["SD 1.5 inpainting model"]), FAMILIES["SD 1.5 inpainting model"]
    draw = torch.Generator().manual_seed(4)
    given = {"concat_latent_image": torch.randn(1, 4, 8, 8, generator=draw), "concat_mask": torch.ones(1, 1, 8, 8)}
    prompts = [node_helpers.conditioning_set_values(conditioning(family, seed), given) for seed in (1, 2, 3)]
    unwanted = conditioning(family, 7)
    patched, _ = run("Apply", model=model, unwanted=unwanted).result
    noise, sigmas = torch.randn(2, 4, 8, 8, generator=draw), calculate_sigmas(model.model.model_sampling, "simple", 1)
    with torch.inference_mode():
        guided("CFGGuider", patched, prompts).sample(noise, torch.zeros_like(noise), sampler_object("euler"), sigmas, disable_pbar=True)
    agrees(model, heard, "unwanted", node_helpers.conditioning_set_values(unwanted, given), (2, 4, 8, 8))


def test_image_to_image_and_a_batch(tiny, sample, conditions):
    choices = dict(latent={"samples": tiny.bank.latents[5:6].repeat(3, 1, 1, 1), "batch_index": [0, 1, 2]}, denoise=0.5)
    banks = dict(unwanted=conditions("SD 3")[0])
    batch, report = sample.safe(banks, **choices)
    assert report.summary["corrected_calls"] == 6 and not torch.equal(batch, sample.stock(**choices))
    for i in range(3):
        one, _ = sample.safe(banks, **(choices | dict(latent={"samples": tiny.bank.latents[5:6], "batch_index": [i]})))
        torch.testing.assert_close(one, batch[i:i + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bank", [False, True])
def test_video(bank, models, tiny, run, conditions, heard, matrix):
    shape, prompts, negation, _ = setting("Wan 2.1", models["Wan 2.1"], tiny)
    unwanted = conditions("Wan 2.1")[0]
    banks = dict(negation_bank=negation) if bank else {}
    patched, report = run("Apply", model=models["Wan 2.1"], unwanted=unwanted, end=0.9, **banks).result
    patched, rows = counted(patched)
    _, result = sample(guided("CFGGuider", patched, prompts), shape)
    assert set(rows) <= {2, 3} and rows[0] == 3 and torch.isfinite(result).all() and report.values["active"].shape == (4, 6 if bank else 1)
    agrees(models["Wan 2.1"], [call for call, count in zip(heard, rows) if count == 3], "unwanted", unwanted, shape)
    matrix.name, matrix.outcome = "unwanted condition: video", "pass (Wan 2.1, with and without a bank of pictures)"


# --- where it cannot be heard --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bank", [False, True])
def test_a_guider_that_asks_its_own_way_gets_a_note(bank, models, tiny, run, conditions):
    """No zeros and no crash: the bank works alone, and without one nothing is corrected."""
    model = models["SD 3"].clone()
    model.set_model_sampler_calc_cond_batch_function(lambda args: [torch.full_like(args["input"], value) for value in (0.7, -0.4)])
    shape, prompts, negation, _ = setting("SD 3", model, tiny)
    banks = dict(negation_bank=negation) if bank else {}
    patched, report = run("Apply", model=model, unwanted=conditions("SD 3")[0], **banks).result
    result = sample(guided("CFGGuider", patched, prompts), shape)[1]
    assert ["was not evaluated in some model calls" in note for note in report.notes] == [True]
    plain = run("Apply", model=model, **banks).result[0] if bank else model
    assert torch.equal(result, sample(guided("CFGGuider", plain, prompts), shape)[1])


def test_models_that_are_loaded_in_pieces_are_not_where_hooks_change_them(tiny, models, conditions, comfy, monkeypatch):
    """Newer ComfyUI loads weights in pieces, which no hook can change, and has another model for hooks."""
    import comfy.sampler_helpers as helpers
    from pack.nodes.steering.conditions import hookable

    monkeypatch.setattr(helpers, "cond_has_hooks", lambda condition: any("hooks" in one[1] for one in condition), raising=False)
    model = tiny.model.clone()
    model.is_dynamic, model.get_non_dynamic_delegate = (lambda: True), (lambda: "delegate")
    unwanted = conditions("SD 3")[0]
    assert hookable(model, [unwanted]) != "delegate" and hookable(model, [hooked(unwanted, hook(model))]) == "delegate"


def test_a_lora_in_front(models, tiny, run, conditions, heard):
    changed = lora(models["SD 3"], 0.2)
    shape, prompts, *_ = setting("SD 3", changed, tiny)
    unwanted = conditions("SD 3")[0]
    sample(guided("CFGGuider", run("Apply", model=changed, unwanted=unwanted).result[0], prompts), shape)
    agrees(changed, heard, "unwanted", unwanted, shape)
