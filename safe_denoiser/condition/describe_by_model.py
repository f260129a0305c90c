"""What a set shows, in the diffusion model's own words: the phrases that help it to denoise these pictures, and not others."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..meaning.describe import Description, chosen_of
from .gain import LEVELS, Condition, Model, Probe

FIRST, MOST = 8, 32  # pictures of the set, and as many others, in the first round and in the last; the number doubles in between


def rounds(phrases: int, pictures: int, others: int) -> list[tuple[int, int]]:
    """(phrases, pictures) of each round. While more than four phrases are left, half of them go on, to twice as many pictures."""
    most, found, count = min(MOST, max(pictures, others)), [], min(FIRST, max(pictures, others))
    while count < most and phrases > 4:
        found.append((phrases, count))
        phrases, count = -(-phrases // 2), min(2 * count, most)
    return [*found, (phrases, most)]


def rows_needed(phrases: int, pictures: int, others: int) -> int:
    """How many noised pictures the model will be asked for in all rounds: each picture at each level, once per phrase and once without.

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
    """The phrases that fit a set of pictures and not other pictures, as the diffusion model itself sees them.

        score_k = gain_k of the set - gain_k of the others,   gain_k = 1 - sum |y - E[x0 | x, phrase_k]|^2 / sum |y - E_0|^2

    at five noise levels, with the same noise for all phrases. In rounds: all phrases on a few pictures, the better half on twice as many.
    The phrase that takes away most of a picture's error fits it best, if any takes away some. Chosen are the phrases that fit more pictures
    of the set best than of the others, beyond chance, by the exact test of `describe`.

    Source: a diffusion model as classifier, arXiv:2303.16203; halving: arXiv:1502.07943; the contrast and the test are ours.

    Args:
        model: the one that is asked. latents, others: (N, *shape) and (M, *shape), in its space; at most 32 of each are looked at.
        encode: from a phrase to the condition. neutral: the condition that means nothing in particular.
        count: of phrases chosen, at most. batch: rows in one model call. seed: of the noise.
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
