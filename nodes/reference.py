"""Sample Reference Bank: what the model makes by itself."""
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ..safe_denoiser import Bank, LatentCache
from ..safe_denoiser.trust import SAMPLED
from . import folders
from .bank import parts_of, picture_stream, require_pictures, resizing
from .fingerprint import fingerprint, fingerprint_model
from .types import CATEGORY, NegationBankType, found_by, wrong_wire


def sample_bank(model, conditioning, streams, count, seed, steps, sampler_name, scheduler, batch_size, cache: LatentCache) -> Bank:
    """`count` samples of the model at cfg 1, as a bank of raw VAE latents; progress and interrupt after each model step.

    Args:
        streams: shapes of what is sampled, without the batch: of the picture, and of the sound beside it where the model makes both.
        cache: each batch is kept there as soon as it is made, so that an interrupt loses one at most.

    Raises:
        ValueError: the model makes no numbers.
    """
    latents, bar = [], comfy.utils.ProgressBar(steps * -(-count // batch_size))
    generator = torch.Generator().manual_seed(seed)

    def after_step(*_):
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def draw(fill, size):
        drawn = [fill((size, *shape)) for shape in streams]
        if len(drawn) == 1:
            return drawn[0]
        from comfy.nested_tensor import NestedTensor  # older ComfyUI has neither it nor such models
        return NestedTensor(drawn)

    for start in range(0, count, batch_size):
        size, path = min(batch_size, count - start), cache.path(f"samples from {start}", streams[0], "")
        noise = draw(lambda shape: torch.randn(shape, generator=generator), size)  # as well where it is not needed: the next are the same
        found = cache.get(path)
        if found is None or len(found) != size:
            sampled = comfy.sample.sample(model, noise, steps, 1.0, sampler_name, scheduler, conditioning, conditioning,
                                          draw(torch.zeros, size), callback=after_step, disable_pbar=True, seed=seed + start)
            found = picture_stream(sampled).cpu()
            if not bool(found.isfinite().all()):
                raise ValueError("the model gives NaN or infinity, so what it makes cannot be a reference; sample with it, and see why")
            cache.put(path, found.contiguous())
        latents.append(found)
    return Bank(torch.cat(latents), metadata={"space": "vae", "source": SAMPLED})


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
                             tooltip="Number of samples. 50 to 300 work; more costs time once, and a little at each step."),
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
        settings = (streams(model, latent), count, seed, steps, sampler_name, scheduler, batch_size)
        key = fingerprint(fingerprint_model(model), conditioning, *settings)
        cache = LatentCache(folders.cache("reference"), key, folders.CACHE_LIMIT)
        bank = sample_bank(model, conditioning, *settings, cache)
        cache.trim()
        return io.NodeOutput(bank)


NODES = [SampleReferenceBank]
