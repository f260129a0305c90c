"""Keys of what is kept on disk: the same for the same content wherever it is, and another for any other."""
import itertools
import sys

import pytest
import torch
from families import FAMILIES, build
from test_guiders import lora

from dev import ROOT


@pytest.fixture
def fingerprint(pack):
    from pack.nodes.fingerprint import fingerprint

    return fingerprint


def test_no_two_nests_share_a_key(fingerprint):
    """Numbers do not run together, and types, lengths and places count."""
    nests = [(10, 0, 20), (100, 2, 0), (1, 0), (10,), "10", ["1", "0"], [["1"], "0"], [["1", "0"]], [1, [0]], b"10", {"1": "0"}, {1: "0"},
             {"1": ["0"]}, [], [[]], {}, "", None, "None", True, 1, 1.0, "True", torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).half(),
             [torch.zeros(2), torch.zeros(2)], float("nan"), torch.float32, "torch.float32"]
    keys = [fingerprint(nest) for nest in nests]
    assert len(set(keys)) == len(keys), [(nests[i], nests[j]) for i, j in itertools.combinations(range(len(keys)), 2) if keys[i] == keys[j]]
    assert fingerprint(1, 23) != fingerprint(12, 3) and fingerprint([1], 2) != fingerprint(1, [2])


def load(patcher):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)


def test_the_key_of_a_model_is_the_same_loaded_or_not(tiny, pack, comfy):
    """Whichever clone is loaded: with a LoRA, with another schedule, or the plain one."""
    import comfy.model_management
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    from pack.nodes.fingerprint import fingerprint_model

    comfy.model_management.unload_all_models()
    clones = [tiny.model.clone(), lora(tiny.model, 0.5), lora(tiny.model, 0.6), ModelSamplingSD3().patch(tiny.model, 5.0)[0],
              ModelSamplingSD3().patch(tiny.model, 6.0)[0], ModelSamplingSD3().patch(lora(tiny.model, 0.5), 5.0)[0]]
    keys = [fingerprint_model(clone) for clone in clones]
    assert len(set(keys)) == len(keys)
    for loaded in clones:
        load(loaded)
        assert [fingerprint_model(clone) for clone in clones] == keys
    comfy.model_management.unload_all_models()
    assert [fingerprint_model(clone) for clone in clones] == keys


def test_the_key_of_quantised_weights_is_the_same_loaded_or_not(pack, comfy):
    """A LoRA on fp8 weights: loading them makes other numbers and another scale of them."""
    if "comfy.quant_ops" not in sys.modules:
        pytest.skip("this ComfyUI has no quantised tensors")
    import comfy.model_patcher
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor
    from pack.nodes.fingerprint import fingerprint_model

    cpu, keys = torch.device("cpu"), []
    for scale in (1.0, 2.0):
        module = torch.nn.Module()
        module.layer = comfy.ops.mixed_precision_ops().Linear(32, 16, device=cpu)
        module.layer.quant_format, module.layer.layout_type = "float8_e4m3fn", "TensorCoreFP8E4M3Layout"
        weight = scale * torch.linspace(-1, 1, 512).reshape(16, 32)
        module.layer.weight = torch.nn.Parameter(QuantizedTensor.from_float(weight, module.layer.layout_type, scale="recalculate"),
                                                 requires_grad=False)
        torch.nn.init.zeros_(module.layer.bias)
        patcher = comfy.model_patcher.ModelPatcher(module, load_device=cpu, offload_device=cpu)
        patcher.add_patches({"layer.weight": (torch.ones(16, 32),)}, 0.5)
        before, key = module.layer.weight, fingerprint_model(patcher)
        patcher.patch_model(device_to=cpu)
        assert module.layer.weight is not before and fingerprint_model(patcher) == key
        patcher.unpatch_model()
        assert fingerprint_model(patcher) == key
        keys.append(key)
    assert keys[0] != keys[1], "twice as large: the same stored numbers, another scale"


def function(strength):
    return lambda args: args["denoised"] * strength


class Guard:
    """A callable of a node pack, with its settings as attributes."""

    def __init__(self, strength):
        self.strength, self.me = strength, self

    def __call__(self, args):
        return args["denoised"] * self.strength

    def method(self, *args):
        return self.strength


def changed(do):
    def make(model, strength):
        model = model.clone()
        do(model, strength)
        return model

    return make


def by_node(module, name, **inputs):
    """A node of ComfyUI's own with its first number set."""
    def make(model, strength):
        import importlib
        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        given = {key: strength if value is None else value for key, value in inputs.items()}
        made = node.execute(model, **given) if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)(model, **given)
        return getattr(made, "args", made)[0]

    return make


def hooked(model, strength):
    import comfy.hooks

    model, group = model.clone(), comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=strength)
    hook.weights = {"diffusion_model.x_embedder.proj.bias": (torch.ones(24),)}
    group.add(hook)
    model.forced_hooks = group
    return model


def beside(model, strength):
    model = model.clone()
    model.set_additional_models("control", [lora(model, strength)])
    return model


