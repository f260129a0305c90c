"""Guard Model (SLD): safe latent diffusion, which pushes away from an unwanted condition at each step."""
from comfy_api.latest import io

from ...safe_denoiser.rules.sld import PRESETS, Sld
from ..io_types import CATEGORY, OWN_TEXT, ReportType, folded, found_by
from .sample import OUTPUT_REPORT
from .steer import patch

OWN = "own numbers"


class GuardModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        numbers, warmup = PRESETS["medium"]
        return io.Schema(
            node_id="SafeDenoiserGuardModel", display_name="Guard Model (SLD)", category=f"{CATEGORY}/guards",
            **found_by("safe latent diffusion", "sld", "nsfw", "safety guidance", "negative prompt"),
            description="Safe latent diffusion (arXiv:2211.05105): guidance gets a third prediction, under an unwanted condition, and "
                        "pushes away from it where the prompt's lies near. A layer of its own; Apply Safe Denoiser may come before or "
                        "after it.",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; it is cloned, the original stays as it is."),
                io.Conditioning.Input("unwanted", tooltip="A condition that asks for what must not come out, such as a prompt that names "
                                                          "it. Connected to Apply Safe Denoiser too, it is evaluated once for both."),
                io.Combo.Input("preset", options=[*PRESETS, OWN], default="medium",
                               tooltip="How hard it pushes, as published. max also changes pictures that have nothing unwanted in them. "
                                       "own numbers: those below."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                               tooltip="Times the push. 1: as published. 0: off, bit for bit."),
                *folded(
                    io.Float.Input("warmup", default=warmup, min=0.0, max=1.0, step=0.01,
                                   tooltip="Fraction of the schedule before which it only gathers momentum. For own numbers."),
                    io.Float.Input("scale", default=numbers.scale, min=0.0, max=100_000.0, step=10.0,
                                   tooltip="s_S: how soon a difference of two predictions counts fully. For own numbers."),
                    io.Float.Input("threshold", default=numbers.threshold, min=-10.0, max=10.0, step=0.001, round=0.0001,
                                   tooltip="lambda: it pushes where the prompt's prediction exceeds the unwanted one's by less than this. "
                                           "For own numbers."),
                    io.Float.Input("momentum_scale", default=numbers.momentum_scale, min=0.0, max=1.0, step=0.01,
                                   tooltip="s_m: how much of the pushes before is added. For own numbers."),
                    io.Float.Input("momentum_beta", default=numbers.momentum_beta, min=0.0, max=0.99, step=0.01,
                                   tooltip="beta_m: how slowly the pushes before are forgotten. For own numbers.")),
            ],
            hidden=OWN_TEXT,
            outputs=[io.Model.Output(tooltip="The patched model, for any sampler or guider."),
                     ReportType.Output(display_name="report", tooltip=OUTPUT_REPORT)],
        )

    @classmethod
    def execute(cls, model, unwanted, preset, strength, warmup, scale, threshold, momentum_scale, momentum_beta) -> io.NodeOutput:
        numbers, start = PRESETS.get(preset, (Sld(scale, threshold, momentum_scale, momentum_beta), warmup))
        banks = dict(bank=None, retain=None, reference=None)
        return io.NodeOutput(*patch(model, banks, start, 1.0, "exact", None, unwanted, method="sld", strength=strength, own=numbers))


NODES = [GuardModel]
