"""Load Negation Set, Negation Set from Images, Combine Negation Sets."""
import logging
from collections.abc import Callable

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ...safe_denoiser import NegationSet, combine_sets
from ...safe_denoiser.pictures import contact_sheets
from .. import folders
from ..io_types import CATEGORY, PREVIEWS, NegationSetType, found_by
from ..progress import progress


def to_image(picture: Image.Image) -> torch.Tensor:
    """A Pillow picture as ComfyUI's IMAGE: (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def as_preview(draw: Callable[[bool], Image.Image], style: str, cls) -> dict | None:
    """What a node shows of a set, or None when the preview is off. Beside a blurred picture goes the same one sharp, which nothing but our
    own page code looks at: to show it is then no reason to run again the node, and with it all that follows.

    Args:
        draw: makes the picture, blurred or sharp.
    """
    if style == "off":
        return None

    def images(blurred: bool) -> list:
        return ui.PreviewImage(to_image(draw(blurred)), cls=cls).as_dict()["images"]

    return {"images": images(True), "safe_denoiser_sharp": images(False)} if style == "blurred" else {"images": images(False)}


def contact_sheet(negation_set: NegationSet, name: str, style: str, cls) -> dict | None:
    """Contact sheet for the node, or None when the preview is off."""
    return as_preview(lambda blurred: contact_sheets.contact_sheet(negation_set, name, blurred=blurred), style, cls)


SHEET = ("Contact sheet on the node, up to 16 pictures. Blurred by default, since sets hold what people do not want to see. off: no "
         "preview is made or stored.")


def preview_input(tooltip: str = SHEET, optional: bool = False) -> io.Combo.Input:
    return io.Combo.Input("preview", options=["blurred", "shown", "off"], default="blurred", tooltip=tooltip, optional=optional)


def describe(negation_set: NegationSet, name: str) -> str:
    skipped = "".join(f"\nskipped {file}: {reason}" for file, reason in negation_set.skipped)
    return contact_sheets.describe(negation_set, name) + skipped


class LoadNegationSet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLoadNegationSet", display_name="Load Negation Set", category=CATEGORY,
            **PREVIEWS, **found_by("nsfw", "censor", "forget", "unlearn", "copyright", "negative images", "avoid", "ban", "image folder"),
            description="Pictures that must not come out (unsafe, copyrighted, a person who wishes to be forgotten): a folder or a zip "
                        "file in input/negation_sets or models/negation_sets, or a saved bank.",
            inputs=[
                io.Combo.Input("folder", options=[folders.CHOOSE, *folders.list_sets()], default=folders.CHOOSE,
                               tooltip="A folder or zip file of pictures under input/negation_sets or models/negation_sets, or a bank "
                                       "that Save Negation Bank wrote. Press R after adding one."),
                io.Int.Input("max_images", default=0, min=0, max=100_000,
                             tooltip="Use at most this many pictures, in the order of their names. 0: all of them."),
                preview_input(),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The pictures, decoded when they are needed."),
                     io.String.Output(display_name="info", tooltip="Name, count, size, and each skipped file with the reason.")],
        )

    @classmethod
    def validate_inputs(cls, folder=None):
        return folders.choice_problem(folders.SETS, folder)

    @classmethod
    def fingerprint_inputs(cls, folder=None, **_):
        return folders.choice_state(folders.SETS, folder)

    @classmethod
    def execute(cls, folder, max_images, preview) -> io.NodeOutput:
        negation_set = folders.read_set(folder, max_images, progress())
        info = describe(negation_set, folder)
        if negation_set.skipped:
            logging.warning("Load Negation Set: %s", info)
        return io.NodeOutput(negation_set, info, ui=contact_sheet(negation_set, folder, preview, cls))


class NegationSetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserNegationSetFromImages", display_name="Negation Set from Images", category=CATEGORY,
            **PREVIEWS, **found_by("negative image", "avoid image", "forget image", "ban"),
            description="A negation set from pictures in the graph, such as ones the model itself made from an unsafe prompt, as the "
                        "paper did.",
            is_input_list=True,  # Load Image (from Folder) gives a list: one set of all, not a set, a bank and a sampling for each
            inputs=[io.Image.Input("images", tooltip="Batch or list of pictures; each one becomes an item of the set."), preview_input()],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, images, preview) -> io.NodeOutput:
        negation_set = NegationSet.from_images([picture for batch in images for picture in batch])
        return io.NodeOutput(negation_set, ui=contact_sheet(negation_set, "images", preview[0], cls))


class CombineNegationSets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sets = [NegationSetType.Input(f"set_{i}", optional=i > 1, tooltip="A set to combine." + " Optional." * (i > 1)) for i in SLOTS]
        weights = [io.Float.Input(f"weight_{i}", default=1.0, min=0.0, max=100.0, step=0.05,
                                  tooltip=f"How many times each picture of set_{i} counts. 1: as any other. 0: the set is left out.")
                   for i in SLOTS]
        return io.Schema(
            node_id="SafeDenoiserCombineNegationSets", display_name="Combine Negation Sets", category=CATEGORY,
            **found_by("merge negative images", "avoid", "ban"),
            description="One set from up to four, with a weight for each. The weight is per picture, so a large set still counts more "
                        "than a small one of the same weight. For unlike things chain two Apply Safe Denoiser instead: merged into one, "
                        "their directions cancel.",
            inputs=[*sets, *weights],
            outputs=[NegationSetType.Output(display_name="negation_set", tooltip="The pictures of all sets, weighed."),
                     io.String.Output(display_name="info", tooltip="Count, size and skipped files of the combined set.")],
        )

    @classmethod
    def execute(cls, set_1, weight_1, weight_2, weight_3, weight_4, set_2=None, set_3=None, set_4=None) -> io.NodeOutput:
        given = [(one, weight) for one, weight in ((set_1, weight_1), (set_2, weight_2), (set_3, weight_3), (set_4, weight_4)) if one]
        negation_set = combine_sets(*zip(*given))
        return io.NodeOutput(negation_set, describe(negation_set, "combined"))


SLOTS = (1, 2, 3, 4)
NODES = [LoadNegationSet, NegationSetFromImages, CombineNegationSets]
