"""Thin adapters between ComfyUI and the core: one file per station."""
import logging

from comfy_api.latest import ComfyExtension

from . import (
    bank,
    check,
    class_condition,
    clip,
    curate,
    describe,
    folders,
    guard_model,
    guard_prompt,
    keep_out,
    learn,
    negation_set,
    page,
    reference,
    report,
    sample,
    saved_condition,
    semantic,
    tiny_world,
    versions,
)


class SafeDenoiserExtension(ComfyExtension):
    async def get_node_list(self):
        if line := versions.too_old():
            logging.warning(line)
        folders.register()  # before any schema lists its files
        page.register()
        tiny_world.register()
        stations = (negation_set, bank, reference, sample, report, clip, curate, check, semantic, class_condition, describe, guard_prompt,
                    guard_model, learn, saved_condition, keep_out, tiny_world)
        return [node for station in stations for node in station.NODES]
