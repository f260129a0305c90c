"""Extreme numbers: finite or refused, rows that are well are not touched by those that are not, and what is finite is right."""
import math

import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser, index_bank
from safe_denoiser.density.kernel import posterior

SHAPE = (2, 4, 4)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BANKS = {"usual": draw(12, *SHAPE), "one item": draw(1, *SHAPE), "two items": draw(2, *SHAPE),
         "identical items": draw(1, *SHAPE).expand(9, *SHAPE),
         "zeros": torch.zeros(9, *SHAPE), "huge": draw(12, *SHAPE, scale=1e15), "tiny": draw(12, *SHAPE, scale=1e-20),
         "huge and tiny": torch.cat([draw(6, *SHAPE, scale=1e12), draw(6, *SHAPE, scale=1e-12)]),
         "half": draw(12, *SHAPE, scale=1e4).half()}
WAYS = {"gate": {}, "evidence": dict(reference=True), "retain": dict(retain=True), "both": dict(reference=True, retain=True),
        "gaussian": dict(reference=True, weight="gaussian"), "by parts": dict(reference=True, parts=2), "tracked": dict(weight="tracked"),
        "triangle": dict(weight="triangle"), "constant": dict(weight="constant"), "ratio_beta": dict(reference=True, weight="ratio_beta"),
        "unconditional": dict(weight="unconditional"), "witness": dict(reference=True), "witness alone": dict(bank=False),
        "spell": dict(method="spell"), "sgf": dict(method="sgf"), "official": dict(method="official"),
        "official_sd3": dict(method="official_sd3")}
LEVELS = [(0.0, 1.0), (1e-8, 1.0), (1e-3, 0.999), (1.0, 0.0), (1.0, 1e-9), (14.6, 1.0), (1e4, 1.0), (1e8, 1.0)]


def made(way, bank, other=None):
    settings = dict(WAYS[way])
    other = Bank(draw(10, *SHAPE, seed=5) if other is None else other)
    for name in ("reference", "retain"):
        if settings.get(name):
            settings[name] = other
    return SafeDenoiser(bank if settings.pop("bank", True) else None, **settings)


def guides(way, x, seed=3):
    named = {"witness": ("unwanted", "unconditional", "conditional"), "witness alone": ("unwanted", "neutral"),
             "unconditional": ("unconditional", "conditional"), "evidence": ("unconditional", "conditional")}.get(way, ())
    return {name: draw(*x.shape, seed=seed + i) for i, name in enumerate(named)}


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("way", WAYS)
def test_every_level_and_every_bank_gives_numbers(way, bank):
    """A row is corrected by a finite amount, or left as it was and counted as that."""
    denoiser = made(way, Bank(BANKS[bank]))
    for sigma, alpha in LEVELS:
        for scale in (1.0, 1e-20, 1e15):
            x, denoised = draw(3, *SHAPE, seed=1, scale=scale), draw(3, *SHAPE, seed=2, scale=scale)
            safe, step = denoiser.safe(x, denoised, sigma, alpha, **guides(way, x))
            assert safe.isfinite().all() and step.posterior.isfinite().all() and step.correction.isfinite().all(), (sigma, alpha, scale)
            assert (step.active | step.fallback | (sigma == 0)).all() and torch.equal(safe[~step.active], denoised[~step.active])
            denoiser.forget()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "denoised", "both", "guides"])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_is_no_number_leaves_the_others_alone(way, where, bad):
    x, denoised = draw(3, *SHAPE, seed=1), draw(3, *SHAPE, seed=2)
    told = guides(way, x)
    wanted = [made(way, Bank(BANKS["usual"])).safe(x[row], denoised[row], 1.0, **{name: one[row] for name, one in told.items()})[0]
              for row in (slice(0, 1), slice(2, 3))]
    x, denoised, told = x.clone(), denoised.clone(), {name: one.clone() for name, one in told.items()}
    for one in {"x": [x], "denoised": [denoised], "both": [x, denoised], "guides": [*told.values()]}[where]:
        one[1, 0, 1, 1] = bad
    for bank in (Bank(BANKS["usual"]), index_bank(Bank(BANKS["usual"]), 3)):
        denoiser = made(way, bank)
        for _ in range(2):  # and what is remembered of it is not taken for another's
            safe, step = denoiser.safe(x, denoised, 1.0, **told)
            for row, one in zip((0, 2), wanted):
                torch.testing.assert_close(safe[row:row + 1], one, rtol=1e-4, atol=1e-5)
            assert torch.equal(safe[1].isfinite(), denoised[1].isfinite()), "its own comes back, or something finite"
            denoiser.forget()


