"""Load Negation Set, Negation Set from Images."""
import logging

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..safe_denoiser import NegationSet
from . import folders
from .types import CATEGORY, NegationSetType


def contact_sheet(negation_set: NegationSet, name: str, style: str, cls) -> ui.PreviewImage | None:
    """Contact sheet for the node, or None when the preview is off."""
    if style == "off":
        return None
    sheet = negation_set.contact_sheet(name, blurred=style == "blurred")
    return ui.PreviewImage(torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None], cls=cls)


def preview_input() -> io.Combo.Input:
    return io.Combo.Input("preview", options=["blurred", "shown", "off"], default="blurred",
                          tooltip="Contact sheet on the node, up to 16 pictures. Blurred by default, since sets hold what people do not "
                                  "want to see. off: no preview is made or stored.")


def describe(negation_set: NegationSet, name: str) -> str:
    skipped = "".join(f"\nskipped {file}: {reason}" for file, reason in negation_set.skipped)
    return f"{name}: {len(negation_set)} pictures, {len(negation_set.skipped)} skipped{skipped}"


class LoadNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLoadNegationSet", display_name="Load Negation Set", category=CATEGORY,
            description="A folder of pictures that must not come out (unsafe, copyrighted, a person who wishes to be forgotten), from "
                        "input/negation_sets/<name> or models/negation_sets/<name>.",
            inputs=[
                io.Combo.Input("folder", options=folders.list_sets(),
                               tooltip="Folder with the pictures, under input/negation_sets or models/negation_sets. Press R after "
                                       "adding one."),
                io.Int.Input("max_images", default=0, min=0, max=100_000,
                             tooltip="Use at most this many pictures, in the order of their names. 0: all of them."),
                preview_input(),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The pictures, decoded when they are needed."),
                     io.String.Output(display_name="info", tooltip="Name, count, and each skipped file with the reason.")],
        )

    @classmethod
    def validate_inputs(cls, folder):
        return folders.problem(folders.SETS, folder)

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return folders.state(folders.resolve(folders.SETS, folder))

    @classmethod
    def execute(cls, folder, max_images, preview) -> io.NodeOutput:
        negation_set = NegationSet.from_folder(folders.resolve(folders.SETS, folder), max_images)
        info = describe(negation_set, folder)
        if negation_set.skipped:
            logging.warning("Load Negation Set: %s", info)
        return io.NodeOutput(negation_set, info, ui=contact_sheet(negation_set, folder, preview, cls))


class NegationSetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserNegationSetFromImages", display_name="Negation Set from Images", category=CATEGORY,
            description="A negation set from pictures in the graph, such as ones the model itself made from an unsafe prompt, as the "
                        "paper did.",
            inputs=[io.Image.Input("images", tooltip="Batch of pictures; each one becomes an item of the set."), preview_input()],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, images, preview) -> io.NodeOutput:
        negation_set = NegationSet.from_images(images)
        return io.NodeOutput(negation_set, ui=contact_sheet(negation_set, "images", preview, cls))


NODES = [LoadNegationSet, NegationSetFromImages]
