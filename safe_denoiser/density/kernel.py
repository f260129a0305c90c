"""Kernel density of a bank under the forward process: the only code that reads the whole bank."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import Clusters
from ..bank.lazy_latents import LazyLatents, squared_norms_of

CACHED, SENT = 6 * 2**20, 2**26  # bytes of a block: one that stays in a CPU's cache between its two uses, one that keeps a GPU busy
WHOLE = 2**26  # bytes of a bank that a CPU uses as one block: here the cost of a block outweighs what the cache saves
NEAR = 8  # items of a block whose distance is computed exactly
CAUTION = 8  # standard deviations by which an item may lie nearer to x than its cluster's centre says
ROUNDING = 1e-5  # logits that rounding moves by less are left as they are


@dataclass(frozen=True)
class Posterior:
    """What a noisy x says about the bank.

    Args:
        mean: E[x0 | x] under the bank, shaped like x (B, *shape).
        log_density: log p(x) under the bank, (B,), up to a constant shared by banks of equal D, bandwidth and temperature.
        weights: P(item n | x), (B, N); rows sum to 1, or to 1 + omitted.
    """

    mean: Tensor
    log_density: Tensor
    weights: Tensor

    @property
    def omitted(self) -> Tensor:
        """Sum of the weights of the items that `mean` leaves out, (B,), at most what was asked for."""
        return (self.weights.sum(1) - 1).clamp_min(0)


def rows(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a (B,) tensor as (B, 1) or (1, 1) in the dtype and on the device of `like`; a number waits for no device."""
    return value.to(like).reshape(-1, 1) if isinstance(value, Tensor) else like.new_full((1, 1), value)


def squared_distances(x: Tensor, latents: Tensor, alpha: Tensor, squared_norms: Tensor | None = None) -> Tensor:
    """|x - alpha y_n|^2 = |x|^2 - 2 alpha x.y_n + alpha^2 |y_n|^2 for flat x (B, D) and y (N, D): (B, N), one matmul.

    The nearest few, which carry the weight, are computed again as a sum of squares: the expansion loses small distances
    between large numbers.
    """
    norms = latents.square().sum(1) if squared_norms is None else squared_norms.to(x.dtype)
    d2 = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ latents.T) + alpha.square() * norms  # (B, N)
    near = d2.topk(min(NEAR, len(latents)), largest=False).indices  # (B, K)
    return d2.clamp_min(0).scatter(1, near, (x[:, None] - alpha[:, :, None] * latents[near]).square().sum(2))


def read(latents: Tensor | LazyLatents, start: int, stop: int, like: Tensor) -> Tensor:
    """Items start to stop of a bank, flat (n, D), in the dtype and on the device of `like`; what is so already is not copied."""
    return latents[start:stop].to(like.device, non_blocking=True).to(like.dtype).flatten(1)


