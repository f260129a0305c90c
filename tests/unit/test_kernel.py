import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.step_cost import peak_bytes, published_rule
from safe_denoiser import posterior


def brute_force(x, latents, sigma, alpha, h, t, weights):
    """Equation by equation, one picture and one item at a time, in float64."""
    means, densities, all_weights = [], [], []
    for point in x.double().flatten(1):
        s2 = alpha**2 * h**2 + sigma**2
        logits = [math.log(w) - float((point - alpha * y).square().sum()) / (2 * t * s2)
                  for w, y in zip(weights, latents.double().flatten(1))]
        top = max(logits)
        total = sum(math.exp(value - top) for value in logits)
        w = [math.exp(value - top) / total for value in logits]
        mean = sum(value * y for value, y in zip(w, latents.double().flatten(1)))
        means.append((sigma**2 * mean + alpha * h**2 * point) / s2)
        densities.append(top + math.log(total))
        all_weights.append(w)
    return torch.stack(means).view(x.shape), torch.tensor(densities, dtype=torch.float64), torch.tensor(all_weights, dtype=torch.float64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("h, t", [(0.0, 1.0), (0.4, 8.0)])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("sigma", [0.03, 0.3, 1.0, 14.6])
def test_equals_a_brute_force_loop(sigma, flow, h, t, dtype, tolerance):
    if flow and sigma > 1:
        sigma = 0.999
    alpha = 1 - sigma if flow else 1.0
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(23, 4, 3, 5, generator=generator, dtype=dtype)
    weights = torch.rand(23, generator=generator, dtype=torch.float64) + 0.1
    weights /= weights.sum()
    noise = torch.randn(3, 4, 3, 5, generator=generator, dtype=dtype)
    x = alpha * (latents[:3] + 0.3 * noise.flip(0)) + sigma * noise
    got = posterior(x, latents, sigma, alpha, h, t, weights.log())
    mean, density, w = brute_force(x, latents, sigma, alpha, h, t, weights.tolist())
    assert got.mean.dtype == dtype and got.mean.shape == x.shape
    torch.testing.assert_close(got.mean.double(), mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.weights.double(), w.double(), rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(got.log_density.double(), density.double(), rtol=tolerance, atol=10 * tolerance)


def test_each_row_has_its_own_noise_level():
    latents, x = torch.randn(7, 2, 3, 3), torch.randn(4, 2, 3, 3)
    sigma, alpha = torch.tensor([0.2, 0.5, 0.7, 0.9]), torch.tensor([0.8, 0.5, 0.3, 0.1])
    together = posterior(x, latents, sigma, alpha, 0.3, 2.0)
    for i in range(4):
        alone = posterior(x[i:i + 1], latents, float(sigma[i]), float(alpha[i]), 0.3, 2.0)
        torch.testing.assert_close(together.mean[i:i + 1], alone.mean)
        torch.testing.assert_close(together.log_density[i:i + 1], alone.log_density)


def test_raw_exponents_would_underflow_but_the_posterior_does_not():
    """4 x 64 x 64 at low noise: every exp(-d^2 / 2 sigma^2) is 0 in fp32, the weights still sum to 1."""
    latents, x = torch.randn(5, 4, 64, 64), torch.randn(2, 4, 64, 64)
    got = posterior(x, latents, 0.1)
    assert (torch.exp(-torch.cdist(x.flatten(1), latents.flatten(1)).square() / 0.02) == 0).all()
    torch.testing.assert_close(got.weights.sum(1), torch.ones(2))
    assert torch.isfinite(got.mean).all() and torch.isfinite(got.log_density).all()


def test_a_single_item_is_the_posterior_mean():
    latents, x = torch.randn(1, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(posterior(x, latents, 0.5).mean, latents.expand(3, -1, -1, -1))


def test_half_precision_is_computed_in_single():
    latents, x = torch.randn(9, 4, 4, 4), torch.randn(2, 4, 4, 4)
    half = posterior(x.half(), latents.half(), 0.7)
    full = posterior(x.half().float(), latents.half().float(), 0.7)
    assert half.mean.dtype == torch.float32
    torch.testing.assert_close(half.mean, full.mean)


def test_arguments_stay_as_they_are():
    latents, x = torch.randn(9, 4, 4, 4), torch.randn(2, 4, 4, 4)
    before = latents.clone(), x.clone()
    posterior(x, latents, 0.7, 0.3, 0.4, 2.0)
    assert torch.equal(latents, before[0]) and torch.equal(x, before[1])


def test_an_x_that_is_not_finite_has_no_finite_mean_and_the_others_keep_theirs():
    latents, x = torch.randn(9, 4, 4, 4), torch.randn(3, 4, 4, 4)
    broken = x.clone()
    broken[1, 0, 0, 0] = math.nan
    for rows, finite in ((slice(None), [True, False, True]), (slice(1, 2), [False])):
        got = posterior(broken[rows], latents, 0.5).mean
        assert torch.isfinite(got).flatten(1).all(1).tolist() == finite
    torch.testing.assert_close(posterior(broken, latents, 0.5).mean[::2], posterior(x, latents, 0.5).mean[::2], rtol=1e-4, atol=1e-4)


def test_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"x is \(4, 2, 2\) but bank latents are \(4, 3, 3\)"):
        posterior(torch.zeros(1, 4, 2, 2), torch.zeros(5, 4, 3, 3), 1.0)


def near_and_far(n=120, d=16_384):
    """Half of the bank a cluster around its first item, as sets of one person or thing are."""
    latents = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    latents[1::2] = latents[:1] + 0.3 * latents[1::2]
    return latents


@pytest.mark.parametrize("t", [1.0, 8.0, 512.0])
@pytest.mark.parametrize("h", [0.0, 0.4])
@pytest.mark.parametrize("sigma", [0.03, 0.3, 1.0, 3.0, 14.6])
def test_at_the_size_of_a_latent_it_equals_double_precision(sigma, h, t):
    """4 x 64 x 64: distances are large and their differences small, whether one item weighs, or ten, or all."""
    latents = near_and_far()
    x = latents[[0, 1, 2]] + sigma * torch.randn(3, latents.shape[1], generator=torch.Generator().manual_seed(2))
    got = posterior(x, latents, sigma, 1.0, h, t)
    mean, density, w = brute_force(x, latents, sigma, 1.0, h, t, [1 / len(latents)] * len(latents))
    assert (got.mean - mean).norm() < 1e-5 * mean.norm()
    torch.testing.assert_close(got.weights.double(), w, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.log_density.double(), density, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_what_the_mean_leaves_out_is_bounded_and_reported(sigma):
    latents = near_and_far(200)
    x = latents[:2] + sigma * torch.randn(2, latents.shape[1], generator=torch.Generator().manual_seed(2))
    exact, _, w = brute_force(x, latents, sigma, 1.0, 0.4, 40.0, [1 / 200] * 200)
    for omit in (1e-6, 1e-2):
        got = posterior(x, latents, sigma, 1.0, 0.4, 40.0, omit=omit)
        assert (got.omitted >= 0).all() and (got.omitted <= omit + 1e-6).all()
        torch.testing.assert_close(got.weights.sum(1), 1 + got.omitted)
        assert ((got.mean - exact).norm(dim=1) <= (2 * omit + 1e-5) * latents.norm(dim=1).max()).all()
    assert sigma != 1.0 or (posterior(x, latents, sigma, 1.0, 0.4, 40.0, omit=1e-2).omitted > 1e-5).any(), "something is left out here"


@pytest.mark.parametrize("sigma, t", [(0.3, 1.0), (3.0, 512.0)], ids=["concentrated", "spread"])
def test_no_temporary_is_as_large_as_the_bank(sigma, t):
    latents, norms = torch.randn(600, 4096), torch.full((600,), 4096.0)
    x = latents[:1] + sigma * torch.randn(1, 4096)
    assert 0 < peak_bytes(lambda: posterior(x, latents, sigma, 1.0, 0.4, t, squared_norms=norms)) < 0.05 * latents.numel() * 4
    assert peak_bytes(lambda: published_rule(x, latents)) > 2 * latents.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_a_half_precision_bank_is_summed_in_single_precision(dtype, sigma):
    latents = near_and_far(300, 4096).to(dtype)
    x = latents[:2].float() + sigma * torch.randn(2, 4096)
    half, full = (posterior(x, bank, sigma, 1.0, 0.4, 100.0) for bank in (latents, latents.float()))
    torch.testing.assert_close(half.mean, full.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half.weights, full.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_on_a_gpu_nothing_makes_the_host_wait(stored):
    """Without a GPU: tensors that pretend to be on one and hold no numbers, so that whatever needs a number on the host raises."""
    with FakeTensorMode():
        x, latents = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(9, 4, 8, 8, device="cuda", dtype=stored)
        sigma = torch.rand(2, device="cuda")
        got = posterior(x, latents, sigma, 1 - sigma, 0.4, 4.0, torch.zeros(9, device="cuda"), torch.ones(9, device="cuda"))
        assert got.mean.shape == x.shape and got.mean.device.type == got.omitted.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            bool(got.omitted.any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_real_gpu_neither(stored):
    x, latents = torch.randn(2, 4, 64, 64, device="cuda"), torch.randn(515, 4, 64, 64, device="cuda", dtype=stored)
    norms, log_weights, sigma = latents.flatten(1).float().square().sum(1), torch.zeros(515, device="cuda"), torch.rand(2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = posterior(x, latents, sigma, 1 - sigma, 0.4, 4.0, log_weights, norms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = posterior(x.cpu(), latents.cpu(), sigma.cpu(), 1 - sigma.cpu(), 0.4, 4.0, log_weights.cpu(), norms.cpu())
    torch.testing.assert_close(got.mean.cpu(), wanted.mean, rtol=1e-3, atol=1e-3)
