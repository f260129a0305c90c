"""Build, save and load negation banks."""
import errno
import importlib.util
import inspect
import json
from dataclasses import replace
from pathlib import Path

import comfy.sample
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError

from ...safe_denoiser import LatentCache, compress_bank, encode_bank, index_bank, load_bank, save_bank
from ...safe_denoiser.bank.encoding import FITS
from ...safe_denoiser.pictures.files import printable
from .. import folders
from ..fingerprint import fingerprint, fingerprint_model
from ..io_types import CATEGORY, NegationBankType, NegationSetType, found_by
from ..progress import progress

SEARCHED = 20_000  # pictures from which a bank gets an index, see benchmarks/RESULTS.md
NO_PICTURES = ("ACEAudio", "StableAudio", "MiniMaxMusic", "Hunyuan3D", "Trellis2", "TripoSplat")  # ComfyUI's formats of such latents
RESIZED = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # keys of an empty LATENT that the sampler brings to its model's size
DECODABLE = "The latents of a bank can be decoded back into pictures: share one as you would share the pictures."


def memory(device) -> int:
    """Bytes that a bank may take on a device: what ComfyUI says is free, less what it keeps for inference."""
    management = comfy.model_management
    return max(0, int(management.get_free_memory(device) - management.minimum_inference_memory()))


def require_pictures(samples, latent_format=None) -> None:
    """Raise where latents are not those of pictures (4-D) or videos (5-D).

    Raises:
        ValueError: audio and 3-D shapes, which are told by their latents, or by their format where they look like pictures.
    """
    if samples.ndim < 4 or any(base.__name__.startswith(NO_PICTURES) for base in type(latent_format).__mro__):
        raise ValueError(f"latent is {tuple(samples.shape)}, which is audio or a 3-D shape; the safe denoiser needs image (4-D) or video "
                         f"(5-D) latents, so sample this model without it")


def parts_of(samples) -> list:
    """Latents of a picture, and of the sound beside it where newer ComfyUI holds both."""
    return samples.unbind() if samples.is_nested else [samples]


def picture_stream(samples):
    """The latents of the picture alone."""
    return parts_of(samples)[0]


def resizing(latent: dict) -> dict[str, int]:
    """What an empty latent's sides are to be multiplied by to give pixels and frames, as the sampler is told it by this ComfyUI; nothing
    where it knows of no such thing, or where the latent is not empty: then it is sampled as it is.
    """
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    told = {key: latent[key] for key in RESIZED if key in known and latent.get(key) is not None}
    return told if told and not picture_stream(latent["samples"]).count_nonzero() else {}


def require_vae(vae) -> None:
    """Raise where a checkpoint has brought none."""
    if vae is None or getattr(vae, "first_stage_model", vae) is None:
        raise ValueError("vae is empty: this checkpoint has no VAE in it; load one with Load VAE and connect it")


def image_size(latent, vae) -> tuple[int, int]:
    """(height, width) in pixels of what a latent decodes to, when it was sampled.

    Raises:
        ValueError: audio latents.
    """
    samples = picture_stream(latent["samples"])
    require_pictures(samples)
    scale = vae.spacial_compression_encode()
    ratio = resizing(latent).get(RESIZED[0], scale)
    height, width = (round(side * ratio / scale) * scale for side in samples.shape[-2:])
    return height, width


