import math

import pytest
import torch

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


def test_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"x is \(4, 2, 2\) but bank latents are \(4, 3, 3\)"):
        posterior(torch.zeros(1, 4, 2, 2), torch.zeros(5, 4, 3, 3), 1.0)
