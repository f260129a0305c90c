"""The model as its own witness: its prediction under a condition that means what must not come out is E_u, and tells r as well.

    E_n, E_c, E_0 --coordinate, gap--> share --remembered odds--> r --> E_safe - E_c = r / (1 - r) (E_c - E_n) --guidance--> correction
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ..density.gaussian import TINY, Gaussian, Natural, along, fit
from ..methods import projection
from ..prediction import Correction, Prediction, first, largest
from .bank_view import BankView
from .by_gaussians import ByGaussians
from .rule import Rule

SURE = 0.9  # share at most, where odds are made of it: a share of 1 would never be doubted again
CAUTION = 2.0  # times the odds: to let an unsafe picture through is worse than to change a safe one
GROWTH = 2.0  # times, at most, that the first call's share makes the later ones larger
DOUBT = 0.05  # of the squared difference of two noise predictions, by which the log odds fall: once they clearly differ, x is not unsafe
PRIOR = 0.1  # share of unsafe pictures where no prompt says anything
SILENT = 1e-3  # a prompt that moves the prediction by less than this share of what the unwanted condition does (squared) says nothing
REACH = 6.0  # times |E_n - E_0|, at most, that E_safe is away from E_n; by right once to twice, while x leaves it open what it shows
GUIDED = 2.0  # times that guidance weighs E_c, up to which it divides REACH: what is exaggerated it exaggerates again
NOISE = 0.1  # signal to noise, in power, below which x tells next to nothing
RESCALED = 0.7  # of the spread that a correction adds to a prediction, which is taken back, as it is for guidance
RELEASE = 0.85, 1.0  # t from which the unwanted thing is taken out of what a prompt asks for, and at which all of it is


def from_witness(conditional: Tensor, unwanted: Tensor, r: Tensor) -> Tensor:
    """r / (1 - r) (E_c - E_n), (B, D): E_safe - E_c, since E_c = (1 - r) E_safe + r E_n. Source: arXiv:2502.08011, Thm 3.2.

    E_n is the model's own prediction at the same x, so that it shares the detail of E_c, and their difference is what they disagree on.
    """
    return (r / (1 - r))[:, None] * (conditional - unwanted)


def coordinate(conditional: Tensor, neutral: Tensor, unwanted: Tensor, metric: Gaussian | Natural | None = None,
               error: Tensor | float = 0.0) -> Tensor:
    """t = <E_c - E_0, E_n - E_0>_M / |E_n - E_0|_M^2, (B,): the share of E_n in E_c. Ours.

    It is r where what E_c shows beside E_n has no part along E_n - E_0. With M = Sigma^-1 of the model's own pictures, or of natural ones,
    that is nearly so for pictures that share no more than their kind with the unwanted ones (a ship and a truck share grey, straight and
    man-made, in which all pictures differ); with M = I it is not. `error` is what the chance of E_0 adds to both products, at most half of
    the second.
    Source of the metric: linear discriminant analysis, Fisher, Annals of Eugenics 7 (1936).
    """
    return along(conditional - neutral, unwanted - neutral, metric, error)


def squared_length(v: Tensor, metric: Gaussian | Natural | None = None) -> Tensor:
    """|v|_M^2, (B,), never 0."""
    return (v * (v if metric is None else metric.whitened(v))).sum(1).clamp_min(TINY)


def gap(conditional: Tensor, neutral: Tensor, unwanted: Tensor, metric: Gaussian | None = None) -> Tensor:
    """|E_c - E_n|_M^2 / |E_n - E_0|_M^2, (B,): 0 where the prompt asks for just the unwanted thing, 1 where it is no nearer to it than E_0.

    Ours. Both shrink together as noise falls and predictions agree, so that their ratio tells r = 1 - |E_c - E_n| / |E_safe - E_n| apart
    from that.
    """
    return squared_length(conditional - unwanted, metric) / squared_length(unwanted - neutral, metric)


def moved(conditional: Tensor, neutral: Tensor, unwanted: Tensor, metric: Gaussian | Natural | None = None) -> Tensor:
    """|E_c - E_0|_M^2 / |E_n - E_0|_M^2, (B,): by how much the prompt moves the prediction, relative to the unwanted condition. Ours."""
    return squared_length(conditional - neutral, metric) / squared_length(unwanted - neutral, metric)


def share(t: Tensor, move: Tensor, apart: Tensor, begun: Tensor, prior: float = PRIOR) -> Tensor:
    """P(unsafe) in E_c, (B,), of its `coordinate` t, how far it is `moved`, and its `gap` now and at the run's first call (`begun`). Ours.

        sqrt(gap) = (1 - r) / (1 - q),   r_0 = 1 - (1 - prior) sqrt(gap_0),   r = r_0 (1 - sqrt(gap)) / (1 - sqrt(gap_0))

    with q = P(unsafe | x) without a prompt, where what the prompt asks for beside the unwanted thing is about as far from it as what the
    model makes else; a prompt's odds r / (1 - r) are a constant times q / (1 - q). It takes no account of what the two have in common, in
    which t sees a share: of "automobile or truck" t says 0.73 and this 0.55. Where the condition is broader than the prompt
    (|E_c - E_0|_M > |E_n - E_0|_M) their distance tells nothing, and t stands instead.
    """
    root, first_root = apart.sqrt(), begun.sqrt()
    begins = 1 - (1 - prior) * first_root
    grows = (begins / (1 - first_root).clamp_min(TINY)).clamp(1, GROWTH)
    r = torch.lerp((grows * (1 - root)).clamp(0, SURE), t.clamp(0, SURE), (move - 1).clamp(0, 1))
    return CAUTION * r / (1 - r + CAUTION * r)


def within_reach(conditional: Tensor, neutral: Tensor, unwanted: Tensor, gain: Tensor) -> Tensor:
    """1 - |E_c - E_n| / (reach |E_n - E_0|), at least 0, (B,): the r with which |E_safe - E_n| = |E_c - E_n| / (1 - r) is reach times
    |E_n - E_0|; reach = REACH / w, w how many times guidance weighs E_c, from 1 to GUIDED. Ours.

    E_safe is a mean of pictures, and about as far from the unwanted ones as what the model makes else. A trained network's predictions
    under all conditions draw together as noise falls, whatever the picture shows: then E_c near E_n is no sign that it is unsafe, and a
    larger r would exaggerate what little they differ in until colours saturate.
    """
    near, far = (squared_length(unwanted - y).sqrt() for y in (conditional, neutral))
    return (1 - gain.clamp(1, GUIDED) * near / (REACH * far)).clamp_min(0)


def without(conditional: Tensor, neutral: Tensor, unwanted: Tensor, released: Tensor) -> Tensor:
    """E_c - f (E_n - E_0), (B, D), f = `released` (B,): what the prompt asks for beside the unwanted thing.

    No picture of "a bright truck" is safe, so that E_c is no mixture of E_safe and E_n: the prompt asks for two things at once. With f = 1
    this is the prediction of p(x | prompt) p(x) / p(x | unwanted), which where the two are independent is that of "bright" alone, and where
    the prompt asks for nothing else that of no prompt. Source: concept negation, arXiv:2206.01714, Sec. 4.
    """
    return conditional - released[:, None] * (unwanted - neutral)


def rescaled(safe: Tensor, base: Tensor) -> Tensor:
    """phi std(base) / std(safe) safe + (1 - phi) safe, (B, D), where the numbers of a row of `safe` spread more than those of `base`.

    What pushes away from a prediction adds to its contrast, call by call, until colours saturate, as guidance does.
    Source: arXiv:2305.08891, Eq. 15 and 16, phi = RESCALED, for guidance.
    """
    spread = (base.std(1, keepdim=True) / safe.std(1, keepdim=True).clamp_min(TINY)).clamp_max(1)
    return safe * torch.lerp(torch.ones_like(spread), spread, RESCALED)


@dataclass(frozen=True, eq=False)
class ByWitness(Rule):
    """r by what the model itself predicts under the unwanted condition, and E_u too.

        o_k = max_{j <= k} odds(share_j) gap_j / gap_k
        logit r = log o_k + TRUST (log p_u(x) - log p_others(x)) - DOUBT (alpha / sigma)^2 |E_c - E_n|_k^2
        r <= posterior_max,   r <= 1 - w |E_c - E_n| / (REACH |E_n - E_0|), this w at most GUIDED
        safe_denoised = rescaled(base + w' r / (1 - r) (E_b - E_n)),   base = denoised + w (E_b - E_c),
        E_b = E_c - f (E_n - E_0),   w' = w + f (1 - w)

    share_j is the `share` at the j-th call of a run, w how many times guidance weighs E_c. Since E_c - E_n = (1 - r) (E_safe - E_n), a
    `gap` that shrinks says that r grows; one call's share forgets it, since a late E_0 goes where E_c goes. For the same reason the gap
    is measured from E_0 and from what `model` predicts, where it is of other pictures, as their geometric mean. The banks add their say
    where there are two that distances tell apart, as those of drawings (of photographs they would say what colours and light say, and let
    unwanted ones through); the last term is the evidence that two noise predictions give against each other once the noise is low enough.

    A prompt that asks for the unwanted thing alone, or for it and more, has no safe picture: as t goes from RELEASE[0] to RELEASE[1], f
    goes from 0 to 1, E_b, what it asks for `without` that, takes the place of E_c in all of this, and the share is `prior`. In the metric
    of the model's own pictures t nears 1 under such prompts as soon as x shows a little; where a prompt has safe pictures, only when x is
    to be none of them. Where no prompt says anything (E_c = E_0) the share is `prior` too.
    Source of the correction: arXiv:2502.08011, Thm 3.2; r is ours.

    Args:
        banks: what the banks know, where there are two that are told apart.
        model: pictures as a Gaussian, whose covariance is the metric; None takes that of natural pictures for t, and none for gaps.
        others: `model` is of all that the model makes or of pictures to keep, and not of unwanted ones.
        prior: P(unsafe) where no prompt says anything. posterior_max: ceiling of r.
    """

    banks: ByGaussians | None = None
    model: Gaussian | None = None
    others: bool = False
    prior: float = PRIOR
    posterior_max: float = 0.95

    @classmethod
    def of(cls, view: BankView) -> "ByWitness":
        banks, widest = ByGaussians.of(view) if view.sees else None, view.other or view.bank
        model = banks.other if banks else widest and fit(widest)
        return cls(banks, model, model is not None and view.other is not None, view.settings.prior or PRIOR, view.settings.posterior_max)

    def correct(self, p: Prediction, memory: dict) -> Correction:
        if p.unwanted is None:
            raise ValueError("weight 'witness' needs a prediction under the unwanted condition; connect unwanted, or choose weight 'auto'")
        asked = p.denoised if p.conditional is None else p.conditional
        zero = p.unconditional if p.neutral is None else p.neutral
        wiener = self.model.denoised(p.x, p.sigma, p.alpha) if self.others else None
        t, told, released, unasked = self._asks(p, asked, zero, wiener, memory)
        kept = asked if zero is None else without(asked, zero, p.unwanted, released)
        r = torch.sigmoid(self._log_odds(p, kept, [y for y in (zero, wiener) if y is not None], told / (1 - told), memory))
        capped, weighed = r.clamp_max(self.posterior_max), self._weighed(p)
        push = torch.lerp(weighed, torch.ones_like(weighed), unasked)  # what is not asked for is not guided
        if zero is not None:
            capped = capped.minimum(within_reach(kept, zero, p.unwanted, push))
        base = p.denoised + weighed[:, None] * (kept - asked)
        safe = rescaled(base + push[:, None] * from_witness(kept, p.unwanted, capped), base)
        return Correction.unasked(safe - p.denoised, capped, r > self.posterior_max, t)

    def _asks(self, p: Prediction, asked: Tensor, zero: Tensor | None, wiener: Tensor | None, memory: dict) -> tuple[Tensor, ...]:
        """t, the share that it tells, how much of the unwanted thing is to be taken out of what the prompt asks for, and how far the share
        is the prior's: because that is taken out, or the prompt says nothing; (B,) each.
        """
        if zero is not None:
            metric = Natural(p.item) if self.model is None else self.model
            t, move = (of(asked, zero, p.unwanted, metric) for of in (coordinate, moved))
            apart = gap(asked, zero, p.unwanted, self.model)
            begun = first(memory, "gap", p.sigma, apart)
            released = ((t - RELEASE[0]) / (RELEASE[1] - RELEASE[0])).clamp(0, 1)
            silent = (asked - zero).square().sum(1) <= SILENT * (p.unwanted - zero).square().sum(1)
            unasked = torch.where(silent, 1, released)
            told = torch.lerp(share(t, move, apart, begun, self.prior), torch.full_like(t, self.prior), unasked)
            return t, told.clamp(0, SURE), released, unasked
        begins = p.sigma >= first(memory, "begins", p.sigma, p.sigma)
        t = torch.full_like(p.sigma, self.prior)
        if wiener is not None:  # it stands in for E_0 while x tells nothing; later it lacks the detail that E_c and E_n share
            told = coordinate(asked, wiener, p.unwanted, self.model, self.model.chance)
            blind = p.alpha.square() * self.model.level < NOISE * p.sigma.square()
            t = torch.where(blind, self.prior + (1 - self.prior) * told, t)  # E_c = E_0 is r = prior
        t = torch.where(begins, t, 0)
        none = torch.zeros_like(t)
        return t, t.clamp(0, SURE), none, none

    def _log_odds(self, p: Prediction, kept: Tensor, seen_from: list[Tensor], odds: Tensor, memory: dict) -> Tensor:
        """logit r, (B,), of a prediction whose share alone gives `odds`."""
        apart = (kept - p.unwanted).square().sum(1)
        near = squared_length(kept - p.unwanted, self.model if seen_from else None)
        gaps = [near / squared_length(p.unwanted - origin, self.model) for origin in seen_from] or [near]
        wide = torch.stack(gaps).log().mean(0).exp()
        logit = (largest(memory, "odds", p.sigma, odds * wide) / wide).clamp_min(TINY).log()
        if self.banks is not None:
            logit = logit + self.banks.log_ratio(p)
        return logit - DOUBT * (p.alpha / p.sigma).square() * apart

    def _weighed(self, p: Prediction) -> Tensor:
        """<denoised - E_0, E_c - E_0> / |E_c - E_0|^2, (B,): how many times guidance weighs E_c, whatever guidance it is; 1 without."""
        if p.unconditional is None or p.conditional is None:
            return torch.ones_like(p.sigma)
        return projection(p.denoised, p.conditional, p.unconditional).clamp_min(0)
