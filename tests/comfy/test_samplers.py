"""Every sampler: all of its model calls are seen, and each correction weighs what it weighs in the plain sampler."""
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, build, conditioning

from tests.conftest import COMFYUI

SAMPLERS = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast",
    "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm",
    "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
    "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc",
    "uni_pc_bh2", "exp_heun_2_x0", "exp_heun_2_x0_sde",
]
if COMFYUI:  # not every release has all of them
    known = (Path(COMFYUI) / "comfy/samplers.py").read_text(encoding="utf-8")
    SAMPLERS = [name for name in SAMPLERS if f'"{name}"' in known]
CFG_PP = [name for name in SAMPLERS if name.endswith("_cfg_pp")]
START, END = 0.1, 0.9


def test_no_sampler_is_missing(comfy):
    import comfy.samplers

    assert set(comfy.samplers.KSampler.SAMPLERS) == set(SAMPLERS)


def counting(model):
    """A clone whose every model call leaves its sigma, seen from outside of the patch."""
    import comfy.patcher_extension

    calls, model = [], model.clone()

    def count(executor, x, timestep, *args, **kwargs):
        calls.append(float(timestep[0]))
        return executor(x, timestep, *args, **kwargs)

    model.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, count)
    return model, calls


@pytest.mark.parametrize("by", ["banks", "unwanted condition"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_model_call_in_the_window_is_corrected(sampler, by, tiny, sample, run, matrix):
    matrix.name, counts = f"sampler: {sampler}, by {by}", []
    given = None if by == "banks" else dict(unwanted=run("ClassCondition", class_index=7).result[0])
    for scheduler in ("simple", "karras", "beta"):
        choices = dict(sampler_name=sampler, scheduler=scheduler, steps=5, batch=1)
        model, calls = counting(tiny.model)
        safe, report = sample.safe(given, dict(start=START, end=END), model=model, **choices)
        shift = [3 * t / (1 + 2 * t) for t in (1 - START, 1 - END)]  # the schedule of the tiny model, an SD 3
        inside = sum(shift[1] < sigma <= shift[0] for sigma in calls)
        assert torch.isfinite(safe).all() and not report.summary["fallbacks"]
        assert report.summary["model_calls"] == len(calls) and report.summary["corrected_calls"] == inside > 0
        counts.append(f"{inside} of {len(calls)}")
        assert np.isfinite(report.heard).any() == (by == "unwanted condition") and not report.notes
    assert torch.equal(sample.safe(given, dict(strength=0.0), **choices)[0], sample.stock(**choices))
    matrix.outcome = f"pass (corrected {', '.join(counts)} calls)"


@pytest.fixture(scope="module")
def sd15(comfy):
    """Random weights, EPS, and banks that steer whatever it predicts."""
    return build(FAMILIES["SD 1.5"])


@pytest.fixture
def banks(pack):
    from pack.safe_denoiser import Bank

    draw = torch.Generator().manual_seed(1)
    return {name: Bank(torch.randn(4, 4, 8, 8, generator=draw)) for name in ("negation_bank", "reference_bank", "retain_bank")}


def sample_eps(model, sampler, cfg, negative=2):
    """The first 5 of 8 steps, noise left over; the result in the model's space. Seed 1 is the prompt's, `negative` the other's."""
    import comfy.sample

    family = FAMILIES["SD 1.5"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    result = comfy.sample.sample(model, noise, 8, cfg, sampler, "karras", conditioning(family, 1), conditioning(family, negative),
                                 torch.zeros_like(noise), start_step=0, last_step=5, seed=4, disable_pbar=True)
    return model.model.process_latent_in(result)


def constant(model):
    """A model whose conditional and unconditional predictions are two constants."""
    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(lambda args: [torch.full_like(args["input"], value) for value in (0.7, -0.4)])
    return model


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", *CFG_PP])
def test_a_constant_correction_weighs_what_plain_cfg_gives_it(sampler, sd15, banks, run):
    """With constant predictions and a constant correction c, each Euler step takes e = safe - stock to (s'/s) e + (1 - s'/s) c,
    hence e = (1 - s_n / s_0) c at the end, and (1 - (s_n / s_0)^2) c where each step goes down to s'^2 / s before it adds noise.

    CFG++ corrected in `denoised` alone would take e to (s'/s) e + c.
    """
    import comfy.samplers

    model, single = constant(sd15), {name: type(bank)(bank.latents[:1]) for name, bank in banks.items()}
    sigmas = comfy.samplers.calculate_sigmas(sd15.model.model_sampling, "karras", 8)
    ratio = float(sigmas[5] / sigmas[0]) ** (2 if "ancestral" in sampler else 1)
    c = 0.3 * (single["retain_bank"].latents - single["negation_bank"].latents)  # r is the prior where the temperature is high
    patched, _ = run("Apply", model=model, negation_bank=single["negation_bank"], retain_bank=single["retain_bank"], weight="retain",
                     prior=0.3, evidence=0.0, bandwidth=1e-3, temperature=100_000.0).result
    effect = sample_eps(patched, sampler, 3.0) - sample_eps(model, sampler, 3.0)
    torch.testing.assert_close(effect, ((1 - ratio) * c).expand_as(effect), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "euler_ancestral_cfg_pp"])
def test_the_same_for_flow_models(sampler, comfy, run, pack):
    """x = alpha x0 + sigma eps with alpha = 1 - sigma: in f = e / alpha and l = sigma / alpha, f goes to (l'/l) f + (1 - l'/l) c."""
    import comfy.sample
    import comfy.samplers
    from pack.safe_denoiser import Bank

    family = FAMILIES["Flux"]
    model = constant(build(family))
    unsafe, retain = (Bank(torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 8)
    level = (sigmas / (1 - sigmas))[[1, 5]].double()
    ratio = float(level[1] / level[0]) ** (2 if "ancestral" in sampler else 1)
    patched, _ = run("Apply", model=model, negation_bank=unsafe, retain_bank=retain, weight="retain", prior=0.3, evidence=0.0,
                     bandwidth=1e-3, temperature=100_000.0).result
    noise, prompt = torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(3)), conditioning(family, 1)
    safe, stock = (model.model.process_latent_in(comfy.sample.sample(
        m, noise, 8, 3.0, sampler, "simple", prompt, prompt, torch.zeros_like(noise), start_step=1, last_step=5, seed=4,
        disable_pbar=True)) for m in (patched, model))
    torch.testing.assert_close(safe - stock, 0.3 * (1 - ratio) * (retain.latents - unsafe.latents), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", [name for name in CFG_PP if "2s" not in name])
def test_where_both_prompts_are_one_a_cfg_pp_sampler_is_its_plain_namesake(sampler, sd15, banks, run):
    """Without a correction, and so with one: whatever the banks, and however it varies from step to step.

    Not dpmpp_2s_ancestral_cfg_pp: in ComfyUI that takes the unconditional prediction of its second call with the other one of its first.
    """
    patched, _ = run("Apply", model=sd15, negation_bank=banks["negation_bank"], reference_bank=banks["reference_bank"],
                     strength=50.0).result
    for model in (sd15, patched):
        plus, plain = (sample_eps(model, name, 3.0, negative=1) for name in (sampler, sampler.removesuffix("_cfg_pp")))
        assert (plus - plain).norm() <= 1e-4 * plain.norm()
    assert (sample_eps(sd15, sampler, 3.0, negative=1) - plus).norm() > 3e-4 * plus.norm()


def test_the_alternative_euler_cfg_pp(sd15, banks, run):
    """ComfyUI's SamplerEulerCFGpp node has a second one, which steps from 2 denoised - uncond_denoised."""
    import comfy.samplers
    from comfy_extras.nodes_advanced_samplers import SamplerEulerCFGpp
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    model, family = constant(sd15), FAMILIES["SD 1.5"]
    sigmas = comfy.samplers.calculate_sigmas(sd15.model.model_sampling, "karras", 8)[:6]
    unsafe, retain = (type(bank)(bank.latents[:1]) for bank in (banks["negation_bank"], banks["retain_bank"]))
    patched, report = run("Apply", model=model, negation_bank=unsafe, retain_bank=retain, weight="retain", prior=0.3,
                          evidence=0.0, bandwidth=1e-3, temperature=100_000.0).result
    sampler = SamplerEulerCFGpp.execute("alternative").args[0]

    def custom(model):
        prompts, latent = (conditioning(family, 1), conditioning(family, 2)), {"samples": torch.zeros(1, 4, 8, 8)}
        result = SamplerCustom().sample(model, True, 4, 3.0, *prompts, sampler, sigmas, latent)[0]["samples"]
        return sd15.model.process_latent_in(result)

    safe, stock = custom(patched), custom(model)
    assert len(report.steps) == 5
    wanted = 0.3 * (1 - float(sigmas[5] / sigmas[0])) * (retain.latents - unsafe.latents)
    torch.testing.assert_close(safe - stock, wanted, rtol=1e-2, atol=1e-2)
