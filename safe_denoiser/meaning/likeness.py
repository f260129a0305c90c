"""How near pictures are to a set, and from which threshold on that is an alarm."""
import math

from torch import Tensor


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
    """The threshold that another number like `found` (n,) exceeds with a probability of at most `rate`: of `found` the
    ceil((n + 1)(1 - rate))-th smallest, or the largest where that is more than n.

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
