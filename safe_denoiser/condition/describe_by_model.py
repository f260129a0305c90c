"""What a set shows, as the diffusion model itself would say it: the phrases under which it denoises these pictures best, and not others."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..meaning.describe import Description, chosen_of
from .gain import LEVELS, Condition, Model, Probe

FIRST, MOST = 8, 32  # pictures of the set and of the others in the first round, which doubles each time, and in the last


def rounds(phrases: int, pictures: int, others: int) -> list[tuple[int, int]]:
    """(phrases, pictures) of each round: while there are more than four phrases, half of them stay and twice as many pictures are asked."""
    most, found, count = min(MOST, max(pictures, others)), [], min(FIRST, max(pictures, others))
    while count < most and phrases > 4:
        found.append((phrases, count))
        phrases, count = -(-phrases // 2), min(2 * count, most)
    return [*found, (phrases, most)]


def rows_needed(phrases: int, pictures: int, others: int) -> int:
    """How many noised pictures the model will be asked for, one per phrase, level and picture, and once per picture without a phrase.

    Raises:
        ValueError: fewer than two pictures of the set or of the others.
    """
    if min(pictures, others) < 2:
        raise ValueError(f"too few pictures to describe what tells them apart (the set has {pictures}, the others are {others}); connect "
                         f"banks of two or more")
    return sum((asked + 1) * len(LEVELS) * (min(count, pictures) + min(count, others))
               for asked, count in rounds(phrases, pictures, others))


def describe_by_model(model: Model, latents: Tensor, others: Tensor, phrases: tuple[str, ...], encode: Callable[[str], Condition],
                      neutral: Condition, count: int = 3, batch: int = 16, seed: int = 0,
                      tell: Callable[[int, int], None] | None = None) -> Description:
    """Which phrases the model itself would use for a set and not for other pictures.

        score_k = gain_k of the set - gain_k of the others,   gain_k = 1 - sum |y - E[x0 | x, phrase_k]|^2 / sum |y - E_0|^2
        a phrase fits a picture best that takes the largest part of its error away, if any does

    at five noise levels, with the same noise for all phrases. In rounds: all phrases on a few pictures, the better half on twice as many.
    Chosen are, as `describe` does it by an exact test, those that fit more pictures of the set best than of the others, not by chance.

    Source: a diffusion model as classifier, arXiv:2303.16203; halving: arXiv:1502.07943; the contrast and the test are ours.

    Args:
        model: that is asked. latents, others: (N, *shape) and (M, *shape) in its space, of which at most 32 each are asked.
        encode: what the model is told for a phrase. neutral: the condition that means nothing in particular.
        tell: called as tell(rows done, rows in all).

    Raises:
        ValueError: fewer than two pictures of the set or of the others.
    """
    total = rows_needed(len(phrases), len(latents), len(others))
    conditions = {i: encode(phrase) for i, phrase in enumerate(phrases)}
    left, done = [*conditions], 0
    scores, fits = torch.full((len(phrases),), -torch.inf, dtype=torch.float64), ()
    for asked, size in rounds(len(phrases), len(latents), len(others)):
        left = sorted(left, key=lambda i: -float(scores[i]))[:asked]
        probes = [Probe(model, _spread(one, size), neutral, batch=batch, seed=seed) for one in (latents, others)]
        fits = [torch.zeros(probe.shape[1], len(phrases), dtype=torch.float64) for probe in probes]
        for i in left:
            for fit, probe in zip(fits, probes):
                fit[:, i] = probe.gain(conditions[i]).by_picture.double().cpu()
            done += sum(len(probe.x) for probe in probes)
            if tell:
                tell(done, total)
        done += sum(len(probe.x) for probe in probes)
        scores[left] = (fits[0].mean(0) - fits[1].mean(0))[left]
    return _chosen(phrases, scores, fits, left, count)


def _spread(latents: Tensor, count: int) -> Tensor:
    """`count` of these, spread evenly."""
    return latents[torch.linspace(0, len(latents) - 1, min(count, len(latents))).long().to(latents.device)]


def _chosen(phrases: Sequence[str], scores: Tensor, fits: Sequence[Tensor], left: Sequence[int], count: int) -> Description:
    """By the last round; a picture that no phrase helps with counts for none."""
    only = torch.full((len(phrases),), -torch.inf, dtype=torch.float64).index_fill(0, torch.tensor(left), 0.0)
    best = [(fit + only).max(1) for fit in fits]
    hits = torch.stack([torch.bincount(one.indices[one.values > 0], minlength=len(phrases)) for one in best])
    return chosen_of(tuple(phrases), scores, hits, [len(fit) for fit in fits], best[0].indices, best[0].values, count)
