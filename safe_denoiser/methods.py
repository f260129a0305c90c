"""The methods of the field, one function per published equation; all on flat tensors, denoised and means (B, D), weights (B,)."""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank.lazy_latents import LazyLatents
from .density.kernel import Posterior, read, rows, rows_per_block, squared_distances


def log_ratio(unsafe: Posterior, other: Posterior, prior: float) -> Tensor:
    """log prior + log p_u(x) - log p_other(x), (B,): log r where `other` is all the model makes. Source: arXiv:2502.08011, Thm 3.2."""
    return math.log(prior) + unsafe.log_density - other.log_density


def log_odds(unsafe: Posterior, retain: Posterior, prior: float) -> Tensor:
    """logit(prior) + log p_u(x) - log p_retain(x), (B,): log r / (1 - r) where a picture is one or the other (arXiv:2502.08011)."""
    return math.log(prior / (1 - prior)) + unsafe.log_density - retain.log_density


def projection(denoised: Tensor, unsafe_denoised: Tensor, other_denoised: Tensor, error: Tensor | float = 0.0) -> Tensor:
    """t = <denoised - E_other, E_u - E_other> / (|E_u - E_other|^2 - error), (B,): 0 at the other mean, 1 at the unsafe mean. Ours.

    `error` (B,) is what the chance of the draw adds to the squared distance of two means of few pictures; at most half of it counts.
    """
    axis = unsafe_denoised - other_denoised
    length = axis.square().sum(1)
    return ((denoised - other_denoised) * axis).sum(1) / torch.maximum(length - error, length / 2).clamp_min(1e-12)


def pull(conditional: Tensor, unconditional: Tensor, unsafe_denoised: Tensor, other_denoised: Tensor,
         error: Tensor | float = 0.0) -> Tensor:
    """(t_c - t_e) / (1 - t_e), (B,): how far the prompt pulls from the unconditional prediction (0) to the unsafe mean (1). Ours.

    t_c and t_e are the projections of the conditional prediction, without guidance, and of the unconditional one. At sigma = 1,
    where x tells nothing, t_c is the share of unsafe pictures among what the prompt gives. The denominator is at least 1/2: a
    negative prompt that itself asks for what the set shows makes no prompt look unsafe.
    """
    t_c, t_e = (projection(y, unsafe_denoised, other_denoised, error) for y in (conditional, unconditional))
    return (t_c - t_e) / (1 - t_e).clamp_min(0.5)


def from_reference(unsafe_denoised: Tensor, reference_denoised: Tensor, r: Tensor, most: Tensor | float = math.inf) -> Tensor:
    """r / (1 - r) (E_ref - E_u): E_safe - E_data by arXiv:2502.08011, Thm 3.2, since E_ref = (1 - r) E_safe + r E_u.

    `most` (B,) is a ceiling of r / (1 - r), see `mirror`.
    """
    return (r / (1 - r)).clamp_max(most)[:, None] * (reference_denoised - unsafe_denoised)


def mirror(t: Tensor, prior: float) -> Tensor:
    """2 (t - t_safe), (B,), t_safe = -prior / (1 - prior): the factor of E_ref - E_u that mirrors a prediction at E_safe. Ours.

    t is its `projection`. Where r is uncertain r / (1 - r) may be anything; a prediction that is thrown further beyond E_safe than it
    lay before it is no picture any more.
    """
    return 2 * (t + prior / (1 - prior)).clamp_min(0)


def from_retain(unsafe_denoised: Tensor, retain_denoised: Tensor, r: Tensor) -> Tensor:
    """r (E_retain - E_u): E_safe - E_data by arXiv:2502.08011, Thm 3.2, since E_data = (1 - r) E_retain + r E_u."""
    return r[:, None] * (retain_denoised - unsafe_denoised)


def from_beta(pushed: Tensor, unsafe_denoised: Tensor, beta: Tensor) -> Tensor:
    """beta (pushed - E_u): arXiv:2502.08011, Thm 3.2, as printed; `pushed` is the guided prediction, or the unconditional one (Eq. 8)."""
    return beta[:, None] * (pushed - unsafe_denoised)


def triangle(denoised: Tensor, unsafe_denoised: Tensor, reach: Tensor) -> Tensor:
    """beta = max(0, reach / |denoised - E_u| - 1), (B,): moves a prediction that comes nearer to E_u than `reach` (B,) back to it. Ours."""
    return F.relu(reach / (denoised - unsafe_denoised).norm(dim=1).clamp_min(1e-12) - 1)


def typicality(unsafe: Posterior, mean: Tensor, spread: Tensor) -> Tensor:
    """How ordinary x looks among noised bank items, (B,): 1 at or above their mean log density, else twice the normal tail. Ours."""
    return torch.erfc((mean - unsafe.log_density).clamp_min(0) / spread / math.sqrt(2))


