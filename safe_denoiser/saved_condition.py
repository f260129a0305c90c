"""A condition as a file that may be shared: its tensors, the model that it belongs to, and how good it is."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .pictures import printable
from .storage import write

FORMAT, VERSION = "safe_denoiser.condition", 1
MOST = 2**26  # numbers of one tensor: a text of 10,000 words for the widest encoders; a file may come from anybody
KEYS = ("rows", "pooled_output")  # what a file may hold, and whatever begins with "conditioning_"


@dataclass(frozen=True, eq=False)
class SavedCondition:
    """A condition.

    Args:
        tensors: by the name that ComfyUI's CONDITIONING gives them; "rows" is the text.
        model: fingerprint of the weights that it was learned with. family: their class, to tell people.
        about: strings for people, such as how good it is.
    """

    tensors: dict[str, torch.Tensor]
    model: str = ""
    family: str = ""
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if "rows" not in self.tensors:
            raise ValueError(f"a condition holds rows of text, and this one holds {', '.join(sorted(self.tensors)) or 'nothing'}")
        for name, value in self.tensors.items():
            if name not in KEYS and not name.startswith("conditioning_"):
                raise ValueError(f"{printable(name)!r} is nothing that a condition holds; save it again with Save Unwanted Condition")
            if not value.is_floating_point() or not 1 <= value.ndim <= 4 or not 0 < value.numel() <= MOST or value.shape[0] != 1:
                raise ValueError(f"{printable(name)} is {tuple(value.shape)} of {value.dtype}, and needs to be one row of numbers")
            if not bool(value.isfinite().all()):
                raise ValueError(f"{printable(name)} holds NaN or infinity")


def save_condition(condition: SavedCondition, path: str | Path) -> None:
    """Write a condition as safetensors: its tensors, and string metadata `format`, `version`, `model`, `family`, `about`."""
    write(Path(path), {name: value.detach().cpu().contiguous() for name, value in condition.tensors.items()},
          {"format": FORMAT, "version": str(VERSION), "model": condition.model, "family": condition.family,
           "about": json.dumps(condition.about)})


def load_condition(path: str | Path) -> SavedCondition:
    """Read a condition that `save_condition` wrote. Nothing in the file is trusted: it may come from anybody.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, no condition, damaged, or written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"condition {path.name!r} does not exist; save one with Save Unwanted Condition")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError("it is a safetensors file but not a condition; learn one with Learn Unwanted Condition")
            if not header.get("version", "").isdecimal() or len(header["version"]) > 9 or int(header["version"]) > VERSION:
                raise ValueError(f"it is a condition of version {header.get('version')}, this pack reads up to {VERSION}; update the pack")
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            large = [name for name, shape in sizes.items() if torch.Size(shape).numel() > MOST]
            if large or len(sizes) > 16:
                raise ValueError(f"it holds {len(sizes)} tensors, some too large for a condition")
            tensors = {name: file.get_tensor(name).float() for name in sizes}
        return SavedCondition(tensors, *(printable(header.get(name, "")) for name in ("model", "family")), _about(header))
    except SafetensorError as error:
        raise ValueError(f"{path.name!r} is not a readable safetensors file ({printable(str(error))}); copy or save it again") from error
    except ValueError as error:
        raise ValueError(f"{path.name!r} cannot be used: {printable(str(error))}") from error


def _about(header: dict[str, str]) -> dict[str, str]:
    try:
        about = json.loads(header.get("about", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError("what it says of itself cannot be read; save it again") from error
    if not isinstance(about, dict) or not all(isinstance(one, str) for one in (*about, *about.values())):
        raise ValueError("what it says of itself is no text; save it again")
    return {printable(key): printable(value) for key, value in about.items()}
