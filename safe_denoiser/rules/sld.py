"""Safe latent diffusion: what the model predicts under an unwanted condition is pushed away elementwise, with momentum."""
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import Bank
from ..methods import projection
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .rule import Rule
from .settings import Settings


@dataclass(frozen=True)
class Sld:
    """The numbers of SLD. Source: arXiv:2211.05105, section 3.

    Args:
        scale: s_S. threshold: lambda. momentum_scale: s_m. momentum_beta: beta_m.
    """

    scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4


PRESETS = {  # and the fraction of the schedule before which it only gathers momentum, delta / 50
    "weak": (Sld(200, 0.0, 0.0, 0.0), 0.3), "medium": (Sld(1000, 0.01, 0.3, 0.4), 0.2), "strong": (Sld(2000, 0.025, 0.5, 0.7), 0.14),
    "max": (Sld(5000, 1.0, 0.5, 0.7), 0.0)}


def sld(conditional: Tensor, unconditional: Tensor, unwanted: Tensor, sigma: Tensor, momentum: Tensor | float, numbers: Sld,
        ) -> tuple[Tensor, Tensor, Tensor]:
    """SLD in denoised space: what safe latent diffusion adds to the guided prediction, for each unit of guidance.

        eps_c - eps_S = (D_S - D_c) / sigma
        mu    = min(s_S |eps_c - eps_S|, 1) where eps_c - eps_S < lambda, else 0      (signed, elementwise)
        gamma = mu (eps_S - eps_u) + s_m nu,   nu' = beta_m nu + (1 - beta_m) gamma
        eps   = eps_u + w (eps_c - eps_u - gamma)   <=>   D = D_cfg + w sigma gamma

    Source: safe latent diffusion, arXiv:2211.05105, section 3. Its preset `weak` has s_S = 200 in the paper, 20 in diffusers. For flow
    models (D_S - D_c) / sigma is the difference of velocities; lambda and s_S were chosen for noise predictions, and are used as they are.

    Args:
        conditional, unconditional, unwanted: D_c, D_u, D_S, (B, D), of one x. sigma: (B,). momentum: nu (B, D), or 0 at first.

    Returns:
        sigma gamma (B, D), nu' (B, D), and mu (B, D).
    """
    level = sigma[:, None].clamp_min(1e-12)
    apart = (unwanted - conditional) / level
    mu = torch.where(apart < numbers.threshold, (numbers.scale * apart.abs()).clamp_max(1), 0)
    gamma = mu * (unconditional - unwanted) / level + numbers.momentum_scale * momentum
    return level * gamma, numbers.momentum_beta * momentum + (1 - numbers.momentum_beta) * gamma, mu

SAME = 1e-4  # of a noise level, by which two that are one may differ


@dataclass(frozen=True, eq=False)
class BySld(Rule):
    """safe_denoised = denoised + w sigma gamma, see `sld.sld`, w how many times guidance weighs the prompt's prediction. Without
    guidance it is not defined, and nothing is done. Momentum counts once a step, at the calls that begin one.

    Args:
        numbers: of SLD.
    """

    distances, hears, guided = False, True, True

    numbers: Sld

    @classmethod
    def of(cls, view: BankView) -> "BySld":
        return cls(view.own or Sld())

    @staticmethod
    def require(name: str, bank: Bank | None, settings: Settings) -> None:
        pass  # no bank

    @staticmethod
    def require_unwanted(weight: str) -> None:
        raise ValueError("method 'sld' pushes away from the prediction under an unwanted condition, and none is connected; connect "
                         "unwanted")

    @staticmethod
    def by_parts(settings: Settings) -> bool:
        return False

    @staticmethod
    def gathers(view: BankView) -> bool:
        return (view.own or Sld()).momentum_scale > 0

    def correct(self, p: Prediction, memory: dict) -> Correction:
        if p.unwanted is None or p.unconditional is None or p.conditional is None:
            return Correction.unasked(torch.zeros_like(p.denoised), torch.zeros_like(p.sigma), torch.zeros_like(p.sigma).bool())
        momentum, follows = self._momentum(p, memory)
        term, after, mu = sld(p.conditional, p.unconditional, p.unwanted, p.sigma, momentum, self.numbers)
        level, _, now = memory.get("momentum", (p.sigma, None, after))
        memory["momentum"] = torch.where(follows, p.sigma, level), momentum, torch.where(follows[:, None], after, now)
        weight = projection(p.denoised, p.conditional, p.unconditional).clamp_min(0)
        return Correction.unasked(weight[:, None] * term, mu.mean(1), torch.zeros_like(follows))

    @staticmethod
    def _momentum(p: Prediction, memory: dict) -> tuple[Tensor, Tensor]:
        """nu as this call finds it, (B, D), and whether the call moves it on, (B,), bool.

        `memory` holds the noise level that moved it last, nu before that, and nu after. A call at the same level (the second of one step,
        the first of the next) finds what that level found; where the noise has risen, a run begins, and momentum with it.
        """
        if "momentum" not in memory or memory["momentum"][1].shape != p.x.shape:
            memory.pop("momentum", None)
            return torch.zeros_like(p.x), torch.ones_like(p.sigma, dtype=torch.bool)
        level, before, after = memory["momentum"]
        same = (p.sigma - level).abs() <= SAME * level
        rises = p.sigma > level * (1 + SAME)
        follows = rises | ~same & p.begins
        return torch.where(rises[:, None], 0, torch.where(follows[:, None], after, before)), follows
