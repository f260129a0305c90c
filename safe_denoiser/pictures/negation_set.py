"""NegationSet: image files -> fingerprints and lazily decoded pictures."""
import hashlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from .files import File, archive, printable, state_of
from .listing import in_folder, in_zip, is_beside, natural, readable


@dataclass(frozen=True, eq=False)
class NegationSet:
    """Pictures that must not come out; they are decoded one at a time, when iterated.

    Args:
        names: one name per picture.
        fingerprints: one content hash per picture; equal fingerprints mean equal pictures.
        readers: one function per picture, which decodes it.
        skipped: (file name, reason) of every file that could not be read.
        weights: how much each picture counts, positive; () counts all alike.
        latents: one latent per picture where the set comes from a saved bank, which holds no pixels; else ().
        size: bytes that the files take on disk.

    >>> pictures = NegationSet.from_images(torch.zeros(2, 8, 8, 3))
    >>> len(pictures), pictures.names, [tuple(picture.shape) for picture in pictures]
    (2, ('image_0', 'image_1'), [(8, 8, 3), (8, 8, 3)])
    """

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    readers: tuple[Callable[[], torch.Tensor], ...]
    skipped: tuple[tuple[str, str], ...] = ()
    weights: tuple[float, ...] = ()
    latents: tuple[torch.Tensor | None, ...] = ()
    size: int = 0

    @classmethod
    def from_folder(cls, path: str | Path, max_images: int = 0, progress: Callable[[int, int], None] | None = None) -> "NegationSet":
        """The pictures of one folder (not of its subfolders), in natural order of their names.

        Args:
            path: the folder.
            max_images: read at most this many pictures; 0 reads all.
            progress: called as progress(done, total) after each file that is examined; may raise to interrupt.

        Raises:
            FileNotFoundError: the folder is missing.
            ValueError: it holds no readable picture.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"negation set folder {folder.name!r} does not exist; create {folder} "
                                    f"and put the pictures that must not come out into it")
        with os.scandir(folder) as entries:  # which know without another look what is a folder, but for links
            names = sorted((one.name for one in entries if not is_beside(one.name)
                            and not (Path(one) if one.is_symlink() else one).is_dir()), key=natural)
        return cls._of(f"folder {folder.name!r}", ((name, in_folder(folder / name, folder)) for name in names), len(names), max_images,
                       progress)

    @classmethod
    def from_zip(cls, path: str | Path, max_images: int = 0, progress: Callable[[int, int], None] | None = None) -> "NegationSet":
        """The pictures of a zip file, in all its folders, in natural order of their names; nothing is unpacked to disk.

        Args:
            path: the zip file.
            max_images: read at most this many pictures; 0 reads all.
            progress: called as progress(done, total) after each file that is examined; may raise to interrupt.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is damaged, not a zip file, or holds no readable picture.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"negation set {path.name!r} does not exist; put a zip file of pictures at {path}")
        state = state_of(path)
        try:
            members = archive(path, state).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise ValueError(f"negation set {path.name!r} is not a readable zip file ({error}); make or copy it again") from error
        pictures = {m.filename: m for m in members if not is_beside(PurePosixPath(m.filename).name) and not m.is_dir()}
        return cls._of(f"zip file {path.name!r}", ((name, in_zip(path, pictures[name], state)) for name in sorted(pictures, key=natural)),
                       len(pictures), max_images, progress)

    @classmethod
    def _of(cls, what: str, *candidates) -> "NegationSet":
        """A set of those that are readable; where none is, an error that says what to do."""
        kept, skipped = readable(*candidates)
        if not kept:
            unread = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:10])
            raise ValueError(f"negation set {what} has no readable picture{f' ({len(skipped)} unreadable)' if skipped else ''}; "
                             f"put PNG, JPEG or WebP files into it{unread}")
        names, sizes, readers, fingerprints = zip(*kept)
        return cls(names, fingerprints, readers, tuple(skipped), size=sum(sizes))

    @classmethod
    def from_latents(cls, latents: torch.Tensor, names: Sequence[str] = (), weights: torch.Tensor | None = None) -> "NegationSet":
        """A set from the latents of a saved bank (N, C, *spatial): they are used as they are, and have no picture to show.

        Args:
            names, weights: as the bank has them, or none.
        """
        def read():
            raise ValueError("this item comes from a saved bank, which holds latents and no picture; build the set from pictures instead")

        fingerprints = tuple(hashlib.sha256(latent.float().cpu().contiguous().numpy().tobytes()).hexdigest() for latent in latents)
        return cls(tuple(map(printable, names)) or tuple(f"latent_{i}" for i in range(len(latents))), fingerprints, (read,) * len(latents),
                   weights=() if weights is None else tuple(weights.tolist()), latents=tuple(latents.cpu()),
                   size=latents.numel() * latents.element_size())

    @classmethod
    def from_images(cls, pixels: torch.Tensor | Sequence[torch.Tensor]) -> "NegationSet":
        """A set from decoded pictures: a batch (B, H, W, 3 or more) or a list of (H, W, 3 or more), values in [0, 1].

        Raises:
            ValueError: no picture, not of that shape, or not of numbers.
        """
        pictures = [picture.detach().float().cpu()[..., :3].clamp(0, 1) for picture in pixels]
        require_numbers(pictures)
        if not pictures or any(picture.ndim != 3 or picture.shape[-1] != 3 for picture in pictures):
            shapes = [tuple(picture.shape) for picture in pictures]
            raise ValueError(f"pictures are {shapes}; need at least one, each (height, width, 3) with values in [0, 1]")
        fingerprints = tuple(hashlib.sha256(str(tuple(p.shape)).encode() + p.contiguous().numpy().tobytes()).hexdigest()
                             for p in pictures)
        return cls(tuple(f"image_{i}" for i in range(len(pictures))), fingerprints,
                   tuple(partial(lambda picture: picture, picture) for picture in pictures))

    def __len__(self) -> int:
        return len(self.names)

    def changed(self, i: int) -> bool:
        """Whether the file of picture i is not the one that was examined any more."""
        return isinstance(self.readers[i], File) and self.readers[i].changed

    def read(self, i: int) -> tuple[torch.Tensor, str]:
        """Picture i as it is now, and its content hash, which differs from `fingerprints[i]` if the file was replaced.

        Raises:
            ValueError: it cannot be read any more; the name says which.
        """
        reader = self.readers[i]
        try:
            return reader.read() if isinstance(reader, File) else (reader(), self.fingerprints[i])
        except ValueError as error:
            raise ValueError(f"{self.names[i]}: {error}") from error

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (read() for read in self.readers)

    @property
    def fingerprint(self) -> str:
        """One hash for the whole set: changes when a picture is added, removed, changed or given another weight."""
        return hashlib.sha256(("".join(self.fingerprints) + repr(self.weights or "")).encode()).hexdigest()

    def take(self, rows: Sequence[int]) -> "NegationSet":
        """The set of these pictures, in this order; its size on disk is not known any more."""
        def of(values):
            return tuple(values[i] for i in rows) if values else ()

        return NegationSet(of(self.names), of(self.fingerprints), of(self.readers), weights=of(self.weights), latents=of(self.latents))


