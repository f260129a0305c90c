"""How a model adds noise: the forward process of any model class, and a refusal of models that have none."""
import torch

from ..bank.negation_bank import require_pictures


def forward_process(model_sampling, sigma: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(std, alpha) of x = alpha x0 + std eps, (B,) each, for any model class: asked of ComfyUI's own noise_scaling. std is what a sampler
    calls sigma, but where a model's noise has a scale of its own.
    """
    one = torch.ones([len(sigma)] + [1] * (ndim - 1), device=sigma.device)
    std = model_sampling.noise_scaling(sigma, one, torch.zeros_like(one))
    alpha = model_sampling.noise_scaling(sigma, torch.zeros_like(one), one)
    if _is(model_sampling, "V_PREDICTION_DDPM"):  # CogVideoX: its samplers, and its predictions, know x of variance 1 only
        std, alpha = (value / (1 + sigma.square()).sqrt().view_as(value) for value in (std, alpha))
    return std.flatten(), alpha.flatten()


def _is(model_sampling, kind: str) -> bool:
    """Whether it is of a kind of ComfyUI's, which not every release has."""
    return any(base.__name__.startswith(kind) for base in type(model_sampling).__mro__)


def std_at(model_sampling, percent: float) -> float:
    """Standard deviation of the noise at a fraction of the schedule, as `forward_process` measures it."""
    sigma = torch.as_tensor(model_sampling.percent_to_sigma(percent), dtype=torch.float32)
    return float(forward_process(model_sampling, sigma.cpu().reshape(1), 4)[0])


def refuse(patcher, noise: torch.Tensor) -> None:
    """Raise where there is no picture to steer: not a picture, or not a diffusion of one."""
    require_pictures(noise, patcher.get_model_object("latent_format"))
    if _is(patcher.get_model_object("model_sampling"), "IMG_TO_IMG"):
        raise ValueError(f"{type(patcher.model).__name__} maps one picture to another and has no noise level at which to compare it "
                         f"with a bank; the safe denoiser needs a diffusion model, so sample this one without it")
