"""Which files of a folder or a zip file may be opened as pictures, and which of these can be read."""
import re
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from .decoding import EXTENSIONS, SIDE, never_read, not_read
from .files import LARGEST, File, examine, printable, state_of


def natural(name: str) -> list:
    """Sort key: picture_2 before picture_10."""
    parts = re.split(r"(\d+)", name)  # text and digits in turn
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part.lower() for i, part in enumerate(parts)]


def is_beside(name: str) -> bool:
    """Whether a file is obviously no picture of the set: hidden, or one of the texts that people keep beside pictures."""
    suffix = PurePosixPath(name).suffix.lower()
    return name.startswith("._") or name.startswith(".") and suffix not in EXTENSIONS or suffix in SIDE


def in_folder(path: Path, folder: Path) -> tuple[File | str, int]:
    """A file of a folder and its size in bytes; or why it is not opened, and 0."""
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            return "link to a file outside the folder", 0
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to read a pipe or a device would never end
            return "not a file", 0
        if status.st_size > LARGEST:
            return f"larger than {LARGEST >> 20} MB", 0
        if never_read(path.name):
            return not_read(path.name), 0
        return File(path, state_of(path, status)), status.st_size
    except FileNotFoundError:
        return "broken link", 0
    except (OSError, RuntimeError) as error:  # no permission; a link to itself
        return f"{type(error).__name__}: {getattr(error, 'strerror', None) or 'it cannot be found'}", 0


def in_zip(path: Path, member: zipfile.ZipInfo, state: tuple[int, ...]) -> tuple[File | str, int]:
    """The same for a member of a zip file."""
    if PurePosixPath(member.filename.replace("\\", "/")).is_absolute() or ".." in re.split(r"[/\\]", member.filename):
        return "leads out of the zip file", 0
    if member.filename.lower().endswith(".zip"):
        return "a zip file in a zip file; unpack it", 0
    if member.flag_bits & 1:
        return "encrypted; make the zip file without a password", 0
    if member.file_size > LARGEST:
        return f"larger than {LARGEST >> 20} MB", 0
    if never_read(member.filename):
        return not_read(member.filename), 0
    return File(path, state, member.filename), member.file_size


def readable(candidates: Iterable[tuple[str, tuple[File | str, int]]], count: int, max_images: int = 0,
             progress: Callable[[int, int], None] | None = None) -> tuple[list[tuple[str, int, File, str]], list[tuple[str, str]]]:
    """Name, bytes, file and content hash of the pictures that can be read, and name and reason of those that cannot.

    Args:
        candidates: name, and what `in_folder` or `in_zip` says of it; `count` of them.
        max_images: stop after this many; 0 reads all.
        progress: called as progress(done, total) after each; may raise to interrupt.
    """
    kept, skipped = [], []
    for done, (name, (file, size)) in enumerate(candidates, 1):
        fingerprint, reason = ("", file) if isinstance(file, str) else examine(file)
        if reason:
            skipped.append((printable(name), reason))
        else:
            kept.append((printable(name), size, file, fingerprint))
        if progress:
            progress(done, min(count, max_images or count))
        if max_images and len(kept) >= max_images:
            break
    return kept, skipped
