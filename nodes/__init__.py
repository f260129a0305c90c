"""Thin adapters between ComfyUI and the core: one file per station."""
from comfy_api.latest import ComfyExtension

from . import bank, class_condition, clip, describe, folders, negation_set, reference, report, sample


class SafeDenoiserExtension(ComfyExtension):
    async def get_node_list(self):
        folders.register()  # before any schema lists its files
        stations = (negation_set, bank, reference, sample, report, clip, class_condition, describe)
        return [node for station in stations for node in station.NODES]
