"""Every model family through ComfyUI's own classes: nothing in the pack names one, so each must come out right by itself."""
import compatibility
import pytest
import torch
from families import FAMILIES, NO_NETWORK, NOT_SAMPLED, REFUSED, SAME_AS, build, conditioning, here, noise


@pytest.fixture(params=here(FAMILIES))
def family(request, comfy, matrix):
    matrix.name = f"family: {request.param}"
    return FAMILIES[request.param]


@pytest.fixture
def model(family):
    return build(family)


@pytest.fixture
def bank(model, family, pack):
    """One picture, as its VAE would give it: one frame long where the family has frames, in the VAE's units."""
    from pack.safe_denoiser import Bank

    latent = torch.randn(1, family.latent[0], *([1] if len(family.latent) == 4 else []), *family.latent[-2:],
                         generator=torch.Generator().manual_seed(7))
    return Bank(model.model.process_latent_out(latent), metadata={"space": "vae"})


def sample(model, family, steps=2):
    """(the corrected prediction of the first step, the result), both of the picture."""
    import comfy.sample
    from pack.nodes.bank.negation_bank import picture_stream

    first, start = [], noise(family, 3, family.batch)
    result = comfy.sample.sample(model, start, steps, 2.0, "euler", "simple", conditioning(family, 1), conditioning(family, 2), start * 0,
                                 seed=0, disable_pbar=True, callback=lambda step, x0, x, total: first.append(x0))
    return picture_stream(first[0]), picture_stream(result)


def perfect_output(kind, x0, eps, sigma, d):
    """What a perfect network of this kind would output: Karras et al. 2022, Table 1, for "edm" and "v" (which is minus that)."""
    karras = (sigma * x0 - d**2 * eps) / (d * (sigma**2 + d**2) ** 0.5)
    return {"eps": eps, "v": -karras, "v of variance 1": -karras, "edm": karras, "flow": eps - x0, "cosmos": eps - x0}[kind]


