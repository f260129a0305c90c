"""Clusters of a bank: compressed banks, and a search that reads a part of the bank."""
import builtins
import json

import pytest
import torch

from safe_denoiser import Bank, SafeDenoiser, compress_bank, index_bank, load_bank, posterior, save_bank
from safe_denoiser.bank.lazy_latents import LazyLatents

SHAPE = (4, 24, 24)


def clustered(n=2000, clusters=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, *SHAPE, generator=generator)
    return Bank(centres.repeat_interleave(n // clusters, 0) + 0.3 * torch.randn(n, *SHAPE, generator=generator))


class Counted(LazyLatents):
    """Counts the items that are read."""

    def _read(self, first, last):
        self.reads = getattr(self, "reads", 0) + last - first
        return super()._read(first, last)


@pytest.fixture(scope="module")
def bank():
    return index_bank(clustered(), 40)


def test_prototypes_stand_for_their_members():
    bank = Bank(torch.cat([torch.zeros(3, 2, 2, 2), torch.ones(5, 2, 2, 2)]) + 0.01 * torch.randn(8, 2, 2, 2),
                tuple("abcdefgh"), {"space": "vae"}, torch.tensor([1.0, 1, 4, 1, 1, 1, 1, 1]))
    small = compress_bank(bank, 2)
    light, heavy = sorted(small.weights.tolist())
    assert len(small) == 2 and small.metadata["space"] == "vae" and [light, heavy] == pytest.approx([8 * 5 / 11, 8 * 6 / 11])
    order = small.latents.flatten(1).mean(1).argsort()
    torch.testing.assert_close(small.latents[order[0]], (bank.latents[:2].sum(0) + 4 * bank.latents[2]) / 6)
    torch.testing.assert_close(small.latents[order[1]], bank.latents[3:].mean(0))
    origin = json.loads(small.metadata["origin"])
    assert small.names == tuple(bank.names[i] for i in origin) and small.names[order[0]] in "abc" and small.names[order[1]] in "defgh"
    assert compress_bank(bank, 8) is bank and compress_bank(bank, 100) is bank
    with pytest.raises(ValueError, match="k is 0; a bank needs at least one prototype"):
        compress_bank(bank, 0)


def test_a_compressed_bank_says_nearly_what_the_whole_bank_says():
    """A hundred items to a cluster, and as many prototypes as clusters: E_u far from single items is the same."""
    bank = clustered()
    small = compress_bank(bank, 20)
    x = torch.randn(4, *SHAPE) * 3 + bank.latents[:4]
    whole, part = (posterior(x, one.latents, 3.0, 1.0, 0.4, 50.0, one.log_weights) for one in (bank, small))
    assert (whole.mean - part.mean).norm() < 0.05 * whole.mean.norm()
    assert compress_bank(bank, 20).latents.equal(small.latents), "deterministic"


def test_a_missing_library_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="need scikit-learn, which is not installed; run: pip install scikit-learn"):
        compress_bank(clustered(40, 4), 2)


@pytest.mark.parametrize("sigma, t", [(0.1, 1.0), (1.0, 1.0), (1.0, 20.0), (3.0, 1.0)])
def test_search_finds_the_weight_and_reads_little(bank, tmp_path, sigma, t):
    save_bank(bank, tmp_path / "bank.safetensors")
    loaded = load_bank(tmp_path / "bank.safetensors", memory=0)
    assert torch.equal(loaded.clusters.labels, bank.clusters.labels) and torch.equal(loaded.clusters.centres, bank.clusters.centres)
    stored, x = Counted(tmp_path / "bank.safetensors"), bank.latents[[3, 1900]] + sigma * torch.randn(2, *SHAPE)
    stored.reads = 0
    arguments = (sigma, 1.0, 0.4, t, bank.log_weights, bank.squared_norms)
    found, whole = posterior(x, stored, *arguments, search=loaded.clusters), posterior(x, bank.latents, *arguments)
    assert 0 < stored.reads < 0.3 * len(bank)
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.log_density, whole.log_density, rtol=1e-6, atol=1e-3)
    missed = torch.where(found.weights < 1e-12, whole.weights, 0).sum(1)
    assert (missed < 1e-3).all() and (found.omitted < 1e-3).all()


def test_where_everything_counts_everything_is_read(bank):
    x = 20 * torch.randn(2, *SHAPE)
    found, whole = (posterior(x, bank.latents, 20.0, 1.0, 0.4, 50.0, search=search) for search in (bank.clusters, None))
    assert torch.equal(found.mean, whole.mean) and torch.equal(found.weights, whole.weights)


def test_clusters_follow_their_bank_into_another_space_and_inside_a_mask(bank):
    moved = bank.map(lambda latents: 0.2 * latents + 1)
    torch.testing.assert_close(moved.clusters.centres, 0.2 * bank.clusters.centres + 1)
    assert bank.normalised().clusters is None and bank.sample(9).clusters is None
    assert bank.resized((12, 12)).clusters.centres.shape == (len(bank.clusters.centres), 4, 12, 12)
    plain = Bank(bank.latents)
    x, denoised, mask = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), (torch.rand(2, 1, 24, 24) > 0.5).float()
    reference = Bank(torch.randn(30, *SHAPE))
    for given in (None, mask):
        safe, other = (SafeDenoiser(one, reference=reference).safe(x, denoised, 0.3, mask=given)[0] for one in (bank, plain))
        torch.testing.assert_close(safe, other, rtol=1e-3, atol=1e-3)
