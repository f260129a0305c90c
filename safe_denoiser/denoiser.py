"""SafeDenoiser: corrects each prediction of a diffusion model away from a bank.

Everything here is a function of three tensors: `x` (noisy latent), `sigma` (B,) and `denoised` (the model's E[x0 | x]).
The correction is affine in `denoised`, so it equals the same correction of eps, v or the score.
"""
import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import Bank
from .kernel import Posterior, posterior, rows, squared_distances

METHODS = ("safe_denoiser", "spell", "official", "official_sd3")
WEIGHTS = ("auto", "evidence", "retain", "gate")


@dataclass(frozen=True)
class Step:
    """What the safe denoiser did in one model call; one entry per picture (per frame, where a picture bank meets a video).

    Args:
        sigma: noise level (B,).
        active: inside the window, with a finite prediction (B,), bool.
        posterior: r = P(unsafe | x), or the method's own gate in [0, 1] (B,).
        correction: |safe_denoised - denoised| / |denoised| (B,).
        nearest: index of the bank item that weighs most (B,).
        clamped: r hit its ceiling (B,), bool.
        fallback: the prediction or its correction was not finite, so the prediction was returned unchanged (B,), bool.
    """

    sigma: Tensor
    active: Tensor
    posterior: Tensor
    correction: Tensor
    nearest: Tensor
    clamped: Tensor
    fallback: Tensor


@dataclass(frozen=True)
class Correction:
    """A method's answer: `direction` to add to denoised (B, D), and what the report wants to know of it, (B,) each."""

    direction: Tensor
    posterior: Tensor
    nearest: Tensor
    clamped: Tensor


def log_ratio(unsafe: Posterior, other: Posterior, prior: float) -> Tensor:
    """log prior + log p_u(x) - log p_other(x), (B,): log r where `other` is the whole (reference), arXiv:2502.08011, Thm 3.2."""
    return math.log(prior) + unsafe.log_density - other.log_density


def projection(denoised: Tensor, unsafe_denoised: Tensor, other_denoised: Tensor) -> Tensor:
    """t = <denoised - E_other, E_u - E_other> / |E_u - E_other|^2, (B,): 0 at the other mean, 1 at the unsafe mean."""
    axis = unsafe_denoised - other_denoised
    return ((denoised - other_denoised) * axis).sum(1) / axis.square().sum(1).clamp_min(1e-12)


def from_reference(unsafe_denoised: Tensor, reference_denoised: Tensor, r: Tensor) -> Tensor:
    """r / (1 - r) (E_ref - E_u): equals E_safe - E_data by arXiv:2502.08011, Thm 3.2, since E_ref = (1 - r) E_safe + r E_u."""
    return (r / (1 - r))[:, None] * (reference_denoised - unsafe_denoised)


def from_retain(unsafe_denoised: Tensor, retain_denoised: Tensor, r: Tensor) -> Tensor:
    """r (E_retain - E_u): equals E_safe - E_data by arXiv:2502.08011, Thm 3.2, since E_data = (1 - r) E_retain + r E_u."""
    return r[:, None] * (retain_denoised - unsafe_denoised)


