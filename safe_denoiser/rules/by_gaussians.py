"""r and E_u from two banks as one Gaussian each: the cautious rule, for banks that distances do not separate."""
import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..density.gaussian import Gaussian, along
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .rule import Rule

TRUST = 0.35  # of the log ratio of two banks' Gaussians, which few pictures in many dimensions make too sure
RANGE = -8.0, 3.0  # of what that ratio may add to the log odds


@dataclass(frozen=True, eq=False)
class ByGaussians(Rule):
    """The safe denoiser of two banks as Gaussians: the cautious one, for banks that distances do not separate.

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

    @classmethod
    def of(cls, view: BankView) -> "ByGaussians | None":
        """None where there are not two banks, or one whose items do not differ."""
        return view.gaussians and cls(*view.gaussians, *view.settings.tuned("gaussian"), view.settings.posterior_max)

    def log_ratio(self, p: Prediction) -> Tensor:
        """TRUST (log p_u(x) - log p_other(x)), within RANGE, (B,)."""
        ratio = self.unsafe.log_density(p.x, p.sigma, p.alpha) - self.other.log_density(p.x, p.sigma, p.alpha)
        return (TRUST * ratio).clamp(*RANGE)

    def correct(self, p: Prediction, memory: dict | None = None) -> Correction:
        other = self.other.denoised(p.x, p.sigma, p.alpha)
        axis = replace(self.other, mean=self.unsafe.mean).denoised(p.x, p.sigma, p.alpha) - other
        asked, zero = (p.denoised, other) if p.unconditional is None else (p.conditional, p.unconditional)
        t = along(asked - zero, axis, self.other)
        found = (math.log(self.prior) + self.log_ratio(p) + self.evidence * (t.clamp(-1, 2) - 0.5)).exp()
        r = found.clamp_max(self.posterior_max)
        return Correction.unasked((r / (1 - r)).clamp_max(1)[:, None] * -axis, r, found > self.posterior_max)
