"""Baselines with a bank that stays in its file: read block by block, the same answers."""
import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser, load_bank, save_bank
from safe_denoiser.bank.lazy_latents import LazyLatents
from safe_denoiser.density import kernel, separability

N = 40


@pytest.fixture(params=["float32", "float16"])
def banks(tmp_path, request, monkeypatch):
    """The same bank in memory and in its file, blocks of 4 items, and how many items were read at a time."""
    read, reads = LazyLatents._read, []
    monkeypatch.setattr(kernel, "CACHED", 4 * 4 * 256)
    monkeypatch.setattr(separability, "BLOCK", 4 * 256)
    monkeypatch.setattr("safe_denoiser.bank.bank.BLOCK", 4 * 256)
    monkeypatch.setattr("safe_denoiser.bank.lazy_latents.BLOCK", 4 * 4 * 256)
    monkeypatch.setattr(LazyLatents, "_read", lambda self, first, last: reads.append(last - first) or read(self, first, last))
    bank = Bank(torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(getattr(torch, request.param)))
    save_bank(bank, tmp_path / "bank.safetensors")
    stored = load_bank(tmp_path / "bank.safetensors", memory=0)
    assert isinstance(stored.latents, LazyLatents)
    reads.clear()
    return bank, stored, reads


@pytest.mark.parametrize("method", ["spell", "sgf", "official", "official_sd3"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_bank_in_its_file_is_never_read_as_a_whole_and_answers_alike(banks, method, masked):
    *both, reads = banks
    x = both[0].latents[:3].float() + 0.3 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) > 2).float().expand(3, 1, 8, 8) if masked else None
    (wanted, told), (found, step) = (SafeDenoiser(bank, method=method).safe(x, 1.1 * x, 0.5, mask=mask) for bank in both)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.posterior, told.posterior, rtol=1e-4, atol=1e-6)
    assert torch.equal(step.nearest, told.nearest) and not torch.equal(wanted, 1.1 * x)
    assert sum(reads) >= N and max(reads) == 4
