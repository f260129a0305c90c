"""Where sets, banks and caches live: under ComfyUI's own directories, never elsewhere."""
import os
from pathlib import Path

import folder_paths

from ..safe_denoiser import NegationSet, load_bank
from ..safe_denoiser.pictures import EXTENSIONS

PACKED = {".zip", ".safetensors"}
SETS, BANKS = "negation_sets", "negation_banks"
CACHE_LIMIT = float(os.environ.get("SAFE_DENOISER_CACHE_GB", 8)) * 2**30  # bytes of each cache; beyond, the oldest files go
TINY = Path(__file__).resolve().parent.parent / "tiny_digits" / "models"


def register() -> None:
    """Make models/negation_sets, models/negation_banks and the shipped tiny world known to ComfyUI."""
    for kind in (SETS, BANKS):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
    for kind in (SETS, BANKS, "diffusion_models", "vae"):
        folder_paths.add_model_folder_path(kind, str(TINY / kind))


def roots(kind: str) -> list[Path]:
    """Folders searched for `kind`, first come first served."""
    own = Path(folder_paths.get_input_directory()) / SETS if kind == SETS else Path(folder_paths.get_output_directory()) / BANKS
    return [own, *map(Path, folder_paths.get_folder_paths(kind))]


def set_roots() -> list[Path]:
    """Where sets are searched: the set folders, and behind them the banks that Save Negation Bank wrote."""
    return [*roots(SETS), roots(BANKS)[0]]


def list_sets() -> list[str]:
    """Names of all folders that hold pictures, "people/alice" style, and of all zip files and saved banks, with their suffix."""
    names = set()
    for root in set_roots():
        for folder, _, files in os.walk(root):
            place = Path(folder).relative_to(root)
            if place.parts and any(os.path.splitext(file)[1].lower() in EXTENSIONS for file in files):
                names.add(place.as_posix())
            names |= {(place / file).as_posix() for file in files if os.path.splitext(file)[1].lower() in PACKED}
    return sorted(names)


def list_banks() -> list[str]:
    """Names of all safetensors files in the bank folders."""
    return sorted({path.relative_to(root).as_posix() for root in roots(BANKS) for path in root.rglob("*.safetensors")})


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
    for root in set_roots() if kind == SETS else roots(kind):
        path = root / name
        if not name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise ValueError(f"{name!r} leads out of ComfyUI's {kind} folder; put it into {root} and choose it by name")
        if path.exists():
            return path
    what, missing = kind.removesuffix("s").replace("_", " "), roots(kind)[0] / name
    todo = f"put the file there: {missing}" if missing.suffix.lower() in PACKED else f"create {missing} and put the pictures into it"
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
