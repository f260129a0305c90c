"""Image to image, inpainting, batches and sizes, on the tiny model."""

import pytest
import torch
from families import FAMILIES, build, conditioning

from tiny_digits.networks import MMDiT
from tiny_digits.world import FILES


@pytest.fixture
def picture(tiny):
    """A latent to start from, as the VAE gives it."""
    return {"samples": tiny.bank.latents[5:6].repeat(2, 1, 1, 1)}


@pytest.fixture
def traced(tiny, run):
    """Sample with the patch and note what went in and out of each correction: rows of [x, sigma, before, guides, after]."""
    def sample(latent, model=None, steps=5, denoise=1.0, sampler="euler", **settings):
        import comfy.patcher_extension
        import comfy.sample

        rows, guides = [], []

        def record(executor, x, timestep, *args, **kwargs):
            denoised = executor(x, timestep, *args, **kwargs)
            rows.append([x.clone(), timestep.clone(), denoised.clone(), guides.pop()])
            return denoised

        def note(args):
            guides.append((args["uncond_denoised"].clone(), args["cond_denoised"].clone()))
            return args["denoised"]

        def callback(step, x0, x, total):
            rows[-1].append(x0.clone())

        patched, report = run("Apply", model=model or tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference, **settings).result
        patched.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, record)
        patched.set_model_sampler_post_cfg_function(note)
        noise = comfy.sample.prepare_noise(latent["samples"], 3)
        result = comfy.sample.sample(patched, noise, steps, 2.0, sampler, "simple", tiny.straight, tiny.empty, latent["samples"],
                                     denoise=denoise, noise_mask=latent.get("noise_mask"), seed=3, disable_pbar=True, callback=callback)
        return rows, result, report
    return sample


@pytest.fixture
def core(tiny, pack):
    """The core with the same banks, in the model's space."""
    from pack.safe_denoiser import Bank, SafeDenoiser

    to_model = tiny.model.model.process_latent_in
    return SafeDenoiser(Bank(to_model(tiny.bank.latents.float())), reference=Bank(to_model(tiny.reference.latents.float())))


def expected(core, rows, latent, mask_at):
    """Compare what each step used with the core's answer inside that step's mask, blended with the given latent as ComfyUI does."""
    for x, sigma, before, guides, after in rows:
        mask = mask_at(float(sigma[0])).expand_as(x)
        safe, _ = core.safe(x, before, sigma, 1 - sigma, mask, *guides)
        torch.testing.assert_close(after, safe * mask + latent * (1 - mask), rtol=1e-4, atol=1e-4)


def left_half():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    return mask


def test_image_to_image(tiny, sample, picture):
    choices = dict(latent=picture, denoise=0.5, steps=6)
    stock = sample.stock(**choices)
    assert torch.equal(sample.safe(settings=dict(strength=0.0), **choices)[0], stock)
    safe, report = sample.safe(**choices)
    assert report.summary["corrected_calls"] == 6 and torch.isfinite(safe).all() and not torch.equal(safe, stock)
    assert max(float(step.sigma.max()) for step in report.steps) < 0.8, "it starts in the middle of the schedule"


def corrected(report):
    """Calls that were corrected in the latest run, counted now: a Report keeps its summary once it was read."""
    return sum(bool(step.active.any()) for step in report.steps)


def test_two_advanced_samplers_in_a_row_are_one(comfy, run, tiny, sample):
    """The first leaves its noise over, the second adds none: the patch sees where in the schedule it is."""
    patched, report = run("Apply", model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference, start=0.2, end=0.8).result
    whole = sample.stock(model=patched, steps=8)
    steps = corrected(report)
    settings = dict(noise_seed=5, steps=8, cfg=2.0, sampler_name="euler", scheduler="simple", positive=tiny.straight, negative=tiny.empty)
    first = comfy.KSamplerAdvanced().sample(patched, "enable", latent_image=tiny.latent(2), start_at_step=0, end_at_step=4,
                                            return_with_leftover_noise="enable", **settings)[0]
    counts = [corrected(report)]
    second = comfy.KSamplerAdvanced().sample(patched, "disable", latent_image=first, start_at_step=4, end_at_step=10_000,
                                             return_with_leftover_noise="disable", **settings)[0]
    counts.append(corrected(report))
    torch.testing.assert_close(second["samples"], whole, rtol=1e-4, atol=1e-4)
    assert sum(counts) == steps and 0 < counts[0] < steps


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_cfg_pp"])
def test_inside_a_noise_mask_only(comfy, tiny, traced, core, picture, sampler):
    masked = comfy.SetLatentNoiseMask().set_mask(picture, left_half())[0]
    given, mask = tiny.model.model.process_latent_in(picture["samples"]), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    rows, result, report = traced(masked, sampler=sampler)
    expected(core, rows, given, lambda sigma: mask)
    torch.testing.assert_close(result[..., 2:], picture["samples"][..., 2:], rtol=1e-4, atol=1e-4)
    assert report.summary["corrected_calls"] == 5 and not report.summary["fallbacks"]
    x, sigma, before, guides, _ = rows[1]
    inside, _ = core.safe(x, before, sigma, 1 - sigma, mask, *guides)
    whole, _ = core.safe(x, before, sigma, 1 - sigma, None, *guides)
    assert (inside - whole)[..., :2].norm() > 1e-3 * (inside - before).norm(), "the whole picture would have been judged differently"