@pytest.mark.parametrize("setting, values", {
    "strength": [math.nan, math.inf, -math.inf], "sigma_start": [math.nan, -1.0], "sigma_end": [math.nan, -1.0],
    "prior": [math.nan, 0.0, 1.0, -0.5, 2.0], "evidence": [math.nan, -1.0, math.inf], "bandwidth": [math.nan, -1.0, math.inf],
    "temperature": [math.nan, 0.0, -1.0, math.inf], "posterior_max": [math.nan, 0.0, 1.0, 2.0], "beta_max": [math.nan, -1.0],
    "radius": [math.nan, -1.0], "threshold": [math.nan, -1e-9], "parts": [0, -1, 65],
}.items())
def test_settings_out_of_range_are_refused_by_name(setting, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{setting} is "):
            SafeDenoiser(Bank(BANKS["usual"]), reference=Bank(BANKS["usual"]), **{setting: value})


EXTREMES = {"strength": [-1e6, 1e6], "evidence": [0.0, 1e6], "bandwidth": [0.0, 1e-12, 1e30], "temperature": [1e-6, 1e30],
            "prior": [1e-12, 1 - 1e-15], "posterior_max": [1e-12, 1 - 1e-15], "beta_max": [0.0, 1e6], "radius": [0.0, 1e30, math.inf],
            "threshold": [0.0, 1e300, math.inf]}


@pytest.mark.parametrize("setting", EXTREMES)
@pytest.mark.parametrize("way", WAYS)
def test_settings_at_the_ends_of_their_ranges_give_numbers(way, setting):
    from dataclasses import replace

    x, denoised = draw(2, *SHAPE, seed=1), draw(2, *SHAPE, seed=2)
    for value in EXTREMES[setting]:
        denoiser = replace(made(way, Bank(BANKS["usual"])), **{setting: value}, memory={})
        for sigma, alpha in ((1.0, 1.0), (0.01, 0.99), (1.0, 0.0)):
            safe, step = denoiser.safe(x, denoised, sigma, alpha, **guides(way, x))
            assert safe.isfinite().all() and step.posterior.isfinite().all(), (value, sigma)


def brute_force(x, y, sigma, alpha, h, temperature):
    """The formula of `posterior`, item by item in float64."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    s2 = alpha**2 * h**2 + sigma**2
    logits = -((x[:, None] - alpha * y[None]) ** 2).sum(2) / (2 * temperature * s2) - math.log(len(y))
    weights = logits.softmax(1)
    mean = (sigma**2 * (weights @ y) + alpha * h**2 * x) / s2
    return mean.float(), weights.float(), logits.logsumexp(1).float()


@pytest.mark.parametrize("sigma, alpha", [(1e-3, 1.0), (0.1, 0.9), (1.0, 1.0), (14.6, 1.0), (1e4, 1.0), (0.999, 1e-3), (1.0, 0.0)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("near", [True, False])
def test_the_posterior_is_that_of_float64(sigma, alpha, scale, near):
    """x near an item or anywhere, latents of any size: single precision loses nothing that counts."""
    y = draw(20, *SHAPE, scale=scale)
    x = (alpha * y[:3] if near else 0) + sigma * draw(3, *SHAPE, seed=1)
    h = 0.4 * float(y.std())
    for temperature in (1.0, 50.0):
        found = posterior(x, y, sigma, alpha, h, temperature)
        mean, weights, density = brute_force(x, y, sigma, alpha, h, temperature)
        torch.testing.assert_close(found.mean.flatten(1), mean, rtol=1e-3, atol=1e-3 * scale)
        torch.testing.assert_close(found.weights, weights, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found.log_density, density, rtol=1e-3, atol=5e-2)


def test_the_distance_between_neighbours_of_a_large_bank_takes_no_table_of_all_pairs():
    from benchmarks.step_cost import Allocations
    from safe_denoiser.density.densities import SAMPLE
    from safe_denoiser.density.separability import between_neighbours

    small, large = draw(SAMPLE, 24), draw(20_000, 24, seed=1)
    every = torch.cdist(small.double(), small.double()).fill_diagonal_(math.inf).amin(1).median()
    assert abs(between_neighbours(small) - float(every)) < 1e-4
    with Allocations() as counted:
        found = between_neighbours(large)
    assert counted.peak < 60e6, "all pairs are 1.6 GB"
    some = torch.cdist(large[:300].double(), large.double())
    assert abs(found / float(some.masked_fill_(some < 1e-4, math.inf).amin(1).median()) - 1) < 0.05
