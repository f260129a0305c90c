"""The core of ComfyUI Safe Denoiser: pure torch, knows nothing of ComfyUI.

    images --> NegationSet --> Bank (latents) --> SafeDenoiser at each step --> picture + Report

Source: Kim, Kim, Yusuf, Ermon, Park, "Training-Free Safe Denoisers for Safe Use of Diffusion Models", arXiv:2502.08011.
"""
from .bank import Bank, merge_banks
from .clusters import compress_bank, index_bank
from .denoiser import SafeDenoiser
from .encode import encode_bank
from .kernel import Posterior, posterior
from .negation_set import NegationSet, combine_sets
from .prediction import Step
from .report import Report
from .storage import LatentCache, load_bank, save_bank

__all__ = [
    "Bank", "LatentCache", "NegationSet", "Posterior", "Report", "SafeDenoiser", "Step",
    "combine_sets", "compress_bank", "encode_bank", "index_bank", "load_bank", "merge_banks", "posterior", "save_bank",
]
