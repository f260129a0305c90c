"""The witness: closed forms, what it remembers, what it lets go, and what nobody may lose."""
import math

import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser
from safe_denoiser.density.gaussian import fit
from safe_denoiser.prediction import Prediction
from safe_denoiser.rules import witness
from safe_denoiser.rules.witness import (
    CAUTION,
    DOUBT,
    PRIOR,
    REACH,
    RELEASE,
    RESCALED,
    SURE,
    ByWitness,
    coordinate,
    from_witness,
    gap,
    moved,
    rescaled,
    share,
    within_reach,
)
from tiny_photos.data import CLASSES
from tiny_photos.world import LATENT, TinyPhotos, prompt

F64 = torch.float64


def unit(*places, d=6):
    v = torch.zeros(1, d, dtype=F64)
    for i, value in places:
        v[0, i] = value
    return v


UNWANTED, OTHERS = unit((0, 1.0), (1, 2.0)), unit((0, 1.0))
SAFE = unit((0, 1.0), (1, 2 - 2**0.5), (2, 2**0.5))  # as far from E_n as others, and with a part along E_n - E_0
ZERO = torch.lerp(OTHERS, UNWANTED, PRIOR)


@pytest.fixture
def plain(monkeypatch):
    """The theorem's own answer, of whose contrast nothing is taken back."""
    monkeypatch.setattr(witness, "RESCALED", 0.0)


def mixed(r):
    return (1 - r) * SAFE + r * UNWANTED


def cautious(r):
    """The share whose odds are CAUTION times those of r."""
    return CAUTION * r / (1 - r + CAUTION * r)


def predict(r, cfg=1.0, sigma=50.0, **others):
    """A model call whose prompt is unsafe with probability r, at noise so high that nothing else speaks."""
    asked = mixed(r)
    one = torch.ones(1, dtype=F64)
    return Prediction(torch.zeros(1, 6, dtype=F64), ZERO + cfg * (asked - ZERO), sigma * one, one, ZERO, asked, UNWANTED, **others)


@pytest.mark.parametrize("r", [0.0, 0.2, 0.5, 0.7])
@pytest.mark.parametrize("cfg", [1.0, 3.0, 7.5])
def test_theorem(r, cfg, plain):
    """Where the safe part is as far from the unwanted as what the model makes else, r is exact, and the prompt moves CAUTION times towards
    E_safe; guidance does with it what it does. t, in which the safe part has a share, is not exact.
    """
    p = predict(r, cfg)
    t, move, apart = (of(mixed(r), ZERO, UNWANTED) for of in (coordinate, moved, gap))
    odds = share(t, move, apart, apart) / (1 - share(t, move, apart, apart))
    assert float(odds) == pytest.approx(CAUTION * r / (1 - r)) and float(t) > r + 0.04
    found = ByWitness().correct(p, {})
    torch.testing.assert_close(found.direction, cfg * CAUTION * (SAFE - mixed(r)), rtol=1e-3, atol=1e-3)
    assert float(found.posterior) == pytest.approx(cautious(r), abs=1e-3) and float(found.projection) == pytest.approx(float(t))
    torch.testing.assert_close(mixed(r) + from_witness(mixed(r), UNWANTED, torch.tensor([r], dtype=F64)), SAFE)


@pytest.mark.parametrize("q", [0.1, 0.3, 0.6])
def test_share_is_exact_while_the_run_goes_on(q):
    """x begins to look unsafe: E_0 goes there with the odds of the prompt, and their gap alone would say too little."""
    begun = gap(mixed(0.5), ZERO, UNWANTED)
    odds = 9 * q / (1 - q)  # at the start 1, where those of E_0 are PRIOR / (1 - PRIOR)
    r = odds / (1 + odds)
    now, zero = mixed(r), torch.lerp(OTHERS, UNWANTED, q)
    told = share(*(of(now, zero, UNWANTED) for of in (coordinate, moved, gap)), begun)
    assert float(told) == pytest.approx(cautious(min(r, SURE)), abs=1e-6)
    assert float(1 - gap(now, zero, UNWANTED).sqrt()) < r - 0.02


