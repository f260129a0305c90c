"""Samplers and guiders that ComfyUI has for few models, and that go their own way through the steps."""
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, conditioning, noise

from tests.conftest import COMFYUI

OWN = {  # family, cfg, model calls of 4 steps, those that are corrected
    "VOIDSampler": ("CogVideoX, inpainting", 2.0, 4, 4),
    "SamplerARVideo": ("Wan, causal", 1.0, 15, 12),  # 3 frames one by one; a call without noise fills the cache with each
    "SamplerARVideo, two frames, then one": ("Wan, causal", 1.0, 10, 8),
    "LTXVDualCFGGuider": ("LTX-2 (picture and sound)", 3.0, 4, 4),
    "SamplerLCMUpscale, of one size": ("SDXL", 2.0, 4, 4),
}
if COMFYUI:  # not every release has all of them
    extras = "".join(path.read_text(encoding="utf-8") for path in (Path(COMFYUI) / "comfy_extras").glob("*.py"))
    OWN = {name: own for name, own in OWN.items() if f"class {name.split(',')[0]}" in extras}


def sampler_of(name):
    """What the node of that name gives; KSampler's euler for a guider."""
    import comfy.samplers

    if name == "VOIDSampler":
        from comfy_extras.nodes_void import VOIDSampler
        return VOIDSampler.execute().args[0]
    if name.startswith("SamplerARVideo"):
        from comfy_extras.nodes_ar_video import SamplerARVideo
        return SamplerARVideo.execute(2 if "two" in name else 1).args[0]
    if name.startswith("SamplerLCMUpscale"):
        from comfy_extras.nodes_advanced_samplers import sample_lcm_upscale
        return comfy.samplers.KSAMPLER(sample_lcm_upscale, extra_options=dict(
            total_upscale=1.0 if "one size" in name else 1.5, upscale_steps=2, upscale_method="bislerp"))
    return comfy.samplers.sampler_object("euler")


def guider_of(name, model, family, cfg):
    prompts = conditioning(family, 1), conditioning(family, 2)
    if name == "LTXVDualCFGGuider":
        from comfy_extras.nodes_lt import LTXVDualCFGGuider
        return LTXVDualCFGGuider.execute(model, *prompts, cfg, 7.0).args[0]
    from comfy_extras.nodes_custom_sampler import CFGGuider
    return CFGGuider().get_guider(model, *prompts, cfg)[0]


def sample(name, model, family, cfg=2.0, steps=4):
    """Picture and, where there is one, sound of the first prediction, and of the result."""
    import comfy.samplers

    first, start, guider = [], noise(family, 3), guider_of(name, model, family, cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    torch.manual_seed(5)  # SamplerLCMUpscale draws from it
    with torch.inference_mode():
        result = guider.sample(start, start * 0, sampler_of(name), sigmas, seed=4, disable_pbar=True,
                               callback=lambda step, x0, x, total: first.append(x0))
    return [x.unbind() if x.is_nested else (x,) for x in (first[0], result)]


def bank_of(model, family):
    """Pictures, as the family's VAE would give them."""
    from pack.safe_denoiser import Bank

    latent = torch.randn(2, family.latent[0], *([1] if len(family.latent) == 4 else []), *family.latent[-2:],
                         generator=torch.Generator().manual_seed(7))
    return Bank(model.model.process_latent_out(latent), metadata={"space": "vae"})


@pytest.mark.parametrize("name", OWN)
def test_each_prediction_is_corrected(name, comfy, run, pack, matrix):
    matrix.name = f"own way: {name}"
    family, cfg, calls, corrected = FAMILIES[OWN[name][0]], *OWN[name][1:]
    model = build(family)
    bank = bank_of(model, family)
    stock = sample(name, model, family, cfg)
    off, _ = run("Apply", model=model, negation_bank=bank, strength=0.0).result
    assert all(map(torch.equal, sample(name, off, family, cfg)[1], stock[1]))
    on, report = run("Apply", model=model, negation_bank=bank).result
    (picture, *sound), result = sample(name, on, family, cfg)
    y = model.model.process_latent_in(bank.latents)
    assert (picture - y[:1]).norm() + (picture - y[1:]).norm() > (stock[0][0] - y[:1]).norm() + (stock[0][0] - y[1:]).norm()
    assert not torch.equal(result[0], stock[1][0]) and all(map(torch.equal, sound, stock[0][1:]))
    assert (report.summary["model_calls"], report.summary["corrected_calls"]) == (calls, corrected) and not report.summary["fallbacks"]
    matrix.outcome = f"{corrected} of {calls} model calls corrected"


@pytest.mark.parametrize("bank_size", ["exact", "interpolate"])
def test_a_sampler_that_changes_the_size_needs_another_bank(bank_size, comfy, run, pack):
    """SamplerLCMUpscale, which goes from 8 x 8 to 12 x 12: refused, or the bank follows."""
    name, family = "SamplerLCMUpscale", FAMILIES["SDXL"]
    model = build(family)
    on, report = run("Apply", model=model, negation_bank=bank_of(model, family), bank_size=bank_size).result
    if bank_size == "exact":
        with pytest.raises(ValueError, match=r"bank latents are \(4, 8, 8\) but the sampler runs at \(4, 10, 10\)"):
            sample(name, on, family)
    else:
        (result,) = sample(name, on, family)[1]
        assert result.shape[-2:] == (12, 12) and report.summary["corrected_calls"] == 4
        assert "bank resized from (4, 8, 8) to the sampler's (4, 10, 10)" in report.table()
