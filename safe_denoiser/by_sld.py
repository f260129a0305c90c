"""Safe latent diffusion as a rule: what the model predicts under an unwanted condition is pushed away elementwise, with momentum."""
from dataclasses import dataclass

import torch
from torch import Tensor

from .guards import Sld, sld
from .methods import projection
from .prediction import Correction, Prediction
from .rule import Rule
from .settings import Settings
from .view import View

SAME = 1e-4  # of a noise level, by which two that are one may differ


@dataclass(frozen=True, eq=False)
class BySld(Rule):
    """safe_denoised = denoised + w sigma gamma, see `guards.sld`, w how many times guidance weighs the prompt's prediction. Without
    guidance it is not defined, and nothing is done. Momentum counts once a step, at the calls that begin one.

    Args:
        numbers: of SLD.
    """

    distances, hears = False, True

    numbers: Sld

    @classmethod
    def of(cls, view: View) -> "BySld":
        return cls(view.own or Sld())

    @staticmethod
    def require(name: str, view: View) -> None:
        pass  # no bank

    @staticmethod
    def by_parts(settings: Settings) -> bool:
        return False

    @staticmethod
    def gathers(view: View) -> bool:
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