def test_a_condition_that_is_broader_than_the_prompt_is_told_by_t():
    """Of forty kinds the condition means five, and the prompt one of these and another."""
    kinds = torch.eye(40, dtype=F64)
    zero, unwanted, asked = kinds.mean(0)[None], kinds[:5].mean(0)[None], kinds[[0, 5]].mean(0)[None]
    t, move, apart = (of(asked, zero, unwanted) for of in (coordinate, moved, gap))
    assert float(move) == pytest.approx(float((asked - zero).square().sum() / (unwanted - zero).square().sum())) and float(move) > 2
    assert float(apart) > 1, "as if there were nothing unsafe"
    assert float(share(t, move, apart, apart)) == pytest.approx(cautious(float(t))) and float(t) == pytest.approx(0.5, abs=0.1)


def test_prompts_that_are_no_nearer_than_the_model_itself_have_no_share():
    for asked in (OTHERS, 2 * OTHERS - UNWANTED):
        t, move, apart = (of(asked, ZERO, UNWANTED) for of in (coordinate, moved, gap))
        assert float(share(t, move, apart, apart)) == 0
    t, move, apart = (of(ZERO, ZERO, UNWANTED) for of in (coordinate, moved, gap))
    assert float(share(t, move, apart, apart)) == 0, "no prompt at all is for the prior, see ByWitness"


def test_the_odds_of_a_run_are_remembered_by_its_gap():
    """One call's share falls where E_0 goes where E_c goes; what the run saw does not, and a new run knows nothing of it."""
    memory, rule = {}, ByWitness()
    start = rule.correct(predict(0.5), memory)
    near = unit((0, 1.0), (1, 1.2), (2, 0.2))  # E_c has gone towards E_n, and E_0 with it
    late = Prediction(torch.zeros(1, 6, dtype=F64), near, torch.tensor([40.0], dtype=F64), torch.ones(1, dtype=F64),
                      near - 0.4 * (UNWANTED - near), near, UNWANTED)
    later, fresh = rule.correct(late, memory), rule.correct(late, {})
    odds = float(start.posterior / (1 - start.posterior)) * float(gap(mixed(0.5), ZERO, UNWANTED) / gap(near, late.unconditional, UNWANTED))
    assert float(later.posterior) == pytest.approx(odds / (1 + odds), rel=1e-3) and float(later.posterior) > float(fresh.posterior) + 0.02
    again = rule.correct(predict(0.2, sigma=60.0), memory)  # the noise rises: another run
    assert float(again.posterior) == pytest.approx(cautious(0.2), abs=1e-3)


def test_one_call_that_gives_no_number_does_not_spoil_the_run():
    denoiser, one = SafeDenoiser(None), torch.ones(1, 6, 1, dtype=F64)
    steps = []
    for unwanted, sigma in ((UNWANTED * math.nan, 60.0), (UNWANTED, 50.0), (UNWANTED * math.nan, 45.0), (UNWANTED, 40.0)):
        safe, step = denoiser.safe(one, mixed(0.5)[..., None], sigma, unconditional=ZERO[..., None],
                                   conditional=mixed(0.5)[..., None], unwanted=unwanted[..., None])
        steps.append(step)
    assert [bool(step.fallback) for step in steps] == [True, False, True, False]
    assert all(float(steps[i].posterior) == pytest.approx(cautious(0.5), abs=1e-2) for i in (1, 3))


def test_evidence_once_the_noise_is_low():
    high, low = (ByWitness().correct(predict(0.5, sigma=sigma), {}).posterior for sigma in (50.0, 0.2))
    apart = float((mixed(0.5) - UNWANTED).square().sum())
    assert float(high) == pytest.approx(cautious(0.5), abs=1e-3)
    assert float(low) == pytest.approx(1 / (1 + math.exp(DOUBT * apart / 0.04) / CAUTION), rel=1e-3)


def test_a_direct_prompt_lets_go_of_its_guidance(plain):
    found = ByWitness(prior=0.25).correct(predict(1.0, cfg=7.0), {})
    free = (ZERO - UNWANTED) * (0.25 / 0.75)
    torch.testing.assert_close(predict(1.0, cfg=7.0).denoised + found.direction, ZERO + free, rtol=1e-3, atol=1e-3)
    for r in (0.5, 0.7):  # half unsafe is not direct
        assert 1 - float(gap(mixed(r), ZERO, UNWANTED).sqrt()) < RELEASE[0]