def require_numbers(pictures: Sequence[torch.Tensor]) -> None:
    """Raise where pictures hold NaN, as a VAE in too low a precision makes them."""
    broken = [i for i, picture in enumerate(pictures) if not bool(picture.isfinite().all())]
    if broken:
        raise ValueError(f"images {broken[:10]} of {len(pictures)} hold NaN; leave them out, or decode them with the VAE in higher "
                         f"precision (ComfyUI --fp32-vae)")


def combine_sets(sets: Sequence[NegationSet], weights: Sequence[float] = ()) -> NegationSet:
    """One set with the pictures of all, in order.

    Args:
        weights: one per set. Each picture of a set counts that many times, on top of a weight of its own; 0 leaves the set out.

    Raises:
        ValueError: a negative weight, or no set with a weight above 0.
    """
    weights = tuple(weights) or (1.0,) * len(sets)
    if any(not 0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights of the sets are {list(weights)}; need numbers of 0 or more, and at least one above 0")
    kept = [(one, weight) for one, weight in zip(sets, weights) if weight > 0]
    each = [weight * own for one, weight in kept for own in one.weights or (1.0,) * len(one)]
    return NegationSet(
        sum((one.names for one, _ in kept), ()), sum((one.fingerprints for one, _ in kept), ()),
        sum((one.readers for one, _ in kept), ()), sum((one.skipped for one, _ in kept), ()),
        weights=tuple(each) if len(set(each)) > 1 else (),
        latents=sum((one.latents or (None,) * len(one) for one, _ in kept), ()) if any(one.latents for one, _ in kept) else (),
        size=sum(one.size for one, _ in kept))
