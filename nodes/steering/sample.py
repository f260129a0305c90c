"""Apply Safe Denoiser and Safe KSampler."""
import comfy.samplers
import nodes as comfy_nodes
from comfy_api.latest import io

from ...safe_denoiser.denoiser import METHODS, SafeDenoiser
from ...safe_denoiser.rules.settings import WEIGHTS
from ..io_types import CATEGORY, OWN_TEXT, NegationBankType, ReportType, SemanticType, folded, found_by, wrong_wire
from .steer import patch


def bank_inputs() -> list[io.Input]:
    return [
        NegationBankType.Input("negation_bank", optional=True,
                               tooltip="Pictures that must not come out, from Build or Load Negation Bank. This or unwanted is needed."),
        NegationBankType.Input("retain_bank", optional=True,
                               tooltip="Pictures to keep: the sampler is steered from the negation bank towards these. Optional."),
        NegationBankType.Input("reference_bank", optional=True,
                               tooltip="The model's own samples, from Sample Reference Bank: harmless pictures then change less. "
                                       "Optional."),
    ]


def condition_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("unwanted", optional=True,
                              tooltip="A condition that asks for what must not come out, such as a prompt that names it: the model "
                                      "itself tells how near that is and where to go instead. Best on photographs. A step takes about "
                                      "half as long again. Optional."),
        io.Conditioning.Input("neutral", optional=True,
                              tooltip="A condition that means nothing in particular, such as an empty prompt, with which unwanted is "
                                      "compared. Needed at cfg 1; else the negative prompt serves. Optional."),
    ]


def check_input() -> io.Input:
    one, = folded(io.Boolean.Input(
        "check", default=True, optional=True,
        tooltip="With unwanted and a negation bank: see after runs, in at most 5 % of their time, if the condition means the pictures of "
                "the bank, and say so on the node and in the report."))
    return one


def guidance_inputs() -> list[io.Input]:
    return [
        *folded(io.Combo.Input("method", options=list(METHODS), default=SafeDenoiser.method,
                       tooltip="safe_denoiser: steers by what is connected (recommended). spell: pushes out of a shield around each "
                               "picture. official: the rule of the paper's published code; set strength 0.33 and window 0 to 0.22 as "
                               "published. sld: Guard Model (SLD), preset medium.")),
        io.Float.Input("strength", default=SafeDenoiser.strength, min=0.0, max=10.0, step=0.01,
                       tooltip="How far each prediction is moved: 1 as derived, 0 off (bit for bit the stock sampler), up to 2 for more."),
        io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01,
                       tooltip="Fraction of the schedule at which the safe denoiser starts. 0: from the first step."),
        io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01,
                       tooltip="Fraction of the schedule at which it stops. 1: to the last step. Early steps decide what a picture shows."),
        *folded(io.Combo.Input("bank_size", options=["exact", "interpolate"], default="exact",
                               tooltip="exact: a bank of another size than the latent is an error. interpolate: it is resized, which "
                                       "blurs it.")),
    ]


def number_inputs() -> list[io.Input]:
    """How P(unsafe) is found, for those who want to know."""
    return [
        io.Combo.Input("weight", options=list(WEIGHTS), default=SafeDenoiser.weight,
                       tooltip="How P(unsafe) is found. auto: witness with an unwanted condition; else evidence with a "
                               "reference bank (gaussian where distances cannot tell the banks apart), retain with a retain "
                               "bank, else unconditional (leave the negative prompt empty), else, at cfg 1, gate. The others "
                               "are for comparison. Only for method safe_denoiser."),
        io.Float.Input("prior", default=0.0, min=0.0, max=0.999, step=0.001,
                       tooltip="Share of unsafe pictures among what the model makes by itself, as a probability. Higher steers "
                               "harder. 0: automatic, 0.25 to 0.6 by the banks connected."),
        io.Float.Input("evidence", default=-1.0, min=-1.0, max=20.0, step=0.1,
                       tooltip="How much the prediction itself counts in P(unsafe). 0: not at all (the theorem as printed). "
                               "-1: automatic, 3 with a bank to compare with, 10 by parts, 1.5 without."),
        io.Float.Input("bandwidth", default=0.0, min=0.0, max=100.0, step=0.01,
                       tooltip="Kernel width around each picture, in latent units. 0: automatic."),
        io.Float.Input("temperature", default=0.0, min=0.0, max=100_000.0, step=0.1,
                       tooltip="Spreads the weights over more pictures. 1: exact densities. 0: automatic."),
        io.Float.Input("radius", default=0.0, min=0.0, max=10_000.0, step=0.1,
                       tooltip="Shield radius of spell, latent L2 distance. 0: automatic."),
        io.Float.Input("threshold", default=SafeDenoiser.threshold, min=0.0, max=1e6, step=1e-9, round=False,
                       tooltip="Gate of method official: open where the kernel sum exceeds it. 0: always open."),
    ]


