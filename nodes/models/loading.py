"""Banks in the latent space of the sampled model, loaded beside it by ComfyUI itself, which counts their memory and frees it."""
from dataclasses import fields
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import torch

from ...safe_denoiser import Bank
from ...safe_denoiser.bank.lazy_latents import LazyLatents

FORMS = 2  # a bank is kept in as many forms: for two models that are compared in one workflow
SHARE = 0.5  # of a device's memory for banks at most: the model needs the rest. A larger bank stays where it is, and is read at each step


def to_model(bank: Bank, patcher, shape, bank_size: str) -> Bank:
    """A bank of VAE latents in the space of the sampler, where x is shaped `shape` (B, C, *spatial); resized when asked."""
    latent_format, model = patcher.get_model_object("latent_format"), patcher.model
    process_in = model.process_latent_in if model.latent_format is latent_format else latent_format.process_in

    def convert(latents):
        latents = latents.to(torch.float32)
        if latent_format.latent_dimensions == 3 and latents.ndim == 4:
            latents = latents.unsqueeze(2)  # pictures are one frame long where the model's latents have frames
        return brought_in(latents) if bank.metadata.get("space") == "vae" else latents

    def brought_in(latents):
        try:
            moved = process_in(latents)
        except RuntimeError:  # of another model: the size check of the core says it better
            return latents
        return moved if moved.shape[1] == shape[1] else latents

    moved = bank.map(convert)
    return moved.resized(shape[-2:]) if bank_size == "interpolate" and moved.latents.shape[-2:] != shape[-2:] else moved


def in_space(bank: Bank, patcher) -> torch.Tensor:
    """The latents of a bank (N, C, *spatial) in the space of the sampler, at the bank's own size.

    Raises:
        ValueError: of another model.
    """
    channels = patcher.get_model_object("latent_format").latent_channels
    moved = to_model(bank, patcher, (1, channels, *bank.latents.shape[2:]), "exact").latents[:].float()
    if moved.shape[1] != channels:
        raise ValueError(f"the bank's latents have {moved.shape[1]} channels and the model's have {channels}; build the bank with the VAE "
                         f"of this model")
    return moved


def require_size(bank: Bank, moved: Bank, shape) -> None:
    """Raise where a bank's pictures are of another size than what is sampled, shaped `shape`; say how large both are in pixels, where the
    bank knows.
    """
    item = moved.latents.shape[1:]
    if item[0] != shape[1] or item[-2:] == tuple(shape[-2:]):
        return
    pixels, size = "", [int(side) for side in bank.metadata.get("size", "").split("x") if side.isdigit()]
    if len(size) == 2:
        sampled = [round(side * whole / own) for side, whole, own in zip(shape[-2:], size, item[-2:])]
        pixels = f" (it is of {size[1]} x {size[0]} pixels, and {sampled[1]} x {sampled[0]} are sampled)"
    raise ValueError(f"bank latents are {tuple(item)} but the sampler runs at {tuple(shape[1:])}; rebuild the bank with this model's VAE "
                     f"at this size{pixels}, or set bank_size to interpolate")


class SafeDenoiserBank(torch.nn.Module):
    """Latents as what ComfyUI loads: a module. Its log tells the name."""

    def __init__(self, latents: torch.Tensor):
        super().__init__()
        self.latents = torch.nn.Parameter(latents, requires_grad=False)


class Held:
    """A bank in the form in which one model takes it, wherever ComfyUI has put it."""

    def __init__(self, bank: Bank, patcher, shape, bank_size: str):
        moved = to_model(bank, patcher, shape, bank_size)
        self.note = "" if moved.latents.shape[-2:] == bank.latents.shape[-2:] else \
            f"bank resized from {tuple(bank.latents.shape[1:])} to the sampler's {tuple(shape[1:])}"
        self.shell = {field.name: getattr(moved, field.name) for field in fields(moved) if field.name != "latents"}
        self.latents, self.patcher, device = moved.latents, None, patcher.load_device
        if not isinstance(moved.latents, LazyLatents) and moved.nbytes <= SHARE * comfy.model_management.get_total_memory(device):
            stored = moved.latents if device.type == "cpu" else moved.latents.to(bank.latents.dtype)
            self.patcher = comfy.model_patcher.ModelPatcher(SafeDenoiserBank(stored), device, torch.device("cpu"))
            self.latents = None  # the module's are all there is, so that memory is free when ComfyUI frees it

    @property
    def bank(self) -> Bank:
        return Bank(**self.shell, latents=self.latents if self.patcher is None else self.patcher.model.latents.data).settled()


_held: WeakKeyDictionary[Bank, dict[tuple, Held]] = WeakKeyDictionary()


def hold(bank: Bank, patcher, shape, bank_size: str) -> Held:
    """The bank in the form for this model and size, made once for all that sample with it."""
    latent_format = patcher.get_model_object("latent_format")
    form = (type(patcher.model), type(latent_format), getattr(latent_format, "scale_factor", None), patcher.load_device, tuple(shape[1:]),
            bank_size)
    forms = _held.setdefault(bank, {})
    forms[form] = forms.pop(form, None) or Held(bank, patcher, shape, bank_size)  # the latest comes last
    while len(forms) > FORMS:
        forms.pop(next(iter(forms)))
    return forms[form]


def prepare_sampling(held: dict[str, Held], executor, model, noise_shape, conds, *args, **kwargs):
    """A wrapper of PREPARE_SAMPLING: banks are loaded as what a condition brings along is, so that their memory is counted."""
    mine = f"safe_denoiser banks {id(held)}"
    models = [one.patcher for one in held.values() if one.patcher is not None]
    real, found, models = executor(model, noise_shape, conds | {mine: [{"additional_models": models}]}, *args, **kwargs)
    return real, {name: cond for name, cond in found.items() if name != mine}, models
