"""A MODEL as the core asks it, see `gain.Model`: E[x0 | x] under conditions, with a gradient where one is wanted.

    MODEL --a guider's own run, whose sampler is `work`--> loaded, with hooks and wrappers --conditions as a guider's--> E[x0 | x]
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils.checkpoint import checkpoint

from .noise import refuse

TOLD_OF = "safe_denoiser"  # what is said of a CONDITIONING, for whoever saves or samples with it
LEARNABLE = "pooled_output"  # beside the text itself; and all that text encoders call "conditioning_..."


def told(conditioning: list) -> list[torch.Tensor]:
    """What text encoders say in a CONDITIONING, which is what may be learned: the rows of text, pooled vectors, texts of more encoders.

    Raises:
        ValueError: it has several parts, as a combined or scheduled prompt.
    """
    if len(conditioning) != 1:
        raise ValueError(f"the condition has {len(conditioning)} parts, and needs to have one; connect a plain prompt, one that is not "
                         f"combined, scheduled or confined to areas")
    rows, options = conditioning[0]
    return [rows, *(options[key] for key in _keys(options))]


def retold(conditioning: list, parts: Sequence[torch.Tensor]) -> list:
    """The CONDITIONING with other tensors in place of `told`'s."""
    options, (first, *others) = conditioning[0][1], parts
    return [[first, options | dict(zip(_keys(options), others))]]


def _keys(options: dict) -> list[str]:
    return sorted(key for key, value in options.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
                  and (key == LEARNABLE or key.startswith("conditioning_")))


class Asked:
    """A model that is loaded and running, as `gain.Model`.

    Args:
        guider: whose run it is. model_options: of the run.
        converted: makes of what is asked, a condition, what a guider makes of its CONDITIONING before it prepares it for a latent.
    """

    def __init__(self, guider, model_options: dict, converted: Callable[[object], list[dict]], device: torch.device):
        self.model, self.options, self.converted, self.device = guider.inner_model, model_options, converted, device

    def noised(self, y, noise, fraction):
        sampling = self.model.model_sampling
        sigma = torch.tensor([min(float(sampling.percent_to_sigma(float(one))), float(sampling.sigma_max)) for one in fraction],
                             device=self.device)
        return sampling.noise_scaling(sigma.view(-1, *[1] * (y.ndim - 1)), noise, y), sigma

    def predict(self, x, sigma, conditions):
        conds = {str(i): [*map(dict, self.converted(one))] for i, one in enumerate(conditions)}
        conds = comfy.samplers.process_conds(self.model, x, conds, self.device, torch.zeros_like(x), None, 0)
        return comfy.samplers.calc_cond_batch(self.model, [*conds.values()], x, sigma, self.options)


class Work(comfy.samplers.Sampler):
    """A sampler that samples nothing: it asks the model, and keeps the answer."""

    def __init__(self, work: Callable[[Asked], object], neutral: list):
        self.work, self.answer = work, None
        self.converted = lambda parts: comfy.sampler_helpers.convert_cond(retold(neutral, parts))

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.answer = self.work(Asked(guider, extra_args["model_options"], self.converted, noise.device))
        return noise


def ask(model, shape: Sequence[int], neutral: list, work: Callable[[Asked], object]):
    """What `work` makes of the model, inside a run of ComfyUI's own guider on it: loaded, with hooks and additional models, and cleaned up.

    Args:
        shape: of one picture (C, *spatial). neutral: CONDITIONING that means nothing in particular.
    """
    noise = torch.zeros(1, *shape)
    refuse(model, noise)
    if getattr(model, "is_dynamic", lambda: False)():  # newer ComfyUI loads weights in pieces, through which no gradient goes
        model = model.get_non_dynamic_delegate()
    guider, sampler = comfy.samplers.CFGGuider(model), Work(work, neutral)
    guider.set_conds(neutral, neutral)
    sigmas = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
    return sampler.answer


# --- gradients through weights that were loaded without ------------------------------------------------------------

@contextmanager
def differentiable(model: torch.nn.Module, checkpointed: bool = False) -> Iterator[None]:
    """Inside, a gradient can go through the model to its inputs. Weights that ComfyUI loaded under inference mode are seen through tensors
    that share their memory; the weights themselves, and where they are, stay as they are.

    Args:
        checkpointed: blocks are computed again on the way back, instead of kept: slower, with a fraction of the memory.
    """
    with torch.inference_mode(False), torch.enable_grad(), allow_mutation_on_saved_tensors(), _training():  # many blocks add in place
        places = [*_inference_tensors(model)]
        try:
            for holder, name, value in places:
                holder[name] = _shared(value)
            with _checkpointed(model) if checkpointed else torch.enable_grad():
                yield
        finally:
            for holder, name, value in places:
                holder[name] = value


@contextmanager
def _training() -> Iterator[None]:
    """Newer ComfyUI then leaves out kernels through which no gradient goes, and quantised layers have one."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    try:
        management.in_training = True
        yield
    finally:
        management.in_training = before
        if before is None:  # this one does not know of it
            del management.in_training


def _inference_tensors(model: torch.nn.Module) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """Where modules hold plain tensors that were made under inference mode; quantised ones know how to be dequantised."""
    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, value in [*holder.items()]:
                if type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_inference():
                    yield holder, name, value


def _shared(value: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd may keep."""
    plain = torch.empty(0, dtype=value.dtype, device=value.device)
    plain.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    return torch.nn.Parameter(plain, requires_grad=False) if isinstance(value, torch.nn.Parameter) else plain


@contextmanager
def _checkpointed(model: torch.nn.Module) -> Iterator[None]:
    """Compute the blocks of a network again on the way back."""
    blocks = [*_blocks(model.diffusion_model)]
    before = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = _again(block.forward)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost modules inside a network that are called themselves; lists and sequences of them need not be."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)):
            yield from _blocks(child)
        else:
            yield child


def _again(forward: Callable) -> Callable:
    def run(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return run
