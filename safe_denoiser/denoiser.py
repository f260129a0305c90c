"""SafeDenoiser: corrects each prediction of a diffusion model away from a bank.

Everything here is a function of three tensors: `x` (noisy latent), `sigma` (B,) and `denoised` (the model's E[x0 | x]).
The correction is affine in `denoised`, so it equals the same correction of eps, v or the score.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .bank import Bank
from .by_banks import ByBanks
from .by_beta import ByBeta
from .densities import Densities
from .gaussian import ByGaussians, fit
from .kernel import rows
from .neighbours import Official, Sgf, Spell
from .parts import Located, choose, windows
from .places import InsideMasks, by_windows
from .prediction import Correction, Prediction
from .trust import between_neighbours, tells_apart
from .witness import PRIOR, ByWitness

METHODS = ("safe_denoiser", "spell", "official", "official_sd3", "sgf")
WEIGHTS = ("auto", "evidence", "retain", "gate", "unconditional", "reference", "ratio_beta", "tracked", "triangle", "constant", "witness",
           "gaussian")
BETAS = ("ratio_beta", "tracked", "triangle", "gate", "constant")  # the weights that are a beta, and no posterior
PUSHES = ("guided", "unconditional")
TUNED = {"evidence": (0.25, 3.0), "retain": (0.4, 3.0), "unconditional": (0.3, 1.5), "gaussian": (0.3, 3.0)}  # prior and evidence
TUNED_PARTS = {"evidence": (0.6, 10.0), "retain": (0.3, 10.0)}  # the same inside a window
PLAIN = (0.25, 0.0)  # the others are there for comparison, as published: no evidence
RANGES = {  # of the settings that are numbers
    "strength": (-1e6, 1e6), "sigma_start": (0, math.inf), "sigma_end": (0, math.inf), "prior": (1e-12, 1 - 1e-15), "evidence": (0, 1e6),
    "bandwidth": (0, 1e30), "temperature": (1e-6, 1e30), "posterior_max": (1e-12, 1 - 1e-15), "beta_max": (0, 1e6), "radius": (0, math.inf),
    "threshold": (0, math.inf), "parts": (1, 64)}


@dataclass(frozen=True)
class Step:
    """What the safe denoiser did in one model call; one entry per picture (per frame, where a picture bank meets a video).

    Args:
        sigma: noise level (B,).
        active: inside the window, with a finite prediction (B,), bool.
        posterior: r = P(unsafe | x), the highest of the windows where there are several; beta for the methods that have no r, or their
            own gate (B,).
        correction: |safe_denoised - denoised| / |denoised| (B,).
        nearest: index of the bank item that weighs most (B,), -1 where no bank was asked.
        clamped: r or beta hit its ceiling (B,), bool.
        fallback: the prediction or its correction was not finite, so the prediction was returned unchanged (B,), bool.
        omitted: weight of the bank items that E_u leaves out to save time (B,), see `posterior`.
        projection: t, the share of the unwanted prediction in the prompt's (B,), see `witness`; NaN where there was none to ask.
    """

    sigma: Tensor
    active: Tensor
    posterior: Tensor
    correction: Tensor
    nearest: Tensor
    clamped: Tensor
    fallback: Tensor
    omitted: Tensor
    projection: Tensor


def _nothing(p: Prediction) -> Correction:
    """No correction: where nothing is sampled, or a bank's items do not differ."""
    none = torch.zeros_like(p.sigma)
    return Correction.unasked(torch.zeros_like(p.denoised), none, none.bool())


def _emptied(memory: dict) -> None:
    """Drop what it holds, and keep the dicts in it, which windows write into."""
    for name, value in [*memory.items()]:
        if isinstance(value, dict):
            _emptied(value)
        else:
            del memory[name]


