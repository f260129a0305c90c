"""Rule: answers a prediction with a correction. A new one is a subclass, and a name in `denoiser.METHODS`; what is around it need not be
told.
"""
from ..bank.bank import Bank
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .settings import Settings


class Rule:
    """Answers a prediction; a view of the banks is all that it knows, so that it works inside masks, in windows and on frames of videos.

    Args:
        distances: it measures distances, inside a mask therefore those inside it; else it works element by element.
        hears: it knows the unwanted condition.
    """

    distances, hears = True, False

    @classmethod
    def of(cls, view: BankView) -> "Rule":
        """The rule for these banks and settings."""
        return cls(view)

    @staticmethod
    def prepared(bank: Bank) -> Bank:
        """The negation bank as the rule wants it."""
        return bank

    @staticmethod
    def require(name: str, view: BankView) -> None:
        """Raise ValueError where the view lacks what the rule of this name needs."""
        if view.bank is None:
            raise ValueError(f"method {name!r} needs a negation bank; connect one, or choose method 'safe_denoiser' and weight 'auto'")

    @staticmethod
    def by_parts(settings: Settings) -> bool:
        """Whether it may be asked of windows, each beside the other bank's, and what it answers weighed by its `posterior`."""
        return True

    @staticmethod
    def whole(view: BankView, p: Prediction) -> bool:
        """Whether this prediction is judged as a whole all the same."""
        return False

    @staticmethod
    def gathers(view: BankView) -> bool:
        """Whether it wants to hear the unwanted condition before the window of the schedule opens, too."""
        return False

    def correct(self, p: Prediction, memory: dict) -> Correction:
        """The correction at strength 1; `memory` is what a run remembers of p's rows, and is changed."""
        raise NotImplementedError
