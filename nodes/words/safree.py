"""SAFREE in the space of each text encoder of a CLIP."""
import torch

from ...safe_denoiser.words.alarm import Alarm
from ...safe_denoiser.words.safree import SCHEDULE, distances, filter_steps, flagged, onto, safree, span
from ..models.text_encoders import Encoded, left_out
from .guard import Guard


class Safree(Guard):
    """SAFREE in the space of each encoder, chunk by chunk. Ours: harmless prompts, told by how much of the prompt's vector lies in the
    concepts' span, are left alone; pooled vectors become those of the prompt without the flagged tokens.
    """

    def __init__(self, *args):
        super().__init__(*args)
        each = []
        for text in self.concepts:
            tokens = self.short(text)
            each.append(self.vectors(tokens, self.encoders.encode(tokens)))
        self.named = {key: torch.cat([one[key] for one in each]) for key in each[0]}  # (M, E)
        self.spans = {key: span(named) for key, named in self.named.items()}

    def vectors(self, tokens: dict, encoded: Encoded) -> dict[str, torch.Tensor]:
        """The pooled vector of each chunk in each space that has rows, (chunks, E)."""
        return {key: self.encoders.pooled(key, tokens, encoded) for key in self.encoders.boxes(tokens) if key in self.encoders.keys}

    def shares(self, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """|P_C p| / |p| of each chunk in each space, (chunks,)."""
        return {key: onto(p, self.spans[key]).norm(dim=1) / p.norm(dim=1) for key, p in vectors.items()}

    def scores(self, tokens: dict, encoded: Encoded) -> torch.Tensor:
        """(S, 1), of several chunks the most."""
        return torch.stack([share.amax() for share in self.shares(self.vectors(tokens, encoded)).values()])[:, None]

    def without(self, tokens: dict, heard: set[tuple[str, int]]) -> dict[tuple[str, int], torch.Tensor]:
        """Of these encoders' chunks the vectors with each token left out in turn, (n, E); all encoders at a time."""
        places = {(key, i): range(*self.encoders.content(key, tokens[key][i])) for key, i in sorted(heard)}
        found = {where: [] for where in places}
        for i in sorted({i for _, i in heard}):
            here = {key: places[key, i] for key in self.named if (key, i) in places}
            for t in range(max(map(len, here.values()))):
                chunks = {key: left_out(tokens[key][i], [each[t]] if t < len(each) else []) for key, each in here.items()}
                variant = self.encoders.single(chunks)
                vectors = self.vectors(variant, self.encoders.encode(variant))
                for key, each in here.items():
                    found[key, i] += [vectors[key][0]] * (t < len(each))
        return {where: torch.stack(rows) for where, rows in found.items() if rows}

    def guard(self, entries: list, tokens: dict | None, rate: float, strength: float) -> tuple[list, str]:
        """With SAFREE's rows for the first part of the schedule, and its own after that."""
        if tokens is None:
            raise ValueError("method safree leaves out each token of a text in turn, and a conditioning has none; write the text here, or "
                             "choose method surgery")
        encoded = self.encoders.encode(tokens)
        vectors = self.vectors(tokens, encoded)
        beyond = Alarm.of(self.harmless, rate).beyond(self.scores(tokens, encoded).flatten())
        said = f"{beyond.max():+.1f} standard deviations beyond the threshold, in {[*vectors][int(beyond.argmax())]}"
        if beyond.max() <= 0:
            return entries, f"unchanged: nothing found\n{said}"
        heard = {(key, int(share.argmax())) for key, share in self.shares(vectors).items()}  # the chunk that asks for it most
        rows, words, steps, dropped = self._filtered(tokens, encoded, vectors, heard)
        if not rows:
            return entries, f"unchanged: found, but no single token carries it; method surgery takes it out of all\n{said}"
        end = min(1.0, (steps + 1) / SCHEDULE)
        pooled = self.encoders.encode(dropped)[1]
        done = []
        for cond, extra in entries:
            changed = cond.clone()
            for row, columns, value in rows:
                changed[0, row, columns] = torch.lerp(changed[0, row, columns].float().cpu(), value, strength).to(changed)
            more = {} if pooled is None or extra.get("pooled_output") is None else {"pooled_output": torch.lerp(
                extra["pooled_output"].float().cpu(), pooled[None], strength).to(extra["pooled_output"])}
            before, after = extra.get("start_percent", 0.0), extra.get("end_percent", 1.0)
            done += [[changed, {**extra, **more, "start_percent": before, "end_percent": min(after, max(before, end))}],
                     [cond, {**extra, "start_percent": max(before, min(after, end)), "end_percent": after}]]
        return done, f"changed: for the first {end:.0%} of the schedule, tokens {', '.join(words)}\n{said}"

    def _filtered(self, tokens: dict, encoded: Encoded, whole: dict, heard: set) -> tuple[list, list[str], int, dict]:
        """Rows to be replaced (row, columns, value), the words of their tokens, SAFREE's number of steps, and the text without them."""
        rows, words, steps, dropped = [], [], 0, dict(tokens)
        for (key, i), without in self.without(tokens, heard).items():
            box, named, chunk = self.encoders.boxes(tokens)[key], self.named[key], tokens[key][i]
            start, stop = self.encoders.content(key, chunk)
            d = distances(torch.cat([without, whole[key][i:i + 1]]), named)
            flags = flagged(d[:-1], d[-1])
            part = box.of(*encoded)
            places = [self.encoders.row(key, tokens, box, place, i) for place in range(start, stop)]
            attended = [*range(self.encoders.row(key, tokens, box, 0, i), min(len(part), places[-1] + 2))]  # with what begins and ends it
            projected = safree(part[attended], without, named)
            for place, row, flag in zip(range(start, stop), places, flags.tolist()):
                if flag:
                    rows.append((box.rows.start + row, box.columns, projected[attended.index(row)]))
                    words.append(self.encoders.word(key, chunk[place][0]))
                    dropped[key] = [left_out(one, [place]) if k == i else one for k, one in enumerate(dropped[key])]
            if flags.any():
                steps = max(steps, filter_steps(part[attended], projected, self.names))
        return rows, [*dict.fromkeys(words)], steps, dropped
