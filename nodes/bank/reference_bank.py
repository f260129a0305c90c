"""Sample Reference Bank: a bank of what the model makes by itself."""
import time

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ...safe_denoiser import Bank, LatentCache
from ...safe_denoiser.density.separability import SAMPLED
from ...safe_denoiser.sentence import left
from .. import folders
from ..fingerprint import fingerprint, fingerprint_model
from ..io_types import CATEGORY, NegationBankType, found_by, wrong_wire
from ..progress import Live
from .negation_bank import parts_of, picture_stream, require_pictures, resizing


def sample_bank(model, conditioning, streams, count, seed, steps, sampler_name, scheduler, batch_size, cache: LatentCache) -> Bank:
    """`count` samples of the model at cfg 1, as a bank of raw VAE latents; progress and interrupt after each model step. Those that were
    made before, for fewer or until somebody stopped, are kept, and only the others are sampled.

    Args:
        streams: shapes of what is sampled, without the batch: of the picture, and of the sound beside it where the model makes both.
        cache: each batch is kept there as soon as it is made, so that an interrupt loses one at most.

    Raises:
        ValueError: the model makes no numbers.
    """
    latents, generator, told = [], torch.Generator().manual_seed(seed), Progress(model, count, steps)
    for start in range(0, count, batch_size):
        size, path = min(batch_size, count - start), cache.path(f"samples from {start}", streams[0], "")
        noise = [torch.randn((batch_size, *shape), generator=generator) for shape in streams]  # as well where it is not needed
        found = cache.get(path)
        kept = 0 if found is None else min(len(found), size)
        told.kept(kept)
        if kept < size:
            rows = slice(kept, size)
            sampled = comfy.sample.sample(model, _nested([one[rows] for one in noise]), steps, 1.0, sampler_name, scheduler, conditioning,
                                          conditioning, _nested([one[rows] * 0 for one in noise]), callback=told.step, disable_pbar=True,
                                          seed=seed + start)
            made = picture_stream(sampled).cpu()
            if not bool(made.isfinite().all()):
                raise ValueError("the model gives NaN or infinity, so what it makes cannot be a reference; sample with it, and see why")
            found = torch.cat([found[:kept], made]) if kept else made
            cache.put(path, found.contiguous())
            told.made(size - kept)
        latents.append(found[:size])
    told.end()
    return Bank(torch.cat(latents), metadata={"space": "vae", "source": SAMPLED})


def _nested(parts: list[torch.Tensor]):
    """What ComfyUI samples: of several streams in one, which older ComfyUI does not know, nor models that make them."""
    if len(parts) == 1:
        return parts[0]
    from comfy.nested_tensor import NestedTensor
    return NestedTensor(parts)


class Progress:
    """The bar, which counts what is kept as well, a picture of what is being sampled where previews are on, and how long it will take."""

    def __init__(self, model, count: int, steps: int):
        self.count, self.steps, self.done, self.new, self.began = count, steps, 0, 0, time.monotonic()
        self.bar, self.live = comfy.utils.ProgressBar(count * steps), Live()
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def step(self, step: int, x0, x, _total: int) -> None:
        plain = self.previewer is not None and isinstance(x0, torch.Tensor) and x0.ndim == 4
        preview = self.previewer.decode_latent_to_preview_image("JPEG", x0) if plain else None
        rows = len(picture_stream(x))
        self.bar.update_absolute(self.done * self.steps + rows * (step + 1), self.count * self.steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def kept(self, rows: int) -> None:
        self.done += rows
        self.bar.update_absolute(self.done * self.steps)

    def made(self, rows: int) -> None:
        self.done, self.new = self.done + rows, self.new + rows
        each = (time.monotonic() - self.began) / self.new
        self.live.send(left(self.done, self.count, each * (self.count - self.done)))

    def end(self) -> None:
        self.live.send(f"{self.count} samples, {self.new} of them new")


def streams(model, latent) -> list[tuple[int, ...]]:
    """Shapes, without the batch, of what the sampler makes of a latent: of the picture, and of the sound beside it.

    Raises:
        ValueError: audio and 3-D shapes.
    """
    require_pictures(picture_stream(latent["samples"]), model.get_model_object("latent_format"))
    fixed = comfy.sample.fix_empty_latent_channels(model, latent["samples"] * 0, **resizing(latent))
    return [tuple(part.shape[1:]) for part in parts_of(fixed)]


class SampleReferenceBank(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserSampleReferenceBank", display_name="Sample Reference Bank", category=CATEGORY,
            **found_by("reference samples", "unconditional samples"),
            description="What the model makes by itself: samples under the empty prompt. Against this the safe denoiser judges how unsafe "
                        "a latent is. Sampled once per model, size and settings, then read from disk.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, with its LoRAs, without the safe denoiser."),
                io.Latent.Input("latent", tooltip="The latent that will be sampled, for its size only."),
                io.Conditioning.Input("conditioning",
                                      tooltip="The empty prompt (or a broad one such as 'photo', to narrow what is compared)."),
                io.Int.Input("count", default=100, min=1, max=10_000,
                             tooltip="Number of samples. With an unwanted condition 25 are enough; with a folder alone take 100 or more. "
                                     "More costs time once, and a little at each step."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="Seed of the samples."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps per sample."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler",
                               tooltip="Sampler of the samples."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal",
                               tooltip="Schedule of the samples."),
                io.Int.Input("batch_size", default=4, min=1, max=256,
                             tooltip="Samples made at once; more is faster and takes more memory."),
            ],
            outputs=[NegationBankType.Output(display_name="reference_bank", tooltip="The model's own samples, for reference_bank inputs.")],
        )

    @classmethod
    def validate_inputs(cls, input_types):
        return wrong_wire(cls, input_types)

    @classmethod
    def execute(cls, model, latent, conditioning, count, seed, steps, sampler_name, scheduler, batch_size) -> io.NodeOutput:
        shapes, settings = streams(model, latent), (seed, steps, sampler_name, scheduler, batch_size)
        key = fingerprint(fingerprint_model(model), conditioning, shapes, *settings)
        cache = LatentCache(folders.cache("reference"), key, folders.CACHE_LIMIT)
        bank = sample_bank(model, conditioning, shapes, count, *settings, cache)
        cache.trim()
        return io.NodeOutput(bank)


NODES = [SampleReferenceBank]
