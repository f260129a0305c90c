"""Neighbours as other packs' users have them, in a few lines each: what the core hears is the model's own, whatever they do beside it."""
import threading
from collections import defaultdict

import pytest
import torch
from test_conditions import agrees, conditions, counted, heard, models  # noqa: F401 fixtures
from test_guiders import guided, sample, setting

BANKS = {"unwanted": ["unwanted"], "bank": ["bank"], "both": ["unwanted", "bank"]}


@pytest.fixture
def applied(run, models, tiny, conditions):  # noqa: F811
    """A patched model of SD 3's architecture, its report and prompts, with a neighbour before or after our node."""
    def call(by, neighbour, after=False, **settings):
        shape, prompts, negation, _ = setting("SD 3", models["SD 3"], tiny)
        given = {"unwanted": dict(unwanted=conditions("SD 3")[0]), "bank": dict(negation_bank=negation)}
        chosen = {key: value for name in BANKS[by] for key, value in given[name].items()}
        model = models["SD 3"]
        patched, report = run("Apply", model=model if after else neighbour(model), **chosen, **settings).result
        return neighbour(patched) if after else patched, report, shape, prompts

    return call


# --- predictions that are changed before or in guidance, in place ---------------------------------------------------

def skimmed(model):
    """As Skimmed CFG: both predictions are changed before guidance, in place."""
    def skim(args):
        c, u = args["conds_out"]
        u.lerp_(c, 0.8)
        c.mul_(1.1)
        return [c, u]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(skim)
    return model


def own_guidance(model):
    """A guidance function that uses its arguments up."""
    model = model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["input"] - args["uncond_denoised"].lerp_(args["cond_denoised"].mul_(0.9), 2.0))
    return model


def afterwards(model):
    def after(args):
        args["cond_denoised"].zero_()
        args["uncond_denoised"].fill_(3.0)
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(after)
    return model


