"""Photographs of CIFAR-10 as tensors: who may see which is decided here, once.

The model and its autoencoder, the judge, and the negation sets each get pictures that the others never see.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLASSES = "airplane automobile ship truck".split()  # of CIFAR-10's ten: a model so small draws no more of them well
MODEL, JUDGE = 3500, 5000  # of each class: up to here the model's, from there to here the judge's, of the folder train
UNSEEN, TESTED = 500, 1000  # of each class: up to here unseen by all, from there to here the judge is tested, of the folder test
SIDE = 64  # pixels


def photographs(folder: Path, part: str) -> Tensor:
    """Pictures of the folders <folder>/<part>/<class>/, in the order of their names: (classes, n, 3, 32, 32) bytes."""
    classes = [[np.asarray(Image.open(path).convert("RGB")) for path in sorted((folder / part / name).iterdir())] for name in CLASSES]
    return torch.from_numpy(np.array(classes)).permute(0, 1, 4, 2, 3).contiguous()


def cached(folder: Path, part: str) -> Tensor:
    """The same, kept beside the folders: tens of thousands of small files take a minute to open."""
    path = folder / f"{part}_{len(CLASSES)}.npy"
    if not path.is_file():
        np.save(path, photographs(folder, part).numpy())
    return torch.from_numpy(np.load(path))


def enlarged(pictures: Tensor) -> Tensor:
    """Bytes (n, 3, 32, 32) as the world's pixels (n, 3, 64, 64) in [0, 1]."""
    return F.interpolate(pictures.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
