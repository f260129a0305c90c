"""NegationSet: image files -> fingerprints and lazily decoded pictures."""
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif .ppm .pgm .jp2 .tga .ico".split())


def decode(path: Path) -> torch.Tensor:
    """The picture as a viewer shows it: first frame, EXIF rotation applied, transparency on white, 16 bit kept.

    Returns:
        (H, W, 3) float32 in [0, 1].

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: what Pillow raises for files it cannot read.
    """
    with Image.open(path) as opened:
        opened.seek(0)
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit grey: Pillow would clip it at 255
            grey = np.asarray(picture, dtype=np.float32) / (1.0 if picture.mode == "F" else 65535.0)
            return torch.from_numpy(grey).clamp(0, 1)[:, :, None].expand(-1, -1, 3)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)


@lru_cache(maxsize=100_000)
def _examine(path: Path, size: int, mtime_ns: int) -> tuple[str, str]:
    """(sha256 of the file, "") for a readable picture, ("", reason) for any other; `size` and `mtime_ns` are the cache key."""
    if not size:
        return "", "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata would flood the console
            with Image.open(path) as picture:
                picture.draft("RGB", (64, 64))  # JPEG decodes at 1/8 size: finds truncation at a fraction of the cost
                picture.load()
        return hashlib.sha256(path.read_bytes()).hexdigest(), ""
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        return "", f"{type(error).__name__}: {error}".replace(str(path), path.name)


def _natural(path: Path) -> list:
    """Sort key: picture_2 before picture_10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


@dataclass(frozen=True, eq=False)
class NegationSet:
    """Pictures that must not come out; they are decoded one at a time, when iterated.

    Args:
        names: one name per picture.
        fingerprints: one content hash per picture; equal fingerprints mean equal pictures.
        skipped: (file name, reason) of every file that could not be read.

    >>> pictures = NegationSet.from_images(torch.zeros(2, 8, 8, 3))
    >>> len(pictures), pictures.names, [tuple(picture.shape) for picture in pictures]
    (2, ('image_0', 'image_1'), [(8, 8, 3), (8, 8, 3)])
    """

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    readers: tuple[Callable[[], torch.Tensor], ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_folder(cls, path: str | Path, max_images: int = 0) -> "NegationSet":
        """The pictures of one folder (not of its subfolders), in natural order of their names.

        Args:
            path: the folder.
            max_images: read at most this many pictures; 0 reads all.

        Raises:
            FileNotFoundError: the folder is missing.
            ValueError: it holds no readable picture.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"negation set folder {folder.name!r} does not exist; create {folder} "
                                    f"and put the pictures that must not come out into it")
        names, fingerprints, readers, skipped = [], [], [], []
        for file in sorted((f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and not f.is_dir()), key=_natural):
            if max_images and len(names) >= max_images:
                break
            if not file.resolve().is_relative_to(folder.resolve()):
                fingerprint, reason = "", "link to a file outside the folder"
            elif not file.exists():
                fingerprint, reason = "", "broken link"
            else:
                fingerprint, reason = _examine(file, file.stat().st_size, file.stat().st_mtime_ns)
            if reason:
                skipped.append((file.name, reason))
                continue
            names.append(file.name)
            fingerprints.append(fingerprint)
            readers.append(partial(decode, file))
        if not names:
            unread = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:10])
            raise ValueError(f"negation set folder {folder.name!r} has no readable picture"
                             f"{f' ({len(skipped)} unreadable)' if skipped else ''}; put PNG, JPEG or WebP files into {folder}{unread}")
        return cls(tuple(names), tuple(fingerprints), tuple(readers), tuple(skipped))

    @classmethod
    def from_images(cls, pixels: torch.Tensor | Sequence[torch.Tensor]) -> "NegationSet":
        """A set from decoded pictures: a batch (B, H, W, 3 or more) or a list of (H, W, 3 or more), values in [0, 1].

        Raises:
            ValueError: no picture, or not of that shape.
        """
        pictures = [picture.detach().float().cpu()[..., :3].clamp(0, 1) for picture in pixels]
        if not pictures or any(picture.ndim != 3 or picture.shape[-1] != 3 for picture in pictures):
            shapes = [tuple(picture.shape) for picture in pictures]
            raise ValueError(f"pictures are {shapes}; need at least one, each (height, width, 3) with values in [0, 1]")
        fingerprints = tuple(hashlib.sha256(str(tuple(p.shape)).encode() + p.contiguous().numpy().tobytes()).hexdigest()
                             for p in pictures)
        return cls(tuple(f"image_{i}" for i in range(len(pictures))), fingerprints,
                   tuple(partial(lambda picture: picture, picture) for picture in pictures))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (read() for read in self.readers)

    @property
    def fingerprint(self) -> str:
        """One hash for the whole set: changes when a picture is added, removed or changed."""
        return hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()

    def contact_sheet(self, title: str = "", count: int = 16, blurred: bool = True) -> Image.Image:
        """Up to `count` pictures, evenly picked, in a grid under one line of text; blurred beyond recognition by default."""
        tile, columns = 128, 4
        picked = [self.readers[i * len(self) // min(count, len(self))] for i in range(min(count, len(self)))]
        text = f"{title}: {len(self)} pictures" + f", {len(self.skipped)} skipped" * bool(self.skipped)
        lines = [text, *(f"skipped {name}: {reason}" for name, reason in self.skipped[:3])]
        sheet = Image.new("RGB", (tile * columns, 16 * len(lines) + 4 + tile * -(-len(picked) // columns)), "black")
        ImageDraw.Draw(sheet).text((4, 2), "\n".join(line[:80] for line in lines), "white", spacing=5)
        for i, read in enumerate(picked):
            sheet.paste(thumbnail(read(), tile, blurred), (i % columns * tile, 16 * len(lines) + 4 + i // columns * tile))
        return sheet


def thumbnail(pixels: torch.Tensor, tile: int, blurred: bool) -> Image.Image:
    """A square thumbnail of a picture (H, W, 3) in [0, 1]; `blurred` keeps 6 x 6 colours of it."""
    picture = ImageOps.fit(Image.fromarray((pixels * 255).round().byte().numpy()), (tile, tile))
    return picture.resize((6, 6), Image.Resampling.BOX).resize((tile, tile), Image.Resampling.BICUBIC) if blurred else picture
