"""From pictures to a bank: each picture is resized, and encoded to a latent once."""
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F

from ..pictures.negation_set import NegationSet
from .bank import Bank
from .cache import LatentCache

FITS = ("crop", "pad", "stretch")
WORKERS, AHEAD = 3, 8  # threads that read and resize pictures, and how many pictures before they are encoded
LONG = 8  # times as long as the size, beyond which a picture is cut before it is resized


def fit_picture(pixels: torch.Tensor, size: tuple[int, int], fit: str) -> torch.Tensor:
    """Resize a picture (H, W, 3) to `size` = (height, width).

    Args:
        fit: "crop" fills the size and cuts the overhang, "pad" keeps the whole picture on black, "stretch" distorts.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}")
    height, width = size
    image = pixels.movedim(-1, 0)[None]
    if fit == "crop":  # of a picture many times as long as the size is, only the middle is resized: the rest would be cut
        for axis, most in ((-1, image.shape[-2] * width / height), (-2, image.shape[-1] * height / width)):
            length = min(image.shape[axis], math.ceil(LONG * most))
            image = image.narrow(axis, (image.shape[axis] - length) // 2, length)
    h, w = image.shape[-2:]
    if fit != "stretch":
        scale = (max if fit == "crop" else min)(height / h, width / w)
        h, w = max(1, round(h * scale)), max(1, round(w * scale))
    else:
        h, w = height, width
    if (h, w) != tuple(image.shape[-2:]):
        image = F.interpolate(image, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (h - height) // 2, (w - width) // 2
    if fit == "pad":
        image = F.pad(image, (-left, width - w + left, -top, height - h + top))
    elif fit == "crop":
        image = image[..., top:top + height, left:left + width]
    return image[0].movedim(0, -1)


def read_ahead(prepare: Callable[[int], tuple], count: int) -> Iterator[tuple]:
    """prepare(0), prepare(1), ... in order, by threads that are up to AHEAD of whoever asks; what nobody asks for any more is not begun."""
    with ThreadPoolExecutor(WORKERS) as pool:
        ahead = deque(pool.submit(prepare, i) for i in range(min(AHEAD, count)))
        try:
            for i in range(count):
                found = ahead.popleft().result()
                if i + AHEAD < count:
                    ahead.append(pool.submit(prepare, i + AHEAD))
                yield found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode_bank(negation_set: NegationSet, encode: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int],
                fit: str = "crop", progress: Callable[[int, int], None] | None = None,
                cache: LatentCache | None = None) -> Bank:
    """Encode every picture of a set, one at a time (video VAEs read a batch as frames), while the next ones are read and resized.

    Args:
        negation_set: the pictures.
        encode: one image (height, width, 3) in [0, 1] -> one latent (C, *spatial).
        size: (height, width) in pixels.
        fit: how a picture of another shape is brought to `size`, see `fit_picture`.
        progress: called as progress(done, total) after each picture; may raise to interrupt.
        cache: latents found there are not encoded again; each new one is stored at once, so an interrupt loses nothing.

    Returns:
        Bank with latents (N, C, *spatial) in the space of `encode`, and the pictures' names and weights.

    Raises:
        ValueError: the set holds latents of a saved bank whose shape differs from those that are encoded; a picture that cannot be read
            any more, or for which `encode` gives NaN or infinity: the message names it.
    """
    count, done, tell = len(negation_set), itertools.count(1), progress or (lambda done, total: None)
    latents = [*negation_set.latents] or [None] * count

    def place(fingerprint: str) -> Path | None:
        return cache and cache.path(fingerprint, size, fit)

    def prepare(i: int) -> tuple[torch.Tensor, Path | None]:
        """The picture, and where its latent belongs: by what is read now, since a file may be replaced at any time."""
        picture, fingerprint = negation_set.read(missing[i])
        return fit_picture(picture, size, fit), place(fingerprint)

    try:
        for i, fingerprint in enumerate(negation_set.fingerprints):  # what is there costs less to read than to hand to a thread
            if latents[i] is None and cache and not negation_set.changed(i):
                latents[i] = cache.get(place(fingerprint))
            if latents[i] is not None:
                tell(next(done), count)
        missing = [i for i, latent in enumerate(latents) if latent is None]
        with closing(read_ahead(prepare, len(missing))) as ready:
            for i, (picture, path) in zip(missing, ready):
                latent = latents[i] = encode(picture).detach().cpu().contiguous()
                if not bool(latent.isfinite().all()):
                    raise ValueError(f"the VAE gives NaN or infinity for {negation_set.names[i]}; run it in higher precision (ComfyUI "
                                     f"--fp32-vae or --bf16-vae), or take the picture out of the set")
                if path:
                    cache.put(path, latent)
                tell(next(done), count)
    finally:
        if cache:
            cache.trim()
    shapes = sorted({tuple(latent.shape) for latent in latents})
    if len(shapes) > 1:
        raise ValueError(f"the set mixes latents of shapes {shapes}; a saved bank can be combined only with what the same VAE encodes "
                         f"at the size it was built with")
    weights = torch.tensor(negation_set.weights) if negation_set.weights else None
    return Bank(torch.stack([latent.to(latents[0].dtype) for latent in latents]), negation_set.names,
                {"size": f"{size[0]}x{size[1]}", "fit": fit}, weights)
