"""What other nodes bring by a wire, through ComfyUI's own executor: names, choices, and lists of pictures."""
import asyncio
import inspect
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def execute(comfy, pack, monkeypatch):
    """Run a prompt {id: (class, inputs)} to node "out"; (what it was given, why it was refused)."""
    import execution

    given = []

    class Out:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, ""

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": ("*",)}}

        @classmethod
        def VALIDATE_INPUTS(cls, input_types):
            return True

        def keep(self, value):
            given.append(value)
            return {"ui": {}}

    def source(kind, value, listed=False):
        class Source:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = (kind,), "give", "", (listed,)

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {}}

            def give(self):
                return (value,)

        return Source

    def run(sources, prompt):
        for name, node in {"Out": Out, **{key: source(*one) for key, one in sources.items()}, **pack}.items():
            monkeypatch.setitem(comfy.NODE_CLASS_MAPPINGS, name, node)
        prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in prompt.items()}
        prompt |= {key: {"class_type": key, "inputs": {}} for key in sources}
        valid, error, errors = asyncio.run(execution.validate_inputs("prompt", prompt, "out", {}))[:2] + ("",)
        if not valid:
            return None, str(error) + str(asyncio.run(execution.validate_inputs("prompt", prompt, prompt["out"]["inputs"]["value"][0], {})))
        messages = []
        server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *args: messages.append(args))
        newer = "cache_args" in inspect.signature(execution.PromptExecutor).parameters
        executor = execution.PromptExecutor(server, **(dict(cache_args=dict(lru=0, ram=0, ram_inactive=0)) if newer else {}))
        executor.execute(prompt, "prompt", {}, ["out"])
        failed = [one for one in executor.status_messages if one[0] == "execution_error"]
        return given, failed[0][1]["exception_message"] if failed else errors

    return run


@pytest.mark.parametrize("node, key, kind, name", [
    ("LoadNegationSet", "folder", "COMBO", "tiny_sevens"), ("LoadNegationBank", "bank", "COMBO", "tiny_reference.safetensors"),
    ("LoadOpenCLIP", "weights", "COMBO", "tiny_clip")])
def test_a_name_that_comes_by_a_wire_is_checked_when_it_is_there(node, key, kind, name, execute):
    more = dict(max_images=3, preview="off") if node == "LoadNegationSet" else {}
    more |= dict(architecture="ViT-B-32", pretrained="", allow_download=False) if node == "LoadOpenCLIP" else {}
    for value, refused in ((name, ""), ("../../etc", "leads out of"), ("gone", "is not on this machine")):
        found, error = execute({"Name": (kind, value)}, {
            "1": (f"SafeDenoiser{node}", {key: ["Name", 0], **more}), "out": ("Out", {"value": ["1", 0]})})
        assert len(found) == 1 and (refused in error if refused else not error), "the first is there, the others are refused by name"


def sampler_prompt(node, more=()):
    own = dict(model=["Model", 0], seed=1, steps=2, sampler_name=["Sampler", 0], scheduler=["Scheduler", 0])
    if node == "KSampler":
        own |= dict(cfg=2.0, positive=["Cond", 0], negative=["Cond", 0], latent_image=["Latent", 0], denoise=1.0, unwanted=["Cond", 0],
                    neutral=["Cond", 0], method="safe_denoiser", strength=1.0, start=0.0, end=1.0, bank_size="exact")
    else:
        own |= dict(latent=["Latent", 0], conditioning=["Cond", 0], count=2, batch_size=2)
    return {"1": (f"SafeDenoiser{node}", own | dict(more)), "out": ("Out", {"value": ["1", 0]})}


@pytest.mark.parametrize("node", ["KSampler", "SampleReferenceBank"])
def test_lists_of_selectors_go_into_sampler_and_scheduler(node, execute, comfy, tiny):
    """As KSampler takes them."""
    import comfy.samplers

    sources = {"Model": ("MODEL", tiny.model), "Cond": ("CONDITIONING", tiny.straight), "Latent": ("LATENT", tiny.latent()),
               "Sampler": (comfy.samplers.KSampler.SAMPLERS, "heun"), "Scheduler": (comfy.samplers.KSampler.SCHEDULERS, "normal")}
    found, error = execute(sources, sampler_prompt(node))
    assert not error and len(found) == 1
    found, error = execute(sources, sampler_prompt(node, {"latent_image" if node == "KSampler" else "latent": ["Model", 0]}))
    assert found is None and "takes LATENT, and MODEL is connected" in error


def test_a_list_of_pictures_is_one_set(execute):
    pictures = [torch.rand(count, size, 8, 3) for count, size in ((1, 8), (1, 12), (3, 8))]
    found, error = execute({"Pictures": ("IMAGE", pictures, True)}, {
        "1": ("SafeDenoiserNegationSetFromImages", {"images": ["Pictures", 0], "preview": "off"}), "out": ("Out", {"value": ["1", 0]})})
    assert not error and len(found) == 1 and len(found[0]) == 5
    assert [tuple(one.shape) for one in found[0]] == [(8, 8, 3), (12, 8, 3), *[(8, 8, 3)] * 3]
