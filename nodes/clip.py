"""Load OpenCLIP, and what pictures mean: Curate and Split Negation Set, Check Images, Fill Blocked Images."""
import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..safe_denoiser import LatentCache, NegationSet
from ..safe_denoiser.clip import fetch, load_clip, published
from ..safe_denoiser.meaning import SemanticPosterior, alarm_threshold, check, choose, nearest, text_scores
from ..safe_denoiser.negation_set import evenly
from . import folders
from .bank import picture_stream
from .fingerprint import fingerprint_model
from .live import Live, progress
from .negation_set import preview_input, to_image
from .types import CATEGORY, PREVIEWS, CheckedType, ClipType, NegationSetType, SemanticType, found_by

BY_TAG, CONSENT = "pretrained tag", "SAFE_DENOISER_ALLOW_DOWNLOAD"
PASSING = ExecutionBlocker(None)  # in place of an empty batch: what follows does not run, and nobody is alarmed


def architectures() -> list[str]:
    """Names of the architectures that open_clip knows, read from its folder: importing it takes seconds."""
    found = find_spec("open_clip")
    configs = Path(found.origin).parent.glob("model_configs/*.json") if found and found.origin else ()
    return sorted((path.stem for path in configs), key=str.lower) or ["ViT-B-32"]


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
                f"CLIP {architecture!r} with the tag {pretrained!r} is not on this machine; put its weights into {target.parent}, as "
                f"{name}.safetensors, and choose that file; or switch allow_download on, and allow it on this machine: make an empty file "
                f"{folders.consent()}, or start ComfyUI with {CONSENT}=1") from None
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
    def validate_inputs(cls, weights):
        return weights == BY_TAG or folders.problem(folders.CLIPS, weights)

    @classmethod
    def fingerprint_inputs(cls, weights, **_):
        return None if weights == BY_TAG else folders.state(folders.resolve(folders.CLIPS, weights))

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


def clip_inputs(what: str) -> list[io.Input]:
    return [ClipType.Input("clip", tooltip="From Load OpenCLIP."), NegationSetType.Input("negation_set", tooltip=what)]


def table(title: str, negation_set: NegationSet, scores: torch.Tensor, words: list[str]) -> str:
    order = scores.argsort(descending=True, stable=True).tolist()
    return "\n".join([title, *(f"{scores[i]:.3f} {negation_set.names[i]}: {words[i]}" for i in order)])


def sheet(negation_set: NegationSet, groups: list[list[int]], scores: torch.Tensor, words: list[str], title: str, style: str, cls):
    """Contact sheet of a few pictures of each group with score and fate, or None when the preview is off."""
    if style == "off":
        return None
    rows = [i for group in groups if group for i in evenly(group, 8)]
    captions = [f"{scores[i]:.2f} {words[i].partition(',')[0]}" for i in rows]  # why is in the table
    return ui.PreviewImage(to_image(negation_set.sheet(rows, [title], style == "blurred", captions)), cls=cls)


MEANING = "in plain words, one meaning per line; of several, the best counts."
SCORED = ("Contact sheet on the node: up to 8 pictures of each kind with their scores. Blurred by default, since sets hold what people do "
          "not want to see. off: no preview is made or stored.")
INFO = "Counts, and score and fate of each picture, best first."


class CurateNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserCurateNegationSet", display_name="Curate Negation Set", category=f"{CATEGORY}/meaning",
            **PREVIEWS, **found_by("sort images", "duplicates", "clip search", "filter images"),
            description="Keeps the pictures that mean something, drops near-duplicates, and picks a few that cover the rest.",
            inputs=[
                *clip_inputs("The pictures to choose from."),
                io.String.Input("text", default="", tooltip=f"What to keep, {MEANING} Empty: example decides, or all are kept."),
                io.String.Input("against", default="a picture",
                                tooltip=f"What text is compared with, {MEANING} The score is then the probability of text. Empty: the "
                                        "score is the cosine similarity to text, mostly below 0.4."),
                io.Float.Input("threshold", default=0.5, min=-1.0, max=1.0, step=0.01,
                               tooltip="Keep pictures with at least this score: a probability, or without against, or with example, a "
                                       "cosine similarity. 0: keep any."),
                io.Float.Input("duplicates", default=0.96, min=0.0, max=1.0, step=0.005,
                               tooltip="Of pictures with at least this cosine similarity, keep only the best. 0: keep all."),
                io.Int.Input("top_k", default=0, min=0, max=100_000, tooltip="Keep at most this many, the best. 0: all."),
                io.Int.Input("diverse_k", default=0, min=0, max=100_000,
                             tooltip="Of these, keep at most this many that cover the others (greedy k-center). 0: all."),
                preview_input(SCORED),
                NegationSetType.Input("example", optional=True,
                                      tooltip="Example pictures: the score is the cosine similarity to the nearest. Then leave text empty. "
                                              "Optional."),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The kept pictures, best first."),
                     io.String.Output(display_name="info", tooltip=INFO)],
        )

    @classmethod
    def execute(cls, clip, negation_set, text, against, threshold, duplicates, top_k, diverse_k, preview, example=None) -> io.NodeOutput:
        if text.strip() and example is not None:
            raise ValueError("both text and example say what to keep; leave text empty or disconnect example")
        embeddings = embed(clip, negation_set)
        if example is not None:
            scores = nearest(embeddings, embed(clip, example), 1)[0]
        else:
            scores = text_scores(clip, embeddings, text, against) if text.strip() else torch.ones(len(embeddings))
        kept, why = choose(scores, embeddings, negation_set.names, threshold, duplicates, top_k, diverse_k)
        if not kept:
            best = int(scores.argmax())
            raise ValueError(f"none of {len(scores)} pictures scores {threshold:g} or more; the best is {negation_set.names[best]} with "
                             f"{scores[best]:.3f}: lower the threshold or say it in other words")
        words = [reason and f"dropped, {reason}" or "kept" for reason in why]
        dropped = [i for i in scores.argsort(descending=True).tolist() if why[i]]
        title = f"{len(kept)} kept, {len(dropped)} dropped"
        return io.NodeOutput(negation_set.take(kept), table(title, negation_set, scores, words),
                             ui=sheet(negation_set, [kept, dropped], scores, words, title, preview, cls))


class SplitNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserSplitNegationSet", display_name="Split Negation Set", category=f"{CATEGORY}/meaning",
            **PREVIEWS, **found_by("sort images", "clip search", "filter images"),
            description="Makes a negation set and a retain set from one folder, by two texts: what must not come out, and what may.",
            inputs=[
                *clip_inputs("The pictures to split."),
                io.String.Input("unwanted", default="a weapon", tooltip=f"What must not come out, {MEANING}"),
                io.String.Input("wanted", default="a tool", tooltip=f"What may come out, {MEANING}"),
                io.Float.Input("sure", default=0.5, min=0.5, max=1.0, step=0.01,
                               tooltip="A picture goes where its probability is at least this; the others go nowhere. 0.5: every picture "
                                       "goes somewhere."),
                preview_input(SCORED),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The unwanted pictures, surest first."),
                     NegationSetType.Output(display_name="retain_set", tooltip="The wanted pictures, surest first: for a retain bank."),
                     io.String.Output(display_name="info", tooltip=INFO)],
        )

    @classmethod
    def execute(cls, clip, negation_set, unwanted, wanted, sure, preview) -> io.NodeOutput:
        scores = text_scores(clip, embed(clip, negation_set), unwanted, wanted)
        order = scores.argsort(descending=True, stable=True).tolist()
        negation = [i for i in order if scores[i] >= sure]
        retain = [i for i in reversed(order) if 1 - scores[i] >= sure and i not in negation]
        words = ["unwanted" if i in negation else "wanted" if i in retain else "unsure" for i in range(len(scores))]
        title = f"{len(negation)} unwanted, {len(retain)} wanted, {len(scores) - len(negation) - len(retain)} unsure"
        if not negation or not retain:
            raise ValueError(f"the texts split {len(scores)} pictures into {title}; choose texts that tell them apart")
        rest = [i for i in order if words[i] == "unsure"]
        return io.NodeOutput(negation_set.take(negation), negation_set.take(retain), table(title, negation_set, scores, words),
                             ui=sheet(negation_set, [negation, retain, rest], scores, words, title, preview, cls))


