"""The model as its own witness: its prediction under a condition that means what must not come out is E_u, and tells r as well.

    E_n, E_c, E_0 --coordinate--> t --remembered odds--> r --> E_safe - E_c = r / (1 - r) (E_c - E_n) --guidance--> correction
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import Gaussian
from .methods import projection
from .prediction import Correction, Prediction, first, largest

SURE = 0.9  # t at most, where odds are made of it: a share of 1 would never be doubted again
DOUBT = 0.05  # of the squared difference of two noise predictions by which the odds fall, see `odds`
PRIOR = 0.1  # share of unsafe pictures where no prompt says anything
SILENT = 1e-3  # a prompt that moves the prediction by less than this share of what the unwanted condition does (squared) says nothing
NOISE = 0.1  # signal to noise, in power, below which x tells next to nothing
RELEASE = 0.8, 0.95  # `closeness` of a prompt to the unwanted condition: where its guidance begins to be let go, and where all is


def from_witness(conditional: Tensor, unwanted: Tensor, r: Tensor) -> Tensor:
    """r / (1 - r) (E_c - E_n), (B, D): E_safe - E_c, since E_c = (1 - r) E_safe + r E_n. Source: arXiv:2502.08011, Thm 3.2.

    E_n is the model's own prediction at the same x, so that it shares the detail of E_c, and their difference is what they disagree on.
    """
    return (r / (1 - r))[:, None] * (conditional - unwanted)


def coordinate(conditional: Tensor, neutral: Tensor, unwanted: Tensor, metric: Gaussian | None = None) -> Tensor:
    """t = <E_c - E_0, E_n - E_0>_M / <E_n - E_0, E_n - E_0>_M, (B,): the share of E_n in E_c. Ours.

    It is r where what E_c shows beside E_n has no part along E_n - E_0. With M = Sigma^-1 of the model's own pictures that is nearly so
    for pictures that share no more than their kind with the unwanted ones (a ship and a truck share grey, straight and man-made, in which
    all pictures differ); with M = I it is not. Source of the metric: linear discriminant analysis, Fisher, 1936.
    """
    return projection(conditional, unwanted, neutral, metric=metric and metric.whitened)


def closeness(conditional: Tensor, neutral: Tensor, unwanted: Tensor, metric: Gaussian | None = None) -> Tensor:
    """1 - |E_c - E_n|_M / |E_n - E_0|_M, (B,): 1 where the prompt asks for just the unwanted thing, 0 where it is no nearer to it than E_0.

    Ours. Before x tells anything it is near P(unsafe | prompt) for unwanted conditions that mean one thing; broad ones it sees less of.
    """
    apart, whole = conditional - unwanted, unwanted - neutral
    lengths = [(v * (v if metric is None else metric.whitened(v))).sum(1) for v in (apart, whole)]
    return 1 - (lengths[0] / lengths[1].clamp_min(1e-20)).clamp_min(0).sqrt()


@dataclass(frozen=True, eq=False)
class ByWitness:
    """r by what the model itself predicts under the unwanted condition, and E_u too.

        o_k = max_{j <= k} odds(t_j) |E_c - E_n|_j^2 / |E_c - E_n|_k^2
        logit r = log o_k - DOUBT (alpha / sigma)^2 |E_c - E_n|_k^2,   r <= posterior_max
        safe_denoised = denoised + w r / (1 - r) (E_c - E_n)

    t_j is the `coordinate` at the j-th call of a run, w how many times guidance weighs E_c. Since E_c - E_n = (1 - r) (E_safe - E_n), a
    difference that shrinks says that r grows; t alone forgets it, since a late E_0 goes where E_c goes. The second line is the evidence
    that two noise predictions give against each other once the noise is low enough to tell. A prompt that from the start asks for the
    unwanted thing itself (`closeness` from RELEASE[0] to RELEASE[1]) lets go of its guidance: then E_0 takes the place of E_c. Where no prompt
    says anything (E_c = E_0, or no E_0 is known) t is `prior`. Source of the correction: arXiv:2502.08011, Thm 3.2; r is ours.

    Args:
        model: the model's own pictures as a Gaussian, the metric of `coordinate`; None measures as it is.
        stands_in: `model` is of all that the model makes, so that where E_0 is not known its mean may stand in for it, as long as x is
            mostly noise; later it lacks the detail that E_c and E_n share.
        prior: P(unsafe) where no prompt says anything. posterior_max: ceiling of r.
    """

    model: Gaussian | None = None
    stands_in: bool = False
    prior: float = PRIOR
    posterior_max: float = 0.95

    def correct(self, p: Prediction, memory: dict) -> Correction:
        """The correction at strength 1; `memory` is what a run remembers, and is changed."""
        asked = p.denoised if p.conditional is None else p.conditional
        zero = p.unconditional if p.neutral is None else p.neutral
        t, free = self._asks(p, asked, zero, memory)
        kept = asked if zero is None else torch.lerp(asked, zero, free[:, None])
        distance = (kept - p.unwanted).square().sum(1).clamp_min(1e-20)
        share = torch.lerp(t, torch.full_like(t, self.prior), free).clamp(0, SURE)
        odds = largest(memory, "odds", p.sigma, share / (1 - share) * distance) / distance
        evidence = DOUBT * (p.alpha / p.sigma).square() * distance
        r = torch.sigmoid(odds.clamp_min(1e-20).log() - evidence)
        capped = r.clamp_max(self.posterior_max)
        direction = self._gain(p, free)[:, None] * from_witness(kept, p.unwanted, capped)
        if zero is not None:
            direction = direction + free[:, None] * (zero - p.denoised)
        none = torch.zeros_like(r)
        return Correction(direction, capped, none.long() - 1, r > self.posterior_max, none, t)

    def _asks(self, p: Prediction, asked: Tensor, zero: Tensor | None, memory: dict) -> tuple[Tensor, Tensor]:
        """t, and how far the prompt is left aside: because it says nothing (1), or asks for nothing but the unwanted thing; (B,) each."""
        if zero is not None:
            start = first(memory, "start", p.sigma, closeness(asked, zero, p.unwanted, self.model))
            says = (asked - zero).square().sum(1) > SILENT * (p.unwanted - zero).square().sum(1)
            release = ((start - RELEASE[0]) / (RELEASE[1] - RELEASE[0])).clamp(0, 1)
            return coordinate(asked, zero, p.unwanted, self.model), torch.where(says, release, 1.0)
        t = torch.full_like(p.sigma, self.prior)
        if self.stands_in:  # of what E_ref shows, `prior` is unsafe: E_c = E_ref is r = prior
            told = self._against_mean(asked, p)
            begins = p.sigma >= first(memory, "begins", p.sigma, p.sigma)
            blind = p.alpha.square() * self.model.level < NOISE * p.sigma.square()
            t = torch.where(blind & begins, self.prior + (1 - self.prior) * told, torch.where(begins, t, 0))
        return t, torch.zeros_like(t)

    def _against_mean(self, asked: Tensor, p: Prediction) -> Tensor:
        """`coordinate` with the mean of `model` as E_0, freed of that mean's own error, which stands in both of its products."""
        mean = self.model.denoised(p.x, p.sigma, p.alpha)
        axis = self.model.whitened(p.unwanted - mean)
        part, whole = (((y - mean) * axis).sum(1) for y in (asked, p.unwanted))
        error = torch.minimum(self.model.chance, whole / 2)
        return (part - error) / (whole - error).clamp_min(1e-20)

    def _gain(self, p: Prediction, free: Tensor) -> Tensor:
        """<denoised - E_0, E_c - E_0> / |E_c - E_0|^2, (B,): how many times guidance weighs E_c, whatever guidance it is; 1 without."""
        one = torch.ones_like(p.sigma)
        if p.unconditional is None or p.conditional is None:
            return one
        return torch.lerp(projection(p.denoised, p.conditional, p.unconditional).clamp_min(0), one, free)
