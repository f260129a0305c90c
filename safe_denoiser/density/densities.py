"""A bank as a kernel density, and other banks at the same bandwidth and temperature."""
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import Bank
from ..prediction import Prediction
from .calibration import Calibration, calibrate, temperature_for
from .kernel import Posterior, posterior

SAMPLE = 1024  # items of a larger bank on which it is calibrated: their Gram matrix is held in memory
PERPLEXITY = 0.2  # share of the bank that the automatic temperature lets weigh, at noise of the bank's own spread


@dataclass(frozen=True, eq=False)
class Densities:
    """The bandwidth and temperature of a bank, and posteriors with such kernels at a noisy latent.

    Args:
        bank: on which they are calibrated.
        given_bandwidth: h; None is 0.4 standard deviations of the bank.
        given_temperature: T; None is calibrated, so that a fixed share of the bank carries the weight.
        root: square root of the mask by which the banks were multiplied.
    """

    bank: Bank
    given_bandwidth: float | None = None
    given_temperature: float | None = None
    root: Tensor | None = None

    @cached_property
    def sample(self) -> Bank:
        """The part of the bank that bandwidth, temperature and curves are calibrated on, in fp32 or better."""
        return self.bank.sample(SAMPLE).to(dtype=torch.promote_types(self.bank.latents.dtype, torch.float32))

    @cached_property
    def bandwidth(self) -> float:
        """h."""
        return 0.4 * float(self.sample.latents.std(correction=0)) if self.given_bandwidth is None else self.given_bandwidth

    @cached_property
    def temperature(self) -> float:
        """T."""
        if self.given_temperature is not None:
            return self.given_temperature
        perplexity, h = max(1.0, PERPLEXITY * (len(self.sample) - 1)), self.bandwidth
        found = self.bank.recall(f"temperature at h {h:.5g}", lambda: temperature_for(self.sample, h, perplexity, self.root))
        return max(1.0, found)

    @cached_property
    def calibration(self) -> Calibration:
        h, t = self.bandwidth, self.temperature
        curves = self.bank.recall(f"curves at h {h:.5g}, T {t:.5g}", lambda: calibrate(self.sample, h, t, self.root).tolist())
        return Calibration(*torch.tensor(curves, dtype=self.sample.latents.dtype, device=self.sample.latents.device))

    def of(self, bank: Bank, p: Prediction) -> Posterior:
        """Posterior of a bank at x."""
        return posterior(p.x, bank.latents, p.sigma, p.alpha, self.bandwidth, self.temperature, bank.log_weights, bank.squared_norms,
                         search=bank.clusters)

    def spread(self, bank: Bank, found: Posterior, p: Prediction) -> tuple[Tensor, Tensor]:
        """sum_n w_n |y_n|^2 - |ybar|^2, the weighted spread of the items around their mean, and sigma^2 / s^2, (B,) each."""
        h2 = p.alpha * self.bandwidth**2
        s2, noise = p.sigma.square() + p.alpha * h2, p.sigma.square()
        ybar = (s2[:, None] * found.mean - h2[:, None] * p.x) / noise[:, None]
        return (found.weights @ bank.squared_norms.to(p.x) - ybar.square().sum(1)).clamp_min(0), noise / s2

    def chance(self, bank: Bank, found: Posterior, p: Prediction) -> Tensor:
        """Squared standard error of a bank's mean, (B,): sum w^2 / (1 - sum w^2) times the weighted spread of its items.

        Two means of N pictures each differ by chance as well, and most where N is small; the projection takes that off.
        """
        spread, shrink = self.spread(bank, found, p)
        share = found.weights.square().sum(1)
        return shrink.square() * spread * share / (1 - share).clamp_min(0.05)  # of one picture alone, nothing is known
