"""Rule: answers a prediction with a correction. A new one is a subclass with a name in `denoiser.METHODS`; nothing else has to know it."""
from ..bank.bank import Bank
from ..prediction import Correction, Prediction
from .bank_view import BankView
from .settings import Settings

NO_BANK = "steers by a negation bank, and none is connected; connect negation_bank, or choose method 'safe_denoiser' and weight 'auto'"


class Rule:
    """Answers a prediction; a view of the banks is all that it knows, so that it works inside masks, in windows and on frames of videos.

    Args:
        distances: it measures distances, so that a mask changes them; otherwise it works element by element.
        hears: it knows the unwanted condition.
        neutral: it compares that with a neutral prediction, and does less without one.
        guided: it is defined only where there is guidance.
    """

    distances, hears, neutral, guided = True, False, False, False

    @classmethod
    def of(cls, view: BankView) -> "Rule":
        """The rule for these banks and settings."""
        return cls(view)

    @staticmethod
    def prepared(bank: Bank) -> Bank:
        """The negation bank as the rule wants it."""
        return bank

    @staticmethod
    def require(name: str, bank: Bank | None, settings: Settings) -> None:
        """Raise ValueError where the rule of this name needs a negation bank, and there is none."""
        if bank is None:
            raise ValueError(f"method {name!r} {NO_BANK}")

    @staticmethod
    def require_unwanted(weight: str) -> None:
        """Raise ValueError where the rule steers by an unwanted condition alone; asked where none is connected."""

    @staticmethod
    def by_parts(settings: Settings) -> bool:
        """Whether windows may be corrected one by one, each compared with the other bank's, and averaged by `posterior`."""
        return True

    @staticmethod
    def whole(view: BankView, p: Prediction) -> bool:
        """Whether this prediction is corrected as a whole even where there are windows."""
        return False

    @staticmethod
    def gathers(view: BankView) -> bool:
        """Whether it wants to hear the unwanted condition before the window of the schedule opens, too."""
        return False

    def correct(self, p: Prediction, memory: dict) -> Correction:
        """The correction at strength 1; `memory` is what a run remembers of p's rows, and is changed."""
        raise NotImplementedError
