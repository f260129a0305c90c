"""The core of ComfyUI Safe Denoiser: pure torch, knows nothing of ComfyUI.

    images --> NegationSet --> Bank (latents) --> SafeDenoiser at each step --> picture + Report

Source: Kim, Kim, Yusuf, Ermon, Park, "Training-Free Safe Denoisers for Safe Use of Diffusion Models", arXiv:2502.08011.
"""
from .bank.bank import Bank, merge_banks
from .bank.cache import LatentCache
from .bank.clusters import compress_bank, index_bank
from .bank.encoding import encode_bank
from .bank.file_format import load_bank, save_bank
from .denoiser import SafeDenoiser
from .density.kernel import Posterior, posterior
from .pictures.negation_set import NegationSet, combine_sets
from .prediction import Step
from .report import Report

__all__ = [
    "Bank", "LatentCache", "NegationSet", "Posterior", "Report", "SafeDenoiser", "Step",
    "combine_sets", "compress_bank", "encode_bank", "index_bank", "load_bank", "merge_banks", "posterior", "save_bank",
]
