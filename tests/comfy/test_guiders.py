"""Every guider, and the nodes that people put beside this pack: what is corrected is the final prediction, once, whatever made it."""
import pytest
import torch
from families import FAMILIES, build, conditioning


@pytest.fixture(scope="module")
def models(tiny, comfy):
    return {"SD 3": tiny.model, "SD 1.5": build(FAMILIES["SD 1.5"]), "Wan 2.1": build(FAMILIES["Wan 2.1"])}


def setting(name, model, tiny):
    """(latent shape, three prompts, negation and reference bank of a model)."""
    from pack.safe_denoiser import Bank

    if name == "SD 3":
        return (2, 16, 4, 4), (tiny.straight, tiny.empty, tiny.empty), tiny.bank, tiny.reference
    shape = (2, 4, 8, 8) if name == "SD 1.5" else (1, 16, 6, 8, 8)
    draw = torch.Generator().manual_seed(1)
    item = (shape[1], 1, 8, 8) if len(shape) == 5 else shape[1:]
    banks = (Bank(torch.randn(3, *item, generator=draw)) for _ in range(2))
    return shape, [conditioning(FAMILIES[name], seed) for seed in (1, 2, 3)], *banks


def guided(kind, model, prompts):
    import comfy_extras.nodes_custom_sampler as custom
    from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, DualCFGGuider
    from comfy_extras.nodes_perpneg import PerpNegGuider

    positive, negative, empty = prompts
    if kind == "DualModelGuider" and not hasattr(custom, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    return {
        "CFGGuider": lambda: CFGGuider().get_guider(model, positive, negative, 3.0)[0],
        "CFGGuider, cfg 1": lambda: CFGGuider().get_guider(model, positive, negative, 1.0)[0],
        "BasicGuider": lambda: BasicGuider().get_guider(model, positive)[0],
        "DualCFGGuider regular": lambda: DualCFGGuider().get_guider(model, positive, empty, negative, 3.0, 2.0, "regular")[0],
        "DualCFGGuider nested": lambda: DualCFGGuider().get_guider(model, positive, empty, negative, 3.0, 2.0, "nested")[0],
        "PerpNegGuider": lambda: PerpNegGuider.execute(model, positive, negative, empty, 3.0, 1.0).args[0],
        "DualModelGuider": lambda: custom.DualModelGuider.execute(model, positive, 3.0, model, negative).args[0],
    }[kind]()


GUIDERS = ["CFGGuider", "CFGGuider, cfg 1", "BasicGuider", "DualCFGGuider regular", "DualCFGGuider nested", "PerpNegGuider",
           "DualModelGuider"]


def sample(guider, shape, steps=4, sampler="euler"):
    """(the prediction that each step used, the result)."""
    import comfy.samplers

    predictions, patcher = [], guider.model_patcher
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        result = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, seed=4, disable_pbar=True,
                               callback=lambda step, x0, x, total: predictions.append(x0.clone()))
    return predictions, result


