"""The theorem as printed, with a beta and a ceiling on it: gate, and for comparison constant, triangle, tracked and ratio_beta."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import methods
from ..density.densities import Densities
from ..density.kernel import Posterior
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .by_banks import ByBanks
from .rule import Rule


@dataclass(frozen=True, eq=False)
class ByBeta(Rule):
    """denoised + beta (denoised - E_u), or as `push` says, with beta from the bank alone or from a ratio of densities.

    Args:
        densities: of the negation bank.
        weight: "gate", "constant", "triangle", "tracked" or "ratio_beta".
        prior, posterior_max, beta_max, push: see `SafeDenoiser`.
        ratio: computes r for "ratio_beta".
    """

    densities: Densities
    weight: str
    prior: float
    posterior_max: float
    beta_max: float
    push: str
    ratio: ByBanks | None = None

    @classmethod
    def of(cls, view: BankView, weight: str) -> "ByBeta":
        prior, _ = view.settings.tuned(weight)
        return cls(view.densities, weight, prior, view.settings.posterior_max, view.settings.beta_max, view.settings.push,
                   ByBanks.of(view, weight))

    def correct(self, p: Prediction, memory: dict) -> Correction:
        if self.push == "unconditional" and p.unconditional is None:
            raise ValueError("push 'unconditional' needs the unconditional prediction, and there is none: cfg is 1, or the guider makes "
                             "none; raise cfg or push 'guided'")
        unsafe = self.densities.of(self.densities.bank, p)
        beta = self._beta(p, unsafe, memory)
        pushed, capped = p.unconditional if self.push == "unconditional" else p.denoised, beta.clamp_max(self.beta_max)
        return Correction(methods.from_beta(pushed, unsafe.mean, capped), capped, unsafe.weights.argmax(1), beta > self.beta_max,
                          unsafe.omitted)

    def _beta(self, p: Prediction, unsafe: Posterior, memory: dict) -> Tensor:
        """beta, (B,)."""
        if self.weight == "constant":
            return torch.ones_like(p.sigma)
        if self.weight == "ratio_beta":
            r = self.ratio.judged(p, unsafe)[0].clamp_max(math.log(self.posterior_max)).exp()
            return r / (1 - r)
        curves = self.densities.calibration
        home = curves.grid.device  # the CPU where the bank is too large for the device of x
        level, spread, reach, trace = (curve.to(p.x.device) for curve in curves.at(p.sigma.to(home), p.alpha.to(home)))
        if self.weight == "gate":
            return methods.typicality(unsafe, level, spread)
        if self.weight == "triangle":
            return methods.triangle(p.denoised, unsafe.mean, reach)
        r = self._tracked(p, unsafe, trace, memory).exp()
        return r / (1 - r)

    def _tracked(self, p: Prediction, unsafe: Posterior, trace: Tensor, memory: dict) -> Tensor:
        """log r of `methods.tracked`, in the frame where alpha = 1; starts at log prior, and again when sigma rises."""
        alpha, bank, h = p.alpha.clamp_min(1e-3), self.densities.bank, self.densities.bandwidth
        x, sigma = p.x / alpha[:, None], p.sigma / alpha
        between, shrink = self.densities.spread(bank, unsafe, Prediction(x, p.denoised, sigma, torch.ones_like(sigma)))
        excess = shrink.square() * between + h**2 * shrink * x.shape[1] - trace
        log_r = torch.full_like(sigma, math.log(self.prior))
        known, *before = memory.get("tracked", (None, x[:0]))
        if before[0].shape == x.shape:
            carried = methods.tracked(known, before, x, sigma, 1 / self.densities.temperature, math.log(self.posterior_max))
            log_r = torch.where(sigma < before[1], carried, log_r)
        memory["tracked"] = log_r, x, sigma, p.denoised, unsafe.mean, excess
        return log_r
