"""From the bytes of a file to pixels: which formats are opened at all, within which limits, and how a picture is to be seen."""
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
    """Whether a name says that a file is of a format which is not read."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in OTHERS and suffix not in EXTENSIONS


def not_read(name: str) -> str:
    """Why a file of this name is no picture that is read, for people."""
    kind = OTHERS.get(os.path.splitext(name)[1].lower())
    return "not a picture that can be read" if kind is None else f"{kind}: save it as PNG or JPEG"


def opened(data: bytes) -> Image.Image:
    """A picture of which nothing is decoded yet.

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
    """A PNG without its texts and colour profile, of which Pillow refuses those of more than 1 MB; other data as they are."""
    if not data.startswith(PNG):
        return data
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place:place + 4], "big"), data[place + 4:place + 8]
        kept += [] if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") else [data[place:place + 12 + length]]
        place += 12 + length
    return b"".join(kept)


def loaded(data: bytes, quick: bool = False) -> Image.Image:
    """The first frame, its pixels decoded: what decides whether a picture can be read, when a set is loaded and when it is encoded.

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
    """As its EXIF says it is to be held; as it is, where that is damaged: the picture is not."""
    with suppress(Exception):  # Pillow raises nearly anything for damaged EXIF
        return ImageOps.exif_transpose(picture)
    return picture


def _scale(picture: Image.Image, highest: float) -> float:
    """What is white in a grey picture of 16 bit or more; nothing says it of TIFF with floating point or 32-bit numbers but the numbers."""
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
