"""Bank: the latents of a negation set, with names and metadata; encode, merge, save, load."""
import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from .negation_set import NegationSet
from .pictures import printable

FORMAT, VERSION = "safe_denoiser.bank", 1
KEPT = 2  # what is kept on disk, in keys: 1 may hold NaN, and latents under the hash of another picture
FITS = ("crop", "pad", "stretch")
WORKERS, AHEAD = 3, 8  # threads that read and resize pictures, and how many pictures before they are encoded
BLOCK = 2**22  # bytes read at once where a whole bank is read
LONG = 8  # times as long as the size, beyond which a picture is cut before it is resized
RECALLED = 512  # numbers, or short lists of them, that are kept of calibrations
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_unwritable: set[Path] = set()  # caches of which it was said
_recalled: dict[tuple[str, str], float | list] = {}


class Stored:
    """Latents that stay in a safetensors file: shaped, measured and indexed like a tensor, but read when they are indexed.

    Args:
        path: a file that `save_bank` wrote.
        maps: functions (n, C, *spatial) -> (n, ...) that each read goes through, item by item, in order.

    >>> Stored(path)[:2].shape                                                           # doctest: +SKIP
    torch.Size([2, 4, 64, 64])
    """

    device, ndim = torch.device("cpu"), property(lambda self: len(self.shape))

    def __init__(self, path: str | Path, maps: tuple[Callable, ...] = ()):
        self.path, self.maps = Path(path), maps
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))["latents"]
        self.stored, self.item, self.start = DTYPES[entry["dtype"]], tuple(entry["shape"][1:]), 8 + length + entry["data_offsets"][0]
        self.count = entry["shape"][0]
        one = self[:1]
        self.shape, self.dtype = torch.Size((self.count, *one.shape[1:])), one.dtype

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: slice | torch.Tensor) -> torch.Tensor:
        """Items of a slice, or of an index tensor (n,). Read, not mapped: what was read does not stay resident."""
        if isinstance(key, slice):
            first, last, _ = key.indices(self.count)
            latents = self._read(first, max(first, last))
        else:
            latents = torch.cat([self._read(i, i + 1) for i in key.tolist()])
        for function in self.maps:
            latents = function(latents)
        return latents

    def _read(self, first: int, last: int) -> torch.Tensor:
        size = math.prod(self.item) * self.stored.itemsize
        data = np.fromfile(self.path, np.uint8, (last - first) * size, offset=self.start + first * size)
        if len(data) != (last - first) * size:
            raise ValueError(f"{self.path.name!r} has become shorter since it was loaded; load the bank again")
        return torch.from_numpy(data).view(-1, size).view(self.stored).view(-1, *self.item)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Stored":
        return Stored(self.path, (*self.maps, function))


