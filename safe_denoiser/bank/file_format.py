"""Bank files: safetensors that may be shared, of which nothing is trusted when they are read."""
import json
import math
import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..pictures.files import printable
from .bank import Bank, Clusters
from .lazy_latents import DTYPES, LazyLatents

FORMAT, VERSION = "safe_denoiser.bank", 1


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write through a temporary file in the same folder: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # not mkstemp, whose files other accounts cannot read
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_bank(bank: Bank, path: str | Path) -> None:
    """Write a bank as safetensors: tensors `latents` (and `weights`, and `centres` with `labels`), string metadata `format`,
    `version`, `names`, `metadata`.
    """
    tensors = {"latents": bank.latents[:].cpu().contiguous()}
    if bank.weights is not None:
        tensors["weights"] = bank.weights.cpu().contiguous()
    if bank.clusters is not None:
        tensors.update({name: value.cpu().contiguous() for name, value in vars(bank.clusters).items()})
    write(Path(path), tensors, {"format": FORMAT, "version": str(VERSION),
                                 "names": json.dumps(bank.names), "metadata": json.dumps(bank.metadata)})


def load_bank(path: str | Path, memory: float = math.inf) -> Bank:
    """Read a bank that `save_bank` wrote. Nothing in the file is trusted: it may come from anybody.

    Args:
        memory: bytes that its latents may take; those of a larger bank stay in the file and are read when they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not a bank, damaged, or written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"negation bank {path.name!r} does not exist; save one with save_bank or Save Negation Bank")
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, set(file.keys())
            if header.get("format") != FORMAT:
                raise ValueError("it is a safetensors file but not a negation bank; build one with encode_bank or Build Negation Bank")
            names, metadata = _read_header(header)
            if "latents" not in tensors or ("centres" in tensors) != ("labels" in tensors):
                raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}; it needs latents, and centres with labels if any")
            kind, shape = file.get_slice("latents").get_dtype(), file.get_slice("latents").get_shape()
            if kind not in DTYPES:
                raise ValueError(f"its latents are of type {kind}, and need to be one of {', '.join(DTYPES)}")
            weights = file.get_tensor("weights") if "weights" in tensors else None
            clusters = Clusters(file.get_tensor("centres"), file.get_tensor("labels")) if "labels" in tensors else None
            latents = file.get_tensor("latents") if math.prod(shape) * 4 <= memory else LazyLatents(path)
        bank = Bank(latents, names, metadata, weights, clusters)
        _check_origin(bank)
        return bank
    except SafetensorError as error:
        raise ValueError(f"{path.name!r} is not a readable safetensors file ({printable(str(error))}); it may be truncated: "
                         f"copy or build it again") from error
    except ValueError as error:
        raise ValueError(f"{path.name!r} cannot be used: {printable(str(error))}") from error


def _read_header(header: dict[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names and metadata of a bank file.

    Raises:
        ValueError: anything else than `save_bank` writes.
    """
    version = header.get("version", "")
    if not version.isdecimal() or len(version) > 9:
        raise ValueError("it does not say by which version it was written; build it again")
    if int(version) > VERSION:
        raise ValueError(f"it is a negation bank of version {version}, this pack reads up to {VERSION}; update the pack")
    try:
        names, metadata = json.loads(header["names"]), json.loads(header["metadata"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("its names or metadata cannot be read; build it again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its names are not a list of texts; build it again")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts; build it again")
    return tuple(map(printable, names)), metadata


def _check_origin(bank: Bank) -> None:
    """Raise ValueError where a file says of which pictures its items are, and that is not one number for each."""
    if "origin" not in bank.metadata:
        return
    try:
        origin = bank.origin
    except (ValueError, RecursionError) as error:
        raise ValueError("its names or metadata cannot be read; build it again") from error
    if not isinstance(origin, list) or not all(type(i) is int and 0 <= i < 2**31 for i in origin):
        raise ValueError("its origin is not a list of pictures' numbers; build it again")
    if len(origin) != len(bank):
        raise ValueError(f"its origin does not name a picture for each of {len(bank)} latents; build it again")
