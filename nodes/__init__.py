"""Thin adapters between ComfyUI and the core, in the same stations."""
import logging

from comfy_api.latest import ComfyExtension

from . import folders, report, versions
from .bank import negation_bank, reference_bank
from .condition import learn, saved_condition
from .meaning import check_images, clip, curate, describe, semantic_posterior
from .models import class_condition, tiny_world
from .pictures import negation_set, routes
from .steering import guard_model, keep_out, sample
from .words import guard_prompt


class SafeDenoiserExtension(ComfyExtension):
    async def get_node_list(self):
        if line := versions.too_old():
            logging.warning(line)
        folders.register()  # before any schema lists its files
        routes.register()
        tiny_world.register()
        stations = (negation_set, negation_bank, reference_bank, sample, report, clip, curate,
                    check_images, semantic_posterior, class_condition, describe, guard_prompt, guard_model, learn,
                    saved_condition, keep_out, tiny_world)
        return [node for station in stations for node in station.NODES]
