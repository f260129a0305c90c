"""Conditions in calls of their own, where neighbours patch the network itself: many of them know two conditions only, or keep what they
cache by place in the batch, on the network or in its options. What they keep is another for each of our conditions.
"""
import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.patcher_extension
import torch

KNOWN = {"comfy", "comfy_extras", "comfy_api", "torch"}  # whose patches are made for any batch
OPTIONS = {"patches", "patches_replace", "wrappers", "callbacks", "sample_sigmas", "sigmas", "cond_or_uncond", "uuids"}  # ComfyUI's own
PLAIN = vars(torch.nn.Module()).keys()


def _foreign(function) -> bool:
    """Whether it is some neighbour's."""
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    return callable(function) and module.partition(".")[0] not in KNOWN and not module.startswith(__package__)


def _leaves(value) -> Iterator:
    if isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


def patched_by_neighbours(model, patcher, model_options: dict) -> bool:
    """Whether a call of the network goes through anything of other packs."""
    options, network = model_options.get("transformer_options", {}), getattr(model, "diffusion_model", None)
    objects = [one for name, one in getattr(patcher, "object_patches", {}).items() if name.startswith("diffusion_model")]
    wrappers = [options.get("wrappers", {}).get(kind) for kind in ("apply_model", "diffusion_model", "calc_cond_batch")]
    found = [model_options.get("model_function_wrapper"), options.get("patches"), options.get("patches_replace"), wrappers, objects,
             [one for one in getattr(network, "__dict__", {}).values() if callable(one)]]
    return any(map(_foreign, _leaves(found)))


def _copied(value):
    """Another of each container and of each neighbour's object, with the same numbers and tensors in it."""
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, (list, set, deque)):
        return type(value)(map(_copied, value))
    if isinstance(value, (torch.Tensor, torch.nn.Module, type)) or callable(value) or not hasattr(value, "__dict__") \
            or type(value).__module__.partition(".")[0] in KNOWN:
        return value
    other = copy.copy(value)
    other.__dict__.update({key: _copied(one) for key, one in vars(value).items()})
    return other


class Apart:
    """What neighbours keep for one condition of one run, on the network and in its options; as it was when the run began.

    Args:
        model: whose network is asked.
        model_options: of the run.
    """

    def __init__(self, model, model_options: dict):
        self.network = getattr(model, "diffusion_model", None)
        self.kept = _copied(self._state())
        self.options = {name: _copied(one) for name, one in model_options.get("transformer_options", {}).items()
                        if name not in OPTIONS and (isinstance(one, (dict, list, set)) or hasattr(one, "__dict__")) and not callable(one)}

    def _state(self) -> dict:
        held = getattr(self.network, "__dict__", {})
        return {name: one for name, one in held.items() if name not in PLAIN and not callable(one)}

    @contextmanager
    def _installed(self):
        theirs = self._state()
        self._put(self.kept)
        try:
            yield
        finally:
            self.kept = self._state()
            self._put(theirs)

    def _put(self, state: dict) -> None:
        for name in self._state():
            del self.network.__dict__[name]
        if self.network is not None:
            self.network.__dict__.update(state)

    def ask(self, evaluate: Callable, conds: list[dict], model_options: dict, more: dict) -> torch.Tensor:
        """The prediction under a condition: `evaluate(conds, model_options)` of it alone, with `more` options of the network."""
        options = comfy.patcher_extension.copy_nested_dicts(model_options.get("transformer_options", {}))
        with self._installed():
            return evaluate([conds], {**model_options, "transformer_options": {**options, **self.options, **more}})[0]
