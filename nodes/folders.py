"""Where sets, banks and caches live: under ComfyUI's own directories, never elsewhere."""
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import folder_paths
from safetensors import SafetensorError, safe_open

from ..safe_denoiser import NegationSet, load_bank
from ..safe_denoiser.meaning.clip_files import CONFIG
from ..safe_denoiser.pictures.decoding import EXTENSIONS
from ..safe_denoiser.pictures.files import printable, state_of

PACKED, WEIGHTS = {".zip", ".safetensors"}, {".safetensors", ".bin", ".pt", ".pth"}
SETS, BANKS, CLIPS, CONDITIONS = "negation_sets", "negation_banks", "open_clip", "unwanted_conditions"
CACHE_LIMIT = float(os.environ.get("SAFE_DENOISER_CACHE_GB", 8)) * 2**30  # bytes of each cache; beyond, the oldest files go
CHOOSE = "choose a set"  # what the list of sets begins with: a new node negates nothing that nobody chose
MARKUP = {"<", ">"}  # in a name: some pages make HTML of the entries of a list
_left_out: set[Path] = set()  # entries of which it was said
TINY = {world: Path(__file__).resolve().parent.parent / folder / "models"
        for world, folder in (("digits", "tiny_digits"), ("photographs", "tiny_photos"))}
MODELS = ("diffusion_models", "vae")  # of a tiny world: in ComfyUI's own lists, from which its page fills new nodes, they have no business


def register() -> None:
    """Make models/negation_sets, models/negation_banks, ... and the sets and banks of the shipped tiny worlds known to ComfyUI."""
    for kind in (SETS, BANKS, CLIPS, CONDITIONS):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
    for world in filter(Path.is_dir, TINY.values()):
        for folder in (folder for folder in sorted(world.iterdir()) if folder.name not in MODELS):
            folder_paths.add_model_folder_path(folder.name, str(folder))


def roots(kind: str) -> list[Path]:
    """Folders searched for `kind`, first come first served."""
    made = folder_paths.get_output_directory()
    own = {SETS: folder_paths.get_input_directory(), BANKS: made, CONDITIONS: made}.get(kind)
    return [*([Path(own) / kind] if own else []), *map(Path, folder_paths.get_folder_paths(kind))]


def place(path: Path) -> str:
    """A path as messages name it: what lies in ComfyUI's own folder by that name, wherever that is; else the whole path."""
    with suppress(ValueError):
        path = "ComfyUI" / path.relative_to(folder_paths.base_path)
    return path.as_posix()


def searched(kind: str) -> list[Path]:
    """The same with what stands behind them: for sets the banks that Save Negation Bank wrote, for CLIPs ComfyUI's own folder."""
    return roots(kind) + {SETS: roots(BANKS)[:1], CLIPS: roots("clip_vision")}.get(kind, [])


def _files(root: Path, wanted: Callable[[Path], bool], empty: bool = False) -> Iterator[tuple[Path, str]]:
    """(path, name below the root) of the regular files under a root that are wanted; links are not followed into other folders. With
    `empty` of the folders too in which there is nothing yet, but for those that are called like files.

    Nothing in somebody's folder may raise here: a schema that raises takes the whole pack out of ComfyUI.
    """
    for folder, inside, names in os.walk(root):
        if empty and not inside and not names and (name := Path(folder).relative_to(root).as_posix()) != ".":
            if name.isprintable() and not MARKUP & set(name) and Path(folder).suffix.lower() not in PACKED | EXTENSIONS:
                yield Path(folder), name
        for path in (Path(folder, name) for name in inside):
            if path.is_symlink():
                _leave_out(path, ValueError("a link to a folder; put the folder itself there, or name its place in "
                                            "extra_model_paths.yaml"))
        for path in (Path(folder, name) for name in names):
            try:
                if wanted(path) and stat.S_ISREG(path.stat().st_mode):  # no pipes, sockets, devices, or links that lead nowhere
                    name = path.relative_to(root).as_posix().encode().decode()
                    if MARKUP & set(name):
                        raise ValueError("its name is HTML")
                    yield path, name
            except (OSError, ValueError) as error:
                _leave_out(path, error)


def _leave_out(path: Path, error: Exception) -> None:
    """Say once in the log why an entry is not in a list."""
    if path not in _left_out:
        _left_out.add(path)
        logging.warning("safe denoiser: %a is left out of the lists (%s: %s)", str(path), type(error).__name__, error)


def list_sets() -> list[str]:
    """Names of all folders that hold pictures, or nothing at all, "people/alice" style, and of all zip files and saved banks, with their
    suffix.
    """
    names, known = set(), set()

    def wanted(path: Path) -> bool:
        return path.suffix.lower() in PACKED or path.suffix.lower() in EXTENSIONS and path.parent not in known

    for root in searched(SETS):
        known.add(root)  # pictures that lie there are of no set
        for path, name in _files(root, wanted, empty=True):
            if path.suffix.lower() in EXTENSIONS:
                known.add(path.parent)
                name = name.rpartition("/")[0]
            names.add(name)
    return sorted(names)


