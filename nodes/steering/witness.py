"""What the model predicts under the unwanted condition: asked for in the guider's own batch, and taken out of the answer."""
import math
from contextlib import nullcontext

import comfy.samplers
import torch
from comfy.context_windows import ContextHandlerABC

from .conditions import FUNCTION, HANDLER, KEY


def is_on(cond: dict, timestep: torch.Tensor) -> bool:
    """Whether ComfyUI evaluates a condition at this noise level; outside of its range of steps the answer would be zeros."""
    return cond.get("timestep_end", -math.inf) <= timestep[0] <= cond.get("timestep_start", math.inf)


def coverage(conds: list[dict], x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor | None:
    """Where conditions with areas or masks apply, 0 to 1 and shaped like x; elsewhere ComfyUI answers with zeros. None: everywhere."""
    if not any("area" in cond or "mask" in cond for cond in conds) or any("default" in cond for cond in conds):
        return None
    total = torch.zeros_like(x)
    for cond in conds:
        bare = {key: value for key, value in cond.items() if key != "gligen"} | {"model_conds": {}}
        part = comfy.samplers.get_area_and_mult(bare, x, timestep)
        place, dims = total, len(part.area or ()) // 2
        for i in range(dims):
            place = place.narrow(i + 2, part.area[dims + i], part.area[i])
        place += part.mult
    return None if (total >= 1).all() else total.clamp_max(1)


def _with_options(model_options: dict, more: dict) -> dict:
    """model_options with more options of the network."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), **more}}


class Beside(ContextHandlerABC):
    """Adds conditions to the first batch that a guider asks for in one model call, and takes their predictions out of the answer.

    It takes the place of ComfyUI's handler of context windows, which may evaluate a batch in its own way, whichever guider asks. A handler
    that was there still does so, now with more conditions, so that their predictions are merged over its windows as the others are.
    """

    def __init__(self, model_options: dict, guider):
        self.handler, self.guider, self.asked, self.called = model_options.get(HANDLER), guider, {}, False
        # of the run: guidance of neighbours puts in one for a call, that takes the answer to the guider's own batch to pieces
        self.function = {name: one for name, one in model_options.items() if name == FUNCTION}
        self.found: dict[int, torch.Tensor] = {}  # by the key of a condition
        self.own: list[tuple[list[dict], torch.Tensor]] = []  # the guider's

    def should_use_context(self, model, conds, x_in, timestep, model_options):
        return not self.called or bool(Witness.apart(self.guider)) or self._windowed(model, conds, x_in, timestep, model_options)

    def _windowed(self, *args) -> bool:
        return self.handler is not None and self.handler.should_use_context(*args)

    def get_resized_cond(self, *args, **kwargs):
        return self.handler.get_resized_cond(*args, **kwargs)

    def execute(self, calc_cond_batch, model, conds, x_in, timestep, model_options):
        def evaluate(conds, options):
            if self._windowed(model, conds, x_in, timestep, options):
                return self.handler.execute(calc_cond_batch, model, conds, x_in, timestep, options)
            return calc_cond_batch(model, conds, x_in, timestep, options)

        conditions = self.guider.model_options[KEY]
        conditions.look(model, self.guider, model_options)
        with conditions.apart.guiders(model_options) if conditions.apart else nullcontext():
            if self.called:  # of a neighbour that asks once more
                return evaluate(conds, model_options)
            self.called, more = True, {} if conditions.apart else self.asked
            prompt = self.guider.conds.get("positive") or conditions.prompt
            place = next((i for i, own in enumerate(conds) if own is not None and own is prompt), 0)
            seen_as = {len(conds) + i: place for i in range(len(more))}
            out = evaluate([*conds, *more.values()], _with_options(model_options, {KEY: seen_as}) if more else model_options)
        self.own = [(own, prediction.clone()) for own, prediction in zip(conds, out) if own is not None]
        if not conditions.apart:
            self.found = dict(zip(self.asked, out[len(conds):]))
            return out[:len(conds)]
        model_options = {name: one for name, one in model_options.items() if name != FUNCTION} | self.function
        self.found = {key: conditions.apart.ask(key, evaluate, asked, _with_options(model_options, {KEY: {0: place}}))
                      for key, asked in self.asked.items()}
        return out  # the very object, in which guidance of theirs may keep more

    def of(self, *roles) -> torch.Tensor | None:
        """The prediction under the first of these conditions that the guider asked for."""
        found = (prediction for role in roles for own, prediction in self.own if own is role)
        return next(found, None)


class Witness:
    """The unwanted and neutral conditions of one run: has them evaluated in each model call, and knows what the model predicted."""

    def __init__(self, given: dict[str, list]):
        self.given, self.missed = given, False
        self.offsets: dict[str, torch.Tensor] = {}
        self.alike: list[torch.Tensor] = []  # of each call: was the prediction under unwanted the prompt's, bit for bit? on the device

    def begin(self, guider, noise, latent_image, denoise_mask, extra_args: dict) -> None:
        conditions = guider.model_options.get(KEY)
        if conditions is not None:
            conditions.process(guider, noise, latent_image, denoise_mask, extra_args.get("seed"), extra_args.get("model_options", {}))

    @staticmethod
    def apart(guider) -> str:
        """Why they are evaluated in calls of their own; "": they are not."""
        conditions = guider.model_options.get(KEY)
        return conditions.apart.why if conditions is not None and conditions.apart else ""

    def on(self, guider, timestep: torch.Tensor) -> dict[int, list[dict]]:
        """Those of its conditions that apply at this noise level, by key."""
        conditions = guider.model_options.get(KEY)
        processed = {} if conditions is None else conditions.processed
        found = {id(one): [cond for cond in processed.get(id(one), []) if is_on(cond, timestep)] for one in self.given.values()}
        return {key: conds for key, conds in found.items() if conds}

    def ask(self, guider, shared: dict, model_options: dict, timestep: torch.Tensor, is_open: bool) -> dict:
        """model_options that put the conditions into the guider's next batch; several patches add to the same one.

        Outside the window of the schedule nothing is added, since the predictions would be of no use, but for a cache that wants each
        condition of a run in every call.
        """
        asked, known = self.on(guider, timestep), KEY in guider.model_options
        self.missed = is_open and (not known or id(self.given["unwanted"]) in asked)  # until it was heard
        if not (is_open or "easycache" in model_options.get("transformer_options", {})):
            asked = {}
        if not asked and not self.apart(guider):  # what neighbours keep is followed from call to call
            return model_options
        if "beside" not in shared:
            shared["beside"] = Beside(model_options, guider)
            model_options = {**model_options, HANDLER: shared["beside"]}
        shared["beside"].asked |= asked
        return model_options

    def heard(self, guider, shared: dict, x: torch.Tensor, guides: dict, seen: dict) -> dict[str, torch.Tensor]:
        """The model's own predictions, named as `SafeDenoiser.safe` names them; none where unwanted was not evaluated.

        Args:
            shared: what patches on one model share in this model call.
            guides: the predictions that guidance is known to have used, by name. Without the negative prompt's, as in a nested
                DualCFGGuider, that one is `neutral`.
            seen: what a post-CFG function was given, or nothing. Conditions are found by the names that ComfyUI's guiders give them
                ("positive"), of which some have more than two, else by their roles in guidance here ("cond").
        """
        beside = shared.get("beside")
        if beside is None:
            return {}
        if beside.called:
            found = {name: beside.found[id(one)] for name, one in self.given.items() if id(one) in beside.found}
            guider.model_options[KEY].prompt = seen.get("cond")
            conditional = beside.of(guider.conds.get("positive"), seen.get("cond"))
            conditional = shared.get("conditional") if conditional is None else conditional
            found |= {} if conditional is None else {"conditional": conditional}
            negative = beside.of(guider.conds.get("negative"), seen.get("uncond"))
            if negative is not None:
                found.setdefault("unconditional" if "unconditional" in guides else "neutral", negative)
            self.offsets = {name: prediction - x for name, prediction in found.items()}
        else:  # a cache skipped the model: go on with the offsets of the latest call, as it does
            found = {name: x + offset for name, offset in self.offsets.items()}
        if "unwanted" not in found:
            return {}
        self.missed = False
        if "conditional" in found:
            self.alike.append((found["unwanted"] == found["conditional"]).all())
        return found

    def reach(self, guider, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor | None:
        """Where all of its conditions apply, 0 to 1 and shaped like x; None: everywhere."""
        parts = [coverage(conds, x, timestep) for conds in self.on(guider, timestep).values()]
        parts = [part for part in parts if part is not None]
        return torch.stack(parts).amin(0) if parts else None
