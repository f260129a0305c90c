"""The shipped models: in nobody's list, loaded by a node of their own, and found where an older workflow names them."""
import io

import pytest
import torch
from PIL import Image

from tiny_digits.world import TinyDigits
from tiny_photos.world import TinyPhotos

FILES = {"UNETLoader": ("unet_name", "tiny_digits.safetensors"), "VAELoader": ("vae_name", "tiny_digits_vae.safetensors")}


def listed(server):
    """Those that stand in a list of the stock loaders."""
    return [name for kind, (widget, name) in FILES.items()
            if name in str(server.get(f"/object_info/{kind}")[kind]["input"]["required"][widget])]


def test_a_workflow_of_the_stock_loaders_still_runs_and_the_lists_are_the_users_own(server):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    def graph(model, vae):
        return {"latent": node("EmptySD3LatentImage", width=32, height=32, batch_size=1),
                "class": node("SafeDenoiserClassCondition", class_index=7, classes=16),
                "sample": node("KSampler", model=[*model], positive=["class", 0], negative=["class", 0], latent_image=["latent", 0], seed=1,
                               steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
                "decode": node("VAEDecode", samples=["sample", 0], vae=[*vae]), "save": node("PreviewImage", images=["decode", 0])}

    def picture(prompt):
        return Image.open(io.BytesIO(server.view(server.run(prompt)["outputs"]["save"]["images"][0]))).tobytes()

    assert listed(server) == [], "the page fills new nodes from these lists"
    ours = picture({"world": node("SafeDenoiserLoadTinyWorld", world="digits")} | graph(("world", 0), ("world", 1)))
    assert listed(server) == []
    loaders = {kind: node(kind, **{widget: name}) for kind, (widget, name) in FILES.items()}
    loaders["UNETLoader"]["inputs"]["weight_dtype"] = "default"
    theirs = picture(loaders | graph(("UNETLoader", 0), ("VAELoader", 0)))
    assert theirs == ours and len(listed(server)) == 2, "until ComfyUI is started anew"


@pytest.mark.parametrize("name, world, size", [("digits", TinyDigits, 4), ("photographs", TinyPhotos, 8)])
def test_it_draws_in_comfyui_what_its_network_draws_alone(name, world, size, run, comfy):
    model, vae = run("LoadTinyWorld", world=name).result
    asked, empty = (run("ClassCondition", class_index=index).result[0] for index in (4, -1))
    latent = {"samples": torch.zeros(2, 16, size, size)}
    with torch.inference_mode():
        drawn = comfy.KSampler().sample(model=model, seed=5, steps=20, cfg=2.0, sampler_name="euler", scheduler="simple", positive=asked,
                                        negative=empty, denoise=1.0, latent_image=latent)[0]["samples"]
        label = asked[0][1]["pooled_output"]
        noise = torch.randn(2, 16, size, size, generator=torch.manual_seed(5))
        alone = world().sample(noise, label, 2)
        torch.testing.assert_close(model.model.process_latent_in(drawn), alone, rtol=1e-2, atol=2e-2)
        pixels = world().decode(alone).movedim(1, -1)
        torch.testing.assert_close(comfy.VAEDecode().decode(vae, {"samples": drawn})[0], pixels, rtol=1e-2, atol=2e-2)


def test_worlds_that_are_not_there_are_named(run, pack):
    assert pack["SafeDenoiserLoadTinyWorld"].GET_SCHEMA().inputs[0].options[0] == "digits"
    with pytest.raises(ValueError, match="no tiny world 'moon'.*digits"):
        run("LoadTinyWorld", world="moon")
