"""Method safe_denoiser: which rule computes r or beta, by the chosen weight, or for "auto" by what is connected."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..bank.bank import Bank
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .by_banks import ByBanks
from .by_beta import ByBeta
from .by_gaussians import ByGaussians
from .rule import NO_BANK, Rule
from .settings import Settings
from .witness import ByWitness


class Nothing(Rule):
    """No correction: where a bank's items do not differ."""

    def __init__(self, view: BankView):
        pass

    def correct(self, p: Prediction, memory: dict) -> Correction:
        none = torch.zeros_like(p.sigma)
        return Correction.unasked(torch.zeros_like(p.denoised), none, none.bool())


MADE: dict[str, Callable[[BankView, str], Rule]] = {
    **dict.fromkeys(("evidence", "reference", "retain", "unconditional"), ByBanks.of),
    **dict.fromkeys(("ratio_beta", "tracked", "triangle", "gate", "constant"), ByBeta.of),  # a beta, and no posterior
    "gaussian": lambda view, weight: ByGaussians.of(view) or Nothing(view),
    "witness": lambda view, weight: ByWitness.of(view)}


@dataclass(frozen=True, eq=False)
class ByWeight(Rule):
    """The safe denoiser. With the model's own prediction under the unwanted condition (`weight="witness"`, the best on photographs), that
    is E_u, and tells r: see `witness.ByWitness`; the banks are then what it is measured with. Without it, with a reference bank
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
    """

    hears, neutral = True, True

    view: BankView
    rules: dict[str, Rule] = field(default_factory=dict, init=False)  # made so far, by weight

    @staticmethod
    def require(name: str, bank: Bank | None, settings: Settings) -> None:
        if bank is None and settings.weight not in ("auto", "witness"):
            raise ValueError(f"weight {settings.weight!r} {NO_BANK}")

    @staticmethod
    def require_unwanted(weight: str) -> None:
        if weight == "witness":
            raise ValueError("weight 'witness' compares with the prediction under an unwanted condition, and none is connected; connect "
                             "unwanted, or choose weight 'auto'")

    @staticmethod
    def by_parts(settings: Settings) -> bool:
        return settings.weight in ("auto", "evidence", "retain", "reference")

    @staticmethod
    def whole(view: BankView, p: Prediction) -> bool:
        """Whether the model itself is asked, and not the banks."""
        weight = view.settings.weight
        return weight == "witness" or weight == "auto" and (p.unwanted is not None or view.bank is None)

    def correct(self, p: Prediction, memory: dict) -> Correction:
        weight = self._weight(p)
        if weight not in self.rules:
            self.rules[weight] = MADE[weight](self.view, weight)
        return self.rules[weight].correct(p, memory)

    def _weight(self, p: Prediction) -> str:
        """The weight that was chosen; "auto": the first for which there is what it needs."""
        view = self.view
        if self.whole(view, p):
            return "witness"
        if view.settings.weight != "auto":
            return view.settings.weight
        if view.reference:
            return "evidence" if view.sees or not view.gaussians else "gaussian"
        return "retain" if view.retain else "unconditional" if p.unconditional is not None else "gate"
