import math
import time

import pytest
import torch

from safe_denoiser import Bank, posterior
from safe_denoiser.density import calibration
from safe_denoiser.density.calibration import _Noised, calibrate, temperature_for
from safe_denoiser.telling import listening


@pytest.fixture
def bank():
    return Bank(torch.randn(30, 4, 3, 3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("s", [0.05, 0.7, 5.0])
def test_curves_equal_a_loop_over_left_out_items(bank, s):
    """Gram matrices give what noising each item and asking `posterior` of the others gives."""
    h, t = 0.4, 3.0
    noised = _Noised(bank)
    eps = torch.randn(128, 36, generator=torch.Generator().manual_seed(0))
    logits = noised.logits(s, h, t)
    errors = noised.errors(logits.softmax(1), s, h)
    for draw in (0, 17, 90):
        item = int(noised.items[draw])
        others = [i for i in range(30) if i != item]
        y = bank.latents.flatten(1)[item]
        told = posterior((y + s * eps[draw])[None], bank.latents.flatten(1)[others], s, 1.0, h, t)
        torch.testing.assert_close(logits[draw].logsumexp(0), told.log_density[0] + math.log(29 / 30), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(errors[draw], (told.mean[0] - y).square().sum(), rtol=1e-3, atol=1e-2)


def test_temperature_hits_the_perplexity(bank):
    for wanted in (2.0, 8.0, 25.0):
        t = temperature_for(bank, 0.4, wanted)
        noised, s = _Noised(bank), float(bank.latents.std(correction=0))
        weights = noised.logits(s, 0.4, t).softmax(1)
        assert torch.special.entr(weights).sum(1).exp().mean() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 200])
def test_any_size_of_bank_calibrates(n):
    curves = calibrate(Bank(torch.randn(n, 4, 4, 4)), 0.4, 4.0)
    assert all(torch.isfinite(curve).all() for curve in (curves.level, curves.spread, curves.reach, curves.trace))
    level, spread, reach, trace = curves.at(torch.tensor([1e-9, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.isfinite(level).all() and level.shape == (3,)


def test_it_is_deterministic_and_fast():
    """Under a second for 500 pictures at 4 x 64 x 64 on two cores; the bound leaves room for a busy machine."""
    bank, state = Bank(torch.randn(500, 4, 64, 64)), torch.get_rng_state()
    began = time.perf_counter()
    t = temperature_for(bank, 0.4, 100.0)
    first = calibrate(bank, 0.4, t)
    assert time.perf_counter() - began < 4
    assert torch.equal(first.level, calibrate(bank, 0.4, t).level) and torch.equal(state, torch.get_rng_state())


def test_it_tells_how_far_it_is_and_stops_where_the_listener_raises(bank, monkeypatch):
    whole = _Noised(bank)
    monkeypatch.setattr(calibration, "PART", 300)  # 10 of 36 columns
    monkeypatch.setattr(calibration, "ROWS", 7)
    told = []
    with listening(lambda *told_now: told.append(told_now)):
        parts = _Noised(bank)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] and torch.equal(parts.gram, parts.gram.T)
    torch.testing.assert_close(parts.gram, whole.gram), torch.testing.assert_close(parts.cross, whole.cross)

    def raising(done, total):
        told.append(done)
        raise InterruptedError

    for measure in (lambda: temperature_for(bank, 0.4, 4.0), lambda: calibrate(bank, 0.4, 4.0)):
        told.clear()
        with pytest.raises(InterruptedError), listening(raising):
            measure()
        assert told == [1]
    assert temperature_for(bank, 0.4, 4.0) > 0 and told == [1], "nobody listens any more"
