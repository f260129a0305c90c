"""Any rule, applied inside a mask, window by window, or frame by frame."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..prediction import Correction, Prediction
from .bank_view import BankView
from .rule import Rule


def by_frames(x: Tensor, item: Sequence[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as a batch of things the size of a bank item, and the way back: a bank of pictures meets a video frame by frame.

    Raises:
        ValueError: x is of another size than the bank's latents.
    """
    if x.shape[1:] == item:
        return x, lambda y: y
    if x.ndim == 5 and (x.shape[1], *x.shape[3:]) == tuple(item[:1]) + tuple(item[-2:]) and item.numel() == x[0, :, 0].numel():
        return x.movedim(2, 1).flatten(0, 1), lambda y: y.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)
    raise ValueError(f"bank latents are {tuple(item)} but the sampler runs at {tuple(x.shape[1:])}; "
                     f"rebuild the bank with this model's VAE at this size")


def by_windows(inside: Sequence[tuple[tuple, Rule, dict]], item: Sequence[int], p: Prediction, mask: Tensor | None = None) -> Correction:
    """The correction of each window by itself; where windows overlap, the mean of theirs, weighed by r. With a mask (B, D) r counts by
    the share of a window that is sampled: what is given stays as it is.

    Args:
        inside: each window, as an index into latents (..., *item), the rule that compares what stands there, and what the run remembers
            of it, which is changed.
        item: shape of the latents of p.
    """
    total = torch.zeros_like(p.x.unflatten(1, item))
    found, weight = [], torch.full_like(total, 1e-12)
    for place, rule, memory in inside:
        part = rule.correct(p.cut(lambda y, place=place: y.unflatten(1, item)[place].flatten(1)), memory)
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

    Args:
        view: of whole pictures.
        made: the rule of a view.
    """

    def __init__(self, view: BankView, made: Callable[[BankView], Rule]):
        self.view, self.made = view, made
        self.forget()

    def forget(self) -> None:
        self.mask, self.parts = None, []

    def correct(self, mask: Tensor, p: Prediction, memory: dict) -> Correction:
        """The correction of p, each row inside its own mask (B, D); `memory` is what the run remembers of all rows, and is changed."""
        if self.mask is None or not torch.equal(self.mask, mask):
            self._make(mask, memory)
        parts = []
        for index, root, rule, own in self.parts:
            part = rule.correct(p.cut(lambda y, root=root: y * root, index, p.item), own)
            whole = torch.where(root > 0, part.direction / root, 0)
            parts.append((whole, part.posterior, part.nearest, part.clamped, part.omitted, part.projection))
        indices, _, _, memories = zip(*self.parts)
        order = torch.cat(indices).argsort()
        memory["inside masks"] = mask, {name: tuple(torch.cat(values)[order] for values in zip(*(one[name] for one in memories)))
                                        for name in set.intersection(*map(set, memories))}
        return Correction(*(values[0] if values[0] is None else torch.cat(values)[order] for values in zip(*parts)))

    def _make(self, mask: Tensor, memory: dict) -> None:
        """The rules of new masks, with what is remembered of each row."""
        kinds, kind = mask.unique(dim=0, return_inverse=True)
        views = [self.view.masked(m) for m in kinds]
        self.mask, self.parts = mask, [((kind == k).nonzero()[:, 0], view.root, self.made(view), {}) for k, view in enumerate(views)]
        before, known = memory.get("inside masks", (None, {}))
        same = before is not None and torch.equal(before, mask)
        for name, values in known.items():
            for index, _, _, own in self.parts if same or name != "tracked" else ():  # which has seen x as one mask shows it
                own[name] = tuple(value[index] for value in values)
