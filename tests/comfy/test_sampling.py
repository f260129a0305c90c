"""The patch inside ComfyUI's own samplers."""
import pytest
import torch

STOCHASTIC = {"dpmpp_sde", "euler_ancestral"}


def test_same_noise_same_latents_with_and_without_comfyui(comfy, tiny):
    """The standalone networks and sampler equal ComfyUI's SD3 and TAESD, so that what is measured in one holds in the other."""
    import comfy.sample

    from tiny_digits.world import TinyDigits, prompt

    noise = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    world, label = TinyDigits(), prompt("straight")
    for cfg in (1.0, 2.0):
        ours = world.sample(noise, label, cfg)
        raw = comfy.sample.sample(tiny.model, noise, 20, cfg, "euler", "simple", tiny.straight, tiny.empty, torch.zeros_like(noise), seed=0)
        theirs = tiny.model.model.process_latent_in(raw)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    pixels = tiny.vae.decode(raw)
    torch.testing.assert_close(world.decode(ours).movedim(1, -1), pixels, rtol=1e-3, atol=1e-3)
    again = tiny.model.model.process_latent_in(tiny.vae.encode(pixels))
    torch.testing.assert_close(world.encode(pixels.movedim(-1, 1)), again, rtol=1e-3, atol=1e-3)


def test_the_safe_sampler_equals_the_standalone_one(comfy, run, tiny):
    import comfy.sample

    from safe_denoiser import Bank, SafeDenoiser
    from tiny_digits.world import TinyDigits, prompt

    noise = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    to_model = tiny.model.model.process_latent_in
    banks = {key: Bank(to_model(bank.latents)) for key, bank in (("bank", tiny.bank), ("reference", tiny.reference))}
    ours = TinyDigits().sample(noise, prompt("straight"), safe=SafeDenoiser(**banks).safe)
    patched, _ = run("Apply", model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference).result
    raw = comfy.sample.sample(patched, noise, 20, 2.0, "euler", "simple", tiny.straight, tiny.empty, torch.zeros_like(noise), seed=0)
    assert (ours - to_model(raw)).norm() <= 1e-4 * ours.norm()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "heun", "euler_cfg_pp", "uni_pc", "ddim", "lcm"])
def test_off_is_bit_identical_and_on_is_not(sample, sampler):
    stock = sample.stock(sampler_name=sampler)
    off, report = sample.safe(sampler_name=sampler, settings=dict(strength=0.0))
    assert torch.equal(off, stock) and not report.steps
    excluded, report = sample.safe(sampler_name=sampler, settings=dict(start=0.3, end=0.3))
    assert torch.equal(excluded, stock) and report.steps and report.summary["corrected_calls"] == 0
    on, report = sample.safe(sampler_name=sampler)
    assert not torch.equal(on, stock) and report.summary["corrected_calls"] == len(report.steps)


def test_safe_ksampler_is_apply_and_ksampler(comfy, run, tiny, sample):
    for settings in ({}, dict(method="spell", end=0.4), dict(method="official", strength=0.33, end=0.22)):
        safe, _ = sample.safe(settings=settings)
        patched, _ = run("Apply", model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference, **settings).result
        assert torch.equal(safe, sample.stock(model=patched)), settings


def test_twice_is_the_same_and_the_model_stays_untouched(tiny, sample):
    before = sample.stock()
    first, _ = sample.safe(sampler_name="dpmpp_sde")
    second, _ = sample.safe(sampler_name="dpmpp_sde")
    assert torch.equal(first, second)
    assert torch.equal(sample.stock(), before)
    assert not tiny.model.model_options.get("transformer_options", {}).get("wrappers")


@pytest.mark.parametrize("banks", ["negation", "negation and retain", "all"])
def test_every_choice_of_banks_runs(tiny, sample, banks):
    choice = {"negation_bank": tiny.bank}
    if banks != "negation":
        choice["retain_bank"] = tiny.reference
    if banks == "all":
        choice["reference_bank"] = tiny.reference
    latent, report = sample.safe(banks=choice)
    assert torch.isfinite(latent).all() and report.summary["corrected_calls"] == 6


def test_parts_are_compared_where_asked_and_the_report_says_so(run, tiny, sample):
    def applied(**settings):
        model, report = run("Apply", model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference, **settings).result
        return sample.stock(model=model), report

    (parts, told), (whole, silent), (default, _) = applied(parts=2), applied(parts=1), applied()
    assert list(told.notes) == ["compared by parts of the picture, in 9 windows"] and not silent.notes
    assert told.summary["corrected_calls"] == 6 and not torch.equal(parts, whole)
    assert torch.equal(default, whole), "a whole digit is what this bank negates"


def test_what_calibration_finds_is_kept_for_the_next_run(tiny, sample, monkeypatch):
    import sys

    sample.safe()
    monkeypatch.setattr(sys.modules["pack.safe_denoiser.density.densities"], "temperature_for",
                        lambda *args: pytest.fail("calibrated again"))
    sample.safe()


