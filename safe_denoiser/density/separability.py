"""Whether distances between latents tell what a bank shows: then kernels may steer by it. They do for drawings, not for photographs."""
import math

import torch
from torch import Tensor

from ..bank.bank import Bank
from ..bank.lazy_latents import squared_norms_of
from .densities import SAMPLE
from .kernel import rows, squared_distances
from .windows import ENOUGH, separation

SEEN = 0.85  # area under the ROC curve of banks by distance, from which kernels are trusted: digits 0.88 to 0.99, photographs below 0.83
SAMPLED = "reference samples"  # metadata `source` of a bank that a model made by itself
COPIES = 0.02  # share of copies of a bank's pictures in what the model makes, from which they count as memorised
NEARER = 0.5  # of the squared distance to the reference bank, below which the two are taken for exchanged


def between_neighbours(latents: Tensor) -> float:
    """Median distance of an item of flat latents (N, D) to its nearest neighbour; of a large bank, of SAMPLE of its items."""
    count = min(len(latents), SAMPLE)
    chosen, nearest = torch.arange(count, device=latents.device) * len(latents) // count, []
    norms = squared_norms_of(latents)
    for rows_of in chosen.split(32):  # a table of all pairs would not fit
        distances = squared_distances(latents[rows_of], latents, rows(1.0, latents[rows_of]), norms)
        nearest.append(distances.scatter_(1, rows_of[:, None], math.inf).amin(1))
    return float(torch.cat(nearest).sqrt().median())


def tells_apart(bank: Bank, other: Bank) -> bool:
    """Whether distances tell the bank from the other; or that one, what the model makes, holds copies of the bank's pictures (memorised
    ones): these are near whatever they show. Too few pictures, or no pictures, are trusted, since that cannot be judged.
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
    """Raise where a wire leads to the wrong input, as far as the banks themselves say.

    Raises:
        ValueError: what a model made by itself as what must not come out; or the same pictures as that and as another bank.
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
    """Whether a model's own prediction from pure noise under an empty prompt, shaped (B, *shape), which is the mean of what it makes, is
    nearer to the mean of the bank than to that of its reference; a bool on the device. The mean of N pictures is off by their variance
    over N, which is taken off.
    """
    def squared(one: Bank) -> Tensor:
        y = one.sample(SAMPLE).latents[:].to(predicted.device, torch.float32)
        spread = (y - y.mean(0)).square().sum() / max(1, len(y) - 1)
        return (predicted.float().mean(0) - y.mean(0)).square().sum() - spread / len(y)

    return squared(bank) < NEARER * squared(reference)
