"""Baselines: published methods that know no posterior, as rules, to compare with."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import methods
from ..bank.bank import Bank
from ..bank.lazy_latents import LazyLatents
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .rule import Rule
from .settings import Settings


@dataclass(frozen=True, eq=False)
class Baseline(Rule):
    """A rule that reads every item of one bank, flat latents (N, D), in memory or in their file, and knows no other bank.

    Args:
        width: of a shield or a kernel around each item.
    """

    latents: Tensor | LazyLatents
    width: float

    @staticmethod
    def by_parts(settings: Settings) -> bool:
        return False

    def correct(self, p: Prediction, memory: dict) -> Correction:
        direction, factor, gate = self.answer(p)
        return Correction(direction, gate, factor.argmax(1), torch.zeros_like(gate, dtype=torch.bool), torch.zeros_like(gate))

    def answer(self, p: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        """A direction (B, D), the weight of each item of the bank (B, N), and the strength of all together (B,)."""
        raise NotImplementedError


class Spell(Baseline):
    """`methods.spell`: out of a shield of this radius around each item."""

    @classmethod
    def of(cls, view: BankView) -> "Spell":
        return cls(view.latents, view.radius)

    def answer(self, p: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        direction, factor = methods.spell(p.denoised, self.latents, self.width)
        return direction, factor, factor.sum(1).clamp_max(1)


@dataclass(frozen=True, eq=False)
class Official(Baseline):
    """`methods.official`: the published code's rule over latents that are normalised at each location.

    Args:
        item: shape of an item, where the prediction is normalised at each location too (the SD3 variant).
        root: square root of the mask inside which alone it counts.
    """

    threshold: float = Settings.threshold
    item: Sequence[int] | None = None
    root: Tensor | None = None

    @staticmethod
    def prepared(bank: Bank) -> Bank:
        return bank.normalised()

    def answer(self, p: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        query = p.denoised
        if self.item is not None:
            query = F.normalize(query.unflatten(1, self.item), dim=1).flatten(1)
            query = query if self.root is None else query * self.root
        direction, factor = methods.official(p.denoised, self.latents, self.width, self.threshold, query)
        return direction, factor, (factor.sum(1) + 1e-8 > self.threshold).to(p.x.dtype)


class OfficialSD1(Official):
    """As published for SD 1.4."""

    @classmethod
    def of(cls, view: BankView) -> Official:
        h = view.settings.bandwidth
        return cls(view.latents, 3.15 if h is None else h, view.settings.threshold)


class OfficialSD3(Official):
    """As published for SD3."""

    @classmethod
    def of(cls, view: BankView) -> Official:
        h = view.settings.bandwidth
        return cls(view.latents, 1.0 if h is None else h, view.settings.threshold, view.bank.latents.shape[1:], view.root)


class Sgf(Baseline):
    """`methods.sgf`: up the potential of kernels of this width; inside a mask that of whole pictures."""

    @classmethod
    def of(cls, view: BankView) -> "Sgf":
        h = view.settings.bandwidth
        return cls(view.latents, (view.whole or view).neighbour_distance if h is None else h)

    def answer(self, p: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        direction, factor = methods.sgf(p.denoised, self.latents, self.width)
        return direction, factor, factor.mean(1)
