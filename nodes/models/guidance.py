"""What guidance made of a model call: noted by a post-CFG function, and the functions of CFG++ samplers called after the correction."""
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial

import comfy.patcher_extension
import torch

PRE_CFG, CFG, POST_CFG = (f"sampler_{when}cfg_function" for when in ("pre_", "", "post_"))


@contextmanager
def around(guider, wrapper: Callable):
    """Each call of this guider goes through `wrapper`, as one of PREDICT_NOISE would: guiders that have a `__call__` of their own run none
    of those. It is of another class meanwhile, derived from its own, so that it stays the very object that everybody holds.
    """
    own, held = type(guider), [wrapper]

    def __call__(self, x, timestep, model_options=None, seed=None, **more):
        call = partial(own.__call__, self, **more)
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(call, self, held).execute(x, timestep, model_options or {}, seed)

    with suppress(TypeError):  # an object whose class cannot be changed: its wrappers are all there is
        guider.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})
    try:
        yield
    finally:
        held.clear()  # a class is a ring of references, and would keep what it holds until the collector comes
        with suppress(TypeError):
            guider.__class__ = own


def watch(model_options: dict, guider) -> tuple[dict, list, dict]:
    """Let functions before and after guidance note what it computed, and of what, and hold back those that the running sampler itself
    added. What the model predicted is copied before anybody else sees it: neighbours change it before guidance, many in place.

    CFG++ samplers catch `uncond_denoised` there and step from it: x' = a denoised - b uncond_denoised + c x. They equal their plain
    namesakes where both predictions are the same, so a correction acts as under plain CFG if, and only if, it moves both; therefore
    their functions are called after the correction, see `call_late`.

    Returns:
        model_options with the noting function instead, the functions held back, and a dict that will hold the notes.
    """
    functions, own = model_options.get(POST_CFG, []), guider.model_options.get(POST_CFG, [])
    late, seen = [fn for fn in functions if fn not in own], {}

    def before(args):
        size = len(args["input"])  # a neighbour hands over the rows of each part of a prompt: what it says is what they say on average
        seen["held"] = [(conds, prediction.unflatten(0, (-1, size)).mean(0) if len(prediction) > size else prediction.clone())
                        for conds, prediction in zip(args["conds"], args["conds_out"])]
        return args["conds_out"]

    def hold(args, named=""):  # of guiders that know no functions before guidance
        seen.setdefault("held", [(args[named + role], args[f"{role}_denoised"].clone()) for role in ("cond", "uncond")])

    def first(args):
        hold(args)
        return args["denoised"]

    def note(args):
        seen.update(args)
        return args["denoised"]

    guided = model_options.get(CFG)
    changed = {} if guided is None else {CFG: lambda args: hold(args, "input_") or guided(args)}
    return {**model_options, **changed, PRE_CFG: [before, *model_options.get(PRE_CFG, [])],
            POST_CFG: [first, *(fn for fn in functions if fn in own), note]}, late, seen


def carry(used: dict, given: dict, own: set[str]) -> None:
    """What neighbours have kept in the options of a call, for the next: `given` lasts for the run, `used` were made of it for the call."""
    ours = {PRE_CFG, CFG, POST_CFG, *own}
    given |= {name: value for name, value in used.items() if name not in ours and value is not given.get(name)}


def predicted(seen: dict, role: str) -> torch.Tensor:
    """What the model itself predicted under what guidance calls "cond" or "uncond"."""
    return next((prediction for conds, prediction in seen["held"] if conds is seen[role]), seen[f"{role}_denoised"])


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
    that asks another model for it (DualModelGuider) hands it over under conditions that are not among its own. Guidance itself tells which
    is which, since guiders have names of their own for them.
    """
    uncond, conds = seen.get("uncond"), guider.conds
    if uncond is None or "negative" in conds and any(uncond is conds[name] for name in conds if name != "negative"):
        return {}
    return {"unconditional": predicted(seen, "uncond"), "conditional": predicted(seen, "cond")}