def check(run, name, model, tiny, kind="CFGGuider", changed=lambda model: model, calls=4, beside=True):
    """Each prediction of the patched run is `safe` of what the guider made of it; strength 0 changes no bit. `changed` is the neighbour,
    `beside` connects a reference bank: without one the prediction under the negative prompt counts instead.
    """
    import comfy.patcher_extension
    from pack.nodes.models.noise import forward_process
    from pack.safe_denoiser import Bank, SafeDenoiser

    shape, prompts, negation, reference = setting(name, model, tiny)
    inner, negative, offset = [], [], []

    def record(executor, x, timestep, *args, **kwargs):
        negative.clear()
        denoised = executor(x, timestep, *args, **kwargs)
        if negative:
            offset[:] = [negative[0][0] - x]
        guides = negative[0] if negative else (x + offset[0],) if offset else ()
        inner.append((x.clone(), timestep.clone(), denoised.clone(), guides))
        return denoised

    def note(args):
        if args["uncond"] is not None and kind != "DualCFGGuider nested":
            negative.append((args["uncond_denoised"].clone(), args["cond_denoised"].clone()))
        return args["denoised"]

    banks = dict(negation_bank=negation, **(dict(reference_bank=reference) if beside else {}))
    _, stock = sample(guided(kind, changed(model), prompts), shape)
    for after in (False, True):  # the neighbour before our node, and after it
        def patch(after=after, **settings):
            patched, report = run("Apply", model=model if after else changed(model), **banks, **settings).result
            return changed(patched) if after else patched, report

        off, report = patch(strength=0.0)
        assert torch.equal(sample(guided(kind, off, prompts), shape)[1], stock) and not report.steps
        on, report = patch()
        wrappers = on.wrappers[comfy.patcher_extension.WrappersMP.PREDICT_NOISE]
        first = next(iter(wrappers))
        assert first == "safe_denoiser", "the outermost of all"
        on.wrappers[comfy.patcher_extension.WrappersMP.PREDICT_NOISE] = {first: wrappers.pop(first), "record": [record], **wrappers}
        on.set_model_sampler_post_cfg_function(note)
        inner.clear(), offset.clear()
        predictions, result = sample(guided(kind, on, prompts), shape)
        assert len(report.steps) == calls and report.summary["corrected_calls"] == calls and not report.summary["fallbacks"]
        sampling = on.get_model_object("model_sampling")
        latents = [bank.latents.float() for bank in (negation, reference)]
        moved = [Bank(model.model.process_latent_in(y) if negation.metadata.get("space") == "vae" else y) for y in latents]
        denoiser = SafeDenoiser(moved[0], reference=moved[1] if beside else None)
        assert len(inner) == len(predictions)
        assert bool(inner[0][3]) == (kind not in ("CFGGuider, cfg 1", "BasicGuider", "DualCFGGuider nested"))
        for (x, sigma, denoised, guides), used in zip(inner, predictions):
            wanted, _ = denoiser.safe(x, denoised, *forward_process(sampling, sigma, x.ndim), None, *guides)
            torch.testing.assert_close(used, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.equal(predictions[0], inner[0][2])
        assert torch.isfinite(result).all() and not torch.equal(result, stock)


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("name, beside", [("SD 3", True), ("SD 3", False), ("SD 1.5", True)])
def test_guiders(kind, name, beside, models, tiny, run, matrix):
    check(run, name, models[name], tiny, kind, beside=beside)
    matrix.name, matrix.outcome = f"guider: {kind}", f"pass ({name}, with{'' if beside else 'out'} a reference bank)"


@pytest.mark.parametrize("kind", GUIDERS)
def test_guiders_with_cfg_pp(kind, models, tiny, run):
    """These samplers read the guiders' unconditional prediction; with strength 0 they read the very same."""
    model = models["SD 3"]
    shape, prompts, negation, reference = setting("SD 3", model, tiny)
    stock = sample(guided(kind, model, prompts), shape, sampler="dpmpp_2m_cfg_pp")[1]
    results = []
    for strength in (0.0, 1.0):
        patched, _ = run("Apply", model=model, negation_bank=negation, reference_bank=reference, strength=strength).result
        results.append(sample(guided(kind, patched, prompts), shape, sampler="dpmpp_2m_cfg_pp")[1])
    assert torch.equal(results[0], stock) and torch.isfinite(results[1]).all() and not torch.equal(results[1], stock)


BIAS = "diffusion_model.x_embedder.proj.bias"


def bent(model, strength):
    """A change of one of the model's biases that its layer norms do not take out again, as they do with a constant."""
    bias = model.model.state_dict()[BIAS]
    return strength * torch.linspace(-1, 1, len(bias)).to(bias)


def lora(model, strength):
    """The model with one of its weights changed, as a LoRA does."""
    changed = model.clone()
    changed.add_patches({BIAS: (bent(model, 1.0),)}, strength)
    return changed


def at_defaults(node, **given):
    """A node's first output; releases differ in what else they ask for."""
    own = {widget.id: widget.default for widget in node.GET_SCHEMA().inputs if getattr(widget, "default", None) is not None}
    return node.execute(**own | given).args[0]


def neighbours():
    import comfy_extras.nodes_apg as apg
    import comfy_extras.nodes_cfg as cfg
    import comfy_extras.nodes_context_windows as windows
    import comfy_extras.nodes_easycache as cache
    import comfy_extras.nodes_fresca as fresca
    import comfy_extras.nodes_mahiro as mahiro
    import comfy_extras.nodes_model_advanced as advanced
    import comfy_extras.nodes_model_merging as merging
    import comfy_extras.nodes_pag as pag
    import comfy_extras.nodes_sag as sag
    import comfy_extras.nodes_slg as slg
    import comfy_extras.nodes_tcfg as tcfg

    return {
        "RescaleCFG": ("SD 1.5", lambda m: advanced.RescaleCFG().patch(m, 0.7)[0]),
        "PerturbedAttentionGuidance": ("SD 1.5", lambda m: pag.PerturbedAttentionGuidance.execute(m, 3.0).args[0]),
        "SelfAttentionGuidance": ("SD 1.5", lambda m: sag.SelfAttentionGuidance.execute(m, 0.5, 2.0).args[0]),
        "APG": ("SD 3", lambda m: apg.APG.execute(m, 1.0, 5.0, -0.5).args[0]),
        "CFGZeroStar": ("SD 3", lambda m: cfg.CFGZeroStar.execute(m).args[0]),
        "CFGNorm": ("SD 3", lambda m: cfg.CFGNorm.execute(m, 1.0).args[0]),
        "Mahiro": ("SD 3", lambda m: mahiro.Mahiro.execute(m).args[0]),
        "TCFG": ("SD 3", lambda m: tcfg.TCFG.execute(m).args[0]),
        "FreSca": ("SD 3", lambda m: fresca.FreSca.execute(m, 1.0, 1.25, 1).args[0]),
        "EasyCache": ("Wan 2.1", lambda m: cache.EasyCacheNode.execute(m, 3.0, 0.0, 1.0, False).args[0]),
        "LazyCache": ("SD 3", lambda m: cache.LazyCacheNode.execute(m, 3.0, 0.0, 1.0, False).args[0]),
        "context windows": ("Wan 2.1", lambda m: at_defaults(
            windows.ContextWindowsManualNode, model=m, context_length=4, context_overlap=2, context_schedule="standard_static", dim=2)),
        "SkipLayerGuidanceDiT": ("SD 3", lambda m: slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "1", "").args[0]),
        "ModelMergeSimple": ("SD 3", lambda m: merging.ModelMergeSimple().merge(m, lora(m, 0.2), 0.5)[0]),
        "LoRA": ("SD 3", lambda m: lora(m, 0.2)),
        "ModelSamplingSD3": ("SD 3", lambda m: advanced.ModelSamplingSD3().patch(m, 5.0)[0]),
        "ModelSamplingDiscrete, v and zero SNR": ("SD 1.5", lambda m: advanced.ModelSamplingDiscrete().patch(m, "v_prediction", True)[0]),
        "ModelSamplingContinuousEDM": ("SD 1.5", lambda m: advanced.ModelSamplingContinuousEDM().patch(m, "edm_playground_v2.5", 80.0,
                                                                                                      0.002)[0]),
    }


