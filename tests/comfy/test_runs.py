"""What belongs to one run: samplers that sample inside their own run, runs in parts, samplers and guiders that go their own way."""
import gc
import weakref

import pytest
import torch

WAYS = {  # banks and conditions that make the safe denoiser remember something from call to call
    "evidence": dict(), "witness": dict(unwanted=True), "tracked": dict(weight="tracked"), "parts": dict(parts=2)}


@pytest.fixture
def apply(run, tiny):
    def patch(unwanted=False, model=None, **settings):
        more = dict(unwanted=run("ClassCondition", class_index=7).result[0]) if unwanted else {}
        return run("Apply", model=model or tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference, **more, **settings).result

    return patch


@pytest.fixture
def prompts(run):
    """One that asks for the unwanted digit and nothing else, so that its guidance is let go, and the empty one."""
    return [run("ClassCondition", class_index=i).result[0] for i in (7, -1)]


def guider(model, prompts, cfg=3.0, kind=None):
    import comfy.samplers

    made = (kind or comfy.samplers.CFGGuider)(model)
    made.set_conds(*prompts)
    made.set_cfg(cfg)
    return made


def noise(batch=2):
    return torch.randn(batch, 16, 4, 4, generator=torch.Generator().manual_seed(3))


def sample(made, sampler="euler", steps=6, batch=2, sigmas=None, start=None, latent=None, mask=None):
    import comfy.samplers

    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(made.model_patcher.get_model_object("model_sampling"), "simple", steps)
    start = noise(batch) if start is None else start
    with torch.inference_mode():
        return made.sample(start, torch.zeros_like(start) if latent is None else latent, sampler, sigmas, denoise_mask=mask, seed=4,
                           disable_pbar=True)


def ksampler(function):
    """A sampler of one's own: function(model, x, sigmas) with model(x, sigma)."""
    import comfy.samplers

    def sampled(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return function(lambda x, sigma: model(x, sigma, **(extra_args or {})), x, sigmas)

    return comfy.samplers.KSAMPLER(sampled)


def euler(call, x, sigmas):
    for before, after in zip(sigmas, sigmas[1:]):
        denoised = call(x, before * x.new_ones([len(x)]))
        x = x + (after - before) * (x - denoised) / before
    return x


@pytest.mark.parametrize("way", WAYS)
def test_a_sampler_that_samples_the_same_model_inside_its_run(way, apply, prompts):
    """As packs do that sample by regions, or look ahead: the inner run neither ends the outer one nor leaves anything in it."""
    patched, report = apply(**WAYS[way])
    mask = torch.ones(1, 1, 4, 4)
    mask[..., :2] = 0
    plain = sample(guider(patched, prompts), ksampler(euler), mask=mask, latent=torch.ones(2, 16, 4, 4))
    wanted = report.table()

    def inside(call, x, sigmas):
        def looked_ahead(x, sigma):
            lengths = len(report.steps)
            sample(guider(patched, prompts), steps=3, batch=1)
            patched.pre_run()  # ComfyUI's own end of a run, which such samplers take back
            assert len(report.steps) == lengths
            return call(x, sigma)

        return euler(looked_ahead, x, sigmas)

    nested = sample(guider(patched, prompts), ksampler(inside), mask=mask, latent=torch.ones(2, 16, 4, 4))
    assert torch.equal(nested, plain) and report.table() == wanted and report.summary["corrected_calls"] == 6


def quiet(stages):
    """A guider that leaves out ComfyUI's wrappers of these stages, as some packs' own do."""
    import comfy.samplers

    class Quiet(comfy.samplers.CFGGuider):
        def sample(self, noise, latent_image, sampler, sigmas, **kwargs):
            hidden = {kind: self.model_patcher.wrappers.pop(kind) for kind in stages if kind in self.model_patcher.wrappers}
            try:
                return super().sample(noise, latent_image, sampler, sigmas, **kwargs)
            finally:
                self.model_patcher.wrappers |= hidden

    return Quiet


@pytest.mark.parametrize("stages", [["sampler_sample"], ["outer_sample", "sampler_sample"], ["outer_sample"]])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "witness"])
def test_a_guider_that_does_not_tell_of_its_runs(stages, way, apply, prompts):
    patched, report = apply(**WAYS[way])
    wanted = sample(guider(patched, prompts))
    told = report.table()
    made = guider(patched, prompts, kind=quiet(stages))
    for _ in range(2):  # the second is not the first's end
        assert torch.equal(sample(made), wanted) and len(report.steps) == 6
        assert ("is not known, and whole pictures" in report.table()) == ("sampler_sample" in stages)
    assert [line for line in report.table().splitlines() if "not known" not in line] == told.splitlines()
    assert torch.equal(sample(guider(patched, prompts)), wanted) and report.table() == told, "nothing is left of it"