@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_a_prompt_for_the_unwanted_thing_and_more_keeps_the_more(cfg):
    """A bright truck: no picture of it is safe, and "bright" is not what must not come out. "A car or a truck" is another matter."""
    pictures = Bank(torch.randn(400, 1, 6, generator=torch.Generator().manual_seed(0), dtype=F64))
    rule, one = ByWitness(model=fit(pictures), prior=0.25), torch.ones(1, dtype=F64)
    zero, truck, bright, car = unit(), unit((0, 1.0)), unit((1, 1.5)), unit((2, 1.0))

    def corrected(asked):
        p = Prediction(unit(), zero + cfg * (asked - zero), 50 * one, one, zero, asked, truck)
        return p.denoised + rule.correct(p, {}).direction

    away = corrected(truck + bright) - cfg * bright
    assert float((away * truck).sum()) <= 0 and float(away.norm()) < 1, "the prior's push away from trucks is left"
    assert float((corrected(truck + bright) * bright).sum()) > 0.9 * cfg * float(bright.square().sum())
    assert float((corrected((car + truck) / 2) * car).sum()) > 0.5 * cfg, "not what a prompt asks for beside, but its safe part"


def test_no_prompt_takes_the_prior():
    p = Prediction(torch.zeros(1, 6, dtype=F64), ZERO, torch.tensor([50.0], dtype=F64), torch.ones(1, dtype=F64), ZERO, ZERO, UNWANTED)
    assert float(ByWitness(prior=0.3).correct(p, {}).posterior) == pytest.approx(0.3, abs=1e-3)


def test_a_prompt_that_says_next_to_nothing_is_none():
    """Two rows of one batch differ by rounding: what is pushed by the prior is not guided for that."""
    def pushed(asked):
        one = torch.ones(1, dtype=F64)
        return ByWitness(prior=0.25).correct(Prediction(0 * ZERO, ZERO + 7 * (asked - ZERO), 50 * one, one, ZERO, asked, UNWANTED), {})

    torch.testing.assert_close(pushed(ZERO + 1e-4).direction, pushed(ZERO).direction, rtol=1e-2, atol=1e-3)


def test_cfg_1_without_a_neutral_condition():
    """Nothing to measure t from: the prior; with the model's own pictures, their mean, as long as x tells nothing."""
    draw = torch.Generator().manual_seed(0)
    reference = Bank(torch.randn(64, 1, 16, 16, generator=draw))
    alone, beside = ByWitness(), ByWitness(None, fit(reference), True)
    unwanted, safe = torch.zeros(1, 256), torch.zeros(1, 256)
    unwanted[0, :20], safe[0, 100:120] = 2.0, 2.0
    for part in (0.0, 0.5):
        asked = (1 - part) * safe + part * unwanted
        p = Prediction(torch.zeros(1, 256), asked, torch.ones(1), torch.zeros(1), unwanted=unwanted)
        assert float(alone.correct(p, {}).posterior) == pytest.approx(0.1, abs=1e-3)
        assert float(beside.correct(p, {}).posterior) == pytest.approx(0.1 + 0.9 * part, abs=0.12)


def test_neutral_takes_the_place_of_the_negative_prompt_for_t_only(plain):
    """A negative prompt that itself names the unwanted thing blinds t and the gap; a neutral condition does not."""
    asked, blind = mixed(0.4), UNWANTED
    one = torch.ones(1, dtype=F64)
    p = Prediction(torch.zeros(1, 6, dtype=F64), blind + 3 * (asked - blind), 50 * one, one, blind, asked, UNWANTED, ZERO)
    found = ByWitness().correct(p, {})
    assert float(found.posterior) == pytest.approx(cautious(0.4), abs=1e-3)
    torch.testing.assert_close(found.direction, 3 * CAUTION * (SAFE - asked), rtol=1e-3, atol=1e-3)


def test_metric_tells_kinds_apart():
    """Two classes that share what all pictures differ in: plain t calls one half of the other, the whitened t does not."""
    draw = torch.Generator().manual_seed(0)
    kind, own = torch.zeros(1, 64), torch.zeros(1, 64)
    kind[0, :8], own[0, 8:16] = 1.0, 1.0
    pictures = Bank((3 * torch.randn(300, 1, generator=draw) * kind + 0.3 * torch.randn(300, 64, generator=draw))[:, None])
    unwanted, cousin, zero = kind + own, kind, torch.zeros(1, 64)
    assert float(coordinate(cousin, zero, unwanted)) == pytest.approx(0.5, abs=0.05)
    assert abs(float(coordinate(cousin, zero, unwanted, fit(pictures)))) < 0.1


