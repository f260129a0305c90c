"""The only place where the core meets the sampling loop: a model is patched, and each run of a guider on it is steered."""
import json
import logging
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import comfy.patcher_extension
import torch

from ..safe_denoiser import Bank, Report, SafeDenoiser, Step
from ..safe_denoiser.denoiser import METHODS
from ..safe_denoiser.report import STOPPED, UNSTEERED
from ..safe_denoiser.trust import looks_exchanged, require_unlike
from ..safe_denoiser.weak import NO_NEUTRAL, weaknesses
from .condition_check import ConditionCheck
from .conditions import HANDLER, Witness, hookable, listen
from .guidance import around, call_late, carry, guidance, predicted, watch
from .live import Board, Live
from .loading import hold, prepare_sampling, require_size
from .noise import forward_process, refuse, std_at
from .runs import remember, remembered, source

KEY = "safe_denoiser"
MISSED = "the unwanted condition was not evaluated in some model calls: the guider, or a node beside this one, asks the model its own way"
UNTOLD = "the sampler was started without a word to this node: a mask, if there is one, is not known, and whole pictures are compared"
RISES = "the noise rises from step to step (unsampling): nothing is steered, so that sampling again can lead elsewhere"
MIDWAY = "the run begins in the middle of a schedule, and its earlier part is not known here: what the prompt asks for is judged anew"
UNGUIDED = "there is no guidance (cfg 1), and safe latent diffusion is a part of it: nothing is done"
EXCHANGED = ("the model's own pictures are nearer to the negation bank than to the reference bank: if the two wires are exchanged, the "
             "sampler is steered TOWARDS what must not come out")
ALIKE = ("model calls the prediction under the unwanted condition was that of the prompt, bit for bit: either both say the same, or "
         "another pack keeps predictions from call to call and gives one for the other, and then the unwanted condition does nothing there")
ROWS = "the sampler asks for parts of the batch at a time: what earlier calls told of each picture is not known"


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


def _names(bank: Bank) -> dict[int, str]:
    """Of its pictures, by index; of a compressed bank those that its prototypes stand for."""
    origin = json.loads(bank.metadata["origin"]) if "origin" in bank.metadata else range(len(bank.names))
    return dict(zip(origin, bank.names))


def require(banks: dict[str, Bank | None], unwanted, neutral, method: str, weight: str) -> None:
    """Raise where nothing says what must not come out, where something is connected that means nothing without it, or to the wrong input.
    """
    require_unlike(banks["bank"], {name: bank for name, bank in banks.items() if name != "bank"})
    if unwanted is None:
        if neutral is not None:
            raise ValueError("neutral is connected and unwanted is not; neutral is what unwanted is compared with, so connect unwanted too")
        if weight == "witness":
            raise ValueError("weight 'witness' compares with the prediction under an unwanted condition, and none is connected; connect "
                             "unwanted, or choose weight 'auto'")
        if method == "sld":
            raise ValueError("method 'sld' pushes away from the prediction under an unwanted condition, and none is connected; connect "
                             "unwanted")
    if banks["bank"] is not None or method == "sld":
        return
    if unwanted is None:
        raise ValueError("nothing says what must not come out; connect negation_bank (from Build or Load Negation Bank), or unwanted (a "
                         "condition that means it, such as a prompt that asks for it), or both")
    if method != "safe_denoiser" or weight not in ("auto", "witness"):
        raise ValueError(f"{f'method {method!r}' if method != 'safe_denoiser' else f'weight {weight!r}'} steers by a negation bank, and "
                         f"none is connected; connect negation_bank, or choose method 'safe_denoiser' and weight 'auto'")