def rows_per_block(latents: Tensor | LazyLatents, like: Tensor) -> tuple[int, int]:
    """How many rows (of D numbers in the dtype of `like`) to use at once: at least, and at most.

    On a CPU a block stays in the cache, so that using it twice reads memory once. A bank that lies ready is not copied, so that
    nothing but the cache limits a block; one in half precision, on another device or on disk is copied, and a block limits the copy.
    """
    on_cpu = like.device.type == "cpu"
    ready = isinstance(latents, Tensor) and (latents.device, latents.dtype) == (like.device, like.dtype)
    row = like.element_size() * max(1, like.shape[1])
    small = ready and (not on_cpu or len(latents) * row < WHOLE)
    least = len(latents) if small else max(1, (CACHED if on_cpu else SENT) // row)
    return least, (len(latents) if ready else least)


class _Mixture:
    """Running softmax over the blocks of a bank: logits of all items, and the weighted sum of those that count.

    The distance is written d^2 = sigma^2 D + e: the noise's own share is common to all items and would drown their differences in
    rounding. e = sum_i (x_i^2 - sigma^2) + alpha^2 |y|^2 - 2 alpha x.y, by one matmul; where that rounds too much, item by item
    as sum_i ((x_i - alpha y_i)^2 - sigma^2).
    """

    def __init__(self, x: Tensor, noise: Tensor, alpha: Tensor, gain: Tensor, log_weights: Tensor, squared_norms: Tensor, omit: float):
        self.x, self.noise, self.alpha, self.gain, self.log_weights = x, noise, alpha, gain, log_weights
        self.slope, self.on_cpu = 2 * gain * alpha, x.device.type == "cpu"
        own, lengths = x.square().sub_(noise).sum(1, keepdim=True), alpha.square() * squared_norms  # (B, 1), (B, N)
        self.logits = torch.addcmul(log_weights, gain, own + lengths, value=-1)  # (B, N), but for the matmul
        self.top = x.new_full((len(x), 1), -torch.inf)  # largest logit so far
        self.total = self.sum = None  # sums of exp(l - top) and exp(l - top) y
        if self.on_cpu:
            longest = lengths.amax(1, keepdim=True)
            reach = torch.add(own, noise, alpha=x.shape[1]).mul_(longest).abs_().sqrt_().mul_(2).add_(longest)  # 2 |x| |y| + |y|^2
            rounding = reach.mul_(gain).mul_(torch.finfo(x.dtype).eps)
            self.careful = float(rounding.amax()) > ROUNDING
            self.floor = math.log(omit / squared_norms.numel()) - 2 * rounding  # an item that far below the top does not count

    def exact(self, items: Tensor, log_weights: Tensor) -> Tensor:
        """Logits of items (..., K, D), (B, K)."""
        gap = (self.alpha[:, :, None] * items).sub_(self.x[:, None]).square_()
        return torch.addcmul(log_weights, self.gain, gap.sub_(self.noise[:, :, None]).sum(2), value=-1)

    def add(self, start: int, block: Tensor) -> bool:
        """One block; whether many of its rows count. On a CPU only rows that can count are used again; elsewhere all are, since
        looking would make the host wait.
        """
        part = self.logits.narrow(1, start, len(block)).addcmul_(self.slope, self.x @ block.T)
        prior, careful, many = self.log_weights.narrow(0, start, len(block)), not self.on_cpu or self.careful, True
        top = torch.maximum(self.top, part.amax(1, keepdim=True))
        if self.on_cpu:
            index = (part > top + self.floor).any(0).nonzero()[:, 0]
            if not len(index) and self.sum is not None:
                return False
            few = max(4, len(block) // (24 * (1 + len(part))))  # a copy for each x, and one: 4 % of the block
            many = not 0 < len(index) <= few  # none in the first block: x is not finite, and the mean will not be
        if not many:
            block, logits = block.index_select(0, index), part.index_select(1, index)
            if careful:
                logits = self.exact(block, prior.index_select(0, index))
                part.index_copy_(1, index, logits)
                top = torch.maximum(self.top, logits.amax(1, keepdim=True))
            part = logits
        elif careful:
            near = part.topk(min(NEAR, len(block))).indices  # (B, K)
            part.scatter_(1, near, self.exact(block[near], prior[near]))
            top = torch.maximum(self.top, part.amax(1, keepdim=True))
        weights = (part - top).exp_()
        if self.sum is None:
            self.total, self.sum = weights.sum(1, keepdim=True), weights @ block
        else:
            fade = (self.top - top).exp_()
            self.total, self.sum = weights.sum(1, keepdim=True).addcmul_(self.total, fade), self.sum.mul_(fade).addmm_(weights, block)
        self.top = top
        return many


class Picked:
    """Some items of a bank, read when they are sliced."""

    def __init__(self, latents: Tensor | LazyLatents, index: Tensor):
        self.latents, self.index, self.device, self.dtype = latents, index, latents.device, latents.dtype
        self.shape = torch.Size((len(index), *latents.shape[1:]))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: slice) -> Tensor:
        return self.latents[self.index[key]]


def candidates(mixture: _Mixture, search: Clusters, squared_norms: Tensor, omit: float) -> tuple[Tensor, Tensor]:
    """Numbers of the items whose clusters can weigh, (M,), and logits of all items with their centre in place of them in x.y, (B, N).

    An item's true x.y differs from its centre's by x.(y - c). Where y - c does not favour the direction of x, that is
    about |x| |y - c| / sqrt(D); a cluster is left out where even CAUTION times as much would leave it without weight.
    """
    x, centres, labels = mixture.x, search.centres.flatten(1).to(mixture.x), search.labels.to(mixture.x.device)
    guess = torch.addcmul(mixture.logits, mixture.slope, (x @ centres.T)[:, labels])
    best = x.new_full((len(x), len(centres)), -torch.inf).scatter_reduce_(1, labels.expand_as(guess), guess, "amax")
    lengths = torch.zeros(len(centres)).to(x).scatter_reduce_(0, labels, squared_norms.to(x), "mean", include_self=False)
    radius = (lengths - centres.square().sum(1)).clamp_min(0).sqrt()  # root mean square of |y - c|
    slack = CAUTION * mixture.slope * torch.linalg.vector_norm(x, dim=1, keepdim=True) * radius / x.shape[1] ** 0.5
    likely = (best + slack > (best - slack).amax(1, keepdim=True) + math.log(omit / len(labels))).any(0)
    return likely[labels].nonzero()[:, 0].to(search.labels.device), guess


def posterior(x: Tensor, latents: Tensor | LazyLatents, sigma: float | Tensor, alpha: float | Tensor = 1.0, bandwidth: float = 0.0,
              temperature: float = 1.0, log_weights: Tensor | None = None, squared_norms: Tensor | None = None,
              omit: float = 1e-12, search: Clusters | None = None) -> Posterior:
    """Posterior mean, weights and density of a bank, each item blurred by a Gaussian kernel.

        s^2   = alpha^2 h^2 + sigma^2
        l_n   = log pi_n - |x - alpha y_n|^2 / (2 T s^2)
        w     = softmax(l),  ybar = sum_n w_n y_n,  log p(x) = logsumexp(l)
        mean  = (sigma^2 ybar + alpha h^2 x) / s^2

    Source: arXiv:2502.08011, Eq. 6 (h = 0, T = 1); the bandwidth h and temperature T are ours.

    The bank is read once, in blocks (online softmax), and no temporary grows with N x D: it may be on another device, in half
    precision, or on disk. Single precision or better throughout.

    Args:
        x: noisy latents (B, *shape), `x = alpha x0 + sigma eps`.
        latents: bank (N, *shape), or of any shape with as many numbers per item: a tensor, or `LazyLatents`.
        sigma: noise scale, a number or (B,).
        alpha: signal scale, a number or (B,): 1 for EPS, V and EDM models, 1 - sigma for flow models.
        bandwidth: h, kernel width in the units of the latents.
        temperature: T; 1 is exact, more spreads the weights over more items (in high D, T = 1 picks one).
        log_weights: log pi_n, (N,); None is 1/N for each.
        squared_norms: |y_n|^2, (N,), when already known.
        omit: the mean may leave out items that weigh no more than this together; it does so on a CPU, where that saves time.
        search: clusters of the bank, see `index_bank`: where the bank is not on a GPU, only the clusters that can weigh are read. What
            the others weigh is estimated from their centres.

    Raises:
        ValueError: x and the bank's items differ in size.
    """
    flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))  # (B, D)
    n, size = len(latents), latents.shape[1:].numel()
    if flat.shape[1] != size:
        raise ValueError(f"x is {tuple(x.shape[1:])} but bank latents are {tuple(latents.shape[1:])}; they must be of one size")
    noise, alpha = rows(sigma, flat).square(), rows(alpha, flat).expand(len(flat), 1)
    s2 = (alpha.square() * bandwidth**2 + noise).clamp_min(1e-12)
    gain, of_bank, of_x = 0.5 / temperature / s2, noise / s2, alpha * bandwidth**2 / s2
    common = gain * noise * size
    norms = squared_norms_of(latents) if squared_norms is None else squared_norms
    prior = flat.new_full((n,), 1 / n).log() if log_weights is None else log_weights.to(flat)
    mixture = _Mixture(flat, noise, alpha, gain, prior, norms.to(flat), omit)
    if search is not None and latents.device.type == "cpu":
        index, guess = candidates(mixture, search, norms, omit)
        if 0 < 2 * len(index) < n:  # none, where x is not finite, and the mean will not be
            found = posterior(x, Picked(latents, index), noise.sqrt(), alpha, bandwidth, temperature, prior[index], norms[index], omit)
            weights = (guess - (found.log_density[:, None] + common)).exp_().index_copy_(1, index.to(flat.device), found.weights)
            return Posterior(found.mean, found.log_density, weights)
    least, most = rows_per_block(latents, flat)
    start, count = 0, least
    while start < n:
        many = mixture.add(start, read(latents, start, start + count, flat))
        start, count = start + count, least if many else most  # rows that are used once need no cache
    log_density = mixture.top + mixture.total.log()  # of the items that were kept
    weights = (mixture.logits - log_density).exp_()
    mean = mixture.sum.mul_(of_bank / mixture.total).addcmul_(flat, of_x)
    return Posterior(mean.view_as(x), (log_density - common)[:, 0], weights)