@pytest.mark.parametrize("apart, heard", [(0.5, True), (0.1, False)])
def test_banks_add_their_say_where_distances_tell_them_apart(apart, heard):
    draw = torch.Generator().manual_seed(0)
    unsafe, others = (Bank(torch.randn(80, 1, 8, 8, generator=draw) + shift) for shift in (apart, 0.0))
    denoiser = SafeDenoiser(unsafe, reference=others)
    asked, zero, unwanted = (torch.randn(2, 1, 8, 8, generator=draw) for _ in range(3))
    x = torch.stack([torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), -0.5)])
    _, step = denoiser.safe(x, asked, 0.7, 1.0, unconditional=zero, conditional=asked, unwanted=unwanted)
    same = SafeDenoiser(None, reference=others).safe(x, asked, 0.7, 1.0, unconditional=zero, conditional=asked, unwanted=unwanted)[1]
    if heard:
        assert float(step.posterior[0]) > float(same.posterior[0]) and float(step.posterior[1]) < float(same.posterior[1])
    else:
        assert torch.equal(step.posterior, same.posterior)


@pytest.mark.parametrize("banks", ["none", "bank", "bank and reference", "reference"])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 4, 2, 8, 8)])
def test_rows_are_their_own(banks, shape):
    """A row alone, in a batch, and in another order gives the same; a row that is not finite comes back, and harms no other."""
    draw = torch.Generator().manual_seed(1)
    pictures = [Bank(torch.randn(9, 4, *shape[2:], generator=draw, dtype=F64)) for _ in range(2)]
    bank, reference = pictures[0] if "bank" in banks else None, pictures[1] if "reference" in banks else None
    runs = [[torch.randn(shape, generator=draw, dtype=F64) for _ in range(5)] for _ in range(3)]

    def sampled(rows, spoil=()):
        denoiser, out = SafeDenoiser(bank, reference=reference), []
        for (x, asked, zero, unwanted, _), sigma in zip(runs, (2.0, 1.5, 0.5)):
            x, asked, zero, unwanted = (y[rows].clone() for y in (x, asked, zero, unwanted))
            for row in spoil:
                unwanted[row] = math.nan
            safe, step = denoiser.safe(x, zero + 2 * (asked - zero), sigma, 1.0, unconditional=zero, conditional=asked, unwanted=unwanted)
            out.append((safe, step))
        return out

    together = sampled([0, 1, 2])
    for rows in ([2], [1, 0]):
        for (safe, step), (wanted, whole) in zip(sampled(rows), together):
            torch.testing.assert_close(safe, wanted[rows])
            torch.testing.assert_close(step.posterior, whole.posterior[rows])
    for (safe, step), (wanted, _), (_, asked, zero, _, _) in zip(sampled([0, 1, 2], spoil=[1]), together, runs):
        torch.testing.assert_close(safe[[0, 2]], wanted[[0, 2]])
        assert torch.equal(safe[1], (zero + 2 * (asked - zero))[1]) and step.fallback.tolist() == [False, True, False]


