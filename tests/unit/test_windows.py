"""Where the unwanted thing is a part of the picture: it is found in the bank, and only its place in a picture is corrected."""
import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser, load_bank, save_bank
from safe_denoiser.density.windows import choose, locate, windows
from safe_denoiser.prediction import Prediction

KINDS = 1.5 * torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(0))  # what a quarter of a picture shows; the last is unwanted
THING, QUARTERS = 6, [0, 2, 6, 8]  # its number, and the windows that are quarters, of the nine of 8 x 8 pictures


def scenes(kinds, seed):
    """Pictures (N, 2, 8, 8) whose quarters show these kinds (N, 4), none quite like another."""
    quarters = KINDS[kinds] + torch.randn(*kinds.shape, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    return quarters.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def bank_and_places(n, seed=1):
    """n pictures that show the thing once each, and in which quarter."""
    generator = torch.Generator().manual_seed(seed)
    kinds, place = torch.randint(6, (n, 4), generator=generator), torch.randint(4, (n,), generator=generator)
    kinds[torch.arange(n), place] = THING
    return Bank(scenes(kinds, seed)), place


@pytest.fixture
def reference():
    """What is made anyway; one quarter in ten shows the thing."""
    generator = torch.Generator().manual_seed(2)
    kinds, things = torch.randint(6, (100, 4), generator=generator), torch.rand(100, 4, generator=generator) < 0.1
    return Bank(scenes(kinds.masked_fill(things, THING), 2))


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("item", [(16, 8, 8), (4, 13, 9), (2, 40), (4, 3, 8, 6), (4, 2, 2)])
def test_windows_are_of_one_size_and_cover_the_picture(item, parts):
    places, seen = windows(item, parts), torch.zeros(1, *item)
    for place in places:
        seen[place] += 1
    assert (seen > 0).all() and len({torch.zeros(1, *item)[place].shape for place in places}) == 1
    assert len(set(map(str, places))) == len(places) <= (2 * parts - 1) ** 2
    sides = torch.zeros(item)[places[0]].shape[1:][-2:]
    assert list(sides) == [-(-side // parts) for side in item[1:][-2:]]


@pytest.mark.parametrize("n", [12, 60, 300])
def test_the_unwanted_part_is_found_in_each_picture(reference, n):
    bank, place = bank_and_places(n)
    found = locate(bank, reference, 2)
    right = torch.tensor(found.window) == torch.tensor(QUARTERS)[place]
    assert right.float().mean() > 0.95 and found.separation > locate(bank, reference, 1).separation + 0.1


def test_windows_are_chosen_only_where_they_tell_the_banks_apart_better(reference):
    assert choose(bank_and_places(60)[0], reference, None)[0] == 2
    same = scenes(torch.full((60, 4), THING), 3)  # the whole picture is the thing
    assert choose(Bank(same), reference, None) == [1]
    assert choose(Bank(scenes(torch.randint(7, (60, 4)), 4)), reference, None) == [1], "nothing to tell"
    assert choose(bank_and_places(3)[0], reference, None) == [1], "too few to judge"
    assert choose(Bank(same), reference, 3)[0] == 3 and choose(bank_and_places(60)[0], reference, 1) == [1], "as given"


@pytest.mark.parametrize("other", ["reference", "retain"])
def test_only_the_place_of_the_thing_is_corrected(reference, other):
    bank, _ = bank_and_places(60)
    denoised = scenes(torch.tensor([[0, 1, THING, 2], [3, 4, 5, 0]]), 5)
    x = denoised + 0.5 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(6))
    keep = reference if other == "reference" else Bank(scenes(torch.randint(6, (100, 4), generator=torch.Generator().manual_seed(7)), 7))
    denoiser = SafeDenoiser(bank, **{other: keep})
    assert len(denoiser.inside) == 9, "found by itself"
    safe_denoised, step = denoiser.safe(x, denoised, 0.5)
    moved = (safe_denoised - denoised).unflatten(3, (2, 4)).unflatten(2, (2, 4)).square().sum((1, 3, 5)).sqrt()  # (2, 2, 2)
    assert step.posterior[0] > 0.5 > 0.1 > step.posterior[1]
    assert moved[0, 1, 0] > 5 * moved[0, 0].max() and moved[0, 1, 0] > 5 * moved[0, 1, 1] and moved[0, 1, 0] > 20 * moved[1].max()
    whole = SafeDenoiser(bank, parts=1, **{other: keep}).safe(x, denoised, 0.5)[0] - denoised
    assert whole[0, :, :4].square().sum() > moved[0, 0].square().sum(), "whole pictures move what stands beside it"


def test_each_window_is_corrected_as_a_picture_of_its_own_and_overlaps_are_weighed_by_r(reference):
    bank, x, denoised = bank_and_places(20)[0], *torch.randn(2, 3, 2, 8, 8)
    denoiser, sigma = SafeDenoiser(bank, reference=reference, parts=2), torch.full((3,), 0.7)
    total, weight = torch.zeros(2, 3, 2, 8, 8)
    for place, inside, memory in denoiser.inside:
        assert inside.view.bank.latents.shape == (20, 2, 4, 4) and inside.view.reference.latents.shape == (100, 2, 4, 4)
        crop = inside.correct(Prediction(x[place].flatten(1), denoised[place].flatten(1), sigma, torch.ones(3)), memory)
        total[place] += crop.posterior[:, None, None, None] * crop.direction.view(3, 2, 4, 4)
        weight[place] += crop.posterior[:, None, None, None]
    torch.testing.assert_close(denoiser.safe(x, denoised, 0.7)[0], denoised + total / weight)


def test_what_is_given_moves_nothing(reference):
    """Inpainting: a window that holds nothing to sample does not count, one that is sampled counts as ever."""
    denoiser = SafeDenoiser(bank_and_places(60)[0], reference=reference)
    denoised = scenes(torch.tensor([[0, 1, THING, 2]]), 5)
    x = denoised + 0.5 * torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(6))
    mask = torch.ones(1, 1, 8, 8)
    everything, step = denoiser.safe(x, denoised, 0.5, mask=mask)
    torch.testing.assert_close(everything, denoiser.safe(x, denoised, 0.5)[0])
    mask[..., 4:, :4] = 0
    given, masked = denoiser.safe(x, denoised, 0.5, mask=mask)
    assert step.posterior > 0.5 > 0.2 > masked.posterior and (given - denoised)[..., 4:, 4:].norm() < 0.1 * (everything - denoised).norm()
    mask = 1 - mask
    torch.testing.assert_close(denoiser.safe(x, denoised, 0.5, mask=mask)[0][..., 4:, :4], everything[..., 4:, :4], rtol=0.05, atol=0.05)


def test_what_does_not_compare_banks_has_no_windows(reference):
    bank = bank_and_places(60)[0]
    assert not SafeDenoiser(bank, retain=reference, semantic=lambda latents, s: s).inside
    assert not SafeDenoiser(bank, reference=reference, weight="tracked").inside and not SafeDenoiser(bank, method="spell").inside
    assert not SafeDenoiser(bank).inside


def test_what_was_found_is_remembered_for_all_banks_that_hold_the_same(reference, tmp_path, monkeypatch):
    bank = bank_and_places(60)[0]
    first = SafeDenoiser(bank, reference=reference)
    shown, temperature = (first.inside[0][1].view.bank.latents, first.inside[0][1].view.densities.temperature)
    gate = SafeDenoiser(bank, weight="gate").view.densities.calibration
    save_bank(bank, tmp_path / "bank.safetensors")
    for name in ("rules.bank_view.choose", "density.densities.temperature_for", "density.densities.calibrate"):
        monkeypatch.setattr(f"safe_denoiser.{name}", lambda *args: pytest.fail("calibrated again"))
    for again in (bank.to(dtype=torch.float32).map(lambda y: y), load_bank(tmp_path / "bank.safetensors")):
        second = SafeDenoiser(again, reference=reference)
        assert torch.equal(second.inside[0][1].view.bank.latents, shown) and shown.shape == (60, 2, 4, 4)
        torch.testing.assert_close(SafeDenoiser(again, weight="gate").view.densities.calibration.level, gate.level)
    with pytest.raises(pytest.fail.Exception, match="calibrated again"):
        assert SafeDenoiser(bank.map(lambda y: 2 * y), weight="gate").view.densities.calibration, "in another space"
    assert temperature > 1
