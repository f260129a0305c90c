"""Picture files, on disk or inside a zip file: what is in them, and which are readable."""
import hashlib
import io
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError

from .decoding import decode, loaded, not_read

LARGEST = 2**28  # bytes of a file, or of what a member of a zip file unpacks to: more is not a picture
LONGEST = 200  # characters of a name that are shown


def printable(name: str) -> str:
    """A name that is safe to show: file names from strangers may hold line breaks, signs that reverse the text, thousands of letters."""
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name[:LONGEST])
    return shown if len(name) <= LONGEST else shown + "\N{HORIZONTAL ELLIPSIS}"


class _OnDemand(io.RawIOBase):
    """A file that is open only while it is read: an archive can be kept, and the file replaced all the same."""

    def __init__(self, path: Path):
        self.path, self.place = path, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, os.path.getsize(self.path))[whence] if whence else offset
        if self.place < 0:
            raise OSError("before the start of the file")
        return self.place

    def read(self, size: int = -1) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.place)
            data = file.read(size)
        self.place += len(data)
        return data


@lru_cache(maxsize=8)
def archive(path: Path, state: tuple[int, ...]) -> zipfile.ZipFile:
    """A zip file, whose list of members is read once; threads may share it. `state` is the cache key, see `state_of`.

    Raises:
        zipfile.BadZipFile: damaged, or no zip file.
    """
    return zipfile.ZipFile(_OnDemand(path))


def state_of(path: Path, status: os.stat_result | None = None) -> tuple[int, ...]:
    """Size, time of modification and time of change of a file: programs can set back the first time, but not the second."""
    status = status or path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class File:
    """A picture: a file, or a member of a zip file.

    Args:
        state: of the file when it was examined.
    """

    path: Path
    state: tuple[int, ...]
    member: str = ""

    @property
    def changed(self) -> bool:
        """Whether the file differs from when it was examined, or is gone."""
        try:
            return state_of(self.path) != self.state
        except OSError:
            return True

    def content(self) -> bytes:
        """Bytes of the picture.

        Raises:
            ValueError: there are too many. OSError, RuntimeError, zipfile.BadZipFile: it is gone, encrypted or damaged.
        """
        if not self.member:
            with self.path.open("rb") as file:
                data = file.read(LARGEST + 1)
        else:
            with archive(self.path, state_of(self.path)).open(self.member) as file:
                data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MB")
        return data

    def read(self) -> tuple[torch.Tensor, str]:
        """The picture, see `decode`, and the hash of its bytes, both of the file as it is now.

        Raises:
            ValueError: it can no longer be read.
        """
        try:
            data = self.content()
            return decode(data), hashlib.sha256(data).hexdigest()
        except Exception as error:
            raise ValueError(f"{self.reason(error)}; it could be read when the set was loaded: load it again") from error

    def __call__(self) -> torch.Tensor:
        return self.read()[0]

    def reason(self, error: Exception) -> str:
        name = printable(self.member or self.path.name)
        if isinstance(error, UnidentifiedImageError):
            return not_read(name)
        text = re.sub(r"<_io.BytesIO object at 0x[0-9a-f]+>", repr(name), str(error)).replace(str(self.path), name)
        return f"{type(error).__name__}: {printable(text)}"


def blur(pixels: torch.Tensor) -> torch.Tensor:
    """The picture (H, W, 3) blurred beyond recognition: 6 x 6 colours of it are kept."""
    colours = F.adaptive_avg_pool2d(pixels.movedim(-1, 0)[None], 6)
    return F.interpolate(colours, tuple(pixels.shape[:2]), mode="bicubic").clamp(0, 1)[0].movedim(0, -1)


@lru_cache(maxsize=100_000)
def examine(file: File) -> tuple[str, str]:
    """(sha256 of the picture, "") for a readable one, ("", reason) for any other; computed once for each state of a file."""
    try:
        data = file.content()
        if not data:
            return "", "empty file"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata would flood the console
            loaded(data, quick=True).close()
        return hashlib.sha256(data).hexdigest(), ""
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        return "", file.reason(error)
