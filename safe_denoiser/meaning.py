"""What follows from the embeddings of pictures: how they fit a text, which are twins, which to choose, how near they are to a set."""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .clip import Clip


def text_scores(clip: Clip, embeddings: Tensor, text: str, against: str = "") -> Tensor:
    """How well pictures fit a text: the cosine, or with something to compare with, the probability.

        score = max_m cos(e, text_m),   or   sigmoid(scale (max_m cos(e, text_m) - max_m cos(e, against_m)))

    Source: CLIP, arXiv:2103.00020, section 3.1, with two classes.

    Args:
        embeddings: of the pictures (N, E).
        text, against: one meaning per line, of which the best counts; against "" compares with nothing.

    Returns:
        (N,), in [-1, 1], or in [0, 1] where `against` is given.
    """
    near = [(embeddings @ clip.texts(lines).T).amax(1) for lines in map(lines_of, (text, against)) if lines]
    return near[0] if len(near) == 1 else torch.sigmoid(clip.scale * (near[0] - near[1]))


def lines_of(text: str) -> list[str]:
    """The lines that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def twins(embeddings: Tensor, threshold: float) -> list[int]:
    """For each picture the first earlier one, itself no twin, whose cosine reaches `threshold`, or -1. Earlier rows win."""
    alike, found = embeddings @ embeddings.T >= threshold, []
    for i in range(len(embeddings)):
        earlier = [j for j in alike[i, :i].nonzero()[:, 0].tolist() if found[j] < 0]
        found.append(earlier[0] if earlier else -1)
    return found


def diverse(embeddings: Tensor, count: int) -> list[int]:
    """`count` rows that cover the others: the first, then always the one farthest from all that were picked.

    Source: greedy k-center, Gonzalez, Theoretical Computer Science 38 (1985): at most twice the smallest possible radius.
    """
    picked, distance = [0], 1 - embeddings @ embeddings[0]
    while len(picked) < min(count, len(embeddings)):
        picked.append(int(distance.argmax()))
        distance = torch.minimum(distance, 1 - embeddings @ embeddings[picked[-1]])
    return picked


def choose(scores: Tensor, embeddings: Tensor, names: Sequence[str], threshold: float = 0.0, twin: float = 0.0, top: int = 0,
           spread: int = 0) -> tuple[list[int], list[str]]:
    """Which pictures are kept, best score first, and in a few words why each other is dropped ("" for the kept), in the set's order.

    In this order: score below `threshold`, twin of a better one (cosine of at least `twin`), not among the `top` best, not among the
    `spread` that cover the rest. 0 leaves a rule out.
    """
    why = ["" if not threshold or score >= threshold else f"below {threshold:g}" for score in scores.tolist()]
    kept = [i for i in scores.argsort(descending=True, stable=True).tolist() if not why[i]]
    if twin:
        for i, of in zip(kept, twins(embeddings[kept], twin)):
            why[i] = "" if of < 0 else f"twin of {names[kept[of]]}"
        kept = [i for i in kept if not why[i]]
    if top:
        why = [f"not among the best {top}" if i in kept[top:] else reason for i, reason in enumerate(why)]
        kept = kept[:top]
    if spread and kept:
        covering = {kept[place] for place in diverse(embeddings[kept], spread)}
        why = [f"near one of the {spread} kept" if i in kept and i not in covering else reason for i, reason in enumerate(why)]
        kept = [i for i in kept if i in covering]
    return kept, why


def nearest(embeddings: Tensor, of: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Mean cosine to the `count` nearest rows of `of` (N, E), (B,), and which row is the very nearest, (B,)."""
    cosines, rows = (embeddings @ of.T).topk(min(count, len(of)))
    return cosines.mean(1), rows[:, 0]


def likeness(embeddings: Tensor, unsafe: Tensor, retain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How near pictures are to the negation set, (B,), and to which of its pictures most, (B,): the mean cosine to the nearest three, and
    with a retain set how much more that is than the same with the retain set, which tells shapes between the two better.
    """
    near, row = nearest(embeddings, unsafe)
    return near if retain is None else near - nearest(embeddings, retain)[0], row


def exceeded_by(found: Tensor, rate: float) -> float:
    """What the next of such numbers (n,) exceeds with a probability of at most `rate`: the ceil((n + 1)(1 - rate))-th smallest; the
    largest, where that is more than n.

    Source: conformal prediction, Vovk et al., Algorithmic Learning in a Random World (2005): for any distribution, from n >= 1/rate - 1.
    """
    place = math.ceil((len(found) + 1) * (1 - rate))
    return float(found.sort().values[min(len(found), max(1, place)) - 1])


def alarm_threshold(unsafe: Tensor, retain: Tensor, rate: float) -> float:
    """The `likeness` that a picture like those of the retain set exceeds with a probability of at most `rate`: `exceeded_by` of the
    likenesses of the retain pictures, each held against the others (leave-one-out, so nearly exact).

    Args:
        unsafe: embeddings of the negation set (N, E). retain: of pictures that must pass (n, E). rate: of false alarms, in [0, 1].

    Raises:
        ValueError: fewer than two retain pictures.
    """
    if len(retain) < 2:
        raise ValueError("retain_set has one picture, and false alarms cannot be counted on it; connect 1/false_alarms pictures or more")
    others = (retain @ retain.T).fill_diagonal_(-math.inf).topk(min(3, len(retain) - 1)).values.mean(1)
    return exceeded_by(nearest(retain, unsafe)[0] - others, rate)