def spell(denoised: Tensor, latents: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """SPELL: sum_n relu(radius / |denoised - y_n| - 1) (denoised - y_n). Source: arXiv:2410.06025, Eq. 8.

    Args:
        denoised: (B, D); latents: (N, D); radius: of each shield, latent L2.

    Returns:
        direction (B, D) and each item's factor (B, N).
    """
    distance = squared_distances(denoised, latents, rows(1.0, denoised)).sqrt().clamp_min(1e-12)
    factor = F.relu(radius / distance - 1)
    return factor.sum(1, keepdim=True) * denoised - factor @ latents, factor


def typicality(unsafe: Posterior, sigma: Tensor, alpha: Tensor, grid: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """How ordinary x looks among noised bank items, (B,): 1 at or above their mean log density, else the two-sided normal tail.

    The mean and spread, (G,), are interpolated at log sigma/alpha between the points of `grid` (G,).
    """
    place = ((sigma / alpha.clamp_min(1e-6)).log() - grid[0]) / (grid[1] - grid[0])
    place = place.clamp(0, len(grid) - 1.001)
    low, part = place.long(), place.frac()
    mean, spread = (torch.lerp(curve[low], curve[low + 1], part) for curve in (mean, spread))
    return torch.erfc((mean - unsafe.log_density).clamp_min(0) / spread / math.sqrt(2))


def official(denoised: Tensor, latents: Tensor, bandwidth: float, threshold: float, query: Tensor) -> tuple[Tensor, Tensor]:
    """The published code's rule: k_n = exp(-|query - y_n| / (2 bandwidth^2)); minus the weighted mean where the gate opens.

    Source: the authors' implementation of arXiv:2502.08011, restated. Un-squared distance, no beta, no gain on `denoised`.

    Args:
        denoised: (B, D); latents: (N, D), normalised per location; threshold: the gate opens where sum_n k_n + 1e-8 exceeds it.
        query: where the distance is measured (B, D): `denoised`, or in the SD3 variant `denoised` normalised per location.

    Returns:
        direction (B, D), zero where the gate is shut, and the kernel values (B, N).
    """
    kernel = (-squared_distances(query, latents, rows(1.0, query)).sqrt() / (2 * bandwidth**2)).exp()
    total = kernel.sum(1, keepdim=True) + 1e-8
    return torch.where(total > threshold, -(kernel @ latents) / total, 0.0), kernel


@dataclass(frozen=True, eq=False)
class SafeDenoiser:
    """Steers predictions away from `bank`: `safe_denoised = denoised + strength * correction` inside the sigma window.

    With a reference bank (`weight="evidence"`, the recommended default)

        log r = log prior + log p_u(x) - log p_ref(x) + evidence (t - 1/2),   r <= posterior_max
        t     = <denoised - E_ref, E_u - E_ref> / |E_u - E_ref|^2
        safe_denoised = denoised + strength r / (1 - r) (E_ref - E_u)

    with a retain bank (`weight="retain"`)

        r = sigmoid(logit(prior) + log p_u(x) - log p_retain(x))
        safe_denoised = denoised + strength r (E_retain - E_u)

    and with neither (`weight="gate"`) a push away from E_u that opens where x looks like a noised bank item.
    Source: arXiv:2502.08011, Thm 3.2. The evidence term is ours, not the theorem's; with `evidence=0` and exact densities the
    first two forms are exact. With both banks r may exceed neither estimate.

    Args:
        bank: what must not come out; latents (N, C, *spatial), in the space of `x`.
        method: "safe_denoiser", "spell", "official" or "official_sd3"; the official ones normalise the bank themselves.
        weight: "auto", "evidence", "retain" or "gate"; "auto" takes the first for which the banks are there.
        retain: pictures to keep.
        reference: the model's own samples.
        strength: 1 as derived, 0 off, bit for bit.
        sigma_start, sigma_end: active where sigma_end < sigma <= sigma_start.
        prior: P(unsafe) among the model's own samples, in (0, 1).
        evidence: how much the prediction itself counts; 0 ignores it.
        bandwidth: kernel width h; None is 0.4 standard deviations of the bank (3.15 for "official").
        temperature: T; None is D / 32, at least 1.
        posterior_max: ceiling of r, below 1.
        radius: SPELL's shield radius, latent L2; None is the median distance of a bank item to its nearest neighbour.
        threshold: gate of "official".
        root: square root of the mask (D,) inside which alone the banks count; set by `masked`.

    Raises:
        ValueError: an unknown method or weight, a missing bank, banks of different shapes, a number out of range.
    """

    bank: Bank
    method: str = "safe_denoiser"
    weight: str = "auto"
    retain: Bank | None = None
    reference: Bank | None = None
    strength: float = 1.0
    sigma_start: float = math.inf
    sigma_end: float = 0.0
    prior: float = 0.3
    evidence: float = 2.0
    bandwidth: float | None = None
    temperature: float | None = None
    posterior_max: float = 0.95
    radius: float | None = None
    threshold: float = 1e-9
    root: Tensor | None = None
    _kept: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight is {self.weight!r}; choose one of {', '.join(WEIGHTS)}")
        for weight, bank, name in (("evidence", self.reference, "reference"), ("retain", self.retain, "retain")):
            if self.weight == weight and bank is None:
                raise ValueError(f"weight {weight!r} needs a {name} bank; connect one or choose weight 'auto'")
            if bank is not None and bank.latents.shape[1:] != self.bank.latents.shape[1:]:
                raise ValueError(f"{name} bank latents are {tuple(bank.latents.shape[1:])} but the negation bank's are "
                                 f"{tuple(self.bank.latents.shape[1:])}; build both with the same VAE at the same size")
        if not 0 < self.prior < 1 or not 0 < self.posterior_max < 1:
            raise ValueError(f"prior is {self.prior} and posterior_max is {self.posterior_max}; both lie between 0 and 1")

    @cached_property
    def chosen_weight(self) -> str:
        """The weight that "auto" stands for."""
        if self.weight != "auto":
            return self.weight
        return "evidence" if self.reference is not None else "retain" if self.retain is not None else "gate"

    @cached_property
    def latents(self) -> Tensor:
        """The bank as the chosen method reads it, flat (N, D) in fp32 or better."""
        bank = self.bank.normalised() if self.method.startswith("official") and self.root is None else self.bank
        return bank.latents.flatten(1).to(torch.promote_types(bank.latents.dtype, torch.float32))

    @cached_property
    def kernel_bandwidth(self) -> float:
        """h: as given, else 0.4 standard deviations of the bank; the published settings for the official methods."""
        if self.bandwidth is not None:
            return self.bandwidth
        return {"official": 3.15, "official_sd3": 1.0}.get(self.method) or 0.4 * float(self.latents.std(correction=0))

    @cached_property
    def kernel_temperature(self) -> float:
        """T: as given, else D / 32, which spreads the weights alike at every latent size; D counts what is inside the mask."""
        if self.temperature is not None:
            return self.temperature
        return max(1.0, (self.latents.shape[1] if self.root is None else float(self.root.square().sum())) / 32)

    @cached_property
    def shield_radius(self) -> float:
        """SPELL's radius: as given, else the median distance of a bank item to its nearest neighbour (to 0, for a single item)."""
        if self.radius is not None:
            return self.radius
        if len(self.latents) == 1:
            return float(self.latents.norm())
        distances = squared_distances(self.latents, self.latents, rows(1.0, self.latents))
        return float(distances.fill_diagonal_(math.inf).amin(1).sqrt().median())

    @cached_property
    def typical(self) -> tuple[Tensor, Tensor, Tensor]:
        """Calibration of the gate: log sigma/alpha (G,), and mean and spread (G,) of log p_u at the bank's own noised items.

        Leave-one-out: an item does not vouch for itself, unless it is the only one. Deterministic, 128 draws.
        """
        y = self.latents
        draws = torch.arange(128, device=y.device)
        items = draws % len(y) if len(y) < 128 else draws * len(y) // 128
        own = items[:, None] == torch.arange(len(y), device=y.device)
        eps = torch.randn(128, y.shape[1], generator=torch.Generator().manual_seed(0)).to(y)
        eps = eps if self.root is None else eps * self.root
        grid = torch.linspace(math.log(1e-2), math.log(1e3), 32)
        means, spreads = [], []
        for scale in grid.exp().tolist():
            d2 = squared_distances(y[items] + scale * eps, y, rows(1.0, y))
            logits = self.bank.log_weights - d2 / (2 * self.kernel_temperature * (self.kernel_bandwidth**2 + scale**2))
            level = (logits if len(y) == 1 else logits.masked_fill(own, -math.inf)).logsumexp(1)
            means.append(level.mean())
            spreads.append(level.std(correction=0).clamp_min(0.05))
        return grid.to(y), torch.stack(means), torch.stack(spreads)

    def density(self, bank: Bank, x: Tensor, sigma: Tensor, alpha: Tensor) -> Posterior:
        """Posterior of one bank at x, with the bandwidth and temperature that all banks share."""
        return posterior(x, bank.latents, sigma, alpha, self.kernel_bandwidth, self.kernel_temperature,
                         bank.log_weights, bank.squared_norms)

    def correct(self, x: Tensor, denoised: Tensor, sigma: Tensor, alpha: Tensor) -> Correction:
        """The correction at strength 1 for flat x, denoised (B, D) and sigma, alpha (B,)."""
        never = torch.zeros_like(sigma, dtype=torch.bool)
        if self.method == "spell":
            direction, factor = spell(denoised, self.latents, self.shield_radius)
            return Correction(direction, factor.sum(1).clamp_max(1), factor.argmax(1), never)
        if self.method != "safe_denoiser":
            direction, kernel = official(denoised, self.latents, self.kernel_bandwidth, self.threshold,
                                         self._per_location(denoised) if self.method == "official_sd3" else denoised)
            return Correction(direction, (kernel.sum(1) + 1e-8 > self.threshold).to(x.dtype), kernel.argmax(1), never)
        unsafe = self.density(self.bank, x, sigma, alpha)
        nearest = unsafe.weights.argmax(1)
        if self.chosen_weight == "gate":
            r = typicality(unsafe, sigma, alpha, *self.typical)
            return Correction(r[:, None] * (denoised - unsafe.mean), r, nearest, never)
        retain = self.retain and self.density(self.retain, x, sigma, alpha)
        kept = retain and F.logsigmoid(log_ratio(unsafe, retain, self.prior / (1 - self.prior)))
        if self.chosen_weight == "retain":
            return Correction(from_retain(unsafe.mean, retain.mean, kept.exp()), kept.exp(), nearest, never)
        reference = self.density(self.reference, x, sigma, alpha)
        log_r = log_ratio(unsafe, reference, self.prior)
        log_r = log_r if retain is None else torch.minimum(log_r, kept)
        log_r = log_r + self.evidence * (projection(denoised, unsafe.mean, reference.mean) - 0.5)
        ceiling = math.log(self.posterior_max)
        r = log_r.clamp_max(ceiling).exp()
        return Correction(from_reference(unsafe.mean, reference.mean, r), r, nearest, log_r > ceiling)

    def _per_location(self, flat: Tensor) -> Tensor:
        """Each location of flat latents (B, D) at unit norm over the channels."""
        unit = F.normalize(flat.unflatten(1, self.bank.latents.shape[1:]), dim=1).flatten(1)
        return unit if self.root is None else unit * self.root

    def masked(self, mask: Tensor) -> "SafeDenoiser":
        """The same safe denoiser inside a mask m (D,) in [0, 1]: every |x - y|^2 becomes sum m (x - y)^2.

        With root = sqrt(m) that is |root x - root y|^2, so each method works unchanged on inputs and banks multiplied by root. The
        kernel keeps the bandwidth of the whole bank, which is a length per element.
        """
        root = mask.to(self.latents.dtype).sqrt()
        bank = self.bank.normalised() if self.method.startswith("official") else self.bank
        return replace(self, bank=bank.masked(root), retain=self.retain and self.retain.masked(root),
                       reference=self.reference and self.reference.masked(root), bandwidth=self.kernel_bandwidth, root=root)

    def correct_inside(self, mask: Tensor, x: Tensor, denoised: Tensor, sigma: Tensor, alpha: Tensor) -> Correction:
        """`correct`, each row with distances inside its own mask (B, D) and no correction where the mask is 0.

        Rows of one mask go together, so that the bank is read in one matmul per mask. Where the mask is between 0 and 1 the
        correction is whole: the sampler's own blend, denoised m + latent (1 - m), weighs it by m.
        """
        if self._kept.get("mask") is None or not torch.equal(self._kept["mask"], mask):
            kinds, kind = mask.unique(dim=0, return_inverse=True)
            self._kept.update(mask=mask, parts=[((kind == k).nonzero()[:, 0], self.masked(m)) for k, m in enumerate(kinds)])
        parts = []
        for index, inside in self._kept["parts"]:
            part = inside.correct(x[index] * inside.root, denoised[index] * inside.root, sigma[index], alpha[index])
            whole = torch.where(inside.root > 0, part.direction / inside.root, 0)
            parts.append((whole, part.posterior, part.nearest, part.clamped))
        order = torch.cat([index for index, _ in self._kept["parts"]]).argsort()
        return Correction(*(torch.cat(values)[order] for values in zip(*parts)))

    @torch.no_grad()
    def safe(self, x: Tensor, denoised: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0,
             mask: Tensor | None = None) -> tuple[Tensor, Step | None]:
        """Correct one prediction.

        Args:
            x: noisy latents (B, *shape), `x = alpha x0 + sigma eps`; a bank of pictures (C, H, W) meets a video (B, C, T, H, W)
                frame by frame.
            denoised: the model's E[x0 | x], shaped like x.
            sigma: noise scale, a number or (B,).
            alpha: signal scale, a number or (B,); 1 for EPS, V and EDM models, 1 - sigma for flow models.
            mask: what is sampled, 1, and what is given, 0 (inpainting); broadcasts to x. None: all is sampled.

        Returns:
            safe_denoised in the shape and dtype of `denoised`, and the Step (None when strength is 0, where `denoised` itself
            comes back). Rows outside the window, and rows that are not finite, come back bit for bit.

        Raises:
            ValueError: x is of another size than the bank's latents.
        """
        if self.strength == 0:
            return denoised, None
        frames, restore = self._frames(x)
        dtype = torch.promote_types(frames.dtype, torch.float32)
        flat, predicted = frames.flatten(1).to(dtype), self._frames(denoised)[0].flatten(1).to(dtype)  # (B, D)
        repeats = len(flat) // len(x)
        sigma, alpha = (rows(value, flat)[:, 0].expand(len(x)).repeat_interleave(repeats) for value in (sigma, alpha))
        inside = (sigma > self.sigma_end) & (sigma <= self.sigma_start)
        if mask is None:
            correction = self.correct(flat, predicted, sigma, alpha)
        else:
            within = self._frames(mask.expand_as(x))[0].flatten(1).to(dtype)
            correction = self.correct_inside(within, flat, predicted, sigma, alpha)
        corrected = predicted + self.strength * correction.direction
        finite = torch.isfinite(corrected).all(1)
        active = inside & finite
        size = (corrected - predicted).norm(dim=1) / predicted.norm(dim=1).clamp_min(1e-12)
        step = Step(sigma, active, *(torch.where(active, value, 0) for value in (correction.posterior, size, correction.nearest)),
                    clamped=active & correction.clamped, fallback=inside & ~finite)
        keep = active.view(-1, *[1] * (frames.ndim - 1))
        chosen = torch.where(keep, corrected.view_as(frames).to(denoised.dtype), self._frames(denoised)[0])
        return restore(chosen), step

    def _frames(self, x: Tensor):
        """x as a batch of things the size of a bank item, and the way back."""
        item = self.bank.latents.shape[1:]
        if x.shape[1:] == item:
            return x, lambda y: y
        if x.ndim == 5 and (x.shape[1], *x.shape[3:]) == tuple(item[:1]) + tuple(item[-2:]) and item.numel() == x[0, :, 0].numel():
            return x.movedim(2, 1).flatten(0, 1), lambda y: y.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)
        raise ValueError(f"bank latents are {tuple(item)} but the sampler runs at {tuple(x.shape[1:])}; "
                         f"rebuild the bank with this model's VAE at this size")
