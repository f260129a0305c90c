"""Runs nodes of ComfyUI: in this process, or on a server by its API. Both answer with pictures (B, H, W, 3) in [0, 1]."""
import asyncio
import importlib.util
import io
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dev import Api

ROOT = Path(__file__).resolve().parents[2]
QUIET = 3.0  # seconds between two lines about a node that takes long


class OutOfMemory(Exception):
    """The batch does not fit."""


class InProcess:
    """ComfyUI in this process with the pack loaded as ComfyUI loads it. What nodes made is kept while later graphs ask for it.

    `base` is another base directory than ComfyUI's own folder, as its option --base-directory. `say` is told how far a node of the pack is
    that takes long, as one that learns.
    """

    def __init__(self, comfyui: Path, base: Path | None = None, say: Callable[[str], None] | None = None):
        sys.path.insert(0, str(comfyui))  # before the pack's root, whose `nodes` would shadow ComfyUI's
        import torch
        from comfy.cli_args import args

        logging.getLogger().setLevel(logging.WARNING)  # what ComfyUI says of each loading hides the progress
        args.cpu = args.cpu or not torch.cuda.is_available()
        if base:
            args.base_directory = str(base)
        if (paths := Path(comfyui) / "extra_model_paths.yaml").is_file():  # as ComfyUI does it where it is started
            from utils.extra_config import load_extra_path_config  # before `nodes`, which puts a folder with another `utils` first

            load_extra_path_config(str(paths))
        import comfy.utils
        import comfyui_version
        import nodes

        comfy.utils.PROGRESS_BAR_ENABLED = False  # a bar per batch would hide the progress too
        if Path(nodes.__file__).parent != Path(comfyui):
            raise RuntimeError(f"another module than ComfyUI's is called nodes: {nodes.__file__}")
        spec = importlib.util.spec_from_file_location("safe_denoiser_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        pack = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
        self.classes = nodes.NODE_CLASS_MAPPINGS | {node.GET_SCHEMA().node_id: node for node in found}
        self.version, self.made, self.torch = f"ComfyUI {comfyui_version.__version__}, in process", {}, torch
        self.doing = {"name": "", "since": 0.0}
        self.memory = torch.cuda.is_available() and not args.cpu
        if say:
            comfy.utils.set_progress_bar_global_hook(self.progress(say))

    def progress(self, say: Callable[[str], None]) -> Callable:
        """For ComfyUI's bars, but not KSampler's: its pictures are counted."""
        doing = self.doing  # and not self, whose models would else live as long as ComfyUI

        def hook(done, total, *_, **__):
            if doing["name"] and time.monotonic() - doing["since"] > QUIET:
                doing["since"] = time.monotonic()
                say(f"once, before pictures are drawn with it: {doing['name']}, {done} of {total}")

        return hook

    def add_folder(self, kind: str, path: Path) -> None:
        import folder_paths

        folder_paths.add_model_folder_path(kind, str(path))

    def file(self, kind: str, name: str) -> Path | None:
        """Where the file of that name is."""
        import folder_paths

        found = folder_paths.get_full_path(kind, name)
        return found and Path(found)

    def pictures(self, nodes: dict, wire: list) -> np.ndarray:
        import comfy.model_management as management

        if self.memory:
            self.torch.cuda.reset_peak_memory_stats()
        self.made = {key: value for key, value in self.made.items() if self.lasting(value) or key in nodes and isinstance(value[0], list)}
        try:
            with self.torch.inference_mode():
                return self.output(nodes, wire).float().cpu().numpy()
        except management.OOM_EXCEPTION as error:
            management.soft_empty_cache()
            raise OutOfMemory(str(error)) from error

    @staticmethod
    def lasting(value) -> bool:
        """Models, banks and sets are used by many graphs. Conditions, which are lists, are kept for the next one; latents and pictures are
        drawn anew, or the seconds of a row would be those of what another row has not drawn yet.
        """
        return not isinstance(value[0], list | dict) and not hasattr(value[0], "shape")

    def output(self, nodes: dict, wire: list):
        key, number = wire
        if key not in self.made:
            node, inputs = self.classes[nodes[key]["class_type"]], nodes[key]["inputs"]
            given = {name: self.output(nodes, value) if isinstance(value, list) else value for name, value in inputs.items()}
            self.doing |= {"name": node.GET_SCHEMA().display_name if hasattr(node, "GET_SCHEMA") else "", "since": time.monotonic()}
            self.made[key] = self.call(node, given)
        return self.made[key][number]

    def call(self, node, given: dict) -> tuple:
        if not hasattr(node, "GET_SCHEMA"):
            return getattr(node(), node.FUNCTION)(**given)
        schema = node.GET_SCHEMA()
        given = {one.id: one.default for one in schema.inputs if getattr(one, "default", None) is not None} | given
        if schema.is_input_list:
            given = {name: [value] for name, value in given.items()}
        return node.EXECUTE_NORMALIZED(**given).args

    def peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.memory else None


class Remote(Api):
    """A running ComfyUI that has the pack; files are chosen by the names that it knows."""

    def __init__(self, url: str):
        super().__init__(url)
        self.known: dict[str, dict] = {}
        self.version = f"ComfyUI {self.get('/system_stats')['system'].get('comfyui_version', '?')}, server"
        if "SafeDenoiserApply" not in self.get("/object_info/SafeDenoiserApply"):
            raise RuntimeError(f"the ComfyUI at {url} does not have this pack; install it there and start it anew")

    def file(self, kind: str, name: str) -> None:
        """It does not tell where its files are."""

    def complete(self, nodes: dict) -> dict:
        """The API asks for every widget: those that are not set get the node's default."""
        return {key: {**node, "inputs": self.defaults(node["class_type"]) | node["inputs"]} for key, node in nodes.items()}

    def defaults(self, kind: str) -> dict:
        if kind not in self.known:
            wanted = self.get(f"/object_info/{kind}")[kind]["input"]
            self.known[kind] = {name: one[1]["default"] for part in ("required", "optional") for name, one in wanted.get(part, {}).items()
                                if len(one) > 1 and isinstance(one[1], dict) and "default" in one[1]}
        return self.known[kind]

    def pictures(self, nodes: dict, wire: list) -> np.ndarray:
        key = self.queue(self.complete(nodes) | {"pictures": {"class_type": "PreviewImage", "inputs": {"images": wire}}})
        while not (entry := self.finished(key)):
            time.sleep(0.2)
        try:
            found = self.checked(entry)["outputs"]["pictures"]["images"]
        except RuntimeError as error:
            raise (OutOfMemory if "OutOfMemory" in str(error) else RuntimeError)(str(error)) from error
        return np.stack([np.asarray(Image.open(io.BytesIO(self.view(one))).convert("RGB")) for one in found]).astype(np.float32) / 255

    def peak(self) -> None:
        return None
