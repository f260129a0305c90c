"""SAFREE: rows of a prompt's embedding without their part in the concepts' span, one function per published equation."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.01  # by how much farther from the concepts a prompt must lie without a token that carried them; as published
STEPS, SCHEDULE = 10, 50  # for how many steps of how many SAFREE's rows are used at the most; as published
SHARPNESS, MIDDLE = 2.5, 5.333  # of the self-validating filter; as published
SHARPNESS_NAMES, MIDDLE_NAMES = 3.5, 5.5  # the same for artists


def span(vectors: Tensor) -> Tensor:
    """Q (R, E), orthonormal rows that span the rows of vectors (M, E): the projector C (C^T C)^+ C^T of arXiv:2410.12761, section 3, is
    Q^T Q, which is never formed, since E may be 4,096.
    """
    _, values, rows = torch.linalg.svd(vectors, full_matrices=False)
    return rows[values > values[:1] * max(vectors.shape) * torch.finfo(vectors.dtype).eps]


def onto(v: Tensor, q: Tensor) -> Tensor:
    """The part of v (..., E) in the span of orthonormal rows q (R, E)."""
    return v @ q.T @ q


def distances(without: Tensor, concepts: Tensor) -> Tensor:
    """d_i = |(I - P_C) p_i|, (n,): how far from the concepts a prompt lies without its i-th token. Source: SAFREE, arXiv:2410.12761,
    section 3.

    Args:
        without: pooled embeddings of the prompt, each with one token replaced (n, E).
        concepts: pooled embeddings of the concepts, each encoded alone (M, E).
    """
    return (without - onto(without, span(concepts))).norm(dim=1)


def flagged(d: Tensor, whole: Tensor, alpha: float = ALPHA) -> Tensor:
    """Which tokens carry the concept, (n,), bool: d_i >= (1 + alpha) mean_{j != i} d_j. Source: SAFREE, arXiv:2410.12761, section 3.

    Where there is one token, there are no others; it is held against the whole prompt's distance (), which is ours.
    """
    others = whole if len(d) == 1 else (d.sum() - d) / (len(d) - 1)
    return d >= (1 + alpha) * others


def safree(tokens: Tensor, without: Tensor, concepts: Tensor) -> Tensor:
    """(I - P_C) P_I e_i, (n, E): rows of a prompt in the span of its own variants, without their part in the concepts' span.
    Source: SAFREE, arXiv:2410.12761, section 3; it takes the place of e_i for tokens that are `flagged`.

    Args:
        tokens: e, rows of the prompt's conditioning (n, E). without, concepts: as in `distances`.
    """
    inside = onto(tokens, span(without))
    return inside - onto(inside, span(concepts))


def filter_steps(tokens: Tensor, projected: Tensor, names: bool = False) -> int:
    """t' = round(T_up sigmoid(2 k (10 z - t0))), z = 1 - mean_i cos(projected_i, e_i): for how many of SCHEDULE steps SAFREE's rows are
    used. Source: the self-validating filter of SAFREE, arXiv:2410.12761, section 3, with the constants of its code.

    Args:
        tokens, projected: attended rows before and after `safree` (n, E). names: the constants for artists.
    """
    k, middle = (SHARPNESS_NAMES, MIDDLE_NAMES) if names else (SHARPNESS, MIDDLE)
    z = 1 - float(F.cosine_similarity(projected, tokens, dim=1).mean())
    return round(STEPS / (1 + math.exp(-2 * k * (10 * z - middle))))
