"""A bank as one Gaussian: mean and shrunk covariance, which need no more than the bank's Gram matrix; and what two of them tell of r."""
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bank import Bank
from .prediction import Correction, Prediction

TRUST = 0.35  # of the log ratio of two banks' Gaussians, which few pictures in many dimensions make too sure
RANGE = -8.0, 3.0  # of what that ratio may add to the log odds
TINY = 1e-20
ITEMS = 512  # of a larger bank that are looked at: a covariance is told by few, and their Gram matrix is decomposed


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, Sigma) with Sigma = V diag(variances) V^T + rest I, in flat latents.

    Args:
        mean: (D,). axes: V^T, orthonormal rows (K, D), K < N. variances: along the axes beyond `rest`, (K,). rest: along all others.
        count: of the pictures that told it; with weights, of as many equal ones as tell as much.
        size: of the D numbers those that vary at all: inside a mask, those of the mask.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor
    count: Tensor
    size: int

    @property
    def chance(self) -> Tensor:
        """Expected <mean - m, whitened(mean - m)> = rest tr(Sigma^-1 Sigma) / count for the true mean m: what few pictures get wrong."""
        return self.rest * self.size / self.count

    @property
    def level(self) -> Tensor:
        """tr Sigma / D: the variance of one number."""
        return self.rest + self.variances.sum() / self.size

    def _filtered(self, v: Tensor, along: Tensor, others: Tensor) -> Tensor:
        """v with its part along each axis multiplied by `along` (..., K), and what is left by `others` (..., 1)."""
        return others * v + ((along - others) * (v @ self.axes.T)) @ self.axes

    def whitened(self, v: Tensor) -> Tensor:
        """Sigma^-1 v, times `rest`, for v (B, D): what all pictures differ in counts less, what few differ in counts."""
        one = torch.ones_like(self.rest)
        return self._filtered(v, self.rest / (self.variances + self.rest), one)

    def denoised(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        """E[x0 | x] = mean + alpha Sigma (alpha^2 Sigma + sigma^2 I)^-1 (x - alpha mean), (B, D): the Wiener filter.

        Args:
            x: (B, D). sigma, alpha: (B,).
        """
        noise, scale = sigma.square()[:, None], alpha[:, None]
        whole = self.variances + self.rest
        gains = (scale * one / (scale.square() * one + noise) for one in (whole, self.rest))
        return self.mean + self._filtered(x - scale * self.mean, *gains)

    def log_density(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        """log N(x; alpha mean, alpha^2 Sigma + sigma^2 I) up to what all Gaussians of this size share at this noise level, (B,)."""
        noise, scale = sigma.square()[:, None], alpha[:, None]
        z = x - scale * self.mean
        along, all_along = z @ self.axes.T, scale.square() * (self.variances + self.rest) + noise  # (B, K)
        others = scale.square() * self.rest + noise  # (B, 1)
        squares = (z.square().sum(1) - along.square().sum(1)) / others[:, 0] + (along.square() / all_along).sum(1) - self.size
        logs = (all_along / noise).log().sum(1) + (self.size - len(self.axes)) * (others / noise).log()[:, 0]
        return -0.5 * (squares + logs)


def fit(bank: Bank) -> Gaussian | None:
    """The bank's mean and Ledoit-Wolf covariance, or None where its items do not differ.

        Sigma = (1 - delta) S + delta m I,   m = tr S / D,   delta = min(1, (sum_n w_n^2 |z_n|^4 - sum_n w_n^2 |S|_F^2) / |S - m I|_F^2)

    with z_n = y_n - mean and weights w_n. Source: Ledoit and Wolf, J. Multivariate Analysis 88 (2004), from the Gram matrix <z_n, z_m>,
    so that nothing of size D x D is ever made.
    """
    some = bank.sample(ITEMS)
    y = some.latents[:].flatten(1).to(torch.promote_types(some.latents.dtype, torch.float32))
    weights = some.log_weights.to(y).softmax(0)
    mean = weights @ y
    z = weights.sqrt()[:, None] * (y - mean)
    values, vectors = torch.linalg.eigh(z @ z.T)
    kept = values > torch.maximum(values[-1], mean.square().sum() * torch.finfo(y.dtype).eps) * 1e-5
    values, vectors = values[kept], vectors[:, kept]
    if not len(values):
        return None
    size = int((y != y[:1]).any(0).sum())
    level, squares = values.sum() / size, values.square().sum()
    noise = z.square().sum(1).square().sum() - weights.square().sum() * squares
    spread = squares - level.square() * size
    shrink = (noise / spread.clamp_min(1e-30)).clamp(1e-3, 1)  # never 0: directions that no item shows have a variance too
    return Gaussian(mean, (vectors / values.sqrt()).T @ z, (1 - shrink) * values, shrink * level,
                    1 / weights.square().sum(), size)


def along(v: Tensor, axis: Tensor, metric: Gaussian | None = None, error: Tensor | float = 0.0) -> Tensor:
    """(<v, axis>_M - error) / (|axis|_M^2 - error), (B,), with M = Sigma^-1 of `metric`, else I; at most half of the length is an error."""
    measured = axis if metric is None else metric.whitened(axis)
    part, whole = ((y * measured).sum(1) for y in (v, axis))
    error = torch.minimum(torch.as_tensor(error).to(whole), whole / 2)
    return (part - error) / (whole - error).clamp_min(TINY)


@dataclass(frozen=True, eq=False)
class ByGaussians:
    """The safe denoiser of two banks as Gaussians: the cautious one, for banks that a distance cannot tell apart.

        log r = log prior + TRUST (log p_u(x) - log p_other(x)) + evidence (t - 1/2),   r <= posterior_max
        safe_denoised = denoised + min(r / (1 - r), 1) (E_other - E_u)

    with E_u and E_other of one covariance, so that E_other - E_u = sigma^2 (alpha^2 Sigma + sigma^2 I)^-1 (mu_other - mu_u) is the whitened
    difference of the means, and fades where x tells more than they do; t the share of mu_u in what the prompt asks for beyond the
    unconditional prediction, in the same metric. Source: arXiv:2502.08011, Thm 3.2. On photographs, against the exact E_safe, kernels are
    up to 30 times as wrong as doing nothing, this at most 1.02 times over all x (`benchmarks/photographs.py`); nor does it do much.
    """

    unsafe: Gaussian
    other: Gaussian
    prior: float = 0.3
    evidence: float = 3.0
    posterior_max: float = 0.95

    def log_ratio(self, p: Prediction) -> Tensor:
        """TRUST (log p_u(x) - log p_other(x)), within RANGE, (B,)."""
        ratio = self.unsafe.log_density(p.x, p.sigma, p.alpha) - self.other.log_density(p.x, p.sigma, p.alpha)
        return (TRUST * ratio).clamp(*RANGE)

    def correct(self, p: Prediction) -> Correction:
        """The correction at strength 1."""
        other = self.other.denoised(p.x, p.sigma, p.alpha)
        axis = replace(self.other, mean=self.unsafe.mean).denoised(p.x, p.sigma, p.alpha) - other
        asked, zero = (p.denoised, other) if p.unconditional is None else (p.conditional, p.unconditional)
        t = along(asked - zero, axis, self.other)
        found = (math.log(self.prior) + self.log_ratio(p) + self.evidence * (t.clamp(-1, 2) - 0.5)).exp()
        r = found.clamp_max(self.posterior_max)
        return Correction.unasked((r / (1 - r)).clamp_max(1)[:, None] * -axis, r, found > self.posterior_max)