@pytest.mark.parametrize("reference", [True, False])
def test_inside_a_mask(reference):
    """Outside nothing changes and nothing is heard; a mask of ones is no mask; a run is remembered where the mask changes."""
    draw = torch.Generator().manual_seed(2)
    bank = Bank(torch.randn(9, 2, 6, 6, generator=draw, dtype=F64)) if reference else None
    x, asked, zero, unwanted = (torch.randn(2, 2, 6, 6, generator=draw, dtype=F64) for _ in range(4))
    mask = torch.zeros(1, 1, 6, 6, dtype=F64)
    mask[..., :3] = 1
    heard = dict(unconditional=zero, conditional=asked)

    def safe(mask, unwanted=unwanted, denoiser=None, sigma=1.0, near=0.0):
        denoiser = denoiser or SafeDenoiser(None, reference=bank)
        closer = torch.lerp(asked, unwanted, near)
        return denoiser.safe(x, asked, sigma, 1.0, mask, unwanted=unwanted, **heard | {"conditional": closer})

    inside, step = safe(mask)
    assert torch.equal(inside[..., 3:], asked[..., 3:]) and not torch.equal(inside[..., :3], asked[..., :3])
    elsewhere = unwanted.clone()
    elsewhere[..., 3:] += 5
    torch.testing.assert_close(safe(mask, elsewhere)[0], inside)
    torch.testing.assert_close(safe(torch.ones_like(mask))[0], safe(None)[0])
    run = SafeDenoiser(None, reference=bank)
    safe(mask, denoiser=run, sigma=20.0, near=0.4)
    grown = mask.clone()
    grown[..., 3] = 1
    later, fresh = (safe(grown, denoiser=one, sigma=15.0)[1].posterior for one in (run, None))
    assert bool((later > fresh + 0.01).all()), "what the run saw at sigma 20 is not forgotten"
    assert math.isnan(float(SafeDenoiser(Bank(x)).safe(x, asked, 1.0)[1].projection[0])) and torch.isfinite(step.projection).all()


def test_refusals():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="needs a prediction under the unwanted condition"):
        SafeDenoiser(None).safe(x, x, 1.0)
    with pytest.raises(ValueError, match="steers by a negation bank"):
        SafeDenoiser(None, method="spell")
    with pytest.raises(ValueError, match="steers by a negation bank"):
        SafeDenoiser(None, weight="gate")


def test_strength_0_is_the_prediction_itself():
    x = torch.randn(2, 4, 4, 4)
    assert SafeDenoiser(None, strength=0.0).safe(x, x, 1.0, unwanted=x)[0] is x


def test_odds_are_bounded():
    assert float(ByWitness().correct(predict(0.95), {}).posterior) <= 0.95 and SURE < 0.95


def test_the_safe_prediction_stays_within_reach_of_what_the_model_makes_else():
    conditional, neutral, unwanted = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    for cfg, reach in ((1.0, REACH), (2.0, REACH / 2), (7.0, REACH / 2)):
        r = within_reach(conditional, neutral, unwanted, torch.tensor([cfg]))
        safe = conditional + from_witness(conditional, unwanted, r)
        torch.testing.assert_close((safe - unwanted).norm(), reach * (unwanted - neutral).norm())
    one = torch.ones(1)
    assert within_reach(unwanted + 7 * neutral, neutral, unwanted, one) == 0 and within_reach(unwanted, neutral, unwanted, one) == 1


def test_most_of_the_contrast_that_a_correction_adds_is_taken_back(monkeypatch):
    """Never more, and nothing where it adds none."""
    base = torch.randn(3, 400, generator=torch.Generator().manual_seed(0), dtype=F64)
    safe = base * torch.tensor([[2.0], [1.0], [0.5]], dtype=F64)
    found = rescaled(safe, base)
    assert torch.equal(found[1:], safe[1:]) and float(found[0].std() / base[0].std()) == pytest.approx(2 - RESCALED)
    p = predict(0.5, cfg=3.0)
    kept = ByWitness().correct(p, {}).direction
    monkeypatch.setattr(witness, "RESCALED", 0.0)
    plain = p.denoised + ByWitness().correct(p, {}).direction
    monkeypatch.undo()
    assert float(plain.std()) > 1.2 * float(p.denoised.std()), "else nothing is seen"
    torch.testing.assert_close(p.denoised + kept, rescaled(plain, p.denoised))


def test_pictures_of_a_trained_model_are_not_exaggerated():
    """Its predictions under all conditions draw together late; what is left looks as if it had been asked for, not brighter."""
    world, draw = TinyPhotos(), torch.Generator().manual_seed(1000)
    noise, steering = torch.randn(8, *LATENT, generator=draw), SafeDenoiser(None, reference=world.reference)
    away = world.sample(noise, prompt("automobile or truck"), 2, safe=steering.safe, unwanted=prompt("truck"), neutral=prompt(None))
    asked = world.sample(noise, prompt("automobile"), 2)
    assert away.std() < 1.05 * asked.std(), "1.5 where r grows as if the model knew, 1.2 where no contrast is taken back"
    assert not (world.classes(world.decode(away)) == CLASSES.index("truck")).any()
