"""Kernel density of a bank under the forward process: the only code that reads the whole bank."""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """What a noisy x says about the bank.

    Args:
        mean: E[x0 | x] under the bank, shaped like x (B, *shape).
        log_density: log p(x) under the bank, (B,), up to a constant shared by banks of equal D, bandwidth and temperature.
        weights: P(item n | x), (B, N); rows sum to 1.
    """

    mean: Tensor
    log_density: Tensor
    weights: Tensor


def rows(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a (B,) tensor as (B, 1) or (1, 1) in the dtype and on the device of `like`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1)


def squared_distances(x: Tensor, latents: Tensor, alpha: Tensor, squared_norms: Tensor | None = None) -> Tensor:
    """|x - alpha y_n|^2 = |x|^2 - 2 alpha x.y_n + alpha^2 |y_n|^2 for flat x (B, D) and y (N, D): (B, N), one matmul.

    The nearest few, which carry the weight, are computed again as a sum of squares: the expansion loses small distances
    between large numbers.
    """
    norms = latents.square().sum(1) if squared_norms is None else squared_norms.to(x.dtype)
    d2 = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ latents.T) + alpha.square() * norms  # (B, N)
    near = d2.topk(min(8, len(latents)), largest=False).indices  # (B, K)
    return d2.clamp_min(0).scatter(1, near, (x[:, None] - alpha[:, :, None] * latents[near]).square().sum(2))


def posterior(x: Tensor, latents: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0, bandwidth: float = 0.0,
              temperature: float = 1.0, log_weights: Tensor | None = None, squared_norms: Tensor | None = None) -> Posterior:
    """Posterior mean, weights and density of a bank, each item blurred by a Gaussian kernel.

        s^2   = alpha^2 h^2 + sigma^2
        l_n   = log pi_n - |x - alpha y_n|^2 / (2 T s^2)
        w     = softmax(l),  ybar = sum_n w_n y_n,  log p(x) = logsumexp(l)
        mean  = (sigma^2 ybar + alpha h^2 x) / s^2

    Source: arXiv:2502.08011, Eq. 6 (h = 0, T = 1); the bandwidth h and temperature T are ours.

    Args:
        x: noisy latents (B, *shape), `x = alpha x0 + sigma eps`.
        latents: bank (N, *shape), or of any shape with as many numbers per item.
        sigma: noise scale, a number or (B,).
        alpha: signal scale, a number or (B,): 1 for EPS, V and EDM models, 1 - sigma for flow models.
        bandwidth: h, kernel width in the units of the latents.
        temperature: T; 1 is exact, more spreads the weights over more items (in high D, T = 1 picks one).
        log_weights: log pi_n, (N,); None is 1/N for each.
        squared_norms: |y_n|^2, (N,), when already known.

    Raises:
        ValueError: x and the bank's items differ in size.
    """
    flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))  # (B, D)
    bank = latents.flatten(1).to(flat.dtype)  # (N, D)
    if flat.shape[1] != bank.shape[1]:
        raise ValueError(f"x is {tuple(x.shape[1:])} but bank latents are {tuple(latents.shape[1:])}; they must be of one size")
    sigma, alpha = rows(sigma, flat), rows(alpha, flat)
    s2 = (alpha.square() * bandwidth**2 + sigma.square()).clamp_min(1e-12)
    logits = -squared_distances(flat, bank, alpha, squared_norms) / (2 * temperature * s2)  # (B, N)
    logits = logits - torch.log(logits.new_tensor(len(bank))) if log_weights is None else logits + log_weights.to(logits.dtype)
    log_density = logits.logsumexp(1)
    weights = (logits - log_density[:, None]).exp()
    mean = (sigma.square() * (weights @ bank) + alpha * bandwidth**2 * flat) / s2
    return Posterior(mean.view_as(x), log_density, weights)
