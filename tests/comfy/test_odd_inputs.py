"""Inputs of another number format, of another number, or with no numbers at all: every node of the pack has an answer."""
import pytest
import torch
from test_meaning import blocker, checks, clip, digits  # noqa: F401 fixtures
from test_runs import euler, guider, ksampler, sample

HALVES = [torch.float16, torch.bfloat16, torch.float64]


# --- NaN -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("retain", [True, False])
def test_a_picture_that_is_no_numbers_is_blocked_and_said(value, retain, checks, digits):  # noqa: F811
    images = digits.images[digits.labels == 1][:3].clone()
    images[1, 0, 0, 0] = value  # one pixel is enough
    more = {} if retain else dict(retain_set=None, threshold=1.0)
    passed, blocked, report, checked, *_, each = checks(images=images, **more)
    assert each == [True, False, True] and len(passed) == 2 and bool(blocked.isfinite().all()) and not blocked.any()
    assert "image 1: blocked: nothing can be said of it, the picture holds NaN or infinity" in report


def test_a_clip_that_makes_no_numbers_lets_nothing_through(checks, clip, digits, monkeypatch):  # noqa: F811
    pixels = type(clip).pixels
    monkeypatch.setattr(type(clip), "pixels", lambda self, pictures: pixels(self, pictures) * torch.nan)
    *_, report, checked, again, every, each = checks(images=digits.images[:2])
    assert not every and each == [False, False] and "the CLIP model gives NaN for it" in report
    monkeypatch.setattr(type(clip), "tokenize", lambda self, texts: torch.zeros(1, 1), raising=False)
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: torch.full((1, 4), torch.nan), raising=False)
    with pytest.raises(ValueError, match="gives NaN or infinity for a text"):
        clip.texts(["seven"])


def test_sets_and_prompts_that_are_no_numbers_are_refused(run, pack):
    images = torch.rand(3, 8, 8, 3)
    images[1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\] of 3 hold NaN"):
        run("NegationSetFromImages", images=images)
    one = run("NegationSetFromImages", images=images[:1]).result[0]
    for weight in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="weights of the sets"):
            run("CombineNegationSets", set_1=one, set_2=one, weight_2=weight)
    with pytest.raises(ValueError, match="the text encoder gives NaN"):
        run("GuardPrompt", clip=object(), conditioning=[[torch.full((1, 4, 8), torch.nan), {}]], text="")


# --- half pictures, other batches ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cover", ["blurred", "black"])
def test_check_images_of_another_number_format(dtype, cover, checks, digits):  # noqa: F811
    images = torch.cat([digits.images[digits.labels == 7][:3], digits.images[digits.labels == 1][:3]])
    wanted = checks(images=images, cover=cover)
    found = checks(images=images.to(dtype), cover=cover)
    assert found[-1] == wanted[-1] and False in wanted[-1] and found[0].dtype == found[1].dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_every_node_that_takes_pictures_or_latents(dtype, run, tiny, checks, digits, clip, sample_node):  # noqa: F811
    """None fails, and what comes of it is what comes of single precision, to its rounding."""
    images = digits.images[digits.labels == 7][:4].to(dtype)
    latent = {"samples": torch.zeros(1, 16, 4, 4, dtype=dtype)}
    one = run("NegationSetFromImages", images=images).result[0]
    built, wanted = (run("BuildNegationBank", negation_set=one, vae=tiny.vae, latent=given).result[0] for given in (latent, tiny.latent()))
    assert torch.equal(built.latents, wanted.latents)
    run("DescribeNegationSet", clip=clip, negation_set=one, images=images, phrases="seven\none")
    checked = checks(images=images, latent={"samples": latent["samples"].expand(4, 16, 4, 4)})[3]
    again = checks(images=images[:int(checked.blocked.sum())])[3]
    run("FillBlockedImages", checked=checked, again=again)
    for bank in (built, type(built)(built.latents.to(dtype), metadata=built.metadata)):
        sampled, report = sample_node(latent, negation_bank=bank)
        assert bool(sampled.isfinite().all()) and report.summary["corrected_calls"] == 3 and not report.summary["fallbacks"]
        run("Report", report=report, samples={"samples": sampled})
    assert run("SampleReferenceBank", model=tiny.model, latent=latent, conditioning=tiny.empty, count=2, steps=2).result[0].latents.any()


