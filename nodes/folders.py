"""Where sets, banks and caches live: under ComfyUI's own directories, never elsewhere."""
import os
from functools import lru_cache
from pathlib import Path

import folder_paths
from safetensors import SafetensorError, safe_open

from ..safe_denoiser import NegationSet, load_bank
from ..safe_denoiser.clip_files import CONFIG
from ..safe_denoiser.pictures import EXTENSIONS

PACKED, WEIGHTS = {".zip", ".safetensors"}, {".safetensors", ".bin", ".pt", ".pth"}
SETS, BANKS, CLIPS = "negation_sets", "negation_banks", "open_clip"
CACHE_LIMIT = float(os.environ.get("SAFE_DENOISER_CACHE_GB", 8)) * 2**30  # bytes of each cache; beyond, the oldest files go
TINY = Path(__file__).resolve().parent.parent / "tiny_digits" / "models"


def register() -> None:
    """Make models/negation_sets, models/negation_banks, models/open_clip and the shipped tiny world known to ComfyUI."""
    for kind in (SETS, BANKS, CLIPS):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
    for kind in (SETS, BANKS, CLIPS, "diffusion_models", "vae"):
        folder_paths.add_model_folder_path(kind, str(TINY / kind))


def roots(kind: str) -> list[Path]:
    """Folders searched for `kind`, first come first served."""
    own = {SETS: folder_paths.get_input_directory(), BANKS: folder_paths.get_output_directory()}.get(kind)
    return [*([Path(own) / kind] if own else []), *map(Path, folder_paths.get_folder_paths(kind))]


def searched(kind: str) -> list[Path]:
    """The same with what stands behind them: for sets the banks that Save Negation Bank wrote, for CLIPs ComfyUI's own folder."""
    return roots(kind) + {SETS: roots(BANKS)[:1], CLIPS: roots("clip_vision")}.get(kind, [])


def list_sets() -> list[str]:
    """Names of all folders that hold pictures, "people/alice" style, and of all zip files and saved banks, with their suffix."""
    names = set()
    for root in searched(SETS):
        for folder, _, files in os.walk(root):
            place = Path(folder).relative_to(root)
            if place.parts and any(os.path.splitext(file)[1].lower() in EXTENSIONS for file in files):
                names.add(place.as_posix())
            names |= {(place / file).as_posix() for file in files if os.path.splitext(file)[1].lower() in PACKED}
    return sorted(names)


def list_banks() -> list[str]:
    """Names of all safetensors files in the bank folders."""
    return sorted({path.relative_to(root).as_posix() for root in roots(BANKS) for path in root.rglob("*.safetensors")})


def list_clips() -> list[str]:
    """Names of all CLIP models: folders with open_clip's configuration, files of weights, and those of clip_vision that are whole."""
    names = set()
    for root in roots(CLIPS):
        whole = {path.parent for path in root.rglob(CONFIG)}
        names |= {path.relative_to(root).as_posix() for path in whole}
        names |= {path.relative_to(root).as_posix() for path in root.rglob("*")
                  if path.suffix.lower() in WEIGHTS and not whole.intersection(path.parents)}
    for root in roots("clip_vision"):
        names |= {path.relative_to(root).as_posix() for path in root.rglob("*.safetensors") if _is_whole(path, path.stat().st_mtime_ns)}
    return sorted(names)


@lru_cache(maxsize=1000)
def _is_whole(path: Path, _mtime_ns: int) -> bool:
    """Whether a file has both halves of a CLIP in open_clip's format: most files of clip_vision have no text half."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError):
        return False
    return any(key.startswith("visual.") for key in keys) and any(key.endswith("token_embedding.weight") for key in keys)


def read_set(name: str, max_images: int) -> NegationSet:
    """The set of that name: a folder, a zip file or a saved bank.

    Raises:
        ValueError, FileNotFoundError: as `resolve`, or what is wrong with the file or folder.
    """
    path = resolve(SETS, name)
    if path.suffix.lower() == ".zip":
        return NegationSet.from_zip(path, max_images)
    if path.suffix.lower() != ".safetensors":
        return NegationSet.from_folder(path, max_images)
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
    for root in searched(kind):
        path = root / name
        if not name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise ValueError(f"{name!r} leads out of ComfyUI's {kind} folder; put it into {root} and choose it by name")
        if path.exists():
            return path
    what, missing = kind.removesuffix("s").replace("_", " "), roots(kind)[0] / name
    is_file = missing.suffix.lower() in PACKED | WEIGHTS
    todo = f"put the file there: {missing}" if is_file else f"create {missing} and put the pictures into it"
    raise FileNotFoundError(f"{what} {name!r} is not on this machine; {todo}, then press R")


def problem(kind: str, name: str) -> bool | str:
    """What `validate_inputs` wants: True, or what is wrong with a choice that a workflow brought along."""
    try:
        resolve(kind, name)
        return True
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def state(path: Path) -> list:
    """Name, size and time of a file, or of every file of a folder: changes when they change."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, status.st_size, status.st_mtime_ns) for file in files if file.is_file() for status in [file.stat()]]


def cache(kind: str) -> Path:
    """Folder for what can be made again: user/safe_denoiser/<kind>."""
    return Path(folder_paths.get_user_directory()) / "safe_denoiser" / kind


def consent() -> Path:
    """A file that only this machine's user can make: downloads are allowed where it is."""
    return Path(folder_paths.get_user_directory()) / "safe_denoiser" / "allow_download"
