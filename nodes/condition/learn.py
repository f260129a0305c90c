"""Learn Unwanted Condition: from a folder of pictures to the condition that means them."""
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch.utils.checkpoint import CheckpointError

from ...safe_denoiser import Bank, LatentCache
from ...safe_denoiser.condition.gain import Check, Gain, Probe
from ...safe_denoiser.condition.gain_plot import plot
from ...safe_denoiser.condition.learn import Learned, Learning, Schedule
from .. import folders
from ..fingerprint import fingerprint, fingerprint_model
from ..io_types import CATEGORY, PREVIEWS, NegationBankType, found_by
from ..models.loading import in_space
from ..models.model_calls import TOLD_OF, ask, differentiable, retold, told
from ..pictures.negation_set import to_image
from ..progress import Live

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
KEPT = 1  # what is kept of a condition, in its key
OTHERS = 32  # of the reference bank, on which the condition is measured


def with_less_memory(batch: int, attempt):
    """`attempt(checkpointed, rows)` with less and less memory, until it fits; rows of one call of the model.

    Raises:
        ValueError: one row, computed twice, does not fit either.
    """
    for rows, checkpointed in itertools.product((batch, max(1, batch // 4), 1), (False, True)):
        try:
            return attempt(checkpointed, rows)
        except (OUT_OF_MEMORY, CheckpointError) as error:  # some models' blocks do not do the same twice
            what = f"{rows} pictures at a time" + ", computed twice to save memory" * checkpointed
            logging.info("safe denoiser: learning with %s does not fit into memory (%s)", what, error)
            comfy.model_management.soft_empty_cache()
    raise ValueError("the gradient of one picture does not fit into memory; learn at a smaller size (build the bank for a smaller latent), "
                     "with a smaller or quantised version of the model, or start ComfyUI with --lowvram")


@contextmanager
def learnable(model) -> Iterator[None]:
    """Say what it means where no gradient comes through a model.

    Raises:
        ValueError: in place of what torch raises.
    """
    try:
        yield
    except (OUT_OF_MEMORY, CheckpointError):
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"no condition can be learned for {type(model.model).__name__}: no gradient comes through it to its text, or it "
                         f"makes more than pictures ({error}); use a prompt as unwanted, such as Describe Negation Set finds") from error


class Teller:
    """The node's bar, and a line on it: what was gained so far and how long it still takes at most; where it stopped, if it was stopped.
    Raises where the user stops.
    """

    def __init__(self):
        self.bar, self.live, self.began, self.before, self.place = comfy.utils.ProgressBar(1), Live(), time.monotonic(), None, ""

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind and issubclass(kind, comfy.model_management.InterruptProcessingException) and self.place:
            self.live.send(f"stopped at {self.place}; press Run to go on")

    def __call__(self, done: int, steps: int, gain: Gain) -> None:
        self.before = done - 1 if self.before is None else self.before  # steps that an earlier run did
        self.place = f"{done:,} of {steps:,}"
        self.bar.update_absolute(done, steps)
        if time.monotonic() >= self.live.next:
            self.live.next = time.monotonic() + 0.5
            left = (time.monotonic() - self.began) / max(1, done - self.before) * (steps - done)
            self.live.send(f"step {done} of {steps}: takes {gain.mean:.1%} of the model's error away, at most {left:.0f} s left")
        comfy.model_management.throw_exception_if_processing_interrupted()


def learn(model, bank: Bank, neutral: list, start: list | None, reference: Bank | None, schedule: Schedule, seconds: float,
          cache: LatentCache, key: str) -> tuple[Learned, Gain | None]:
    """The condition, and what it adds on the reference; from the cache where it was learned before, and on from there where it was stopped.

    Raises:
        ValueError: the condition has several parts, the bank is of another model, or memory does not suffice.
    """
    kept, stopped = cache.path(key, (), "condition"), cache.path(key, (), "stopped")
    if found := cache.kept(kept):
        return _unpacked(found)
    latents, others = in_space(bank, model), reference and in_space(reference.sample(OTHERS), model)

    def work(asked, checkpointed, rows):
        with differentiable(asked.model, checkpointed):
            y, z = (None if one is None else one.to(asked.device, copy=True) for one in (latents, others))
            parts = [[part.to(asked.device, torch.float32, copy=True) for part in told(one)] for one in (neutral, start or neutral)]
            with learnable(model):
                learning = Learning(asked, y, *parts, replace(schedule, rows=rows))
            if state := cache.kept(stopped):
                learning.resume(state)
            try:
                with learnable(model), Teller() as tell:
                    learned = learning.run(seconds or float("inf"), tell)
            finally:
                cache.keep(stopped, {name: value.detach().cpu() for name, value in learning.state().items()})
            gain = None if z is None else Probe(asked, z, parts[0], batch=rows, seed=schedule.seed).gain(learned.condition)
            return learned, gain, learning.finished

    learned, gain, finished = with_less_memory(schedule.batch, lambda checkpointed, rows: ask(
        model, latents.shape[1:], neutral, lambda asked: work(asked, checkpointed, rows)))
    if finished:
        cache.keep(kept, _packed(learned, gain))
        stopped.unlink(missing_ok=True)
    cache.trim()
    return learned, gain


def _packed(learned: Learned, reference: Gain | None) -> dict[str, torch.Tensor]:
    gains = {"set": learned.gain, "reference": reference}
    packed = {f"{name} {key}": value for name, gain in gains.items() if gain for key, value in gain.tensors.items()}
    packed |= {f"part {i}": part for i, part in enumerate(learned.condition)}
    packed |= {"steps": torch.tensor(learned.steps), "curve": torch.tensor(learned.curve, dtype=torch.float64)}
    return {name: value.detach().cpu().contiguous() for name, value in packed.items()}


def _unpacked(kept: dict[str, torch.Tensor]) -> tuple[Learned, Gain | None]:
    own, reference = (Gain(*(kept[f"{name} {key}"] for key in Gain.NAMES)) if f"{name} zero" in kept else None
                      for name in ("set", "reference"))
    condition = [kept[f"part {i}"] for i in range(sum(name.startswith("part ") for name in kept))]
    return Learned(condition, own, int(kept["steps"]), [(int(step), float(gain)) for step, gain in kept["curve"]]), reference


class LearnUnwantedCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SafeDenoiserLearnUnwantedCondition", display_name="Learn Unwanted Condition", category=CATEGORY, **PREVIEWS,
            **found_by("textual inversion", "negative embedding", "train embedding", "condition from images", "unlearn", "forget", "style",
                       "character", "face", "person"),
            description="Learns from the pictures of a negation bank the condition that means them: what the model has to be told so that "
                        "it denoises them best (textual inversion, arXiv:2208.01618). Connect it to unwanted. The model itself stays as it "
                        "is. Learned once, then read from disk.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, with its LoRAs, without the safe denoiser."),
                NegationBankType.Input("negation_bank", tooltip="The pictures, from Build Negation Bank: at least 15, better 50 to 150."),
                io.Conditioning.Input("neutral", tooltip="An empty prompt: what the model is compared with, and where learning starts."),
                io.Int.Input("steps", default=150, min=1, max=10_000,
                             tooltip="Steps at most. It ends earlier where pictures that were held out gain no more."),
                io.Int.Input("seconds", default=0, min=0, max=1_000_000,
                             tooltip="Stop after this long and take the best so far; a later run goes on from there. 0: no limit."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="Seed of what is held out, drawn and noised."),
                io.Conditioning.Input("start", optional=True,
                                      tooltip="A prompt that says roughly what the pictures show, to start from it. Optional."),
                NegationBankType.Input("reference_bank", optional=True,
                                       tooltip="The model's own samples, or pictures to keep: the condition must not explain these too. "
                                               "Optional."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="unwanted", tooltip="The condition, for unwanted of Safe KSampler or Apply Safe "
                                                                        "Denoiser."),
                io.String.Output(display_name="text", tooltip="How good it is, measured on pictures from which it was not learned."),
                io.Image.Output(display_name="plot", tooltip="How much of the model's error it takes away, by noise level."),
            ],
        )

    @classmethod
    def execute(cls, model, negation_bank, neutral, steps, seconds, seed, start=None, reference_bank=None) -> io.NodeOutput:
        began, schedule = time.monotonic(), Schedule(steps, seed=seed)
        cache = LatentCache(folders.cache("conditions"), fingerprint(KEPT, fingerprint_model(model)), folders.CACHE_LIMIT)
        key = fingerprint(negation_bank.fingerprint, neutral, start, reference_bank and reference_bank.fingerprint, vars(schedule))
        learned, reference = learn(model, negation_bank, neutral, start, reference_bank, schedule, seconds, cache, key)
        check = Check(learned.gain, reference)
        text = (f"learned from {len(negation_bank)} pictures in {learned.steps} steps ({time.monotonic() - began:.0f} s): takes "
                f"{learned.gain.mean:.1%} of the model's error away on pictures from which it was not learned\n{check.sentence}")
        if check.kind == "no":
            raise ValueError(f"no condition was found that means these pictures: {check.sentence}; use pictures that have something in "
                             f"common that the model can draw, more of them, or connect a prompt that says what they show to start")
        Live().send(text)
        picture = to_image(plot(check, learned.curve))
        unwanted = [[rows, {**options, TOLD_OF: text}] for rows, options in retold(start or neutral, learned.condition)]
        return io.NodeOutput(unwanted, text, picture, ui={**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)})


NODES = [LearnUnwantedCondition]
