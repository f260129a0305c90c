"""Does `unwanted` mean the pictures of the bank beside it? Measured a little after each run, and said in the report and on the node."""
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import comfy.model_management
import torch

from ...safe_denoiser.condition.gain import CHECKED, Check, Gain, Probe, together
from ..fingerprint import fingerprint, fingerprint_weights
from ..models.model_calls import Asked
from .conditions import KEY
from .separate_calls import PATCHED
from .witness import Witness

SHARE = 0.05  # of the time of runs: what all checks together may take
PICTURES, ENOUGH, AT_ONCE = 64, 16, 4  # of each bank, at most; how many are needed before anything is said; in one model call
KEPT = 64  # results that are remembered
NOT_MEANT = ("no", "broadly")
UNCHECKED = "whether the unwanted condition explains your pictures is not checked: "


@dataclass
class Found:
    """What is known so far of one model, condition and banks: gains by the name of the bank, and the seconds that may still be spent."""

    gains: dict[str, Gain] = field(default_factory=dict)
    seconds: float = 0.0
    each: float = 0.0  # seconds that a picture took lately, 0: not known
    said: bool = False

    @property
    def check(self) -> Check | None:
        """The verdict; None: not enough is known yet."""
        if any(len(gain.by_picture) < ENOUGH for gain in self.gains.values()) or "bank" not in self.gains:
            return None
        return Check(self.gains["bank"], next((gain for name, gain in self.gains.items() if name != "bank"), None))


_found: OrderedDict[str, Found] = OrderedDict()


class ConditionCheck:
    """The check of one patched model's unwanted condition.

    Args:
        given: CONDITIONING by name: unwanted, and perhaps neutral. banks: by name: bank, and perhaps reference and retain.
    """

    def __init__(self, given: dict[str, list], banks: dict):
        self.given, self.key, self.broken = given, None, ""
        self.names = ["bank", *[name for name in ("reference", "retain") if name in banks][:1]]
        self.about = [*given.values(), *(banks[name].fingerprint for name in self.names)]

    def found(self, patcher) -> Found:
        if self.key is None:
            self.key = fingerprint(fingerprint_weights(patcher), patcher.patches, *self.about)
        found = _found[self.key] = _found.pop(self.key, None) or Found()
        while len(_found) > KEPT:
            _found.popitem(last=False)
        return found

    def after(self, seconds: float, guider, model_options: dict, held: dict, device: torch.device) -> str:
        """Go on with the check after a run that took `seconds`, and say what is known. The run's pictures are done by then, and stay.

        Args:
            held: banks in the run's form, by name.
        """
        if Witness.apart(guider) == PATCHED:
            return UNCHECKED + "another pack's node patches the network itself"
        if few := [name for name in self.names if len(held[name].bank) < ENOUGH]:
            return f"{UNCHECKED}{ENOUGH} pictures are needed, and the {few[0]} has {len(held[few[0]].bank)}"
        if self.broken:
            return self.broken
        try:
            began = time.monotonic()
            found = self.found(guider.model_patcher)
            found.seconds += SHARE * seconds
            found.seconds -= time.monotonic() - began
            neutral = self._neutral(guider)
            if neutral is None:
                return UNCHECKED + "connect neutral, an empty prompt"
            self._go_on(found, neutral, guider, model_options, held, device, seconds)
            return self._told(found)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # a check must not cost anybody a picture
            logging.warning("safe denoiser: the unwanted condition could not be checked", exc_info=True)
            self.broken = f"the unwanted condition could not be checked ({type(error).__name__}: {error})"
            return self.broken

    def _neutral(self, guider) -> list[dict] | None:
        if "neutral" in self.given:
            return guider.model_options[KEY].given[id(self.given["neutral"])]
        return getattr(guider, "original_conds", {}).get("negative") or None

    def _go_on(self, found: Found, neutral: list[dict], guider, model_options: dict, held: dict, device, run: float) -> None:
        unwanted = guider.model_options[KEY].given[id(self.given["unwanted"])]
        asked = Asked(guider, model_options, lambda one: one, device)
        while True:
            counts = {name: len(found.gains[name].by_picture) if name in found.gains else 0 for name in self.names}
            left = {name: min(PICTURES, len(held[name].bank)) - count for name, count in counts.items()}
            name = min((name for name in self.names if left[name] > 0), key=counts.get, default=None)
            each = found.each or max(run / 10, 1e-3)  # the first picture: as long as two or three steps of a run of twenty
            count = min(AT_ONCE, left[name], int(found.seconds / each)) if name else 0
            if count <= 0:
                return
            began = time.monotonic()
            rows = torch.linspace(0, len(held[name].bank) - 1, min(PICTURES, len(held[name].bank))).long()
            y = held[name].bank.latents[rows[counts[name]:counts[name] + count]].to(device, torch.float32)
            gain = Probe(asked, y, neutral, CHECKED, batch=AT_ONCE, seed=counts[name]).gain(unwanted)
            gain = Gain(*(value.double().cpu() for value in gain.tensors.values()))
            found.gains[name] = together([found.gains[name], gain]) if name in found.gains else gain
            took = time.monotonic() - began
            found.seconds, found.each = found.seconds - took, took / count

    def _told(self, found: Found) -> str:
        check = found.check
        if check is None:
            return ""
        if check.kind in NOT_MEANT and not found.said:
            logging.warning("safe denoiser: %s", check.sentence)
        found.said = True
        return check.sentence
