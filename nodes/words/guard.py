"""What both guards of prompts share: concepts in the space of each text encoder, and how harmless prompts score there."""
import copy
from collections import OrderedDict

import torch

from ...safe_denoiser import LatentCache
from ...safe_denoiser.words.alarm import harmless
from .. import folders
from ..fingerprint import fingerprint
from ..models.text_encoders import Encoded, Encoders
from ..progress import progress

KEPT = 1  # how scores are computed, in the keys of those that are kept on disk: another number where an encoding or a score changes
REMEMBERED = 8  # guards that are kept: rows of some concepts, and how harmless prompts score
_known: OrderedDict[str, "Guard"] = OrderedDict()


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
        """One that may have been used before: to look at the harmless prompts costs an encoding each, so that their scores are kept on disk
        too. What is kept holds no CLIP.
        """
        key = fingerprint(cls.__name__, clip.patcher, clip.layer_idx, clip.tokenizer_options, concepts, names)
        if key not in _known:
            new = cls(Encoders(clip), concepts, names)
            cache = LatentCache(folders.cache("guards"), fingerprint(KEPT, harmless()), folders.CACHE_LIMIT)
            path = cache.path(key, (), "harmless")
            new.harmless = cache.get(path)
            if new.harmless is None:
                new.harmless = new.measured()
                cache.put(path, new.harmless)
                cache.trim()
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
