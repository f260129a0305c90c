"""SD 1.5 at its full size, with random weights, through the shipped workflow over /prompt: every node of it is the real one."""
import io
import os
import resource
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_workflows import load, to_prompt, widgets

from dev import Server

UNET = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4],
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3,
            context_dim=768, use_spatial_transformer=True, use_linear_in_transformer=False, use_temporal_attention=False, legacy=False,
            adm_in_channels=None, dtype=torch.float16)
VAE = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2,
           attn_resolutions=[], dropout=0.0)


def random_checkpoint() -> dict[str, torch.Tensor]:
    """The keys and shapes of an SD 1.5 file; weights small enough that activations keep their size, norms at 1, biases at 0."""
    import comfy.ldm.models.autoencoder
    import comfy.sd1_clip
    import comfy.supported_models

    config = comfy.supported_models.SD15(UNET)
    model = config.get_model({}, device=torch.device("cpu"))
    clip = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float16)
    vae = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=VAE, embed_dim=4)
    weights = model.state_dict_for_saving(clip.state_dict(), vae.state_dict())
    generator = torch.Generator().manual_seed(0)
    for key, weight in weights.items():
        if weight.is_floating_point():
            fan_in = weight[0].numel() if weight.ndim > 1 else 0
            value = torch.randn(weight.shape, generator=generator) / fan_in**0.5 if fan_in else torch.full(weight.shape, 1.0)
            weights[key] = (value * (0.0 if key.endswith("bias") else 1.0)).half().contiguous()
    return weights


def push(prompt: dict, info: dict) -> None:
    """Put an Apply Safe Denoiser before the sampler, of a weight that moves whatever comes."""
    sampler, = (node["inputs"] for node in prompt.values() if node["class_type"] == "SafeDenoiserKSampler")
    defaults = {name: options["default"] for name, _, options in widgets(info["SafeDenoiserApply"]) if "default" in options}
    prompt["100"] = {"class_type": "SafeDenoiserApply", "inputs": {
        **defaults, "weight": "constant", "model": sampler["model"], "negation_bank": sampler["negation_bank"]}}
    sampler["model"] = ["100", 0]


@pytest.mark.slow
def test_sd15_through_the_shipped_workflow(comfy, tmp_path, matrix):
    checkpoint = tmp_path / "models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors"
    checkpoint.parent.mkdir(parents=True)
    save_file(random_checkpoint(), checkpoint)
    with Server(os.environ["SAFE_DENOISER_COMFYUI"], tmp_path) as server:
        pictures = tmp_path / "input/negation_sets/my_negation_set"
        pictures.mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((300, 260), 60 + i).convert("RGB").save(pictures / f"{i}.png")
        info, results = server.get("/object_info"), {}
        for name, strength in (("off", 0), ("on", 1), ("constant", 0)):
            prompt = to_prompt(load("8 Words for a folder"), info, ckpt_name=checkpoint.name, width=256, height=256, steps=2, count=2,
                               seed=1, strength=strength)
            next(node for node in prompt.values() if node["class_type"] == "SafeDenoiserKSampler")["inputs"].pop("unwanted")
            if name == "constant":
                push(prompt, info)
            outputs = {prompt[key]["class_type"]: value for key, value in server.run(prompt, seconds=900)["outputs"].items()}
            data = server.view(outputs["SaveImage"]["images"][0])
            results[name] = np.array(Image.open(io.BytesIO(data))), outputs["SafeDenoiserReport"]["text"][0]
    checkpoint.unlink()  # 2 GB, which pytest would keep
    pictures, reports = zip(*results.values())
    assert "strength is 0" in reports[0] and "no model call" in reports[0]
    assert reports[1].count("1/1") == 2, "random weights make no pictures to steer between, but each call is judged"
    assert pictures[0].shape == (256, 256, 3) and pictures[0].std() > 1 and not np.array_equal(pictures[0], pictures[2])
    matrix.name, matrix.outcome = "full size: SD 1.5 checkpoint over /prompt", f"pass (2 steps at 256x256; {', '.join(results)})"


@pytest.mark.slow
def test_a_condition_is_learned_for_sd15(comfy, pack, matrix):
    """Two steps on the real network and text encoder: stopped after one and resumed it is the same tensor; the memory that a step takes."""
    import comfy.sd
    from pack.nodes.models.model_calls import ask, differentiable, told
    from pack.safe_denoiser.condition.learn import Learning, Schedule

    model, clip, *_ = comfy.sd.load_state_dict_guess_config(random_checkpoint(), output_vae=False)
    with torch.inference_mode():
        neutral = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latents = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    seconds, memory = {}, {}

    def learned(checkpointed, resumed=False):
        def work(asked):
            with differentiable(asked.model, checkpointed):
                def learning():
                    return Learning(asked, latents, told(neutral), schedule=Schedule(steps=2, batch=1, rows=1))

                found = learning()
                began, name = time.monotonic(), "computed twice" if checkpointed else "kept"
                found.runs[0].step()
                seconds[name], memory[name] = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                if not resumed:
                    return found.runs[0].step()
                again = learning().runs[0]
                again.resume(found.runs[0].state())
                return again.step()

        with torch.inference_mode():
            return [part.clone() for part in ask(model, latents.shape[1:], neutral, work)]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    less, resumed, whole = learned(True), learned(False, resumed=True), learned(False)
    assert less[0].shape == (1, 77, 768) and not torch.equal(less[0], told(neutral)[0])
    assert all(map(torch.equal, resumed, whole))
    torch.testing.assert_close(less[0], whole[0], rtol=1e-3, atol=1e-3)
    matrix.name = "full size: a condition learned for SD 1.5"
    matrix.outcome = "pass (256x256, one picture a step: " + "; ".join(
        f"activations {name}, {seconds[name]:.0f} s and {memory[name] - before:.1f} GiB more" for name in seconds) + ")"
