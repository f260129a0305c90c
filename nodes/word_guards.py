"""Guards of prompts: Semantic Surgery and SAFREE in the space of each text encoder of a CLIP, told by harmless prompts."""
import copy
from collections import OrderedDict
from pathlib import Path

import torch

from ..safe_denoiser import guards
from ..safe_denoiser.meaning import lines_of
from .encoders import Encoded, Encoders, left_out
from .fingerprint import fingerprint
from .live import progress

REMEMBERED = 8  # guards that are kept: rows of some concepts, and how harmless prompts score
_known: OrderedDict[str, "Guard"] = OrderedDict()


def harmless() -> list[str]:
    """Prompts that ask for nothing that anybody would keep out."""
    return lines_of(Path(guards.__file__).with_name("harmless.txt").read_text(encoding="utf-8"))


class Guard:
    """What both methods share: the concepts in the space of each encoder, and how harmless prompts score there.

    Args:
        encoders: of the CLIP. concepts: what is looked for. names: they are names of persons.
    """

    def __init__(self, encoders: Encoders, concepts: list[str], names: bool = False):
        self.encoders, self.concepts, self.names = encoders, concepts, names
        self.harmless: torch.Tensor | None = None  # their scores, (N, S K)

    @classmethod
    def of(cls, clip, concepts: list[str], names: bool) -> "Guard":
        """One that may have been used before: to look at the harmless prompts costs an encoding each. What is kept holds no CLIP."""
        key = fingerprint(cls.__name__, clip.patcher, clip.layer_idx, clip.tokenizer_options, concepts, names)
        if key not in _known:
            new = cls(Encoders(clip), concepts, names)
            new.harmless = new.measured()
            _known[key] = new.with_clip(None)
        _known.move_to_end(key)
        while len(_known) > REMEMBERED:
            _known.popitem(last=False)
        return _known[key].with_clip(clip)

    def with_clip(self, clip) -> "Guard":
        other = copy.copy(self)
        other.encoders = copy.copy(self.encoders)
        other.encoders.clip = clip
        return other

    def short(self, text: str) -> dict:
        """Tokens of a concept."""
        tokens = self.encoders.clip.tokenize(text)
        for key in self.encoders.keys:
            if len(tokens[key]) > 1:
                raise ValueError(f"concept {text[:40]!r} is too long for the text encoder {key!r}; say it in fewer words, one per line")
        return tokens

    def scores(self, tokens: dict, encoded: Encoded) -> torch.Tensor:
        """How much a prompt has of the concepts, in each space, (S, K)."""
        raise NotImplementedError

    def measured(self) -> torch.Tensor:
        """The scores of the harmless prompts, (N, S K)."""
        prompts, rows, tell = harmless(), [], progress()
        for text in prompts:
            tokens = self.encoders.clip.tokenize(text)
            rows.append(self.scores(tokens, self.encoders.encode(tokens)).flatten())
            tell(len(rows), len(prompts))
        return torch.stack(rows)

    def guard(self, entries: list, tokens: dict | None, rate: float, strength: float) -> tuple[list, str]:
        """The conditioning without what is found, and what that was.

        Args:
            entries: CONDITIONING. tokens: of its text; None where somebody else made it.
            rate: of false alarms. strength: how much of it is taken out.
        """
        raise NotImplementedError


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
            each = [guards.concept_scores(chunk, fit(empty, len(chunk)), fit(concepts, len(chunk))) for chunk in chunks]
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
        alarm, done, found, most = guards.Alarm.of(self.harmless, rate), [], {}, 0.0
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

    def _operated(self, encoded: Encoded, boxes: dict, alarm: guards.Alarm, strength: float) -> tuple[dict[str, str], float]:
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
            box.put(*encoded, guards.surgery(part, fit(self.empty[name], len(part)), fit(joined[name], len(part)), rho))
        return said, rho


def fit(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (..., L, E) for a text of another length: repeated for each chunk, or the last, padding, for what follows."""
    own = rows.shape[-2]
    if length % own == 0:
        return torch.cat([rows] * (length // own), -2)
    return torch.cat([rows, rows[..., -1:, :].expand(*rows.shape[:-2], max(0, length - own), -1)], -2)[..., :length, :]


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
        self.spans = {key: guards.span(named) for key, named in self.named.items()}

    def vectors(self, tokens: dict, encoded: Encoded) -> dict[str, torch.Tensor]:
        """The pooled vector of each chunk in each space that has rows, (chunks, E)."""
        return {key: self.encoders.pooled(key, tokens, encoded) for key in self.encoders.boxes(tokens) if key in self.encoders.keys}

    def shares(self, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """|P_C p| / |p| of each chunk in each space, (chunks,)."""
        return {key: guards.onto(p, self.spans[key]).norm(dim=1) / p.norm(dim=1) for key, p in vectors.items()}

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
        beyond = guards.Alarm.of(self.harmless, rate).beyond(self.scores(tokens, encoded).flatten())
        said = f"{beyond.max():+.1f} standard deviations beyond the threshold, in {[*vectors][int(beyond.argmax())]}"
        if beyond.max() <= 0:
            return entries, f"unchanged: nothing found\n{said}"
        heard = {(key, int(share.argmax())) for key, share in self.shares(vectors).items()}  # the chunk that asks for it most
        rows, words, steps, dropped = self._filtered(tokens, encoded, vectors, heard)
        if not rows:
            return entries, f"unchanged: found, but no single token carries it; method surgery takes it out of all\n{said}"
        end = min(1.0, (steps + 1) / guards.SCHEDULE)
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
            d = guards.distances(torch.cat([without, whole[key][i:i + 1]]), named)
            flags = guards.flagged(d[:-1], d[-1])
            part = box.of(*encoded)
            places = [self.encoders.row(key, tokens, box, place, i) for place in range(start, stop)]
            attended = [*range(self.encoders.row(key, tokens, box, 0, i), min(len(part), places[-1] + 2))]  # with what begins and ends it
            projected = guards.safree(part[attended], without, named)
            for place, row, flag in zip(range(start, stop), places, flags.tolist()):
                if flag:
                    rows.append((box.rows.start + row, box.columns, projected[attended.index(row)]))
                    words.append(self.encoders.word(key, chunk[place][0]))
                    dropped[key] = [left_out(one, [place]) if k == i else one for k, one in enumerate(dropped[key])]
            if flags.any():
                steps = max(steps, guards.filter_steps(part[attended], projected, self.names))
        return rows, [*dict.fromkeys(words)], steps, dropped
