"""Kernel density of a bank under the forward process: the only code that reads the whole bank."""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CACHED, SENT = 2**22, 2**26  # bytes of a block: one that stays in a CPU's cache between its two uses, one that keeps a GPU busy
NEAR = 8  # items of a block whose distance is computed exactly
ROUNDING = 1e-5  # logits that rounding moves by less are left as they are


@dataclass(frozen=True)
class Posterior:
    """What a noisy x says about the bank.

    Args:
        mean: E[x0 | x] under the bank, shaped like x (B, *shape).
        log_density: log p(x) under the bank, (B,), up to a constant shared by banks of equal D, bandwidth and temperature.
        weights: P(item n | x), (B, N); rows sum to 1.
        omitted: sum of the weights of the items that `mean` leaves out, (B,), at most what was asked for.
    """

    mean: Tensor
    log_density: Tensor
    weights: Tensor
    omitted: Tensor


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


def blocks(latents, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A bank (N, *shape) as flat blocks (n, D) in the dtype and on the device of `like`, each with its place.

    What is already there on a GPU comes whole and uncopied. On a CPU a block is small enough to stay in the cache, so that using it
    twice reads memory once; what is stored in half precision, on another device or on disk is copied block by block.
    """
    size = like.element_size() * max(1, like.shape[-1])
    on_cpu, there = like.device.type == "cpu", (latents.device, latents.dtype) == (like.device, like.dtype)
    count = len(latents) if there and not on_cpu else max(1, (CACHED if on_cpu else SENT) // size)
    for start in range(0, len(latents), count):
        place = slice(start, min(start + count, len(latents)))
        yield place, latents[place].to(like.device, non_blocking=True).to(like.dtype).flatten(1)


def squared_norms_of(latents) -> Tensor:
    """|y_n|^2 of a bank (N, *shape), (N,), accumulated in fp32 or better."""
    like = torch.empty(0, latents.shape[1:].numel(), dtype=torch.promote_types(latents.dtype, torch.float32), device=latents.device)
    return torch.cat([torch.linalg.vector_norm(block, dim=1).square() for _, block in blocks(latents, like)])


class _Mixture:
    """Running softmax over the blocks of a bank: logits of all items, and the weighted sum of those that count.

    The distance is written d^2 = sigma^2 D + e: the noise's own share is common to all items and would drown their differences in
    rounding. e = sum_i (x_i^2 - sigma^2) + alpha^2 |y|^2 - 2 alpha x.y, by one matmul; where that rounds too much, item by item
    as sum_i ((x_i - alpha y_i)^2 - sigma^2).
    """

    def __init__(self, x: Tensor, sigma: Tensor, alpha: Tensor, gain: Tensor, log_weights: Tensor, squared_norms: Tensor, omit: float):
        self.x, self.alpha, self.noise, self.gain, self.log_weights = x, alpha, sigma.square(), gain, log_weights
        own = (x.square() - self.noise).sum(1, keepdim=True)
        self.logits = log_weights - gain * (own + alpha.square() * squared_norms)  # (B, N), but for the matmul
        self.top = x.new_full((len(x), 1), -torch.inf)  # largest logit so far
        self.total, self.sum = torch.zeros_like(self.top), torch.zeros_like(x)  # sums of exp(l - top) and exp(l - top) y
        if x.device.type == "cpu":
            largest = squared_norms.amax()
            reach = alpha.square() * largest + 2 * alpha * x.square().sum(1, keepdim=True).sqrt() * largest.sqrt()
            self.rounding = torch.finfo(x.dtype).eps * gain * reach
            self.careful = bool((self.rounding > ROUNDING).any())
            self.floor = torch.log(x.new_tensor(omit / squared_norms.numel())) - 2 * self.rounding  # such an item does not count

    def exact(self, items: Tensor, log_weights: Tensor) -> Tensor:
        """Logits of items (..., K, D), (B, K)."""
        gap = (self.alpha[:, :, None] * items).sub_(self.x[:, None]).square_()
        return log_weights - self.gain * gap.sub_(self.noise[:, :, None]).sum(2)

    def add(self, place: slice, block: Tensor) -> None:
        """One block. On a CPU only the rows that can count are read again; elsewhere all are, since looking would make the host wait."""
        part, prior = self.logits[:, place], self.log_weights[place]
        part.addcmul_(2 * self.gain * self.alpha, self.x @ block.T)
        self.top, before = torch.maximum(self.top, part.amax(1, keepdim=True)), self.top
        careful = block.device.type != "cpu" or self.careful
        if block.device.type == "cpu":
            index = (part > self.top + self.floor).any(0).nonzero()[:, 0]
            if not len(index):
                return
            if len(index) <= max(1, len(block) // 16):
                block, logits = block[index], self.exact(block[index], prior[index])
                part[:, index], part, careful = logits, logits, False
        if careful:
            near = part.topk(min(NEAR, len(block))).indices  # (B, K)
            part.scatter_(1, near, self.exact(block[near], prior[near]))
        self.top = torch.maximum(before, part.amax(1, keepdim=True))
        weights, fade = (part - self.top).exp(), (before - self.top).exp()
        self.total = self.total * fade + weights.sum(1, keepdim=True)
        self.sum.mul_(fade).addmm_(weights, block)


def posterior(x: Tensor, latents, sigma: float | Tensor, alpha: float | Tensor = 1.0, bandwidth: float = 0.0,
              temperature: float = 1.0, log_weights: Tensor | None = None, squared_norms: Tensor | None = None,
              omit: float = 1e-6) -> Posterior:
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
        latents: bank (N, *shape), or of any shape with as many numbers per item: a tensor, or `Stored`.
        sigma: noise scale, a number or (B,).
        alpha: signal scale, a number or (B,): 1 for EPS, V and EDM models, 1 - sigma for flow models.
        bandwidth: h, kernel width in the units of the latents.
        temperature: T; 1 is exact, more spreads the weights over more items (in high D, T = 1 picks one).
        log_weights: log pi_n, (N,); None is 1/N for each.
        squared_norms: |y_n|^2, (N,), when already known.
        omit: the mean may leave out items that weigh no more than this together; it does on a CPU, where it saves time.

    Raises:
        ValueError: x and the bank's items differ in size.
    """
    flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))  # (B, D)
    n, size = len(latents), latents.shape[1:].numel()
    if flat.shape[1] != size:
        raise ValueError(f"x is {tuple(x.shape[1:])} but bank latents are {tuple(latents.shape[1:])}; they must be of one size")
    sigma, alpha = rows(sigma, flat), rows(alpha, flat)
    s2 = (alpha.square() * bandwidth**2 + sigma.square()).clamp_min(1e-12)
    gain = (0.5 / temperature / s2).expand(len(flat), 1)
    norms = squared_norms_of(latents) if squared_norms is None else squared_norms
    prior = flat.new_full((n,), 1 / n).log() if log_weights is None else log_weights.to(flat)
    mixture = _Mixture(flat, sigma, alpha.expand_as(gain), gain, prior, norms.to(flat), omit)
    for place, block in blocks(latents, flat):
        mixture.add(place, block)
    log_density = mixture.logits.logsumexp(1, keepdim=True)
    weights = (mixture.logits - log_density).exp()
    kept = mixture.total * (mixture.top - log_density).exp()
    mean = (sigma.square() * (mixture.sum / mixture.total) + alpha * bandwidth**2 * flat) / s2
    log_density = log_density - gain * sigma.square() * size
    return Posterior(mean.view_as(x), log_density[:, 0], weights, (1 - kept[:, 0]).clamp_min(0))
