"""The core of ComfyUI Safe Denoiser: pure torch, knows nothing of ComfyUI.

    images --> NegationSet --> Bank (latents) --> SafeDenoiser at each step --> picture + Report

Source: Kim, Kim, Yusuf, Ermon, Park, "Training-Free Safe Denoisers for Safe Use of Diffusion Models", arXiv:2502.08011.
"""
from .bank import Bank, LatentCache, encode_bank, load_bank, merge_banks, save_bank
from .clusters import compress_bank, index_bank
from .denoiser import SafeDenoiser, Step
from .kernel import Posterior, posterior
from .negation_set import NegationSet, combine_sets
from .report import Report

__all__ = [
    "Bank", "LatentCache", "NegationSet", "Posterior", "Report", "SafeDenoiser", "Step",
    "combine_sets", "compress_bank", "encode_bank", "index_bank", "load_bank", "merge_banks", "posterior", "save_bank",
]
