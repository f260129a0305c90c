"""The noise levels of one run: which of a sampler's calls begin a step, when a run is over, and what is sampled at each level."""
import math

import torch


class NoiseLevels:
    """The levels that a run goes through.

    Args:
        sampling: ComfyUI's, of the model.
        sigmas: the sampler's schedule; None: it was started without a word.
        mask: what is sampled, or None.
    """

    def __init__(self, sampling, sigmas: torch.Tensor | None, mask: torch.Tensor | None):
        self.sampling, self.sigmas, self.mask = sampling, sigmas, mask
        self.fresh = sigmas is not None and float(sigmas[0]) >= 0.99 * float(sampling.percent_to_sigma(0.01))  # it begins with pure noise
        self.rises = sigmas is not None and len(sigmas) > 1 and bool(sigmas[-1] > sigmas[0])
        self.lowest, self.highest = math.inf, -math.inf

    @property
    def steps(self) -> int | None:
        return None if self.sigmas is None else len(self.sigmas) - 1

    def is_over(self, sigma: float) -> bool:
        """Whether a call at this noise level belongs to a next run; asked only where nobody tells."""
        over = sigma >= self.highest and self.lowest < self.highest
        self.lowest, self.highest = min(self.lowest, sigma), max(self.highest, sigma)
        return over

    def begins_step(self, timestep: torch.Tensor) -> torch.Tensor | bool:
        """Whether a call at this noise level is none of a sampler's between two levels of the schedule, as far as that is known; on the
        device, so that nobody waits for it.
        """
        level = timestep.max()
        return self.sigmas is None or ((self.sigmas.to(level) - level).abs() <= 1e-4 * level).any()

    def mask_at(self, guider, timestep: torch.Tensor, model_options: dict) -> torch.Tensor | None:
        change = model_options.get("denoise_mask_function")  # Differential Diffusion: another mask at each step
        if self.mask is None or change is None:
            return self.mask
        return change(timestep, self.mask, extra_options={"model": guider, "sigmas": self.sigmas})
