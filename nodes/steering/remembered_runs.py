"""What is kept of runs, by the latent that each left: its report, and what another run needs to go on with it.

A report is filled while its patched MODEL samples. ComfyUI may keep the sampler's result and forget the node that patched the model:
that is then made anew, with a report that nothing fills. Or it keeps the results of several runs of one patched model. The latent tells
which run it came from. It also tells which run another goes on with, where a picture is sampled in parts (KSampler (Advanced), packs
that sample step by step).
"""
from collections import OrderedDict
from dataclasses import dataclass, replace

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context

from ...safe_denoiser import Report
from ..bank.negation_bank import parts_of
from ..fingerprint import PLAIN, fingerprint

LATEST, RESUMABLE = 64, 4  # runs of which the report is kept, a few numbers per model call; and of which the memory is, a latent at most


@dataclass(frozen=True)
class Kept:
    """A run that is over: its report, what it remembers, the conditions under which that holds, and the noise level at which it ended."""

    report: Report
    memory: dict
    conds: str
    sigma: float


_runs: OrderedDict[tuple[str, str], Kept] = OrderedDict()


def source() -> str:
    """The node that runs now, and which of its list of inputs; nothing outside a workflow."""
    context = get_executing_context()
    return "" if context is None else f"{context.node_id} {getattr(context, 'list_index', None)}"


def _key(report: Report, samples) -> tuple[str, str]:
    """Of latents as the sampler makes them or as it hands them over: packed or in streams, in its own dtype or in ComfyUI's."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
    return report.source or f"{id(report.steps)}", fingerprint(*torch.cat([part.flatten(1).to(dtype) for part in parts_of(samples)], 1))


def remember(report: Report, samples, memory: dict, conds: dict, sigma: float) -> None:
    """Keep a run that is over, by the samples it left at a noise level.

    Args:
        memory: what it remembers, see `SafeDenoiser`.
        conds: that it was sampled under; what it remembers holds under these.
    """
    key = _key(report, samples)
    _runs[key] = Kept(replace(report, steps=[*report.steps], notes=[*report.notes], weak=[*report.weak]), memory, _told(conds), sigma)
    _runs.move_to_end(key)
    while len(_runs) > LATEST:
        _runs.popitem(last=False)
    for kept in [*_runs.values()][:-RESUMABLE]:
        kept.memory.clear()


def remembered(report: Report, samples, conds: dict, sigma: float) -> dict:
    """The memory of the run that left these samples, for one that goes on from there: under the same conditions, and where the noise is no
    higher. Else an empty one.
    """
    kept = _runs.get(_key(report, samples))
    return _copied(kept.memory) if kept and kept.conds == _told(conds) and sigma <= kept.sigma * (1 + 1e-4) else {}


def _told(conds: dict) -> str:
    """Of conditions in this process: hooks, ControlNets and other models are told by which object they are."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key != "uuid"}  # drawn anew for each run
        if isinstance(value, (list, tuple)):
            return [*map(plain, value)]
        return value if isinstance(value, (*PLAIN, torch.Tensor)) else id(value)

    return fingerprint(plain(conds))


def _copied(memory: dict) -> dict:
    """Its tensors are never changed in place, the dicts are."""
    return {name: _copied(value) if isinstance(value, dict) else value for name, value in memory.items()}


def recall(report: Report, samples) -> Report:
    """The report of the run that made these samples, as long as it is remembered; else the given one, which may not have been filled."""
    kept = _runs.get(_key(report, samples))
    return kept.report if kept else report
