"""What follows from the embeddings of pictures: choosing, telling twins, checking."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import BATCH, Clip
from .pictures import blur


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
    near = [(embeddings @ clip.texts(lines).T).amax(1) for lines in map(_lines, (text, against)) if lines]
    return near[0] if len(near) == 1 else torch.sigmoid(clip.scale * (near[0] - near[1]))


def _lines(text: str) -> list[str]:
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


def alarm_threshold(unsafe: Tensor, retain: Tensor, rate: float) -> float:
    """The `likeness` that a picture like those of the retain set exceeds with a probability of at most `rate`.

        threshold = the ceil((n + 1)(1 - rate))-th smallest of the likenesses of the n retain pictures, each held against the others;
                    the largest, where that is more than n

    Source: conformal prediction, Vovk et al., Algorithmic Learning in a Random World (2005): for any distribution, from n >= 1/rate - 1
    pictures; leave-one-out, so nearly exact.

    Args:
        unsafe: embeddings of the negation set (N, E). retain: of pictures that must pass (n, E). rate: of false alarms, in [0, 1].

    Raises:
        ValueError: fewer than two retain pictures.
    """
    if len(retain) < 2:
        raise ValueError("retain_set has one picture, and false alarms cannot be counted on it; connect 1/false_alarms pictures or more")
    others = (retain @ retain.T).fill_diagonal_(-math.inf).topk(min(3, len(retain) - 1)).values.mean(1)
    found = (nearest(retain, unsafe)[0] - others).sort().values
    return float(found[min(len(found), max(1, math.ceil((len(found) + 1) * (1 - rate)))) - 1])


CHANCE = 0.05  # that a phrase is chosen though none tells the pictures apart
SHARE = 0.1  # of the set's pictures, which a phrase must fit best to be chosen


@dataclass(frozen=True, eq=False)
class Description:
    """What a set shows, in phrases.

    Args:
        phrases: (K,) that were held against each other.
        scores, shares: of each phrase, (K,) and (1 or 2, K), see `describe`.
        words: what became of each phrase.
        chosen: the phrases that describe the set, best first.
        best, fits: which phrase fits each picture of the set best, and its probability, (N,).
        verdict: on what this rests, and why no phrase was chosen where none was.
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
    unique = {}
    for line in _lines(phrases):
        unique.setdefault(line.lower(), line)
    if len(unique) < 2:
        raise ValueError(f"phrases has {len(unique)} different lines, and they are held against each other; write two or more: what the "
                         f"pictures may show, and 'a picture'")
    texts = clip.texts(tuple(unique.values())).double()
    fits = [(clip.scale * one.double() @ texts.T).softmax(1) for one in (embeddings, contrast) if one is not None]
    hits = torch.stack([one.argmax(1).bincount(minlength=len(unique)) for one in fits])
    sizes = [len(one) for one in fits]
    shares = hits / torch.tensor(sizes)[:, None]
    scores = fits[0].mean(0) - (1 / len(unique) if contrast is None else fits[1].mean(0))
    words, chosen = [""] * len(unique), []
    for i in _descending(scores):
        if shares[0, i] < SHARE:
            words[i] = f"fits too few ({SHARE:.0%} needed)"
        elif scores[i] <= 0 or _by_chance(hits[:, i].tolist(), sizes, len(unique)) > CHANCE / len(unique):
            words[i] = "no clear difference"
        else:
            words[i] = "chosen" if len(chosen) < count else f"not among the best {count}"
            chosen += [i] * (len(chosen) < count)
    fit, best = fits[0].max(1)
    return Description(tuple(unique.values()), scores, shares, tuple(words), tuple(chosen), best, fit,
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
    """On what a description rests, and its outcome."""
    alone = len(sizes) == 1
    given = f"{sizes[0]} pictures, {'no contrast' if alone else f'{sizes[1]} of contrast'}: "
    if _by_chance([sizes[0], 0][:len(sizes)], sizes, phrases) > CHANCE / phrases:
        return f"{given}too few to tell {phrases} phrases from chance, so none is chosen; connect more pictures or write fewer phrases"
    if not chosen:
        return f"{given}no phrase describes the set and {'stands out' if alone else 'separates it'}; write others that say what it shows"
    return f"{given}{chosen} of {phrases} phrases chosen" + ", perhaps such as fit any picture; connect retain_set or images" * alone


@dataclass(frozen=True, eq=False)
class Checked:
    """Pictures that were held against a negation set.

    Args:
        pictures: (B, H, W, 3) in [0, 1].
        blocked: which of them must not be shown (B,), bool.
        covered: the same pictures with the blocked ones made unrecognisable.
        lines: what was found, one line per picture.
    """

    pictures: Tensor
    blocked: Tensor
    covered: Tensor
    lines: tuple[str, ...]

    def filled(self, again: "Checked") -> "Checked":
        """The same with the blocked pictures replaced, in order, by those of `again`, which may be blocked in turn.

        Raises:
            ValueError: not as many new pictures as there are blocked ones, or of another size.
        """
        rows = self.blocked.nonzero()[:, 0]
        if len(again.pictures) != len(rows) or again.pictures.shape[1:] != self.pictures.shape[1:]:
            raise ValueError(f"{len(rows)} pictures of {tuple(self.pictures.shape[1:])} are blocked, but {len(again.pictures)} of "
                             f"{tuple(again.pictures.shape[1:])} came again; sample from the output `again` of this check")
        lines = list(self.lines)
        for row, line in zip(rows.tolist(), again.lines):
            lines[row] += f"; again: {line}"
        return Checked(*(old.index_copy(0, rows, new.to(old)) for old, new in (
            (self.pictures, again.pictures), (self.blocked, again.blocked), (self.covered, again.covered))), tuple(lines))

    @property
    def report(self) -> str:
        """Counts, and one line per picture."""
        refused = int(self.blocked.sum())
        return "\n".join([f"{len(self.lines) - refused} passed, {refused} refused",
                          *(f"image {i}: {line}" for i, line in enumerate(self.lines))])


def check(clip: Clip, pictures: Tensor, unsafe: Tensor, names: Sequence[str], threshold: float, black: bool = False,
          retain: Tensor | None = None) -> Checked:
    """Block each picture whose `likeness` to the negation set exceeds `threshold`.

    Args:
        pictures: (B, H, W, 3) in [0, 1].
        unsafe: embeddings of the negation set (N, E). names: of its pictures. retain: embeddings of pictures that must pass (M, E).
        black: cover what is blocked with black; else it is blurred.
    """
    found, row = likeness(torch.cat([clip.pixels(part).cpu() for part in pictures.split(BATCH)]), unsafe, retain)
    blocked = found > threshold
    covered = pictures.clone()
    for i in blocked.nonzero()[:, 0].tolist():
        covered[i] = 0 if black else blur(pictures[i])
    said = "{:.3f} to {}, threshold {:.3f}" if retain is None else "{:+.3f} nearer to {} than to the retain set, threshold {:+.3f}"
    lines = [f"{'blocked' if stop else 'passed'}, {said.format(float(s), names[n], threshold)}" for stop, s, n in zip(blocked, found, row)]
    return Checked(pictures, blocked, covered, tuple(lines))


class SemanticPosterior:
    """What the meaning of the decoded prediction says about it; for `SafeDenoiser(semantic=...)`. Experimental.

        log p_u(e) - log p_retain(e),   log p(e) = logsumexp_n(concentration <e, y_n>) - log N

    with e the embedding of the decoded prediction: the density ratio of arXiv:2502.08011, Thm 3.2, in CLIP's space, by von
    Mises-Fisher kernels. Ours. Decoding and embedding cost more than the rest, so the answer is carried over `every` - 1 calls.

    Args:
        clip: the model.
        decode: denoised latents (B, C, *spatial) -> pictures (B, H, W, 3) in [0, 1].
        unsafe, retain: embeddings of the pictures of both sets, (N, E).
        concentration: of the kernels; higher listens to the nearest pictures only.
        every: asked anew at each such call of a run.
    """

    def __init__(self, clip: Clip, decode: Callable[[Tensor], Tensor], unsafe: Tensor, retain: Tensor, concentration: float = 20.0,
                 every: int = 4):
        self.clip, self.decode, self.sets, self.concentration, self.every = clip, decode, (unsafe, retain), concentration, every
        self.calls, self.level, self.odds = 0, None, None

    def __call__(self, denoised: Tensor, level: Tensor) -> Tensor:
        """(B,) log odds of one prediction; `level`, sigma / alpha (B,), falls within a run, and where it rises a new one begins."""
        if self.odds is None or len(self.odds) != len(denoised) or bool((level > self.level).any()):
            self.calls = 0
        if self.calls % self.every == 0:
            embeddings = self.clip.pixels(self.decode(denoised))
            near = [(self.concentration * embeddings @ one.to(embeddings).T).logsumexp(1) - math.log(len(one)) for one in self.sets]
            self.odds = near[0] - near[1]
        self.calls, self.level = self.calls + 1, level
        return self.odds.to(level)
