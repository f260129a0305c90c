"""Latents that stay in their file until they are indexed, and the norms of latents wherever they are."""
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

BLOCK = 2**22  # bytes read at once where a whole bank is read
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class LazyLatents:
    """Latents that stay in a safetensors file: shaped, measured and indexed like a tensor, but read when they are indexed.

    Args:
        path: a file that `save_bank` wrote.
        maps: functions (n, C, *spatial) -> (n, ...), item by item, applied in order to whatever is read.

    >>> LazyLatents(path)[:2].shape                                                           # doctest: +SKIP
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

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LazyLatents":
        return LazyLatents(self.path, (*self.maps, function))


def squared_norms_of(latents: "torch.Tensor | LazyLatents") -> torch.Tensor:
    """|y_n|^2 of latents (N, *shape), (N,), accumulated in fp32 or better, with no copy of the whole."""
    dtype, size = torch.promote_types(latents.dtype, torch.float32), max(1, latents.shape[1:].numel())
    count = max(1, BLOCK // (size * dtype.itemsize)) if latents.device.type == "cpu" else max(1, len(latents))
    norms = torch.empty(len(latents), dtype=dtype, device=latents.device)
    for i in range(0, len(latents), count):
        norms[i:i + count] = torch.linalg.vector_norm(latents[i:i + count].flatten(1), dim=1, dtype=dtype)
    return norms.square_()
