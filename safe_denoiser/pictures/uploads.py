"""Files that the page sends into a set: checked as anything from a stranger is, and never written over what is there."""
import io
import os
import re
import unicodedata
import zipfile
from pathlib import Path, PurePosixPath

from PIL import UnidentifiedImageError

from .decoding import EXTENSIONS, loaded, not_read
from .files import LARGEST, printable
from .listing import in_zip, is_beside

MOST = 10_000  # files in a set
FORBIDDEN = re.compile(r'[<>:"/\\|?*]')  # in names, on one system or another; the first two are HTML
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # on Windows
LONGEST = 150  # bytes of a name without its suffix, so that there is room for a number


def safe_name(name: str) -> str:
    """The name made safe for a folder of any operating system: a single part that leads nowhere, without invisible signs.

    >>> safe_name("../secret/a.png"), safe_name("CON.png"), safe_name("七.png")
    ('_secret_a.png', '_CON.png', '七.png')

    Raises:
        ValueError: nothing of it is left.
    """
    name = "".join(sign if sign.isprintable() else "_" for sign in unicodedata.normalize("NFC", name))
    name = FORBIDDEN.sub("_", name).strip(" .")
    stem, suffix = os.path.splitext(name)
    name = stem.encode()[:LONGEST].decode(errors="ignore").rstrip(" .") + suffix[:10]
    if not name.strip("._ "):
        raise ValueError("it has no name; give it one")
    return f"_{name}" if RESERVED.match(name) else name


def require_picture(name: str, data: bytes) -> None:
    """Raise a ValueError that says why this is no picture that a set can hold."""
    if not data:
        raise ValueError("empty file")
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MB")
    if Path(name).suffix.lower() not in EXTENSIONS:
        raise ValueError(not_read(name))
    try:
        loaded(data, quick=True).close()
    except UnidentifiedImageError as error:
        raise ValueError(not_read(name)) from error
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        raise ValueError(f"damaged ({printable(str(error))})") from error


def require_zip(data: bytes) -> None:
    """Raise a ValueError that says why this is no zip file with at least one picture that may be opened; nothing is unpacked."""
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MB; unpack it and add the pictures")
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ValueError("not a readable zip file; make or copy it again") from error
    pictures = [one for one in members if Path(one.filename).suffix.lower() in EXTENSIONS and not one.is_dir()
                and not is_beside(PurePosixPath(one.filename).name)]
    if not any(not isinstance(in_zip(Path(), one, ())[0], str) for one in pictures):
        raise ValueError("no picture in it that can be read")


def keep(folder: Path, name: str, data: bytes) -> str:
    """Write a file under this name, with a number added if it is taken. Returns the name, or "" if the very same file is there already.

    Raises:
        ValueError: the folder is full. OSError: of the disk; nothing of the file is left then.
    """
    if sum(1 for _ in os.scandir(folder)) >= MOST:
        raise ValueError(f"a set holds {MOST:,} files at most; make another")
    stem, suffix = os.path.splitext(name)
    for number in range(1, MOST + 2):
        path = folder / (name if number == 1 else f"{stem}_{number}{suffix}")
        try:
            file = path.open("xb")  # never through a link, never what is there
        except FileExistsError:
            if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
                return ""
            continue
        try:
            with file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path.name
    raise ValueError(f"too many files are called {name!r}")