@pytest.mark.parametrize("kind", ["CFGGuider", "DualCFGGuider regular"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("by", BANKS)
@pytest.mark.parametrize("neighbour", [skimmed, own_guidance, afterwards])
def test_predictions_that_are_edited_in_place(neighbour, by, after, kind, applied, models, heard):  # noqa: F811
    patched, report, shape, prompts = applied(by, neighbour, after)
    sample(guided(kind, patched, prompts), shape)
    assert report.summary["corrected_calls"] == 4 and not report.notes
    told = prompts[1] if by == "bank" and kind != "CFGGuider" else prompts[0]  # guidance of two prompts starts from the second
    agrees(models["SD 3"], heard, "conditional", told, shape)
    agrees(models["SD 3"], heard, "unconditional", prompts[2] if kind != "CFGGuider" else prompts[1], shape)


def remembering(model):
    """As MomentumGuidance and sliding-mode CFG: what the latest call was is kept in the options, which last for the run."""
    def after(args):
        before = args["model_options"].setdefault("momentum", {"of": args["denoised"], "calls": []})
        before["calls"].append(1)
        args["model_options"]["latest"] = args["denoised"]
        moved = args["denoised"] + 0.3 * (args["denoised"] - before["of"])
        before["of"] = args["denoised"]
        return moved

    model = model.clone()
    model.set_model_sampler_post_cfg_function(after)
    return model


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("by", BANKS)
def test_what_neighbours_keep_from_call_to_call_is_kept(by, after, applied, models):  # noqa: F811
    off, _, shape, prompts = applied(by, remembering, after, strength=0.0)
    stock = sample(guided("CFGGuider", remembering(models["SD 3"]), prompts), shape)[1]
    assert not torch.equal(stock, sample(guided("CFGGuider", models["SD 3"], prompts), shape)[1])
    assert torch.equal(sample(guided("CFGGuider", off, prompts), shape)[1], stock)
    closed, report, *_ = applied(by, remembering, after, start=0.9)
    assert torch.equal(sample(guided("CFGGuider", closed, prompts), shape)[1], stock) and report.summary["model_calls"] == 4


# --- neighbours inside the model, which know two conditions, or keep what they cache by place in the batch -----------

def cached_on_the_network(model, every=2):
    """As TeaCache: each other call is skipped, with what the latest left on the network for the same place in the batch."""
    model, network = model.clone(), model.model.diffusion_model

    def wrapper(apply_model, args):
        if not hasattr(network, "tea"):
            network.tea = {place: {"calls": 0, "residual": None} for place in (0, 1)}
        x, parts = args["input"], []
        out = None
        for k, place in enumerate(args["cond_or_uncond"]):
            size = len(x) // len(args["cond_or_uncond"])
            state, rows = network.tea[place], slice(k * size, (k + 1) * size)
            if state["calls"] % every == 0:
                out = apply_model(x, args["timestep"], **args["c"]) if out is None else out
                state["residual"] = out[rows] - x[rows]
            state["calls"] += 1
            parts.append(x[rows] + state["residual"])
        return torch.cat(parts)

    model.set_model_unet_function_wrapper(wrapper)
    return model


def cached_in_options(model):
    """The same, kept in the options of the run."""
    model, found = cached_on_the_network(model), model.model.diffusion_model
    inner = model.model_options["model_function_wrapper"]

    def wrapper(apply_model, args):
        found.tea = args["c"]["transformer_options"]["tea"]
        try:
            return inner(apply_model, args)
        finally:
            del found.tea

    model.model_options["transformer_options"]["tea"] = {place: {"calls": 0, "residual": None} for place in (0, 1)}
    model.set_model_unet_function_wrapper(wrapper)
    return model


def cached_in_a_function(model):
    """The same, kept where nobody but its function can reach it."""
    model, kept = model.clone(), {}

    def wrapper(apply_model, args):
        x, places = args["input"], args["cond_or_uncond"]
        if not all(kept.get(place, [0])[0] % 2 for place in places):
            out = apply_model(x, args["timestep"], **args["c"])
            kept.update({place: [0, change] for place, change in zip(places, (out - x).chunk(len(places)))})
        for place in places:
            kept[place][0] += 1
        return x + torch.cat([kept[place][1] for place in places])

    model.set_model_unet_function_wrapper(wrapper)
    return model


def two_places(model):
    """As InstantX's IP-Adapter: something of its own for the prompt and for the negative prompt."""
    model, shifts = model.clone(), [0.02, -0.02]

    def wrapper(apply_model, args):
        shift = torch.tensor([shifts[place] for place in args["cond_or_uncond"]]).repeat_interleave(
            len(args["input"]) // len(args["cond_or_uncond"])).view(-1, 1, 1, 1)
        return apply_model(args["input"], args["timestep"], **args["c"]) + shift

    model.set_model_unet_function_wrapper(wrapper)
    return model


def one_prompt(model):
    """As AttentionCouple: takes what the prompt's rows are for one group."""
    model = model.clone()

    def patch(executor, x, *args, **kwargs):
        places = kwargs["transformer_options"]["cond_or_uncond"]
        assert places.count(0) <= 1 and set(places) <= {0, 1}, places
        return executor(x, *args, **kwargs)

    import comfy.patcher_extension
    model.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, patch)
    return model


@pytest.fixture
def one_at_a_time(monkeypatch):
    """ComfyUI on a machine with little memory: one condition per call."""
    import comfy.samplers

    def low(on):
        if on:
            monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda one, other: one is other)
    return low


@pytest.fixture(autouse=True)
def clean(models):  # noqa: F811
    yield
    models["SD 3"].model.diffusion_model.__dict__.pop("tea", None)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("neighbour", [cached_on_the_network, cached_in_options, two_places, one_prompt])
def test_neighbours_inside_the_model(neighbour, after, low, applied, models, conditions, heard, tiny, one_at_a_time, run):  # noqa: F811
    """Their own predictions stay what they were, and ours is the model's under this condition, as the neighbour makes it of a prompt."""
    one_at_a_time(low)
    patched, report, shape, prompts = applied("unwanted", neighbour, after)
    for _ in range(2):
        heard.clear()
        models["SD 3"].model.diffusion_model.__dict__.pop("tea", None)
        result = sample(guided("CFGGuider", patched, prompts), shape)[1]
        assert report.summary["corrected_calls"] == 4 and report.summary["correction"] > 1e-3 and torch.isfinite(result).all()
        assert [note.startswith("another pack patches the network") for note in report.notes] == [True]
        told = [call.guides for call in heard]
        assert all(set(one) == {"unwanted", "conditional", "unconditional"} for one in told)
        apart = [float((one["unwanted"] - one["conditional"]).norm()) for one in told]
        assert min(apart) > 0.05, "E_n is not E_c, in no call"
        fresh = [call for call in heard[::2 if "cached" in neighbour.__name__ else 1]]
        models["SD 3"].model.diffusion_model.__dict__.pop("tea", None)
        if neighbour is two_places:
            agrees(neighbour(models["SD 3"]), fresh, "unwanted", conditions("SD 3")[0], shape)
        else:
            agrees(models["SD 3"], fresh, "unwanted", conditions("SD 3")[0], shape)
            agrees(models["SD 3"], fresh, "conditional", prompts[0], shape)
    models["SD 3"].model.diffusion_model.__dict__.pop("tea", None)
    off, _ = run("Apply", model=neighbour(models["SD 3"]), unwanted=conditions("SD 3")[0], strength=0.0).result
    stock = sample(guided("CFGGuider", neighbour(models["SD 3"]), prompts), shape)[1]
    models["SD 3"].model.diffusion_model.__dict__.pop("tea", None)
    assert torch.equal(sample(guided("CFGGuider", off, prompts), shape)[1], stock)


def test_a_cache_out_of_reach_that_gives_the_prompts_prediction_is_named(applied, models):  # noqa: F811
    patched, report, shape, prompts = applied("unwanted", cached_in_a_function, False)
    sample(guided("CFGGuider", patched, prompts), shape)
    assert any("in 4 of 4 model calls the prediction under the unwanted condition was that of the prompt" in note for note in report.notes)
    patched, report, *_ = applied("unwanted", two_places, False)
    sample(guided("CFGGuider", patched, prompts), shape)
    assert not any("bit for bit" in note for note in report.notes)


@pytest.mark.parametrize("neighbour", [cached_on_the_network, cached_in_options, two_places, one_prompt])
def test_a_window_that_closes_while_a_neighbour_caches(neighbour, applied, heard):  # noqa: F811
    patched, report, shape, prompts = applied("both", neighbour, start=0.2, end=0.6)
    patched, rows = counted(patched)
    result = sample(guided("CFGGuider", patched, prompts), shape, steps=8)[1]
    assert 0 < report.summary["corrected_calls"] < 8 and torch.isfinite(result).all() and len(rows) >= 4


# --- what neighbours change between calls, and for one call ----------------------------------------------------------

class Whole:
    """As AnimateDiff-Evolved's state: its parts hold it, it has a lock, it knows the step, and it is used while the network is asked."""

    def __init__(self):
        self.part, self.lock, self.step, self.calls = defaultdict(list, whole=self), threading.Lock(), 0, 0


def knows_the_step(model):
    import comfy.patcher_extension

    def begin(executor, *args, **kwargs):
        executor.class_obj.model_options["transformer_options"]["whole"] = Whole()
        return executor(*args, **kwargs)

    def between(executor, x, timestep, model_options, *args, **kwargs):
        model_options["transformer_options"]["whole"].step += 1
        return executor(x, timestep, model_options, *args, **kwargs)

    def inside(apply_model, args):
        whole = args["c"]["transformer_options"]["whole"].part["whole"]
        whole.calls += 1
        whole.part["seen"].append(whole.step)
        return apply_model(args["input"], args["timestep"], **args["c"]) + 0.1 * whole.step + 0.001 * whole.calls

    model = model.clone()
    model.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, begin)
    model.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, between)
    model.set_model_unet_function_wrapper(inside)
    return model


