"""The guards' closed forms: on small matrices, and against the published definitions written out."""
import itertools
import math

import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser
from safe_denoiser.prediction import Prediction
from safe_denoiser.rules.sld import PRESETS, Sld, sld
from safe_denoiser.words.alarm import Alarm
from safe_denoiser.words.safree import distances, filter_steps, flagged, onto, safree, span
from safe_denoiser.words.surgery import concept_scores, surgery


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_projector_is_idempotent_and_symmetric_and_that_of_the_paper(count):
    vectors = draw(count, count, 8)
    q = span(vectors)
    p = q.T @ q
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.T)
    c = vectors.T
    torch.testing.assert_close(p, c @ torch.linalg.pinv(c.T @ c) @ c.T)
    torch.testing.assert_close(onto(vectors, q), vectors)


def test_concepts_that_say_the_same_span_what_one_does():
    vectors = draw(0, 1, 8)
    assert len(span(torch.cat([vectors, 2 * vectors, vectors]))) == 1 and len(span(torch.zeros(2, 8, dtype=torch.float64))) == 0


def test_a_concept_in_the_span_is_removed_exactly_and_nothing_else():
    concepts, prompt = draw(1, 2, 8), draw(2, 5, 8)
    without = torch.cat([concepts, draw(3, 3, 8)])
    torch.testing.assert_close(safree(concepts, without, concepts), torch.zeros_like(concepts))
    clean = prompt - onto(prompt, span(concepts))
    torch.testing.assert_close(safree(clean, torch.cat([clean, concepts]), concepts), clean)
    found = safree(prompt, draw(4, 8, 8), concepts)  # of a prompt whose variants span everything
    torch.testing.assert_close(found @ concepts.T, torch.zeros(5, 2, dtype=torch.float64))
    torch.testing.assert_close(found, clean)


def test_a_token_that_carried_the_concept_is_flagged():
    """e_0 is the concept: only the prompt without token 1 has no part along it."""
    e = torch.eye(4, dtype=torch.float64)
    without = torch.stack([e[0] + e[1], e[1] + e[2], e[0] + e[3]])
    d = distances(without, e[:1])
    torch.testing.assert_close(d, torch.tensor([1, 2**0.5, 1], dtype=torch.float64))
    assert flagged(d, d[0]).tolist() == [False, True, False]
    assert flagged(torch.tensor([1.0, 1.0, 1.0]), torch.tensor(1.0)).tolist() == [False] * 3
    assert flagged(torch.tensor([1.0, 1.009]), torch.tensor(1.0)).tolist() == [False, False], "alpha"
    assert flagged(d[:1], d[1]).tolist() == [False] and flagged(d[1:2], d[0]).tolist() == [True], "a single token, against the whole"


def test_the_filter_is_nearly_a_step():
    """z = 0.45: 0 steps, z = 0.6: 10 of 50; artists a little later."""
    e = torch.eye(2, dtype=torch.float64)

    def at(z, **names):
        return filter_steps(e[:1], torch.tensor([[1 - z, math.sqrt(1 - (1 - z) ** 2)]], dtype=torch.float64), **names)

    assert [at(z) for z in (0.0, 0.45, 0.5333, 0.6, 1.0)] == [0, 0, 5, 10, 10]
    assert at(0.55, names=True) == 5 < at(0.55)


