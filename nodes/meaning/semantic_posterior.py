"""Semantic Posterior: how likely a prediction is unsafe, by what CLIP sees in it."""
from comfy_api.latest import io

from ...safe_denoiser.meaning.semantic_posterior import SemanticPosterior
from ..bank.negation_bank import require_vae
from ..io_types import CATEGORY, NegationSetType, SemanticType, found_by
from .clip import clip_inputs, embed


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
        require_vae(vae)
        unsafe, retain = embed(clip, negation_set), embed(clip, retain_set)

        def begin(process_latent_out) -> SemanticPosterior:
            """One for each run, which remembers its latest answer."""
            return SemanticPosterior(clip, lambda denoised: vae.decode(process_latent_out(denoised)), unsafe, retain, every=every)

        return io.NodeOutput(begin)


NODES = [MakeSemanticPosterior]
