"""Guards, one function per published equation: what the embeddings of a prompt hold of a concept, the same without it, and SLD's term.

    Semantic Surgery   prompt (L, E) --concept_scores--> a --share--> rho --surgery--> prompt
    SAFREE             prompts without each token --distances--> which tokens --safree--> their rows --filter_steps--> for how long
    SLD                predictions --sld--> what to add to the guided one

All in the space of one text encoder. When to act is told by harmless prompts, of which no more than a given share may be touched.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .meaning import exceeded_by

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


def concept_scores(prompt: Tensor, empty: Tensor, concepts: Tensor) -> Tensor:
    """a_k = mean over rows of cos(delta_k, e), delta_k = phi(c_k) - phi(""), (K,). Source: Semantic Surgery, arXiv:2510.22851, section 3.

    Args:
        prompt: e, the conditioning (L, E). empty: phi("") (L, E). concepts: phi(c_k) (K, L, E).
    """
    return F.cosine_similarity(concepts - empty, prompt.expand_as(concepts), dim=2).mean(1)


def surgery(prompt: Tensor, empty: Tensor, joined: Tensor, share: Tensor | float) -> Tensor:
    """e - rho (phi("c_1, c_2, ...") - phi("")), (L, E), in all rows. Source: Semantic Surgery, arXiv:2510.22851, section 3.

    Args:
        prompt, empty: as in `concept_scores`. joined: phi of the concepts that were found, joined by commas (L, E). share: rho, in [0, 1].
    """
    return prompt - share * (joined - empty)


@dataclass(frozen=True)
class Alarm:
    """What scores say of a prompt beside what they say of harmless ones.

    Several scores of a prompt (one for each concept, in the space of each encoder) count in standard deviations of the harmless prompts',
    and of these the largest, so that one threshold keeps the false alarms of all together. Ours.

    Args:
        mean, spread: of each score among harmless prompts (K,). threshold: of the largest, in standard deviations.
    """

    mean: Tensor
    spread: Tensor
    threshold: float

    @classmethod
    def of(cls, scores: Tensor, rate: float) -> "Alarm":
        """The alarm that at most `rate` of prompts like these set off, by their scores (N, K), see `meaning.exceeded_by`."""
        mean, spread = scores.mean(0), scores.std(0).clamp_min(1e-6)
        return cls(mean, spread, exceeded_by(((scores - mean) / spread).amax(1), rate))

    def beyond(self, scores: Tensor) -> Tensor:
        """By how many standard deviations each score (..., K) exceeds the threshold; above 0 it is an alarm."""
        return (scores - self.mean) / self.spread - self.threshold

    def share(self, scores: Tensor) -> Tensor:
        """rho = sigmoid(2 beyond), (..., K): 1/2 at the threshold. Source: Semantic Surgery, arXiv:2510.22851, with b and gamma measured
        on harmless prompts, since the published ones (0.06 to 0.28, 0.02) are cosines of one encoder.
        """
        return torch.sigmoid(2 * self.beyond(scores))


@dataclass(frozen=True)
class Sld:
    """The numbers of SLD. Source: arXiv:2211.05105, section 3.

    Args:
        scale: s_S. threshold: lambda. momentum_scale: s_m. momentum_beta: beta_m.
    """

    scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4


PRESETS = {  # and the fraction of the schedule before which it only gathers momentum, delta / 50
    "weak": (Sld(200, 0.0, 0.0, 0.0), 0.3), "medium": (Sld(1000, 0.01, 0.3, 0.4), 0.2), "strong": (Sld(2000, 0.025, 0.5, 0.7), 0.14),
    "max": (Sld(5000, 1.0, 0.5, 0.7), 0.0)}


def sld(conditional: Tensor, unconditional: Tensor, unwanted: Tensor, sigma: Tensor, momentum: Tensor | float, numbers: Sld,
        ) -> tuple[Tensor, Tensor, Tensor]:
    """SLD in denoised space: what safe latent diffusion adds to the guided prediction, for each unit of guidance.

        eps_c - eps_S = (D_S - D_c) / sigma
        mu    = min(s_S |eps_c - eps_S|, 1) where eps_c - eps_S < lambda, else 0      (signed, elementwise)
        gamma = mu (eps_S - eps_u) + s_m nu,   nu' = beta_m nu + (1 - beta_m) gamma
        eps   = eps_u + w (eps_c - eps_u - gamma)   <=>   D = D_cfg + w sigma gamma

    Source: safe latent diffusion, arXiv:2211.05105, section 3. Its preset `weak` has s_S = 200 in the paper, 20 in diffusers. For flow
    models (D_S - D_c) / sigma is the difference of velocities; lambda and s_S were chosen for noise predictions, and are used as they are.

    Args:
        conditional, unconditional, unwanted: D_c, D_u, D_S, (B, D), of one x. sigma: (B,). momentum: nu (B, D), or 0 at first.

    Returns:
        sigma gamma (B, D), nu' (B, D), and mu (B, D).
    """
    level = sigma[:, None].clamp_min(1e-12)
    apart = (unwanted - conditional) / level
    mu = torch.where(apart < numbers.threshold, (numbers.scale * apart.abs()).clamp_max(1), 0)
    gamma = mu * (unconditional - unwanted) / level + numbers.momentum_scale * momentum
    return level * gamma, numbers.momentum_beta * momentum + (1 - numbers.momentum_beta) * gamma, mu
