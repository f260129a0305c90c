"""Masks: what lies outside must neither count nor change."""
import math
from dataclasses import replace

import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser

SHAPE = (4, 6, 8)
CHOICES = {
    "evidence": {"weight": "evidence"}, "evidence, retain": {"weight": "evidence"}, "gaussian": {"weight": "gaussian"},
    "retain": {"weight": "retain"}, "gate": {"weight": "gate"}, "spell": {"method": "spell"},
    "official": {"method": "official", "threshold": 0.0}, "official_sd3": {"method": "official_sd3", "threshold": 0.0},
}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser(choice, bank, retain, reference, **settings):
    banks = {"evidence": dict(reference=reference), "gaussian": dict(reference=reference),
             "evidence, retain": dict(reference=reference, retain=retain),
             "retain": dict(retain=retain)}.get(choice, {})
    return SafeDenoiser(bank, **CHOICES[choice], **banks, bandwidth=0.5, temperature=3.0, **settings)


def banks(*select):
    return [Bank(draw(seed, 12, *SHAPE)[select]) for seed in (1, 2, 3)]


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "gate"])
def test_inside_a_mask_is_as_if_nothing_else_existed(choice):
    """The last three columns as a mask, and as latents of that size."""
    x, denoised = draw(4, 3, *SHAPE), draw(5, 3, *SHAPE)
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., 5:] = 1
    safe, step = denoiser(choice, *banks()).safe(x, denoised, 0.8, 0.7, mask)
    alone, other = denoiser(choice, *banks(..., slice(5, None))).safe(x[..., 5:], denoised[..., 5:], 0.8, 0.7)
    torch.testing.assert_close(safe[..., 5:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.posterior, other.posterior, rtol=1e-4, atol=1e-5)
    assert torch.equal(step.nearest, other.nearest)
    assert torch.equal(safe[..., :5], denoised[..., :5]) and not torch.equal(safe[..., 5:], denoised[..., 5:])


@pytest.mark.parametrize("choice", CHOICES)
def test_what_lies_outside_does_not_count(choice):
    x, denoised = draw(4, 3, *SHAPE), draw(5, 3, *SHAPE)
    mask = (draw(6, 3, 1, 6, 8) > 0).float()
    safe, step = denoiser(choice, *banks()).safe(x, denoised, 0.8, 0.7, mask)
    elsewhere = [draw(seed, 3, *SHAPE) * (1 - mask) * 50 for seed in (7, 8)]
    again, other = denoiser(choice, *banks()).safe(x + elsewhere[0], denoised + elsewhere[1], 0.8, 0.7, mask)
    torch.testing.assert_close((again - denoised) * mask, (safe - denoised) * mask, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step.posterior, other.posterior, rtol=1e-4, atol=1e-5)
    assert torch.equal(again * (1 - mask), (denoised + elsewhere[1]) * (1 - mask))


@pytest.mark.parametrize("choice", CHOICES)
def test_rows_of_different_masks_are_as_by_themselves(choice):
    """Two rows share a mask, one is all sampled, one not at all; in an order that the grouping changes."""
    x, denoised = draw(4, 4, *SHAPE), draw(5, 4, *SHAPE)
    some = (draw(6, 1, 6, 8) > 0).float()
    mask = torch.stack([torch.ones_like(some), some, torch.zeros_like(some), some])
    safe, step = denoiser(choice, *banks()).safe(x, denoised, torch.tensor([0.9, 0.5, 0.7, 0.2]), 0.7, mask)
    for row, sigma in enumerate((0.9, 0.5, 0.7, 0.2)):
        alone, one = denoiser(choice, *banks()).safe(x[row:row + 1], denoised[row:row + 1], sigma, 0.7, mask[row:row + 1])
        torch.testing.assert_close(safe[row:row + 1], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.posterior[row:row + 1], one.posterior, rtol=1e-4, atol=1e-5)
    assert torch.equal(safe[2], denoised[2]) and not step.fallback.any()
    whole, _ = denoiser(choice, *banks()).safe(x[:1], denoised[:1], 0.9, 0.7)
    torch.testing.assert_close(safe[:1], whole, rtol=1e-4, atol=1e-5)


def test_a_grey_mask_weighs_distances_closed_form():
    """One item each: log p_u - log p_retain = [sum m (x - a y_r)^2 - sum m (x - a y_u)^2] / (2 T s^2); the step is r (y_r - y_u)."""
    x, denoised, unsafe, kept = (draw(seed, 1, *SHAPE).double() for seed in range(4))
    mask, sigma, alpha, temperature = torch.rand(1, 1, 6, 8, generator=torch.Generator().manual_seed(9)).double(), 0.8, 0.7, 5.0
    far = [(mask * (x - alpha * y).square()).sum() for y in (unsafe, kept)]
    r = torch.sigmoid(math.log(0.3 / 0.7) + (far[1] - far[0]) / (2 * temperature * sigma**2))
    safe, step = SafeDenoiser(Bank(unsafe), retain=Bank(kept), prior=0.3, evidence=0.0, bandwidth=0.0,
                              temperature=temperature).safe(x, denoised, sigma, alpha, mask)
    torch.testing.assert_close(step.posterior, r[None])
    torch.testing.assert_close(safe, denoised + r * (kept - unsafe))


def test_the_temperature_counts_what_is_sampled():
    half = torch.zeros(4, 6, 8)
    half[..., 4:] = 1
    whole = SafeDenoiser(Bank(draw(1, 12, 32, 6, 8)))
    inside = whole.view.masked(half.repeat(8, 1, 1).flatten())
    assert inside.densities.bandwidth == whole.view.densities.bandwidth
    assert 0.4 < inside.densities.temperature / whole.view.densities.temperature < 0.8, "half as many numbers, so distances half as long"


def test_each_frame_of_a_video_has_its_own_mask():
    """A bank of pictures against two videos; only frame 1 of the second is sampled."""
    x, denoised = draw(4, 2, 4, 3, 6, 8), draw(5, 2, 4, 3, 6, 8)
    mask = torch.zeros(2, 1, 3, 1, 1)
    mask[1, :, 1] = 1
    safe, step = denoiser("evidence", *banks()).safe(x, denoised, 0.8, 0.7, mask)
    alone, _ = denoiser("evidence", *banks()).safe(x[1:, :, 1], denoised[1:, :, 1], 0.8, 0.7)
    torch.testing.assert_close(safe[1:, :, 1], alone, rtol=1e-4, atol=1e-5)
    assert len(step.sigma) == 6 and (safe != denoised).any(dim=(1, 3, 4)).tolist() == [[False] * 3, [False, True, False]]


def test_strength_0_is_off_and_a_new_mask_is_seen():
    x, denoised, masks = draw(4, 1, *SHAPE), draw(5, 1, *SHAPE), [(draw(s, 1, 1, 6, 8) > 0).float() for s in (1, 2)]
    one = denoiser("evidence", *banks())
    assert replace(one, strength=0.0).safe(x, denoised, 0.8, 0.7, masks[0]) == (denoised, None)
    for mask in (*masks, masks[0]):
        fresh, _ = denoiser("evidence", *banks()).safe(x, denoised, 0.8, 0.7, mask)
        assert torch.equal(one.safe(x, denoised, 0.8, 0.7, mask)[0], fresh)
