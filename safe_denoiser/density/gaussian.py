"""A bank as one Gaussian: mean and shrunk covariance, which need no more than the bank's Gram matrix."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import Bank

TINY = 1e-20
ITEMS = 512  # of a larger bank that are looked at: a covariance is told by few, and their Gram matrix is decomposed


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, Sigma) with Sigma = V diag(variances) V^T + rest I, in flat latents.

    Args:
        mean: (D,). axes: V^T, orthonormal rows (K, D), K < N. variances: along the axes beyond `rest`, (K,). rest: along all others.
        count: the effective number of pictures, 1 / sum w_n^2.
        size: how many of the D numbers vary at all; inside a mask, those of the mask.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor
    count: Tensor
    size: int

    @property
    def chance(self) -> Tensor:
        """Expected <mean - m, whitened(mean - m)> = rest tr(Sigma^-1 Sigma) / count for the true mean m: the error of few pictures."""
        return self.rest * self.size / self.count

    @property
    def level(self) -> Tensor:
        """tr Sigma / D: the variance of one number."""
        return self.rest + self.variances.sum() / self.size

    def _filtered(self, v: Tensor, along: Tensor, others: Tensor) -> Tensor:
        """v with its part along each axis multiplied by `along` (..., K), and what is left by `others` (..., 1)."""
        return others * v + ((along - others) * (v @ self.axes.T)) @ self.axes

    def whitened(self, v: Tensor) -> Tensor:
        """rest Sigma^-1 v, for v (B, D): the more pictures vary along a direction, the less it counts."""
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
        """log N(x; alpha mean, alpha^2 Sigma + sigma^2 I) up to a constant that is the same for all Gaussians of this size, (B,)."""
        noise, scale = sigma.square()[:, None], alpha[:, None]
        z = x - scale * self.mean
        along, all_along = z @ self.axes.T, scale.square() * (self.variances + self.rest) + noise  # (B, K)
        others = scale.square() * self.rest + noise  # (B, 1)
        squares = (z.square().sum(1) - along.square().sum(1)) / others[:, 0] + (along.square() / all_along).sum(1) - self.size
        logs = (all_along / noise).log().sum(1) + (self.size - len(self.axes)) * (others / noise).log()[:, 0]
        return -0.5 * (squares + logs)


@dataclass(frozen=True)
class Natural:
    """What is known of pictures where there is no bank of them: their power falls as 1 / (1 + f^2), f in cycles per side.

        Sigma^-1 = 1 - sum over sides (n / 2 pi)^2 Laplacian,   n numbers along a side, mirrored at its ends

    Source: the spectrum of natural images, Field, J. Optical Society of America A 4 (1987).

    Args:
        item: shape of a latent, channels first; () takes all directions alike, Sigma = I.
    """

    item: tuple[int, ...] = ()

    def whitened(self, v: Tensor) -> Tensor:
        """Sigma^-1 v for v (B, D)."""
        if len(self.item) < 2:
            return v
        y = v.unflatten(1, self.item)
        whitened = y.clone()
        for side, n in enumerate(self.item[1:], 2):
            steps = (n / math.tau) ** 2 * y.diff(dim=side)
            whitened.narrow(side, 0, n - 1).sub_(steps)
            whitened.narrow(side, 1, n - 1).add_(steps)
        return whitened.flatten(1)


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


def along(v: Tensor, axis: Tensor, metric: Gaussian | Natural | None = None, error: Tensor | float = 0.0) -> Tensor:
    """(<v, axis>_M - error) / (|axis|_M^2 - error), (B,), with M = Sigma^-1 of `metric`, else I; at most half of the length is an error."""
    measured = axis if metric is None else metric.whitened(axis)
    part, whole = ((y * measured).sum(1) for y in (v, axis))
    error = torch.minimum(torch.as_tensor(error).to(whole), whole / 2)
    return (part - error) / (whole - error).clamp_min(TINY)
