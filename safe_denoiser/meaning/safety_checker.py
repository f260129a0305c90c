"""A check of finished pictures: those that are too like a negation set are blocked, and may be replaced by others."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pictures.files import blur
from .clip import BATCH, Clip
from .likeness import likeness


@dataclass(frozen=True, eq=False)
class Checked:
    """Pictures that were compared with a negation set.

    Args:
        pictures: (B, H, W, 3) in [0, 1].
        blocked: which of them must not be shown (B,), bool.
        covered: the same pictures with the blocked ones made unrecognisable.
        lines: what was found, one line per picture.
    """

    pictures: Tensor
    blocked: Tensor
    covered: Tensor
    lines: tuple[str, ...]

    def filled(self, again: "Checked") -> "Checked":
        """The same with the blocked pictures replaced, in order, by those of `again`, of which some may be blocked, too.

        Raises:
            ValueError: not as many new pictures as there are blocked ones, or of another size.
        """
        rows = self.blocked.nonzero()[:, 0]
        if len(again.pictures) != len(rows) or again.pictures.shape[1:] != self.pictures.shape[1:]:
            raise ValueError(f"{len(rows)} pictures of {tuple(self.pictures.shape[1:])} are blocked, but {len(again.pictures)} of "
                             f"{tuple(again.pictures.shape[1:])} came again; sample from the output `again` of this check")
        lines = list(self.lines)
        for row, line in zip(rows.tolist(), again.lines):
            lines[row] += f"; again: {line}"
        return Checked(*(old.index_copy(0, rows, new.to(old)) for old, new in (
            (self.pictures, again.pictures), (self.blocked, again.blocked), (self.covered, again.covered))), tuple(lines))

    @property
    def report(self) -> str:
        """Counts, and one line per picture."""
        refused = int(self.blocked.sum())
        return "\n".join([f"{len(self.lines) - refused} passed, {refused} refused",
                          *(f"image {i}: {line}" for i, line in enumerate(self.lines))])


def check(clip: Clip, pictures: Tensor, unsafe: Tensor, names: Sequence[str], threshold: float, black: bool = False,
          retain: Tensor | None = None) -> Checked:
    """Block each picture whose `likeness` to the negation set exceeds `threshold`, or cannot be computed.

    Args:
        pictures: (B, H, W, 3) in [0, 1].
        unsafe: embeddings of the negation set (N, E). names: of its pictures. retain: embeddings of pictures that must pass (M, E).
        black: cover what is blocked with black; else it is blurred.
    """
    embedded = [clip.pixels(part).cpu() for part in pictures.split(BATCH)] if len(pictures) else [unsafe[:0]]
    found, row = likeness(torch.cat(embedded), unsafe, retain)
    broken = ~pictures.flatten(1).isfinite().all(1).cpu() if len(pictures) else found.isnan()
    blocked = broken | ~(found <= threshold)  # NaN is not
    covered = pictures.clone()
    for i in blocked.nonzero()[:, 0].tolist():
        covered[i] = 0 if black or broken[i] else blur(pictures[i].float())
    lines = [f"blocked: looks like {names[n]} (score {s:.2f}, limit {threshold:.2f})" if stop else
             f"passed (score {s:.2f}, limit {threshold:.2f})" for stop, s, n in zip(blocked, found.tolist(), row)]
    for i in (broken | found.isnan()).nonzero()[:, 0].tolist():
        what = "the picture holds NaN or infinity (VAE in too low a precision?)" if broken[i] else "the CLIP model gives NaN for it"
        lines[i] = f"blocked: nothing can be said of it, {what}"
    return Checked(pictures, blocked, covered, tuple(lines))