def test_each_row_of_a_batch_has_its_own_mask(comfy, tiny, traced, core, picture):
    masks = torch.cat([left_half(), 1 - left_half()])
    given = tiny.model.model.process_latent_in(picture["samples"])
    rows, _, _ = traced(comfy.SetLatentNoiseMask().set_mask(picture, masks)[0])
    expected(core, rows, given, lambda sigma: torch.nn.functional.interpolate(masks, (4, 4), mode="bilinear"))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_differential_diffusion_changes_the_mask_at_each_step(comfy, tiny, traced, core, picture, strength):
    """Its mask at a step: where the grey value reaches the share of the schedule that is left, blended by its strength."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    ramp = torch.linspace(0.05, 0.95, 4).expand(1, 1, 4, 4)
    given = tiny.model.model.process_latent_in(picture["samples"])
    model = DifferentialDiffusion.execute(tiny.model, strength).args[0]
    rows, result, report = traced(comfy.SetLatentNoiseMask().set_mask(picture, ramp)[0], model=model)
    last = float(tiny.model.model.model_sampling.sigma_min)
    seen = []

    def mask_at(sigma):
        hard = (ramp >= (sigma - last) / (1 - last)).float()
        seen.append(hard.sum())
        return strength * hard + (1 - strength) * ramp

    expected(core, rows, given, mask_at)
    assert len(set(map(float, seen))) > 2 and torch.isfinite(result).all() and not report.summary["fallbacks"]


def test_a_full_mask_is_none_and_an_empty_one_changes_nothing(comfy, traced, picture):
    def masked(value):
        return comfy.SetLatentNoiseMask().set_mask(picture, torch.full((1, 1, 32, 32), value))[0]

    torch.testing.assert_close(traced(masked(1.0))[1], traced(picture)[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(traced(masked(0.0))[1], picture["samples"], rtol=1e-4, atol=1e-4)


def test_a_video_of_which_the_first_frame_is_given(comfy, run, pack):
    """The mask of a frame is the frame's own: the given one is not corrected, the others are judged without it."""
    import comfy.sample
    from pack.safe_denoiser import Bank

    family = FAMILIES["Wan 2.1"]
    model, draw = build(family), torch.Generator().manual_seed(1)
    bank = Bank(torch.randn(2, 16, 1, 8, 8, generator=draw))
    start = torch.randn(1, *family.latent, generator=draw)
    mask = torch.ones(1, 1, 3, 8, 8)
    mask[:, :, 0] = 0
    patched, report = run("Apply", model=model, negation_bank=bank).result
    result = comfy.sample.sample(patched, torch.randn(start.shape, generator=draw), 3, 2.0, "euler", "simple", conditioning(family, 1),
                                 conditioning(family, 2), start, noise_mask=mask, seed=0, disable_pbar=True)
    torch.testing.assert_close(result[:, :, 0], start[:, :, 0], rtol=1e-3, atol=1e-3)
    corrections = torch.stack([step.correction for step in report.steps])  # (calls, frames)
    assert corrections.shape == (3, 3) and not corrections[:, 0].any() and corrections[0, 1:].all()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_a_batch_of_8_is_8_single_runs(tiny, sample, sampler):
    batch, _ = sample.safe(sampler_name=sampler, latent={**tiny.latent(8), "batch_index": list(range(8))})
    for i in range(8):
        one, _ = sample.safe(sampler_name=sampler, latent={**tiny.latent(1), "batch_index": [i]})
        torch.testing.assert_close(one, batch[i:i + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width, height", [(40, 56), (8, 32), (24, 24)])
def test_odd_sizes(run, tiny, sample, width, height):
    latent = tiny.latent(1, width, height)
    bank = run("BuildNegationBank", negation_set=tiny.negation_set, vae=tiny.vae, latent=latent).result[0]
    assert bank.latents.shape[-2:] == (height // 8, width // 8)
    safe, report = sample.safe(banks={"negation_bank": bank}, latent=latent, batch=1)
    assert safe.shape[-2:] == bank.latents.shape[-2:] and torch.isfinite(safe).all() and report.summary["corrected_calls"] == 6


def test_a_second_pass_at_a_larger_size(comfy, run, tiny, sample):
    """Hires fix, and tiles of another size: one patched model, sampled at two sizes in turn."""
    banks = dict(negation_bank=tiny.bank, reference_bank=tiny.reference)
    patched, report = run("Apply", model=tiny.model, bank_size="interpolate", **banks).result
    first = {"samples": sample.stock(model=patched)}
    assert not report.notes and corrected(report) == 6
    larger = comfy.LatentUpscaleBy().upscale(first, "bilinear", 2.0)[0]
    second = sample.stock(model=patched, latent=larger, denoise=0.6)
    assert second.shape == (2, 16, 8, 8) and torch.isfinite(second).all()
    assert list(report.notes) == ["bank resized from (16, 4, 4) to the sampler's (16, 8, 8)"] and corrected(report) == 6
    again = sample.stock(model=patched)
    assert torch.equal(again, first["samples"]) and not report.notes
    exact, _ = run("Apply", model=tiny.model, **banks).result
    with pytest.raises(ValueError, match="rebuild the bank with this model's VAE at this size"):
        sample.stock(model=exact, latent=larger)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_banks_and_models_in_half_precision(comfy, run, tiny, sample, pack, dtype):
    import comfy.sd

    wanted, _ = sample.safe()
    halves = {f"{name}_bank": type(bank)(bank.latents.to(dtype), metadata=bank.metadata)
              for name, bank in (("negation", tiny.bank), ("reference", tiny.reference))}
    safe, _ = sample.safe(banks=halves)
    assert (safe - wanted).norm() < 0.05 * wanted.norm()
    model = comfy.sd.load_diffusion_model(str(FILES[MMDiT]), model_options={"dtype": dtype})
    assert model.model_dtype() == dtype
    safe, report = sample.safe(model=model, banks=halves)
    assert torch.isfinite(safe).all() and not report.summary["fallbacks"] and report.summary["corrected_calls"] == 6
    assert torch.equal(sample.safe(model=model, settings=dict(strength=0.0))[0], sample.stock(model=model))
