"""Guard Model (SLD) on the tiny world: off bit for bit, in any order with Apply Safe Denoiser, one evaluation for both."""
import itertools

import pytest
import torch
from test_runs import guider, ksampler, sample


@pytest.fixture(scope="module")
def unwanted(run):
    return run("ClassCondition", class_index=7).result[0]


@pytest.fixture(scope="module")
def guard(run, unwanted):
    def guarded(model, unwanted=unwanted, **settings):
        return run("GuardModel", model=model, unwanted=unwanted, **settings).result

    return guarded


@pytest.fixture(scope="module")
def apply(run, tiny, unwanted):
    def patched(model, by="banks"):
        given = {"banks": dict(negation_bank=tiny.bank, reference_bank=tiny.reference), "unwanted": dict(unwanted=unwanted)}
        chosen = given["banks"] | given["unwanted"] if by == "both" else given[by]
        return run("Apply", model=model, **chosen).result

    return patched


@pytest.fixture
def prompts(tiny):
    return tiny.straight, tiny.empty


def one_call(model, prompts, cfg=3.0):
    """denoised (B, D) of the first call of a run, and its noise level."""
    seen = []

    def once(call, x, sigmas):
        seen.append((call(x, sigmas[2] * x.new_ones([len(x)])).flatten(1), sigmas[2]))
        return x

    sample(guider(model, prompts, cfg), ksampler(once))
    return seen[0]


def test_it_pushes_away_and_off_is_bit_for_bit(tiny, guard, prompts):
    stock = sample(guider(tiny.model, prompts))
    off, report = guard(tiny.model, strength=0.0)
    assert torch.equal(sample(guider(off, prompts)), stock) and not report.steps
    found = {preset: sample(guider(guard(tiny.model, preset=preset)[0], prompts)) for preset in ("weak", "medium", "strong", "max")}
    moved = {preset: float((latent - stock).norm()) for preset, latent in found.items()}
    assert all(torch.isfinite(latent).all() for latent in found.values()) and min(moved.values()) > 0.01, moved
    own = guard(tiny.model, preset="own numbers", warmup=0.2, scale=1000, threshold=0.01, momentum_scale=0.3, momentum_beta=0.4)[0]
    assert torch.equal(sample(guider(own, prompts)), found["medium"])
    patched, report = guard(tiny.model, preset="strong")
    sample(guider(patched, prompts), steps=10)
    assert [bool(step.active.any()) for step in report.steps] == [False] * 2 + [True] * 8, "0.14 of the schedule"


def test_one_call_is_the_closed_form(tiny, guard, prompts, unwanted, comfy):
    """denoised + w sigma gamma, with the stock model's own three predictions."""
    from pack.safe_denoiser.rules.sld import PRESETS, sld

    seen = {}

    def once(call, x, sigmas):
        seen.update(x=x, sigma=sigmas[0], denoised=call(x, sigmas[0] * x.new_ones([len(x)])))
        return x

    from test_runs import ksampler

    def denoised(model, conds, cfg):
        sample(guider(model, conds, cfg), ksampler(once))
        return seen["denoised"].flatten(1)

    plain = guider(tiny.model, prompts)
    got = denoised(guard(tiny.model, preset="max")[0], prompts, 3.0)
    c, u, s = (denoised(tiny.model, (conds, conds), 1.0) for conds in (*prompts, unwanted))
    term = sld(c, u, s, seen["sigma"] * torch.ones(2), 0.0, PRESETS["max"][0])[0]
    torch.testing.assert_close(got, u + 3 * (c - u) + 3 * term, rtol=1e-4, atol=1e-4)
    assert plain is not None and term.norm() > 0.1


@pytest.mark.parametrize("by", ["banks", "unwanted", "both"])
def test_any_order_of_the_two_gives_the_same(tiny, guard, apply, prompts, by):
    """Each call to rounding; over a run SLD, which is not continuous, makes a little more of that."""
    first, then = (apply(guard(tiny.model, preset="max")[0], by)[0], guard(apply(tiny.model, by)[0], preset="max")[0])
    calls = [one_call(model, prompts)[0] for model in (first, then)]
    torch.testing.assert_close(*calls, rtol=1e-5, atol=1e-5)
    for one in (apply(tiny.model, by)[0], guard(tiny.model, preset="max")[0]):
        assert float((one_call(one, prompts)[0] - calls[0]).norm()) > 0.01, "both do something"
    torch.testing.assert_close(*(sample(guider(model, prompts)) for model in (first, then)), rtol=1e-2, atol=1e-3)


@pytest.fixture
def evaluated(prompts):
    """Rows that the model is asked for in four steps."""
    def count(model):
        import comfy.patcher_extension

        rows, model = [], model.clone()

        def counted(executor, x, *args, **kwargs):
            rows.append(len(x))
            return executor(x, *args, **kwargs)

        counted.__module__ = "comfy.counted"
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", counted)
        sample(guider(model, prompts), steps=4, batch=1)
        return sum(rows)

    return count


def test_both_on_one_condition_evaluate_it_once(tiny, guard, apply, unwanted, run, evaluated):
    stock = evaluated(tiny.model)
    alone = evaluated(guard(tiny.model, preset="max")[0])
    assert (stock, alone) == (8, 12)
    assert evaluated(apply(guard(tiny.model, preset="max")[0], "both")[0]) == 12
    another = run("ClassCondition", class_index=1).result[0]
    assert evaluated(apply(guard(tiny.model, another, preset="max")[0], "both")[0]) == 16


def test_without_momentum_warmup_costs_nothing_and_with_it_is_gathered(tiny, guard, prompts, evaluated):
    own = dict(preset="own numbers", warmup=0.5)
    assert evaluated(guard(tiny.model, **own, momentum_scale=0.0)[0]) == 10 < evaluated(guard(tiny.model, **own)[0]) == 12
    early = sample(guider(guard(tiny.model, preset="own numbers", warmup=0.5, momentum_scale=0.5, momentum_beta=0.7)[0], prompts))
    never = sample(guider(guard(tiny.model, preset="own numbers", warmup=0.5, momentum_scale=0.0, momentum_beta=0.0)[0], prompts))
    assert not torch.equal(early, never)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral"])
def test_two_calls_a_step_move_momentum_once(tiny, guard, prompts, sampler, monkeypatch):
    from pack.safe_denoiser.rules.sld import BySld

    moved, real = [], BySld._momentum
    monkeypatch.setattr(BySld, "_momentum", staticmethod(lambda p, memory: moved.append((p.sigma, real(p, memory))) or moved[-1][1]))
    sample(guider(guard(tiny.model, preset="max")[0], prompts), sampler, steps=5)
    calls, steps = len(moved), sum(bool(follows.all()) for _, (_, follows) in moved)
    assert calls == 9 and steps == 5, (calls, steps)
    levels = [float(sigma[0]) for sigma, (_, follows) in moved if follows.all()]
    assert all(a > b for a, b in itertools.pairwise(levels))


def test_at_cfg_1_nothing_is_done_and_said(tiny, guard, prompts):
    patched, report = guard(tiny.model)
    torch.testing.assert_close(sample(guider(patched, prompts, 1.0)), sample(guider(tiny.model, prompts, 1.0)), rtol=1e-4, atol=1e-4)
    assert any("cfg 1" in note for note in report.notes) and report.verdict.startswith("nothing was corrected: what it needs was not")
    patched, report = guard(tiny.model, preset="strong")
    sample(guider(patched, prompts), steps=10)
    assert report.verdict.startswith("corrected 8 of 10 model calls, posterior up to 0.") and not report.notes