@dataclass(frozen=True, eq=False)
class SafeDenoiser:
    """Steers predictions away from a bank, an unwanted condition, or both: `safe_denoised = denoised + strength * correction` inside the
    sigma window.

    Where `safe` is given the model's own prediction under the unwanted condition (`weight="witness"`, the best on photographs), that is
    E_u, and tells r: see `witness.ByWitness`. The banks are then what it is measured with. Without it, with a reference bank
    (`weight="evidence"`)

        log r = log prior + log p_u(x) - log p_ref(x) + evidence (t - 1/2),   r <= posterior_max
        t     = <denoised - E_ref, E_u - E_ref> / |E_u - E_ref|^2
        safe_denoised = denoised + strength r / (1 - r) (E_ref - E_u)

    with a retain bank (`weight="retain"`)

        logit r = logit(prior) + log p_u(x) - log p_retain(x) + evidence (t - 1/2),   t as above with E_retain
        safe_denoised = denoised + strength r (E_retain - E_u)

    with both banks, the first form with the mean of both log r; with neither, but guidance (`weight="unconditional"`), the first form
    with the unconditional prediction as E_ref and no density ratio; with nothing at all (`weight="gate"`), a push away from E_u where
    x looks like a noised bank item. Source: arXiv:2502.08011, Thm 3.2. The evidence term is ours, not the theorem's; with `evidence=0`
    and exact densities each form that has a bank is exact. Where evidence counts, three things keep pictures whole, all ours: t is
    freed of the chance of small banks; r / (1 - r) never throws a prediction further than its mirror image at E_safe; and a prompt
    whose own pull towards E_u shows that it asks for the unsafe thing lets go of its guidance (see `by_banks.RELEASE`), so that another
    natural picture comes out instead of a bent one.

    Where the unwanted thing is a part of the picture, `parts` compares windows: with the crops of the bank that show the thing, see
    `parts.locate`, and with the other bank's at the same place. Where windows overlap, their corrections are averaged, each weighing r.

    Args:
        bank: what must not come out; latents (N, C, *spatial), in the space of `x`. None, where an unwanted condition says so alone.
        method: "safe_denoiser", or a neighbour: "spell", "sgf", "official", "official_sd3" (these two normalise the bank themselves).
        weight: how r or beta is found. "auto": witness, evidence, retain, unconditional or gate, the first for which there is what it
            needs; "gaussian", see `gaussian.ByGaussians`, in place of evidence where distances do not tell the banks apart, see `sees`.
            For comparison: "reference" (evidence 0), "ratio_beta" (the theorem as printed), "tracked", "triangle", "constant".
        retain: pictures to keep.
        reference: the model's own samples.
        strength: 1 as derived, 0 off, bit for bit.
        sigma_start, sigma_end: active where sigma_end < sigma <= sigma_start.
        prior: P(unsafe) among the model's own samples, in (0, 1); None takes the weight's own from TUNED.
        evidence: how much the prediction itself counts; 0 ignores it, None takes the weight's own from TUNED.
        bandwidth: kernel width h; None is 0.4 standard deviations of the bank (the published 3.15 for "official", the median
            distance of a bank item to its nearest neighbour for "sgf").
        temperature: T; None is calibrated on the bank by perplexity.
        posterior_max: ceiling of r, below 1. beta_max: ceiling of beta.
        radius: SPELL's shield radius, latent L2; None is the median distance of a bank item to its nearest neighbour.
        threshold: gate of "official".
        push: from where the beta forms push: the "guided" prediction, or the "unconditional" one (arXiv:2502.08011, Eq. 8).
        semantic: log p_u - log p_retain of a prediction (B, C, *spatial) at sigma / alpha (B,), used with a retain bank instead of the
            ratio of the banks' densities, see `meaning.SemanticPosterior`; not inside a mask.
        parts: windows of 1 / parts of each side instead of whole pictures; 1 is the whole. None is 2 where that tells the bank from the
            reference or retain bank clearly better than whole pictures do, else 1. Inside a mask a window counts by the share of it
            that is sampled.
        root: square root of the mask (D,) inside which alone the banks count; set by `masked`.
        trusted: whether distances see what the bank shows, so that its kernel means may steer, and a prompt that they say is direct may
            lose its guidance. None finds out, see `sees`; where they do not, "auto" takes "gaussian" if there is a reference bank.
        memory: what a run remembers from call to call, filled by `safe`: tensors of rows by name, and the same for each window and for
            what is inside masks. Begin each run with an empty one; hand over a run's own to go on with it.

    Raises:
        ValueError: an unknown method, weight or push, a missing bank, banks of different shapes, a number out of range.
    """

    bank: Bank | None
    method: str = "safe_denoiser"
    weight: str = "auto"
    retain: Bank | None = None
    reference: Bank | None = None
    strength: float = 1.0
    sigma_start: float = math.inf
    sigma_end: float = 0.0
    prior: float | None = None
    evidence: float | None = None
    bandwidth: float | None = None
    temperature: float | None = None
    posterior_max: float = 0.95
    beta_max: float = 4.0
    radius: float | None = None
    threshold: float = 1e-9
    push: str = "guided"
    semantic: Callable[[Tensor, Tensor], Tensor] | None = None
    parts: int | None = None
    root: Tensor | None = None
    trusted: bool | None = None
    memory: dict = field(default_factory=dict, repr=False)
    _rules: dict = field(default_factory=dict, init=False, repr=False)  # by weight
    _masks: InsideMasks = field(default_factory=InsideMasks, init=False, repr=False)

    def __post_init__(self):
        for name, choices in (("method", METHODS), ("weight", WEIGHTS), ("push", PUSHES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.bank is None and (self.method != "safe_denoiser" or self.weight not in ("auto", "witness")):
            what = f"method {self.method!r}" if self.method != "safe_denoiser" else f"weight {self.weight!r}"
            raise ValueError(f"{what} needs a negation bank; connect one, or choose method 'safe_denoiser' and weight 'auto'")
        for weights, bank, name in ((("evidence", "reference"), self.reference, "reference"), (("retain",), self.retain, "retain")):
            if self.weight in weights and bank is None:
                raise ValueError(f"weight {self.weight!r} needs a {name} bank; connect one or choose weight 'auto'")
            if bank is not None and self.bank is not None and bank.latents.shape[1:] != self.bank.latents.shape[1:]:
                raise ValueError(f"{name} bank latents are {tuple(bank.latents.shape[1:])} but the negation bank's are "
                                 f"{tuple(self.bank.latents.shape[1:])}; build both with the same VAE at the same size")
        if self.weight in ("ratio_beta", "gaussian") and self.other is None:
            raise ValueError(f"weight {self.weight!r} needs a reference bank or a retain bank; connect one or choose weight 'auto'")
        if self.semantic is not None and self.retain is None:
            raise ValueError("the semantic posterior needs a retain bank, towards which to steer; connect one")
        if (self.parts or 1) > 1 and not self._compares:
            raise ValueError(f"parts is {self.parts}, and only safe_denoiser with a reference or retain bank can tell which part of a "
                             f"picture is meant; connect one, or set parts to 1")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # NaN is in no range
                raise ValueError(f"{name} is {value}; it lies between {least:g} and {most:g}")

    @property
    def other(self) -> Bank | None:
        """What the bank is compared with: the model's own samples, else the pictures to keep."""
        return self.reference or self.retain

    @property
    def _compares(self) -> bool:
        """Whether there is another bank, with which windows can be compared."""
        return (self.bank is not None and self.method == "safe_denoiser" and self.weight in ("auto", "evidence", "retain", "reference")
                and self.other is not None and self.semantic is None and self.root is None
                and self.bank.latents.ndim > 2)

    @cached_property
    def located(self) -> tuple[int, Located | None]:
        """How many parts a side, and where in each picture of the bank the unwanted thing is."""
        if not self._compares:
            return 1, None
        parts, *found = self.bank.recall(f"parts {self.parts} beside {self.other.fingerprint}",
                                         lambda: choose(self.bank, self.other, self.parts))
        return parts, Located(*found) if found else None

    @cached_property
    def inside(self) -> list[tuple[tuple, "SafeDenoiser"]]:
        """Each window, and the safe denoiser that compares crops there; none where pictures are compared as a whole."""
        parts, found = self.located
        if not found:
            return []
        places = windows(self.bank.latents.shape[1:], parts)
        prior, evidence = self._tuned("evidence" if self.reference and self.weight != "retain" else "retain", TUNED_PARTS)
        shown = self.bank.crops(places, found.window)
        calibrated = replace(self, bank=shown, retain=None, reference=None, weight="auto", semantic=None, parts=1)
        width = dict(bandwidth=calibrated.densities.bandwidth, temperature=calibrated.densities.temperature)
        return [(place, replace(self, bank=shown, retain=self.retain and self.retain.map(lambda y, place=place: y[place]),
                                reference=self.reference and self.reference.map(lambda y, place=place: y[place]),
                                prior=prior, evidence=evidence, semantic=None, parts=1, trusted=True,
                                memory=self.memory.setdefault(f"window {k}", {}), **width)) for k, place in enumerate(places)]

    @cached_property
    def latents(self) -> Tensor:
        """The bank as the neighbours' methods read it, flat (N, D) in fp32 or better, in memory."""
        bank = self.bank.normalised() if self.method.startswith("official") and self.root is None else self.bank
        return bank.latents[:].flatten(1).to(torch.promote_types(bank.latents.dtype, torch.float32))

    @cached_property
    def neighbour_distance(self) -> float:
        """Median distance of a bank item to its nearest neighbour; of the only item to 0."""
        if len(self.latents) == 1:
            return float(self.latents.norm())

        return self.bank.recall(f"neighbour distance {self.method}", lambda: between_neighbours(self.latents))

    @cached_property
    def densities(self) -> Densities:
        """The bank's kernels, whose width and temperature all banks share."""
        width = {"official": 3.15, "official_sd3": 1.0}.get(self.method) if self.bandwidth is None else self.bandwidth
        if self.method == "sgf" and width is None:
            width = self.neighbour_distance
        return Densities(self.bank, width, self.temperature, self.root)

    def correct(self, p: Prediction) -> Correction:
        """The correction of one prediction at strength 1."""
        if self.method != "safe_denoiser":
            return self.neighbour.correct(p)
        if self._hears(p):
            return self._by_witness(p)
        if self.inside:
            return by_windows(self.inside, self.bank.latents.shape[1:], p)
        weight = self.weight
        if weight == "auto":
            weight = ("evidence" if self.reference else "retain" if self.retain else
                      "unconditional" if p.unconditional is not None else "gate")
            if weight == "evidence" and not self.sees and self.gaussians:
                weight = "gaussian"
        if weight == "gaussian":
            return self.gaussians.correct(p) if self.gaussians else _nothing(p)
        return self.rule(weight).correct(p, self.memory)

    def rule(self, weight: str) -> ByBanks | ByBeta:
        """What the banks' densities say, by one of the weights."""
        if weight not in self._rules:
            prior, evidence = self._tuned(weight)
            banks = ByBanks(self.densities, weight, self.reference, self.retain, prior, evidence, self.posterior_max, self.semantic,
                            lambda: self.sees)
            self._rules[weight] = banks if weight not in BETAS else \
                ByBeta(self.densities, weight, prior, self.posterior_max, self.beta_max, self.push, banks)
        return self._rules[weight]

    @cached_property
    def witness(self) -> ByWitness:
        """The rule that hears the model's prediction under the unwanted condition."""
        widest = self.other or self.bank
        model = self.gaussians.other if self.gaussians else widest and fit(widest)
        return ByWitness(self.gaussians, model, model is not None and self.other is not None, self.prior or PRIOR, self.posterior_max)

    @cached_property
    def gaussians(self) -> ByGaussians | None:
        """The rule of two banks as Gaussians; None where there are not two, or one whose items do not differ."""
        both = [bank and fit(bank) for bank in (self.bank, self.other)]
        prior, evidence = self._tuned("gaussian")
        return ByGaussians(*both, prior, evidence, self.posterior_max) if all(both) else None

    @cached_property
    def sees(self) -> bool:
        """Whether distances tell the bank from the other bank, as they must for its kernel means to point anywhere; or that bank, what
        the model makes, holds copies of the bank's pictures (memorised ones): these are near whatever they show.
        """
        if self.trusted is not None:
            return self.trusted
        return self.bank is not None and self.other is not None and self.method == "safe_denoiser" and tells_apart(self.bank, self.other)

    def _hears(self, p: Prediction) -> bool:
        """Whether the model itself is asked, and not the banks."""
        return self.weight == "witness" or self.weight == "auto" and (p.unwanted is not None or self.bank is None)

    def _by_witness(self, p: Prediction) -> Correction:
        if p.unwanted is None:
            raise ValueError("weight 'witness' needs a prediction under the unwanted condition; connect unwanted, or choose weight 'auto'")
        return self.witness.correct(p, self.memory)

    def _tuned(self, weight: str, tuned: dict[str, tuple[float, float]] = TUNED) -> tuple[float, float]:
        """prior and evidence: as given, else the weight's own."""
        given = self.prior, 0.0 if weight == "reference" else self.evidence
        return tuple(own if value is None else value for value, own in zip(given, tuned.get(weight, PLAIN)))

    @cached_property
    def neighbour(self) -> Spell | Sgf | Official:
        """The rule of a method that knows no posterior."""
        if self.method == "spell":
            return Spell(self.latents, self.neighbour_distance if self.radius is None else self.radius)
        if self.method == "sgf":
            return Sgf(self.latents, self.densities.bandwidth)
        item = self.bank.latents.shape[1:] if self.method == "official_sd3" else None
        return Official(self.latents, self.densities.bandwidth, self.threshold, item, self.root)

    def masked(self, mask: Tensor) -> "SafeDenoiser":
        """The same safe denoiser inside a mask m (D,) in [0, 1]: every |x - y|^2 becomes sum m (x - y)^2.

        With root = sqrt(m) that is |root x - root y|^2, so each method works unchanged on inputs and banks multiplied by root. The
        kernel keeps the bandwidth of the whole bank, which is a length per element.
        """
        stored = self.bank.latents if self.bank else mask
        root = mask.to(torch.promote_types(stored.dtype, torch.float32)).sqrt()
        bank = self.bank.normalised() if self.method.startswith("official") else self.bank
        return replace(self, bank=bank and bank.masked(root), retain=self.retain and self.retain.masked(root),
                       reference=self.reference and self.reference.masked(root), semantic=None, parts=1, root=root, trusted=self.sees,
                       bandwidth=self.densities.bandwidth if bank else self.bandwidth, memory={})

    def forget(self) -> None:
        """Begin a new run."""
        self._masks.forget()
        _emptied(self.memory)

    def opens(self, sigma: Tensor) -> Tensor:
        """Which noise levels (B,) lie inside the window, (B,), bool."""
        return (sigma > self.sigma_end) & (sigma <= self.sigma_start)

    @torch.no_grad()
    def safe(self, x: Tensor, denoised: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0,
             mask: Tensor | None = None, unconditional: Tensor | None = None, conditional: Tensor | None = None,
             unwanted: Tensor | None = None, neutral: Tensor | None = None) -> tuple[Tensor, Step | None]:
        """Correct one prediction.

        Args:
            x: noisy latents (B, *shape), `x = alpha x0 + sigma eps`; a bank of pictures (C, H, W) meets a video (B, C, T, H, W)
                frame by frame.
            denoised: the model's E[x0 | x] after guidance, shaped like x.
            sigma: noise scale, a number or (B,).
            alpha: signal scale, a number or (B,); 1 for EPS, V and EDM models, 1 - sigma for flow models.
            mask: what is sampled, 1, and what is given, 0 (inpainting); broadcasts to x. None: all is sampled.
            unconditional: the model's E[x0 | x] under the empty prompt, shaped like x, where guidance computed it.
            conditional: the same under the prompt, before guidance.
            unwanted: the same under a condition that means what must not come out.
            neutral: the same under a condition that means nothing in particular; None takes `unconditional`.

        Returns:
            safe_denoised in the shape and dtype of `denoised`, and the Step (None when strength is 0, where `denoised` itself
            comes back). Rows outside the window, and rows that are not finite, come back bit for bit.

        Raises:
            ValueError: x is of another size than the bank's latents; a weight or push needs an unconditional prediction.
        """
        if self.strength == 0:
            return denoised, None
        shaped, restore = self._frames(denoised)
        dtype = torch.promote_types(x.dtype, torch.float32)
        flat, predicted, *guides = (y if y is None else self._frames(y)[0].flatten(1).to(dtype)
                                    for y in (x, denoised, unconditional, conditional, unwanted, neutral))
        sigma, alpha = (rows(value, flat)[:, 0].expand(len(x)).repeat_interleave(len(flat) // len(x)) for value in (sigma, alpha))
        inside = self.opens(sigma)
        prediction = Prediction(flat, predicted, sigma, alpha, *guides)
        if mask is None:
            correction = self.correct(prediction)
        else:
            mask = self._frames(mask.expand_as(x))[0].flatten(1).to(dtype)
            by_parts = not self._hears(prediction) and self.inside
            correction = (by_windows(self.inside, self.bank.latents.shape[1:], prediction, mask) if by_parts else
                          self._masks.correct(mask, prediction, self.masked, self.memory))
        corrected = predicted + self.strength * correction.direction
        size = abs(self.strength) * correction.direction.norm(dim=1) / predicted.norm(dim=1).clamp_min(1e-12)
        finite = torch.isfinite(corrected).all(1) & torch.isfinite(size)
        active = inside & finite
        step = self.step(correction, sigma, active, inside & ~finite, size)
        keep = active.view(-1, *[1] * (shaped.ndim - 1))
        return restore(torch.where(keep, corrected.view_as(shaped).to(denoised.dtype), shaped)), step

    def step(self, correction: Correction, sigma: Tensor, active: Tensor, fallback: Tensor, size: Tensor) -> Step:
        """What the report will say of a correction of this size."""
        values = (correction.posterior, size, correction.nearest)
        t = torch.full_like(sigma, math.nan) if correction.projection is None else correction.projection
        return Step(sigma, active, *(torch.where(active, value, 0) for value in values), clamped=active & correction.clamped,
                    fallback=fallback, omitted=torch.where(active, correction.omitted, 0), projection=t)

    def _frames(self, x: Tensor):
        """x as a batch of things the size of a bank item, and the way back."""
        shown = self.bank or self.other
        item = shown.latents.shape[1:] if shown else x.shape[1:]
        if x.shape[1:] == item:
            return x, lambda y: y
        if x.ndim == 5 and (x.shape[1], *x.shape[3:]) == tuple(item[:1]) + tuple(item[-2:]) and item.numel() == x[0, :, 0].numel():
            return x.movedim(2, 1).flatten(0, 1), lambda y: y.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)
        raise ValueError(f"bank latents are {tuple(item)} but the sampler runs at {tuple(x.shape[1:])}; "
                         f"rebuild the bank with this model's VAE at this size")
