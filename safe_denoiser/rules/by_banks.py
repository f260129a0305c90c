"""r and E_u from the densities of banks at x: the weights evidence, reference, retain, unconditional, and the ratio of `ratio_beta`."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import methods
from ..bank.bank import Bank
from ..density.densities import Densities
from ..density.kernel import Posterior
from ..prediction import Correction, Prediction, largest
from .bank_view import BankView
from .rule import Rule

RELEASE = 0.7, 0.9  # share of the way to E_u that a prompt pulls: where its guidance begins to be let go, and where all of it is


@dataclass(frozen=True, eq=False)
class ByBanks(Rule):
    """r from densities and from the prediction itself; the forms are those of `SafeDenoiser`, as is what the settings mean.

    Args:
        densities: of the negation bank.
        weight: "evidence", "reference", "retain", "unconditional" or "ratio_beta".
        reference, retain: the banks beside it.
        prior, evidence, posterior_max, semantic: see `SafeDenoiser`.
        lets_go: whether a prompt that asks for the unsafe thing, by these banks, may lose its guidance; asked only where there is guidance.
    """

    densities: Densities
    weight: str
    reference: Bank | None
    retain: Bank | None
    prior: float
    evidence: float
    posterior_max: float
    semantic: Callable[[Tensor, Tensor], Tensor] | None = None
    lets_go: Callable[[], bool] = bool

    @classmethod
    def of(cls, view: BankView, weight: str) -> "ByBanks":
        return cls(view.densities, weight, view.reference, view.retain, *view.settings.tuned(weight), view.settings.posterior_max,
                   view.semantic, lambda: view.sees)

    def correct(self, p: Prediction, memory: dict) -> Correction:
        if self.weight == "unconditional" and p.unconditional is None:
            raise ValueError("weight 'unconditional' needs the unconditional prediction, and there is none: cfg is 1, or the guider makes "
                             "none; raise cfg, connect a reference bank, or choose weight 'auto'")
        unsafe = self.densities.of(self.densities.bank, p)
        log_r, other, error, most = self.judged(p, unsafe)
        ceiling = math.log(self.posterior_max)
        r = log_r.clamp_max(ceiling).exp()
        direction = (methods.from_retain(unsafe.mean, other, r) if self.weight == "retain" else
                     methods.from_reference(unsafe.mean, other, r, most))
        if self.evidence and p.unconditional is not None and self.lets_go():
            release = self._release(p, unsafe.mean, other, error, memory)
            direction = direction + release[:, None] * (p.unconditional - p.denoised)
        return Correction(direction, r, unsafe.weights.argmax(1), log_r > ceiling, unsafe.omitted)

    def judged(self, p: Prediction, unsafe: Posterior) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | float]:
        """log r (B,), what the bank is compared with (B, D), the chance in both (B,), and the most that a correction may weigh (B,)."""
        reference = self.reference and self.weight not in ("retain", "unconditional") and self.densities.of(self.reference, p)
        retain = self.retain and self.weight != "unconditional" and self.densities.of(self.retain, p)
        beside, found = (self.reference, reference) if reference else (self.retain, retain)
        other, error = found.mean if found else p.unconditional, None
        told, most = torch.zeros_like(p.sigma), math.inf
        if self.evidence:
            error = self.densities.chance(self.densities.bank, unsafe, p) + (self.densities.chance(beside, found, p) if found else 0)
            t = methods.projection(p.denoised, unsafe.mean, other, error)
            told, most = self.evidence * (t - 0.5), methods.mirror(t, self.prior)
        estimates = [methods.log_ratio(unsafe, reference, self.prior) + told] if reference else []
        if retain:
            odds = methods.log_odds(unsafe, retain, self.prior) if self.semantic is None else \
                math.log(self.prior / (1 - self.prior)) + self._meant(p)
            estimates.append(F.logsigmoid(odds + told))
        return torch.stack(estimates).mean(0) if estimates else math.log(self.prior) + told, other, error, most

    @staticmethod
    def _release(p: Prediction, unsafe_denoised: Tensor, other_denoised: Tensor, error: Tensor, memory: dict) -> Tensor:
        """How much of the guidance to let go, (B,): 0 up to a pull of RELEASE[0], 1 from RELEASE[1] on, the most that this run has seen.

        A prompt that asks for the unsafe thing pulls most at the start, before x is anything, and goes on pulling to the end.
        """
        release = torch.zeros_like(p.sigma)
        if p.conditional is not None:
            pull = methods.pull(p.conditional, p.unconditional, unsafe_denoised, other_denoised, error)
            release = ((pull - RELEASE[0]) / (RELEASE[1] - RELEASE[0])).clamp(0, 1)
        return largest(memory, "released", p.sigma, release)

    def _meant(self, p: Prediction) -> Tensor:
        """log p_u - log p_retain, (B,), by what the prediction means."""
        return self.semantic(p.denoised.unflatten(1, self.densities.bank.latents.shape[1:]), p.sigma / p.alpha.clamp_min(1e-3))
