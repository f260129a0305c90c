"""Semantic Surgery: a prompt's embedding minus the direction of the concepts that it holds."""
import torch.nn.functional as F
from torch import Tensor


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
