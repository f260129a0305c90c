"""A condition saved as a file that people may share: what the model is told, which model that is, and how good the condition is."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..bank.file_format import write
from ..pictures.files import printable

FORMAT, VERSION = "safe_denoiser.condition", 1
MOST = 2**26  # numbers in a tensor: enough for 10,000 words in the widest encoder, since a file may come from anybody
TENSORS = ("rows", "pooled_output", "attention_mask", "t5xxl_ids", "t5xxl_weights")  # what a file may hold, besides "conditioning_..."
NUMBERS = ("guidance", "width", "height", "crop_w", "crop_h", "target_width", "target_height", "aesthetic_score", "num_tokens")


def holds(name: str, value) -> bool:
    """Whether a file may hold this: what text encoders produce, and nothing that changes how or where a condition is applied."""
    if isinstance(value, torch.Tensor):
        return name in TENSORS or name.startswith("conditioning_")
    return name in NUMBERS and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


@dataclass(frozen=True, eq=False)
class SavedCondition:
    """A condition, and the model that it was made for.

    Args:
        tensors, numbers: named as in ComfyUI's CONDITIONING; "rows" is the encoded text.
        model: fingerprint of that model's weights. family: the name of its class, for messages.
        about: strings for people, such as how good it is.

    Raises:
        ValueError: no rows, something that a condition does not hold, a wrong shape, NaN or infinity.
    """

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, float] = field(default_factory=dict)
    model: str = ""
    family: str = ""
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if "rows" not in self.tensors:
            raise ValueError(f"a condition holds rows of text, and this one holds {_listed(self.tensors)}")
        if strange := [name for name, value in {**self.tensors, **self.numbers}.items() if not holds(name, value)]:
            raise ValueError(f"a condition does not hold {_listed(strange)}; save it again with Save Unwanted Condition")
        for name, value in self.tensors.items():
            if not 1 <= value.ndim <= 4 or not 0 < value.numel() <= MOST or value.shape[0] != 1:
                raise ValueError(f"{printable(name)} has the shape {tuple(value.shape)}, and needs to be one row of numbers")
            if value.is_complex() or value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{printable(name)} holds NaN or infinity")


def _listed(names) -> str:
    return ", ".join(printable(str(name)) for name in sorted(names)[:8]) or "nothing"


def save_condition(condition: SavedCondition, path: str | Path) -> None:
    """Write a condition as safetensors: its tensors, and string metadata `format`, `version`, `model`, `family`, `numbers`, `about`."""
    write(Path(path), {name: value.detach().cpu().contiguous() for name, value in condition.tensors.items()},
          {"format": FORMAT, "version": str(VERSION), "model": condition.model, "family": condition.family,
           "numbers": json.dumps(condition.numbers), "about": json.dumps(condition.about)})


def load_condition(path: str | Path) -> SavedCondition:
    """Read a condition that `save_condition` wrote. Nothing in the file is trusted: it may come from anybody.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, damaged, not a condition, or written by a newer version.
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
            if len(sizes) > 16 or any(torch.Size(shape).numel() > MOST for shape in sizes.values()):
                raise ValueError(f"it holds {len(sizes)} tensors, some too large for a condition")
            tensors = {name: file.get_tensor(name) for name in sizes}
        model, family = (printable(header.get(name, "")) for name in ("model", "family"))
        about = {printable(str(key)): "\n".join(map(printable, str(value).splitlines())) for key, value in _read(header, "about").items()}
        return SavedCondition(tensors, _read(header, "numbers"), model, family, about)
    except SafetensorError as error:
        raise ValueError(f"{path.name!r} is not a readable safetensors file ({printable(str(error))}); copy or save it again") from error
    except ValueError as error:
        raise ValueError(f"{path.name!r} cannot be used: {printable(str(error))}") from error


def _read(header: dict[str, str], name: str) -> dict:
    """A dictionary that the file brings as JSON."""
    try:
        found = json.loads(header.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} cannot be read; save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"its {name} cannot be read; save it again")
    return found