class Run:
    """One run of a guider on a patched model: what corrects it, and what is remembered from call to call.

    Each run has its own, since a sampler may sample the same patched model inside its own run (by regions, to look ahead).

    Args:
        patch: whose run it is.
        guider: who samples; not kept, since a run may be left without an end.
        noise: that is sampled, of the picture alone.
        report: to fill.
        told: whether it will be told when it ends.
    """

    def __init__(self, patch: "Patch", guider, noise: torch.Tensor, report: Report, told: bool):
        refuse(guider.model_patcher, noise)
        self.patch, self.patcher, self.report, self.told = patch, guider.model_patcher, report, told
        self.witness, self.live, self.memory = Witness(patch.given), Live(patch.board, id(patch)), {}
        self.held = self._hold(noise.shape)
        self.sampling, self.rises, self.calling = None, False, False  # until it begins

    def _hold(self, shape) -> dict:
        return {name: hold(bank, self.patcher, shape, self.patch.bank_size) for name, bank in self.patch.banks.items()}

    def begin(self, guider, noise: torch.Tensor, sigmas: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> None:
        """The sampler is about to start: the model is loaded, and the banks with it."""
        self.sampling, self.sigmas, self.mask = guider.inner_model.model_sampling, sigmas, mask
        self.picture = Picture(getattr(guider.inner_model, "latent_shapes", None))
        self.fresh = sigmas is not None and float(sigmas[0]) >= 0.99 * float(self.sampling.percent_to_sigma(0.01))
        self.exchanged = None
        self.offset, self.rows, self.lowest, self.highest = None, len(noise), math.inf, -math.inf
        self.rises = sigmas is not None and len(sigmas) > 1 and bool(sigmas[-1] > sigmas[0])
        self.patch.begun = True
        self.report.steps.clear()
        self.report.notes[:] = [note for note, so in ((UNTOLD, sigmas is None), (RISES, self.rises)) if so and self.patch.on]
        self.report.weak[:] = weaknesses(self.patch.denoiser, "unwanted" in self.patch.connected) if self.patch.on else []
        denoiser = self._denoiser(guider, self.held, self.picture.of(noise).shape)
        self.denoisers = {tuple(self.picture.of(noise).shape[1:]): denoiser}
        if denoiser.strength and denoiser.inside:
            self.note(f"compared by parts of the picture, in {len(denoiser.inside)} windows")
        if "unwanted" in self.patch.connected and not METHODS[denoiser.method].hears:
            self.note(f"method {denoiser.method} does not know the unwanted condition, only safe_denoiser does")
        bank = self.patch.denoiser.bank
        origin = bank and bank.metadata.get("origin")  # of a compressed bank: the picture that
        self.origin = origin and torch.tensor(json.loads(origin), device=noise.device)  # each prototype stands for

    def end(self, finished: bool) -> None:
        """It is over, or was stopped: the node tells what was done, and where nothing was, though it was meant, the log does too."""
        if self.sampling is None:
            return
        if self.exchanged is not None and bool(self.exchanged):
            self.note(EXCHANGED)
            logging.warning("safe denoiser: %s", EXCHANGED)
        if self.witness.alike and (alike := int(torch.stack(self.witness.alike).sum())):
            self.note(f"in {alike} of {len(self.witness.alike)} {ALIKE}")
        if not finished and self.patch.on and self.sigmas is not None:
            self.note(f"{STOPPED} {len(self.report.steps)} model calls of a schedule of {len(self.sigmas) - 1} steps")
        elif finished and self.patch.meant and not self.report.steps and (self.sigmas is None or len(self.sigmas) > 1):
            self.patch.unsteered(self.report)
        if self.report is self.patch.report:
            self.live.end(self.report, self.patch.on, finished)

    def note(self, text: str) -> None:
        if text and text not in self.report.notes:
            self.report.notes.append(text)

    def _denoiser(self, guider, held: dict, shape) -> SafeDenoiser:
        """What corrects, with banks in the form for one size."""
        for name, one in held.items():
            if self.patch.on:
                require_size(self.patch.banks[name], one.bank, shape)
        for note in filter(None, (one.note for one in held.values())):
            self.note(note)
        patch, semantic = self.patch, self.patch.denoiser.semantic
        return replace(patch.denoiser, **{name: one.bank for name, one in held.items()}, memory=self.memory,
                       sigma_start=0.0 if self.rises else std_at(self.sampling, patch.start), sigma_end=std_at(self.sampling, patch.end),
                       semantic=semantic and semantic(guider.inner_model.process_latent_out))

    def denoiser_for(self, guider, x: torch.Tensor) -> SafeDenoiser:
        """What corrects x, which some samplers make larger on their way; then banks that may be resized follow."""
        shape = tuple(self.picture.of(x).shape[1:])
        if shape not in self.denoisers:
            self.denoisers[shape] = self._denoiser(guider, self._hold((len(x), *shape)), (len(x), *shape))
        denoiser = self.denoisers[shape]
        if len(x) != self.rows:
            denoiser.forget()  # the rows before need not be these
            self.note(ROWS)
        return denoiser

    def is_over(self, sigma: float) -> bool:
        """Whether a call at this noise level belongs to a next run; asked only where nobody tells."""
        over = sigma >= self.highest and self.lowest < self.highest
        self.lowest, self.highest = min(self.lowest, sigma), max(self.highest, sigma)
        return over

    def begins_step(self, timestep: torch.Tensor) -> torch.Tensor | bool:
        """Whether a call at this noise level is none of a sampler's between two levels of the schedule, as far as that is known; on the
        device, so that nobody waits for it.
        """
        level = timestep.max()
        return self.sigmas is None or ((self.sigmas.to(level) - level).abs() <= 1e-4 * level).any()

    def mask_at(self, guider, timestep: torch.Tensor, model_options: dict) -> torch.Tensor | None:
        change = model_options.get("denoise_mask_function")  # Differential Diffusion: another mask at each step
        if self.mask is None or change is None:
            return self.mask
        return change(timestep, self.mask, extra_options={"model": guider, "sigmas": self.sigmas})

    def correct(self, denoiser: SafeDenoiser, x, raw, level, mask, guides: dict, reach, begins) -> tuple[torch.Tensor, Step | None]:
        """`safe`, as far as the conditions reach; with neither a bank nor a prediction to go by, inside a window that is never open."""
        picture = self.picture
        if "unwanted" not in guides and (denoiser.bank is None or denoiser.weight == "witness"):
            denoiser, guides = replace(denoiser, sigma_start=0.0, memory={}), {"unwanted": raw, "conditional": raw}
        if reach is not None:
            mask = reach if mask is None else reach * mask
        guides = {name: picture.of(prediction) for name, prediction in guides.items()}
        found, step = denoiser.safe(picture.of(x), picture.of(raw), *level, picture.of(mask), **guides, begins=begins)
        safe_denoised = raw if step is None else picture.put(raw, found)
        return safe_denoised if reach is None else raw + reach * (safe_denoised - raw), step

    def compare(self, denoiser: SafeDenoiser, mask, guides: dict) -> None:
        """At the first call of a run from pure noise: do the banks' wires look exchanged? Asked of the device when the run is over."""
        banks = denoiser.bank, denoiser.reference
        if not self.report.steps and None not in banks and mask is None and self.fresh and "unconditional" in guides:
            self.exchanged = looks_exchanged(*banks, self.picture.of(guides["unconditional"]))

    def record(self, step: Step | None) -> None:
        if step is None:
            return
        nearest = step.nearest if self.origin is None else torch.where(step.nearest < 0, -1, self.origin[step.nearest])
        self.report.steps.append(replace(step, nearest=nearest))
        if self.report is self.patch.report:  # an inner run is shown by the outer one
            self.live.show(self.report.steps, self.report.what)


class Patch:
    """What a patched model does: the wrappers through which guiders sample it, and their runs.

    Args:
        denoiser: its banks, of any size, and its settings; `semantic` is what begins one for a run, from Semantic Posterior.
        start, end: window, as fractions of the schedule.
        bank_size: "exact" refuses a bank of another size, "interpolate" resizes it.
        connected: `unwanted` and `neutral`, where they are: CONDITIONING that means what must not come out, and one that means nothing in
            particular.
        what: must not come out, in the user's words, where they are known.
        board: where the node that makes the patch shows what it does; None: one that is this patch's alone.
        check: after each run a little time goes into whether `unwanted` means the pictures of the bank, see `ConditionCheck`.
    """

    def __init__(self, denoiser: SafeDenoiser, start: float, end: float, bank_size: str, connected: dict, check: bool = True,
                 what: str = "", board: Board | None = None):
        self.board = board or Board()
        self.denoiser, self.start, self.end, self.bank_size, self.connected = denoiser, start, end, bank_size, connected
        self.banks = {name: bank for name in ("bank", "retain", "reference") if (bank := getattr(denoiser, name)) is not None}
        self.on = denoiser.strength != 0
        self.meant, self.begun = self.on and start < end, True
        self.given = connected if self.on and METHODS[denoiser.method].hears else {}
        self.check = ConditionCheck(self.given, self.banks) if check and "bank" in self.banks and "unwanted" in self.given else None
        self.report = Report([], [], source(), [], what, _names(denoiser.bank) if denoiser.bank else {})
        self.runs = WeakKeyDictionary()  # by guider: one never runs twice at a time

    def patched(self, model):
        """A clone of `model` that guiders sample through this patch."""
        patched, wrappers = hookable(model, [*self.given.values()]), comfy.patcher_extension.WrappersMP
        listen(patched, self.given)
        for where, wrapper in ((wrappers.OUTER_SAMPLE, self.outer_sample), (wrappers.PREPARE_SAMPLING, self.prepare_sampling),
                               (wrappers.SAMPLER_SAMPLE, self.sampler_sample), (wrappers.PREDICT_NOISE, self.predict_noise),
                               (wrappers.APPLY_MODEL, self.apply_model)):
            patched.add_wrapper_with_key(where, KEY, wrapper)
        patched.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, KEY, self.pre_run)
        patched.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, KEY, self.cleanup)
        predict = patched.wrappers[wrappers.PREDICT_NOISE]  # the first is the outermost: a cache that skips the model must not skip us
        patched.wrappers[wrappers.PREDICT_NOISE] = {KEY: predict.pop(KEY), **predict}
        return patched

    def open(self, guider, noise: torch.Tensor, told: bool) -> Run:
        """A new run. The patch's own report is that of a run inside no other."""
        inner = any(run.told for run in self.runs.values())
        report = replace(self.report, steps=[], notes=[], weak=[]) if inner else self.report
        run = Run(self, guider, noise, report, told)
        self.runs[guider] = run
        return run

    @contextmanager
    def run_of(self, guider, noise: torch.Tensor):
        """The run of this guider, until whoever asked first is through, and its calls steered. What hands itself to the sampler for
        another guider, whose run has not begun, is in that run.
        """
        told = self.runs.get(guider)
        known = told if told and told.told else next((run for run in self.runs.values() if run.told and run.sampling is None), None)
        run = self.runs[guider] = known or self.open(guider, noise, True)
        finished = False
        try:
            with around(guider, self.predict_noise) if told is not run else nullcontext():
                yield run
            finished = True
        finally:
            if told is not run:
                self.runs.pop(guider, None)
            if run is not known:
                run.end(finished)

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        with self.run_of(guider, Picture(kwargs.get("latent_shapes")).of(noise)) as run:
            conds = getattr(guider, "original_conds", {})
            run.memory = remembered(run.report, latent_image, conds, float(sigmas[0]))
            midway = not run.memory and not noise.count_nonzero() and bool(latent_image.count_nonzero())
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            if midway and run.memory and run.report.steps and not run.rises:  # most rules that hear nothing remember nothing either
                run.note(MIDWAY)
            remember(run.report, samples, run.memory, conds, float(sigmas[-1]))
            return samples

    def prepare_sampling(self, executor, *args, **kwargs):
        held = [run.held for run in self.runs.values() if run.told]  # the latest is about to begin
        return prepare_sampling(held[-1] if held else {}, executor, *args, **kwargs)

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs):
        picture = Picture(getattr(guider.inner_model, "latent_shapes", None))
        with self.run_of(guider, picture.of(noise)) as run:
            run.begin(guider, noise, sigmas, denoise_mask)
            run.witness.begin(guider, noise, latent_image, denoise_mask, extra_args)
            began = time.monotonic()
            samples = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
            if self.check and run.report is self.report and run.report.steps and picture.shape is None:
                run.note(self.check.after(time.monotonic() - began, guider, extra_args.get("model_options", {}), run.held, noise.device))
            return samples

    def now(self, guider, x: torch.Tensor, timestep: torch.Tensor) -> Run:
        """The run that a call belongs to; one that nobody told of begins with its first call."""
        run = self.runs.get(guider)
        if run is None or not run.told and run.sampling is not None and run.is_over(float(timestep.max())):
            run = self.open(guider, Picture(getattr(guider.inner_model, "latent_shapes", None)).of(x), False)
        if run.sampling is None:
            run.begin(guider, x)
        return run

    def apply_model(self, executor, *args, **kwargs):
        """The network is asked. By whom, if no run was told of, and none is in the middle of a call?"""
        if self.meant and not any(run.told or run.calling for run in self.runs.values()):
            self.unsteered(self.report)
        return executor(*args, **kwargs)

    def pre_run(self, patcher) -> None:
        """A callback of ComfyUI's: somebody samples."""
        self.begun = False

    def cleanup(self, patcher) -> None:
        """The end of that, and there was no run."""
        if self.meant and not self.begun and not any(run.told for run in self.runs.values()):
            self.unsteered(self.report)

    def unsteered(self, report: Report) -> None:
        """Say loudly, on the node, in the report and in the log, that nothing was done."""
        if UNSTEERED not in report.notes:
            logging.error("safe denoiser: %s", UNSTEERED)
            report.steps.clear()
            report.notes[:] = [UNSTEERED]
            Live(self.board, id(self)).end(report, True)

    def predict_noise(self, executor, x, timestep, model_options, *args, **kwargs):
        """Steer one call; but not twice, where a guider's call leads to ComfyUI's wrappers. At strength 0 nothing is looked at either:
        neighbours do other sums where there are functions after guidance.
        """
        guider = executor.class_obj
        run = self.now(guider, x, timestep)
        if run.calling or not self.on:
            return executor(x, timestep, model_options, *args, **kwargs)
        run.calling = True
        try:
            return self.steer(run, executor, x, timestep, model_options, *args, **kwargs)
        finally:
            run.calling = False

    def steer(self, run: Run, executor, x, timestep, model_options, *args, **kwargs):
        guider = executor.class_obj
        denoiser, witness = run.denoiser_for(guider, x), run.witness
        mask, level = run.mask_at(guider, timestep, model_options), forward_process(run.sampling, timestep, x.ndim)
        given, (model_options, late, seen) = model_options, watch(model_options, guider)
        shared = model_options.get(KEY, {})  # of several patches on one model, all correct the prediction that the innermost got
        model_options = {**model_options, KEY: shared}
        if witness.given:
            timestep = timestep.expand(len(x))  # one number would do for the model's one condition, not for several
            model_options = witness.ask(guider, shared, model_options, timestep, bool(denoiser.listens(level[0]).any()))
        denoised = executor(x, timestep, model_options, *args, **kwargs)
        carry(model_options, given, {KEY, HANDLER})
        guides = guidance(guider, seen)
        if guides:
            run.offset = guides["unconditional"] - x
        elif not seen and run.offset is not None and run.offset.shape == x.shape:  # a cache skipped the model: go on as LazyCache does,
            guides = {"unconditional": x + run.offset}  # with the offset of the latest call
        if seen and seen["cond"] is guider.conds.get("positive", seen["cond"]):
            shared.setdefault("conditional", predicted(seen, "cond"))
        raw, guides = shared.setdefault("predictions", (denoised, guides))
        heard = witness.heard(guider, shared, x, guides, seen) if witness.given else {}
        if heard:
            run.note(witness.apart(guider))
        if witness.missed:
            run.note(MISSED)
        if denoiser.method == "sld" and "unconditional" not in guides:
            run.note(UNGUIDED)
        if "unwanted" in heard and denoiser.method == "safe_denoiser" and not {"neutral", "unconditional"} & {*guides, *heard} \
                and NO_NEUTRAL not in run.report.weak:
            run.report.weak.append(NO_NEUTRAL)
        reach = witness.reach(guider, x, timestep) if heard else None
        run.compare(denoiser, mask, guides)
        begins = run.begins_step(timestep) if heard else True  # only rules that hear something ask
        safe_denoised, step = run.correct(denoiser, x, raw, level, mask, guides | heard, reach, begins)
        if raw is not denoised:
            safe_denoised = denoised if step is None else denoised + (safe_denoised - raw)
        run.record(step)
        safe_denoised = call_late(late, seen, denoised, safe_denoised)
        seen.clear()  # it holds the options that hold the function that fills it: a guider in that ring would wait for the collector
        return safe_denoised


def patch(model, banks: dict[str, Bank | None], start: float, end: float, bank_size: str, semantic=None, unwanted=None, neutral=None,
          check: bool = True, what: str = "", board: Board | None = None, **settings):
    """A clone of `model` that samples away from the bank and the unwanted condition, and the Report of its latest run; see `Patch`."""
    require(banks, unwanted, neutral, settings["method"], settings.get("weight", SafeDenoiser.weight))
    denoiser = SafeDenoiser(**banks, **settings, semantic=semantic)  # says at once what is wrong with them
    connected = {name: one for name, one in (("unwanted", unwanted), ("neutral", neutral)) if one is not None}
    made = Patch(denoiser, start, end, bank_size, connected, check, what, board)
    return made.patched(model), made.report
