"""From the bytes of a file to pixels: which formats are opened, up to which size, and how a viewer would show the picture."""
import io
import math
import os
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps

# What Pillow may open, by the name of its decoder: others start programs (PostScript), or need them.
DECODERS = {"PNG": ".png .apng", "JPEG": ".jpg .jpeg .jfif", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif .tiff",
            "AVIF": ".avif", "HEIF": ".heic .heif .hif", "PPM": ".ppm .pgm", "JPEG2000": ".jp2", "TGA": ".tga", "ICO": ".ico"}
OTHERS = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".jxl": "JPEG XL", ".avif": "AVIF", ".psd": "Photoshop", ".svg": "SVG",
          ".raw": "raw", ".dng": "raw", ".cr2": "raw", ".cr3": "raw", ".nef": "raw", ".arw": "raw", ".exr": "EXR", ".hdr": "HDR",
          ".jxr": "JPEG XR", ".xcf": "GIMP", ".kra": "Krita", ".mp4": "a video", ".mov": "a video", ".webm": "a video", ".mkv": "a video"}
SIDE = frozenset((".txt", ".json", ".caption", ".npz", ".ini", ".db", ".md", ".xmp", ".csv"))  # what people keep beside pictures
EXTENSIONS = frozenset(" ".join(DECODERS.values()).split())
PNG = b"\x89PNG\r\n\x1a\n"
PIXELS = 2**27  # of a picture: decoded it takes 12 bytes for each, 1.6 GB


@lru_cache
def _with_heif() -> None:
    """HEIC is read where the decoder for it is installed, which is no part of Pillow; its limits are those of all."""
    with suppress(Exception):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)


def never_read(name: str) -> bool:
    """Whether the suffix of a name is that of a format which is never read."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in OTHERS and suffix not in EXTENSIONS


def not_read(name: str) -> str:
    """Why a file of this name cannot be read as a picture, for a message."""
    kind = OTHERS.get(os.path.splitext(name)[1].lower())
    return "not a picture that can be read" if kind is None else f"{kind}: save it as PNG or JPEG"


def opened(data: bytes) -> Image.Image:
    """The picture, opened but not decoded.

    Raises:
        ValueError: more than PIXELS, or what Pillow raises for files it cannot read.
    """
    Image.init()
    _with_heif()
    picture = Image.open(io.BytesIO(data), formats=[name for name in DECODERS if name in Image.OPEN])
    if picture.width * picture.height > PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels, more than {PIXELS >> 20} million")
    return picture


def bare(data: bytes) -> bytes:
    """A PNG without its text chunks and colour profile, which Pillow refuses beyond 1 MB; other data unchanged."""
    if not data.startswith(PNG):
        return data
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place:place + 4], "big"), data[place + 4:place + 8]
        kept += [] if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") else [data[place:place + 12 + length]]
        place += 12 + length
    return b"".join(kept)


def loaded(data: bytes, quick: bool = False) -> Image.Image:
    """The first frame, decoded. If this succeeds, the picture counts as readable, when a set is loaded and when it is encoded.

    Args:
        quick: decode a JPEG at an eighth of its size, which finds truncation at a fraction of the cost.

    Raises:
        what `opened` and Pillow raise for files they cannot read.
    """
    def load(data):
        picture = opened(data)
        picture.seek(0)
        if quick:
            picture.draft("RGB", (64, 64))
        picture.load()
        return picture

    try:
        return load(data)
    except ValueError:  # of Pillow for long texts; they are after the pixels, too
        if not data.startswith(PNG):
            raise
        return load(bare(data))


def upright(picture: Image.Image) -> Image.Image:
    """The picture rotated as its EXIF data say; unchanged where these are damaged, since the pixels need not be."""
    with suppress(Exception):  # Pillow raises nearly anything for damaged EXIF
        return ImageOps.exif_transpose(picture)
    return picture


def _scale(picture: Image.Image, highest: float) -> float:
    """The value of white in a grey picture of 16 bit or more; of TIFF with floats or 32-bit integers guessed from the largest value."""
    if picture.mode == "F":
        return next(white for most, white in ((16, 1.0), (255, 255.0), (65535, 65535.0), (math.inf, highest)) if not highest > most)
    if picture.mode == "I" and picture.format == "TIFF":
        return next(float(white) for white in (255, 65535, 2**31) if not highest > white)
    return 65535.0


def decode(data: bytes) -> torch.Tensor:
    """The picture as a viewer shows it: first frame, EXIF rotation applied, transparency on white, 16 bit kept.

    Returns:
        (H, W, 3) float32 in [0, 1].

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: what Pillow raises for files it cannot read.
    """
    with loaded(data) as first:
        picture = upright(first)
        if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit grey: Pillow would clip it at 255
            grey = np.asarray(picture, dtype=np.float32)
            grey = grey / _scale(first, float(grey.max(initial=0, where=np.isfinite(grey))))
            return torch.from_numpy(grey).nan_to_num(0).clamp(0, 1)[:, :, None].expand(-1, -1, 3)
        if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)
