"""Load Tiny World: the models that ship with the pack, which are in none of ComfyUI's lists of models."""
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ...safe_denoiser.pictures.files import printable
from ..folders import MODELS, TINY
from ..io_types import CATEGORY, found_by
from ..progress import server


def worlds() -> dict[str, list[Path]]:
    """The worlds that are there: of each its model and its VAE."""
    found = {world: [file for kind in MODELS for file in sorted((folder / kind).glob("*.safetensors"))[:1]]
             for world, folder in TINY.items()}
    return {world: files for world, files in found.items() if len(files) == len(MODELS)}


def by_places(model):
    """The same model; where each place of its latents is a token, with the right number of them: ComfyUI's SD 3 rounds a side up to its
    patches by (side + 1) // patch, which for patches of one place is one too many.
    """
    network = model.model.diffusion_model
    if network.x_embedder.patch_size[0] != 1:
        return model
    positions, together = network.cropped_pos_embed, network.unpatchify
    model.add_object_patch("diffusion_model.cropped_pos_embed", lambda hw, device=None: positions([side - 1 for side in hw], device))
    model.add_object_patch("diffusion_model.unpatchify", lambda x, hw: together(x, [side - 1 for side in hw]))
    return model


class LoadTinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLoadTinyWorld", display_name="Load Tiny World", category=f"{CATEGORY}/class-conditional",
            **found_by("tiny", "demo", "example model", "digits", "mnist"),
            description="A model and its VAE that come with the pack, small enough for any machine, to try its nodes on. Prompts "
                        "are classes: Class Condition.",
            inputs=[io.Combo.Input("world", options=[*worlds()],
                                   tooltip="What the model draws. digits: handwritten ones, of 32 by 32 pixels. photographs: of "
                                           "airplanes, automobiles, ships and trucks, of 64 by 64 pixels.")],
            outputs=[io.Model.Output(tooltip="For a sampler."), io.Vae.Output(tooltip="Of that model, for VAE Decode and for banks.")],
        )

    @classmethod
    def execute(cls, world) -> io.NodeOutput:
        if world not in (there := worlds()):
            raise ValueError(f"there is no tiny world {printable(repr(world))} in this copy of the pack; choose one of: {', '.join(there)}")
        model, vae = map(str, there[world])
        return io.NodeOutput(by_places(comfy.sd.load_diffusion_model(model)), comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae)))


def list_what_is_asked_for(data: dict) -> dict:
    """Workflows made before this node was there name the files in ComfyUI's own loaders. These take what is in their lists alone, so the
    lists get what a workflow that is about to run asks for, and nobody else sees it.
    """
    asked = repr(data.get("prompt"))
    for file in (file for files in worlds().values() for file in files if repr(file.name) in asked):
        folder_paths.add_model_folder_path(file.parent.name, str(file.parent))
    return data


def register() -> None:
    """Look at what is about to run, where there is a server."""
    if there := server():
        there.add_on_prompt_handler(list_what_is_asked_for)


NODES = [LoadTinyWorld]