OUTPUT_REPORT = "What was done at each step. Connect it to Safe Denoiser Report."


class ApplySafeDenoiser(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        method, strength, *rest = guidance_inputs()
        return io.Schema(
            node_id="SafeDenoiserApply", display_name="Apply Safe Denoiser", category=CATEGORY,
            **found_by("nsfw", "censor", "safe", "safety", "forget", "unlearn", "erase concept", "copyright", "negative image",
                       "negative guidance", "avoid", "ban", "spell", "cfg 1 negative"),
            description="Patches a model so that any sampler and guider steers away from the negation bank, or the unwanted condition, at "
                        "each step (arXiv:2502.08011).",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; it is cloned, the original stays as it is."), *bank_inputs(),
                method, strength, *rest, *folded(*number_inputs()),
                SemanticType.Input("semantic", optional=True,
                                   tooltip="Experimental, from Semantic Posterior: P(unsafe) by what the prediction means. Needs "
                                           "retain_bank. Optional."),
                *folded(io.Int.Input("parts", default=0, min=0, max=6, optional=True,
                                     tooltip="1: pictures are compared as a whole. 2 or more: by windows of 1/2 or less of each side, for "
                                             "what is only a part of the picture; where it is in each picture of the bank is found by "
                                             "itself. Needs reference_bank or retain_bank. 0: automatic, 2 where windows tell the banks "
                                             "apart better, else 1.")),
                *condition_inputs(), check_input(),
            ],
            hidden=OWN_TEXT,
            outputs=[io.Model.Output(tooltip="The patched model, for any sampler or guider."),
                     ReportType.Output(display_name="report", tooltip=OUTPUT_REPORT)],
        )

    @classmethod
    def execute(cls, model, method, strength, start, end, bank_size, weight, prior, evidence, bandwidth, temperature, radius, threshold,
                negation_bank=None, retain_bank=None, reference_bank=None, semantic=None, parts=0, unwanted=None,
                neutral=None, check=True) -> io.NodeOutput:
        banks = dict(bank=negation_bank, retain=retain_bank, reference=reference_bank)
        numbers = dict(prior=prior, bandwidth=bandwidth, temperature=temperature, radius=radius, parts=parts)
        automatic = {name: value or None for name, value in numbers.items()} | {"evidence": None if evidence < 0 else evidence}
        return io.NodeOutput(*patch(model, banks, start, end, bank_size, semantic, unwanted, neutral, check, method=method,
                                    strength=strength, weight=weight, threshold=threshold, **automatic))


class SafeKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserKSampler", display_name="Safe KSampler", category=CATEGORY,
            **found_by("nsfw", "censor", "safe", "safety", "forget", "unlearn", "erase concept", "copyright", "negative image", "avoid",
                       "ban", "sampler"),
            description="KSampler that steers away from a negation bank, or an unwanted condition, at each step, with no training "
                        "(arXiv:2502.08011). The same as Apply Safe Denoiser followed by KSampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising the input latent."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Seed of the noise."),
                io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Number of sampling steps."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Classifier-free guidance scale. 1: no guidance."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler",
                               tooltip="The sampling algorithm."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="The noise schedule."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show, in words."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Amount of denoising: below 1 keeps some of the input latent. 0: returns it as it is."),
                *bank_inputs(), *guidance_inputs(), *condition_inputs(), check_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent."), ReportType.Output(display_name="report", tooltip=OUTPUT_REPORT)],
        )

    @classmethod
    def validate_inputs(cls, input_types):
        return wrong_wire(cls, input_types)

    @classmethod
    def execute(cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, method, strength,
                start, end, bank_size, negation_bank=None, retain_bank=None, reference_bank=None, unwanted=None,
                neutral=None, check=True) -> io.NodeOutput:
        banks = dict(bank=negation_bank, retain=retain_bank, reference=reference_bank)
        patched, report = patch(model, banks, start, end, bank_size, None, unwanted, neutral, check, method=method, strength=strength)
        latent = comfy_nodes.common_ksampler(patched, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
                                             denoise=denoise)[0]
        return io.NodeOutput(latent, report)


NODES = [ApplySafeDenoiser, SafeKSampler]
