"""Thin adapters between ComfyUI and the core: one file per station."""
import logging

from comfy_api.latest import ComfyExtension

from . import bank, class_condition, clip, describe, folders, negation_set, reference, report, sample, versions


class SafeDenoiserExtension(ComfyExtension):
    async def get_node_list(self):
        if versions.too_old():
            logging.warning(versions.too_old())
        folders.register()  # before any schema lists its files
        stations = (negation_set, bank, reference, sample, report, clip, class_condition, describe)
        return [node for station in stations for node in station.NODES]
