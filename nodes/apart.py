"""Conditions in calls of their own, where neighbours patch the network itself: many of them know two conditions only, or keep what they
cache by place in the batch, on the network or in its options. What they keep is another for each of our conditions.
"""
import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

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


def _kept_by_neighbours(value) -> bool:
    """Whether it is an object of theirs with a state of its own, nothing that ComfyUI or torch made, nor derived from such."""
    return hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value) \
        and not any(one.__module__.partition(".")[0] in KNOWN for one in type(value).__mro__)


def _copied(value, known: dict | None = None):
    """Another of each container and of each neighbour's object, with the same numbers and tensors in it. Objects may hold one another.

    Args:
        known: what was copied already, by id, and its copy.
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]
    other = value
    if isinstance(value, (dict, list, set, deque)):
        other = copy.copy(value)  # of the same kind: a defaultdict, a deque of so many
        known[id(value)] = value, other
        if isinstance(value, dict):
            other.update({key: _copied(one, known) for key, one in value.items()})
        else:
            other.clear()
            (other.update if isinstance(value, set) else other.extend)([_copied(one, known) for one in value])
    elif _kept_by_neighbours(value):
        with suppress(TypeError):  # a lock, a module, an open file: there is one of it
            other = copy.copy(value)
            known[id(value)] = value, other
            other.__dict__.update({key: _copied(one, known) for key, one in vars(value).items()})
    return other


def _marks(value, known: set | None = None) -> Iterator:
    """What tells a state from another: numbers and words, and which objects beside them."""
    known = set() if known is None else known
    if isinstance(value, (dict, list, set, deque)) or _kept_by_neighbours(value):
        if id(value) not in known:
            known.add(id(value))
            parts = value if isinstance(value, (list, set, deque)) else [*(value if isinstance(value, dict) else vars(value)).items()]
            for one in parts:
                yield from _marks(one, known)
    elif isinstance(value, tuple):
        for one in value:
            yield from _marks(one, known)
    else:
        yield value if isinstance(value, (int, float, str)) else id(value)


def _followed(kept, left, now, known: set | None = None):
    """`kept` with what has changed from `left` to `now`."""
    known = set() if known is None else known
    parts = [one if isinstance(one, dict) else vars(one) if _kept_by_neighbours(one) else None for one in (kept, left, now)]
    if None in parts or type(kept) is not type(now):
        return kept if [*_marks(left)] == [*_marks(now)] else _copied(now)
    if id(now) in known:
        return kept
    known.add(id(now))
    mine, before, after = parts
    for name in before.keys() - after.keys():
        mine.pop(name, None)
    for name, one in after.items():
        if name not in before:
            mine[name] = _copied(one)
        elif name in mine:
            mine[name] = _followed(mine[name], before[name], one, known)
    return kept


class Apart:
    """What neighbours keep for one condition of one run, on the network and in its options; as it was when the run began, and followed in
    what they change between calls, such as the step they are at.

    Args:
        model: whose network is asked.
        model_options: of the run.
    """

    def __init__(self, model, model_options: dict):
        self.network = getattr(model, "diffusion_model", None)
        self.kept = _copied(self._state(model_options))
        self.left = _copied(self.kept)  # as the guider's own call left it

    def _state(self, model_options: dict) -> dict:
        held, options = getattr(self.network, "__dict__", {}), model_options.get("transformer_options", {})
        return {"network": {name: one for name, one in held.items() if name not in PLAIN and not callable(one)},
                "options": {name: one for name, one in options.items() if name not in OPTIONS and not callable(one)
                            and (isinstance(one, (dict, list, set)) or hasattr(one, "__dict__"))}}

    @contextmanager
    def guiders(self, model_options: dict):
        """Around a call of the guider's."""
        self.kept = _followed(self.kept, self.left, self._state(model_options))
        try:
            yield
        finally:
            self.left = _copied(self._state(model_options))

    @contextmanager
    def _installed(self):
        theirs = self._state({})["network"]
        self._put(self.kept["network"])
        try:
            yield
        finally:
            self.kept["network"] = self._state({})["network"]
            self._put(theirs)

    def _put(self, state: dict) -> None:
        for name in self._state({})["network"]:
            del self.network.__dict__[name]
        if self.network is not None:
            self.network.__dict__.update(state)

    def ask(self, evaluate: Callable, conds: list[dict], model_options: dict) -> torch.Tensor:
        """The prediction under a condition: `evaluate(conds, model_options)` of it alone."""
        options = comfy.patcher_extension.copy_nested_dicts(model_options.get("transformer_options", {}))
        with self._installed():
            return evaluate([conds], {**model_options, "transformer_options": {**options, **self.kept["options"]}})[0]
