"""Conditions evaluated in calls of their own, where they cannot share the guider's batch: many patches of other packs know two conditions
only, or keep a cache by place in the batch, on the network or in its options. Each of our conditions gets a copy of what they keep.
"""
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import comfy.patcher_extension
import torch

KNOWN = {"comfy", "comfy_extras", "comfy_api", "torch"}  # whose patches are made for any batch
OPTIONS = {"patches", "patches_replace", "wrappers", "callbacks", "sample_sigmas", "sigmas", "cond_or_uncond", "uuids"}  # ComfyUI's own
PLAIN = vars(torch.nn.Module()).keys()
PATCHED = ("another pack patches the network, so the unwanted condition is asked of it in a call of its own, which takes its time at each "
           "step")
MIXED = ("EasyCache of this ComfyUI adds up what the conditions of one batch change, so the unwanted condition is asked in a call of its "
         "own; prompts that share a batch are mixed all the same: use LazyCache, or a newer ComfyUI")


def _foreign(function) -> bool:
    """Whether it is some neighbour's."""
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    return callable(function) and module.partition(".")[0] not in KNOWN and not module.startswith(__package__.rpartition(".")[0])


def _leaves(value) -> Iterator:
    if isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


def why_apart(model, patcher, model_options: dict) -> str:
    """Why conditions cannot be in the guider's own batch, in words; "": they can."""
    if patched_by_neighbours(model, patcher, model_options):
        return PATCHED
    return MIXED if mixes(model_options.get("transformer_options", {}).get("easycache")) else ""


def mixes(cache) -> bool:
    """Whether a cache of ComfyUI's, when it skips the network, adds the changes of all conditions of a batch to each of them, as EasyCache
    did before it was fixed. It is tried out, since nothing in it tells.
    """
    if not hasattr(cache, "uuid_cache_diffs"):
        return False
    probe = cache.clone()
    probe.uuid_cache_diffs = {"one": torch.zeros(1, 1), "other": torch.ones(1, 1)}
    return bool(probe.apply_cache_diff(torch.zeros(2, 1), ["one", "other"])[0] != 0)


def patched_by_neighbours(model, patcher, model_options: dict) -> bool:
    """Whether a call of the network goes through code of other packs."""
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


def _parts(value) -> dict | None:
    """Of a dictionary or a neighbour's object, by name."""
    return value if isinstance(value, dict) else vars(value) if _kept_by_neighbours(value) else None


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
    named = _parts(value)
    parts = value if isinstance(value, (list, set, deque, tuple)) else None if named is None else [*named.items()]
    if parts is None:
        yield value if isinstance(value, (int, float, str)) else id(value)
    elif id(value) not in known:
        if not isinstance(value, tuple):  # the pairs of a dictionary are made anew each time
            known.add(id(value))
        for one in parts:
            yield from _marks(one, known)


def _followed(kept, left, now, known: set | None = None):
    """`kept` with what has changed from `left` to `now`."""
    known = set() if known is None else known
    parts = [_parts(one) for one in (kept, left, now)]
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
    """What other packs keep, on the network and in its options: a copy for each condition of one run. Copies begin as it was when the run
    began, and take over what the packs change between calls, such as the number of the step.

    Args:
        model: the one whose network is called.
        model_options: of the run.
        keys: of the conditions.
        why: the reason for calls of their own, in words.
    """

    def __init__(self, model, model_options: dict, keys: Iterable[int], why: str):
        self.why = why
        self.network = getattr(model, "diffusion_model", None)
        self.left = _copied(self._state(model_options))  # as the guider's own call left it
        self.kept = {key: _copied(self.left) for key in keys}

    def _on_network(self) -> dict:
        return {name: one for name, one in getattr(self.network, "__dict__", {}).items() if name not in PLAIN and not callable(one)}

    def _state(self, model_options: dict) -> dict:
        options = {name: one for name, one in model_options.get("transformer_options", {}).items() if name not in OPTIONS
                   and not callable(one) and (isinstance(one, (dict, list, set)) or hasattr(one, "__dict__"))}
        return {"network": self._on_network(), "options": options}

    @contextmanager
    def guiders(self, model_options: dict):
        """Goes around a call for the guider's own batch: the copies take over what has changed since the last one."""
        now = self._state(model_options)
        self.kept = {key: _followed(kept, self.left, now) for key, kept in self.kept.items()}
        try:
            yield
        finally:
            self.left = _copied(self._state(model_options))

    @contextmanager
    def _installed(self, kept: dict):
        theirs = self._on_network()
        self._put(kept["network"])
        try:
            yield
        finally:
            kept["network"] = self._on_network()
            self._put(theirs)

    def _put(self, state: dict) -> None:
        for name in self._on_network():
            del self.network.__dict__[name]
        if self.network is not None:
            self.network.__dict__.update(state)

    def ask(self, key: int, evaluate: Callable, conds: list[dict], model_options: dict) -> torch.Tensor:
        """The prediction under one condition: `evaluate(conds, model_options)` of it alone, with its copy in place."""
        options, kept = comfy.patcher_extension.copy_nested_dicts(model_options.get("transformer_options", {})), self.kept[key]
        with self._installed(kept):
            return evaluate([conds], {**model_options, "transformer_options": {**options, **kept["options"]}})[0]
