"""Picture files, on disk or inside a zip file: which are readable, and their pixels."""
import hashlib
import io
import re
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif .ppm .pgm .jp2 .tga .ico".split())


def content(path: Path, member: str = "") -> bytes:
    """Bytes of a file, or of one member of a zip file."""
    if not member:
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def decode(path: Path, member: str = "") -> torch.Tensor:
    """The picture as a viewer shows it: first frame, EXIF rotation applied, transparency on white, 16 bit kept.

    Args:
        path: a picture, or a zip file that holds the picture `member`.

    Returns:
        (H, W, 3) float32 in [0, 1].

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: what Pillow raises for files it cannot read.
    """
    with Image.open(io.BytesIO(content(path, member))) as opened:
        opened.seek(0)
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit grey: Pillow would clip it at 255
            grey = np.asarray(picture, dtype=np.float32) / (1.0 if picture.mode == "F" else 65535.0)
            return torch.from_numpy(grey).clamp(0, 1)[:, :, None].expand(-1, -1, 3)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)


def blur(pixels: torch.Tensor) -> torch.Tensor:
    """The picture (H, W, 3) blurred beyond recognition: 6 x 6 colours of it are kept."""
    colours = F.adaptive_avg_pool2d(pixels.movedim(-1, 0)[None], 6)
    return F.interpolate(colours, tuple(pixels.shape[:2]), mode="bicubic").clamp(0, 1)[0].movedim(0, -1)


@lru_cache(maxsize=100_000)
def examine(path: Path, size: int, mtime_ns: int, member: str = "") -> tuple[str, str]:
    """(sha256 of the file, "") for a readable picture, ("", reason) for any other; `size` and `mtime_ns` are the cache key."""
    if not size:
        return "", "empty file"
    try:
        data = content(path, member)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata would flood the console
            with Image.open(io.BytesIO(data)) as picture:
                picture.draft("RGB", (64, 64))  # JPEG decodes at 1/8 size: finds truncation at a fraction of the cost
                picture.load()
        return hashlib.sha256(data).hexdigest(), ""
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        text = re.sub(r"<_io.BytesIO object at 0x[0-9a-f]+>", repr(member or path.name), str(error))
        return "", f"{type(error).__name__}: {text}".replace(str(path), path.name)
