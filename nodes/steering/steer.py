"""The only place where the core meets the sampling loop: a model is patched, and each run of a guider on it is steered."""
import logging
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import comfy.patcher_extension
import torch

from ...safe_denoiser import Bank, Report, SafeDenoiser
from ...safe_denoiser.denoiser import METHODS
from ...safe_denoiser.density.separability import require_unlike
from ...safe_denoiser.report import UNSTEERED
from ..models.guidance import around
from ..models.loading import prepare_sampling
from ..progress import Board, Live
from .condition_check import ConditionCheck
from .conditions import hookable, listen
from .remembered_runs import remember, remembered, source
from .run import KEY, Picture, Run

MIDWAY = "the run begins in the middle of a schedule, and its earlier part is not known here: what the prompt asks for is judged anew"


def require(banks: dict[str, Bank | None], unwanted, neutral, method: str, weight: str) -> None:
    """Raise where nothing says what must not come out, where something is connected that means nothing without it, or to the wrong input.
    """
    require_unlike(banks["bank"], {name: bank for name, bank in banks.items() if name != "bank"})
    if unwanted is None:
        if neutral is not None:
            raise ValueError("neutral is connected and unwanted is not; neutral is what unwanted is compared with, so connect unwanted too")
        METHODS[method].require_unwanted(weight)
        if banks["bank"] is None:
            raise ValueError("nothing says what must not come out; connect negation_bank (from Build or Load Negation Bank), or unwanted "
                             "(a condition that means it, such as a prompt that asks for it), or both")


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
        self.given = connected if self.on and denoiser.kind.hears else {}
        self.check = ConditionCheck(self.given, self.banks) if check and "bank" in self.banks and "unwanted" in self.given else None
        self.report = Report([], [], source(), [], what, denoiser.bank.names_of if denoiser.bank else {})
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
        known = told if told and told.told else next((run for run in self.runs.values() if run.told and run.levels is None), None)
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
            if midway and run.memory and run.report.steps and not run.levels.rises:  # most rules that hear nothing remember nothing either
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
        if run is None or not run.told and run.levels is not None and run.levels.is_over(float(timestep.max())):
            run = self.open(guider, Picture(getattr(guider.inner_model, "latent_shapes", None)).of(x), False)
        if run.levels is None:
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
            return run.steer(executor, x, timestep, model_options, *args, **kwargs)
        finally:
            run.calling = False


def patch(model, banks: dict[str, Bank | None], start: float, end: float, bank_size: str, semantic=None, unwanted=None, neutral=None,
          check: bool = True, what: str = "", board: Board | None = None, **settings):
    """A clone of `model` that samples away from the bank and the unwanted condition, and the Report of its latest run; see `Patch`."""
    require(banks, unwanted, neutral, settings["method"], settings.get("weight", SafeDenoiser.weight))
    denoiser = SafeDenoiser(**banks, **settings, semantic=semantic)  # says at once what is wrong with them
    connected = {name: one for name, one in (("unwanted", unwanted), ("neutral", neutral)) if one is not None}
    made = Patch(denoiser, start, end, bank_size, connected, check, what, board)
    return made.patched(model), made.report
