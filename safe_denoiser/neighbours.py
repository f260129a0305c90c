"""Methods of others, which know no posterior, as rules: each has its own settings and answers a prediction."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import methods
from .prediction import Correction, Prediction


def _answer(direction: Tensor, gate: Tensor, factor: Tensor) -> Correction:
    """A direction (B, D), how far it counts (B,), and how much each item of the bank does (B, N)."""
    return Correction(direction, gate, factor.argmax(1), torch.zeros_like(gate, dtype=torch.bool), torch.zeros_like(gate))


@dataclass(frozen=True, eq=False)
class Spell:
    """`methods.spell`: out of a shield of this radius around each item of flat latents (N, D)."""

    latents: Tensor
    radius: float

    def correct(self, p: Prediction) -> Correction:
        direction, factor = methods.spell(p.denoised, self.latents, self.radius)
        return _answer(direction, factor.sum(1).clamp_max(1), factor)


@dataclass(frozen=True, eq=False)
class Sgf:
    """`methods.sgf`: up the potential of flat latents (N, D), of this kernel width."""

    latents: Tensor
    bandwidth: float

    def correct(self, p: Prediction) -> Correction:
        direction, factor = methods.sgf(p.denoised, self.latents, self.bandwidth)
        return _answer(direction, factor.mean(1), factor)


@dataclass(frozen=True, eq=False)
class Official:
    """`methods.official`: the published code's rule over flat, normalised latents (N, D).

    Args:
        item: shape of an item, where the prediction is normalised at each location too (the SD3 variant).
        root: square root of the mask inside which alone it counts.
    """

    latents: Tensor
    bandwidth: float
    threshold: float
    item: Sequence[int] | None = None
    root: Tensor | None = None

    def correct(self, p: Prediction) -> Correction:
        query = p.denoised
        if self.item is not None:
            query = F.normalize(query.unflatten(1, self.item), dim=1).flatten(1)
            query = query if self.root is None else query * self.root
        direction, factor = methods.official(p.denoised, self.latents, self.bandwidth, self.threshold, query)
        return _answer(direction, (factor.sum(1) + 1e-8 > self.threshold).to(p.x.dtype), factor)