@pytest.mark.parametrize("neighbour", [
    "RescaleCFG", "PerturbedAttentionGuidance", "SelfAttentionGuidance", "APG", "CFGZeroStar", "CFGNorm", "Mahiro", "TCFG", "FreSca",
    "EasyCache", "LazyCache", "context windows", "SkipLayerGuidanceDiT", "ModelMergeSimple", "LoRA", "ModelSamplingSD3",
    "ModelSamplingDiscrete, v and zero SNR",
    "ModelSamplingContinuousEDM"])
def test_neighbours(neighbour, models, tiny, run, matrix):
    name, changed = neighbours()[neighbour]
    shape, prompts, *_ = setting(name, models[name], tiny)
    plain, beside = (sample(guided("CFGGuider", m, prompts), shape)[1] for m in (models[name], changed(models[name])))
    assert not torch.equal(plain, beside), "the neighbour is at work"
    check(run, name, models[name], tiny, changed=changed)
    if neighbour == "LazyCache":  # a call that skips the model makes no prediction under the negative prompt
        check(run, name, models[name], tiny, changed=changed, beside=False)
    matrix.name, matrix.outcome = f"neighbour: {neighbour}", f"pass ({name}, before and after)"


def test_a_lora_hook_on_one_prompt(models, tiny, run, matrix):
    """Half of the prompts see other weights; the correction sees what comes out."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import ConditioningSetProperties

    model = models["SD 3"]
    hooks = comfy.hooks.create_hook_model_as_lora({BIAS: model.model.state_dict()[BIAS] + bent(model, 0.3)}, None, 1.0, 0.0)
    positive = ConditioningSetProperties().set_properties(tiny.straight, 1.0, "default", hooks=hooks)[0]
    shape, _, negation, reference = setting("SD 3", model, tiny)
    plain = sample(guided("CFGGuider", model, (tiny.straight, tiny.empty, tiny.empty)), shape)[1]
    stock = sample(guided("CFGGuider", model, (positive, tiny.empty, tiny.empty)), shape)[1]
    assert (plain - stock).abs().max() > 1e-3, "the hook is at work"
    for strength in (0.0, 1.0):
        patched, report = run("Apply", model=model, negation_bank=negation, reference_bank=reference, strength=strength).result
        result = sample(guided("CFGGuider", patched, (positive, tiny.empty, tiny.empty)), shape)[1]
        assert torch.equal(result, stock) == (strength == 0) and len(report.steps) == 4 * strength
    matrix.name, matrix.outcome = "neighbour: LoRA hook on a prompt", "pass (SD 3)"


@pytest.mark.parametrize("banks", ["a reference bank", "nothing"])
def test_two_banks_add_up_in_either_order(banks, models, tiny, run, matrix):
    """Two Apply nodes correct the same prediction, so their corrections add; under CFG++ too, and where both hear the unconditional one."""
    import dataclasses

    model = models["SD 3"]
    shape, prompts, negation, reference = setting("SD 3", model, tiny)
    other = dict(reference_bank=reference) if banks == "a reference bank" else {}
    halves = [dataclasses.replace(negation, latents=negation.latents[part], names=()) for part in (slice(0, 20), slice(20, 40))]
    first = {}
    for sampler in ("euler", "euler_cfg_pp", "dpmpp_2m_cfg_pp"):
        results = []
        for order in (halves, halves[::-1]):
            patched = model
            for bank in order:
                patched, report = run("Apply", model=patched, negation_bank=bank, strength=0.5, **other).result
            predictions, result = sample(guided("CFGGuider", patched, prompts), shape, sampler=sampler)
            results.append(result)
            assert len(report.steps) == 4
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        first[sampler] = predictions[0]
    alone = [sample(guided("CFGGuider", run("Apply", model=model, negation_bank=bank, strength=0.5, **other).result[0], prompts),
                    shape)[0][0] for bank in halves]
    stock = sample(guided("CFGGuider", model, prompts), shape)[0][0]
    torch.testing.assert_close(first["euler"] - stock, alone[0] + alone[1] - 2 * stock, rtol=1e-4, atol=1e-4)
    matrix.name, matrix.outcome = "neighbour: two Apply nodes", f"pass (SD 3, either order, {banks} beside)"


def test_patched_and_unpatched_in_turn(models, tiny, run):
    """One MODEL on two wires: what one does is nothing to the other, whichever runs first."""
    model = models["SD 3"]
    shape, prompts, negation, reference = setting("SD 3", model, tiny)
    patched, _ = run("Apply", model=model, negation_bank=negation, reference_bank=reference).result
    plain, safe = (sample(guided("CFGGuider", m, prompts), shape)[1] for m in (model, patched))
    for m, wanted in ((patched, safe), (model, plain), (model, plain), (patched, safe)):
        assert torch.equal(sample(guided("CFGGuider", m, prompts), shape)[1], wanted)
    assert not torch.equal(plain, safe)


@pytest.mark.slow
def test_torch_compile(models, tiny, run, matrix):
    """TorchCompileModel swaps the diffusion model inside; needs a C++ compiler on the CPU."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = models["SD 3"]
    shape, prompts, negation, reference = setting("SD 3", model, tiny)
    banks = dict(negation_bank=negation, reference_bank=reference)
    wanted = sample(guided("CFGGuider", run("Apply", model=model, **banks).result[0], prompts), shape)[1]
    compiled = TorchCompileModel.execute(model, "inductor").args[0]
    before = run("Apply", model=compiled, **banks).result[0]
    after = TorchCompileModel.execute(run("Apply", model=model, **banks).result[0], "inductor").args[0]
    for patched in (before, after):
        torch.testing.assert_close(sample(guided("CFGGuider", patched, prompts), shape)[1], wanted, rtol=1e-3, atol=1e-3)
    matrix.name, matrix.outcome = "neighbour: TorchCompileModel (inductor)", "pass (SD 3, before and after)"
