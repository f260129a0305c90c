"""Save and Load Unwanted Condition: a condition as a file, which can be shared as negative embeddings are."""
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...safe_denoiser.condition.saved_condition import SavedCondition, holds, load_condition, save_condition
from .. import folders
from ..fingerprint import fingerprint_weights
from ..io_types import CATEGORY, found_by
from ..models.model_calls import TOLD_OF, told
from ..progress import Live


class SaveUnwantedCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserSaveUnwantedCondition", display_name="Save Unwanted Condition", category=CATEGORY, is_output_node=True,
            **found_by("save conditioning", "export negative embedding", "save textual inversion"),
            description="Writes a condition as safetensors into output/unwanted_conditions, with the model that it belongs to and how good "
                        "it is. Whoever has that model can draw what it means: share it as you would share the pictures.",
            inputs=[
                io.Conditioning.Input("unwanted", tooltip="The condition to write, from Learn Unwanted Condition or a prompt."),
                io.Model.Input("model", tooltip="The model that it belongs to: of another one its numbers mean nothing."),
                io.String.Input("filename_prefix", default="unwanted",
                                tooltip="Start of the file name; a number is appended, nothing is overwritten."),
            ],
            outputs=[io.Conditioning.Output(display_name="unwanted", tooltip="The same condition, unchanged.")],
        )

    @classmethod
    def execute(cls, unwanted, model, filename_prefix) -> io.NodeOutput:
        told(unwanted)  # refuses what has several parts
        rows, options = unwanted[0]
        parts = {"rows": rows} | {name: value for name, value in options.items() if holds(name, value)}
        tensors = {name: value for name, value in parts.items() if hasattr(value, "shape")}
        numbers = {name: value for name, value in parts.items() if name not in tensors}
        left_out = sorted(name for name, value in options.items() if name not in parts and name != TOLD_OF and value is not None)
        saved = SavedCondition(tensors, numbers, fingerprint_weights(model), type(model.model).__name__,
                               {"text": options.get(TOLD_OF, "a prompt, not measured")})
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            f"{folders.CONDITIONS}/{filename_prefix}", folder_paths.get_output_directory())
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        save_condition(saved, path)
        text = f"{path.name}: {path.stat().st_size / 1024:.3g} KB" + f"; not saved: {', '.join(left_out)}" * bool(left_out)
        Live().send(text)
        return io.NodeOutput(unwanted, ui={"text": [text]})


class LoadUnwantedCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLoadUnwantedCondition", display_name="Load Unwanted Condition", category=CATEGORY,
            **found_by("load conditioning", "import negative embedding", "load textual inversion"),
            description="Reads a condition from output/unwanted_conditions or models/unwanted_conditions, for unwanted. It is refused on "
                        "another model than the one it was made with, whose numbers mean something else.",
            inputs=[
                io.Combo.Input("condition", options=folders.list_conditions(),
                               tooltip="A safetensors file that Save Unwanted Condition wrote. Press R after adding one."),
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.Boolean.Input("other_model", default=False,
                                 tooltip="Also take a condition that was made with other weights, such as those of the model that yours "
                                         "was fine-tuned from. Look at the pictures."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="unwanted", tooltip="The condition, for unwanted of Safe KSampler or Apply Safe "
                                                                        "Denoiser."),
                io.String.Output(display_name="text", tooltip="What the file says of itself: from what it was learned, how good it is."),
            ],
        )

    @classmethod
    def validate_inputs(cls, condition):
        return folders.problem(folders.CONDITIONS, condition)

    @classmethod
    def fingerprint_inputs(cls, condition, **_):
        return folders.state(folders.resolve(folders.CONDITIONS, condition))

    @classmethod
    def execute(cls, condition, model, other_model) -> io.NodeOutput:
        saved = load_condition(folders.resolve(folders.CONDITIONS, condition))
        same, family = saved.model == fingerprint_weights(model), type(model.model).__name__
        if not same and not other_model:
            raise ValueError(f"{condition!r} was made with another model ({saved.family or 'unknown'}; this one is {family}); load that "
                             f"one, learn the condition anew, or switch other_model on where yours was fine-tuned from it")
        text = saved.about.get("text", "") + "\nmade with other weights: look at the pictures" * (not same)
        Live().send(text)
        options = {name: value for name, value in {**saved.tensors, **saved.numbers}.items() if name != "rows"}
        options.setdefault("pooled_output", None)  # which some of ComfyUI's own nodes expect
        return io.NodeOutput([[saved.tensors["rows"], {**options, TOLD_OF: text}]], text, ui={"text": (text,)})


NODES = [SaveUnwantedCondition, LoadUnwantedCondition]
