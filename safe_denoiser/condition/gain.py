"""How well a condition explains pictures: by how much it lowers the model's own error when it denoises them.

    pictures --noise, the same each time--> x --model--> E_0 without it, E_n under it --errors--> gain by noise level
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)  # fractions of the schedule, 0 the noisiest; beyond the last, what a picture shows is decided
CHECKED = (0.2, 0.6)  # the two at which right and wrong conditions differ most, for a check that must be quick

VERDICT = "the condition explains your pictures"  # so begins every sentence of a check
SURE = 2.0  # standard errors above 0 from which a gain is believed
PARTLY, CLEARLY = 0.3, 0.7  # a condition that helps with this share of a set means a part of it, or all of it
OTHERS = 0.25  # one that helps with this share of other pictures means more than the set

Condition = Sequence[Tensor]  # what the model is told, such as rows of text and a pooled vector; one row each, (1, ...)


class Model(Protocol):
    """What a diffusion model must be able to do to be asked here."""

    def noised(self, y: Tensor, noise: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
        """x = alpha y + sigma eps (B, *shape), and sigma (B,), at fractions (B,) of the schedule, 0 the noisiest."""

    def predict(self, x: Tensor, sigma: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """E[x0 | x] under each of the conditions, each shaped like x."""


@dataclass(frozen=True, eq=False)
class Gain:
    """The model's squared errors without a condition and with it, by noise level and picture, (K, n) each.

    Args:
        zero: |y - E_0|^2, without. unwanted: |y - E_n|^2, with it. apart: |E_n - E_0|^2, what it changes.
    """

    NAMES: ClassVar = ("zero", "unwanted", "apart")
    zero: Tensor
    unwanted: Tensor
    apart: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The three by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    @property
    def by_level(self) -> Tensor:
        """1 - sum |y - E_n|^2 / sum |y - E_0|^2, (K,): the share of the model's error that the condition takes away; below 0 it adds."""
        return 1 - self.unwanted.sum(1) / self.zero.sum(1)

    @property
    def mean(self) -> float:
        """`by_level`, averaged over the noise levels."""
        return float(self.by_level.mean())

    @property
    def by_level_and_picture(self) -> Tensor:
        """By how much the condition lowers the error of each picture, relative to the mean error at that level (K, n)."""
        return (self.zero - self.unwanted) / self.zero.mean(1, keepdim=True)

    @property
    def by_picture(self) -> Tensor:
        """The same, averaged over the levels (n,)."""
        return self.by_level_and_picture.mean(0)

    @property
    def error(self) -> float:
        """Standard error of `mean` over the pictures; infinite for a single one."""
        one = self.by_picture
        return float(one.std() / len(one) ** 0.5) if len(one) > 1 else float("inf")

    @cached_property
    def scale(self) -> Tensor:
        """g = <y - E_0, E_n - E_0> / |E_n - E_0|^2, (K,): by what E_n - E_0 should be multiplied to come nearest to y; 1:
        the condition is right as it is, 0: it is of no use.
        """
        along = (self.zero + self.apart - self.unwanted) / 2
        return along.sum(1) / self.apart.sum(1).clamp_min(1e-20)

    @property
    def share(self) -> float:
        """Share of the pictures that the condition helps to denoise: Phi(mean / s), where s is the spread of the pictures' true gains.

        Each level has noise of its own, so that what varies alike at all levels is the pictures': s^2 is the covariance of two levels,
        averaged over all pairs. Counting pictures with a gain above 0 would not do: its sign is as often the noise's doing.
        """
        gains, mean = self.by_level_and_picture, self.by_picture.mean()
        gains = gains - gains.mean(1, keepdim=True)
        chance = gains.var(0).mean() / len(gains) if len(gains) > 1 else gains.new_zeros(())
        spread = (gains.mean(0).var() - chance).clamp_min(1e-20).sqrt()
        return float(torch.special.ndtr(mean / spread)) if mean else 0.0  # none, where nothing is gained or lost


@dataclass(frozen=True, eq=False)
class Check:
    """Whether a condition means the pictures of a set, and not pictures in general.

    Args:
        set: its gain on pictures of the set. reference: on pictures that the model makes by itself, or that are to be kept; None: not
            measured.
    """

    set: Gain
    reference: Gain | None = None

    @property
    def kind(self) -> str:
        """It means the set: "clearly"; "broadly", and other pictures as well; "partly", a part of it; "no"."""
        sure = self.set.mean > SURE * self.set.error
        others = self.reference.share if self.reference else 0.0
        if self.set.share < PARTLY or self.reference is not None and self.everything:
            return "no"
        if self.set.share < CLEARLY or not sure:
            return "partly"
        return "broadly" if others > OTHERS else "clearly"

    @property
    def everything(self) -> bool:
        """Whether it helps with the reference pictures more than half as much as with the set: it then means pictures in general."""
        return self.reference.mean > SURE * self.reference.error and self.reference.mean > self.set.mean / 2

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        shares = f"it helps the model with {self.set.share:.0%} of your pictures"
        if self.reference:
            shares += f" and {self.reference.share:.0%} of the others"
        return f"{VERDICT}: " + {
            "clearly": f"yes, clearly ({shares})", "broadly": f"yes, but it means more than these ({shares})",
            "partly": f"a little ({shares}); it means a part of them, or they are of many kinds",
            "no": f"no ({shares}); connect one that asks for what they show"}[self.kind]


class Probe:
    """Noised pictures on which conditions are compared, and what the model predicts of them without one. The noise is the same for all.

    Source: the model's denoising error as a classifier, arXiv:2303.16203; the gain as a measure of a condition is ours.

    Args:
        model: the one that is asked. latents: (n, *shape), in its space.
        neutral: the condition that means nothing in particular; under it the model predicts E_0.
        fractions: of the schedule, at which pictures are noised. batch: rows in one model call. seed: of the noise.
    """

    def __init__(self, model: Model, latents: Tensor, neutral: Condition, fractions: Sequence[float] = LEVELS, batch: int = 16,
                 seed: int = 0):
        self.model, self.batch, self.shape = model, batch, (len(fractions), len(latents))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(fractions), *latents.shape, generator=generator).flatten(0, 1).to(latents)
        self.y = latents.repeat(len(fractions), *[1] * (latents.ndim - 1))
        levels = torch.tensor(fractions).repeat_interleave(len(latents)).to(latents.device)
        self.x, self.sigma = model.noised(self.y, noise, levels)
        self.zero = self._predicted(neutral)

    @torch.no_grad()
    def _predicted(self, condition: Condition) -> Tensor:
        parts = zip(self.x.split(self.batch), self.sigma.split(self.batch))
        return torch.cat([self.model.predict(x, sigma, [condition])[0].detach() for x, sigma in parts])

    def _squared(self, v: Tensor) -> Tensor:
        """|v|^2 by level and picture (K, n)."""
        return v.flatten(1).float().square().sum(1).view(self.shape)

    @cached_property
    def zero_errors(self) -> Tensor:
        """|y - E_0|^2, (K, n)."""
        return self._squared(self.y - self.zero)

    def gain(self, condition: Condition) -> Gain:
        """The gain of a condition. Takes one model call for each `batch` rows; each picture at each level is a row."""
        found = self._predicted(condition)
        return Gain(self.zero_errors, self._squared(self.y - found), self._squared(found - self.zero))


def together(gains: Sequence[Gain]) -> Gain:
    """Gains on different pictures as one."""
    return Gain(*(torch.cat([getattr(gain, name) for gain in gains], 1) for name in Gain.NAMES))
