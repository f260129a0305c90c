"""Parts: where the unwanted thing is a part of the picture, wherever it stands, windows are compared instead of whole pictures.

    bank (N, C, H, W) --windows--> crops (N, P, ...) --locate--> of each picture the crop that shows the unwanted thing (N, C, h, w)
"""
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import Bank

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
    places = windows(bank.latents.shape[1:], parts)
    some, beside = bank.sample(SAMPLE), other.sample(SAMPLE)
    crops, known = _coarse(some.latents, places), _coarse(beside.latents, places)
    (n, count), m = crops.shape[:2], len(known)
    flat = crops.flatten(0, 1)
    width = _width(Bank(flat).sample(4 * SAMPLE).latents)

    def log_other(own: Tensor, one_out: bool = False) -> Tensor:
        """log p_other,w of crops (B, P, d), (B, P), each at its own place."""
        each = [_kernel(own[:, p], known[:, p], width, torch.eye(m, dtype=torch.bool, device=own.device) if one_out else None)
                for p in range(count)]
        return torch.stack([k.sum(1).log() + top[:, 0] - math.log(max(1, m - one_out)) for k, top in each], 1)

    def log_unsafe(kernel: tuple[Tensor, Tensor], a: Tensor) -> Tensor:
        return ((kernel[0] @ a.flatten()).clamp_min(1e-30).log() + kernel[1][:, 0] - a.sum().log()).view(-1, count)

    picture = torch.arange(n, device=flat.device).repeat_interleave(count)
    among = _kernel(flat, flat, width, picture[:, None] == picture if n > 1 else None)
    weight, beyond = some.log_weights.exp()[:, None].to(flat), log_other(crops)
    a = weight.expand(n, count) / count
    for _ in range(ROUNDS):
        scores = log_unsafe(among, a) - beyond
        a = weight * (SURE * scores).softmax(1)
    found = scores.argmax(1)
    if len(bank) > n:
        parts_of = [_coarse(bank.latents[i:i + SAMPLE], places) for i in range(0, len(bank), SAMPLE)]
        found = torch.cat([(log_unsafe(_kernel(part.flatten(0, 1), flat, width), a) - log_other(part)).argmax(1) for part in parts_of])
    separation = 0.5
    if min(n, m) >= ENOUGH:
        usual = log_unsafe(_kernel(known.flatten(0, 1), flat, width), a) - log_other(known, one_out=True)
        highest, usual = scores.amax(1)[:, None], usual.amax(1)
        separation = float((highest > usual).float().mean() + 0.5 * (highest == usual).float().mean())
    return Located(found.tolist(), separation)


def choose(bank: Bank, other: Bank, parts: int | None) -> list:
    """How many parts a side, and what `Located` holds where there are several: [parts] or [parts, window, separation].

    As given; where `parts` is None, two if windows separate the banks by MARGIN more than whole pictures do, else one.
    """
    found = locate(bank, other, parts or 2)
    if parts is None and found.separation <= max(locate(bank, other, 1).separation + MARGIN, TELLING):
        return [1]
    return [parts or 2, found.window, found.separation] if parts != 1 else [1]
