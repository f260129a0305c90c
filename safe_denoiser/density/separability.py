"""Whether distances between latents reflect what a bank shows, so that kernels may steer by it: for drawings yes, not for photographs."""
import math

import torch
from torch import Tensor

from ..bank.bank import Bank
from ..bank.lazy_latents import BLOCK, LazyLatents, squared_norms_of
from ..telling import tell
from .densities import SAMPLE
from .kernel import NEAR, rows, squared_distances
from .windows import ENOUGH, separation

SEEN = 0.85  # area under the ROC curve of banks by distance, from which kernels are trusted: digits 0.88 to 0.99, photographs below 0.83
SAMPLED = "reference samples"  # metadata `source` of a bank that a model made by itself
COPIES = 0.02  # share of copies of a bank's pictures in what the model makes, from which they count as memorised
PART = 128  # items whose nearest neighbours are sought at once
NEARER = 0.5  # of the squared distance to the reference bank, below which the two are taken for exchanged


def between_neighbours(latents: Tensor | LazyLatents) -> float:
    """Median distance of an item of flat latents (N, D) to its nearest neighbour; of a large bank, of SAMPLE of its items. It reads all of
    the bank for each PART of them, in blocks where it is on disk.
    """
    count = min(len(latents), SAMPLE)
    chosen = torch.arange(count, device=latents.device) * len(latents) // count
    norms, block = squared_norms_of(latents), len(latents)
    if isinstance(latents, LazyLatents):
        block = max(1, BLOCK // latents.shape[1])
    table, nearest = norms.new_empty(PART, len(latents)), norms.new_empty(count)  # a table of all pairs would not fit
    for start, own in zip(range(0, count, PART), chosen.split(PART)):
        x, d2 = latents[own], table[:len(own)]
        for i in range(0, len(latents), block):
            torch.addmm(norms[i:i + block], x, latents[i:i + block].T, alpha=-2, out=d2[:, i:i + block])
        near = d2.scatter_(1, own[:, None], math.inf).topk(min(NEAR, len(latents) - 1), largest=False).indices
        for k, of in enumerate(near):  # what the product of large numbers loses
            nearest[start + k] = (x[k] - latents[of]).square().sum(1).amin()
        tell(start + len(own), count)
    return float(nearest.sqrt().median())


def tells_apart(bank: Bank, other: Bank) -> bool:
    """Whether distances separate the bank from the other bank; or the other, the model's own samples, holds copies of the bank's pictures
    (memorised ones), which are near whatever they show. Where there are too few pictures to judge, or none, the answer is yes.
    """
    if min(len(bank), len(other)) < ENOUGH or bank.latents.ndim < 3:
        return True
    return separation(bank, other, 1) > SEEN or bank.recall(f"copies in {other.fingerprint}", lambda: copies(bank, other)) > COPIES


def copies(bank: Bank, other: Bank) -> float:
    """Share of the other bank's items that lie twice as near to one of the bank's as the bank's own do to each other."""
    dtype = torch.promote_types(bank.latents.dtype, torch.float32)
    mine, theirs = (one.sample(SAMPLE).latents[:].flatten(1).to(bank.latents.device, dtype) for one in (bank, other))
    nearest = squared_distances(theirs, mine, rows(1.0, theirs)).amin(1).sqrt()
    return float((nearest < between_neighbours(mine) / 2).float().mean())


def require_unlike(bank: Bank | None, others: dict[str, Bank | None]) -> None:
    """Raise where the banks themselves show that a wire leads to the wrong input.

    Raises:
        ValueError: the negation bank holds a model's own samples, or the same pictures as another of the banks.
    """
    if bank is None:
        return
    if bank.metadata.get("source") == SAMPLED:
        raise ValueError("negation_bank is connected to a reference bank, of samples that the model made by itself: it would be steered "
                         "away from everything, and towards what must not come out; connect Build or Load Negation Bank there, and the "
                         "reference bank to reference_bank")
    for name, other in others.items():
        same = other is not None and (other is bank or bank.metadata.get("set", "") == other.metadata.get("set"))
        if same or other is not None and other.fingerprint == bank.fingerprint:
            raise ValueError(f"negation_bank and {name}_bank are made of the same pictures: what must not come out cannot be what to steer "
                             f"towards; connect another bank to {name}_bank, or none")


def looks_exchanged(bank: Bank, reference: Bank, predicted: Tensor) -> Tensor:
    """Whether the two banks look exchanged: a prediction from pure noise under an empty prompt, `predicted` (B, *shape), is the mean of all
    that the model makes, and lies nearer to the mean of the bank than to that of the reference bank. A bool on the device. The error of a
    mean of N pictures, their variance over N, is subtracted.
    """
    def squared(one: Bank) -> Tensor:
        y = one.sample(SAMPLE).latents[:].to(predicted.device, torch.float32)
        spread = (y - y.mean(0)).square().sum() / max(1, len(y) - 1)
        return (predicted.float().mean(0) - y.mean(0)).square().sum() - spread / len(y)

    return squared(bank) < NEARER * squared(reference)
