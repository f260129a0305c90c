"""One model call: the Prediction that a rule is given, the Correction that it answers, and the Step that the report keeps."""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LONGEST = 1000  # calls of which a run remembers what it found: as many steps as a schedule has


@dataclass(frozen=True)
class Prediction:
    """One model call, flat: x, denoised (B, D), sigma, alpha (B,), and what else the model predicted of the same x (B, D), where it did.

    Args:
        unconditional, conditional: what guidance made `denoised` of.
        unwanted: under the condition that means what must not come out.
        neutral: under a condition that means nothing in particular.
        begins: whether the call begins a step of the sampler, and is not one of several within it.
        item: shape of one latent, channels first; () where it has none.
    """

    x: Tensor
    denoised: Tensor
    sigma: Tensor
    alpha: Tensor
    unconditional: Tensor | None = None
    conditional: Tensor | None = None
    unwanted: Tensor | None = None
    neutral: Tensor | None = None
    begins: Tensor | bool = True
    item: tuple[int, ...] = ()

    def cut(self, part: Callable[[Tensor], Tensor], rows: Tensor | slice = slice(None), item: tuple = ()) -> "Prediction":
        """The same for a part of each latent (B, D), of shape `item`, and for some rows only."""
        names = ("x", "denoised", "unconditional", "conditional", "unwanted", "neutral")
        parts = {name: None if (y := getattr(self, name)) is None else part(y[rows]) for name in names}
        return replace(self, **parts, sigma=self.sigma[rows], alpha=self.alpha[rows], item=item)


@dataclass(frozen=True)
class Correction:
    """A rule's answer: `direction` to add to denoised (B, D), and numbers for the report, (B,) each.

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


@dataclass(frozen=True)
class Step:
    """What the safe denoiser did in one model call; one entry per picture (per frame, where a picture bank meets a video).

    Args:
        sigma: noise level (B,).
        active: inside the window of the schedule, with a finite prediction (B,), bool.
        posterior: r = P(unsafe | x), the highest of the windows where there are several; beta for the methods that have no r, or their
            own gate (B,).
        correction: |safe_denoised - denoised| / |denoised| (B,).
        nearest: index of the bank item that weighs most (B,), -1 where no bank was asked.
        clamped: r or beta hit its ceiling (B,), bool.
        fallback: the prediction or its correction was not finite, so the prediction was returned unchanged (B,), bool.
        omitted: weight of the bank items that E_u leaves out to save time (B,), see `posterior`.
        projection: t, the share of the unwanted prediction in the prompt's (B,), see `witness`; NaN where there was none to ask.
    """

    sigma: Tensor
    active: Tensor
    posterior: Tensor
    correction: Tensor
    nearest: Tensor
    clamped: Tensor
    fallback: Tensor
    omitted: Tensor
    projection: Tensor

    @classmethod
    def of(cls, found: Correction, sigma: Tensor, active: Tensor, fallback: Tensor, size: Tensor) -> "Step":
        """The step in which a correction was of this size."""
        values = (torch.where(active, value, 0) for value in (found.posterior, size, found.nearest))
        t = torch.full_like(sigma, math.nan) if found.projection is None else found.projection
        return cls(sigma, active, *values, active & found.clamped, fallback, torch.where(active, found.omitted, 0), t)


def _carried(memory: dict, name: str, sigma: Tensor, value: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`join` of what a run knew when x was noisier and `value`, (B,) each. `memory` holds the past under `name`: noise levels (B, K) and
    joined values (B, K), in the order of the calls.

    Where sigma (B,) rises again (a restart, a step that is taken back) what was found below it is forgotten; what was found above it is
    not, since x still comes from there. A batch of another size begins anew.
    """
    empty = sigma.new_empty(len(sigma), 0), value.new_empty(len(value), 0)
    levels, values = memory.get(name, empty)
    if len(levels) != len(sigma):
        levels, values = empty
    above = levels > sigma[:, None]
    place = torch.arange(1, levels.shape[1] + 1, device=sigma.device)
    latest = torch.cat([torch.zeros_like(sigma, dtype=torch.long)[:, None], above * place], 1).amax(1)  # 0: nothing was
    before = torch.cat([value[:, None], values], 1).gather(1, latest[:, None])[:, 0]
    value = torch.where(latest > 0, join(before, value), value)
    levels = torch.where(above, levels, math.nan)
    memory[name] = torch.cat([levels, sigma[:, None]], 1)[:, -LONGEST:], torch.cat([values, value[:, None]], 1)[:, -LONGEST:]
    return value


def first(memory: dict, name: str, sigma: Tensor, value: Tensor) -> Tensor:
    """What `value` (B,) was at a run's first call, the noisiest, that gave a number, (B,), see `_carried`."""
    return _carried(memory, name, sigma, value, lambda before, now: torch.where(before.isfinite(), before, now))


def largest(memory: dict, name: str, sigma: Tensor, value: Tensor) -> Tensor:
    """The largest `value` (B,) that a run has seen, (B,), see `_carried`; a value that is no number is forgotten."""
    return _carried(memory, name, sigma, value, torch.fmax)
