"""Class Condition: the prompt of a class-conditional model."""
import torch
from comfy_api.latest import io

from ..io_types import CATEGORY, found_by


class ClassCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserClassCondition", display_name="Class Condition", category=f"{CATEGORY}/class-conditional",
            **found_by("class label", "class conditional", "imagenet"),
            description="Conditioning for a class-conditional model: the class as a one-hot pooled vector, and a context of zeros.",
            inputs=[
                io.Int.Input("class_index", default=0, min=-1, max=99_999,
                             tooltip="Number of the class, from 0. -1: no class, all zeros (the empty prompt, for the negative input)."),
                io.Int.Input("classes", default=16, min=1, max=100_000,
                             tooltip="Length of the one-hot vector: how many classes the model was trained with (tiny digits: 16)."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive or negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, class_index, classes) -> io.NodeOutput:
        if class_index >= classes:
            raise ValueError(f"class_index is {class_index} but there are {classes} classes; choose 0 to {classes - 1}, or -1 for no class")
        pooled = torch.zeros(1, classes)
        if class_index >= 0:
            pooled[0, class_index] = 1
        return io.NodeOutput([[torch.zeros(1, 1, classes), {"pooled_output": pooled}]])


NODES = [ClassCondition]
