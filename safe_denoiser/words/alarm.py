"""When a guard acts: scores of a prompt, measured against those of harmless prompts."""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..meaning.likeness import exceeded_by
from ..meaning.texts import lines_of


@dataclass(frozen=True)
class Alarm:
    """Scores of a prompt, compared with those of harmless prompts.

    Several scores of a prompt (one for each concept, in the space of each encoder) count in standard deviations of the harmless prompts',
    and of these the largest, so that one threshold keeps the false alarms of all together. Ours.

    Args:
        mean, spread: of each score among harmless prompts (K,). threshold: of the largest, in standard deviations.
    """

    mean: Tensor
    spread: Tensor
    threshold: float

    @classmethod
    def of(cls, scores: Tensor, rate: float) -> "Alarm":
        """The alarm that at most `rate` of prompts like these set off, by their scores (N, K), see `likeness.exceeded_by`."""
        mean, spread = scores.mean(0), scores.std(0).clamp_min(1e-6)
        return cls(mean, spread, exceeded_by(((scores - mean) / spread).amax(1), rate))

    def beyond(self, scores: Tensor) -> Tensor:
        """By how many standard deviations each score (..., K) exceeds the threshold; above 0 it is an alarm."""
        return (scores - self.mean) / self.spread - self.threshold

    def share(self, scores: Tensor) -> Tensor:
        """rho = sigmoid(2 beyond), (..., K): 1/2 at the threshold. Source: Semantic Surgery, arXiv:2510.22851, with b and gamma measured
        on harmless prompts, since the published ones (0.06 to 0.28, 0.02) are cosines of one encoder.
        """
        return torch.sigmoid(2 * self.beyond(scores))


def harmless() -> list[str]:
    """Prompts that ask for nothing that anybody would keep out."""
    return lines_of(Path(__file__).with_name("harmless.txt").read_text(encoding="utf-8"))
