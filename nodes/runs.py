"""Which report belongs to which sampled latent.

A report is filled while its patched MODEL samples. ComfyUI may keep the sampler's result and forget the node that patched the model:
that is then made anew, with a report that nothing fills. Or it keeps the results of several runs of one patched model. The latent tells
which run it came from.
"""
from collections import OrderedDict
from dataclasses import replace

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context

from ..safe_denoiser import Report
from .bank import parts_of
from .fingerprint import fingerprint

LATEST = 64  # runs that are remembered; each takes a few numbers per model call
_runs: OrderedDict[tuple[str, str], Report] = OrderedDict()


def source() -> str:
    """The node that runs now, and which of its list of inputs; nothing outside a workflow."""
    context = get_executing_context()
    return "" if context is None else f"{context.node_id} {getattr(context, 'list_index', None)}"


def _key(report: Report, samples) -> tuple[str, str]:
    """Of latents as the sampler makes them or as it hands them over: packed or in streams, in its own dtype or in ComfyUI's."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
    return report.source, fingerprint(*torch.cat([part.flatten(1).to(dtype) for part in parts_of(samples)], 1))


def remember(report: Report, samples) -> None:
    if not report.source:
        return
    key = _key(report, samples)
    _runs[key] = replace(report, steps=[*report.steps], notes=[*report.notes])
    _runs.move_to_end(key)
    while len(_runs) > LATEST:
        _runs.popitem(last=False)


def recall(report: Report, samples) -> Report:
    """The report of the run that made these samples, as long as it is remembered; else the given one, which may not have been filled."""
    return _runs.get(_key(report, samples), report) if report.source else report
