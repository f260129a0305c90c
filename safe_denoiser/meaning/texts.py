"""Texts of one meaning per line, and how well pictures fit them."""
import torch
from torch import Tensor

from .clip import Clip


def text_scores(clip: Clip, embeddings: Tensor, text: str, against: str = "") -> Tensor:
    """How well pictures fit a text: the cosine, or with something to compare with, the probability.

        score = max_m cos(e, text_m),   or   sigmoid(scale (max_m cos(e, text_m) - max_m cos(e, against_m)))

    Source: CLIP, arXiv:2103.00020, section 3.1, with two classes.

    Args:
        embeddings: of the pictures (N, E).
        text, against: one meaning per line, of which the best counts; against "" compares with nothing.

    Returns:
        (N,), in [-1, 1], or in [0, 1] where `against` is given.
    """
    near = [(embeddings @ clip.texts(lines).T).amax(1) for lines in map(lines_of, (text, against)) if lines]
    return near[0] if len(near) == 1 else torch.sigmoid(clip.scale * (near[0] - near[1]))


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]