def test_window_follows_the_schedule(sample):
    """Flow models with shift 3: 20 steps of the simple schedule, the window 0.25 to 0.5 holds the steps with t in (0.5, 0.75]."""
    _, report = sample.safe(steps=20, settings=dict(start=0.25, end=0.5))
    active = [step.active.all().item() for step in report.steps]
    assert active == [0.5 < 1 - i / 20 <= 0.75 for i in range(20)]


def test_report_counts_calls_not_steps(sample):
    _, report = sample.safe(sampler_name="heun", steps=5)
    assert report.summary["model_calls"] == 9, "heun calls twice per step, once in the last"


def test_the_report_is_that_of_the_latest_run(run, tiny, sample):
    patched, report = run("Apply", model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference).result
    for steps in (6, 4):
        sample.stock(model=patched, steps=steps)
        assert len(report.steps) == steps


def test_bank_of_another_size_is_one_error_or_resized(run, tiny, sample):
    small = tiny.bank
    larger = dict(latent=tiny.latent(1, 48, 64), batch=1)
    with pytest.raises(ValueError, match=r"bank latents are \(16, 4, 4\) but the sampler runs at \(16, 8, 6\); rebuild the bank"):
        sample.safe(banks={"negation_bank": small}, **larger)
    _, report = sample.safe(banks={"negation_bank": small}, settings=dict(bank_size="interpolate"), **larger)
    assert list(report.notes) == ["bank resized from (16, 4, 4) to the sampler's (16, 8, 6)"]
    assert "bank resized" in report.table()


def test_bank_of_another_model_is_one_error(tiny, sample):
    import dataclasses

    other = dataclasses.replace(tiny.bank, latents=tiny.bank.latents[:, :4], metadata={})
    with pytest.raises(ValueError, match=r"bank latents are \(4, 4, 4\) but the sampler runs at \(16, 4, 4\)"):
        sample.safe(banks={"negation_bank": other})


def test_audio_latents_are_refused(run, tiny, sample):
    audio = {"samples": torch.zeros(1, 64, 1024)}
    with pytest.raises(ValueError, match="which is audio or a 3-D shape; the safe denoiser needs image"):
        run("BuildNegationBank", negation_set=tiny.negation_set, vae=tiny.vae, latent=audio)
    with pytest.raises(ValueError, match="which is audio or a 3-D shape; the safe denoiser needs image"):
        run("SampleReferenceBank", model=tiny.model, latent=audio, conditioning=tiny.empty)


def test_nan_predictions_pass_unchanged_and_are_counted(tiny, sample):
    broken = tiny.model.clone()
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    latent, report = sample.safe(model=broken)
    assert latent.isnan().all() and report.summary["fallbacks"] == 12 and "NaN" in report.verdict


def stopped(model):
    """A clone whose first prediction is interrupted, as the user does it."""
    import comfy.model_management as management

    def interrupt(args):
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    model = model.clone()
    model.set_model_sampler_post_cfg_function(interrupt)
    return model


def test_an_interrupt_while_sampling_passes(tiny, sample):
    import comfy.model_management as management

    with pytest.raises(management.InterruptProcessingException):
        sample.safe(model=stopped(tiny.model))
    assert sample.safe()[1].summary["corrected_calls"] == 6, "the next run is as if nothing had happened"


def test_two_patches_on_one_model(run, tiny, sample):
    """Two negation banks, one Apply node each: both are at work, and the order does not matter."""
    import dataclasses

    halves = [dataclasses.replace(tiny.bank, latents=tiny.bank.latents[part], names=()) for part in (slice(0, 20), slice(20, 40))]
    results = []
    for order in (halves, halves[::-1]):
        model, reports = tiny.model, []
        for bank in order:
            model, report = run("Apply", model=model, negation_bank=bank, reference_bank=tiny.reference, strength=0.5).result
            reports.append(report)
        results.append(sample.stock(model=model))
        assert all(report.summary["corrected_calls"] == 6 for report in reports)
    assert (results[0] - results[1]).norm() < 0.2 * results[0].norm()


def test_a_bank_that_does_not_fit_is_read_from_its_file_at_each_step(run, tiny, sample, monkeypatch):
    """ComfyUI says how much is free; with next to nothing the same picture comes out of a bank that was never in memory."""
    import sys
    from pathlib import Path

    import folder_paths

    wanted, _ = sample.safe()
    run("SaveNegationBank", negation_bank=tiny.bank, filename_prefix="streamed")
    monkeypatch.setattr(sys.modules["pack.nodes.bank.negation_bank"], "memory", lambda device: 1000)
    stored = run("LoadNegationBank", bank="streamed_00001_.safetensors").result[0]
    assert type(stored.latents).__name__ == "LazyLatents"
    latents, report = sample.safe(dict(negation_bank=stored, reference_bank=tiny.reference))
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4)
    assert report.summary["corrected_calls"] == len(report.steps)
    (Path(folder_paths.get_output_directory()) / "negation_banks/streamed_00001_.safetensors").unlink()
