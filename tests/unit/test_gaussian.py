"""A bank as one Gaussian, against brute force with whole D x D matrices in double precision."""
import math

import pytest
import torch

from safe_denoiser import Bank
from safe_denoiser.density.gaussian import Natural, fit

F64 = torch.float64


def latents(n=12, d=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    spread, mean = torch.linspace(0.2, 3, d, dtype=F64), torch.randn(d, generator=draw, dtype=F64)
    return mean + spread * torch.randn(n, 1, d, generator=draw, dtype=F64)


def covariance(g):
    return g.axes.T @ torch.diag(g.variances) @ g.axes + g.rest * torch.eye(len(g.mean), dtype=F64)


@pytest.mark.parametrize("weights", [None, torch.linspace(1, 3, 12, dtype=F64)])
def test_ledoit_wolf(weights):
    y = latents().flatten(1)
    g = fit(Bank(y[:, None], weights=weights))
    w = torch.full((12,), 1 / 12, dtype=F64) if weights is None else weights / weights.sum()
    mean = w @ y
    z = y - mean
    S = (w[:, None] * z).T @ z
    m = S.trace() / 20
    identity = torch.eye(20, dtype=F64)
    each = torch.einsum("n,nij->", w.square(), (z[:, :, None] * z[:, None] - S).square())  # sum_n w_n^2 |z_n z_n^T - S|^2, written out
    each = each if weights is None else (w.square() * z.square().sum(1).square()).sum() - w.square().sum() * S.square().sum()
    shrink = (each / (S - m * identity).square().sum()).clamp(1e-3, 1)
    torch.testing.assert_close(g.mean, mean)
    torch.testing.assert_close(covariance(g), (1 - shrink) * S + shrink * m * identity, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(g.level, m)
    assert 0 < float(shrink) < 1 and float(g.count) == pytest.approx(float(1 / w.square().sum()))


def test_whitened_wiener_and_density():
    g, x = fit(Bank(latents())), latents(5, seed=3).flatten(1)
    sigma, alpha = torch.tensor([0.1, 0.5, 1.0, 2.0, 30.0], dtype=F64), torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0], dtype=F64)
    C = covariance(g)
    torch.testing.assert_close(g.whitened(x), g.rest * torch.linalg.solve(C, x.T).T)
    whole = [torch.distributions.MultivariateNormal(a * g.mean, a * a * C + s * s * torch.eye(20, dtype=F64)) for s, a in zip(sigma, alpha)]
    wiener = [g.mean + a * C @ torch.linalg.solve(d.covariance_matrix, y - a * g.mean) for a, d, y in zip(alpha, whole, x)]
    torch.testing.assert_close(g.denoised(x, sigma, alpha), torch.stack(wiener))
    other = fit(Bank(latents(9, seed=7)))
    whole2 = [torch.distributions.MultivariateNormal(a * other.mean, a * a * covariance(other) + s * s * torch.eye(20, dtype=F64))
              for s, a in zip(sigma, alpha)]
    ratio = torch.stack([p.log_prob(y) - q.log_prob(y) for p, q, y in zip(whole, whole2, x)])
    torch.testing.assert_close(g.log_density(x, sigma, alpha) - other.log_density(x, sigma, alpha), ratio, rtol=1e-7, atol=1e-7)


def test_single_precision_in_high_dimension():
    """At 4 x 64 x 64 and high noise the ratio of two densities survives single precision."""
    draw = torch.Generator().manual_seed(0)
    banks = [Bank(torch.randn(40, 4, 64, 64, generator=draw) + shift) for shift in (0.0, 0.05)]
    x = 14.0 * torch.randn(3, 4 * 64 * 64, generator=draw)
    sigma, alpha = torch.full((3,), 14.0), torch.ones(3)
    single, double = ([fit(b.to(dtype=dtype)) for b in banks] for dtype in (torch.float32, F64))
    found, wanted = ((p.log_density(x.to(t), sigma.to(t), alpha.to(t)) - q.log_density(x.to(t), sigma.to(t), alpha.to(t)))
                     for (p, q), t in ((single, torch.float32), (double, F64)))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=2e-2)


def test_chance_is_what_a_mean_of_few_gets_wrong():
    """Over many draws of 30 pictures of a known Gaussian."""
    draw = torch.Generator().manual_seed(0)
    scale, errors, told = torch.linspace(0.5, 2, 40, dtype=F64), [], []
    for _ in range(60):
        g = fit(Bank((torch.randn(30, 40, generator=draw, dtype=F64) * scale)[:, None]))
        errors.append(float((g.mean * g.whitened(g.mean)).sum() / g.rest)), told.append(float(g.chance / g.rest))
    assert sum(told) / sum(errors) == pytest.approx(1, rel=0.35)


@pytest.mark.parametrize("bank", [Bank(torch.ones(1, 2, 3)), Bank(torch.ones(4, 2, 3))])
def test_items_that_do_not_differ_tell_nothing(bank):
    assert fit(bank) is None