@pytest.mark.parametrize("format", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("by", ["bank", "both banks", "unwanted", "all", "spell", "official", "sgf", "guard", "inpainting", "parts"])
def test_a_sampler_that_works_in_another_number_format(by, format, run, tiny):
    """As RES4LYF does in double precision: the same picture, and predictions in the format of the noise's own run."""
    unwanted, banks = run("ClassCondition", class_index=7).result[0], dict(negation_bank=tiny.bank)
    given = {"bank": banks, "both banks": banks | dict(reference_bank=tiny.reference), "unwanted": dict(unwanted=unwanted),
             "all": banks | dict(reference_bank=tiny.reference, unwanted=unwanted), "inpainting": banks,
             "parts": banks | dict(reference_bank=tiny.reference, parts=2)}.get(by, banks | dict(method=by))
    patched, report = run("GuardModel", model=tiny.model, unwanted=unwanted).result if by == "guard" else \
        run("Apply", model=tiny.model, **given).result
    mask = torch.ones(1, 1, 4, 4) / 2 if by == "inpainting" else None

    def casting(call, x, sigmas):
        used = []

        def called(x, sigma):
            used.append(call(x.to(format), sigma.to(format)))
            return used[-1].to(x)

        found = euler(called, x, sigmas)
        assert {one.dtype for one in used} <= {format, torch.float32}
        return found

    prompts = tiny.straight, tiny.empty
    wanted = sample(guider(patched, prompts), ksampler(euler), mask=mask)
    found = sample(guider(patched, prompts), ksampler(casting), mask=mask)
    assert not report.summary["fallbacks"] and report.summary["model_calls"] == 6
    if format == torch.float64:
        torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)
    assert bool(found.isfinite().all()) and (found - wanted).norm() < 0.3 * wanted.norm()


def test_an_empty_batch_and_a_latent_of_another_batch(checks, digits):  # noqa: F811
    passed, blocked, report, checked, again, every, each = checks(images=digits.images[:0], latent={"samples": torch.rand(4, 16, 4, 4)})
    assert all(map(blocker, (passed, blocked, again))) and every and each == [] and report == "0 passed, 0 refused"
    images = digits.images[digits.labels == 7][:4]
    with pytest.raises(ValueError, match="latent holds 3 pictures and images 4"):
        checks(images=images, latent={"samples": torch.rand(3, 16, 4, 4)})
    mask = torch.rand(2, 1, 32, 32)
    again = checks(images=images, latent={"samples": torch.rand(4, 16, 4, 4), "noise_mask": mask})[4]
    assert len(again["noise_mask"]) == len(again["samples"])


@pytest.fixture
def sample_node(run, tiny):
    def call(latent, **banks):
        given = dict(model=tiny.model, seed=5, steps=3, cfg=2.0, positive=tiny.straight, negative=tiny.empty, latent_image=latent)
        found, report = run("KSampler", **given, **banks).result
        return found["samples"], report

    return call




# --- messages ------------------------------------------------------------------------------------------------------

def test_a_checkpoint_without_a_vae(run, tiny, clip, comfy):  # noqa: F811
    import comfy.sd

    empty = comfy.sd.VAE(sd={})
    for vae in (empty, None):
        with pytest.raises(ValueError, match="this checkpoint has no VAE in it; load one with Load VAE"):
            run("BuildNegationBank", negation_set=tiny.negation_set, vae=vae, latent=tiny.latent())
        with pytest.raises(ValueError, match="this checkpoint has no VAE in it; load one with Load VAE"):
            run("SemanticPosterior", clip=clip, negation_set=tiny.negation_set, retain_set=tiny.negation_set, vae=vae)


def test_a_bank_of_another_size_names_pixels_and_the_cure(tiny, sample_node):
    large = {"samples": torch.zeros(1, 16, 8, 6)}
    with pytest.raises(ValueError, match=r"\(it is of 32 x 32 pixels, and 48 x 64 are sampled\), or set bank_size to interpolate"):
        sample_node(large, negation_bank=tiny.bank)
    with pytest.raises(ValueError, match="this size, or set bank_size to interpolate"):
        sample_node(large, negation_bank=type(tiny.bank)(tiny.bank.latents, metadata={"space": "vae"}))
    _, report = sample_node(large, negation_bank=tiny.bank, strength=0.0)
    assert not report.steps


@pytest.mark.parametrize("prefix", ["x" * 300, "a" * 243])
def test_a_prefix_that_is_no_file_name(prefix, run, tiny):
    with pytest.raises(ValueError, match="cannot be written as .* choose a shorter filename_prefix of letters and digits"):
        run("SaveNegationBank", negation_bank=tiny.bank, filename_prefix=prefix)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_an_interrupted_run_says_where_it_stopped(sampler, run, tiny, pack, monkeypatch):
    import comfy.model_management as management
    from pack.nodes.progress import Live

    told = []
    monkeypatch.setattr(Live, "send", lambda self, text: told.append(text))
    patched, report = run("Apply", model=tiny.model, negation_bank=tiny.bank).result

    def stop(args):
        if len(report.steps) == 3:
            raise management.InterruptProcessingException
        return args["denoised"]

    stopped = patched.clone()
    stopped.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(management.InterruptProcessingException):
        sample(guider(stopped, (tiny.straight, tiny.empty)), sampler, steps=40)
    assert report.verdict.startswith("stopped after 3 model calls of a schedule of 40 steps: corrected 3 of 3")
    assert told[-1].startswith("stopped after 3 model calls of a schedule of 40 steps")
    sample(guider(patched, (tiny.straight, tiny.empty)))
    assert "stopped" not in report.table()