def outputs(checked) -> tuple:
    """passed, blocked, report and checked."""
    stopped = checked.blocked
    return (PASSING if stopped.all() else checked.pictures[~stopped], checked.covered[stopped] if stopped.any() else PASSING,
            checked.report, checked)


def rows_of(latent: dict | None, stopped: torch.Tensor):
    """The latent of the blocked pictures, with their masks.

    Raises:
        ValueError: of a video, whose frames cannot be sampled one by one.
    """
    if latent is None or not stopped.any():
        return PASSING
    samples = picture_stream(latent["samples"])
    if samples is not latent["samples"] or samples.ndim > 4 and samples.shape[2] > 1:
        raise ValueError("latent is that of a video, whose frames cannot be sampled again one by one; leave latent unconnected")
    rows = stopped.nonzero()[:, 0]
    found = {key: value for key, value in latent.items() if key != "batch_index"}  # a new seed draws their noise
    for key in ("samples", "noise_mask"):
        if key in found and len(found[key]) > 1:
            found[key] = found[key][rows]
    found["samples"] = found["samples"].expand(len(rows), *found["samples"].shape[1:])
    return found


def answers(checked) -> tuple[bool, list[bool]]:
    """all_passed and each_passed."""
    return not bool(checked.blocked.any()), (~checked.blocked).tolist()


def answer_outputs() -> list[io.Output]:
    return [
        io.Boolean.Output(display_name="all_passed", tooltip="Whether every picture passed. For a switch, so that a workflow can branch."),
        io.Boolean.Output(display_name="each_passed", is_output_list=True,
                          tooltip="Whether it passed, for each picture: what follows runs once for each."),
    ]


def checked_outputs() -> list[io.Output]:
    return [
        io.Image.Output(display_name="passed", tooltip="The pictures that passed. None: what follows does not run."),
        io.Image.Output(display_name="blocked", tooltip="The blocked pictures, blurred or black. None: what follows does not run."),
        io.String.Output(display_name="report", tooltip="Counts, and what was found of each picture."),
        CheckedType.Output(display_name="checked", tooltip="For Fill Blocked Images."),
    ]


class CheckImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserCheckImages", display_name="Check Images", category=f"{CATEGORY}/meaning",
            **found_by("nsfw", "nsfw detector", "safety checker", "censor", "filter images", "moderation", essential="Image Tools"),
            description="Second layer, after decoding: blocks pictures that mean much the same as a picture of the negation set.",
            inputs=[
                io.Image.Input("images", tooltip="The decoded pictures."),
                *clip_inputs("What must not come out. More and more various pictures catch more."),
                io.Float.Input("false_alarms", default=0.01, min=0.0, max=0.5, step=0.001, round=False,
                               tooltip="Share of pictures like those of retain_set that may be blocked by mistake. Needs at least 1/share "
                                       "pictures there."),
                io.Float.Input("threshold", default=0.9, min=-1.0, max=1.0, step=0.005,
                               tooltip="Block above this cosine similarity, the mean over the three nearest pictures of negation_set. Only "
                                       "where retain_set is not connected."),
                io.Combo.Input("cover", options=["blurred", "black"], default="blurred", tooltip="How blocked pictures are shown."),
                NegationSetType.Input("retain_set", optional=True,
                                      tooltip="Pictures that must pass: a picture is blocked that is clearly nearer to negation_set than "
                                              "to these, and the threshold is calibrated on them. Best is what the model makes of harmless "
                                              "prompts. Optional."),
                io.Latent.Input("latent", optional=True,
                                tooltip="The latent that was given to the sampler. Only for the output again. Optional."),
            ],
            outputs=[*checked_outputs(), io.Latent.Output(
                display_name="again", tooltip="The latent of the blocked pictures only, to sample them anew. None: what follows does not "
                                              "run."), *answer_outputs()],
        )

    @classmethod
    def execute(cls, images, clip, negation_set, false_alarms, threshold, cover, retain_set=None, latent=None) -> io.NodeOutput:
        unsafe, retain = embed(clip, negation_set), None
        if retain_set is not None:
            retain = embed(clip, retain_set)
            threshold = alarm_threshold(unsafe, retain, false_alarms)
        checked = check(clip, images[..., :3], unsafe, negation_set.names, threshold, cover == "black", retain)
        return io.NodeOutput(*outputs(checked), rows_of(latent, checked.blocked), *answers(checked))


class FillBlockedImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserFillBlockedImages", display_name="Fill Blocked Images", category=f"{CATEGORY}/meaning",
            **found_by("censor", "retry", "sample again", "safety checker"),
            description="Puts pictures that were sampled again in the place of blocked ones. Where nothing was blocked, nothing is sampled "
                        "again. As many of these nodes as there are, so many attempts there are.",
            inputs=[
                CheckedType.Input("checked", tooltip="From Check Images, of the first attempt."),
                CheckedType.Input("again", lazy=True, tooltip="From Check Images or Fill Blocked Images, of the next attempt, sampled from "
                                                              "the output again of the first. Asked for only where something was blocked."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="All pictures in their places; what is refused is blurred or black."),
                     *checked_outputs(), *answer_outputs()],
        )

    @classmethod
    def check_lazy_status(cls, checked, again=None):
        return ["again"] if again is None and checked.blocked.any() else []

    @classmethod
    def execute(cls, checked, again=None) -> io.NodeOutput:
        filled = checked.filled(again) if again is not None else checked
        return io.NodeOutput(filled.covered, *outputs(filled), *answers(filled))


class MakeSemanticPosterior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserSemanticPosterior", display_name="Semantic Posterior", category=f"{CATEGORY}/meaning",
            **found_by("clip guidance", "safety"),
            is_experimental=True,
            description="Experimental: while sampling, P(unsafe) is read off what the decoded prediction means, instead of off "
                        "distances between latents. For Apply Safe Denoiser with a retain bank.",
            inputs=[
                *clip_inputs("The pictures of the negation bank."),
                NegationSetType.Input("retain_set", tooltip="The pictures of the retain bank."),
                io.Vae.Input("vae", tooltip="Decodes the predictions. A tiny one of the model's family (taesd, taesdxl, taesd3, taef1) is "
                                            "fast and good enough."),
                io.Int.Input("every", default=4, min=1, max=100,
                             tooltip="Look at each such model call only, and keep the answer until the next. 1: at each call."),
            ],
            outputs=[SemanticType.Output(display_name="semantic", tooltip="For the input semantic of Apply Safe Denoiser.")],
        )

    @classmethod
    def execute(cls, clip, negation_set, retain_set, vae, every) -> io.NodeOutput:
        unsafe, retain = embed(clip, negation_set), embed(clip, retain_set)

        def begin(process_latent_out) -> SemanticPosterior:
            """One for each run, which remembers its latest answer."""
            return SemanticPosterior(clip, lambda denoised: vae.decode(process_latent_out(denoised)), unsafe, retain, every=every)

        return io.NodeOutput(begin)


NODES = [LoadOpenCLIP, CurateNegationSet, SplitNegationSet, CheckImages, FillBlockedImages, MakeSemanticPosterior]