def own_batch(model):
    """A guider whose guidance is as that of smZNodes' AND: a function of one call takes its batch's answer to pieces, functions before
    guidance see a row for each part of the prompt, and where functions follow guidance it rounds otherwise.
    """
    from comfy.samplers import CFGGuider, calc_cond_batch, cfg_function

    class OwnBatch(CFGGuider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            def take(apply_model, args):
                assert set(args["cond_or_uncond"]) == {0, 1}, args["cond_or_uncond"]
                return apply_model(args["input"], args["timestep"], **args["c"])

            conds = self.conds["positive"], self.conds["negative"]
            c, u = calc_cond_batch(self.inner_model, conds, x, timestep, {**model_options, "model_function_wrapper": take})
            for function in model_options.get("sampler_pre_cfg_function", []):
                function({"conds": conds, "conds_out": [torch.cat([c - 1, c + 1]), u], "cond_scale": self.cfg, "timestep": timestep,
                          "input": x, "sigma": timestep, "model": self.inner_model, "model_options": model_options})
            rounded = 1e-3 if model_options.get("sampler_post_cfg_function") else 0.0
            return cfg_function(self.inner_model, c, u, self.cfg, x, timestep, model_options, *conds) + rounded

    return OwnBatch(model)


def named(kind, model, prompts):
    if kind != "own batch":
        return guided("CFGGuider", model, prompts)
    guider = own_batch(model)
    guider.set_conds(*prompts[:2])
    guider.set_cfg(3.0)
    return guider


@pytest.mark.parametrize("by", BANKS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["whole", "own batch"])
def test_what_neighbours_change_between_calls_and_for_one(kind, after, by, applied, models, conditions, heard):  # noqa: F811
    """Our condition as the prompt itself: what the model predicts under it is what it predicts under the prompt, in every call."""
    neighbour = knows_the_step if kind == "whole" else lambda model: model.clone()
    off, _, shape, prompts = applied(by, neighbour, after, strength=0.0)
    stock = sample(named(kind, neighbour(models["SD 3"]), prompts), shape)[1]
    assert torch.equal(sample(named(kind, off, prompts), shape)[1], stock)
    patched, report, *_ = applied(by, neighbour, after)
    result = sample(named(kind, patched, (conditions("SD 3")[0], *prompts[1:])), shape)[1]
    assert report.summary["corrected_calls"] == len(heard) == 4 and torch.isfinite(result).all()
    assert sum(note.startswith("another pack patches the network") for note in report.notes) == (by != "bank")
    assert all(call.guides["conditional"].shape == call.x.shape for call in heard)
    for call in heard if by != "bank" else ():
        torch.testing.assert_close(call.guides["unwanted"], call.guides["conditional"], rtol=1e-5, atol=1e-4)
