"""Load OpenCLIP: a model that knows what pictures and texts mean, and the inputs of all nodes that use one."""
import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from ...safe_denoiser import LatentCache, NegationSet
from ...safe_denoiser.meaning.clip import fetch, load_clip, published
from .. import folders
from ..fingerprint import fingerprint_model
from ..io_types import CATEGORY, ClipType, NegationSetType, found_by
from ..progress import Live, progress

RECOMMENDED = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP")  # small to large
BY_TAG, CONSENT = "pretrained tag", "SAFE_DENOISER_ALLOW_DOWNLOAD"


def architectures() -> list[str]:
    """Names of the architectures that open_clip knows, read from its folder: importing it takes seconds. Those
    that most people want come first.
    """
    found = find_spec("open_clip")
    configs = Path(found.origin).parent.glob("model_configs/*.json") if found and found.origin else ()
    names = sorted((path.stem for path in configs), key=str.lower)
    return [*(name for name in RECOMMENDED if name in names), *(name for name in names if name not in RECOMMENDED)] or ["ViT-B-32"]


def consents() -> bool:
    """Whether this machine's user allows downloads. A workflow is no consent: it comes from anybody, with its widgets set."""
    return os.environ.get(CONSENT) == "1" or folders.consent().is_file()


def find_weights(weights: str, architecture: str, pretrained: str, allow_download: bool) -> Path:
    """The folder or file that the widgets name; fetched first where that is allowed.

    Raises:
        FileNotFoundError: it is not on this machine.
    """
    if weights != BY_TAG:
        return folders.resolve(folders.CLIPS, weights)
    name = f"{architecture}-{pretrained}"
    target = folders.roots(folders.CLIPS)[0] / name
    try:
        return folders.resolve(folders.CLIPS, name)
    except FileNotFoundError:
        if not allow_download or not consents():
            raise FileNotFoundError(
                f"CLIP {architecture!r} with the tag {pretrained!r} is not on this machine; put its weights into "
                f"{folders.place(target.parent)}, as {name}.safetensors, and choose that file; or switch "
                "allow_download on, and allow it on this machine: make an empty file "
                f"{folders.place(folders.consent())}, or start ComfyUI with {CONSENT}=1") from None
    source, size = published(architecture, pretrained)
    logging.warning("Load OpenCLIP: fetching %s, %.0f MB, into %s", source, size / 1e6, target)
    Live().send(f"fetching {source}\n{size / 1e6:.0f} MB")
    fetch(architecture, pretrained, target)
    return target


class LoadOpenCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLoadOpenCLIP", display_name="Load OpenCLIP", category=f"{CATEGORY}/meaning",
            **found_by("clip", "embedding", "nsfw detector"),
            description="A CLIP model, which knows what pictures and texts mean: for curating negation sets and checking images. "
                        "Nothing is downloaded unless you switch it on.",
            inputs=[
                io.Combo.Input("weights", options=[*folders.list_clips(), BY_TAG],
                               tooltip="A folder with open_clip_config.json and weights, or a file of weights, in models/open_clip; or a "
                                       "file of clip_vision that has a text part. pretrained tag: what the two next widgets name."),
                io.Combo.Input("architecture", options=architectures(), default="ViT-B-32",
                               tooltip="What a file of weights was trained as. A folder with open_clip_config.json brings its own."),
                io.String.Input("pretrained", default="laion2b_s34b_b79k",
                                tooltip="Which published weights of the architecture, by open_clip's tag. Only for pretrained tag."),
                io.Boolean.Input("allow_download", default=False,
                                 tooltip="Off: nothing is downloaded. On: weights of the pretrained tag that are not on this machine are "
                                         "fetched once into models/open_clip, if this machine's user allows it (the error says how); the "
                                         "node and the log say first what and how large."),
            ],
            outputs=[ClipType.Output(display_name="clip", tooltip="The model, for the nodes that curate and check.")],
        )

    @classmethod
    def validate_inputs(cls, weights=None):
        return weights == BY_TAG or folders.choice_problem(folders.CLIPS, weights)

    @classmethod
    def fingerprint_inputs(cls, weights=None, **_):
        return None if weights == BY_TAG else folders.choice_state(folders.CLIPS, weights)

    @classmethod
    def execute(cls, weights, architecture, pretrained, allow_download) -> io.NodeOutput:
        device = comfy.model_management.text_encoder_device()
        path = find_weights(weights, architecture, pretrained, allow_download)
        on_cpu = comfy.model_management.is_device_cpu(device)  # there ComfyUI stores texts' weights in fp16 and computes in fp32
        clip = load_clip(path, architecture, torch.float32 if on_cpu else comfy.model_management.text_encoder_dtype(device))
        patcher = comfy.model_patcher.ModelPatcher(clip.model, device, comfy.model_management.text_encoder_offload_device())

        def ready() -> torch.device:
            comfy.model_management.load_model_gpu(patcher)
            return patcher.load_device

        return io.NodeOutput(replace(clip, ready=ready, cache=LatentCache(folders.cache("embeddings"), fingerprint_model(patcher))))


def embed(clip, negation_set: NegationSet) -> torch.Tensor:
    return clip.pictures(negation_set, progress())


def clip_inputs(what: str, more: str = "", **options) -> list[io.Input]:
    return [ClipType.Input("clip", tooltip=f"From Load OpenCLIP.{more}", **options),
            NegationSetType.Input("negation_set", tooltip=what + more, **options)]


NODES = [LoadOpenCLIP]
