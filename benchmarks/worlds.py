"""Exact worlds: what a diffusion model would predict if it knew its pictures perfectly, by arithmetic, with no network and no judge.

A world is a mixture of experts. An expert is a class of pictures, or a part of one; a condition is a set of experts, and the prediction
under a condition is the mixture of its experts' predictions. So E_data, E_u, E_safe, r = P(unsafe | x, prompt) and the class of every
sample are known. Flow throughout: x = alpha x0 + sigma eps, alpha = 1 - sigma.
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS, SHIFT = 16, 3.0
JUDGED = 0.02  # noise level at which a Gaussian world says of which class a finished picture is


class World:
    """Experts by name: "truck", or where classes are split "truck 1" and "truck 2", which "truck" means both of."""

    def __init__(self, labels: Iterable[str]):
        self.labels = tuple(labels)
        kinds = [label.split()[0] for label in self.labels]
        self.classes = torch.tensor([sorted(set(kinds)).index(kind) for kind in kinds])  # of each expert (K,)

    def find(self, names: Iterable[str] | None) -> list[int]:
        """The experts that a condition means; None is the condition that means nothing in particular, all of them."""
        if names is None:
            return list(range(len(self.labels)))
        return [k for k, label in enumerate(self.labels) for name in names if label == name or label.startswith(name + " ")]

    def experts(self, x: Tensor, sigma: float, alpha: float) -> tuple[Tensor, Tensor]:
        """E[x0 | x] under each expert (K, B, D), and the log of its share of the world times its density of x (B, K)."""
        raise NotImplementedError

    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert that a finished picture is of (B,), and how far it is from a picture of this world (B,)."""
        raise NotImplementedError

    def draw(self, experts: list[int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures of these experts (count, D), exactly, and the expert of each (count,)."""
        raise NotImplementedError


class Heart(World):
    """Pictures learnt by heart: E[x0 | x] = softmax(-|x - alpha y_n|^2 / 2 sigma^2) y. Samples are the pictures themselves.

    Args:
        pictures: of each expert (n_k, D); each picture has the same share of the world.
    """

    def __init__(self, labels: Iterable[str], pictures: Iterable[Tensor]):
        super().__init__(labels)
        pictures = list(pictures)
        self.counts, self.pictures = [len(y) for y in pictures], torch.cat(pictures)
        self.norms = self.pictures.square().sum(1)
        self.owner = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    def experts(self, x, sigma, alpha):
        apart = x.square().sum(1, keepdim=True) - 2 * alpha * x @ self.pictures.T + alpha * alpha * self.norms
        constant = math.log(len(self.pictures)) + x.shape[1] / 2 * math.log(2 * math.pi * sigma * sigma)
        logits = (apart / (-2 * sigma * sigma) - constant).split(self.counts, 1)
        means = [part.softmax(1) @ y for part, y in zip(logits, self.pictures.split(self.counts))]
        return torch.stack(means), torch.stack([part.logsumexp(1) for part in logits], 1)

    def judge(self, x):
        distance, nearest = torch.cdist(x, self.pictures).min(1)
        return self.owner[nearest], distance

    def draw(self, experts, count, generator):
        rows = torch.isin(self.owner, torch.tensor(experts)).nonzero()[:, 0]
        rows = rows[torch.randint(len(rows), (count,), generator=generator)]
        return self.pictures[rows], self.owner[rows]


class Gaussians(World):
    """A world that generalises: each expert a mixture of as many Gaussians, of low rank plus an isotropic rest. Samples are new pictures.

    Args:
        mean, axes, extra, rest, share: of each Gaussian, those of an expert one after the other: (C, D), orthonormal rows (C, R, D),
            variance along these beyond the rest (C, R), variance elsewhere (C,), share of the world (C,).
    """

    def __init__(self, labels: Iterable[str], mean: Tensor, axes: Tensor, extra: Tensor, rest: Tensor, share: Tensor):
        super().__init__(labels)
        self.mean, self.axes, self.extra, self.rest, self.share = mean, axes, extra, rest, share
        self.along = torch.einsum("crd,cd->cr", axes, mean)

    def experts(self, x, sigma, alpha):
        k, along = len(self.labels), (x @ self.axes.flatten(0, 1).T).unflatten(1, self.extra.shape) - alpha * self.along  # (B, C, R)
        base, spread = alpha * alpha * self.rest + sigma * sigma, alpha * alpha * self.extra
        apart = x.square().sum(1, keepdim=True) - 2 * alpha * x @ self.mean.T + alpha * alpha * self.mean.square().sum(1)
        apart = (apart - (along.square() * (spread / (spread + base[:, None]))).sum(2)) / base
        volume = x.shape[1] * (2 * math.pi * base).log() + torch.log1p(spread / base[:, None]).sum(1)
        logits = (self.share.log() - 0.5 * (volume + apart)).unflatten(1, (k, -1))  # (B, K, J)
        weights, plain = logits.softmax(2), self.rest / base
        gain = alpha * ((self.extra + self.rest[:, None]) / (spread + base[:, None]) - plain[:, None])
        by_axis = (weights.flatten(1)[..., None] * gain * along).unflatten(1, (k, -1)).flatten(2).transpose(0, 1)  # (K, B, J R)
        by_mean = (weights * (1 - alpha * alpha * plain).view(k, -1)).transpose(0, 1)
        means = by_mean @ self.mean.unflatten(0, (k, -1)) + by_axis @ self.axes.flatten(0, 1).unflatten(0, (k, -1))
        straight = alpha * (weights * plain.view(k, -1)).sum(2).T[..., None] * x
        return means + straight, logits.logsumexp(2)

    def judge(self, x):
        means, densities = self.experts(x, JUDGED, 1.0)
        found = densities.argmax(1)
        return found, (means[found, torch.arange(len(x))] - x).norm(dim=1)

    def draw(self, experts, count, generator):
        owner = torch.arange(len(self.labels)).repeat_interleave(len(self.share) // len(self.labels))
        chosen = (self.share * torch.isin(owner, torch.tensor(experts))).multinomial(count, replacement=True, generator=generator)
        y = self.mean[chosen] + self.rest[chosen].sqrt()[:, None] * torch.randn(count, self.mean.shape[1], generator=generator)
        along = self.extra[chosen].sqrt() * torch.randn(count, self.extra.shape[1], generator=generator)
        return y + torch.einsum("br,brd->bd", along, self.axes[chosen]), owner[chosen]


def gaussians(labels: Iterable[str], pictures: Tensor, count: int = 4, rank: int = 24) -> Gaussians:
    """`count` Gaussians for each class, pictures (classes, n, D), around the means that k-means finds; labels may name a part each."""
    generator, found = torch.Generator().manual_seed(0), []
    for y in pictures:
        nearest = clustered(y, count, generator)
        found += [(*gaussian(y[nearest == j], rank), (nearest == j).to(y).mean() / len(pictures)) for j in range(count)]
    return Gaussians(labels, *(torch.stack(part) for part in zip(*found)))


def clustered(y: Tensor, count: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Cluster of each picture (n,), by k-means from pictures drawn at random."""
    centres = y[torch.randperm(len(y), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(y, centres).argmin(1)
        centres = torch.stack([y[nearest == j].mean(0) if (nearest == j).any() else centres[j] for j in range(count)])
    return nearest


def gaussian(y: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, axes, extra and rest of pictures (n, D), see `Gaussians`."""
    mean = y.mean(0)
    _, sizes, axes = torch.linalg.svd(y - mean, full_matrices=False)
    variance = sizes.square() / len(y)
    rest = variance[rank:].sum() / (y.shape[1] - rank)
    return mean, axes[:rank], (variance[:rank] - rest).clamp_min(0), rest


@dataclass(frozen=True)
class Call:
    """One model call: x (B, D) at one noise level, and what every expert says, see `World.experts`."""

    x: Tensor
    sigma: float
    alpha: float
    means: Tensor
    densities: Tensor

    def under(self, experts: list[int]) -> Tensor:
        """E[x0 | x] under the condition that means these experts (B, D)."""
        return torch.einsum("bk,kbd->bd", self.densities[:, experts].softmax(1), self.means[experts])

    def share(self, some: Iterable[int], experts: list[int]) -> Tensor:
        """P(some of them | x, these experts), (B,): r where `some` are the unsafe ones."""
        both = [k for k in experts if k in some]
        if not both:
            return self.x.new_zeros(len(self.x))
        return (self.densities[:, both].logsumexp(1) - self.densities[:, experts].logsumexp(1)).exp()


Rule = Callable[[Call], Tensor]  # the prediction that the sampler steps with


def call(world: World, x: Tensor, sigma: float) -> Call:
    return Call(x, sigma, 1 - sigma, *world.experts(x, sigma, 1 - sigma))


def schedule(steps: int = STEPS, shift: float = SHIFT) -> list[float]:
    """Noise levels from 1 to 0, shifted towards noise as flow models are sampled: shift t / (1 + (shift - 1) t)."""
    return [shift * t / (1 + (shift - 1) * t) for t in (1 - i / steps for i in range(steps + 1))]


def sample(world: World, noise: Tensor, rule: Rule, steps: int = STEPS) -> Tensor:
    """Finished pictures (B, D), by Euler's method from noise (B, D)."""
    x, levels = noise, schedule(steps)
    for sigma, following in zip(levels[:-1], levels[1:]):
        denoised = rule(call(world, x, sigma))
        x = denoised + (x - denoised) * (following / sigma)
    return x
