"""Which pictures of a set to keep: those above a score, no near-duplicates, the best, or a few that cover the rest."""
from collections.abc import Sequence

import torch
from torch import Tensor


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
