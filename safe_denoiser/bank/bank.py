"""Bank: the latents of a set of pictures, with names, weights and metadata; and banks derived from one or several."""
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from .lazy_latents import BLOCK, LazyLatents, squared_norms_of

RECALLED = 512  # numbers, or short lists of them, that are kept of calibrations
_recalled: dict[tuple[str, str], float | list] = {}


@lru_cache(maxsize=4)
def _direction(size: int) -> torch.Tensor:
    """A random direction in so many dimensions, always the same; kept, since banks inside changing masks ask at each step."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, eq=False)
class Clusters:
    """An index of a bank: the mean of each cluster, centres (k, C, *spatial), and each item's cluster, labels (N,); see `index_bank`."""

    centres: torch.Tensor
    labels: torch.Tensor

    def check(self, shape: torch.Size) -> None:
        """Raise where they do not fit latents of this shape."""
        k, whole = len(self.centres) if self.centres.ndim else 0, self.labels.dtype == torch.int64
        if not k or self.centres.shape[1:] != shape[1:] or self.labels.shape != shape[:1] or not whole \
                or not bool(self.centres.isfinite().all()) or not bool(((self.labels >= 0) & (self.labels < k)).all()):
            raise ValueError(f"bank clusters are {tuple(self.centres.shape)} with labels {tuple(self.labels.shape)}; need centres like the "
                             f"latents {tuple(shape)}, and the number of one for each latent")


@dataclass(frozen=True, eq=False)
class Bank:
    """Latents y_1 ... y_N of pictures. They can be decoded back into pictures: share a bank as you would share the pictures.

    Args:
        latents: (N, C, *spatial), finite, a tensor or `LazyLatents`; in the space in which `x` lives when the bank is used.
        names: one per latent, or none.
        metadata: strings that travel with the file.
        weights: (N,) relative weight pi_n of each item, or None for equal weights.
        clusters: an index by which a large bank is searched, or None.

    Raises:
        ValueError: no latent, a wrong shape, a value that is not finite, names, weights or clusters that do not go with the latents.
    """

    latents: torch.Tensor | LazyLatents
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
    def origin(self) -> list[int] | None:
        """Of a compressed bank: the number of the picture that each item stands for."""
        return json.loads(self.metadata["origin"]) if "origin" in self.metadata else None

    @property
    def names_of(self) -> dict[int, str]:
        """Names by the number of the picture."""
        return dict(zip(range(len(self)) if self.origin is None else self.origin, self.names))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the contents: each item's norm, its projection on one random direction, and its weight."""
        direction = _direction(self.latents.shape[1:].numel()).to(self.latents.device)
        count = max(1, BLOCK // direction.numel())
        along = [self.latents[i:i + count].flatten(1).to(direction.dtype) @ direction for i in range(0, len(self), count)]
        told = torch.stack([self.squared_norms.double(), torch.cat(along).double(), self.log_weights.double()])
        return hashlib.sha256(repr(tuple(self.latents.shape)).encode() + told.cpu().numpy().tobytes()).hexdigest()

    def recall(self, what: str, compute: Callable[[], float | list]) -> float | list:
        """The result of `compute()`, kept under the name `what` for all banks with the same contents; in this process only, since numbers
        that steer are not taken from a file that anybody may have written.
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
        """The same bank with weights and clusters on the device of its latents."""
        device = self.latents.device
        if (self.weights is None or self.weights.device == device) and (self.clusters is None or self.clusters.centres.device == device):
            return self
        return replace(self, weights=None if self.weights is None else self.weights.to(device),
                       clusters=self.clusters and replace(self.clusters, centres=self.clusters.centres.to(device)))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Bank":
        """The same bank with latents function((n, C, *spatial)), item by item: at once, or as they are read where they are `LazyLatents`.
        A function that is not affine must drop the clusters, whose centres go through it too.
        """
        latents = self.latents.map(function) if isinstance(self.latents, LazyLatents) else function(self.latents)
        clusters = self.clusters and replace(self.clusters, centres=function(self.clusters.centres.to(self.latents.device)))
        return replace(self, latents=latents, clusters=clusters)

    def sample(self, count: int) -> "Bank":
        """At most `count` of the items, evenly picked, in memory."""
        if len(self) <= count:
            return self.to() if isinstance(self.latents, LazyLatents) else self
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
        def normalise(latents):  # as F.normalize, which takes nine times as long
            wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
            return latents / wide.square().sum(1, keepdim=True).sqrt_().to(latents.dtype).clamp_min(1e-12)

        return replace(self, clusters=None).map(normalise)

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
