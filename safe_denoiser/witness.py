"""The model as its own witness: what it predicts under a condition that means what must not come out tells r, and where to go instead."""
import torch
from torch import Tensor

from .methods import projection


def gain(denoised: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
    """<denoised - E_0, E_c - E_0> / |E_c - E_0|^2, (B,): how many times guidance weighs the prompt's prediction; cfg for plain guidance."""
    return projection(denoised, conditional, unconditional)


def from_witness(conditional: Tensor, unwanted: Tensor, r: Tensor) -> Tensor:
    """r / (1 - r) (E_c - E_n), (B, D): E_safe - E_c where E_c = (1 - r) E_safe + r E_n. Source: arXiv:2502.08011, Thm 3.2.

    E_n is the model's own prediction at the same x, so that it shares the detail of E_c, and their difference is what they disagree on.
    """
    return (r / (1 - r))[:, None] * (conditional - unwanted)


def posterior(conditional: Tensor, neutral: Tensor, unwanted: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """t = <E_c - E_0, E_n - E_0> / |E_n - E_0|^2 and r = clamp(t, 0, most), (B,) each: r by projection. Ours."""
    t = projection(conditional, unwanted, neutral)
    return t, torch.nan_to_num(t).clamp(0, most)