def test_what_a_prompt_asked_for_is_heard_when_nobody_tells_of_the_run(apply, prompts):
    """Conditions need ComfyUI's wrappers: without them the report says so."""
    patched, report = apply(unwanted=True)
    result = sample(guider(patched, prompts, kind=quiet(["outer_sample", "sampler_sample"])))
    assert torch.isfinite(result).all() and "was not evaluated in some model calls" in report.table()


@pytest.fixture
def advanced(comfy, prompts):
    def part(model, latent, start, end, prompts=prompts):
        return comfy.KSamplerAdvanced().sample(model, "enable" if start == 0 else "disable", 4, 6, 3.0, "euler", "simple", *prompts, latent,
                                               start, end, "enable" if end < 6 else "disable")[0]

    return part


EMPTY = {"samples": torch.zeros(2, 16, 4, 4)}


@pytest.mark.parametrize("parts", [[0, 3, 6], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("way", WAYS)
def test_one_run_and_the_same_in_parts(way, parts, advanced, apply):
    """KSampler (Advanced), step by step: what an earlier part knew of a prompt counts in the next."""
    patched, report = apply(**WAYS[way])
    whole, once = advanced(patched, EMPTY, 0, 6)["samples"], report.values["posterior"]
    latent, seen = EMPTY, []
    for start, end in zip(parts, parts[1:]):
        latent = advanced(patched, latent, start, end)
        seen.append(torch.from_numpy(report.values["posterior"]))
        assert "middle of a schedule" not in report.table()
    torch.testing.assert_close(torch.cat(seen), torch.from_numpy(once), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(latent["samples"], whole, rtol=1e-3, atol=1e-3)


def test_a_part_of_a_rule_that_remembers_nothing_has_nothing_to_say(advanced, run, tiny):
    patched, report = run("Apply", model=tiny.model, negation_bank=tiny.bank).result
    advanced(patched, advanced(patched, EMPTY, 0, 3), 3, 6)
    assert report.summary["corrected_calls"] == 3 and not report.notes


def test_a_part_whose_beginning_is_not_known_says_so(advanced, apply, prompts, run):
    """Because it was sampled without this node, under another prompt, or longer ago than what is remembered."""
    from pack.nodes.steering.remembered_runs import RESUMABLE

    patched, report = apply()
    other = [run("ClassCondition", class_index=10).result[0], prompts[1]]
    for first in (lambda: advanced(apply(strength=0.0)[0], EMPTY, 0, 3), lambda: advanced(patched, EMPTY, 0, 3, other)):
        advanced(patched, first(), 3, 6)
        assert "begins in the middle of a schedule" in report.table()
    half = advanced(patched, EMPTY, 0, 3)
    for _ in range(2):  # the first time changes nothing of what is remembered
        wanted = advanced(patched, half, 3, 6)["samples"]
        assert "middle of a schedule" not in report.table()
    for seed in range(RESUMABLE):
        sample(guider(patched, prompts), start=noise() + seed)
    forgotten = advanced(patched, half, 3, 6)["samples"]
    assert "begins in the middle of a schedule" in report.table() and not torch.equal(forgotten, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_unsampling_is_not_steered_and_says_so(way, apply, prompts, tiny):
    import comfy.samplers

    patched, report = apply(**WAYS[way])
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", 6).flip(0).clone()
    sigmas[0] = 1e-3
    picture = sample(guider(tiny.model, prompts))
    back = {name: sample(guider(model, prompts, cfg=1.0), ksampler(euler), sigmas=sigmas, start=torch.zeros(2, 16, 4, 4), latent=picture)
            for name, model in (("stock", tiny.model), ("patched", patched))}
    assert torch.equal(*back.values()) and "unsampling" in report.table() and report.summary["corrected_calls"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_restart_remembers_what_was_seen_before_the_noise_it_returns_to(way, apply, prompts, tiny):
    """Sigma rises in the middle, as restart samplers and those that take a step back do."""
    import comfy.samplers

    patched, report = apply(**WAYS[way])
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", 8)
    restarts = torch.cat([sigmas[:6], sigmas[3:]])

    def restarting(call, x, sigmas):
        draw = torch.Generator().manual_seed(1)
        for before, after in zip(sigmas, sigmas[1:]):
            if after > before:  # a flow: x = (1 - sigma) x0 + sigma eps
                scale = (1 - after) / (1 - before)
                x = scale * x + (after**2 - (scale * before) ** 2).sqrt() * torch.randn(x.shape, generator=draw)
            else:
                x = x + (after - before) * (x - call(x, before * x.new_ones([len(x)]))) / before
        return x

    result = sample(guider(patched, prompts), ksampler(restarting), sigmas=restarts)
    values = report.values
    assert torch.isfinite(result).all() and report.summary["corrected_calls"] == len(values["sigma"]) == 10
    if way == "witness":  # the prompt asks for the unwanted thing from the start, and after the restart too
        assert values["correction"][5:].min() > 0


def halves(call, x, sigmas):
    return euler(lambda x, sigma: torch.cat([call(x[i:i + 1], sigma[i:i + 1]) for i in range(len(x))]), x, sigmas)


def one_number(call, x, sigmas):
    return euler(lambda x, sigma: call(x, sigma[:1]), x, sigmas)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "tracked"])  # which does nothing but remember
def test_a_batch_row_by_row(way, run, prompts, apply, tiny):
    """Each row is corrected by itself; what is remembered of one is never taken for another's."""
    straight = [run("ClassCondition", class_index=10).result[0], prompts[1]]  # no guidance is let go: nothing to remember
    patched, report = apply(**WAYS[way])
    wanted = sample(guider(patched, straight), ksampler(euler))
    found = sample(guider(patched, straight), ksampler(halves))
    assert report.summary["corrected_calls"] == 12 and "parts of the batch at a time" in report.table()
    assert (found - wanted).norm() < 0.2 * wanted.norm() and torch.isfinite(found).all()
    single = [sample(guider(apply(**WAYS[way])[0], straight), ksampler(euler), start=noise()[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(single), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_one_noise_level_for_the_whole_batch(way, apply, prompts):
    patched, report = apply(**WAYS[way])
    wanted = sample(guider(patched, prompts, cfg=1.0), ksampler(euler))  # ComfyUI itself takes one number for one condition only
    found = sample(guider(patched, prompts, cfg=1.0), ksampler(one_number))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert report.values["active"].tolist() == [[1, 1]] * 6


@pytest.mark.parametrize("way", WAYS)
def test_a_sampler_that_tells_less_noise_than_there_is(way, apply, prompts):
    """As those do that sharpen details: it is steered all the same, see docs/reliability.md for how well."""
    patched, report = apply(**WAYS[way])

    def told_less(call, x, sigmas):
        return euler(lambda x, sigma: call(x, 0.8 * sigma), x, sigmas)

    assert torch.isfinite(sample(guider(patched, prompts), ksampler(told_less))).all() and report.summary["corrected_calls"] == 6


def test_a_rule_with_a_name_is_a_method_of_the_nodes(pack, run, tiny, prompts, monkeypatch):
    """What CONTRIBUTING.md promises of ten lines; tests/unit/test_house.py has the rest."""
    from pack.safe_denoiser.denoiser import METHODS
    from pack.safe_denoiser.prediction import Correction
    from pack.safe_denoiser.rules.rule import Rule

    class AwayFromMean(Rule):
        def __init__(self, view):
            self.view = view

        def correct(self, p, memory):
            unsafe = self.view.densities.of(self.view.bank, p)
            r = torch.full_like(p.sigma, 0.1)
            return Correction(r[:, None] * (p.denoised - unsafe.mean), r, unsafe.weights.argmax(1), r > 1, unsafe.omitted)

    monkeypatch.setitem(METHODS, "away_from_mean", AwayFromMean)
    for node in ("SafeDenoiserApply", "SafeDenoiserKSampler"):
        assert "away_from_mean" in next(one for one in pack[node].define_schema().inputs if one.id == "method").options
    apply = dict(model=tiny.model, negation_bank=tiny.bank, reference_bank=tiny.reference, method="away_from_mean")
    found = {}
    for name, settings in {"off": dict(strength=0.0), "on": dict(), "early": dict(end=0.4), "parts": dict(parts=2)}.items():
        patched, report = run("Apply", **apply, **settings).result
        found[name] = sample(guider(patched, prompts)), report.summary["corrected_calls"]
    assert [calls for _, calls in found.values()] == [0, 6, 3, 6]
    assert len({tuple(latent.flatten().tolist()) for latent, _ in found.values()}) == 4, "each differs"


@pytest.mark.parametrize("way", WAYS)
def test_a_run_leaves_nothing_to_the_garbage_collector(way, apply, prompts, tiny):
    """ComfyUI takes a patcher that dies in a ring of references for a leak, and collects garbage at each load from then on."""
    import comfy.model_management

    patched, _ = apply(**WAYS[way], model=apply(**WAYS[way])[0])
    made = guider(patched, prompts)
    gc.collect()
    gc.disable()
    try:
        sample(made)
        dead = weakref.ref(made), weakref.ref(patched)
        del made, patched
        sample(guider(tiny.model, prompts))  # a model keeps the patcher that sampled it last
        assert [one() for one in dead] == [None, None]
        mine = [one for one in comfy.model_management.current_loaded_models if one.real_model() is tiny.model.model]
        assert mine and not any(one.is_dead() for one in mine)
    finally:
        gc.enable()
