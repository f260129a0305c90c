"""Guiders of other packs' kinds: each is steered, or says loudly that it is not."""
import logging

import pytest
import torch
from test_runs import guider, sample

LOUD = "NOTHING WAS STEERED"


def kinds():
    """Name: (class of the guider, whether it can be steered). Each does stock guidance in its own way."""
    import comfy.model_patcher
    import comfy.patcher_extension
    import comfy.sampler_helpers
    import comfy.samplers
    from comfy.samplers import CFGGuider, calc_cond_batch, cfg_function, process_conds, sampling_function

    class Call(CFGGuider):  # as ComfyUI-NAG's
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    class CallWithoutBase(CFGGuider):
        def __call__(self, x, timestep, model_options=None, seed=None):
            return sampling_function(self.inner_model, x, timestep, self.conds["negative"], self.conds["positive"], self.cfg, model_options)

    class CallForgetsOptions(CFGGuider):  # and what is in them: the wrappers of the model, too
        def __call__(self, x, timestep, model_options=None, seed=None):
            return self.outer_predict_noise(x, timestep, self.model_options, seed)

    class Outer(CFGGuider):
        def outer_predict_noise(self, x, timestep, model_options=None, seed=None):
            return self.predict_noise(x, timestep, model_options, seed)

    class OwnGuidance(CFGGuider):
        def __call__(self, x, timestep, model_options=None, seed=None):
            c, u = calc_cond_batch(self.inner_model, [self.conds["positive"], self.conds["negative"]], x, timestep, model_options)
            return u + self.cfg * (c - u)

    class OneByOne(CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = self.conds["positive"], self.conds["negative"]
            c, u = (calc_cond_batch(self.inner_model, [one], x, timestep, model_options)[0] for one in conds)
            return cfg_function(self.inner_model, c, u, self.cfg, x, timestep, model_options, *conds)

    class NoOuter(CFGGuider):  # no OUTER_SAMPLE
        def sample(self, noise, latent_image, sampler, sigmas, *rest, **more):
            self.model_options = comfy.model_patcher.create_model_options_clone(self.model_options)
            self.conds = {name: [one.copy() for one in conds] for name, conds in self.original_conds.items()}
            comfy.sampler_helpers.prepare_model_patcher(self.model_patcher, self.conds, self.model_options)
            return self.outer_sample(noise, latent_image, sampler, sigmas, seed=4)

    class NoOuterAndCall(NoOuter, Call):
        pass

    class NoSampler(CFGGuider):  # no SAMPLER_SAMPLE
        def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, *rest, **more):
            self.conds = process_conds(self.inner_model, noise, self.conds, device, latent_image, denoise_mask, seed)
            options = comfy.model_patcher.create_model_options_clone(self.model_options)
            options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
            extra = {"model_options": options, "seed": seed}
            samples = sampler.sample(self, sigmas, extra, callback, noise, latent_image, denoise_mask, True)
            return self.inner_model.process_latent_out(samples)

    class NoSamplerAndCall(NoSampler, Call):
        pass

    class NeitherAndCall(NoSampler, NoOuter, Call):
        pass

    class HandsOn(CFGGuider):  # another object to the sampler
        def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, *rest, **more):
            self.conds = process_conds(self.inner_model, noise, self.conds, device, latent_image, denoise_mask, seed)
            options = comfy.model_patcher.create_model_options_clone(self.model_options)
            options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
            kind, call = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, Handed(self)
            found = comfy.patcher_extension.get_all_wrappers(kind, options, is_model_options=True)
            executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(sampler.sample, sampler, found)
            extra = {"model_options": options, "seed": seed}
            samples = executor.execute(call, sigmas, extra, callback, noise, latent_image, denoise_mask, True)
            return self.inner_model.process_latent_out(samples)

    class Handed:
        def __init__(self, guider):
            self.__dict__ |= {name: getattr(guider, name) for name in ("inner_model", "model_patcher", "model_options", "conds", "cfg")}
            self.guider = guider

        def __call__(self, *args, **kwargs):
            return self.guider.predict_noise(*args, **kwargs)

    class Slots(CFGGuider):  # whose class cannot be changed
        __slots__ = ("more",)

        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    class SlotsOnly(CFGGuider):
        __slots__ = ("more",)

    class Network(CFGGuider):  # asks the network itself, past all wrappers
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            given = {name: one.cond for name, one in self.conds["positive"][0]["model_conds"].items()}
            return self.inner_model.apply_model(x, timestep, **given)

    class NetworkAlone(NoSampler, NoOuter):
        __call__ = Network.predict_noise

    class Denoised(CFGGuider):  # changes what it was given once more
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs).clone().mul_(1.0)

    class Metaclassed(CFGGuider, metaclass=type("Meta", (type,), {})):
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    class Other(CFGGuider):  # conditions by names of its own
        def set_conds(self, positive, negative):
            self.inner_set_conds({"xt_positive": positive, "xt_negative": negative})

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            negative, positive = self.conds.get("xt_negative"), self.conds.get("xt_positive")
            return sampling_function(self.inner_model, x, timestep, negative, positive, self.cfg, model_options, seed)

    class Uncond(Other):
        def set_conds(self, positive, negative):
            self.inner_set_conds({"positive": positive, "uncond": negative})

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            uncond, positive = self.conds["uncond"], self.conds["positive"]
            return sampling_function(self.inner_model, x, timestep, uncond, positive, self.cfg, model_options, seed)

    class Backwards(Other):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            negative, positive = self.conds["xt_negative"], self.conds["xt_positive"]
            u, c = calc_cond_batch(self.inner_model, [negative, positive], x, timestep, model_options)
            return cfg_function(self.inner_model, c, u, self.cfg, x, timestep, model_options, positive, negative)

    return {name: one for name, one in locals().items() if isinstance(one, type) and issubclass(one, CFGGuider)} | {"Stock": CFGGuider}


