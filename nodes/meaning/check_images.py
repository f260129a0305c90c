"""Check Images and Fill Blocked Images: finished pictures that are too like a negation set are blocked, and their places filled."""
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ...safe_denoiser.meaning.likeness import alarm_threshold
from ...safe_denoiser.meaning.safety_checker import check
from ..bank.negation_bank import picture_stream
from ..io_types import CATEGORY, CheckedType, NegationSetType, found_by
from .clip import clip_inputs, embed

PASSING = ExecutionBlocker(None)  # in place of an empty batch: what follows does not run, and nobody is alarmed


def outputs(checked) -> tuple:
    """passed, blocked, report and checked."""
    stopped = checked.blocked
    return (PASSING if stopped.all() else checked.pictures[~stopped], checked.covered[stopped] if stopped.any() else PASSING,
            checked.report, checked)


def rows_of(latent: dict | None, stopped: torch.Tensor):
    """The latent of the blocked pictures, with their masks.

    Raises:
        ValueError: of a video, whose frames cannot be sampled one by one; of another batch.
    """
    if latent is None or not stopped.any():
        return PASSING
    samples = picture_stream(latent["samples"])
    if samples is not latent["samples"] or samples.ndim > 4 and samples.shape[2] > 1:
        raise ValueError("latent is that of a video, whose frames cannot be sampled again one by one; leave latent unconnected")
    if len(samples) not in (1, len(stopped)):
        raise ValueError(f"latent holds {len(samples)} pictures and images {len(stopped)}, so which of them to sample again is not known; "
                         f"connect the latent that these images were sampled from, or leave latent unconnected")
    rows = stopped.nonzero()[:, 0]
    found = {key: value for key, value in latent.items() if key != "batch_index"}  # a new seed draws their noise
    for key in ("samples", "noise_mask"):
        if key in found and len(found[key]) > 1:
            found[key] = found[key][rows % len(found[key])]  # ComfyUI repeats masks that are fewer
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
            **found_by("nsfw", "nsfw detector", "safety checker", "censor", "filter images", "moderation"),
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


NODES = [CheckImages, FillBlockedImages]
