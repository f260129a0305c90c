"""Closed forms, golden data of the published code, and what must never happen."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from safe_denoiser import Bank, SafeDenoiser, posterior
from safe_denoiser.methods import official, sgf, tracked
from safe_denoiser.prediction import Prediction

GOLDEN = Path(__file__).parent.parent / "golden/official_reference.safetensors"
SIGMAS = [0.03, 0.1, 0.5, 1.0, 3.0, 14.6]


def mixture_denoiser(x, means, weights, spread, sigma, alpha):
    """E[x0 | x] and log p(x) of a mixture of isotropic Gaussians N(mean, spread^2), written out independently: the posterior of
    each component is Gaussian with precision 1/spread^2 + alpha^2/sigma^2.
    """
    dim = x.shape[1]
    variance = alpha**2 * spread**2 + sigma**2
    log_p = torch.stack([math.log(w) - (x - alpha * m).square().sum(1) / (2 * variance) - dim / 2 * math.log(2 * math.pi * variance)
                         for m, w in zip(means, weights)], 1)
    precision = 1 / spread**2 + alpha**2 / sigma**2
    each = torch.stack([(m / spread**2 + alpha * x / sigma**2) / precision for m in means], 1)
    return (log_p.softmax(1)[:, :, None] * each).sum(1), log_p.logsumexp(1)


@pytest.fixture(params=[1, 2], ids=["1-D", "2-D"])
def mixture(request):
    """Five components, two of them unsafe, total unsafe mass 0.35."""
    generator = torch.Generator().manual_seed(request.param)
    means = 2 * torch.randn(5, request.param, generator=generator, dtype=torch.float64)
    return means, torch.tensor([0.15, 0.2, 0.3, 0.25, 0.1], dtype=torch.float64), 0.35


def cases(flow):
    return [(s, 1 - s) for s in (0.03, 0.1, 0.5, 0.9, 0.99)] if flow else [(s, 1.0) for s in SIGMAS]


@pytest.mark.parametrize("flow", [False, True], ids=["alpha 1", "alpha 1 - sigma"])
@pytest.mark.parametrize("form", ["reference", "retain", "both", "beta"])
def test_exact_weights_reproduce_the_safe_denoiser(mixture, form, flow):
    """arXiv:2502.08011, Thm 3.2, on a mixture whose unsafe part is known: the correction of E_data is E_safe."""
    means, weights, spread = mixture
    unsafe, safe = Bank(means[:2], weights=weights[:2]), Bank(means[2:], weights=weights[2:])
    everything, prior = Bank(means, weights=weights), float(weights[:2].sum())
    banks = {"reference": {"reference": everything}, "retain": {"retain": safe}, "both": {"reference": everything, "retain": safe}}
    for sigma, alpha in cases(flow):
        x = alpha * means[torch.arange(40) % 5] + (alpha * spread + sigma) * torch.randn(40, means.shape[1], dtype=torch.float64)
        data, log_p = mixture_denoiser(x, means, weights, spread, sigma, alpha)
        wanted, _ = mixture_denoiser(x, means[2:], weights[2:], spread, sigma, alpha)
        if form == "beta":
            bad, log_u = mixture_denoiser(x, means[:2], weights[:2], spread, sigma, alpha)
            _, log_s = mixture_denoiser(x, means[2:], weights[2:], spread, sigma, alpha)
            estimate = posterior(x, unsafe.latents, sigma, alpha, spread, 1.0, unsafe.log_weights)
            kept = posterior(x, safe.latents, sigma, alpha, spread, 1.0, safe.log_weights)
            beta = (math.log(prior / (1 - prior)) + estimate.log_density - kept.log_density).exp()
            got = data + beta[:, None] * (data - estimate.mean)
            torch.testing.assert_close(estimate.mean, bad, rtol=1e-9, atol=1e-9)
            reliable = beta < 1e6  # data - E_u is a difference of nearly equal numbers where everything is unsafe
            got, wanted = got[reliable], wanted[reliable]
        else:
            denoiser = SafeDenoiser(unsafe, prior=prior, evidence=0.0, bandwidth=spread, temperature=1.0, posterior_max=1 - 1e-13,
                                    **banks[form])
            got, step = denoiser.safe(x, data, sigma, alpha)
            r = mixture_denoiser(x, means[:2], weights[:2], spread, sigma, alpha)[1] - log_p
            torch.testing.assert_close(step.posterior, r.exp(), rtol=1e-8, atol=1e-12)
            reliable = r.exp() < 1 - 1e-9
            got, wanted = got[reliable], wanted[reliable]
        assert len(got) > 10
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_with_both_banks_log_r_is_the_mean_of_two_estimates(mixture):
    """Where one of them errs, as a reference bank of too few samples does, the error of log r is halved."""
    means, weights, spread = mixture
    unsafe, safe, x = Bank(means[:2]), Bank(means[2:]), means[2:].clone()
    settings = dict(prior=0.1, evidence=0.0, bandwidth=spread, temperature=1.0, posterior_max=1 - 1e-13)
    banks = [dict(reference=Bank(means[:4])), dict(retain=safe), dict(reference=Bank(means[:4]), retain=safe)]
    by_reference, by_retain, by_both = (SafeDenoiser(unsafe, **b, **settings).safe(x, x, 0.3)[1].posterior.log() for b in banks)
    torch.testing.assert_close(by_both, (by_reference + by_retain) / 2)


def test_evidence_is_the_projection_of_the_prediction():
    """A prediction at the reference mean lowers log r by evidence / 2; one at the unsafe mean raises it by as much, and by more where
    the banks are so small that part of their distance is chance (at most half of its square, so by evidence 3 / 2 at most).
    """
    generator = torch.Generator().manual_seed(0)
    unsafe, reference = Bank(torch.randn(6, 4, 2, 2, generator=generator) + 1), Bank(torch.randn(9, 4, 2, 2, generator=generator))
    x = torch.randn(3, 4, 2, 2, generator=generator) * 0.5
    settings = dict(reference=reference, prior=0.01, bandwidth=0.4, temperature=8.0)
    means = [posterior(x, bank.latents, 1.0, 1.0, 0.4, 8.0).mean for bank in (unsafe, reference)]
    plain = SafeDenoiser(unsafe, evidence=0.0, **settings).safe(x, x, 1.0)[1].posterior.log()
    at_unsafe, at_reference = (SafeDenoiser(unsafe, evidence=2.0, **settings).safe(x, mean, 1.0)[1].posterior.log() for mean in means)
    torch.testing.assert_close(at_reference, plain - 1, rtol=1e-4, atol=1e-4)
    assert (at_unsafe > plain + 1).all() and (at_unsafe <= plain + 3 + 1e-4).all()


def test_the_chance_of_small_banks_is_taken_off_their_distance():
    """Means of 5 and 8 draws from two Gaussians: their squared distance exceeds the true one, and without its chance it does not."""
    generator, found, plain = torch.Generator().manual_seed(0), [], []
    x = torch.zeros(1, 32, dtype=torch.float64)
    p = Prediction(x, x, torch.tensor([1e4], dtype=torch.float64), torch.ones(1, dtype=torch.float64))  # noise at which all weigh alike
    for _ in range(400):
        banks = [Bank(torch.randn(n, 32, generator=generator, dtype=torch.float64) + shift) for n, shift in ((5, 0.25), (8, 0.0))]
        safe = SafeDenoiser(banks[0], reference=banks[1], bandwidth=0.0, temperature=1.0)
        means = [safe.view.densities.of(bank, p) for bank in banks]
        plain.append(float((means[0].mean - means[1].mean).square().sum()))
        found.append(plain[-1] - sum(float(safe.view.densities.chance(bank, mean, p)[0]) for bank, mean in zip(banks, means)))
    truth = 32 * 0.25**2
    assert abs(sum(found) / 400 - truth) < 0.4 < sum(plain) / 400 - truth


def test_guidance_that_leads_to_the_set_is_let_go_for_the_rest_of_the_run():
    """A prompt at the unsafe mean loses its guidance; later in the same run too, when it pulls no more; the next run starts anew."""
    generator = torch.Generator().manual_seed(0)
    unsafe, reference = (Bank(torch.randn(40, 4, 2, 2, generator=generator) + shift) for shift in (1, 0))
    safe = SafeDenoiser(unsafe, reference=reference, bandwidth=0.4, temperature=8.0)
    x = torch.randn(2, 4, 2, 2, generator=generator)
    e_u, e_ref = (posterior(x, bank.latents, 1.0, 0.0, 0.4, 8.0).mean for bank in (unsafe, reference))
    guided = 2 * e_u - e_ref

    def moved(sigma, asked):
        """What is left of guidance, beside the correction along the axis: 1 when nothing is let go."""
        side = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
        plain = safe_only.safe(x, guided + side, sigma, 1 - sigma, None, e_ref)[0]
        return safe.safe(x, guided + side, sigma, 1 - sigma, None, e_ref, asked)[0] - plain, guided + side - e_ref

    safe_only = SafeDenoiser(unsafe, reference=reference, bandwidth=0.4, temperature=8.0)
    change, guidance = moved(1.0, e_u)
    torch.testing.assert_close(change, -guidance, rtol=1e-4, atol=1e-4)
    change, guidance = moved(0.9, e_ref)
    torch.testing.assert_close(change, -guidance, rtol=1e-4, atol=1e-4)
    change, _ = moved(1.0, e_ref)
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-5)


def golden():
    with safe_open(GOLDEN, "pt") as file:
        return [(name, case, {key.split(".")[1]: file.get_tensor(key) for key in file.keys() if key.startswith(name + ".")})
                for name, case in json.loads(file.metadata()["cases"]).items()]


@pytest.mark.parametrize("name, case, tensors", golden(), ids=[name for name, _, _ in golden()])
def test_official_and_spell_equal_the_published_code(name, case, tensors):
    raw, x0 = Bank(tensors["bank_raw"]), tensors["x0"]
    flat, bank = x0.flatten(1), raw.normalised().latents.flatten(1)

    def close(got, wanted):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()

    close(raw.normalised().latents, tensors["bank_normalised"])
    settings = dict(method="official", bandwidth=case["sigma"], strength=case["scale"])
    got, step = SafeDenoiser(raw, threshold=case["beta_threshold"], **settings).safe(x0, x0, 1.0)
    assert bool(step.posterior.all()) == case["applies"]
    close(got, tensors["x0_corrected"])
    close(official(flat, bank, case["sigma"], 0.0, flat)[0], -tensors["unsafe_mean"].flatten(1))
    above, below = (SafeDenoiser(raw, threshold=case["weight_sum"] * factor, **settings).safe(x0, x0, 1.0) for factor in (1.001, 0.999))
    assert torch.equal(above[0], x0) and not above[1].posterior.any(), "the gate opens below its threshold"
    close(below[0], tensors["x0_corrected"])
    got, step = SafeDenoiser(raw, method="official_sd3", strength=case["scale"], threshold=0.0).safe(x0, x0, 1.0)
    close(got, tensors["sd3_x0_corrected"])
    close(official(flat, bank, 1.0, 0.0, F.normalize(x0, dim=1).flatten(1))[0], -tensors["sd3_unsafe_mean"].flatten(1))
    spell = dict(method="spell", radius=case["sparse_radius"], strength=case["sparse_scale"])
    got, step = SafeDenoiser(raw.normalised(), **spell).safe(x0, x0, 1.0)
    assert bool((got != x0).any()) == case["sparse_applies"]
    close(got, tensors["sparse_x0_corrected"])


def test_spell_projects_onto_the_sphere_of_one_shield():
    """arXiv:2410.06025: at strength 1 a prediction inside one shield lands on its surface, one outside stays."""
    bank, inside = Bank(torch.zeros(1, 4, 2, 2)), torch.randn(2, 4, 2, 2)
    inside = inside / inside.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    denoiser = SafeDenoiser(bank, method="spell", radius=3.0)
    torch.testing.assert_close(denoiser.safe(inside, inside, 1.0)[0].flatten(1).norm(dim=1), torch.full((2,), 3.0))
    assert torch.equal(denoiser.safe(inside, inside * 4, 1.0)[0], inside * 4)


def test_sgf_moves_away_from_the_set():
    """arXiv:2603.13300: every step lowers the mean kernel to the set, and nothing moves far outside of it."""
    generator = torch.Generator().manual_seed(0)
    latents, denoised = torch.randn(20, 8, generator=generator), torch.randn(5, 8, generator=generator)
    direction, kernel = sgf(denoised, latents, 2.0)
    _, after = sgf(denoised + 0.1 * direction, latents, 2.0)
    assert (after.mean(1) < kernel.mean(1)).all()
    assert sgf(denoised + 100, latents, 2.0)[0].abs().max() < 1e-6


def test_the_retain_form_hears_the_prediction_too():
    """logit r falls by evidence / 2 for a prediction at the retain mean."""
    unsafe, retain, x = Bank(torch.randn(6, 4, 2, 2) + 1), Bank(torch.randn(9, 4, 2, 2)), torch.randn(3, 4, 2, 2)
    settings = dict(retain=retain, bandwidth=0.4, temperature=8.0, posterior_max=1 - 1e-6)
    mean = posterior(x, retain.latents, 1.0, 1.0, 0.4, 8.0).mean
    plain, told = (SafeDenoiser(unsafe, evidence=e, **settings).safe(x, mean, 1.0)[1].posterior.logit() for e in (0.0, 2.0))
    torch.testing.assert_close(told, plain - 1.0, rtol=1e-3, atol=1e-3)


def test_what_needs_an_unconditional_prediction_says_so_at_cfg_1():
    bank, x = Bank(torch.randn(7, 4, 4, 4)), torch.randn(2, 4, 4, 4)
    for settings in (dict(weight="unconditional"), dict(weight="constant", push="unconditional")):
        with pytest.raises(ValueError, match="there is none: cfg is 1, or the guider makes none"):
            SafeDenoiser(bank, **settings).safe(x, x, 0.8)
        SafeDenoiser(bank, **settings).safe(x, x, 0.8, unconditional=x + 1)


def test_eq_8_pushes_from_the_unconditional_prediction():
    """arXiv:2502.08011, Eq. 8: D_cfg + beta (D_uncond - E_u)."""
    bank, x, denoised, empty = Bank(torch.randn(1, 4, 4, 4)), *torch.randn(3, 2, 4, 4, 4)
    denoiser = SafeDenoiser(bank, weight="constant", strength=0.5, push="unconditional", bandwidth=0.0)
    got, _ = denoiser.safe(x, denoised, 0.8, unconditional=empty)
    torch.testing.assert_close(got, denoised + 0.5 * (empty - bank.latents))


def test_triangle_only_moves_predictions_that_come_near():
    generator = torch.Generator().manual_seed(7)
    bank, x = Bank(torch.randn(40, 4, 4, 4, generator=generator)), torch.randn(2, 4, 4, 4, generator=generator)
    denoiser = SafeDenoiser(bank, weight="triangle")
    mean = denoiser.view.densities.of(bank, Prediction(x.flatten(1), x.flatten(1), torch.ones(2), torch.ones(2), None)).mean.view_as(x)
    near, far = mean + 1e-3 * torch.randn(2, 4, 4, 4, generator=generator), mean + 10
    assert (denoiser.safe(x, near, 1.0)[1].posterior > 0).all() and torch.equal(denoiser.safe(x, far, 1.0)[0], far)


@pytest.mark.parametrize("ancestral", [True, False])
@pytest.mark.parametrize("unsafe", [True, False])
def test_tracked_follows_who_foretold_the_next_x(ancestral, unsafe):
    """A trajectory of an item of the unsafe Gaussian raises log r, one of the other lowers it; both forms agree with the exact ratio.

    Two isotropic Gaussians N(m, 1) in 8-D, so that both denoisers and the exact log ratio are known at every noise level.
    """
    generator = torch.Generator().manual_seed(0)
    m_u, m_d = torch.full((1, 8), 0.3, dtype=torch.float64), torch.full((1, 8), -0.3, dtype=torch.float64)
    x0 = (m_u if unsafe else m_d) + torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    levels = torch.linspace(8, 0.5, 60 if ancestral else 2000, dtype=torch.float64)
    eps = torch.randn(4000, 8, generator=generator, dtype=torch.float64)

    def foretold(x, s, m):
        return (x + s * s * m) / (1 + s * s)

    def exact(x, s):
        return ((x - m_d).square().sum(1) - (x - m_u).square().sum(1)) / (2 * (1 + s * s))

    x, log_r = x0 + levels[0] * eps, torch.zeros(4000, dtype=torch.float64)
    start = exact(x, levels[0])
    for t, s in zip(levels[:-1], levels[1:]):
        before = x, t.expand(4000), foretold(x, t, m_d), foretold(x, t, m_u), torch.zeros(4000, dtype=torch.float64)
        if ancestral:  # the true reverse step, towards this x0
            a, v = (s / t) ** 2, s**2 * (1 - (s / t) ** 2)
            x = a * x + (1 - a) * x0 + v.sqrt() * torch.randn(4000, 8, generator=generator, dtype=torch.float64)
        else:  # the other Gaussian's ODE, exactly: x - m shrinks with sqrt(1 + s^2)
            x = m_d + (x - m_d) * ((1 + s * s) / (1 + t * t)).sqrt()
        log_r = tracked(log_r, before, x, s.expand(4000), 1.0, 100.0)
    gained = exact(x, levels[-1]) - start
    if ancestral:
        assert (log_r.mean() > 0.5) == unsafe and (log_r.mean() < -0.5) == (not unsafe)
        assert abs(float(log_r.mean() - gained.mean())) < 0.25 * abs(float(gained.mean())) + 0.05
    else:
        torch.testing.assert_close(log_r, gained, rtol=0.02, atol=0.02)


def test_tracked_starts_again_when_the_noise_rises():
    bank, generator = Bank(torch.randn(7, 4, 4, 4)), torch.Generator().manual_seed(0)
    denoiser, x = SafeDenoiser(bank, weight="tracked"), torch.randn(2, 4, 4, 4, generator=generator)
    first = [denoiser.safe(x, x * 0.5, sigma)[1].posterior for sigma in (2.0, 1.0, 0.5)]
    again = [denoiser.safe(x, x * 0.5, sigma)[1].posterior for sigma in (2.0, 1.0, 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[2])


def test_spell_finds_its_radius_in_the_bank():
    latents = torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1, 1)
    assert SafeDenoiser(Bank(latents), method="spell").view.neighbour_distance == 1.0


BANKS = {
    "evidence": dict(reference=Bank(torch.randn(6, 4, 4, 4))), "retain": dict(retain=Bank(torch.randn(5, 4, 4, 4))), "gate": {},
    "spell": dict(method="spell", radius=100.0), "official": dict(method="official", threshold=0.0),
    "official_sd3": dict(method="official_sd3", threshold=0.0), "sgf": dict(method="sgf", bandwidth=5.0),
    "reference": dict(reference=Bank(torch.randn(6, 4, 4, 4)), weight="reference"), "constant": dict(weight="constant"),
    "ratio_beta": dict(retain=Bank(torch.randn(5, 4, 4, 4)), weight="ratio_beta"), "tracked": dict(weight="tracked"),
    "parts": dict(reference=Bank(torch.randn(6, 4, 4, 4)), parts=2),
}


@pytest.fixture(params=BANKS, ids=list(BANKS))
def settings(request):
    return BANKS[request.param]


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_method_corrects_and_keeps_shape_and_dtype(settings, n, batch):
    bank = Bank(torch.randn(n, 4, 4, 4))
    x = bank.latents[:1] + 0.8 * torch.randn(batch, 4, 4, 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        denoised = (bank.latents[:1] + 0.3 * torch.randn(batch, 4, 4, 4)).to(dtype)
        safe_denoised, step = SafeDenoiser(bank, **settings).safe(x.to(dtype), denoised, torch.full((batch,), 0.8))
        assert safe_denoised.dtype == dtype and safe_denoised.shape == denoised.shape
        assert not torch.equal(safe_denoised, denoised), "a silent no-op"
        assert step.active.all() and step.correction.shape == (batch,) and (step.correction > 0).all()
        assert ((0 <= step.nearest) & (step.nearest < n)).all()


def test_batch_equals_single_runs(settings):
    bank = Bank(torch.randn(7, 4, 4, 4, dtype=torch.float64))  # windows magnify rounding
    x, denoised = torch.randn(2, 8, 4, 4, 4, dtype=torch.float64)
    denoiser = SafeDenoiser(bank, **settings)
    together = denoiser.safe(x, denoised, torch.full((8,), 0.8))[0]
    alone = torch.cat([SafeDenoiser(bank, **settings).safe(x[i:i + 1], denoised[i:i + 1], torch.full((1,), 0.8))[0] for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_strength_0_and_an_excluding_window_are_bit_exact(settings):
    bank, x = Bank(torch.randn(7, 4, 4, 4)), torch.randn(2, 4, 4, 4)
    denoised = torch.randn(2, 4, 4, 4, dtype=torch.float64).to(torch.bfloat16)
    same, step = SafeDenoiser(bank, strength=0.0, **settings).safe(x, denoised, 0.8)
    assert same is denoised and step is None
    x = bank.latents[:2] + 0.5 * x
    outside, step = SafeDenoiser(bank, sigma_start=0.5, **settings).safe(x, denoised, 0.8)
    assert torch.equal(outside, denoised) and not step.active.any() and not step.posterior.any()
    rows, step = SafeDenoiser(bank, sigma_start=0.8, sigma_end=0.2, **settings).safe(x, denoised, torch.tensor([0.8, 0.2]))
    assert step.active.tolist() == [True, False], "active where sigma_end < sigma <= sigma_start"
    assert torch.equal(rows[1], denoised[1]) and not torch.equal(rows[0], denoised[0])


def test_predictions_that_are_not_finite_come_back_unchanged_and_counted(settings):
    bank, x, denoised = Bank(torch.randn(7, 4, 4, 4)), torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    denoised[1, 0, 0, 0] = math.nan
    safe_denoised, step = SafeDenoiser(bank, **settings).safe(x, denoised, 0.8)
    assert step.fallback.tolist() == [False, True, False] and step.active.tolist() == [True, False, True]
    assert torch.equal(safe_denoised[1].nan_to_num(7), denoised[1].nan_to_num(7))
    assert torch.isfinite(safe_denoised[[0, 2]]).all() and torch.isfinite(step.correction).all()


def test_a_picture_bank_meets_a_video_frame_by_frame(settings):
    pictures = Bank(torch.randn(7, 4, 4, 4, dtype=torch.float64))
    video, denoised = torch.randn(2, 2, 4, 3, 4, 4, dtype=torch.float64)
    denoiser = SafeDenoiser(pictures, **settings)
    got, step = denoiser.safe(video, denoised, torch.tensor([0.8, 0.6]))
    assert step.posterior.shape == (6,)
    for t in range(3):
        torch.testing.assert_close(got[:, :, t], denoiser.safe(video[:, :, t], denoised[:, :, t], torch.tensor([0.8, 0.6]))[0])


def test_a_video_bank_meets_a_video_whole():
    bank, video = Bank(torch.randn(3, 4, 2, 4, 4)), torch.randn(2, 4, 2, 4, 4)
    assert SafeDenoiser(bank).safe(video, video, 0.5)[1].posterior.shape == (2,)
    single_frames = Bank(torch.randn(3, 4, 1, 4, 4))  # what a video VAE makes of one picture
    assert SafeDenoiser(single_frames).safe(video, video, 0.5)[1].posterior.shape == (4,)


@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (2, 16, 4, 4), (2, 4, 3, 5, 4), (2, 4, 64)])
def test_another_latent_size_is_one_clear_error(shape):
    denoiser = SafeDenoiser(Bank(torch.randn(3, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"bank latents are \(4, 4, 4\) but the sampler runs at .*; rebuild the bank with this"):
        denoiser.safe(torch.zeros(shape), torch.zeros(shape), 1.0)


@pytest.mark.parametrize("wrong, message", [
    (dict(method="magic"), "method is 'magic'; choose one of safe_denoiser"),
    (dict(weight="magic"), "weight is 'magic'; choose one of auto"),
    (dict(weight="evidence"), "weight 'evidence' needs a reference bank"),
    (dict(weight="retain"), "weight 'retain' needs a retain bank"),
    (dict(reference=Bank(torch.zeros(2, 4, 5, 5))), r"reference bank latents are \(4, 5, 5\) but the negation bank's are \(4, 4, 4\)"),
    (dict(prior=1.0), "prior is 1.0"),
    (dict(parts=2), "parts is 2, and only safe_denoiser with a reference or retain bank can tell which part"),
    (dict(parts=3, method="spell", retain=Bank(torch.zeros(2, 4, 4, 4))), "parts is 3, and only safe_denoiser"),
])
def test_wrong_settings_say_what_to_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        SafeDenoiser(Bank(torch.zeros(2, 4, 4, 4)), **wrong)


def test_auto_takes_the_best_that_the_banks_allow():
    x, denoised, empty = torch.randn(3, 2, 4, 4, 4)
    bank, retain, reference = (Bank(torch.randn(5, 4, 4, 4)) for _ in range(3))
    for banks, unconditional, weight in (({}, None, "gate"), ({}, empty, "unconditional"), (dict(retain=retain), empty, "retain"),
                                         (dict(reference=reference), empty, "evidence"),
                                         (dict(retain=retain, reference=reference), None, "evidence")):
        auto, named = (SafeDenoiser(bank, weight=w, **banks).safe(x, denoised, 0.8, unconditional=unconditional)[0]
                       for w in ("auto", weight))
        assert torch.equal(auto, named), weight


def test_the_gate_opens_for_bank_pictures_and_shuts_for_others():
    generator = torch.Generator().manual_seed(7)  # not 0, with which the gate calibrates itself
    direction = torch.randn(4, 4, 4, generator=generator)
    bank = Bank(direction + 0.3 * torch.randn(60, 4, 4, 4, generator=generator))
    fresh = direction + 0.3 * torch.randn(200, 4, 4, 4, generator=generator)
    noise = torch.randn(200, 4, 4, 4, generator=generator)
    for sigma in (0.1, 0.5, 2.0):
        inside = SafeDenoiser(bank).safe(fresh + sigma * noise, fresh, sigma)[1].posterior
        outside = SafeDenoiser(bank).safe(-fresh + sigma * noise, -fresh, sigma)[1].posterior
        assert inside.mean() > 0.6 and outside.mean() < 0.05, sigma


def test_no_global_random_numbers_and_no_change_of_arguments(settings):
    bank, x, denoised = Bank(torch.randn(7, 4, 4, 4)), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    state, copies = torch.get_rng_state(), (x.clone(), denoised.clone(), bank.latents.clone())
    first = SafeDenoiser(bank, **settings).safe(x, denoised, 0.8)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, denoised, bank.latents)))
    assert torch.equal(first, SafeDenoiser(bank, **settings).safe(x, denoised, 0.8)[0])