def split(shift, n=40, seed=0):
    """A bank and a reference bank of pictures of one covariance, their means `shift` apart in some numbers."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 2, 64).view(1, 8, 8)
    banks = [spread * torch.randn(n, 1, 8, 8, generator=draw) for _ in range(2)]
    banks[0][:, :, :2] += shift
    return [Bank(y) for y in banks]


def test_banks_are_trusted_where_distances_tell_them_apart():
    """The default: kernels where they do, Gaussians where not; what is told it is so is not asked."""
    from safe_denoiser import SafeDenoiser

    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    for shift, weight in ((0.3, "gaussian"), (6.0, "evidence")):
        bank, reference = split(shift)
        denoiser = SafeDenoiser(bank, reference=reference)
        assert denoiser.view.sees == (weight == "evidence")
        wanted = SafeDenoiser(bank, reference=reference, weight=weight).safe(x, x / 2, 1.0)[0]
        torch.testing.assert_close(denoiser.safe(x, x / 2, 1.0)[0], wanted)
    assert SafeDenoiser(bank, reference=reference, trusted=False).safe(x, x / 2, 1.0)[0].allclose(
        SafeDenoiser(bank, reference=reference, weight="gaussian").safe(x, x / 2, 1.0)[0])
    assert not SafeDenoiser(bank).view.sees, "alone, nothing says whether it may be trusted"
    bank, reference = split(0.0)
    memorised = Bank(torch.cat([reference.latents, bank.latents[:4] + 0.01]))
    assert not SafeDenoiser(bank, reference=reference).view.sees and SafeDenoiser(bank, reference=memorised).view.sees


def test_trust_in_a_large_bank_is_judged_on_a_part_of_it():
    """No table of all pairs, and no more of a stored bank than is looked at."""
    from benchmarks.step_cost import peak_bytes
    from safe_denoiser import SafeDenoiser

    bank, reference = split(0.3, n=6000)
    denoiser = SafeDenoiser(bank, reference=reference)
    assert peak_bytes(lambda: denoiser.view.sees) < 6000 * 6000 * 4 / 4 and not denoiser.view.sees


def test_no_guidance_is_let_go_on_the_word_of_banks_that_see_nothing():
    """A prompt that lies right at E_u keeps its guidance, unless the banks can be told apart."""
    from safe_denoiser import SafeDenoiser

    bank, reference = split(0.3)
    x = torch.zeros(2, 1, 8, 8)
    asked, zero = (one.latents.mean(0).expand(2, -1, -1, -1) for one in (bank, reference))
    guided = zero + 9 * (asked - zero)
    kept, let_go = (SafeDenoiser(bank, reference=reference, weight="evidence", trusted=trusted).safe(
        x, guided, 50.0, unconditional=zero, conditional=asked)[0] for trusted in (False, True))
    torch.testing.assert_close(let_go - kept, zero - guided, rtol=1e-4, atol=1e-4)


def test_closed_form_of_two_gaussians():
    """E_other - E_u of one covariance is sigma^2 (alpha^2 Sigma + sigma^2)^-1 (mu_other - mu_u), and the push never exceeds it."""
    from safe_denoiser.prediction import Prediction
    from safe_denoiser.rules.by_gaussians import ByGaussians

    unsafe, other = (fit(bank.to(dtype=F64)) for bank in split(2.0))
    x, sigma, alpha = torch.randn(3, 64, dtype=F64), torch.full((3,), 0.8, dtype=F64), torch.full((3,), 0.6, dtype=F64)
    whole = 0.36 * covariance(other) + 0.64 * torch.eye(64, dtype=F64)
    difference = 0.64 * torch.linalg.solve(whole, other.mean - unsafe.mean)
    found = ByGaussians(unsafe, other).correct(Prediction(x, x, sigma, alpha))
    factor = (found.direction / difference)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=1e-6)
    r = found.posterior
    torch.testing.assert_close(factor[:, 0], (r / (1 - r)).clamp_max(1), rtol=1e-6, atol=1e-6)


def test_natural_pictures_have_power_1_over_1_plus_f_squared():
    """A wave of f cycles per side, mirrored at its ends, counts 1 + f^2 times, whatever the size."""
    for side, f in ((16, 1.0), (64, 1.0), (64, 4.0), (64, 2.5)):
        wave = torch.cos(torch.tensor(math.tau, dtype=F64) * f * (torch.arange(side, dtype=F64) + 0.5) / side)
        for item in ((2, side, 8), (2, 8, side), (2, 3, 8, side)):
            v = (wave[:, None] if item[1] == side else wave).expand(item).flatten()[None]
            whitened = Natural(item).whitened(v)
            assert float((v * whitened).sum() / v.square().sum()) == pytest.approx(1 + f * f, rel=0.03)
            torch.testing.assert_close(whitened, whitened.mean() + (1 + f * f) * v, rtol=0.05, atol=0.05)


def test_natural_pictures_are_a_metric_and_say_nothing_of_what_has_no_sides():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 2 * 6 * 7, generator=draw, dtype=F64)
    metric = Natural((2, 6, 7))
    torch.testing.assert_close((a * metric.whitened(b)).sum(1), (metric.whitened(a) * b).sum(1))
    assert ((a * metric.whitened(a)).sum(1) > a.square().sum(1)).all()
    for item in ((), (84,), (84, 1, 1)):
        assert torch.equal(Natural(item).whitened(a), a)