def test_surgery_removes_a_concept_exactly_and_leaves_an_orthogonal_prompt():
    empty, concept = draw(5, 6, 8), draw(6, 6, 8)
    delta = concept - empty
    prompt = empty + draw(7, 6, 8)
    torch.testing.assert_close(surgery(prompt + delta, empty, concept, 1.0), prompt)
    assert torch.equal(surgery(prompt, empty, concept, 0.0), prompt)
    orthogonal = prompt - (prompt * delta).sum(1, keepdim=True) / delta.square().sum(1, keepdim=True) * delta
    scores = concept_scores(orthogonal, empty, torch.stack([concept, empty + 2 * delta, empty + orthogonal]))
    torch.testing.assert_close(scores, torch.tensor([0, 0, 1], dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(concept_scores(prompt, empty, empty[None])) == 0, "a concept that says nothing"


def test_an_alarm_keeps_the_rate_that_was_asked_for():
    harmless = draw(8, 4000, 5) * torch.tensor([1, 2, 3, 4, 5]) + 7
    for rate in (0.2, 0.01):
        alarm = Alarm.of(harmless[:2000], rate)
        assert float((alarm.beyond(harmless[:2000]).amax(1) > 0).double().mean()) <= rate
        assert abs(float((alarm.beyond(harmless[2000:]).amax(1) > 0).double().mean()) - rate) < 0.5 * rate
    exact = Alarm(torch.zeros(1), torch.ones(1), 2.0)
    torch.testing.assert_close(exact.share(torch.tensor([2.0, 3.5])), torch.tensor([0.5, 1 / (1 + math.exp(-3))]))


def published(eps, eps_c, eps_s, eps_u, w, nu, numbers, on=True):
    """SLD as its paper defines it, of noise predictions: the guided one, and the momentum that follows."""
    apart = eps_c - eps_s
    mu = torch.where(apart < numbers.threshold, (numbers.scale * apart.abs()).clamp_max(1), torch.zeros_like(apart))
    gamma = mu * (eps_s - eps_u) + numbers.momentum_scale * nu
    return eps - w * gamma * on, numbers.momentum_beta * nu + (1 - numbers.momentum_beta) * gamma


@pytest.mark.parametrize("flow", [False, True], ids=["alpha 1", "flow"])
@pytest.mark.parametrize("preset", PRESETS)
def test_sld_is_its_definition(preset, flow):
    """Noise predictions eps = (x - D) / sigma where alpha = 1; in flow models the same differences are those of velocities."""
    numbers, w = PRESETS[preset][0], 7.5
    nu = draw(9, 3, 10)
    for sigma in torch.tensor([[0.9, 0.5, 0.1], [8.0, 1.0, 0.05]], dtype=torch.float64)[:1 if flow else 2]:
        x, c, u, s = draw(10, 4, 3, 10)
        c, s = c / 100, c / 100 + (s - c) / 300  # near, so that all branches occur
        term, after, mu = sld(c, u, s, sigma, nu, numbers)
        level = sigma[:, None]
        velocity = {name: (x - y) / level for name, y in (("c", c), ("u", u), ("s", s))}  # noise - x0 in flow, eps for alpha = 1
        guided = velocity["u"] + w * (velocity["c"] - velocity["u"])
        wanted, momentum = published(guided, velocity["c"], velocity["s"], velocity["u"], w, nu, numbers)
        torch.testing.assert_close(x - level * wanted, u + w * (c - u) + w * term)
        torch.testing.assert_close(after, momentum)
        assert 0 <= mu.min() and mu.max() <= 1


def run(numbers, calls, **settings):
    """The corrections of calls (sigma, begins) with the same predictions."""
    x, c, u, s = draw(11, 4, 2, 12)
    guard = SafeDenoiser(None, method="sld", own=numbers, **settings)
    found = []
    for sigma, begins in calls:
        denoised = u + 3 * (c - u)
        safe, step = guard.safe(x, denoised, sigma, unconditional=u, conditional=c, unwanted=s, begins=begins)
        found.append(safe - denoised)
    return found, (c, u, s)


def test_sld_in_the_denoiser_is_that_of_a_run_with_momentum():
    numbers, nu = Sld(1000, 0.5, 0.3, 0.4), 0.0
    found, (c, u, s) = run(numbers, [(sigma, True) for sigma in (4.0, 2.0, 1.0)], sigma_start=3.0)
    for sigma, got in zip((4.0, 2.0, 1.0), found):
        term, nu, _ = sld(c, u, s, torch.full((2,), sigma, dtype=torch.float64), nu, numbers)
        torch.testing.assert_close(got, 3 * term if sigma < 3 else torch.zeros_like(got))


def test_momentum_counts_once_a_step_whatever_the_sampler():
    levels, numbers = (4.0, 2.0, 1.0, 0.5), Sld(1000, 0.5, 0.3, 0.4)
    euler = dict(zip(levels, run(numbers, [(sigma, True) for sigma in levels])[0]))
    heun = [(sigma, True) for pair in itertools.pairwise(levels) for sigma in pair]
    dpm_2 = [call for a, b in itertools.pairwise(levels) for call in ((a, True), (math.sqrt(a * b), False))]
    for calls in (heun, dpm_2):
        for (sigma, begins), got in zip(calls, run(numbers, calls)[0]):
            if begins:
                torch.testing.assert_close(got, euler[sigma])


def test_a_run_begins_without_the_momentum_of_the_one_before():
    levels, numbers = (4.0, 2.0, 1.0), Sld(1000, 0.5, 0.3, 0.4)
    found, _ = run(numbers, [(sigma, True) for sigma in levels * 2])
    for first, second in zip(found[:3], found[3:]):
        assert torch.equal(first, second)


def test_without_guidance_sld_does_nothing_and_off_is_bit_for_bit():
    x, c, s = draw(12, 3, 2, 12)
    guard = SafeDenoiser(None, method="sld", own=PRESETS["max"][0])
    assert torch.equal(guard.safe(x, c, 1.0, conditional=c, unwanted=s)[0], c)
    off = SafeDenoiser(None, method="sld", strength=0.0).safe(x, c, 1.0, conditional=c, unconditional=x, unwanted=s)
    assert off[0] is c and off[1] is None


def test_layers_add_up_as_equations_8_and_9_of_the_paper_say():
    """arXiv:2502.08011. Eq. 8: E_safe + lambda (E_c - E_empty), with our r / (1 - r) (E_ref - E_u); Eq. 9: SLD's term beside it."""
    bank, reference = (Bank(draw(seed, 20, 12).float()) for seed in (13, 14))
    x, c, u, s = (y.float() for y in draw(15, 4, 2, 12))
    guided, sigma = u + 3 * (c - u), torch.tensor([2.0, 1.0])
    safe = SafeDenoiser(bank, reference=reference, weight="reference", trusted=True)
    guard = SafeDenoiser(None, method="sld", own=PRESETS["max"][0])
    both = guided.clone()
    for layer in (safe, guard):
        both = both + layer.safe(x, guided, sigma, unconditional=u, conditional=c, unwanted=s)[0] - guided
    densities = safe.view.densities
    unsafe, other = (densities.of(one, Prediction(x, guided, sigma, torch.ones(2))) for one in (bank, reference))
    r = (math.log(0.25) + unsafe.log_density - other.log_density).clamp_max(math.log(0.95)).exp()
    closed = guided + (r / (1 - r))[:, None] * (other.mean - unsafe.mean) + 3 * sld(c, u, s, sigma, 0.0, PRESETS["max"][0])[0]
    torch.testing.assert_close(both, closed, rtol=1e-5, atol=1e-5)
