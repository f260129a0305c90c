"""BankView: the banks and settings that a rule is given, of whole pictures, of one window of them, or inside a mask."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import Bank
from ..bank.lazy_latents import LazyLatents
from ..density.densities import Densities
from ..density.gaussian import Gaussian, fit
from ..density.separability import between_neighbours, tells_apart
from ..density.windows import choose, windows
from .settings import TUNED_PARTS, Settings


def precision(view: "BankView") -> torch.dtype | None:
    """The dtype of all that is computed, whatever that of x: the banks', but single precision at least; None where there is no bank."""
    formats = {one.latents.dtype for one in (view.bank, view.retain, view.reference) if one is not None}
    return (torch.float64 if torch.float64 in formats else torch.float32) if formats else None


@dataclass(frozen=True, eq=False)
class BankView:
    """What a rule compares a prediction with.

    Args:
        bank, retain, reference: see `SafeDenoiser`; of latents of one shape, which is that of the predictions.
        settings: of the rule.
        semantic: see `SafeDenoiser`; None inside a mask and in windows.
        root: square root of the mask (D,) by which banks and predictions are multiplied; None where all is compared.
        whole: the view of which this is the masked one.
        trusted: whether distances reflect what the bank shows; None finds out, see `sees`.
        own: settings that only one rule knows, such as `sld.Sld`.

    Raises:
        ValueError: banks of different shapes, or none of a kind that the settings ask for.
    """

    bank: Bank | None
    retain: Bank | None = None
    reference: Bank | None = None
    settings: Settings = Settings()
    semantic: Callable[[Tensor, Tensor], Tensor] | None = None
    root: Tensor | None = None
    whole: "BankView | None" = None
    trusted: bool | None = None
    own: object = None

    def __post_init__(self):
        weight = self.settings.weight
        for weights, bank, name in ((("evidence", "reference"), self.reference, "reference"), (("retain",), self.retain, "retain")):
            if weight in weights and bank is None:
                raise ValueError(f"weight {weight!r} needs a {name} bank; connect one or choose weight 'auto'")
            if bank is not None and self.bank is not None and bank.latents.shape[1:] != self.bank.latents.shape[1:]:
                raise ValueError(f"{name} bank latents are {tuple(bank.latents.shape[1:])} but the negation bank's are "
                                 f"{tuple(self.bank.latents.shape[1:])}; build both with the same VAE at the same size")
        if weight in ("ratio_beta", "gaussian") and self.other is None:
            raise ValueError(f"weight {weight!r} needs a reference bank or a retain bank; connect one or choose weight 'auto'")
        if self.semantic is not None and self.retain is None:
            raise ValueError("the semantic posterior needs a retain bank, towards which to steer; connect one")

        for name in ("bank", "retain", "reference"):
            if (one := getattr(self, name)) is not None and precision(self) == torch.float64 != one.latents.dtype:
                object.__setattr__(self, name, one.to(dtype=torch.float64))

    @property
    def other(self) -> Bank | None:
        """What the bank is compared with: the model's own samples, else the pictures to keep."""
        return self.reference or self.retain

    @property
    def comparable(self) -> bool:
        """Whether there is another bank, with which windows can be compared."""
        return None not in (self.bank, self.other) and self.semantic is None and self.bank.latents.ndim > 2

    @cached_property
    def densities(self) -> Densities:
        """The bank's kernels, whose width and temperature all banks share; inside a mask the width, a length per element, stays."""
        width = self.settings.bandwidth
        if width is None and self.whole is not None:
            width = self.whole.densities.bandwidth
        return Densities(self.bank, width, self.settings.temperature, self.root)

    @cached_property
    def gaussians(self) -> tuple[Gaussian, Gaussian] | None:
        """The bank and the other as Gaussians; None where there are not two, or one whose items do not differ."""
        both = [bank and fit(bank) for bank in (self.bank, self.other)]
        return tuple(both) if all(both) else None

    @cached_property
    def latents(self) -> Tensor | LazyLatents:
        """The bank flat (N, D) in fp32 or better, for a method that looks at every item; in its file where it is there."""
        stored, dtype = self.bank.latents, torch.promote_types(self.bank.latents.dtype, torch.float32)
        return stored.map(lambda y: y.flatten(1).to(dtype)) if isinstance(stored, LazyLatents) else stored.flatten(1).to(dtype)

    @cached_property
    def neighbour_distance(self) -> float:
        """Median distance of a bank item to its nearest neighbour; for a bank of one item, its norm."""
        if len(self.latents) == 1:
            return float(self.latents[:].norm())
        return self.bank.recall("neighbour distance", lambda: between_neighbours(self.latents))

    @property
    def radius(self) -> float:
        """Radius of the shield around each item of the bank: as given, else `neighbour_distance`."""
        return self.neighbour_distance if self.settings.radius is None else self.settings.radius

    @cached_property
    def sees(self) -> bool:
        """Whether distances separate the bank from the other bank, see `separability.tells_apart`: else its kernel means point nowhere."""
        if self.trusted is not None:
            return self.trusted
        if self.whole is not None:
            return self.whole.sees
        return self.bank is not None and self.other is not None and tells_apart(self.bank, self.other)

    def masked(self, mask: Tensor) -> "BankView":
        """The same inside a mask m (D,) in [0, 1]: every |x - y|^2 becomes sum m (x - y)^2 = |root x - root y|^2 with root = sqrt(m), so
        that each method works unchanged on predictions and banks multiplied by root.
        """
        stored = self.bank.latents if self.bank else mask
        root = mask.to(torch.promote_types(stored.dtype, torch.float32)).sqrt()
        banks = (one and one.masked(root) for one in (self.bank, self.retain, self.reference))
        return BankView(*banks, self.settings, root=root, whole=self, own=self.own)

    def by_parts(self, parts: int | None) -> list[tuple[tuple, "BankView"]]:
        """Each window of 1 / parts of each side, and the view of the crops there that show the unwanted thing; [] where pictures are
        compared as a whole. None: as many as tell the bank from the other best, see `windows.choose`.
        """
        if not self.comparable:
            return []
        count, *found = self.bank.recall(f"parts {parts} beside {self.other.fingerprint}", lambda: choose(self.bank, self.other, parts))
        if not found:
            return []
        places, given = windows(self.bank.latents.shape[1:], count), self.settings
        prior, evidence = given.tuned("evidence" if self.reference and given.weight != "retain" else "retain", TUNED_PARTS)
        shown = self.bank.crops(places, found[0])
        width = Densities(shown, given.bandwidth, given.temperature)
        settings = replace(given, prior=prior, evidence=evidence, bandwidth=width.bandwidth, temperature=width.temperature)

        def at(place):
            others = (one and one.map(lambda y: y[place]) for one in (self.retain, self.reference))
            return BankView(shown, *others, settings, trusted=True, own=self.own)

        return [(place, at(place)) for place in places]
