"""A cache of what can be computed again: latents of pictures, one file each, and whatever else is kept by name."""
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from .file_format import write

KEPT = 2  # what is kept in a cache, in its keys: 1 may hold NaN, and latents under the hash of another picture
_unwritable: set[Path] = set()  # caches of which it was said


class LatentCache:
    """Latents on disk, one file per picture, so that no picture is encoded twice. Processes may share a folder.

    Args:
        folder: where the files go; made when missing.
        encoder: a fingerprint of whatever turns pixels into latents (the VAE's weights).
        limit: bytes of the folder above which `trim` removes what was used least recently.
    """

    def __init__(self, folder: str | Path, encoder: str, limit: float = math.inf):
        self.folder, self.encoder, self.limit = Path(folder), encoder, limit

    def path(self, fingerprint: str, size: Sequence[int], fit: str) -> Path:
        key = json.dumps([KEPT, self.encoder, fingerprint, list(size), fit])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, path: Path) -> torch.Tensor | None:
        """The stored latent, or None when there is none or it is damaged."""
        return (self.kept(path) or {}).get("latent")

    def kept(self, path: Path) -> dict[str, torch.Tensor] | None:
        """The tensors of a file, or None when there is none or it is damaged."""
        try:
            tensors = load(path.read_bytes())  # read, not mapped: a mapped file cannot be replaced on Windows
        except (OSError, SafetensorError):
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return tensors

    def put(self, path: Path, latent: torch.Tensor) -> None:
        """Store a latent; where that fails, go on without it, and log it once."""
        self.keep(path, {"latent": latent})

    def keep(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Store tensors by name, as `put` stores a latent."""
        try:
            write(path, tensors)
        except (OSError, SafetensorError) as error:  # a full disk, a folder that is gone or may not be written
            stored = os.name == "nt" and path.exists()  # there a file that another process reads cannot be replaced
            if self.folder not in _unwritable and not stored:
                _unwritable.add(self.folder)
                logging.warning("safe denoiser: nothing can be stored in %s (%s); what is computed is not kept for next time", self.folder,
                                error)

    def trim(self) -> None:
        """Remove what was used least recently, until the folder is within `limit`."""
        with suppress(OSError):
            trim(self.folder, self.limit)


def trim(folder: Path, limit: float) -> None:
    """Remove the files of a cache that were used least recently, until those that stay take at most `limit` bytes, and what a process
    that was killed left half-written. Other people's files in the folder stay.
    """
    files, now = [], time.time()
    for entry in os.scandir(folder) if folder.is_dir() else ():
        with suppress(OSError):  # another process may remove files at the same time
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".tmp") and now - status.st_mtime > 3600:  # a younger one is being written
                os.unlink(entry.path)
            elif entry.name.endswith(".safetensors") and entry.is_file(follow_symlinks=False):
                files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with suppress(OSError):
            os.unlink(path)
        total -= size
