"""What the page asks of the server about negation sets: what one shows, a new one, and pictures to put into it.

Any page that reaches the server can ask, so that all of it is a stranger's: names are made harmless, what is no picture is refused, nothing
is written but into folders of input/negation_sets, and nothing there is overwritten.
"""
import asyncio
import base64
import errno
import io
from pathlib import Path

from aiohttp import web

from ...safe_denoiser.pictures import contact_sheets
from ...safe_denoiser.pictures.files import LARGEST
from ...safe_denoiser.pictures.uploads import keep, require_picture, require_zip, safe_name
from .. import folders
from ..progress import server
from .negation_set import describe

TILES, TILE = 16, 128
BYTES = "application/octet-stream"  # of a body; no page of another origin can send it unasked
FULL, NO_RIGHTS = {errno.ENOSPC, errno.EDQUOT}, {errno.EACCES, errno.EPERM, errno.EROFS}


def is_own(name: str) -> bool:
    """Whether pictures can be added to a set: a folder of the user's own input; `resolve` refuses what leads out of there."""
    try:
        path = folders.resolve(folders.SETS, name)
    except (ValueError, FileNotFoundError):
        return False
    root = folders.roots(folders.SETS)[0]
    return path.is_dir() and path.is_relative_to(root) and path.resolve() != root.resolve()


def shown(name: str, max_images: int) -> dict:
    """What the page shows of a set: a line about it, and up to TILES pictures with their names; or what is wrong with it."""
    told = {"own": is_own(name), "info": "", "pictures": [], "problem": ""}
    if name == folders.CHOOSE:
        return told
    try:
        path = folders.resolve(folders.SETS, name)
        if folders.is_empty(path):
            return told | {"info": f"{name} is empty: drop pictures here"}
        if path.suffix.lower() == ".safetensors":  # it may be many gigabytes, for nothing but grey tiles
            return told | {"info": f"{name}: a saved bank, which holds no pictures to show"}
        found = folders.read_set(name, max_images, lambda done, total: None)
    except (ValueError, OSError) as error:
        return told | {"problem": str(error)}
    rows = contact_sheets.evenly(range(len(found)), TILES)
    return told | {"info": describe(found, name), "pictures": [{"name": found.names[i], "picture": _tile(found, i)} for i in rows]}


def _tile(found, i: int) -> str:
    file = io.BytesIO()
    contact_sheets.thumbnail(found, i, TILE, blurred=False).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def make(name: str) -> dict:
    """A new, empty set; one that is there is an error."""
    name, root = safe_name(name), folders.roots(folders.SETS)[0]
    if name == folders.CHOOSE or Path(name).suffix.lower() in folders.PACKED:  # would be taken for something else
        name += "_"
    root.mkdir(parents=True, exist_ok=True)
    try:
        (root / name).mkdir()
    except FileExistsError:
        raise ValueError(f"there is a set {name!r} already; choose it in the list, or take another name") from None
    return {"set": name}


def add(name: str, file: str, data: bytes) -> dict:
    """Put a picture into a set of the user's own; a zip file becomes a set itself."""
    file = safe_name(file)
    if Path(file).suffix.lower() == ".zip":
        require_zip(data)
        root = folders.roots(folders.SETS)[0]
        root.mkdir(parents=True, exist_ok=True)
        return {"set": keep(root, file, data) or file}
    if not is_own(name):
        raise ValueError(f"{name!r} is no folder in input/negation_sets; make a new set for your pictures")
    require_picture(file, data)
    return {"set": name, "added": keep(folders.resolve(folders.SETS, name), file, data)}


async def _answered(work, *given) -> web.Response:
    """The answer as JSON, worked out beside the server's own loop; what is wrong, in words."""
    try:
        return web.json_response(await asyncio.to_thread(work, *given))
    except ValueError as error:
        return web.json_response({"problem": str(error)}, status=400)
    except OSError as error:
        why = "the disk is full" if error.errno in FULL else "ComfyUI has no right to write there" if error.errno in NO_RIGHTS else \
            error.strerror or "it cannot be written"
        return web.json_response({"problem": f"{why}; nothing was changed"}, status=507 if error.errno in FULL else 403)


async def _body(request: web.Request) -> bytes:
    """At most one byte more than a picture may have."""
    if request.content_type != BYTES:
        raise web.HTTPUnsupportedMediaType
    parts, size = [], 0
    async for part in request.content.iter_chunked(2**20):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            break
    return b"".join(parts)


def register() -> None:
    """Answer the page, where there is a server."""
    there = server()
    if there is None:
        return

    @there.routes.get("/safe_denoiser/set")
    async def _shown(request):
        most = request.query.get("max", "0")
        return await _answered(shown, request.query.get("name", ""), int(most) if most.isdecimal() and len(most) < 7 else 0)

    @there.routes.post("/safe_denoiser/set")
    async def _make(request):
        await _body(request)
        return await _answered(make, request.query.get("name", ""))

    @there.routes.post("/safe_denoiser/picture")
    async def _add(request):
        return await _answered(add, request.query.get("set", ""), request.query.get("name", ""), await _body(request))