def squared_norms_of(latents: "torch.Tensor | Stored") -> torch.Tensor:
    """|y_n|^2 of latents (N, *shape), (N,), accumulated in fp32 or better, with no copy of the whole."""
    dtype, size = torch.promote_types(latents.dtype, torch.float32), max(1, latents.shape[1:].numel())
    count = max(1, BLOCK // (size * dtype.itemsize)) if latents.device.type == "cpu" else max(1, len(latents))
    norms = torch.empty(len(latents), dtype=dtype, device=latents.device)
    for i in range(0, len(latents), count):
        norms[i:i + count] = torch.linalg.vector_norm(latents[i:i + count].flatten(1), dim=1, dtype=dtype)
    return norms.square_()


@dataclass(frozen=True, eq=False)
class Clusters:
    """An index of a bank: the mean of each cluster, centres (k, C, *spatial), and each item's cluster, labels (N,); see `index_bank`."""

    centres: torch.Tensor
    labels: torch.Tensor

    def check(self, shape: torch.Size) -> None:
        """Raise where they are not those of latents of this shape."""
        k, whole = len(self.centres) if self.centres.ndim else 0, self.labels.dtype == torch.int64
        if not k or self.centres.shape[1:] != shape[1:] or self.labels.shape != shape[:1] or not whole \
                or not bool(self.centres.isfinite().all()) or not bool(((self.labels >= 0) & (self.labels < k)).all()):
            raise ValueError(f"bank clusters are {tuple(self.centres.shape)} with labels {tuple(self.labels.shape)}; need centres like the "
                             f"latents {tuple(shape)}, and the number of one for each latent")


@dataclass(frozen=True, eq=False)
class Bank:
    """Latents y_1 ... y_N of pictures. They can be decoded back into pictures: share a bank as you would share the pictures.

    Args:
        latents: (N, C, *spatial), finite, a tensor or `Stored`; in the space in which `x` lives when the bank is used.
        names: one per latent, or none.
        metadata: strings that travel with the file.
        weights: (N,) relative weight pi_n of each item, or None for equal weights.
        clusters: by which a large bank is searched, or None.

    Raises:
        ValueError: no latent, a wrong shape, a value that is not finite, names, weights or clusters that do not go with the latents.
    """

    latents: torch.Tensor | Stored
    names: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    clusters: Clusters | None = None

    def __post_init__(self):
        n = len(self.latents) if self.latents.ndim else 0
        if n == 0 or self.latents.ndim < 2 or not self.latents.shape.numel():
            raise ValueError(f"bank latents are {tuple(self.latents.shape)}; need (N, C, *spatial) with N >= 1, "
                             f"so build the bank from at least one picture")
        if not bool(torch.isfinite(self.squared_norms).all()):
            raise ValueError("bank latents hold NaN or infinity; rebuild the bank, with the VAE in fp32 if it overflowed")
        if self.names and len(self.names) != n:
            raise ValueError(f"bank has {n} latents but {len(self.names)} names; give one name per latent or none")
        if self.weights is not None and (self.weights.shape != (n,) or not bool(((self.weights > 0) & self.weights.isfinite()).all())):
            raise ValueError(f"bank weights are {tuple(self.weights.shape)}; need {n} positive numbers, one per latent")
        if self.clusters is not None:
            self.clusters.check(self.latents.shape)

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def squared_norms(self) -> torch.Tensor:
        """|y_n|^2, (N,), accumulated in fp32 or better."""
        return squared_norms_of(self.latents)

    @cached_property
    def log_weights(self) -> torch.Tensor:
        """log pi_n with sum pi_n = 1, (N,)."""
        weights = torch.ones(len(self), device=self.latents.device) if self.weights is None else self.weights
        return (weights.to(torch.promote_types(weights.dtype, torch.float32)) / weights.sum()).log()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the bank holds: of each item its length, its place along one random direction, and its weight."""
        direction = torch.randn(self.latents.shape[1:].numel(), generator=torch.Generator().manual_seed(0)).to(self.latents.device)
        count = max(1, BLOCK // direction.numel())
        along = [self.latents[i:i + count].flatten(1).to(direction.dtype) @ direction for i in range(0, len(self), count)]
        told = torch.stack([self.squared_norms.double(), torch.cat(along).double(), self.log_weights.double()])
        return hashlib.sha256(repr(tuple(self.latents.shape)).encode() + told.cpu().numpy().tobytes()).hexdigest()

    def recall(self, what: str, compute: Callable[[], float | list]) -> float | list:
        """What `compute` returns for this bank, computed once for all banks that hold the same; in this process only, since numbers that
        steer are not taken from a file that anybody may have written.
        """
        key = what, self.fingerprint
        _recalled[key] = _recalled.pop(key) if key in _recalled else compute()  # the latest comes last
        while len(_recalled) > RECALLED:
            _recalled.pop(next(iter(_recalled)), None)
        return _recalled[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the latents, were they all in memory in single precision."""
        return 4 * self.latents.shape.numel()

    def to(self, device=None, dtype=None) -> "Bank":
        """The same bank in memory, on another device or in another dtype."""
        return replace(self, latents=self.latents[:].to(device, dtype)).settled()

    def settled(self) -> "Bank":
        """The same bank with all that belongs to its latents on their device."""
        device = self.latents.device
        if (self.weights is None or self.weights.device == device) and (self.clusters is None or self.clusters.centres.device == device):
            return self
        return replace(self, weights=None if self.weights is None else self.weights.to(device),
                       clusters=self.clusters and replace(self.clusters, centres=self.clusters.centres.to(device)))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Bank":
        """The same bank with latents function((n, C, *spatial)), item by item: at once, or as they are read where they are `Stored`.
        A function that is not affine must drop the clusters, whose centres go through it too.
        """
        latents = self.latents.map(function) if isinstance(self.latents, Stored) else function(self.latents)
        clusters = self.clusters and replace(self.clusters, centres=function(self.clusters.centres.to(self.latents.device)))
        return replace(self, latents=latents, clusters=clusters)

    def sample(self, count: int) -> "Bank":
        """At most `count` of the items, evenly picked, in memory."""
        if len(self) <= count:
            return self.to() if isinstance(self.latents, Stored) else self
        index = torch.arange(count, device=self.latents.device) * len(self) // count
        return Bank(self.latents[index], weights=None if self.weights is None else self.weights[index])

    def crops(self, places: Sequence[tuple], chosen: Sequence[int]) -> "Bank":
        """The same bank with one crop of each item, in memory: the one at places[chosen[n]]; all crops are of one size."""
        count = max(1, BLOCK // self.latents.shape[1:].numel())
        parts = [torch.stack([latent[places[k]] for latent, k in zip(self.latents[i:i + count], chosen[i:i + count])])
                 for i in range(0, len(self), count)]
        return replace(self, latents=torch.cat(parts), clusters=None)

    def normalised(self) -> "Bank":
        """The same bank with each location at unit norm over the channels, as the published code stores it."""
        return replace(self, clusters=None).map(lambda latents: F.normalize(latents, dim=1))

    def masked(self, root: torch.Tensor) -> "Bank":
        """The same bank with each item multiplied by `root`, (C, *spatial) or flat (D,): with root = sqrt(m), |root (x - y)|^2 is
        sum m (x - y)^2, the distance inside a mask m.
        """
        root = root.view(self.latents.shape[1:])
        return self.map(lambda latents: latents * root.to(latents.device))

    def resized(self, size: Sequence[int]) -> "Bank":
        """The same bank with latents interpolated (bilinear, antialiased) to the spatial size (..., height, width)."""
        def resize(latents):
            flat = latents.reshape(-1, 1, *latents.shape[-2:])
            sized = F.interpolate(flat.float(), tuple(size), mode="bilinear", antialias=True)
            return sized.reshape(*latents.shape[:-2], *size).to(latents.dtype)

        return self.map(resize)


def merge_banks(banks: Sequence[Bank]) -> Bank:
    """One bank with the items of all, weighing each item as before relative to its own bank's mean weight.

    Raises:
        ValueError: latents of different shapes, or of different spaces.
    """
    shapes = {tuple(bank.latents.shape[1:]) for bank in banks}
    spaces = {bank.metadata.get("space", "model") for bank in banks}
    if len(shapes) != 1 or len(spaces) != 1:
        raise ValueError(f"banks hold latents of shapes {sorted(shapes)} in spaces {sorted(spaces)}; "
                         f"build them with the same VAE at the same size")
    names = sum((bank.names or tuple(map(str, range(len(bank)))) for bank in banks), ())
    weights = None
    if any(bank.weights is not None for bank in banks):
        weights = torch.cat([bank.log_weights.exp() * len(bank) for bank in banks])
    metadata = {key: value for key, value in banks[0].metadata.items() if key != "origin"}  # numbers of the items of one bank
    return Bank(torch.cat([bank.latents[:] for bank in banks]), names, metadata, weights)


def fit_picture(pixels: torch.Tensor, size: tuple[int, int], fit: str) -> torch.Tensor:
    """Resize a picture (H, W, 3) to `size` = (height, width).

    Args:
        fit: "crop" fills the size and cuts the overhang, "pad" keeps the whole picture on black, "stretch" distorts.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}")
    height, width = size
    image = pixels.movedim(-1, 0)[None]
    if fit == "crop":  # of a picture many times as long as the size is, only the middle is resized: the rest would be cut
        for axis, most in ((-1, image.shape[-2] * width / height), (-2, image.shape[-1] * height / width)):
            length = min(image.shape[axis], math.ceil(LONG * most))
            image = image.narrow(axis, (image.shape[axis] - length) // 2, length)
    h, w = image.shape[-2:]
    if fit != "stretch":
        scale = (max if fit == "crop" else min)(height / h, width / w)
        h, w = max(1, round(h * scale)), max(1, round(w * scale))
    else:
        h, w = height, width
    if (h, w) != tuple(image.shape[-2:]):
        image = F.interpolate(image, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (h - height) // 2, (w - width) // 2
    if fit == "pad":
        image = F.pad(image, (-left, width - w + left, -top, height - h + top))
    elif fit == "crop":
        image = image[..., top:top + height, left:left + width]
    return image[0].movedim(0, -1)


class LatentCache:
    """Latents on disk, one file per picture, so that no picture is encoded twice. Processes may share a folder.

    Args:
        folder: where the files go; made when missing.
        encoder: a fingerprint of whatever turns pixels into latents (the VAE's weights).
        limit: bytes of the folder above which `trim` removes what was used least recently.
    """

    def __init__(self, folder: str | Path, encoder: str, limit: float = math.inf):
        self.folder, self.encoder, self.limit = Path(folder), encoder, limit

    def path(self, fingerprint: str, size: Sequence[int], fit: str) -> Path:
        key = json.dumps([KEPT, self.encoder, fingerprint, list(size), fit])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, path: Path) -> torch.Tensor | None:
        """The stored latent, or None when there is none or it is damaged."""
        try:
            latent = load(path.read_bytes())["latent"]  # read, not mapped: a mapped file cannot be replaced on Windows
        except (OSError, SafetensorError, KeyError):
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return latent

    def put(self, path: Path, latent: torch.Tensor) -> None:
        """Store a latent; where that cannot be done, go on without, and say so once."""
        try:
            _write(path, {"latent": latent})
        except (OSError, SafetensorError) as error:  # a full disk, a folder that is gone or may not be written
            stored = os.name == "nt" and path.exists()  # there a file that another process reads cannot be replaced
            if self.folder not in _unwritable and not stored:
                _unwritable.add(self.folder)
                logging.warning("safe denoiser: nothing can be stored in %s (%s); what is computed is not kept for next time", self.folder,
                                error)

    def trim(self) -> None:
        with suppress(OSError):
            trim(self.folder, self.limit)


def trim(folder: Path, limit: float) -> None:
    """Remove the files of a cache that were used least recently, until those that stay take at most `limit` bytes, and what a process
    that was killed left half-written. Other people's files in the folder stay.
    """
    files, now = [], time.time()
    for entry in os.scandir(folder) if folder.is_dir() else ():
        with suppress(OSError):  # another process may remove files at the same time
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".tmp") and now - status.st_mtime > 3600:  # a younger one is being written
                os.unlink(entry.path)
            elif entry.name.endswith(".safetensors") and entry.is_file(follow_symlinks=False):
                files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with suppress(OSError):
            os.unlink(path)
        total -= size


def encode_bank(negation_set: NegationSet, encode: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int],
                fit: str = "crop", progress: Callable[[int, int], None] | None = None,
                cache: LatentCache | None = None) -> Bank:
    """Encode every picture of a set, one at a time (video VAEs read a batch as frames), while the next ones are read and resized.

    Args:
        negation_set: the pictures.
        encode: one image (height, width, 3) in [0, 1] -> one latent (C, *spatial).
        size: (height, width) in pixels.
        fit: how a picture of another shape is brought to `size`, see `fit_picture`.
        progress: called as progress(done, total) after each picture; may raise to interrupt.
        cache: latents found there are not encoded again; each new one is stored at once, so an interrupt loses nothing.

    Returns:
        Bank with latents (N, C, *spatial) in the space of `encode`, and the pictures' names and weights.

    Raises:
        ValueError: the set holds latents of a saved bank whose shape differs from those that are encoded; a picture that cannot be read
            any more, or of which `encode` makes no numbers: the name says which.
    """
    latents, count = [], len(negation_set)
    stored = negation_set.latents or (None,) * count

    def place(fingerprint: str) -> Path | None:
        return cache and cache.path(fingerprint, size, fit)

    known = [None if negation_set.changed(i) else place(fingerprint) for i, fingerprint in enumerate(negation_set.fingerprints)]

    def prepare(i: int) -> tuple[torch.Tensor | None, torch.Tensor | None, Path | None]:
        """The latent where there is one, else the picture and where its latent belongs."""
        latent = stored[i] if stored[i] is not None else known[i] and cache.get(known[i])
        if latent is not None:
            return latent, None, None
        picture, fingerprint = negation_set.read(i)  # by what is read now: a file may be replaced at any time
        return None, fit_picture(picture, size, fit), place(fingerprint)

    with ThreadPoolExecutor(WORKERS) as pool:
        ahead = deque(pool.submit(prepare, i) for i in range(min(AHEAD, count)))
        try:
            for i in range(count):
                latent, picture, path = ahead.popleft().result()
                if i + AHEAD < count:
                    ahead.append(pool.submit(prepare, i + AHEAD))
                if latent is None:
                    latent = encode(picture).detach().cpu().contiguous()
                    if not bool(latent.isfinite().all()):
                        raise ValueError(f"the VAE gives NaN or infinity for {negation_set.names[i]}; run it in higher precision (ComfyUI "
                                         f"--fp32-vae or --bf16-vae), or take the picture out of the set")
                    if path:
                        cache.put(path, latent)
                latents.append(latent)
                if progress:
                    progress(i + 1, count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if cache:
                cache.trim()
    shapes = sorted({tuple(latent.shape) for latent in latents})
    if len(shapes) > 1:
        raise ValueError(f"the set mixes latents of shapes {shapes}; a saved bank can be combined only with what the same VAE encodes "
                         f"at the size it was built with")
    weights = torch.tensor(negation_set.weights) if negation_set.weights else None
    return Bank(torch.stack([latent.to(latents[0].dtype) for latent in latents]), negation_set.names,
                {"size": f"{size[0]}x{size[1]}", "fit": fit}, weights)


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
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
    _write(Path(path), tensors, {"format": FORMAT, "version": str(VERSION),
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
            latents = file.get_tensor("latents") if math.prod(shape) * 4 <= memory else Stored(path)
        bank = Bank(latents, names, metadata, weights, clusters)
        if "origin" in metadata and len(json.loads(metadata["origin"])) != len(bank):
            raise ValueError(f"its origin does not name a picture for each of {len(bank)} latents; build it again")
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
        origin = json.loads(metadata.get("origin", "[]"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its names or metadata cannot be read; build it again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its names are not a list of texts; build it again")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts; build it again")
    if not isinstance(origin, list) or not all(type(i) is int and 0 <= i < 2**31 for i in origin):
        raise ValueError("its origin is not a list of pictures' numbers; build it again")
    return tuple(map(printable, names)), metadata
