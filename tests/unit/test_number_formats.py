"""Every method and weight, with latents, predictions and banks of every number format: computed in single precision or better."""
import itertools

import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser
from safe_denoiser.denoiser import METHODS
from safe_denoiser.rules.settings import WEIGHTS

FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WAYS = [*(("safe_denoiser", weight, 1) for weight in WEIGHTS), *((method, "auto", 1) for method in METHODS if method != "safe_denoiser"),
        ("safe_denoiser", "auto", 2)]


def corrected(way, x_format, denoised_format, bank_format, other_format=None, mask=False, sigma_format=torch.float32):
    method, weight, parts = way
    draw = torch.Generator().manual_seed(0)
    x, denoised, *guides = (torch.randn(2, 4, 4, 4, generator=draw) for _ in range(6))
    banks = [torch.randn(40, 4, 4, 4, generator=draw) + shift for shift in (0.5, 0.0, -0.5)]
    other = other_format or bank_format
    unsafe, reference, retain = (Bank(y.to(one)) for y, one in zip(banks, (bank_format, other, other)))
    denoiser = SafeDenoiser(unsafe, method, weight=weight, reference=reference, retain=retain, parts=parts)
    names = ("unconditional", "conditional", "unwanted", "neutral")
    guides = {name: y.to(denoised_format) for name, y in zip(names, guides)}
    found = torch.full((2,), 2.0, dtype=sigma_format)
    for sigma in (found, found / 2):
        result, step = denoiser.safe(x.to(x_format), denoised.to(denoised_format), sigma, mask=torch.ones(1, 1, 4, 4) / 2 if mask else None,
                                     **guides)
    return result, step


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_all_number_formats(way, mask):
    wanted, told = corrected(way, torch.float32, torch.float32, torch.float32, mask=mask)
    for formats in itertools.product(FORMATS, FORMATS, FORMATS):
        found, step = corrected(way, *formats, mask=mask)
        assert found.dtype == formats[1] and not step.fallback.any() and step.active.all(), formats
        exact = all(one in (torch.float32, torch.float64) for one in formats)
        if exact:
            torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)
        assert bool(found.isfinite().all()) and (found.float() - wanted).norm() <= 0.1 * wanted.norm() + 1e-3, formats
    assert told is not None


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_banks_and_noise_levels_of_different_formats(way):
    for bank, other, sigma in itertools.product(FORMATS, FORMATS, (torch.float32, torch.float64)):
        for x in (torch.float32, torch.float64):
            found, step = corrected(way, x, x, bank, other, sigma_format=sigma)
            assert found.dtype == x and bool(found.isfinite().all()) and not step.fallback.any(), (bank, other, sigma, x)
