"""What a run did, in words that need no explanation; the numbers are in the report."""
import numpy as np

from .prediction import Step

STEERED = 0.05  # of a picture's prediction: a correction that one can see. Measured on digits: 0.04 at most under harmless prompts


def _pictures(steered: int, count: int) -> str:
    return ("the picture" if count == 1 else "all pictures") if steered == count else f"{steered} of {count} pictures"


def during(step: Step, what: str = "") -> str:
    """What happens in one step, while the run is on; reads from the device.

    Args:
        what: must not come out, in the user's words; may be unknown.
    """
    steered, away = int((step.correction >= STEERED).sum()), f" away from {what}" if what else ""
    return f"steering {_pictures(steered, len(step.correction))}{away}" if steered else f"nothing to steer{away} in this step"


def afterwards(summary: dict[str, float], correction: np.ndarray, asked: bool, what: str = "", most: str = "") -> str:
    """What a finished run did; "" where there are no plain words for it.

    Args:
        summary: of the Report. correction: its values (calls, batch).
        asked: whether any prediction was compared with what must not come out.
        most: name of the picture of the bank that pushed most, if one did.
    """
    if not summary["model_calls"] or summary["fallbacks"]:
        return ""
    if not summary["corrected_calls"]:
        return "nothing was steered: no step lies between start and end"
    peak, far = np.nan_to_num(correction).max(0), f"the prompt does not come near {what or 'what must not come out'}"
    if steered := int((peak >= STEERED).sum()):
        return f"{_pictures(steered, len(peak))} steered away{f' from {what}' if what else ''}{f', most by {most}' if most else ''}"
    if summary["posterior"] < 0.01 and asked:
        return f"nothing was steered: {far}"
    if not summary["correction"]:
        return ""
    return f"next to nothing was steered: {far if summary['posterior'] < 0.5 else 'the corrections were too small to see'}"


def left(done: int, count: int, seconds: float) -> str:
    """How far a long job is, and how long it will take.

    >>> left(12, 100, 250), left(12, 100, 20), left(100, 100, 0)
    ('12 of 100, 4 min left', '12 of 100, 20 s left', '100 of 100')
    """
    time = f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
    return f"{done} of {count}" + (f", {time} left" if done < count else "")
