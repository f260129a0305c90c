"""Neighbours as other packs' users have them, in a few lines each: what the core hears is the model's own, whatever they do beside it."""
import pytest
from test_conditions import agrees, conditions, counted, heard, models  # noqa: F401 fixtures
from test_guiders import guided, sample, setting

BANKS = {"unwanted": ["unwanted"], "bank": ["bank"], "both": ["unwanted", "bank"]}


@pytest.fixture
def applied(run, models, tiny, conditions):  # noqa: F811
    """A patched model of SD 3's architecture, its report and prompts, with a neighbour before or after our node."""
    def call(by, neighbour, after=False, **settings):
        shape, prompts, negation, _ = setting("SD 3", models["SD 3"], tiny)
        given = {"unwanted": dict(unwanted=conditions("SD 3")[0]), "bank": dict(negation_bank=negation)}
        chosen = {key: value for name in BANKS[by] for key, value in given[name].items()}
        model = models["SD 3"]
        patched, report = run("Apply", model=model if after else neighbour(model), **chosen, **settings).result
        return neighbour(patched) if after else patched, report, shape, prompts

    return call


# --- predictions that are changed before or in guidance, in place ---------------------------------------------------

def skimmed(model):
    """As Skimmed CFG: both predictions are changed before guidance, in place."""
    def skim(args):
        c, u = args["conds_out"]
        u.lerp_(c, 0.8)
        c.mul_(1.1)
        return [c, u]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(skim)
    return model


def own_guidance(model):
    """A guidance function that uses its arguments up."""
    model = model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["input"] - args["uncond_denoised"].lerp_(args["cond_denoised"].mul_(0.9), 2.0))
    return model


def afterwards(model):
    def after(args):
        args["cond_denoised"].zero_()
        args["uncond_denoised"].fill_(3.0)
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(after)
    return model


@pytest.mark.parametrize("kind", ["CFGGuider", "DualCFGGuider regular"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("by", BANKS)
@pytest.mark.parametrize("neighbour", [skimmed, own_guidance, afterwards])
def test_predictions_that_are_edited_in_place(neighbour, by, after, kind, applied, models, heard):  # noqa: F811
    patched, report, shape, prompts = applied(by, neighbour, after)
    sample(guided(kind, patched, prompts), shape)
    assert report.summary["corrected_calls"] == 4 and not report.notes
    told = prompts[1] if by == "bank" and kind != "CFGGuider" else prompts[0]  # guidance of two prompts starts from the second
    agrees(models["SD 3"], heard, "conditional", told, shape)
    agrees(models["SD 3"], heard, "unconditional", prompts[2] if kind != "CFGGuider" else prompts[1], shape)
