"""Apply Safe Denoiser and Safe KSampler: the only place where the core meets the sampling loop."""
import json
import math
from dataclasses import replace

import comfy.patcher_extension
import comfy.samplers
import nodes as comfy_nodes
import torch
from comfy_api.latest import io

from ..safe_denoiser import Bank, Report, SafeDenoiser
from ..safe_denoiser.denoiser import METHODS, WEIGHTS
from .bank import require_pictures
from .conditions import Witness, hookable
from .live import Live
from .loading import Banks
from .runs import remember, source
from .types import CATEGORY, NegationBankType, ReportType, SemanticType, found_by

KEY, POST_CFG = "safe_denoiser", "sampler_post_cfg_function"
MISSED = "the unwanted condition was not evaluated in some model calls: the guider, or a node beside this one, asks the model its own way"


def forward_process(model_sampling, sigma: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(std, alpha) of x = alpha x0 + std eps, (B,) each, for any model class: asked of ComfyUI's own noise_scaling. std is what a sampler
    calls sigma, but where a model's noise has a scale of its own.
    """
    one = torch.ones([len(sigma)] + [1] * (ndim - 1), device=sigma.device)
    std = model_sampling.noise_scaling(sigma, one, torch.zeros_like(one))
    alpha = model_sampling.noise_scaling(sigma, torch.zeros_like(one), one)
    if _is(model_sampling, "V_PREDICTION_DDPM"):  # CogVideoX: its samplers, and its predictions, know x of variance 1 only
        std, alpha = (value / (1 + sigma.square()).sqrt().view_as(value) for value in (std, alpha))
    return std.flatten(), alpha.flatten()


def _is(model_sampling, kind: str) -> bool:
    """Whether it is of a kind of ComfyUI's, which not every release has."""
    return any(base.__name__.startswith(kind) for base in type(model_sampling).__mro__)


class Picture:
    """The picture's part of what is sampled. Newer ComfyUI packs latents of picture and sound as (B, 1, N), the picture first; what is
    not the picture's stays as it is, bit for bit.
    """

    def __init__(self, shapes: list | None):
        self.shape = tuple(shapes[0])[1:] if shapes and len(shapes) > 1 else None

    def of(self, packed: torch.Tensor | None) -> torch.Tensor | None:
        """(B, C, *spatial) of a packed (B, 1, N); of a picture alone, itself."""
        if self.shape is None or packed is None:
            return packed
        return packed[..., :math.prod(self.shape)].reshape(len(packed), *self.shape)

    def put(self, packed: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """`packed` with another picture."""
        if self.shape is None:
            return picture
        return torch.cat([picture.reshape(len(packed), 1, -1), packed[..., math.prod(self.shape):]], -1)


def std_at(model_sampling, percent: float) -> float:
    """Standard deviation of the noise at a fraction of the schedule, as `forward_process` measures it."""
    sigma = torch.as_tensor(model_sampling.percent_to_sigma(percent), dtype=torch.float32)
    return float(forward_process(model_sampling, sigma.cpu().reshape(1), 4)[0])


def refuse(patcher, noise: torch.Tensor) -> None:
    """Raise where there is no picture to steer: not a picture, or not a diffusion of one."""
    require_pictures(noise, patcher.get_model_object("latent_format"))
    if _is(patcher.get_model_object("model_sampling"), "IMG_TO_IMG"):
        raise ValueError(f"{type(patcher.model).__name__} maps one picture to another and has no noise level at which to compare it "
                         f"with a bank; the safe denoiser needs a diffusion model, so sample this one without it")


def watch(model_options: dict, guider) -> tuple[dict, list, dict]:
    """Let a post-CFG function note what guidance computed, and hold back those that the running sampler itself added.

    CFG++ samplers catch `uncond_denoised` there and step from it: x' = a denoised - b uncond_denoised + c x. They equal their plain
    namesakes where both predictions are the same, so a correction acts as under plain CFG if, and only if, it moves both; therefore
    their functions are called after the correction, see `call_late`.

    Returns:
        model_options with the noting function instead, the functions held back, and a dict that will hold the notes.
    """
    functions, own = model_options.get(POST_CFG, []), guider.model_options.get(POST_CFG, [])
    late, seen = [fn for fn in functions if fn not in own], {}

    def note(args):
        seen.update(args)
        return args["denoised"]

    return {**model_options, POST_CFG: [fn for fn in functions if fn in own] + [note]}, late, seen


def call_late(late: list, seen: dict, denoised: torch.Tensor, safe_denoised: torch.Tensor) -> torch.Tensor:
    """Call what `watch` held back, with both predictions moved as `denoised` was."""
    if not late or not seen:  # not CFG++, or a guider that calls no post-CFG function
        return safe_denoised
    if safe_denoised is not denoised:
        shift = safe_denoised - denoised
        seen = seen | {key: seen[key] + shift for key in ("cond_denoised", "uncond_denoised")}
    for fn in late:
        safe_denoised = fn({**seen, "denoised": safe_denoised})
    return safe_denoised


def guidance(guider, seen: dict) -> dict[str, torch.Tensor]:
    """The predictions that guidance was made of, as `SafeDenoiser.safe` names them, or nothing: at cfg 1 ComfyUI hands over zeros in
    place of the negative prompt's, a nested DualCFGGuider that of its middle prompt, and a cache that skips the model nothing. A guider
    that asks another model for it (DualModelGuider) hands it over under conditions that are not among its own.
    """
    uncond = seen.get("uncond")
    if uncond is None or any(uncond is conds for name, conds in guider.conds.items() if name != "negative"):
        return {}
    return {"unconditional": seen["uncond_denoised"], "conditional": seen["cond_denoised"]}


def require(banks: dict[str, Bank | None], unwanted, neutral, method: str, weight: str) -> None:
    """Raise where nothing says what must not come out, or something is connected that means nothing without it."""
    if unwanted is None:
        if neutral is not None:
            raise ValueError("neutral is connected and unwanted is not; neutral is what unwanted is compared with, so connect unwanted too")
        if weight == "witness":
            raise ValueError("weight 'witness' compares with the prediction under an unwanted condition, and none is connected; connect "
                             "unwanted, or choose weight 'auto'")
    if banks["bank"] is not None:
        return
    if unwanted is None:
        raise ValueError("nothing says what must not come out; connect negation_bank (from Build or Load Negation Bank), or unwanted (a "
                         "condition that means it, such as a prompt that asks for it), or both")
    if method != "safe_denoiser" or weight not in ("auto", "witness"):
        raise ValueError(f"{f'method {method!r}' if method != 'safe_denoiser' else f'weight {weight!r}'} steers by a negation bank, and "
                         f"none is connected; connect negation_bank, or choose method 'safe_denoiser' and weight 'auto'")


def patch(model, banks: dict[str, Bank | None], start: float, end: float, bank_size: str, semantic=None, unwanted=None, neutral=None,
          **settings):
    """A clone of `model` that samples away from the bank and the unwanted condition, and the Report that its latest run fills.

    Args:
        banks: `bank`, `retain` and `reference`, as SafeDenoiser names them.
        start, end: window, as fractions of the schedule.
        bank_size: "exact" refuses a bank of another size, "interpolate" resizes it.
        semantic: from Semantic Posterior.
        unwanted, neutral: CONDITIONING that means what must not come out, and one that means nothing in particular.
        settings: the other arguments of SafeDenoiser.
    """
    method, weight = settings["method"], settings.get("weight", "auto")
    require(banks, unwanted, neutral, method, weight)
    SafeDenoiser(**banks, **settings, semantic=semantic)  # says at once what is wrong with them
    used = method == "safe_denoiser" and settings["strength"] != 0
    given = {name: one for name, one in (("unwanted", unwanted), ("neutral", neutral)) if used and one is not None}
    patched, report, run = hookable(model, [*given.values()]), Report([], [], source()), {}
    witness, loaded = Witness(given, patched), Banks(banks, bank_size)

    def hold(patcher, noise):
        refuse(patcher, noise)
        loaded.hold(patcher, noise.shape)

    def begin(guider, noise, sigmas=None, denoise_mask=None):
        picture = Picture(getattr(guider.inner_model, "latent_shapes", None))
        noise = picture.of(noise)
        if not loaded.held:  # a guider that loaded its models its own way
            hold(guider.model_patcher, noise)
        sampling, moved, notes = guider.inner_model.model_sampling, loaded.now(), loaded.notes
        window = {"sigma_start": std_at(sampling, start), "sigma_end": std_at(sampling, end)}
        meant = semantic and semantic(guider.inner_model.process_latent_out)
        denoiser = SafeDenoiser(**moved, **settings, **window, semantic=meant)
        if denoiser.strength and denoiser.inside:
            notes.append(f"compared by parts of the picture, in {len(denoiser.inside)} windows")
        if unwanted is not None and method != "safe_denoiser":
            notes.append(f"method {method} does not know the unwanted condition, only safe_denoiser does")
        run.update(denoiser=denoiser, sampling=sampling, picture=picture, live=Live(), sigmas=sigmas, mask=denoise_mask)
        report.steps.clear()
        report.notes[:] = dict.fromkeys(notes)
        origin = banks["bank"] and banks["bank"].metadata.get("origin")  # of a compressed bank: the picture each prototype stands for
        run["origin"] = origin and torch.tensor(json.loads(origin), device=noise.device)

    def mask_at(timestep, model_options, guider):
        change = model_options.get("denoise_mask_function")  # Differential Diffusion: another mask at each step
        if run["mask"] is None or change is None:
            return run["mask"]
        return change(timestep, run["mask"], extra_options={"model": guider, "sigmas": run["sigmas"]})

    def sampler_sample(executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs):
        begin(guider, noise, sigmas, denoise_mask)
        witness.begin(guider, noise, latent_image, denoise_mask, extra_args.get("seed"))
        try:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
        finally:
            run["live"].end(report)
            run.clear()
            witness.offsets = {}

    def outer_sample(executor, noise, *args, **kwargs):
        hold(executor.class_obj.model_patcher, Picture(kwargs.get("latent_shapes")).of(noise))
        try:
            samples = executor(noise, *args, **kwargs)
        finally:
            loaded.held = {}
        remember(report, samples)
        return samples

    def correct(x, raw, level, mask, guides, reach):
        """`safe`, as far as the conditions reach; with neither a bank nor a prediction to go by, inside a window that is never open."""
        denoiser, picture = run["denoiser"], run["picture"]
        if "unwanted" not in guides and (denoiser.bank is None or weight == "witness"):
            denoiser, guides = replace(denoiser, sigma_start=0.0), {"unwanted": raw, "conditional": raw}
        if reach is not None:
            mask = reach if mask is None else reach * mask
        guides = {name: picture.of(prediction) for name, prediction in guides.items()}
        found, step = denoiser.safe(picture.of(x), picture.of(raw), *level, picture.of(mask), **guides)
        safe_denoised = raw if step is None else picture.put(raw, found)
        return safe_denoised if reach is None else raw + reach * (safe_denoised - raw), step

    def predict_noise(executor, x, timestep, model_options, *args, **kwargs):
        guider = executor.class_obj
        if not run:  # a guider that was called without its sampler
            begin(guider, x)
        mask, level = mask_at(timestep, model_options, guider), forward_process(run["sampling"], timestep, x.ndim)
        model_options, late, seen = watch(model_options, guider)
        shared = model_options.get(KEY, {})  # of several patches on one model, all correct the prediction that the innermost got
        model_options = {**model_options, KEY: shared}
        if witness.given:
            model_options = witness.ask(guider, shared, model_options, timestep, bool(run["denoiser"].opens(level[0]).any()))
        denoised = executor(x, timestep, model_options, *args, **kwargs)
        guides = guidance(guider, seen)
        if guides:
            run["offset"] = guides["unconditional"] - x
        elif not seen and "offset" in run:  # a cache skipped the model: go on as LazyCache does, with the offset of the latest call
            guides = {"unconditional": x + run["offset"]}
        if seen and seen["cond"] is guider.conds.get("positive"):
            shared.setdefault("conditional", seen["cond_denoised"])
        raw, guides = shared.setdefault("predictions", (denoised, guides))
        heard = witness.heard(shared, x, guides) if witness.given else {}
        if witness.missed and MISSED not in report.notes:
            report.notes.append(MISSED)
        safe_denoised, step = correct(x, raw, level, mask, guides | heard, witness.reach(guider, x, timestep) if heard else None)
        if raw is not denoised:
            safe_denoised = denoised if step is None else denoised + (safe_denoised - raw)
        if step is not None:
            report.steps.append(step if run["origin"] is None else
                                replace(step, nearest=torch.where(step.nearest < 0, -1, run["origin"][step.nearest])))
            run["live"].show(report.steps)
        return call_late(late, seen, denoised, safe_denoised)

    wrappers = comfy.patcher_extension.WrappersMP
    patched.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, outer_sample)
    patched.add_wrapper_with_key(wrappers.PREPARE_SAMPLING, KEY, loaded.prepare_sampling)
    patched.add_wrapper_with_key(wrappers.SAMPLER_SAMPLE, KEY, sampler_sample)
    patched.add_wrapper_with_key(wrappers.PREDICT_NOISE, KEY, predict_noise)
    predict = patched.wrappers[wrappers.PREDICT_NOISE]  # the first is the outermost: a cache that skips the model must not skip us
    patched.wrappers[wrappers.PREDICT_NOISE] = {KEY: predict.pop(KEY), **predict}
    return patched, report


def bank_inputs() -> list[io.Input]:
    return [
        NegationBankType.Input("negation_bank", optional=True,
                               tooltip="Pictures that must not come out, from Build or Load Negation Bank. This or unwanted is needed."),
        NegationBankType.Input("retain_bank", optional=True,
                               tooltip="Pictures to keep: the sampler is steered from the negation bank towards these. Optional."),
        NegationBankType.Input("reference_bank", optional=True,
                               tooltip="The model's own samples, from Sample Reference Bank. Gives the best results. Optional."),
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


def guidance_inputs() -> list[io.Input]:
    return [
        io.Combo.Input("method", options=list(METHODS), default="safe_denoiser",
                       tooltip="safe_denoiser: steers by the banks that are connected (recommended). spell: pushes out of a shield around "
                               "each picture. official: the rule of the paper's published code; set strength 0.33 and window 0 to 0.22 as "
                               "published."),
        io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                       tooltip="How far each prediction is moved: 1 as derived, 0 off (bit for bit the stock sampler), up to 2 for more."),
        io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01,
                       tooltip="Fraction of the schedule at which the safe denoiser starts. 0: from the first step."),
        io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01,
                       tooltip="Fraction of the schedule at which it stops. 1: to the last step. Early steps decide what a picture shows."),
        io.Combo.Input("bank_size", options=["exact", "interpolate"], default="exact",
                       tooltip="exact: a bank of another size than the latent is an error. interpolate: it is resized, which blurs it."),
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
                method, strength, *rest,
                io.Combo.Input("weight", options=list(WEIGHTS), default="auto",
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
                io.Float.Input("threshold", default=1e-9, min=0.0, max=1e6, step=1e-9, round=False,
                               tooltip="Gate of method official: open where the kernel sum exceeds it. 0: always open."),
                SemanticType.Input("semantic", optional=True,
                                   tooltip="Experimental, from Semantic Posterior: P(unsafe) by what the prediction means. Needs "
                                           "retain_bank. Optional."),
                io.Int.Input("parts", default=0, min=0, max=6, optional=True,
                             tooltip="1: pictures are compared as a whole. 2 or more: by windows of 1/2 or less of each side, for what is "
                                     "only a part of the picture; where it is in each picture of the bank is found by itself. Needs "
                                     "reference_bank or retain_bank. 0: automatic, 2 where windows tell the banks apart better, else 1."),
                *condition_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for any sampler or guider."),
                     ReportType.Output(display_name="report", tooltip=OUTPUT_REPORT)],
        )

    @classmethod
    def execute(cls, model, method, strength, start, end, bank_size, weight, prior, evidence, bandwidth, temperature, radius, threshold,
                negation_bank=None, retain_bank=None, reference_bank=None, semantic=None, parts=0, unwanted=None,
                neutral=None) -> io.NodeOutput:
        return io.NodeOutput(*patch(
            model, dict(bank=negation_bank, retain=retain_bank, reference=reference_bank), start, end, bank_size, semantic, unwanted,
            neutral, method=method, weight=weight, strength=strength, prior=prior or None, evidence=None if evidence < 0 else evidence,
            bandwidth=bandwidth or None,
            temperature=temperature or None, radius=radius or None, threshold=threshold, parts=parts or None))


class SafeKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserKSampler", display_name="Safe KSampler", category=CATEGORY,
            **found_by("nsfw", "censor", "safe", "safety", "forget", "unlearn", "erase concept", "copyright", "negative image", "avoid",
                       "ban", "sampler", essential="Image Generation"),
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
                *bank_inputs(), *guidance_inputs(), *condition_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent."), ReportType.Output(display_name="report", tooltip=OUTPUT_REPORT)],
        )

    @classmethod
    def execute(cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, method, strength,
                start, end, bank_size, negation_bank=None, retain_bank=None, reference_bank=None, unwanted=None,
                neutral=None) -> io.NodeOutput:
        banks = dict(bank=negation_bank, retain=retain_bank, reference=reference_bank)
        patched, report = patch(model, banks, start, end, bank_size, None, unwanted, neutral, method=method, strength=strength)
        latent = comfy_nodes.common_ksampler(patched, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
                                             denoise=denoise)[0]
        return io.NodeOutput(latent, report)


NODES = [ApplySafeDenoiser, SafeKSampler]
