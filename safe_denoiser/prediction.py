"""What a method hears of one model call, what it answers, and what the report keeps of it."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """One model call, flat: x, denoised (B, D), sigma, alpha (B,), and what else the model predicted of the same x (B, D), where it did.

    Args:
        unconditional, conditional: what guidance made `denoised` of.
        unwanted: under the condition that means what must not come out.
        neutral: under a condition that means nothing in particular.
    """

    x: Tensor
    denoised: Tensor
    sigma: Tensor
    alpha: Tensor
    unconditional: Tensor | None = None
    conditional: Tensor | None = None
    unwanted: Tensor | None = None
    neutral: Tensor | None = None

    @property
    def guides(self) -> tuple[Tensor | None, ...]:
        """The predictions beside `denoised`, in the order of the fields."""
        return self.unconditional, self.conditional, self.unwanted, self.neutral


@dataclass(frozen=True)
class Correction:
    """A method's answer: `direction` to add to denoised (B, D), and what the report wants to know of it, (B,) each.

    Args:
        nearest: index of the bank item that weighs most, -1 where no bank was asked.
        projection: t of `witness.coordinate`, where it was asked for.
    """

    direction: Tensor
    posterior: Tensor
    nearest: Tensor
    clamped: Tensor
    omitted: Tensor
    projection: Tensor | None = None

    @classmethod
    def unasked(cls, direction: Tensor, posterior: Tensor, clamped: Tensor, projection: Tensor | None = None) -> "Correction":
        """An answer for which no item of a bank was looked at."""
        none = torch.zeros_like(posterior)
        return cls(direction, posterior, none.long() - 1, clamped, none, projection)


def _carried(memory: dict, name: str, sigma: Tensor, value: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`join` of what a run remembers and `value`, (B,) each; where sigma (B,) rises a new run begins. `memory` holds it under `name`."""
    before = memory.get(name)
    if before is not None and before[0].shape == sigma.shape:
        value = torch.where(sigma <= before[0], join(before[1], value), value)
    memory[name] = sigma, value
    return value


def first(memory: dict, name: str, sigma: Tensor, value: Tensor) -> Tensor:
    """What `value` (B,) was at a run's first call that gave a number, (B,), see `_carried`."""
    return _carried(memory, name, sigma, value, lambda before, now: torch.where(before.isfinite(), before, now))


def largest(memory: dict, name: str, sigma: Tensor, value: Tensor) -> Tensor:
    """The largest `value` (B,) that a run has seen, (B,), see `_carried`; a value that is no number is forgotten."""
    return _carried(memory, name, sigma, value, torch.fmax)
