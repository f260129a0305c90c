"""Phrases that fit a set of pictures better than other pictures: the text of an unwanted condition."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import Clip
from .texts import lines_of

CHANCE = 0.05  # that a phrase is chosen though none tells the pictures apart
SHARE = 0.1  # of the set's pictures, which a phrase must fit best to be chosen


@dataclass(frozen=True, eq=False)
class Description:
    """What a set shows, in phrases.

    Args:
        phrases: (K,) that were held against each other.
        scores, shares: of each phrase, (K,) and (1 or 2, K), see `describe`.
        words: why each phrase was chosen or not.
        chosen: the phrases that describe the set, best first.
        best, fits: which phrase fits each picture of the set best, and its probability, (N,).
        verdict: how many pictures this rests on, and why no phrase was chosen where none was.
    """

    phrases: tuple[str, ...]
    scores: Tensor
    shares: Tensor
    words: tuple[str, ...]
    chosen: tuple[int, ...]
    best: Tensor
    fits: Tensor
    verdict: str

    @property
    def text(self) -> str:
        """The chosen phrases, for a prompt."""
        return ", ".join(self.phrases[i] for i in self.chosen)

    @property
    def table(self) -> str:
        """The verdict, and one line per phrase, best first."""
        lines = [self.verdict]
        for i in _descending(self.scores):
            shares = " and ".join(f"{share:.0%} of the {of}" for share, of in zip(self.shares[:, i].tolist(), ("set", "contrast")))
            lines.append(f"{self.scores[i]:+.3f} {self.phrases[i]}: best for {shares}, {self.words[i]}")
        return "\n".join(lines)


def describe(clip: Clip, embeddings: Tensor, phrases: str, contrast: Tensor | None = None, count: int = 3) -> Description:
    """Which phrases say what the pictures of a set show and other pictures do not.

        p_k(e) = softmax_k(scale cos(e, phrase_k)),   share_k = share of the pictures whose p_k is the largest
        score_k = mean p_k of the set - mean p_k of the contrast
        chosen: share_k of the set >= 1/10, and score_k > 0, and so many more of the set than of the contrast are the phrase's with a
        probability of at most 0.05 / K, were all of them drawn from one pot (the hypergeometric distribution); the best scores first

    Where nothing tells the two apart, a phrase is chosen with a probability of 5 % at most. A phrase that is only less wrong for the set
    is the best of few pictures. Without a contrast the other phrases take its place: score_k = mean p_k - 1 / K, and chance is that each
    picture draws its phrase (the binomial distribution); then a phrase is chosen, too, that would be the best of any picture.

    Source: CLIP, arXiv:2103.00020, section 3.1; Fisher's exact test, The Design of Experiments (1935); Bonferroni's bound. Their
    combination is ours.

    Args:
        embeddings: of the pictures of the set (N, E). contrast: of other pictures (M, E), or None.
        phrases: one per line; of equal ones, whatever their case, the first.
        count: choose at most this many.

    Raises:
        ValueError: fewer than two phrases.
    """
    unique = different(phrases)
    texts = clip.texts(unique).double()
    fits = [(clip.scale * one.double() @ texts.T).softmax(1) for one in (embeddings, contrast) if one is not None]
    hits = torch.stack([one.argmax(1).bincount(minlength=len(unique)) for one in fits])
    scores = fits[0].mean(0) - (1 / len(unique) if contrast is None else fits[1].mean(0))
    fit, best = fits[0].max(1)
    return chosen_of(unique, scores, hits, [len(one) for one in fits], best, fit, count)


def different(phrases: str) -> tuple[str, ...]:
    """The phrases, one per line; of those that differ at most in case, the first.

    Raises:
        ValueError: fewer than two.
    """
    unique = {}
    for line in lines_of(phrases):
        unique.setdefault(line.lower(), line)
    if len(unique) < 2:
        raise ValueError(f"phrases has {len(unique)} different lines, and they are held against each other; write two or more: what the "
                         f"pictures may show, and 'a picture'")
    return tuple(unique.values())


def chosen_of(unique: tuple[str, ...], scores: Tensor, hits: Tensor, sizes: list[int], best: Tensor, fit: Tensor,
              count: int) -> Description:
    """The phrases that tell a set from its contrast and not by chance, see `describe`; hits (1 or 2, K), of which each column counts the
    pictures that a phrase fits best.
    """
    shares = hits / torch.tensor(sizes)[:, None]
    words, chosen = [""] * len(unique), []
    for i in _descending(scores):
        if shares[0, i] < SHARE:
            words[i] = f"fits too few ({SHARE:.0%} needed)"
        elif scores[i] <= 0 or _by_chance(hits[:, i].tolist(), sizes, len(unique)) > CHANCE / len(unique):
            words[i] = "no clear difference"
        else:
            words[i] = "chosen" if len(chosen) < count else f"not among the best {count}"
            chosen += [i] * (len(chosen) < count)
    return Description(unique, scores, shares, tuple(words), tuple(chosen), best, fit,
                       _verdict(len(chosen), sizes, len(unique)))


def _descending(scores: Tensor) -> list[int]:
    return scores.argsort(descending=True, stable=True).tolist()


def _by_chance(hits: Sequence[int], sizes: Sequence[int], phrases: int) -> float:
    """How likely a phrase is the best of so many pictures of the set or of more by chance; hits and sizes of the set and the contrast."""
    def ways(of, taken):
        """log of the binomial coefficient."""
        return torch.lgamma(of + 1.0) - torch.lgamma(taken + 1.0) - torch.lgamma(of - taken + 1.0)

    n, *m = torch.tensor(sizes, dtype=torch.float64)
    total = torch.tensor(float(sum(hits)), dtype=torch.float64)
    if not m:
        drawn = torch.arange(hits[0], sizes[0] + 1, dtype=torch.float64)
        return float((ways(n, drawn) - drawn * math.log(phrases) + (n - drawn) * math.log1p(-1 / phrases)).logsumexp(0).exp())
    drawn = torch.arange(hits[0], min(sizes[0], sum(hits)) + 1, dtype=torch.float64)
    return float((ways(n, drawn) + ways(m[0], total - drawn) - ways(n + m[0], total)).logsumexp(0).exp())


def _verdict(chosen: int, sizes: Sequence[int], phrases: int) -> str:
    """How many pictures a description rests on, and its outcome."""
    alone = len(sizes) == 1
    given = f"{sizes[0]} pictures, {'no contrast' if alone else f'{sizes[1]} of contrast'}: "
    if _by_chance([sizes[0], 0][:len(sizes)], sizes, phrases) > CHANCE / phrases:
        return f"{given}too few to tell {phrases} phrases from chance, so none is chosen; connect more pictures or write fewer phrases"
    if not chosen:
        return f"{given}no phrase describes the set and {'stands out' if alone else 'separates it'}; write others that say what it shows"
    return f"{given}{chosen} of {phrases} phrases chosen" + ", perhaps such as fit any picture; connect retain_set or images" * alone
