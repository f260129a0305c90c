"""Rules made of rules: where a bank counts inside a mask only, or by windows. Neither knows which rule it is."""
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .prediction import Correction, Prediction


class Rule(Protocol):
    """Answers a prediction, for banks of one view; `memory` is what a run remembers of it."""

    memory: dict

    def correct(self, p: Prediction) -> Correction: ...


class MaskedRule(Rule, Protocol):
    """One whose banks were multiplied by `root`, the square root of a mask (D,)."""

    root: Tensor


def by_windows(inside: Sequence[tuple[tuple, Rule]], item: Sequence[int], p: Prediction, mask: Tensor | None = None) -> Correction:
    """The correction of each window by itself; where windows overlap, the mean of theirs, weighed by r. With a mask (B, D) r counts by
    the share of a window that is sampled: what is given shows what it shows.

    Args:
        inside: each window, as an index into latents (..., *item), and the rule that compares what stands there.
        item: shape of the latents of p.
    """
    whole = [y if y is None else y.unflatten(1, item) for y in (p.x, p.denoised, *p.guides)]
    found, total, weight = [], torch.zeros_like(whole[0]), torch.full_like(whole[0], 1e-12)
    for place, rule in inside:
        x, denoised, *guides = (y if y is None else y[place].flatten(1) for y in whole)
        part = rule.correct(Prediction(x, denoised, p.sigma, p.alpha, *guides))
        r = part.posterior if mask is None else part.posterior * mask.unflatten(1, item)[place].flatten(1).mean(1)
        share = r.view(-1, *[1] * len(item))
        total[place] += share * part.direction.view_as(total[place])
        weight[place] += share
        found.append(torch.stack([r, part.nearest, part.clamped, part.omitted]))
    found = torch.stack(found)  # (P, 4, B)
    r, best = found[:, 0].max(0)
    _, nearest, clamped, omitted = found.gather(0, best.expand(1, 4, -1))[0]
    return Correction((total / weight).flatten(1), r, nearest.long(), clamped.bool(), omitted)


class InsideMasks:
    """A rule with distances inside a mask for each row, and no correction where the mask is 0; it keeps what it made for the latest masks.

    Rows of one mask go together, so that the bank is read in one matmul per mask. Where the mask is between 0 and 1 the correction is
    whole: the sampler's own blend, denoised m + latent (1 - m), weighs it by m.
    """

    def __init__(self):
        self.mask, self.parts = None, []

    def forget(self) -> None:
        self.mask, self.parts = None, []

    def correct(self, mask: Tensor, p: Prediction, masked: Callable[[Tensor], MaskedRule], memory: dict) -> Correction:
        """The correction of p, each row inside its own mask (B, D).

        Args:
            masked: the rule inside one mask (D,).
            memory: what the run remembers, changed: of all rows, each at its place.
        """
        if self.mask is None or not torch.equal(self.mask, mask):
            self._make(mask, masked, memory)
        parts = []
        for index, inside in self.parts:
            x, denoised, *guides = (y if y is None else y[index] * inside.root for y in (p.x, p.denoised, *p.guides))
            part = inside.correct(Prediction(x, denoised, p.sigma[index], p.alpha[index], *guides))
            whole = torch.where(inside.root > 0, part.direction / inside.root, 0)
            parts.append((whole, part.posterior, part.nearest, part.clamped, part.omitted, part.projection))
        order = torch.cat([index for index, _ in self.parts]).argsort()
        memories = [inside.memory for _, inside in self.parts]
        memory["inside masks"] = mask, {name: tuple(torch.cat(values)[order] for values in zip(*(one[name] for one in memories)))
                                        for name in set.intersection(*map(set, memories))}
        return Correction(*(values[0] if values[0] is None else torch.cat(values)[order] for values in zip(*parts)))

    def _make(self, mask: Tensor, masked: Callable[[Tensor], MaskedRule], memory: dict) -> None:
        """The rules of new masks, with what is remembered of each row."""
        kinds, kind = mask.unique(dim=0, return_inverse=True)
        self.mask, self.parts = mask, [((kind == k).nonzero()[:, 0], masked(m)) for k, m in enumerate(kinds)]
        before, known = memory.get("inside masks", (None, {}))
        same = before is not None and torch.equal(before, mask)
        for name, values in known.items():
            for index, inside in self.parts if same or name != "tracked" else ():  # which has seen x as one mask shows it
                inside.memory[name] = tuple(value[index] for value in values)
