"""What a rule may be told beside its banks: every setting, its range and its default, in one place."""
import math
from dataclasses import dataclass

WEIGHTS = ("auto", "evidence", "retain", "gate", "unconditional", "reference", "ratio_beta", "tracked", "triangle", "constant", "witness",
           "gaussian")
PUSHES = ("guided", "unconditional")
TUNED = {"evidence": (0.25, 3.0), "retain": (0.4, 3.0), "unconditional": (0.3, 1.5), "gaussian": (0.3, 3.0)}  # prior and evidence
TUNED_PARTS = {"evidence": (0.6, 10.0), "retain": (0.3, 10.0)}  # the same inside a window
PLAIN = (0.25, 0.0)  # the others are there for comparison, as published: no evidence
RANGES = {
    "prior": (1e-12, 1 - 1e-15), "evidence": (0, 1e6), "bandwidth": (0, 1e30), "temperature": (1e-6, 1e30),
    "posterior_max": (1e-12, 1 - 1e-15), "beta_max": (0, 1e6), "radius": (0, math.inf), "threshold": (0, math.inf)}


def require_ranges(settings, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError where one of these attributes lies outside its range; None is automatic."""
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:  # NaN is in no range
            raise ValueError(f"{name} is {value}; it lies between {least:g} and {most:g}")


def require_choice(name: str, value: str, choices) -> None:
    """Raise ValueError where a value is none of these."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class Settings:
    """The settings of the rules; None is automatic.

    Args:
        weight: how r or beta is found. "auto": witness, evidence, retain, unconditional or gate, the first for which there is what it
            needs; "gaussian", see `ByGaussians`, in place of evidence where `trusted` is not so.
            For comparison: "reference" (evidence 0), "ratio_beta" (the theorem as printed), "tracked", "triangle", "constant".
        prior: P(unsafe) among the model's own samples, in (0, 1); None takes the weight's own from TUNED.
        evidence: how much the prediction itself counts; 0 ignores it, None takes the weight's own from TUNED.
        bandwidth: kernel width h; None is 0.4 standard deviations of the bank (the published 3.15 for "official", the median
            distance of a bank item to its nearest neighbour for "sgf").
        temperature: T; None is calibrated on the bank by perplexity.
        posterior_max: ceiling of r, below 1. beta_max: ceiling of beta.
        radius: SPELL's shield radius, latent L2; None is the median distance of a bank item to its nearest neighbour.
        threshold: gate of "official".
        push: from where the beta forms push: the "guided" prediction, or the "unconditional" one (arXiv:2502.08011, Eq. 8).

    Raises:
        ValueError: an unknown weight or push, a number out of range.
    """

    weight: str = "auto"
    prior: float | None = None
    evidence: float | None = None
    bandwidth: float | None = None
    temperature: float | None = None
    posterior_max: float = 0.95
    beta_max: float = 4.0
    radius: float | None = None
    threshold: float = 1e-9
    push: str = "guided"

    def __post_init__(self):
        require_choice("weight", self.weight, WEIGHTS)
        require_choice("push", self.push, PUSHES)
        require_ranges(self, RANGES)

    def tuned(self, weight: str, tuned: dict[str, tuple[float, float]] = TUNED) -> tuple[float, float]:
        """prior and evidence: as given, else the weight's own."""
        given = self.prior, 0.0 if weight == "reference" else self.evidence
        return tuple(own if value is None else value for value, own in zip(given, tuned.get(weight, PLAIN)))
