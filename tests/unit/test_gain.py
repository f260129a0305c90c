"""A condition learned from pictures, and how it is measured, in the tiny digit world."""
import pytest
import torch

from benchmarks.digits import bank, data
from safe_denoiser.condition.gain import Check, Gain, Probe, together
from safe_denoiser.condition.gain_plot import plot
from safe_denoiser.condition.learn import EVERY, PATIENCE, Learning, Schedule
from tiny_digits.world import TinyDigits, prompt, reference_bank

EMPTY = [prompt(None)]


@pytest.fixture(scope="module")
def world():
    return TinyDigits()


def held_out(world, count=40):
    latents, labels = data()[:2]
    return Probe(world, latents[labels == 7][-count:], EMPTY, batch=200, seed=9)


@pytest.mark.parametrize("count, share", ((150, 0.9), (50, 0.9), (15, 0.85)))
def test_what_is_learned_is_as_good_as_the_label(world, count, share):
    """On sevens that were not among the pictures, as a share of what the label gains."""
    learned = Learning(world, bank(7, count=count).latents, EMPTY).run()
    found, label = held_out(world).gain(learned.condition), held_out(world).gain([prompt("7")])
    assert found.mean > share * label.mean > 0.1
    assert abs(learned.gain.mean - found.mean) < 3 * (learned.gain.error + found.error), "what it says of itself holds on others"


@pytest.mark.parametrize("count", (60, 12))
def test_it_stops_where_nothing_more_is_gained(world, count):
    learned = Learning(world, bank(7, count=count).latents, EMPTY, schedule=Schedule(steps=2000))
    found = learned.run(seconds=40)
    assert learned.finished and learned.runs[0].done == found.steps + EVERY * PATIENCE
    assert found.curve[0][0] == 0 and found.gain.mean == max(gain for _, gain in found.curve)


def test_stopped_at_any_call_and_gone_on_with_it_is_the_same_tensor(world):
    def learning():
        return Learning(world, bank(7, count=12).latents, EMPTY, schedule=Schedule(steps=12))

    class Stop(Exception):
        pass

    calls = []
    whole = learning().run(tell=lambda *_: calls.append(0)).condition[0]
    for at in (1, 7, len(calls) - 1, len(calls)):
        first, left = learning(), [at]

        def tell(*_, left=left):
            left[0] -= 1
            if not left[0]:
                raise Stop

        with pytest.raises(Stop):
            first.run(tell=tell)
        second = learning()
        second.resume(first.state())
        assert torch.equal(second.run().condition[0], whole), at


def test_one_picture_is_refused(world):
    with pytest.raises(ValueError, match="too few"):
        Learning(world, bank(7, count=1).latents, EMPTY)


def gain_of(*pictures):
    """What each picture's error of 1 becomes, at each level."""
    after = torch.tensor([pictures]).repeat(5, 1)
    return Gain(torch.ones_like(after), after, (1 - after).abs())


@pytest.mark.parametrize("set_, others, kind", [
    (gain_of(*[0.8] * 16), gain_of(*[1.1] * 16), "clearly"), (gain_of(*[0.8] * 16), None, "clearly"),
    (gain_of(*[0.8] * 16), gain_of(*[0.95] * 8, *[1.2] * 8), "broadly"),
    (gain_of(*[0.8] * 8, *[1.1] * 8), gain_of(*[1.1] * 16), "partly"),
    (gain_of(*[1.1] * 16), gain_of(*[0.8] * 16), "no"), (gain_of(*[1.1] * 16), gain_of(*[1.1] * 16), "no"),
    (gain_of(*[0.8] * 16), gain_of(*[0.81, 0.79] * 8), "no"), (gain_of(*[1.0] * 16), gain_of(*[1.0] * 16), "no"),
])
def test_the_verdict(set_, others, kind):
    check = Check(set_, others)
    assert check.kind == kind and check.sentence.startswith("the condition explains your pictures: ")
    assert plot(check, [(0, 0.0), (10, 0.1)]).size == (720, 300)


def test_the_share_is_the_pictures_and_not_their_noises():
    """All pictures gain a little, and at each level noise five times as large hides it from the signs; or half of them gain, half lose."""
    draw = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(5, 400, generator=draw)
    little = Gain(torch.ones(5, 400), 0.98 + noise, torch.ones(5, 400))
    halves = Gain(torch.ones(5, 400), 1 + 0.2 * torch.tensor([1, -1]).repeat(200) + noise, torch.ones(5, 400))
    assert float((little.by_picture > 0).float().mean()) < 0.75 and little.share > 0.85
    assert halves.share == pytest.approx(0.5, abs=0.05)


def test_the_gain_is_its_formula(world):
    probe = held_out(world, 4)
    gain, label = probe.gain([prompt("7")]), prompt("7")
    x, sigma = world.noised(probe.y, torch.zeros_like(probe.y), torch.full((len(probe.y),), 0.5))
    assert torch.allclose(x, probe.y * (1 - sigma.view(-1, 1, 1, 1)))
    with torch.no_grad():
        zero, unwanted = world.predict(probe.x, probe.sigma, [EMPTY, [label]])
    z, u, a = (one.flatten(1).square().sum(1).view(5, 4) for one in (probe.y - zero, probe.y - unwanted, unwanted - zero))
    assert torch.allclose(gain.by_level, 1 - u.sum(1) / z.sum(1), atol=1e-4)
    dot = ((probe.y - zero) * (unwanted - zero)).flatten(1).sum(1).view(5, 4)
    assert torch.allclose(gain.scale, dot.sum(1) / a.sum(1), atol=1e-3)
    both = together([gain, gain])
    assert both.mean == pytest.approx(gain.mean) and both.error < gain.error


def test_swapped_and_right_conditions_are_told_apart(world):
    sevens, others = bank(7, count=16).latents, reference_bank().latents[:32]
    probes = [Probe(world, one, EMPTY, batch=200) for one in (sevens, others)]
    gains = {name: [probe.gain([prompt(name)]) for probe in probes] for name in ("7", "3")}
    assert Check(*gains["7"]).kind == "clearly" and Check(*gains["7"][::-1]).kind == "no" and Check(*gains["3"]).kind == "no"