def tracked(log_r: Tensor, before: tuple[Tensor, ...], x: Tensor, sigma: Tensor, tau: float, log_max: float) -> Tensor:
    """Posterior r carried along the trajectory from noise level t to s, by how well E_u and E_d foretold x_s (alpha = 1).

        ancestral:      log r += tau (|x_s - mu_d|^2 - |x_s - mu_u|^2) / (2 v),   mu = A x_t + (1 - A) E,
                        A = s^2 / t^2,   v = s^2 (t^2 - s^2) / t^2
        deterministic:  log r += tau (s - t) d log r / dt,   u = (x_s - x_t) / (s - t),
                        d log r / dt = (trCov_u - trCov_d + |E_u - x_t|^2 - |E_d - x_t|^2) / t^3 + (E_u - E_d) . u / t^2

    Which of the two a row takes is read off the noise that the sampler added: |x_s - mu_d|^2 is near v D, or near 0.
    Source: dynamic negative guidance, arXiv:2410.14398, Eq. 9 (ancestral); the deterministic form is ours.

    Args:
        log_r: (B,). before: x_t (B, D), t (B,), E_d, E_u (B, D) and trCov_u - trCov_d (B,) of the previous call.
        x, sigma: x_s (B, D) and s (B,), with s < t. tau: well below 1 in high D. log_max: ceiling of log r.
    """
    x_t, t, e_d, e_u, excess = before
    a, v = (sigma / t).square(), sigma.square() * (1 - (sigma / t).square())
    mu_d, mu_u = (a[:, None] * x_t + (1 - a)[:, None] * e for e in (e_d, e_u))
    miss_d, miss_u = ((x - mu).square().sum(1) for mu in (mu_d, mu_u))
    jump = (miss_d - miss_u) / (2 * v)
    u = (x - x_t) / (sigma - t)[:, None]
    slope = (excess + (e_u - x_t).square().sum(1) - (e_d - x_t).square().sum(1)) / t**3 + ((e_u - e_d) * u).sum(1) / t**2
    noisy = miss_d > 0.5 * v * x.shape[1]
    return (log_r + tau * torch.where(noisy, jump, slope * (sigma - t))).clamp_max(log_max)


def weighed(query: Tensor, latents: Tensor | LazyLatents, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What each item weighs by its squared distance, f_n = weigh(|query - y_n|^2), (B, N), and sum_n f_n y_n, (B, D).

    A bank on another device, in half precision or on disk is read once, in blocks; one that lies ready is one block.
    """
    count, total = rows_per_block(latents, query)[1], torch.zeros_like(query)
    factors = query.new_empty(len(query), len(latents))  # in one piece: small ones would lie between the blocks' memory
    for start in range(0, len(latents), count):
        block = read(latents, start, start + count, query)
        part = factors.narrow(1, start, len(block)).copy_(weigh(squared_distances(query, block, rows(1.0, query))))
        total.addmm_(part, block)
    return factors, total


def spell(denoised: Tensor, latents: Tensor | LazyLatents, radius: float) -> tuple[Tensor, Tensor]:
    """SPELL: sum_n relu(radius / |denoised - y_n| - 1) (denoised - y_n). Source: arXiv:2410.06025, Eq. 8.

    Args:
        denoised: (B, D). latents: (N, D). radius: of each shield, latent L2.

    Returns:
        direction (B, D) and each item's factor (B, N).
    """
    factor, total = weighed(denoised, latents, lambda d2: F.relu(radius / d2.sqrt().clamp_min(1e-12) - 1))
    return factor.sum(1, keepdim=True) * denoised - total, factor


def sgf(denoised: Tensor, latents: Tensor | LazyLatents, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Safety-guided flow: (2 / h^2) Z (denoised - sum_n w_n y_n), up the MMD potential, away from the set.

    k_n = exp(-|denoised - y_n|^2 / (2 h^2)), Z = mean k, w = k / sum k. Source: arXiv:2603.13300; its code moves the other way.

    Args:
        denoised: (B, D). latents: (N, D). bandwidth: h, latent L2.

    Returns:
        direction (B, D) and the kernel values (B, N).
    """
    squared = max(bandwidth, 1e-12) ** 2  # of items that are all alike it is 0
    kernel, total = weighed(denoised, latents, lambda d2: (-d2 / (2 * squared)).exp())
    mean = total / kernel.sum(1, keepdim=True).clamp_min(1e-30)
    return 2 / squared * kernel.mean(1, keepdim=True) * (denoised - mean), kernel


def official(denoised: Tensor, latents: Tensor | LazyLatents, bandwidth: float, threshold: float, query: Tensor) -> tuple[Tensor, Tensor]:
    """The published code's rule: k_n = exp(-|query - y_n| / (2 bandwidth^2)); minus the weighted mean where the gate opens.

    Source: the authors' implementation of arXiv:2502.08011, restated. Un-squared distance, no beta, no gain on `denoised`.

    Args:
        denoised: (B, D). latents: (N, D), normalised per location. threshold: the gate opens where sum_n k_n + 1e-8 exceeds it.
        query: where the distance is measured (B, D): `denoised`, or in the SD3 variant `denoised` normalised per location.

    Returns:
        direction (B, D), zero where the gate is shut, and the kernel values (B, N).
    """
    kernel, total = weighed(query, latents, lambda d2: (-d2.sqrt() / (2 * bandwidth**2)).exp())
    sums = kernel.sum(1, keepdim=True) + 1e-8
    return torch.where(sums > threshold, -total / sums, 0.0), kernel