CHANGES = {
    "cfg function": changed(lambda model, s: model.set_model_sampler_cfg_function(function(s))),
    "post-cfg function": changed(lambda model, s: model.set_model_sampler_post_cfg_function(function(s))),
    "post-cfg object": changed(lambda model, s: model.set_model_sampler_post_cfg_function(Guard(s))),
    "pre-cfg function": changed(lambda model, s: model.set_model_sampler_pre_cfg_function(function(s))),
    "function around the network": changed(lambda model, s: model.set_model_unet_function_wrapper(function(s))),
    "attention patch": changed(lambda model, s: model.set_model_attn1_patch(function(s))),
    "attention replaced": changed(lambda model, s: model.set_model_attn2_replace(Guard(s).method, "middle", 0)),
    "block patch": changed(lambda model, s: model.set_model_input_block_patch(function(s))),
    "wrapper": changed(lambda model, s: model.add_wrapper_with_key("diffusion_model", "pack", function(s))),
    "callback": changed(lambda model, s: model.add_callback_with_key("on_pre_run", "pack", function(s))),
    "attachment": changed(lambda model, s: model.set_attachments("pack", {"strength": s})),
    "option": changed(lambda model, s: model.model_options.__setitem__("disable_cfg1_optimization", s)),
    "option with a tensor": changed(lambda model, s: model.model_options["transformer_options"].__setitem__("x", torch.tensor(s))),
    "hook": hooked, "another model": beside,
    "FreeU_V2": by_node("nodes_freelunch", "FreeU_V2", b1=None, b2=1.4, s1=0.9, s2=0.2),
    "RescaleCFG": by_node("nodes_model_advanced", "RescaleCFG", multiplier=None),
    "ModelSamplingDiscrete": by_node("nodes_model_advanced", "ModelSamplingContinuousEDM", sampling="v_prediction", sigma_max=None,
                                     sigma_min=0.01),
    "PerturbedAttentionGuidance": by_node("nodes_pag", "PerturbedAttentionGuidance", scale=None),
    "HyperTile": by_node("nodes_hypertile", "HyperTile", tile_size=256, swap_size=2, max_depth=0, scale_depth=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_what_a_model_predicts_changes_its_key(name, tiny, pack):
    """And the same change has the same key, though the node that makes it makes new functions and objects each time."""
    from pack.nodes.fingerprint import fingerprint_model

    model = build(FAMILIES["SD 1.5"]) if name == "FreeU_V2" else tiny.model
    make, plain = CHANGES[name], fingerprint_model(model)
    keys = [fingerprint_model(make(model, strength)) for strength in (1.1, 1.1, 1.2)]
    assert len({plain, *keys}) == 3 and keys[0] == keys[1]
    assert fingerprint_model(model) == plain == fingerprint_model(model.clone())


def test_what_shows_nothing_of_itself_is_like_nothing_else(tiny, pack):
    """Then nothing comes back from disk: better sampled once more than taken from another model."""
    import threading

    from pack.nodes.fingerprint import fingerprint_model

    model = changed(lambda model, lock: model.set_model_sampler_post_cfg_function(function(lock)))(tiny.model, threading.Lock())
    assert fingerprint_model(model) != fingerprint_model(model)


def test_quantised_weights_of_other_loaders(fingerprint):
    """As GGUF's: bytes, with what they mean beside them."""
    class Quantised(torch.Tensor):
        pass

    def made(data, kind):
        tensor = torch.tensor(data, dtype=torch.uint8).as_subclass(Quantised)
        tensor.tensor_type, tensor.patches = kind, []
        return tensor

    keys = [fingerprint(made(data, kind)) for data, kind in (([1, 2], "Q4"), ([1, 2], "Q4"), ([1, 3], "Q4"), ([1, 2], "Q5"))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    large = torch.arange(2**20 + 5, dtype=torch.int64) + 2**40
    assert fingerprint(large) != fingerprint(large + 1), "integers beyond single precision"


def test_the_key_survives_a_restart(tiny, pack, comfy):
    """Of a model with functions and objects of other packs: another process finds the same file."""
    import os
    import subprocess

    from pack.nodes.fingerprint import fingerprint

    script = """
import asyncio, importlib.util, sys
sys.path[:0] = [sys.argv[2] + "/tests/comfy", sys.argv[2]]
import tests.conftest
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import nodes, test_fingerprint as here
spec = importlib.util.spec_from_file_location("pack", sys.argv[2] + "/__init__.py", submodule_search_locations=[sys.argv[2]])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
from pack.nodes.fingerprint import fingerprint
print(fingerprint(here.function(2), here.Guard(3), here.Guard(3).method, {here.Guard: {1, 2, "x"}}))
"""
    told = subprocess.run([sys.executable, "-c", script, os.environ["SAFE_DENOISER_COMFYUI"], str(ROOT)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.split()[-1] == fingerprint(function(2), Guard(3), Guard(3).method, {Guard: {1, 2, "x"}})
