"""Number formats and devices: computed in single precision on the device of x, given back as `denoised` came."""
import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CHOICES = {
    "evidence": dict(reference=True), "retain": dict(retain=True), "unconditional": dict(), "ratio_beta": dict(reference=True),
    "gate": dict(), "triangle": dict(), "tracked": dict(), "constant": dict(),
}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correct(device, stored, dtype, masked=False, **settings):
    """One correction with banks stored in one format and the prediction in another; on the device that is asked for."""
    banks = {name: Bank(draw(seed, 10, 4, 6, 6).to(device, stored)) for seed, name in enumerate(("bank", "reference", "retain"))}
    for name in ("reference", "retain"):
        if not settings.pop(name, False):
            del banks[name]
    x, denoised, empty = (draw(seed, 3, 4, 6, 6).to(device) for seed in (4, 5, 6))
    mask = (draw(7, 3, 1, 6, 6) > 0).float().to(device) if masked else None
    sigma = torch.tensor([0.9, 0.5, 0.2], device=device)
    return SafeDenoiser(**banks, **settings).safe(x, denoised.to(dtype), sigma, 1 - sigma, mask, empty)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("choice", [*CHOICES, "spell", "sgf", "official", "official_sd3"])
def test_every_format_on_every_device(choice, device, dtype, masked):
    """Halved formats move the answer by no more than their own rounding; the CPU in single precision is the measure."""
    settings = dict(weight=choice, **CHOICES[choice]) if choice in CHOICES else dict(method=choice, threshold=0.0, radius=20.0)
    wanted, _ = correct("cpu", torch.float32, torch.float32, masked, **settings)
    for stored in (torch.float32, torch.float16):
        safe, step = correct(device, stored, dtype, masked, **settings)
        assert safe.dtype == dtype and safe.device.type == device and not step.fallback.any()
        assert {value.device.type for value in vars(step).values()} == {device}
        assert (safe.float().cpu() - wanted).norm() < (0.03 if dtype == torch.bfloat16 else 0.01) * wanted.norm()
