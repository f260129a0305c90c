"""Runs nodes of ComfyUI: in this process, or on a server by its API. Both answer with pictures (B, H, W, 3) in [0, 1]."""
import asyncio
import importlib.util
import io
import json
import logging
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


class OutOfMemory(Exception):
    """The batch does not fit."""


class InProcess:
    """ComfyUI in this process with the pack loaded as ComfyUI loads it. What nodes made is kept while later graphs ask for it."""

    def __init__(self, comfyui: Path, base: Path | None = None):
        sys.path.insert(0, str(comfyui))  # before the pack's root, whose `nodes` would shadow ComfyUI's
        import torch
        from comfy.cli_args import args

        logging.getLogger().setLevel(logging.WARNING)  # what ComfyUI says of each loading hides the progress
        args.cpu = args.cpu or not torch.cuda.is_available()
        if base:
            args.base_directory = str(base)
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
        self.memory = torch.cuda.is_available() and not args.cpu
        for kind in ("diffusion_models", "vae"):  # in which the pack itself lists nothing
            self.add_folder(kind, ROOT / "tiny_digits/models" / kind)

    def add_folder(self, kind: str, path: Path) -> None:
        import folder_paths

        folder_paths.add_model_folder_path(kind, str(path))

    def pictures(self, nodes: dict, wire: list) -> np.ndarray:
        import comfy.model_management as management

        if self.memory:
            self.torch.cuda.reset_peak_memory_stats()
        kept = set(nodes)
        self.made = {key: value for key, value in self.made.items() if key in kept or self.lasting(value)}
        try:
            with self.torch.inference_mode():
                return self.output(nodes, wire).float().cpu().numpy()
        except management.OOM_EXCEPTION as error:
            management.soft_empty_cache()
            raise OutOfMemory(str(error)) from error

    @staticmethod
    def lasting(value) -> bool:
        """Models, banks and sets are used by many graphs; conditions, latents and pictures by one."""
        return not isinstance(value[0], list | dict) and not hasattr(value[0], "shape")

    def output(self, nodes: dict, wire: list):
        key, number = wire
        if key not in self.made:
            node, inputs = self.classes[nodes[key]["class_type"]], nodes[key]["inputs"]
            given = {name: self.output(nodes, value) if isinstance(value, list) else value for name, value in inputs.items()}
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


class Remote:
    """A running ComfyUI that has the pack; files are chosen by the names that it knows."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.version = f"ComfyUI {self.ask('/system_stats')['system'].get('comfyui_version', '?')}, server"
        if "SafeDenoiserApply" not in self.ask("/object_info/SafeDenoiserApply"):
            raise RuntimeError(f"the ComfyUI at {url} does not have this pack; install it there and start it anew")

    def request(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        try:
            asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"ComfyUI answered {path} with {error.code}: {error.read().decode(errors='replace')[:2000]}") from error

    def ask(self, path: str, body: dict | None = None):
        return json.loads(self.request(path, body) or "null")

    def complete(self, nodes: dict) -> dict:
        """The API asks for every widget: those that are not set get the node's default."""
        def defaults(kind):
            wanted = self.ask(f"/object_info/{kind}")[kind]["input"]
            return {name: one[1]["default"] for part in ("required", "optional") for name, one in wanted.get(part, {}).items()
                    if len(one) > 1 and isinstance(one[1], dict) and "default" in one[1]}

        known = {kind: defaults(kind) for kind in {node["class_type"] for node in nodes.values()}}
        return {key: {**node, "inputs": known[node["class_type"]] | node["inputs"]} for key, node in nodes.items()}

    def pictures(self, nodes: dict, wire: list) -> np.ndarray:
        prompt = self.complete(nodes) | {"pictures": {"class_type": "PreviewImage", "inputs": {"images": wire}}}
        answer = self.ask("/prompt", {"prompt": prompt})
        if answer.get("node_errors"):
            raise RuntimeError(f"ComfyUI refused some nodes: {answer['node_errors']}")
        key = answer["prompt_id"]
        while not (entry := self.ask(f"/history/{key}").get(key)):
            time.sleep(0.2)
        for kind, details in entry["status"]["messages"]:
            if kind == "execution_error":
                said = f"{details['node_type']}: {details['exception_type']}: {details['exception_message'].strip()}"
                raise (OutOfMemory if "OutOfMemory" in said else RuntimeError)(said)
        found = entry["outputs"]["pictures"]["images"]
        return np.stack([np.asarray(Image.open(io.BytesIO(self.request("/view?" + urllib.parse.urlencode(one)))).convert("RGB"))
                         for one in found]).astype(np.float32) / 255

    def peak(self) -> None:
        return None
