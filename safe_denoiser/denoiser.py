"""SafeDenoiser: corrects each prediction of a diffusion model away from a bank.

Everything here is a function of three tensors: `x` (noisy latent), `sigma` (B,) and `denoised` (the model's E[x0 | x]).
The correction is affine in `denoised`, so it equals the same correction of eps, v or the score.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property, partial

import torch
from torch import Tensor

from .bank.bank import Bank
from .density.kernel import rows
from .prediction import Correction, Prediction, Step
from .rules.bank_view import BankView, precision
from .rules.baselines import OfficialSD1, OfficialSD3, Sgf, Spell
from .rules.regions import InsideMasks, by_frames, by_windows
from .rules.rule import Rule
from .rules.settings import Settings, require_choice, require_ranges
from .rules.sld import BySld
from .rules.weighting import ByWeight

METHODS: dict[str, type[Rule]] = {"safe_denoiser": ByWeight, "spell": Spell, "official": OfficialSD1, "official_sd3": OfficialSD3,
                                  "sgf": Sgf, "sld": BySld}  # the order is the nodes'
RANGES = {"strength": (-1e6, 1e6), "sigma_start": (0, math.inf), "sigma_end": (0, math.inf), "parts": (1, 64)}


def _emptied(memory: dict) -> None:
    """Empty a memory, but keep the dicts in it, into which windows write."""
    for name, value in [*memory.items()]:
        if isinstance(value, dict):
            _emptied(value)
        else:
            del memory[name]


@dataclass(frozen=True, eq=False)
class SafeDenoiser:
    """Steers predictions away from a bank, an unwanted condition, or both: `safe_denoised = denoised + strength * correction` inside the
    window of the schedule. The correction is that of a rule: `weighting.ByWeight` for "safe_denoiser", or a baseline, see `baselines`.

    Where the unwanted thing is a part of the picture, `parts` compares windows: with the crops of the bank that show the thing, see
    `windows.locate`, and with the other bank's at the same place. Where windows overlap, their corrections are averaged, each weighing r.

    Args:
        bank: what must not come out; latents (N, C, *spatial), in the space of `x`. None, where an unwanted condition says so alone.
        method: "safe_denoiser", or a baseline: "spell", "sgf", "official", "official_sd3" (these two normalise the bank themselves), or
            "sld", which knows no bank: see `sld`.
        retain: pictures to keep. reference: the model's own samples.
        strength: 1 as derived, 0 off, bit for bit.
        sigma_start, sigma_end: active where sigma_end < sigma <= sigma_start.
        weight, prior, evidence, bandwidth, temperature, posterior_max, beta_max, radius, threshold, push: see `settings.Settings`.
        semantic: log p_u - log p_retain of a prediction (B, C, *spatial) at sigma / alpha (B,), used with a retain bank instead of the
            ratio of the banks' densities, see `semantic_posterior.SemanticPosterior`; not inside a mask.
        parts: windows of 1 / parts of each side instead of whole pictures; 1 is the whole. None is 2 where that tells the bank from the
            reference or retain bank clearly better than whole pictures do, else 1. Inside a mask a window counts by the share of it
            that is sampled.
        trusted: whether distances reflect what the bank shows, so that its kernel means may steer. None: see `BankView.sees`; where
            they do not, "auto" takes "gaussian" if there is a reference bank.
        own: settings that only this method knows: `sld.Sld`, the numbers of "sld".
        memory: what a run remembers from call to call, filled by `safe`: tensors of rows by name, and the same for each window and for
            what is inside masks. Begin each run with an empty one; hand over a run's own to go on with it.

    Raises:
        ValueError: an unknown method, weight or push, a missing bank, banks of different shapes, a number out of range.
    """

    bank: Bank | None
    method: str = "safe_denoiser"
    weight: str = Settings.weight
    retain: Bank | None = None
    reference: Bank | None = None
    strength: float = 1.0
    sigma_start: float = math.inf
    sigma_end: float = 0.0
    prior: float | None = Settings.prior
    evidence: float | None = Settings.evidence
    bandwidth: float | None = Settings.bandwidth
    temperature: float | None = Settings.temperature
    posterior_max: float = Settings.posterior_max
    beta_max: float = Settings.beta_max
    radius: float | None = Settings.radius
    threshold: float = Settings.threshold
    push: str = Settings.push
    semantic: Callable[[Tensor, Tensor], Tensor] | None = None
    parts: int | None = None
    trusted: bool | None = None
    own: object = None
    memory: dict = field(default_factory=dict, repr=False)
    view: BankView = field(init=False, repr=False)
    kind: type[Rule] = field(init=False, repr=False)

    def __post_init__(self):
        require_choice("method", self.method, METHODS)
        require_ranges(self, RANGES)
        kind, settings = METHODS[self.method], Settings(**{one.name: getattr(self, one.name) for one in fields(Settings)})
        kind.require(self.method, self.bank, settings)
        view = BankView(self.bank and kind.prepared(self.bank), self.retain, self.reference, settings, self.semantic,
                    trusted=self.trusted, own=self.own)
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "kind", kind)
        if (self.parts or 1) > 1 and not (view.comparable and kind.by_parts(settings)):
            raise ValueError(f"parts is {self.parts}, and only safe_denoiser with a reference or retain bank can tell which part of a "
                             f"picture is meant; connect one, or set parts to 1")

    @cached_property
    def rule(self) -> Rule:
        """What corrects whole pictures."""
        return self.kind.of(self.view)

    @cached_property
    def inside(self) -> list[tuple[tuple, Rule, dict]]:
        """Each window, what corrects it, and what is remembered of it; none where pictures are compared as a whole."""
        if not self.kind.by_parts(self.view.settings):
            return []
        views = enumerate(self.view.by_parts(self.parts))
        return [(place, self.kind.of(view), self.memory.setdefault(f"window {k}", {})) for k, (place, view) in views]

    @cached_property
    def masks(self) -> InsideMasks:
        """What corrects inside masks."""
        return InsideMasks(self.view, self.kind.of)

    def correct(self, p: Prediction, mask: Tensor | None = None) -> Correction:
        """The correction of one prediction at strength 1; with a mask (B, D), inside it."""
        if not self.kind.whole(self.view, p) and self.inside:
            return by_windows(self.inside, self.bank.latents.shape[1:], p, mask)
        if mask is None or not self.rule.distances:
            return self.rule.correct(p, self.memory)
        return self.masks.correct(mask, p, self.memory)

    def forget(self) -> None:
        """Begin a new run."""
        self.masks.forget()
        _emptied(self.memory)

    def opens(self, sigma: Tensor) -> Tensor:
        """Which noise levels (B,) lie inside the window of the schedule, (B,), bool."""
        return (sigma > self.sigma_end) & (sigma <= self.sigma_start)

    def listens(self, sigma: Tensor) -> Tensor:
        """At which noise levels (B,) an unwanted condition is to be evaluated, (B,), bool."""
        return sigma > self.sigma_end if self.kind.gathers(self.view) else self.opens(sigma)

    @torch.no_grad()
    def safe(self, x: Tensor, denoised: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0,
             mask: Tensor | None = None, unconditional: Tensor | None = None, conditional: Tensor | None = None,
             unwanted: Tensor | None = None, neutral: Tensor | None = None, begins: Tensor | bool = True) -> tuple[Tensor, Step | None]:
        """Correct one prediction.

        Args:
            x: noisy latents (B, *shape), `x = alpha x0 + sigma eps`; a bank of pictures (C, H, W) meets a video (B, C, T, H, W)
                frame by frame.
            denoised: the model's E[x0 | x] after guidance, shaped like x.
            sigma, alpha: noise and signal scale, numbers or (B,); alpha is 1 for EPS, V and EDM models, 1 - sigma for flow models.
            mask: what is sampled, 1, and what is given, 0 (inpainting); broadcasts to x. None: all is sampled.
            unconditional: the model's E[x0 | x] under the empty prompt, shaped like x, where guidance computed it.
            conditional: the same under the prompt, before guidance.
            unwanted: the same under a condition that means what must not come out.
            neutral: the same under a condition that means nothing in particular; None takes `unconditional`.
            begins: whether the call begins a step of the sampler, and is not one of several within it.

        Returns:
            safe_denoised in the shape and dtype of `denoised`, and the Step (None when strength is 0, where `denoised` itself
            comes back). Rows outside the window of the schedule, and rows that are not finite, come back bit for bit.

        Raises:
            ValueError: x is of another size than the bank's latents; a weight or push needs an unconditional prediction.
        """
        if self.strength == 0:
            return denoised, None
        shown = self.bank or self.view.other
        frames = partial(by_frames, item=shown.latents.shape[1:] if shown else x.shape[1:])
        shaped, restore = frames(denoised)
        dtype = precision(self.view) or torch.promote_types(x.dtype, torch.float32)
        flat, predicted, *guides = (y if y is None else frames(y)[0].flatten(1).to(dtype)
                                    for y in (x, denoised, unconditional, conditional, unwanted, neutral))
        sigma, alpha = (rows(value, flat)[:, 0].expand(len(x)).repeat_interleave(len(flat) // len(x)) for value in (sigma, alpha))
        sampled = None if mask is None else frames(mask.expand_as(x))[0].flatten(1).to(dtype)
        correction = self.correct(Prediction(flat, predicted, sigma, alpha, *guides, begins, tuple(shaped.shape[1:])), sampled)
        corrected = predicted + self.strength * correction.direction
        size = abs(self.strength) * correction.direction.norm(dim=1) / predicted.norm(dim=1).clamp_min(1e-12)
        inside, finite = self.opens(sigma), torch.isfinite(corrected).all(1) & torch.isfinite(size)
        active = inside & finite
        step = Step.of(correction, sigma, active, inside & ~finite, size)
        keep = active.view(-1, *[1] * (shaped.ndim - 1))
        return restore(torch.where(keep, corrected.view_as(shaped).to(denoised.dtype), shaped)), step
