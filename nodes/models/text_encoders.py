"""The text encoders of a CLIP, each in a space of its own: which part of a CONDITIONING it wrote, found by asking it.

Nothing here knows a model: a part of the conditioning belongs to the encoder whose tokens change it.
"""
from dataclasses import dataclass
from functools import cached_property

import torch

OTHER = 5  # a token that is nowhere in a text: one odd character, or none, in every vocabulary
NOTHING = 0  # the token that takes the place of one that is left out, as in SAFREE
Encoded = tuple[torch.Tensor, torch.Tensor | None]  # cond (R, C) and the pooled vector (C,)


def encoded(clip, text: str) -> list:
    """CONDITIONING, as CLIP Text Encode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@dataclass(frozen=True)
class Box:
    """A part of a conditioning: rows and columns of it, or columns of the pooled vector."""

    rows: slice | None
    columns: slice

    def of(self, cond: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
        """(rows, columns); (1, columns) of the pooled vector."""
        return pooled[None, self.columns] if self.rows is None else cond[self.rows, self.columns]

    def put(self, cond: torch.Tensor, pooled: torch.Tensor | None, value: torch.Tensor) -> None:
        """Write it, in place."""
        if self.rows is None:
            pooled[self.columns] = value[0].to(pooled)
        else:
            cond[self.rows, self.columns] = value.to(cond)


def _changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (after - before).abs() > 1e-6 * before.abs().amax().clamp_min(1e-12)


def _range(hits: torch.Tensor) -> slice:
    found = hits.nonzero()[:, 0].tolist()
    return slice(found[0], found[-1] + 1)


def _plain(token):
    """A token that can be compared: an id, or which embedding it is."""
    return token if isinstance(token, int) else id(token)


class Encoders:
    """What a CLIP makes of texts.

    Args:
        clip: ComfyUI's CLIP.
    """

    def __init__(self, clip):
        self.clip, self.empty = clip, clip.tokenize("")
        self.keys = [key for key, chunks in self.empty.items() if isinstance(chunks, list) and chunks and isinstance(chunks[0], list)]
        self.known: dict[tuple, dict[str, Box]] = {}  # by the shape of tokens

    def encode(self, tokens: dict) -> Encoded:
        """In single precision, on the CPU."""
        return self._all(tokens)[0]

    def _all(self, tokens: dict) -> tuple[Encoded, list[torch.Tensor]]:
        """The same, and what else an encoder makes of the text for the model (HiDream: rows of each layer)."""
        found = self.clip.encode_from_tokens(tokens, return_dict=True)
        pooled = found.get("pooled_output")
        more = [one.float().cpu() for name, one in found.items() if name != "cond" and isinstance(one, torch.Tensor) and one.ndim > 2]
        return (found["cond"][0].float().cpu(), None if pooled is None else pooled[0].float().cpu()), more

    def boxes(self, tokens: dict) -> dict[str, Box]:
        """The part of each encoder, by its name, and of its pooled vector, by "name, pooled"; of tokens of this shape.

        Raises:
            ValueError: an encoder whose part cannot be told.
        """
        shape = tuple(tuple(len(chunk) for chunk in tokens[key]) for key in self.keys)
        if shape not in self.known:
            self.known[shape] = self._found(tokens)
        return self.known[shape]

    def _found(self, tokens: dict) -> dict[str, Box]:
        (cond, pooled), more = self._all(tokens)
        found = {}
        for key in self.keys:
            if len(self.keys) == 1:
                *others, = (None if y is None else torch.full_like(y, torch.inf) for y in (cond, pooled))
                else_where = [torch.full_like(y, torch.inf) for y in more]
            else:
                others, else_where = self._all({**tokens, key: [[(OTHER, 1.0)] * len(chunk) for chunk in tokens[key]]})
            if others[0].shape != cond.shape or any(a.shape != b.shape or _changed(a, b).any() for a, b in zip(more, else_where)):
                raise ValueError(f"which part of the conditioning comes from the text encoder {key!r} cannot be told; Guard Prompt does "
                                 f"not know this kind of CLIP, so use Guard Model (SLD) or Apply Safe Denoiser with an unwanted condition")
            if (hits := _changed(cond, others[0])).any():
                found[key] = Box(_range(hits.any(1)), _range(hits.any(0)))
            if pooled is not None and (hits := _changed(pooled, others[1])).any():
                found[f"{key}, pooled"] = Box(None, _range(hits))
        return found

    def content(self, key: str, chunk: list) -> tuple[int, int]:
        """Where in a chunk the text itself stands, from and to: between what the empty text begins with and what it ends with."""
        ids, empty = ([_plain(token[0]) for token in one] for one in (chunk, self.empty[key][0]))
        start = next((i for i, (a, b) in enumerate(zip(ids, empty)) if a != b), min(len(ids), len(empty)))
        tail = empty[start:]
        return start, next((j for j in range(start, len(ids)) if ids[j:] == tail[:len(ids) - j]), len(ids))

    def single(self, chunks: dict[str, list]) -> dict:
        """Tokens of one chunk: those that are given, without weights, and the empty text for the other encoders."""
        return {**self.empty, **{key: [[(token[0], 1.0) for token in chunk]] for key, chunk in chunks.items()}}

    @cached_property
    def causal(self) -> set[str]:
        """The encoders whose rows do not depend on the tokens after them."""
        tokens = self.clip.tokenize("a photo of a cat")
        before, found = self.encode(tokens)[0], set()
        for key, box in self.boxes(tokens).items():
            if key in self.keys:
                start, stop = self.content(key, tokens[key][0])
                after = self.encode({**tokens, key: [left_out(tokens[key][0], [stop - 1])]})[0]
                row = self.row(key, tokens, box, start)
                if not _changed(before, after)[box.rows, box.columns][row].any():
                    found.add(key)
        return found

    def row(self, key: str, tokens: dict, box: Box, place: int, chunk: int = 0) -> int:
        """The row of the box that stands for a token: encoders may drop rows before the text, those of a template."""
        each = (box.rows.stop - box.rows.start) // len(tokens[key])
        return chunk * each + max(0, min(each - 1, place - (len(tokens[key][chunk]) - each)))

    def pooled(self, key: str, tokens: dict, encoded: Encoded) -> torch.Tensor:
        """One vector for each chunk of a text, (chunks, E), in the space of its rows: of causal encoders the row after the text (the end
        token), which has seen all of it, as in CLIP and SAFREE; else the mean of its rows (arXiv:2108.08877).
        """
        box, found = self.boxes(tokens)[key], []
        part = box.of(*encoded)
        for i, chunk in enumerate(tokens[key]):
            start, stop = self.content(key, chunk)
            first, after = (self.row(key, tokens, box, place, i) for place in (start, stop))
            found.append(part[after] if key in self.causal or after <= first else part[first:after].mean(0))
        return torch.stack(found)

    def word(self, key: str, token) -> str:
        """A token as text, as far as its tokenizer tells."""
        tokenizer = getattr(self.clip.tokenizer, f"clip_{key}", None) or getattr(self.clip.tokenizer, key, None)
        words = getattr(tokenizer, "inv_vocab", {})
        return words.get(token, "embedding" if not isinstance(token, int) else f"token {token}").replace("</w>", "").replace("\u2581", "")


def left_out(chunk: list, places: list[int]) -> list:
    """A chunk with these tokens replaced."""
    return [(NOTHING, *token[1:]) if i in places else token for i, token in enumerate(chunk)]
