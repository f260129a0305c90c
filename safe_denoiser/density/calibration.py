"""Calibration: scales that are measured on a bank's own items, so that nobody has to tune them."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import Bank
from ..telling import tell

DRAWS = 128
ROWS, PART = 256, 2**24  # of Gram matrices: items in a tile, and numbers of a bank between two looks at whether to go on


@dataclass(frozen=True)
class Calibration:
    """Curves over log sigma/alpha of the bank's own items, noised and evaluated leave-one-out (an item does not count for itself).

    Args:
        grid: log sigma/alpha, (G,), evenly spaced.
        level, spread: mean and standard deviation of log p_u(x), (G,).
        reach: median distance between the posterior means of the bank's two halves, (G,): how near E_u a prediction for an unsafe x lies.
        trace: mean |y - E_u(x)|^2, the posterior variance, (G,).
    """

    grid: Tensor
    level: Tensor
    spread: Tensor
    reach: Tensor
    trace: Tensor

    def tolist(self) -> list[list[float]]:
        """The curves as numbers."""
        return [curve.tolist() for curve in (self.grid, self.level, self.spread, self.reach, self.trace)]

    def at(self, sigma: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        """level, spread, reach and trace at each row's noise level, (B,) each, interpolated in log sigma/alpha."""
        place = ((sigma / alpha.clamp_min(1e-6)).log() - self.grid[0]) / (self.grid[1] - self.grid[0])
        place = place.clamp(0, len(self.grid) - 1.001)
        low, part = place.long(), place.frac()
        return tuple(torch.lerp(curve[low], curve[low + 1], part) for curve in (self.level, self.spread, self.reach, self.trace))


def _gram(y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """y y^T (N, N), of which only the part above the diagonal is computed, and eps y^T (DRAWS, N); told as it goes on."""
    gram, cross = y.new_zeros(len(y), len(y)), y.new_zeros(len(eps), len(y))
    parts = [*zip(*(one.split(max(1, PART // len(y)), 1) for one in (y, eps)))]
    for done, (columns, noise) in enumerate(parts, 1):
        for i in range(0, len(y), ROWS):
            gram[i:i + ROWS, i:].addmm_(columns[i:i + ROWS], columns[i:].T)
        cross.addmm_(noise, columns.T)
        tell(done, len(parts))
    return gram.triu() + gram.triu(1).T, cross


class _Noised:
    """DRAWS noised bank items x = y + s eps at any s, through Gram matrices: after three matmuls no vector of length D is touched."""

    def __init__(self, bank: Bank, root: Tensor | None = None):
        y = bank.latents.flatten(1).to(torch.promote_types(bank.latents.dtype, torch.float32))
        draws = torch.arange(DRAWS, device=y.device)
        self.items = draws % len(y) if len(y) < DRAWS else draws * len(y) // DRAWS
        eps = torch.randn(DRAWS, y.shape[1], generator=torch.Generator().manual_seed(0)).to(y)
        eps = eps if root is None else eps * root  # inside a mask, the noise is masked as the bank is
        (self.gram, self.cross), self.eps_norms = _gram(y, eps), eps.square().sum(1)
        self.own_norms, self.norms = self.gram.diagonal()[self.items], self.gram.diagonal()
        self.own_cross = self.cross.gather(1, self.items[:, None])[:, 0]
        self.own = self.items[:, None] == torch.arange(len(y), device=y.device)
        if len(y) == 1:  # nothing else is there to vouch for it
            self.own = torch.zeros_like(self.own)
        self.log_weights = bank.log_weights.to(y)

    def logits(self, s: float, h: float, t: float) -> Tensor:
        """Leave-one-out log pi_n - |x - y_n|^2 / (2 T (h^2 + s^2)), (DRAWS, N)."""
        x_norms = self.own_norms + 2 * s * self.own_cross + s * s * self.eps_norms
        d2 = x_norms[:, None] - 2 * (self.gram[self.items] + s * self.cross) + self.norms
        return (self.log_weights - d2.clamp_min(0) / (2 * t * (h * h + s * s))).masked_fill(self.own, -math.inf)

    def errors(self, w: Tensor, s: float, h: float) -> Tensor:
        """|y_i - E_u(x_i)|^2 for posterior weights w (DRAWS, N)."""
        off = ((w @ self.gram) * w).sum(1) - 2 * (w * self.gram[self.items]).sum(1) + self.own_norms
        along = (w * self.cross).sum(1) - self.own_cross
        return ((s**4 * off + 2 * s**3 * h**2 * along + h**4 * s**2 * self.eps_norms) / (h * h + s * s) ** 2).clamp_min(0)


def temperature_for(bank: Bank, bandwidth: float, perplexity: float, root: Tensor | None = None) -> float:
    """T at which the noised items' leave-one-out weights have this perplexity exp(entropy), at noise of the bank's own spread.

    Bisection in log T: the perplexity grows with T from 1 to N - 1. Ours.

    Args:
        bank: its latents already multiplied by `root`, (D,), where there is one.
        bandwidth: h. perplexity: the target, at least 1.
    """
    noised, inside = _Noised(bank, root), bank.latents.flatten(1).float()
    inside = inside if root is None else inside[:, root > 0]
    s = float(inside.std(correction=0)) if inside.numel() else 0.0  # where nothing is sampled
    low, high = -10.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        log_w = noised.logits(s, bandwidth, math.exp(middle)).log_softmax(1)
        found = torch.special.entr(log_w.exp()).sum(1).exp().mean()
        low, high = (middle, high) if found < perplexity else (low, middle)
    return math.exp(high)


def calibrate(bank: Bank, bandwidth: float, temperature: float, root: Tensor | None = None) -> Calibration:
    """The curves of a bank; deterministic, and cheap: its cost does not depend on the number of noise levels."""
    noised, n = _Noised(bank, root), len(bank)
    halves = torch.arange(n, device=bank.latents.device) % 2 == 0
    grid = torch.linspace(math.log(1e-2), math.log(1e3), 48)
    curves = []
    for s in grid.exp().tolist():
        logits = noised.logits(s, bandwidth, temperature)
        level = logits.logsumexp(1)
        parts = [logits.masked_fill(part, -math.inf).softmax(1).nan_to_num(0) for part in (halves, ~halves)]
        between = parts[0] - parts[1]
        reach = ((between @ noised.gram) * between).sum(1).clamp_min(0).sqrt() * s * s / (s * s + bandwidth**2)
        curves.append(torch.stack([level.mean(), level.std(correction=0).clamp_min(0.05), reach.median(),
                                   noised.errors(logits.softmax(1), s, bandwidth).mean()]))
    return Calibration(grid.to(curves[0]), *torch.stack(curves, 1))