class BuildNegationBank(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserBuildNegationBank", display_name="Build Negation Bank", category=CATEGORY,
            **found_by("encode negative images", "unlearn", "forget", "avoid"),
            description="Encodes every picture of a negation set with the model's VAE, at the size that will be sampled. Each picture is "
                        "encoded once and cached on disk. " + DECODABLE,
            inputs=[
                NegationSetType.Input("negation_set", tooltip="The pictures."),
                io.Vae.Input("vae", tooltip="The VAE of the model that will be sampled."),
                io.Latent.Input("latent", tooltip="The latent that will be sampled, for its height and width only."),
                io.Combo.Input("fit", options=list(FITS), default="crop",
                               tooltip="How pictures of another shape are fitted. crop: fill and cut the overhang. pad: whole picture on "
                                       "black. stretch: distort."),
                io.Int.Input("prototypes", default=0, min=0, max=100_000, optional=True,
                             tooltip="Keep at most this many weighted prototypes (k-means) instead of all pictures: a smaller bank, faster "
                                     "steps, less exact. 0: all pictures. Needs scikit-learn."),
            ],
            outputs=[NegationBankType.Output(display_name="negation_bank", tooltip="The latents of the set.")],
        )

    @classmethod
    def execute(cls, negation_set, vae, latent, fit, prototypes=0) -> io.NodeOutput:
        require_vae(vae)
        encoder = fingerprint(fingerprint_model(vae.patcher), str(vae.vae_dtype))
        cache = LatentCache(folders.cache("latents"), encoder, folders.CACHE_LIMIT)
        bank = encode_bank(negation_set, lambda image: vae.encode(image[None])[0], image_size(latent, vae), fit,
                           progress(), cache)
        metadata = {**bank.metadata, "space": "vae", "skipped": json.dumps(negation_set.skipped), "set": negation_set.fingerprint}
        bank = replace(bank, metadata=metadata)
        if prototypes:
            bank = compress_bank(bank, prototypes)
        elif len(bank) >= SEARCHED and importlib.util.find_spec("sklearn"):
            bank = index_bank(bank)
        return io.NodeOutput(bank)


class SaveNegationBank(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserSaveNegationBank", display_name="Save Negation Bank", category=CATEGORY, is_output_node=True,
            **found_by("export negation bank", "unlearn"),
            description="Writes a bank as safetensors into output/negation_banks. " + DECODABLE,
            inputs=[
                NegationBankType.Input("negation_bank", tooltip="The bank to write."),
                io.String.Input("filename_prefix", default="bank",
                                tooltip="Start of the file name; a number is appended, nothing is overwritten."),
            ],
            outputs=[NegationBankType.Output(display_name="bank", tooltip="The same bank, unchanged.")],
        )

    @classmethod
    def execute(cls, negation_bank, filename_prefix) -> io.NodeOutput:
        try:
            folder, name, counter, _, _ = folder_paths.get_save_image_path(
                f"{folders.BANKS}/{filename_prefix}", folder_paths.get_output_directory())
            path = Path(folder) / f"{name}_{counter:05}_.safetensors"
            save_bank(negation_bank, path)
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) not in (errno.ENAMETOOLONG, errno.EINVAL) and "name too long" not in str(error):
                raise  # a full disk says so itself
            raise ValueError(f"the bank cannot be written as {printable(filename_prefix)!r}; choose a shorter filename_prefix of letters "
                             f"and digits") from error
        return io.NodeOutput(negation_bank, ui={"text": [f"{path.name}: {len(negation_bank)} latents"]})


class LoadNegationBank(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLoadNegationBank", display_name="Load Negation Bank", category=CATEGORY,
            **found_by("import negation bank", "unlearn", "forget"),
            description="Reads a bank from output/negation_banks or models/negation_banks. It fits the VAE and size it was built "
                        "with. " + DECODABLE,
            inputs=[io.Combo.Input("bank", options=folders.list_banks(),
                                   tooltip="A safetensors file that Save Negation Bank wrote. Press R after adding one.")],
            outputs=[NegationBankType.Output(display_name="negation_bank", tooltip="The latents of the file, with names and metadata.")],
        )

    @classmethod
    def validate_inputs(cls, bank=None):
        return folders.choice_problem(folders.BANKS, bank)

    @classmethod
    def fingerprint_inputs(cls, bank=None):
        return folders.choice_state(folders.BANKS, bank)

    @classmethod
    def execute(cls, bank) -> io.NodeOutput:
        return io.NodeOutput(load_bank(folders.resolve(folders.BANKS, bank), memory(torch.device("cpu"))))


NODES = [BuildNegationBank, SaveNegationBank, LoadNegationBank]
