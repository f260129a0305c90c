"""Set-ups that are known to do little or to spoil pictures: named where they are seen, with what to do instead."""
from .denoiser import SafeDenoiser

FEW = 15  # pictures; as many were measured to help
NO_NEUTRAL = "weak set-up: at cfg 1 connect an empty prompt to neutral"


def weaknesses(denoiser: SafeDenoiser, by_words: bool) -> list[str]:
    """What makes a set-up weak, and what to do about it, in one line each.

    Args:
        denoiser: the settings, and the banks that are connected.
        by_words: whether an unwanted condition is connected.
    """
    found, method, bank = [], denoiser.method, denoiser.bank
    if method.startswith("official") and denoiser.strength >= 1:
        found.append(f"weak set-up: {method} was published with strength 0.33 and end 0.22")
    if method == "safe_denoiser" and denoiser.strength > 2:
        found.append("weak set-up: strength above 2 spoils pictures")
    if method == "safe_denoiser" and bank is not None:
        if not by_words and denoiser.retain is None and not denoiser.view.sees:
            found.append("weak set-up: these pictures alone do little; connect unwanted: words that name it, or what Learn Unwanted "
                         "Condition learns from them")
        if len(bank) < FEW:
            found.append(f"weak set-up: {len(bank)} negation picture{'s' * (len(bank) > 1)}; {FEW} or more are better")
    return found
