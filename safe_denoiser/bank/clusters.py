"""Clusters of a bank: fewer items that stand for many, and an index that finds the items near an x. Needs scikit-learn."""
import json
from dataclasses import replace

import torch
from torch import Tensor

from .bank import Bank, Clusters
from .lazy_latents import BLOCK

PROJECTED = 256  # numbers per item that k-means sees
MANY = 20_000  # items above which k-means sees them in batches


def _blocks(bank: Bank):
    """(start, flat block (n, D) in fp32 or better) over the whole bank."""
    dtype = torch.promote_types(bank.latents.dtype, torch.float32)
    count = max(1, 8 * BLOCK // (dtype.itemsize * bank.latents.shape[1:].numel()))
    for start in range(0, len(bank), count):
        yield start, bank.latents[start:start + count].flatten(1).to(dtype)


def labels_of(bank: Bank, k: int) -> Tensor:
    """Cluster of each item, (N,), of k: k-means on a projection to orthonormal random directions, which keeps distances
    (Johnson-Lindenstrauss). Deterministic.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
    except ImportError as error:
        raise ImportError("clusters of a bank need scikit-learn, which is not installed; run: pip install scikit-learn") from error
    size = bank.latents.shape[1:].numel()
    basis = None
    if size > PROJECTED:
        basis = torch.linalg.qr(torch.randn(size, PROJECTED, generator=torch.Generator().manual_seed(0)))[0]
    seen = torch.cat([(block.cpu() if basis is None else block.cpu().float() @ basis) for _, block in _blocks(bank)]).float().numpy()
    means = KMeans(k, n_init=1, random_state=0) if len(bank) <= MANY else MiniBatchKMeans(k, n_init=1, random_state=0, batch_size=4096)
    weights = None if bank.weights is None else bank.weights.cpu().double().numpy()
    return torch.from_numpy(means.fit_predict(seen, sample_weight=weights)).long()


def _centres(bank: Bank, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each cluster, (k, C, *spatial) in fp32 or better."""
    k, item = int(labels.max()) + 1, bank.latents.shape[1:]
    sums = torch.zeros(k, item.numel(), dtype=torch.promote_types(bank.latents.dtype, torch.float32))
    for start, block in _blocks(bank):
        part = slice(start, start + len(block))
        sums.index_add_(0, labels[part], block.cpu() * weights[part, None].to(block.dtype))
    return (sums / torch.zeros(k, dtype=sums.dtype).index_add_(0, labels, weights.to(sums.dtype))[:, None]).view(k, *item)


def compress_bank(bank: Bank, k: int) -> Bank:
    """A bank of at most k weighted prototypes: the k-means centres, each weighing as much as its members together.

    Names are those of the members nearest to each centre, and metadata `origin` holds their numbers (JSON), so that a report can
    still name a picture.

    Raises:
        ValueError: k below 1.
        ImportError: scikit-learn is not installed.
    """
    if k < 1:
        raise ValueError(f"k is {k}; a bank needs at least one prototype")
    if k >= len(bank):
        return bank
    labels, own = labels_of(bank, k), bank.log_weights.exp().cpu()
    labels = labels.unique(return_inverse=True)[1]  # k-means may leave a cluster empty
    centres = _centres(bank, labels, own)
    gaps = torch.cat([(block.cpu() - centres[labels[start:start + len(block)]].flatten(1)).square().sum(1)
                      for start, block in _blocks(bank)])
    nearest = [int(torch.where(labels == c, gaps, torch.inf).argmin()) for c in range(len(centres))]
    weights = torch.zeros(len(centres)).index_add_(0, labels, own.float()) * len(bank)
    names = tuple(bank.names[i] for i in nearest) if bank.names else ()
    return Bank(centres.to(bank.latents.dtype), names, {**bank.metadata, "origin": json.dumps(nearest)}, weights)


def index_bank(bank: Bank, k: int | None = None) -> Bank:
    """The same bank with clusters, by which `posterior` finds the items near an x without reading the others.

    Args:
        k: number of clusters; None is about 2 sqrt(N).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    labels = labels_of(bank, k or max(1, round(2 * len(bank) ** 0.5)))
    labels = labels.unique(return_inverse=True)[1]
    return replace(bank, clusters=Clusters(_centres(bank, labels, torch.ones(len(bank))), labels))
