"""One run of a guider on a patched model, and each of its calls: what corrects it, and what is remembered from call to call."""
import logging
import math
from dataclasses import replace

import torch

from ...safe_denoiser import Report, SafeDenoiser, Step
from ...safe_denoiser.density.separability import looks_exchanged
from ...safe_denoiser.report import STOPPED
from ...safe_denoiser.setup_warnings import NO_NEUTRAL, weaknesses
from ...safe_denoiser.telling import listening
from ..models.guidance import call_late, carry, guidance, predicted, watch
from ..models.loading import hold, require_size
from ..models.noise import forward_process, refuse, std_at
from ..progress import SECONDS, Live, progress
from .conditions import HANDLER
from .noise_levels import NoiseLevels
from .witness import Witness

KEY = "safe_denoiser"
MISSED = "the unwanted condition was not evaluated in some model calls: the guider, or a node beside this one, asks the model its own way"
UNTOLD = "the sampler was started without a word to this node: a mask, if there is one, is not known, and whole pictures are compared"
RISES = "the noise rises from step to step (unsampling): nothing is steered, so that sampling again can lead elsewhere"
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


class Guides:
    """The predictions of which a run's guidance is made. Where a cache skips the model, go on as LazyCache does, with the offset of the
    latest call.
    """

    offset: torch.Tensor | None = None

    def of(self, guider, x: torch.Tensor, seen: dict) -> dict[str, torch.Tensor]:
        """At x, by what was seen of the call, see `guidance`."""
        guides = guidance(guider, seen)
        if guides:
            self.offset = guides["unconditional"] - x
        elif not seen and self.offset is not None and self.offset.shape == x.shape:
            guides = {"unconditional": x + self.offset}
        return guides


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

    def __init__(self, patch, guider, noise: torch.Tensor, report: Report, told: bool):
        refuse(guider.model_patcher, noise)
        self.patch, self.patcher, self.report, self.told = patch, guider.model_patcher, report, told
        self.witness, self.live, self.memory = Witness(patch.given), Live(patch.board, id(patch)), {}
        self.held = self._hold(noise.shape)
        self.levels, self.calling = None, False  # until it begins

    def _hold(self, shape) -> dict:
        return {name: hold(bank, self.patcher, shape, self.patch.bank_size) for name, bank in self.patch.banks.items()}

    def begin(self, guider, noise: torch.Tensor, sigmas: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> None:
        """The sampler is about to start: the model is loaded, and the banks with it."""
        self.levels = levels = NoiseLevels(guider.inner_model.model_sampling, sigmas, mask)
        self.picture = Picture(getattr(guider.inner_model, "latent_shapes", None))
        self.exchanged, self.guides, self.rows = None, Guides(), len(noise)
        self.patch.begun = True
        self.report.steps.clear()
        self.report.notes[:] = [note for note, so in ((UNTOLD, sigmas is None), (RISES, levels.rises)) if so and self.patch.on]
        self.report.weak[:] = weaknesses(self.patch.denoiser, "unwanted" in self.patch.connected) if self.patch.on else []
        denoiser = self._denoiser(guider, self.held, self.picture.of(noise).shape)
        self.denoisers = {tuple(self.picture.of(noise).shape[1:]): denoiser}
        if denoiser.strength and denoiser.inside:
            self.note(f"compared by parts of the picture, in {len(denoiser.inside)} windows")
        if "unwanted" in self.patch.connected and not denoiser.kind.hears:
            self.note(f"method {denoiser.method} does not know the unwanted condition, only safe_denoiser does")
        bank = self.patch.denoiser.bank
        self.origin = None if bank is None or bank.origin is None else torch.tensor(bank.origin, device=noise.device)

    def end(self, finished: bool) -> None:
        """It is over, or was stopped: the node tells what was done, and where nothing was, though it was meant, the log does too."""
        if self.levels is None:
            return
        if self.exchanged is not None and bool(self.exchanged):
            self.note(EXCHANGED)
            logging.warning("safe denoiser: %s", EXCHANGED)
        if self.witness.alike and (alike := int(torch.stack(self.witness.alike).sum())):
            self.note(f"in {alike} of {len(self.witness.alike)} {ALIKE}")
        steps = self.levels.steps
        if not finished and self.patch.on and steps is not None:
            self.note(f"{STOPPED} {len(self.report.steps)} model calls of a schedule of {steps} steps")
        elif finished and self.patch.meant and not self.report.steps and (steps is None or steps > 0):
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
        patch, levels, semantic = self.patch, self.levels, self.patch.denoiser.semantic
        return replace(patch.denoiser, **{name: one.bank for name, one in held.items()}, memory=self.memory,
                       sigma_start=0.0 if levels.rises else std_at(levels.sampling, patch.start),
                       sigma_end=std_at(levels.sampling, patch.end),
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

    def correct(self, denoiser: SafeDenoiser, x, raw, level, mask, guides: dict, reach, begins) -> tuple[torch.Tensor, Step | None]:
        """`safe`, as far as the conditions reach; with neither a bank nor a prediction to go by, inside a window that is never open."""
        picture = self.picture
        if "unwanted" not in guides and (denoiser.bank is None or denoiser.weight == "witness"):
            denoiser, guides = replace(denoiser, sigma_start=0.0, memory={}), {"unwanted": raw, "conditional": raw}
        if reach is not None:
            mask = reach if mask is None else reach * mask
        guides = {name: picture.of(prediction) for name, prediction in guides.items()}
        with listening(progress(SECONDS)):  # the first step may have to measure the bank
            found, step = denoiser.safe(picture.of(x), picture.of(raw), *level, picture.of(mask), **guides, begins=begins)
        safe_denoised = raw if step is None else picture.put(raw, found)
        return safe_denoised if reach is None else raw + reach * (safe_denoised - raw), step

    def compare(self, denoiser: SafeDenoiser, mask, guides: dict) -> None:
        """At the first call of a run from pure noise: do the banks' wires look exchanged? Asked of the device when the run is over."""
        banks = denoiser.bank, denoiser.reference
        if not self.report.steps and None not in banks and mask is None and self.levels.fresh and "unconditional" in guides:
            self.exchanged = looks_exchanged(*banks, self.picture.of(guides["unconditional"]))

    def record(self, step: Step | None) -> None:
        if step is None:
            return
        nearest = step.nearest if self.origin is None else torch.where(step.nearest < 0, -1, self.origin[step.nearest])
        self.report.steps.append(replace(step, nearest=nearest))
        if self.report is self.patch.report:  # an inner run is shown by the outer one
            self.live.show(self.report.steps, self.report.what)

    def steer(self, executor, x, timestep, model_options, *args, **kwargs):
        """One call of the guider, corrected."""
        guider = executor.class_obj
        denoiser, witness, levels = self.denoiser_for(guider, x), self.witness, self.levels
        mask, level = levels.mask_at(guider, timestep, model_options), forward_process(levels.sampling, timestep, x.ndim)
        given, (model_options, late, seen) = model_options, watch(model_options, guider)
        shared = model_options.get(KEY, {})  # of several patches on one model, all correct the prediction that the innermost got
        model_options = {**model_options, KEY: shared}
        if witness.given:
            timestep = timestep.expand(len(x))  # one number would do for the model's one condition, not for several
            model_options = witness.ask(guider, shared, model_options, timestep, bool(denoiser.listens(level[0]).any()))
        denoised = executor(x, timestep, model_options, *args, **kwargs)
        carry(model_options, given, {KEY, HANDLER})
        guides = self.guides.of(guider, x, seen)
        if seen and seen["cond"] is guider.conds.get("positive", seen["cond"]):
            shared.setdefault("conditional", predicted(seen, "cond"))
        raw, guides = shared.setdefault("predictions", (denoised, guides))
        heard = witness.heard(guider, shared, x, guides, seen) if witness.given else {}
        if heard:
            self.note(witness.apart(guider))
        if witness.missed:
            self.note(MISSED)
        if denoiser.kind.guided and "unconditional" not in guides:
            self.note(UNGUIDED)
        if "unwanted" in heard and denoiser.kind.neutral and not {"neutral", "unconditional"} & {*guides, *heard} \
                and NO_NEUTRAL not in self.report.weak:
            self.report.weak.append(NO_NEUTRAL)
        reach = witness.reach(guider, x, timestep) if heard else None
        self.compare(denoiser, mask, guides)
        begins = levels.begins_step(timestep) if heard else True  # only rules that hear something ask
        safe_denoised, step = self.correct(denoiser, x, raw, level, mask, guides | heard, reach, begins)
        if raw is not denoised:
            safe_denoised = denoised if step is None else denoised + (safe_denoised - raw)
        self.record(step)
        safe_denoised = call_late(late, seen, denoised, safe_denoised)
        seen.clear()  # it holds the options that hold the function that fills it: a guider in that ring would wait for the collector
        return safe_denoised