def test_alpha_and_std_are_those_of_the_family(family, model, pack):
    """The x that they describe is one from which the family's own formula, given the perfect output, finds x0 again."""
    from pack.nodes.models.noise import forward_process

    sampling = model.model.model_sampling
    scale = getattr(sampling, "noise_scale", 1.0)  # of models whose noise is stronger than their noise level says
    x0, eps = torch.randn(2, 3, *family.latent, generator=torch.Generator().manual_seed(1))
    for sigma in (float(s) for s in (sampling.sigma_max, sampling.sigmas[len(sampling.sigmas) // 2], sampling.sigma_min)):
        std, alpha = forward_process(sampling, torch.full((3,), sigma), x0.ndim)
        unit = (1 + sigma**2) ** -0.5 if family.output == "v of variance 1" else 1.0
        assert std.tolist() == pytest.approx([sigma * scale * unit] * 3)
        assert alpha.tolist() == pytest.approx([1 - sigma if family.output == "flow" else unit] * 3, abs=1e-6)
        x = alpha[0] * x0 + std[0] * eps
        found = sampling.calculate_denoised(torch.full((3,), sigma), perfect_output(
            family.output, x0, scale * eps, sigma, getattr(sampling, "sigma_data", 1.0)), x)
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5 * max(1.0, sigma))


def test_a_bank_comes_and_goes_by_the_latent_format(family, model, bank, pack):
    from pack.nodes.models.loading import to_model

    shape = (1, *family.latent)
    moved = to_model(bank, model, shape, "exact")
    torch.testing.assert_close(model.model.process_latent_out(moved.latents), bank.latents, rtol=1e-4, atol=1e-4)
    assert moved.latents.shape[1] == family.latent[0] and moved.latents.std() == pytest.approx(1, abs=0.1)
    if len(family.latent) == 4:  # a bank without the frame axis, as a picture VAE would make it
        flat = to_model(type(bank)(bank.latents[:, :, 0], metadata=bank.metadata), model, shape, "exact")
        torch.testing.assert_close(flat.latents, moved.latents)


def test_sampling_moves_away_from_the_bank_and_off_is_off(family, model, bank, run, matrix):
    stock_first, stock = sample(model, family)
    off, report = run("Apply", model=model, negation_bank=bank, strength=0.0).result
    assert torch.equal(sample(off, family)[1], stock) and not report.steps
    on, report = run("Apply", model=model, negation_bank=bank).result
    first, result = sample(on, family)
    y = model.model.process_latent_in(bank.latents)
    assert (first - y).norm() > (stock_first - y).norm() and torch.isfinite(result).all() and not torch.equal(result, stock)
    assert report.summary["corrected_calls"] == report.summary["model_calls"] == 2 and not report.summary["fallbacks"]
    frames = family.latent[1] if len(family.latent) == 4 else family.batch
    assert {len(step.sigma) for step in report.steps} == {frames}, "each frame, or layer, is compared with the bank's pictures"
    matrix.outcome = f"pass ({told(model, family)})"


def told(model, family):
    return f"{type(model.model).__name__}, {model.model.model_type.name}, {tuple(family.latent)}"


@pytest.mark.parametrize("name", here(REFUSED))
def test_what_is_no_diffusion_of_pictures_is_refused(name, comfy, run, pack, matrix):
    from pack.safe_denoiser import Bank

    matrix.name, family = f"family: {name}", REFUSED[name]
    model = build(family)
    if family.unet != NO_NETWORK:
        assert torch.isfinite(sample(model, family)[1]).all(), "by itself it samples"
    patched, _ = run("Apply", model=model, negation_bank=Bank(torch.ones(1, *family.latent))).result
    with pytest.raises(ValueError, match="audio or a 3-D shape|maps one picture to another") as error:
        sample(patched, family)
    matrix.outcome = f"refused ({told(model, family)}): {error.value}"


def as_sampled(name):
    """What is sampled by a class of models, whatever the size of its network."""
    import comfy.supported_models

    model = getattr(comfy.supported_models, name)(NO_NETWORK | {"in_channels": 4}).get_model({}, device=torch.device("cpu"))
    return model.model_type, type(model.model_sampling).__bases__, type(model.latent_format)


def test_every_model_of_this_comfyui_is_a_row_or_like_one(comfy):
    """A release that brings a new model fails here until the model is tested."""
    import comfy.supported_models

    models = {model.__name__ for model in comfy.supported_models.models}
    rows = {family.config for family in (FAMILIES | REFUSED).values()}
    assert models - rows - set(SAME_AS) - set(NOT_SAMPLED) == set()
    for name in models & set(SAME_AS):
        assert SAME_AS[name] in rows and as_sampled(name) == as_sampled(SAME_AS[name]), name


def test_only_what_is_no_picture_is_told_by_its_format(comfy, pack):
    """All formats of latents, as 4-D tensors, which pictures are too."""
    import inspect

    import comfy.latent_formats
    from pack.nodes.bank.negation_bank import require_pictures

    refused = set()
    for name, kind in inspect.getmembers(comfy.latent_formats, inspect.isclass):
        try:
            require_pictures(torch.zeros(1, 4, 8, 8), kind())
        except ValueError:
            refused.add(name)
    wanted = {"ACEAudio", "ACEAudio15", "Hunyuan3Dv2", "Hunyuan3Dv2_1", "Hunyuan3Dv2mini", "MiniMaxMusic3", "StableAudio1", "StableAudio3",
              "Trellis2", "Trellis2SLAT", "Trellis2ShapeSLAT", "Trellis2TexSLAT", "TripoSplat"}
    assert refused == wanted & set(dir(comfy.latent_formats))


def test_the_table_of_the_documentation_is_what_the_tests_showed(comfy):
    """It has a row for each family; and where this release has a column, no family that it has is missing in it."""
    import comfyui_version

    versions, rows = compatibility.read()
    assert list(rows) == [*FAMILIES, *REFUSED] and {"0.3.64", "0.33.0"} <= set(versions)
    if comfyui_version.__version__ not in versions:
        return
    told = {name: row[f"v{comfyui_version.__version__}"] for name, row in rows.items()}
    assert told == {**dict.fromkeys(rows, "—"), **dict.fromkeys(here(FAMILIES), "pass"), **dict.fromkeys(here(REFUSED), "refused")}


NOT_LEARNED = {"HiDream-O1", "ERNIE-Image", "LTX-2 (picture and sound)", "MiniMax-H3 (picture and sound)"}


def test_a_condition_can_be_learned(request, family, model, pack):
    """A gradient comes through the family's network to its condition, under inference mode, and its weights are as they were; where
    none does, that is said.
    """
    if request.node.callspec.params["family"] in NOT_LEARNED:
        with torch.inference_mode(), pytest.raises(ValueError, match="no condition can be learned"):
            learned_by(family, model)
    else:
        learned_by(family, model)


def learned_by(family, model):
    from pack.nodes.condition.learn import learnable
    from pack.nodes.models.model_calls import ask, differentiable
    from pack.nodes.models.model_calls import told as parts_of

    y = torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(1))
    neutral, before = conditioning(family, 1), {name: one.clone() for name, one in model.model.state_dict().items()}

    def work(asked):
        with differentiable(asked.model):
            latents = y.clone()
            parts = [part.float().clone().requires_grad_(True) for part in parts_of(neutral)]
            x, sigma = asked.noised(latents, torch.randn_like(latents), torch.tensor([0.3]))
            (latents - asked.predict(x, sigma, [parts])[0]).square().sum().backward()
            return [part.grad for part in parts]

    with torch.inference_mode(), learnable(model):
        found = [grad for grad in ask(model, family.latent, neutral, work) if grad is not None]
    assert found and all(bool(grad.isfinite().all()) for grad in found) and any(bool(grad.count_nonzero()) for grad in found)
    assert all(torch.equal(before[name], one) for name, one in model.model.state_dict().items())
