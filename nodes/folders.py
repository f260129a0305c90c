"""Where sets, banks and caches live: under ComfyUI's own directories, never elsewhere."""
import os
from pathlib import Path

import folder_paths

from ..safe_denoiser.negation_set import EXTENSIONS

SETS, BANKS = "negation_sets", "negation_banks"
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


def list_sets() -> list[str]:
    """Names of all folders that hold pictures, "people/alice" style."""
    return sorted({Path(folder).relative_to(root).as_posix() for root in roots(SETS) for folder, _, files in os.walk(root)
                   if folder != str(root) and any(os.path.splitext(file)[1].lower() in EXTENSIONS for file in files)})


def list_banks() -> list[str]:
    """Names of all safetensors files in the bank folders."""
    return sorted({path.relative_to(root).as_posix() for root in roots(BANKS) for path in root.rglob("*.safetensors")})


def resolve(kind: str, name: str) -> Path:
    """The file or folder of that name.

    Raises:
        ValueError: the name leads out of the folders, by "..", as an absolute path or through a link.
        FileNotFoundError: there is none.
    """
    for root in roots(kind):
        path = root / name
        if not name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise ValueError(f"{name!r} leads out of ComfyUI's {kind} folder; put it into {root} and choose it by name")
        if path.exists():
            return path
    raise FileNotFoundError(f"{kind.removesuffix('s').replace('_', ' ')} {name!r} is not on this machine; create {roots(kind)[0] / name}")


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
