"""Windows: where the unwanted thing fills only a part of a picture, anywhere in it, windows are compared instead of whole pictures.

    bank (N, C, H, W) --windows--> crops (N, P, ...) --locate--> of each picture the crop that shows the unwanted thing (N, C, h, w)
"""
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.bank import Bank

SAMPLE = 128  # pictures of a larger bank among which the unwanted thing is sought; the others are compared with what was found
FINE = 8  # positions along a side of a crop, above which only its low frequencies are compared
SHARE = 0.2  # of the crops that vouch for one, as for a bank's automatic temperature
SURE = 4.0  # power of the odds by which the windows of a picture compete; high, since one is to win
ROUNDS = 10
MARGIN = 0.08  # by how much more parts must separate two banks than whole pictures do
TELLING = 0.7  # and how well at least: two draws of mere noise are told apart with 0.6 or so by chance
ENOUGH = 8  # pictures in each bank, with fewer of which that cannot be judged


@dataclass(frozen=True)
class Located:
    """The number of the window that shows the unwanted thing, one per picture, and how well windows tell the bank from the other.

    `separation` is the area under the ROC curve of each picture's highest score, leave-one-out: 0.5, not at all, to 1.
    """

    window: list[int]
    separation: float


def windows(item: Sequence[int], parts: int) -> list[tuple]:
    """Indices of the windows of latents (..., *item): 1 / parts of each side, at 2 parts - 1 places along it, so half overlapping."""
    axes = []
    for size in item[1:][-2:]:
        length, places = -(-size // parts), 2 * parts - 1
        starts = dict.fromkeys(round(i * (size - length) / max(1, places - 1)) for i in range(places))
        axes.append([slice(start, start + length) for start in starts])
    return [(..., *place) for place in itertools.product(*axes)]


def _coarse(latents: Tensor, places: list[tuple]) -> Tensor:
    """Crops of latents (N, C, *spatial) at no more than FINE positions a side, flat (N, P, d), single precision."""
    def pooled(crop):
        size = [min(FINE, side) for side in crop.shape[2:][-2:]]
        pool = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool1d
        return pool(crop.float().flatten(1, -1 - len(size)), size).flatten(1)

    return torch.stack([pooled(latents[place]) for place in places], 1)


def _kernel(x: Tensor, y: Tensor, width: float, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(top - |x - y|^2 / width), (B, N), and its top, (B, 1): what of each row may be summed without underflow."""
    logits = torch.cdist(x, y).square_() / -width
    if own is not None:
        logits.masked_fill_(own, -math.inf)
    top = logits.amax(1, keepdim=True).clamp_min(-1e30)
    return (logits - top).exp_(), top


def _width(crops: Tensor) -> float:
    """The kernel's width at which SHARE of the crops vouch for one (perplexity), by bisection; crops (n, d)."""
    d2 = torch.cdist(crops, crops).square_().fill_diagonal_(math.inf)
    low, high, target = -20.0, 20.0, max(1.5, SHARE * len(crops))
    for _ in range(20):
        middle = (low + high) / 2
        found = torch.special.entr((d2 / -math.exp(middle)).softmax(1)).sum(1).exp().mean()
        low, high = (middle, high) if found < target else (low, middle)
    return math.exp(high)


class _Scores:
    """s_nw of crops (B, P, d): log odds that a crop shows the bank's unwanted thing, and not what the other bank shows at that place."""

    def __init__(self, crops: Tensor, known: Tensor):
        self.known, self.flat, self.count = known, crops.flatten(0, 1), crops.shape[1]  # (M, P, d), (N P, d), P
        self.width = _width(Bank(self.flat).sample(4 * SAMPLE).latents)

    def log_other(self, crops: Tensor, own: Tensor | None = None) -> Tensor:
        """log p_other,w, (B, P); `own` (B, M) marks what does not vouch for itself."""
        each = [_kernel(crops[:, place], self.known[:, place], self.width, own) for place in range(self.count)]
        others = max(1, len(self.known) - (own is not None))
        return torch.stack([kernel.sum(1).log() + top[:, 0] for kernel, top in each], 1) - math.log(others)

    def log_unsafe(self, kernel: tuple[Tensor, Tensor], a: Tensor) -> Tensor:
        """log p_u, (B, P), of the crops whose kernel with the bank's crops this is; these weigh a (N, P)."""
        return ((kernel[0] @ a.flatten()).clamp_min(1e-30).log() + kernel[1][:, 0] - a.sum().log()).view(-1, self.count)

    def of(self, crops: Tensor, a: Tensor, own: Tensor | None = None) -> Tensor:
        return self.log_unsafe(_kernel(crops.flatten(0, 1), self.flat, self.width), a) - self.log_other(crops, own)


def locate(bank: Bank, other: Bank, parts: int) -> Located:
    """Find, in each picture of the bank, the window that shows what the other bank's pictures do not: nobody has to draw it.

        s_nw = log p_u(crop_nw) - log p_other,w(crop_nw),   a_nw = pi_n softmax_w(SURE s_nw)

    with kernel densities, p_u of all crops weighed by a, other pictures' only, p_other,w of the other bank's crops at the same place;
    both are repeated in turn. Each picture of the bank shows the unwanted thing at least once (multiple-instance learning; diverse
    density, Maron and Lozano-Perez, NeurIPS 1997); what else it shows, the other bank shows as well. The pack's own form.

    Args:
        bank, other: latents (N, C, *spatial) and (M, C, *spatial).
        parts: windows of 1 / parts of each side, see `windows`.
    """
    places, some = windows(bank.latents.shape[1:], parts), bank.sample(SAMPLE)
    crops, known = (_coarse(one.latents, places) for one in (some, other.sample(SAMPLE)))
    score, n, m = _Scores(crops, known), len(crops), len(known)
    picture = torch.arange(n, device=crops.device).repeat_interleave(score.count)
    among = _kernel(score.flat, score.flat, score.width, picture[:, None] == picture if n > 1 else None)
    weight, beyond = some.log_weights.exp()[:, None].to(crops), score.log_other(crops)
    a = weight.expand(n, score.count) / score.count
    for _ in range(ROUNDS):
        scores = score.log_unsafe(among, a) - beyond
        a = weight * (SURE * scores).softmax(1)
    found, separation = scores.argmax(1), 0.5
    if len(bank) > n:
        found = torch.cat([score.of(_coarse(bank.latents[i:i + SAMPLE], places), a).argmax(1) for i in range(0, len(bank), SAMPLE)])
    if min(n, m) >= ENOUGH:
        usual = score.of(known, a, torch.eye(m, dtype=torch.bool, device=known.device)).amax(1)
        highest = scores.amax(1)[:, None]
        separation = float((highest > usual).float().mean() + 0.5 * (highest == usual).float().mean())
    return Located(found.tolist(), separation)


def separation(bank: Bank, other: Bank, parts: int) -> float:
    """How well windows of 1 / parts of each side tell the bank from the other, see `Located`; found once, on a part of a large bank."""
    return bank.recall(f"separation by {parts} beside {other.fingerprint}", lambda: locate(bank.sample(SAMPLE), other, parts).separation)


def choose(bank: Bank, other: Bank, parts: int | None) -> list:
    """How many parts a side, and what `Located` holds where there are several: [1] or [parts, window, separation].

    As given; where `parts` is None, two if windows separate the banks by MARGIN more than whole pictures do, else one.
    """
    if parts == 1:
        return [1]
    if parts is None:
        halves, whole = (separation(bank, other, k) for k in (2, 1))
        if halves <= max(whole + MARGIN, TELLING):
            return [1]
    found = locate(bank, other, parts or 2)
    return [parts or 2, found.window, found.separation]
