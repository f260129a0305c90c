"""Semantic Surgery in the space of each text encoder of a CLIP."""
import torch

from ...safe_denoiser.words.alarm import Alarm
from ...safe_denoiser.words.surgery import concept_scores, surgery
from ..models.text_encoders import Encoded
from .guard import Guard


class Surgery(Guard):
    """Semantic Surgery in the space of each encoder. What one of them hears is taken out of all. Ours: the pooled vectors too, and the
    thresholds, by the harmless prompts of this encoder.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.empty = self.parts(self.encoders.empty)
        each = [self.parts(self.short(text)) for text in self.concepts]
        for name, part in self.empty.items():
            if any(one[name].shape != part.shape for one in each):
                raise ValueError(f"method surgery compares a prompt with the empty one row by row, but the text encoder {name!r} makes as "
                                 f"many rows as a text has tokens; choose method safree")
        self.named = {name: torch.stack([one[name] for one in each]) for name in self.empty}  # (K, L, E)

    def parts(self, tokens: dict, encoded: Encoded | None = None) -> dict[str, torch.Tensor]:
        """What each encoder made of a text, (rows, E) by its name."""
        encoded = self.encoders.encode(tokens) if encoded is None else encoded
        return {name: box.of(*encoded) for name, box in self.encoders.boxes(tokens).items()}

    def scores(self, tokens: dict, encoded: Encoded) -> torch.Tensor:
        return self.scores_of(self.parts(tokens, encoded))

    def scores_of(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """(S, K); of several chunks, the most; a conditioning may lack the pooled vector, which then tells nothing."""
        found = []
        for name, empty in self.empty.items():
            part, concepts = parts.get(name), self.named[name]
            chunks = () if part is None else part.split(len(empty)) if len(part) % len(empty) == 0 else [part]
            each = [concept_scores(chunk, fit(empty, len(chunk)), fit(concepts, len(chunk))) for chunk in chunks]
            found.append(torch.stack(each).amax(0) if each else torch.full((len(concepts),), -torch.inf))
        return torch.stack(found)

    def joined(self, chosen: list[int]) -> dict[str, torch.Tensor]:
        """phi of these concepts, joined; as many as fit into one chunk."""
        text = self.concepts[chosen[0]]
        for i in chosen[1:]:
            longer = f"{text}, {self.concepts[i]}"
            if all(len(self.encoders.clip.tokenize(longer)[key]) == 1 for key in self.encoders.keys):
                text = longer
        found = self.parts(self.short(text))
        return {name: part if part.shape == self.empty[name].shape else self.named[name][chosen[0]] for name, part in found.items()}

    def boxes(self, tokens: dict | None, cond: torch.Tensor) -> dict:
        """The parts of a conditioning; of one that somebody else made, as many times those of the empty text as it has rows."""
        if tokens is not None:
            return self.encoders.boxes(tokens)
        found = self.encoders.boxes(self.encoders.empty)
        rows = max(box.rows.stop for box in found.values() if box.rows)
        times, rest = divmod(len(cond), rows)
        if rest or any(box.columns.stop > cond.shape[1] for box in found.values() if box.rows):
            raise ValueError(f"conditioning is {tuple(cond.shape)} and this CLIP makes {rows} rows of an empty text; connect the CLIP that "
                             f"made it, or write the text here instead")
        return {name: box if box.rows is None else type(box)(slice(times * box.rows.start, times * box.rows.stop), box.columns)
                for name, box in found.items()}

    def guard(self, entries: list, tokens: dict | None, rate: float, strength: float) -> tuple[list, str]:
        alarm, done, found, most = Alarm.of(self.harmless, rate), [], {}, 0.0
        for cond, extra in entries:
            cond, pooled = cond.clone(), extra.get("pooled_output")
            pooled = None if pooled is None else pooled.clone()
            for row in range(len(cond)):
                encoded = cond[row], None if pooled is None else pooled[min(row, len(pooled) - 1)]
                said, rho = self._operated(encoded, self.boxes(tokens, cond[row]), alarm, strength)
                found, most = {**found, **said}, max(most, rho)
            done.append([cond, extra if pooled is None else {**extra, "pooled_output": pooled}])
        lines = [f"{concept}: {line}" for concept, line in found.items()]
        if not most:
            return entries, "\n".join(["unchanged: nothing found", *lines])
        return done, "\n".join([f"changed: {len(found)} of {len(self.concepts)} concepts found and taken out, rho {most:.2f}", *lines])

    def _operated(self, encoded: Encoded, boxes: dict, alarm: Alarm, strength: float) -> tuple[dict[str, str], float]:
        """Change one prompt in place: what was found of each concept, or how near the nearest came, and rho, 0 where nothing was."""
        boxes = {name: box for name, box in boxes.items() if name in self.empty and (box.rows is not None or encoded[1] is not None)}
        parts = {name: box.of(*encoded).float().cpu() for name, box in boxes.items()}
        scores = self.scores_of(parts).flatten()
        beyond, share = (f(scores).view(len(self.empty), -1) for f in (alarm.beyond, alarm.share))
        most, where = beyond.max(0)
        chosen = [i for i in most.argsort(descending=True).tolist() if most[i] > 0]
        said = {self.concepts[i]: f"{most[i]:+.1f} standard deviations beyond the threshold, in {[*self.empty][where[i]]}"
                for i in chosen or [int(most.argmax())]}
        if not chosen:
            return said, 0.0
        rho, joined = strength * float(share.max()), self.joined(chosen)
        for name, box in boxes.items():
            part = parts[name]
            box.put(*encoded, surgery(part, fit(self.empty[name], len(part)), fit(joined[name], len(part)), rho))
        return said, rho


def fit(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (..., L, E) for a text of another length: repeated for each chunk, or the last, padding, for what follows."""
    own = rows.shape[-2]
    if length % own == 0:
        return torch.cat([rows] * (length // own), -2)
    return torch.cat([rows, rows[..., -1:, :].expand(*rows.shape[:-2], max(0, length - own), -1)], -2)[..., :length, :]
