"""SemanticPosterior: how likely a prediction is unsafe, by what CLIP sees in the decoded picture. Experimental."""
import math
from collections.abc import Callable

from torch import Tensor

from .clip import Clip


class SemanticPosterior:
    """log p_u - log p_retain of a prediction, by the embedding of the decoded picture; for `SafeDenoiser(semantic=...)`.

        log p_u(e) - log p_retain(e),   log p(e) = logsumexp_n(concentration <e, y_n>) - log N

    with e the embedding of the decoded prediction: the density ratio of arXiv:2502.08011, Thm 3.2, in CLIP's space, by von
    Mises-Fisher kernels. Ours. Decoding and embedding cost more than the rest, so the answer is carried over `every` - 1 calls.

    Args:
        clip: the model.
        decode: denoised latents (B, C, *spatial) -> pictures (B, H, W, 3) in [0, 1].
        unsafe, retain: embeddings of the pictures of both sets, (N, E).
        concentration: of the kernels; the higher, the fewer of the nearest pictures count.
        every: the picture is decoded and embedded at one in so many calls of a run.
    """

    def __init__(self, clip: Clip, decode: Callable[[Tensor], Tensor], unsafe: Tensor, retain: Tensor, concentration: float = 20.0,
                 every: int = 4):
        self.clip, self.decode, self.sets, self.concentration, self.every = clip, decode, (unsafe, retain), concentration, every
        self.calls, self.level, self.odds = 0, None, None

    def __call__(self, denoised: Tensor, level: Tensor) -> Tensor:
        """(B,) log odds of one prediction; `level`, sigma / alpha (B,), falls within a run, and where it rises a new one begins."""
        if self.odds is None or len(self.odds) != len(denoised) or bool((level > self.level).any()):
            self.calls = 0
        if self.calls % self.every == 0:
            embeddings = self.clip.pixels(self.decode(denoised))
            near = [(self.concentration * embeddings @ one.to(embeddings).T).logsumexp(1) - math.log(len(one)) for one in self.sets]
            self.odds = near[0] - near[1]
        self.calls, self.level = self.calls + 1, level
        return self.odds.to(level)