ODD = ["Call", "CallWithoutBase", "CallForgetsOptions", "Outer", "OwnGuidance", "OneByOne", "NoOuter", "NoOuterAndCall", "NoSampler",
       "NoSamplerAndCall", "NeitherAndCall", "HandsOn", "Slots", "SlotsOnly", "Network", "NetworkAlone", "Denoised", "Metaclassed", "Other",
       "Uncond", "Backwards"]
UNSTEERED = {"NeitherAndCall", "NetworkAlone"}  # nothing of theirs is seen before the network is asked


@pytest.fixture(scope="module")
def prompts(run):
    return [run("ClassCondition", class_index=i).result[0] for i in (10, -1)]


@pytest.fixture(scope="module")
def banks(tiny):
    return dict(negation_bank=tiny.bank, reference_bank=tiny.reference)


@pytest.mark.parametrize("kind", ODD)
def test_each_guider_is_steered_or_says_loudly_that_it_is_not(kind, run, tiny, prompts, banks, caplog, told):
    made = kinds()[kind]
    stock = sample(guider(tiny.model, prompts, kind=made))
    off, _ = run("Apply", model=tiny.model, **banks, strength=0.0).result
    assert torch.equal(sample(guider(off, prompts, kind=made)), stock) and set(told) <= {"off: strength is 0"}
    told.clear()
    patched, report = run("Apply", model=tiny.model, **banks).result
    of = guider(patched, prompts, kind=made)
    with caplog.at_level(logging.ERROR):
        found = sample(of)
    assert type(of) is made
    loud = [LOUD in report.table(), any(LOUD in record.getMessage() for record in caplog.records), any(LOUD in text for text in told)]
    if kind in UNSTEERED:
        assert torch.equal(found, stock) and loud == [True] * 3 and not any("strength is 0" in text for text in told)
    else:
        assert loud == [False] * 3 and len(report.steps) == report.summary["corrected_calls"] == 6 and not torch.equal(found, stock)
        assert told and "pictures steered away" in told[-1]


def test_a_steered_guider_is_corrected_once(run, tiny, prompts, banks):
    """The same picture whichever way the guider is called."""
    patched, _ = run("Apply", model=run("Apply", model=tiny.model, **banks, strength=0.5).result[0], **banks, strength=0.5).result
    wanted = sample(guider(patched, prompts))
    for kind in ("Call", "CallWithoutBase", "Outer", "NoSamplerAndCall", "HandsOn", "Metaclassed", "Denoised"):
        torch.testing.assert_close(sample(guider(patched, prompts, kind=kinds()[kind])), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_to_do_is_not_loud(run, tiny, prompts, banks, told):
    """Strength 0, a window that is never open, and no step at all."""
    for settings, sigmas in ((dict(strength=0.0), None), (dict(start=0.5, end=0.5), None), (dict(), torch.tensor([1.0]))):
        patched, report = run("Apply", model=tiny.model, **banks, **settings).result
        sample(guider(patched, prompts, kind=kinds()["Call"]), sigmas=sigmas)
        assert LOUD not in report.table() and not any(LOUD in text for text in told)


def test_a_sampler_that_asks_past_the_guider_is_loud(run, tiny, prompts, banks, told, caplog):
    class Past:
        def sample(self, guider, sigmas, extra_args, callback, noise, *rest):
            return guider.predict_noise(noise, sigmas[:1].expand(len(noise)), **extra_args)

    patched, report = run("Apply", model=tiny.model, **banks).result
    sample(guider(patched, prompts), Past())
    assert LOUD in report.table() and LOUD in told[-1] and LOUD in caplog.text
    sample(guider(patched, prompts))
    assert LOUD not in report.table() and report.summary["corrected_calls"] == 6, "and the next run is its own"


@pytest.fixture
def told(pack, monkeypatch):
    """Texts that were sent to the node."""
    from pack.nodes.progress import Live

    texts = []
    monkeypatch.setattr(Live, "send", lambda self, text: texts.append(text))
    return texts


@pytest.mark.parametrize("kind", ["Other", "Uncond", "Backwards"])
@pytest.mark.parametrize("by", ["unwanted", "bank", "guard"])
def test_conditions_are_told_by_what_guidance_takes_them_for(kind, by, run, tiny, prompts, banks):
    """Whatever their names: the same picture as with ComfyUI's."""
    unwanted = run("ClassCondition", class_index=7).result[0]
    patched, report = {"unwanted": lambda: run("Apply", model=tiny.model, unwanted=unwanted).result,
                       "bank": lambda: run("Apply", model=tiny.model, negation_bank=tiny.bank).result,
                       "guard": lambda: run("GuardModel", model=tiny.model, unwanted=unwanted, preset="max").result}[by]()
    wanted = sample(guider(patched, prompts))
    told = report.table()
    torch.testing.assert_close(sample(guider(patched, prompts, kind=kinds()[kind])), wanted, rtol=1e-4, atol=1e-4)
    assert report.table().splitlines()[:2] == told.splitlines()[:2] and not report.notes
    assert not torch.allclose(wanted, sample(guider(tiny.model, prompts)), atol=1e-2)
