"""Keys of what is kept on disk: the same for the same content wherever it is, and another for any other."""
import itertools
import sys

import pytest
import torch
from test_guiders import lora


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
    from pack.nodes.fingerprint import fingerprint_weights

    comfy.model_management.unload_all_models()
    clones = [tiny.model.clone(), lora(tiny.model, 0.5), lora(tiny.model, 0.6), ModelSamplingSD3().patch(tiny.model, 5.0)[0],
              ModelSamplingSD3().patch(tiny.model, 6.0)[0], ModelSamplingSD3().patch(lora(tiny.model, 0.5), 5.0)[0]]
    keys = [fingerprint_weights(clone) for clone in clones]
    assert len(set(keys)) == len(keys)
    for loaded in clones:
        load(loaded)
        assert [fingerprint_weights(clone) for clone in clones] == keys
    comfy.model_management.unload_all_models()
    assert [fingerprint_weights(clone) for clone in clones] == keys


def test_the_key_of_quantised_weights_is_the_same_loaded_or_not(pack, comfy):
    """A LoRA on fp8 weights: loading them makes other numbers and another scale of them."""
    if "comfy.quant_ops" not in sys.modules:
        pytest.skip("this ComfyUI has no quantised tensors")
    import comfy.model_patcher
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor
    from pack.nodes.fingerprint import fingerprint_weights

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
        before, key = module.layer.weight, fingerprint_weights(patcher)
        patcher.patch_model(device_to=cpu)
        assert module.layer.weight is not before and fingerprint_weights(patcher) == key
        patcher.unpatch_model()
        assert fingerprint_weights(patcher) == key
        keys.append(key)
    assert keys[0] != keys[1], "twice as large: the same stored numbers, another scale"
