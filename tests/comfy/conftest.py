"""A real ComfyUI in this process, on the CPU, with its own base directory, and the pack loaded as ComfyUI loads it."""
import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import compatibility
import pytest
import torch

from dev import Server

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """ComfyUI's `nodes` module; afterwards `import comfy` works."""
    comfyui = os.environ["SAFE_DENOISER_COMFYUI"]
    sys.path.insert(0, comfyui)  # before the pack's root, whose `nodes` would shadow ComfyUI's
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, str(tmp_path_factory.mktemp("comfyui"))
    import nodes

    assert Path(nodes.__file__).parent == Path(comfyui)
    return nodes


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack, imported by file as ComfyUI does: node classes by id."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture(scope="session")
def run(pack):
    """Call a node by id as ComfyUI's executor does: on a locked clone of its class. Returns the tuple of its outputs."""
    def call(node_id, **inputs):
        node = pack[f"SafeDenoiser{node_id}"]
        defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        given = {**defaults, **inputs}
        if node.GET_SCHEMA().is_input_list:
            given = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        output = node.EXECUTE_NORMALIZED(**given)
        return SimpleNamespace(result=output.args, ui=output.ui)
    return call


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A ComfyUI of its own, with the pack, that answers on this machine."""
    with Server(os.environ["SAFE_DENOISER_COMFYUI"], tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(comfy, run):
    """The tiny world as its node loads it: model, vae, prompts, and the banks of the tiny workflow."""
    def latent(batch=1, width=32, height=32):
        return {"samples": torch.zeros(batch, 16, height // 8, width // 8)}

    model, vae = run("LoadTinyWorld", world="digits").result
    negation_set = run("LoadNegationSet", folder="tiny_sevens", max_images=40, preview="off").result[0]
    return SimpleNamespace(
        model=model, vae=vae, latent=latent, negation_set=negation_set,
        straight=run("ClassCondition", class_index=10).result[0], empty=run("ClassCondition", class_index=-1).result[0],
        bank=run("BuildNegationBank", negation_set=negation_set, vae=vae, latent=latent()).result[0],
        reference=run("LoadNegationBank", bank="tiny_reference.safetensors").result[0])


@pytest.fixture
def sample(comfy, run, tiny):
    """The stock KSampler, and Safe KSampler with the same arguments."""
    def arguments(sampler_name="euler", scheduler="simple", steps=6, batch=2, latent=None, model=None, cfg=2.0, denoise=1.0):
        return dict(model=model or tiny.model, seed=5, steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler=scheduler,
                    positive=tiny.straight, negative=tiny.empty, denoise=denoise, latent_image=latent or tiny.latent(batch))

    def stock(**choices):
        return comfy.KSampler().sample(**arguments(**choices))[0]["samples"]

    def safe(banks=None, settings=None, **choices):
        banks = banks or dict(negation_bank=tiny.bank, reference_bank=tiny.reference)
        latent, report = run("KSampler", **arguments(**choices), **banks, **(settings or {})).result
        return latent["samples"], report

    return SimpleNamespace(stock=stock, safe=safe, arguments=arguments)


LINES = []


@pytest.fixture
def matrix():
    """One line of the compatibility matrix, printed at the end: the test names it, and says how it came out when it did."""
    line = SimpleNamespace(name="", outcome="")
    yield line
    if line.name and line.outcome:
        LINES.append((line.name, line.outcome))


def pytest_terminal_summary(terminalreporter, config):
    if LINES:
        terminalreporter.section("compatibility matrix", sep="-")
        for name, outcome in LINES:
            terminalreporter.write_line(f"{name:<46} {outcome}")
    if config.getoption("--write-compatibility"):
        compatibility.write(dict(LINES))