def is_empty(path: Path) -> bool:
    """Whether it is a folder in which there is nothing yet."""
    return path.is_dir() and not any(path.iterdir())


def list_banks(kind: str = BANKS) -> list[str]:
    """Names of all safetensors files in the bank folders."""
    return sorted({name for root in roots(kind) for _, name in _files(root, lambda path: path.suffix == ".safetensors")})


def list_conditions() -> list[str]:
    """The same of the folders of conditions."""
    return list_banks(CONDITIONS)


def list_clips() -> list[str]:
    """Names of all CLIP models: folders with open_clip's configuration, files of weights, and those of clip_vision that are whole."""
    names = set()
    for root in roots(CLIPS):
        files = dict(_files(root, lambda path: path.name == CONFIG or path.suffix.lower() in WEIGHTS))
        whole = {path.parent: name.rpartition("/")[0] for path, name in files.items() if path.name == CONFIG}
        names |= {name for name in whole.values() if name}
        names |= {name for path, name in files.items() if path.name != CONFIG and not whole.keys() & set(path.parents)}
    for root in roots("clip_vision"):
        for path, name in _files(root, lambda path: path.suffix == ".safetensors"):
            with suppress(OSError):  # gone in the meantime
                if _is_whole(path, state_of(path)):
                    names.add(name)
    return sorted(names)


@lru_cache(maxsize=1000)
def _is_whole(path: Path, _state: tuple[int, ...]) -> bool:
    """Whether a file has both halves of a CLIP in open_clip's format: most files of clip_vision have no text half."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        _leave_out(path, error)
        return False
    return any(key.startswith("visual.") for key in keys) and any(key.endswith("token_embedding.weight") for key in keys)


def read_set(name: str, max_images: int, progress: Callable[[int, int], None]) -> NegationSet:
    """The set of that name: a folder, a zip file or a saved bank; `progress` as `NegationSet.from_folder` wants it.

    Raises:
        ValueError, FileNotFoundError: as `resolve`, or what is wrong with the file or folder.
    """
    path = resolve(SETS, name)
    if path.suffix.lower() == ".zip":
        return NegationSet.from_zip(path, max_images, progress)
    if path.suffix.lower() != ".safetensors":
        return NegationSet.from_folder(path, max_images, progress)
    bank, end = load_bank(path), max_images or None
    if bank.metadata.get("space") != "vae":
        raise ValueError(f"{path.name!r} is a bank in the space of {bank.metadata.get('space', 'an unknown model')}, not of a VAE; "
                         f"choose one that Save Negation Bank wrote")
    return NegationSet.from_latents(bank.latents[:end], bank.names[:end], None if bank.weights is None else bank.weights[:end])


def resolve(kind: str, name: str) -> Path:
    """The file or folder of that name.

    Raises:
        ValueError: the name leads out of the folders, by "..", as an absolute path or through a link.
        FileNotFoundError: there is none.
    """
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{printable(repr(name))} is not a name; choose one of the list")
    for root in searched(kind):
        path = root / name
        try:
            inside, there = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)), path.exists()
        except (OSError, UnicodeError):  # longer than a name may be, or with letters that none may have
            inside, there = True, False
        if not name or not inside:
            raise ValueError(f"{printable(name)!r} leads out of ComfyUI's {kind} folder; put it into {place(root)} and choose it by name")
        if there:
            return path
    what, name = kind.removesuffix("s").replace("_", " "), printable(name)
    missing = roots(kind)[0] / name
    is_file, there = missing.suffix.lower() in PACKED | WEIGHTS, place(missing)
    todo = f"put the file there: {there}" if is_file else f"create {there} and put the pictures into it"
    raise FileNotFoundError(f"{what} {name!r} is not on this machine; {todo}, then press R")


def problem(kind: str, name: str) -> bool | str:
    """What `validate_inputs` wants: True, or what is wrong with a choice that a workflow brought along."""
    if kind == SETS and name == CHOOSE:
        return "no set is chosen; choose one in the list, or drop pictures onto the node"
    try:
        resolve(kind, name)
        return True
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def choice_problem(kind: str, name: str | None) -> bool | str:
    """The same for a node: what comes by a wire is None until it runs, and is checked then."""
    return name is None or problem(kind, name)


def choice_state(kind: str, name: str | None) -> list | float:
    """What `fingerprint_inputs` wants: the `state` of a choice; NaN, which is never the same, of what comes by a wire."""
    return math.nan if name is None else state(resolve(kind, name))


def state(path: Path) -> list:
    """Names, sizes and times of a file, or of every file of a folder: changes when they change."""
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with suppress(OSError):  # gone in the meantime, or a link that leads nowhere
            if file.is_file():
                found.append((file.name, *state_of(file)))
    return found


def cache(kind: str) -> Path:
    """Folder for what can be made again: user/safe_denoiser/<kind>."""
    return Path(folder_paths.get_user_directory()) / "safe_denoiser" / kind


def consent() -> Path:
    """A file that only this machine's user can make: downloads are allowed where it is."""
    return Path(folder_paths.get_user_directory()) / "safe_denoiser" / "allow_download"
