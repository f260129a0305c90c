"""Every model family through ComfyUI's own classes: nothing in the pack names one, so each must come out right by itself."""
import pytest
import torch
from families import FAMILIES, REFUSED, build, conditioning


@pytest.fixture(params=FAMILIES)
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


def sample(model, family, steps=2, batch=1):
    """(the corrected prediction of the first step, the result)."""
    import comfy.sample

    first = []
    noise = torch.randn(batch, *family.latent, generator=torch.Generator().manual_seed(3))
    result = comfy.sample.sample(model, noise, steps, 2.0, "euler", "simple", conditioning(family, 1), conditioning(family, 2),
                                 torch.zeros_like(noise), seed=0, disable_pbar=True, callback=lambda step, x0, x, total: first.append(x0))
    return first[0], result


def perfect_output(kind, x0, eps, sigma, d):
    """What a perfect network of this kind would output: Karras et al. 2022, Table 1, for "edm" and "v" (which is minus that)."""
    karras = (sigma * x0 - d**2 * eps) / (d * (sigma**2 + d**2) ** 0.5)
    return {"eps": eps, "v": -karras, "edm": karras, "flow": eps - x0, "cosmos": eps - x0}[kind]


def test_alpha_and_std_are_those_of_the_family(family, model, pack):
    """The x that they describe is one from which the family's own formula, given the perfect output, finds x0 again."""
    from pack.nodes.sample import forward_process

    sampling = model.model.model_sampling
    x0, eps = torch.randn(2, 3, *family.latent, generator=torch.Generator().manual_seed(1))
    for sigma in (float(s) for s in (sampling.sigma_max, sampling.sigmas[len(sampling.sigmas) // 2], sampling.sigma_min)):
        std, alpha = forward_process(sampling, torch.full((3,), sigma), x0.ndim)
        assert std.tolist() == pytest.approx([sigma] * 3)
        assert alpha.tolist() == pytest.approx([1 - sigma if family.output == "flow" else 1.0] * 3, abs=1e-6)
        x = alpha[0] * x0 + std[0] * eps
        found = sampling.calculate_denoised(torch.full((3,), sigma), perfect_output(family.output, x0, eps, sigma,
                                                                                    getattr(sampling, "sigma_data", 1.0)), x)
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5 * max(1.0, sigma))


def test_a_bank_comes_and_goes_by_the_latent_format(family, model, bank, pack):
    from pack.nodes.loading import to_model

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
    matrix.outcome = f"pass ({type(model.model).__name__}, {model.model.model_type.name}, {tuple(family.latent)})"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_diffusion_of_pictures_is_refused(name, comfy, run, pack, matrix):
    from pack.safe_denoiser import Bank

    matrix.name, family = f"family: {name}", REFUSED[name]
    model = build(family)
    assert torch.isfinite(sample(model, family)[1]).all(), "by itself it samples"
    patched, _ = run("Apply", model=model, negation_bank=Bank(torch.ones(1, *family.latent))).result
    with pytest.raises(ValueError, match="audio or a 3-D shape|maps one picture to another") as error:
        sample(patched, family)
    matrix.outcome = f"refused: {error.value}"
