"""What a LATENT is before and while it is sampled: sizes that the sampler changes, streams of picture and sound, scales of noise."""
import inspect
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, build, conditioning, noise

SOUND = FAMILIES["LTX-2 (picture and sound)"]


@pytest.fixture
def resizes(comfy):
    """Whether this ComfyUI's samplers resize empty latents."""
    import comfy.sample

    return "downscale_ratio_spacial" in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters


@pytest.mark.parametrize("side, ratio, scale, wanted",
                         [(64, 8, 16, 512), (64, 8, 8, 512), (65, 8, 16, 512), (64, None, 16, 1024), (16, 8, 1, 128)])
def test_the_size_of_an_empty_latent_is_that_after_the_sampler_has_resized_it(side, ratio, scale, wanted, resizes, pack):
    from pack.nodes.bank.negation_bank import image_size

    vae = SimpleNamespace(spacial_compression_encode=lambda: scale)
    latent = {"samples": torch.zeros(1, 4, side, side)} | ({} if ratio is None else {"downscale_ratio_spacial": ratio})
    assert image_size(latent, vae) == ((wanted,) * 2 if resizes else (side * scale,) * 2)
    latent["samples"] += 1  # what is there already is not resized
    assert image_size(latent, vae) == (side * scale,) * 2


def test_the_reference_bank_has_the_size_that_is_sampled(comfy, pack, tiny):
    """As KSampler itself makes it, for a model of another downscale ratio than the empty latent's."""
    from comfy.sample import fix_empty_latent_channels
    from pack.nodes.bank.reference_bank import streams

    format = tiny.model.get_model_object("latent_format")
    format.spacial_downscale_ratio, before = 16, getattr(format, "spacial_downscale_ratio", None)
    try:
        latent = comfy.EmptyLatentImage().generate(64, 48)[0]
        ratios = {key: latent[key] for key in latent if key.startswith("downscale")}
        sampled = fix_empty_latent_channels(tiny.model, latent["samples"], **ratios)
        assert streams(tiny.model, latent) == [tuple(sampled.shape[1:])] == [(16, 3, 4) if ratios else (16, 6, 8)]
    finally:
        format.spacial_downscale_ratio = before


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_window_and_the_noise_level_are_measured_alike(scale, run, tiny, sample):
    """A flow model whose noise has a scale of its own, as HiDream-O1: x = (1 - sigma) x0 + sigma scale eps."""
    original = tiny.model.get_model_object("model_sampling")

    class Scaled(type(original)):
        def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
            return super().noise_scaling(sigma, scale * noise, latent_image, max_denoise)

    model = tiny.model.clone()
    scaled = Scaled(model.model.model_config)
    scaled.set_parameters(shift=original.shift, multiplier=original.multiplier)
    model.add_object_patch("model_sampling", scaled)
    counts = {}
    for end in (1.0, 0.5):
        _, report = sample.safe(model=model, steps=20, settings={"end": end})
        counts[end] = report.summary["corrected_calls"]
        assert report.steps[0].sigma.tolist() == pytest.approx([scale] * 2)
    assert counts[1.0] == 20 and 5 < counts[0.5] < 20


@pytest.fixture
def sounding(comfy):
    import comfy.supported_models

    if not hasattr(comfy.supported_models, SOUND.config):
        pytest.skip("this ComfyUI has no model of picture and sound")
    from comfy.nested_tensor import NestedTensor

    latent = {"samples": NestedTensor([torch.zeros(1, *SOUND.latent), torch.zeros(1, *SOUND.sound)])}
    return SimpleNamespace(model=build(SOUND), latent=latent, prompts=[conditioning(SOUND, seed) for seed in (1, 2)])


def sampled(model, sounding, batch=1):
    """Picture and sound of the prediction of the first step, and of the result."""
    import comfy.sample

    first, start = [], noise(SOUND, 3, batch)
    result = comfy.sample.sample(model, start, 2, 2.0, "euler", "simple", *sounding.prompts, start * 0, seed=0, disable_pbar=True,
                                 callback=lambda step, x0, x, total: first.append(x0))
    return first[0].unbind(), result.unbind()


def test_pictures_with_sound_are_corrected_and_the_sound_is_left_alone(sounding, run, pack):
    """Bit for bit, but for what the model itself makes of the other picture in later steps."""
    from pack.safe_denoiser import Bank

    bank = Bank(torch.randn(2, 128, 1, 4, 4), metadata={"space": "vae"})
    stock = sampled(sounding.model, sounding)
    off, _ = run("Apply", model=sounding.model, negation_bank=bank, strength=0.0).result
    for predicted, plain in zip(sampled(off, sounding), stock):
        assert all(map(torch.equal, predicted, plain))
    on, report = run("Apply", model=sounding.model, negation_bank=bank).result
    (picture, sound), result = sampled(on, sounding)
    assert torch.equal(sound, stock[0][1]) and not torch.equal(picture, stock[0][0]) and torch.isfinite(picture).all()
    assert not torch.equal(result[0], stock[1][0]) and report.summary["corrected_calls"] == 2


def test_banks_for_pictures_with_sound(sounding, run, pack):
    """The reference bank holds the pictures; a negation bank is built at their size."""
    from pack.nodes.bank.negation_bank import image_size

    reference = run("SampleReferenceBank", model=sounding.model, latent=sounding.latent, conditioning=sounding.prompts[0], count=3, steps=2,
                    batch_size=2).result[0]
    assert reference.latents.shape == (3, *SOUND.latent) and reference.latents.std() > 0
    assert image_size(sounding.latent, SimpleNamespace(spacial_compression_encode=lambda: 32)) == (128, 128)
    negation = type(reference)(reference.latents[:2] + 1, metadata={"space": "vae"})
    on, report = run("Apply", model=sounding.model, negation_bank=negation, reference_bank=reference).result
    sampled(on, sounding, batch=2)
    assert report.summary["model_calls"] == 2


