import math
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safe_denoiser import (
    Bank,
    LatentCache,
    NegationSet,
    SafeDenoiser,
    combine_sets,
    encode_bank,
    load_bank,
    merge_banks,
    posterior,
    save_bank,
)
from safe_denoiser.bank.encoding import fit_picture
from safe_denoiser.bank.lazy_latents import LazyLatents
from safe_denoiser.density import kernel


def encode(image):
    """A stand-in VAE: 8 x 8 pixel means, in 4 channels."""
    return torch.nn.functional.avg_pool2d(image.movedim(-1, 0), 8)[[0, 1, 2, 0]]


@pytest.fixture
def pictures():
    return NegationSet.from_images(torch.rand(5, 40, 56, 3, generator=torch.Generator().manual_seed(0)))


def test_round_trip(tmp_path):
    bank = Bank(torch.randn(3, 4, 2, 2).half(), ("a", "b", "ü"), {"space": "vae"}, torch.tensor([1.0, 2.0, 3.0]))
    save_bank(bank, tmp_path / "deep/er/bank.safetensors")
    read = load_bank(tmp_path / "deep/er/bank.safetensors")
    assert torch.equal(read.latents, bank.latents) and torch.equal(read.weights, bank.weights)
    assert (read.names, read.metadata) == (bank.names, bank.metadata)
    assert [file.name for file in (tmp_path / "deep/er").iterdir()] == ["bank.safetensors"], "no temporary file is left"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "bank.safetensors"
    save_bank(Bank(torch.zeros(1, 4, 2, 2)), path)

    def fails(tensors, file, metadata):
        raise KeyboardInterrupt

    monkeypatch.setattr("safe_denoiser.bank.file_format.save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        save_bank(Bank(torch.ones(1, 4, 2, 2)), path)
    assert not load_bank(path).latents.any() and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_bank_say_so(tmp_path):
    good, path = tmp_path / "good.safetensors", tmp_path / "x.safetensors"
    save_bank(Bank(torch.randn(9, 4, 8, 8)), good)
    with pytest.raises(FileNotFoundError, match="negation bank 'x.safetensors' does not exist"):
        load_bank(path)
    for cut in (0, 5, 200, good.stat().st_size - 10):
        path.write_bytes(good.read_bytes()[:cut])
        with pytest.raises(ValueError, match="'x.safetensors' is not a readable safetensors file .* truncated"):
            load_bank(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="'x.safetensors' cannot be used: it is a safetensors file but not a negation bank"):
        load_bank(path)
    save_file({"latents": torch.zeros(1, 4, 2, 2)}, path, {"format": "safe_denoiser.bank", "version": "99"})
    with pytest.raises(ValueError, match="version 99, this pack reads up to 1; update the pack"):
        load_bank(path)


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(0, 4, 2, 2),), r"need \(N, C, \*spatial\) with N >= 1"),
    ((torch.zeros(3),), r"need \(N, C, \*spatial\)"),
    ((torch.full((1, 4), torch.nan),), "NaN or infinity"),
    ((torch.zeros(2, 4), ("a",)), "2 latents but 1 names"),
    ((torch.zeros(2, 4), (), {}, torch.ones(3)), "need 2 positive numbers"),
    ((torch.zeros(2, 4), (), {}, torch.tensor([1.0, 0.0])), "need 2 positive numbers"),
])
def test_impossible_banks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Bank(*arguments)


def test_weights_are_normalised_and_equal_by_default():
    torch.testing.assert_close(Bank(torch.zeros(4, 1)).log_weights.exp(), torch.full((4,), 0.25))
    torch.testing.assert_close(Bank(torch.zeros(2, 1), weights=torch.tensor([1.0, 3.0])).log_weights.exp(), torch.tensor([0.25, 0.75]))


def test_merge(tmp_path):
    a, b = Bank(torch.zeros(2, 4, 2, 2), ("a", "b")), Bank(torch.ones(1, 4, 2, 2), ("c",), weights=torch.tensor([5.0]))
    merged = merge_banks([a, b])
    assert merged.names == ("a", "b", "c") and merged.latents.shape == (3, 4, 2, 2)
    torch.testing.assert_close(merged.weights, torch.ones(3))
    with pytest.raises(ValueError, match="banks hold latents of shapes"):
        merge_banks([a, Bank(torch.ones(1, 4, 3, 3))])
    with pytest.raises(ValueError, match="in spaces"):
        merge_banks([a, Bank(torch.ones(1, 4, 2, 2), metadata={"space": "vae"})])


def test_resized():
    bank = Bank(torch.randn(3, 16, 1, 4, 6).half(), weights=torch.ones(3))
    assert bank.resized((8, 8)).latents.shape == (3, 16, 1, 8, 8)
    assert bank.resized((8, 8)).latents.dtype == torch.float16 and bank.resized((8, 8)).weights is bank.weights
    constant = Bank(torch.full((1, 4, 4, 4), 3.0)).resized((7, 5)).latents
    torch.testing.assert_close(constant, torch.full((1, 4, 7, 5), 3.0))


def test_fit():
    picture = torch.zeros(10, 20, 3)
    picture[:, 10:] = 1  # left half black, right half white
    assert fit_picture(picture, (8, 8), "crop").shape == (8, 8, 3)
    assert fit_picture(picture, (8, 8), "stretch")[:, -1].min() > 0.9
    padded = fit_picture(picture, (8, 8), "pad")
    assert not padded[0].any() and not padded[-1].any() and padded[4, -1].min() > 0.9
    assert torch.equal(fit_picture(picture, (10, 20), "crop"), picture), "a picture of the right size is not resampled"
    assert fit_picture(torch.rand(3, 1000, 3), (64, 64), "pad").shape == (64, 64, 3)
    with pytest.raises(ValueError, match="fit is 'squash'; choose one of crop, pad, stretch"):
        fit_picture(picture, (8, 8), "squash")


def test_encode_one_at_a_time_with_progress(pictures):
    seen, calls = [], []

    def counted(image):
        calls.append(tuple(image.shape))
        return encode(image)

    bank = encode_bank(pictures, counted, (32, 48), progress=lambda *at: seen.append(at))
    assert bank.latents.shape == (5, 4, 4, 6) and bank.names == pictures.names
    assert calls == [(32, 48, 3)] * 5 and seen == [(i, 5) for i in range(1, 6)]


def test_a_second_build_encodes_nothing_and_a_change_encodes_only_that(pictures, tmp_path):
    calls = []

    def counted(image):
        calls.append(1)
        return encode(image)

    def build(negation_set=pictures, encoder="vae", size=(32, 32), fit="crop"):
        calls.clear()
        bank = encode_bank(negation_set, counted, size, fit, cache=LatentCache(tmp_path, encoder))
        return bank, len(calls)

    first, n = build()
    assert n == 5
    again, n = build()
    assert n == 0 and torch.equal(again.latents, first.latents)
    more = NegationSet.from_images([*pictures, torch.rand(9, 9, 3)])
    assert build(more)[1] == 1
    assert build(encoder="other vae")[1] == build(size=(64, 32))[1] == build(fit="pad")[1] == 5
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert build()[1] == 5 and build()[1] == 0


def test_an_interrupt_keeps_what_was_encoded(pictures, tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done, total):
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        encode_bank(pictures, encode, (32, 32), progress=stop, cache=LatentCache(tmp_path, "vae"))
    calls = []
    encode_bank(pictures, lambda image: calls.append(1) or encode(image), (32, 32), cache=LatentCache(tmp_path, "vae"))
    assert len(calls) == 2


def test_two_builds_at_once_share_the_cache(pictures, tmp_path):
    banks = []
    threads = [threading.Thread(target=lambda: banks.append(encode_bank(pictures, encode, (32, 32), cache=LatentCache(tmp_path, "vae"))))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(banks) == 4 and all(torch.equal(bank.latents, banks[0].latents) for bank in banks)
    assert not list(tmp_path.glob("*.tmp"))


def test_weights_of_a_combined_set_reach_the_bank(pictures):
    both = combine_sets([pictures, NegationSet.from_images(torch.rand(2, 32, 32, 3))], [1, 3])
    bank = encode_bank(both, encode, (32, 32))
    assert bank.weights.tolist() == [1] * 5 + [3] * 2
    torch.testing.assert_close(bank.log_weights.exp(), torch.tensor([1.0] * 5 + [3.0] * 2) / 11)
    assert encode_bank(pictures, encode, (32, 32)).weights is None


def test_a_saved_bank_is_a_set(pictures):
    bank = encode_bank(pictures, encode, (32, 32))

    def refuse(image):
        raise AssertionError("latents are not encoded")

    negation_set = NegationSet.from_latents(bank.latents, bank.names)
    again = encode_bank(negation_set, refuse, (32, 32))
    assert torch.equal(again.latents, bank.latents) and again.names == bank.names
    mixed = encode_bank(combine_sets([negation_set, pictures]), encode, (32, 32))
    assert torch.equal(mixed.latents, torch.cat([bank.latents] * 2))
    with pytest.raises(ValueError, match=r"the set mixes latents of shapes \[\(4, 4, 4\), \(4, 8, 8\)\]; a saved bank can be combined"):
        encode_bank(combine_sets([negation_set, pictures]), encode, (64, 64))


@pytest.fixture
def large(tmp_path):
    """A bank in memory, and the same bank left in its file."""
    bank = Bank(torch.randn(300, 4, 16, 16, generator=torch.Generator().manual_seed(3)).half(), weights=torch.rand(300) + 0.5)
    save_bank(bank, tmp_path / "bank.safetensors")
    stored = load_bank(tmp_path / "bank.safetensors", memory=1000)
    assert isinstance(stored.latents, LazyLatents) and isinstance(load_bank(tmp_path / "bank.safetensors").latents, torch.Tensor)
    return bank, stored


def test_a_bank_that_stays_in_its_file_is_the_same_bank(large):
    bank, stored = large
    assert len(stored) == 300 and stored.latents.shape == bank.latents.shape and stored.latents.dtype == torch.float16
    for key in (slice(None), slice(7, 9), slice(290, 400), slice(5, 5), torch.tensor([299, 0, 4])):
        assert torch.equal(stored.latents[key], bank.latents[key])
    assert torch.equal(stored.squared_norms, bank.squared_norms) and torch.equal(stored.log_weights, bank.log_weights)
    assert torch.equal(stored.to(dtype=torch.float32).latents, bank.latents.float())
    root = torch.rand(1024)
    for change in (lambda b: b.masked(root), lambda b: b.normalised(), lambda b: b.resized((8, 8)), lambda b: b.sample(7)):
        assert torch.equal(change(stored).latents[:], change(bank).latents[:])
        assert change(stored).latents.shape == change(bank).latents.shape


@pytest.mark.parametrize("sigma", [0.3, 3.0], ids=["concentrated", "spread"])
def test_steps_from_the_file_are_steps_from_memory(large, monkeypatch, sigma):
    monkeypatch.setattr(kernel, "CACHED", 2**16)  # 16 items at once
    bank, stored = (SafeDenoiser(one, reference=Bank(torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(4))))
                    for one in large)
    x, denoised = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    x = large[0].latents[:2].float() + sigma * x
    for mask in (None, (torch.rand(2, 1, 16, 16) > 0.5).float()):
        (safe, step), (again, other) = (one.safe(x, denoised, sigma, mask=mask) for one in (stored, bank))
        torch.testing.assert_close(safe, again, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(step.posterior, other.posterior, rtol=1e-6, atol=1e-6)


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_bank_on_disk_does_not_become_resident(tmp_path):
    """250 MB on disk; the benchmark does the same with 3.3 GB."""
    save_bank(Bank(torch.randn(8, 4, 64, 64).half().repeat(1000, 1, 1, 1)), tmp_path / "bank.safetensors")
    x = torch.randn(1, 4, 64, 64)
    posterior(x, x.repeat(99, 1, 1, 1), 1.0)  # what torch itself takes the first time
    before = resident()
    bank = load_bank(tmp_path / "bank.safetensors", memory=0)
    got = posterior(x, bank.latents, 1.0, temperature=500.0, squared_norms=bank.squared_norms)
    assert torch.isfinite(got.mean).all() and resident() - before < 60e6


def test_adding_ten_pictures_to_five_hundred_encodes_ten_and_none_takes_no_time(tmp_path):
    pictures, calls = torch.rand(510, 16, 16, 3), []

    def counted(image):
        calls.append(1)
        return torch.rand(4, 64, 64)

    def build(count):
        return encode_bank(NegationSet.from_images(pictures[:count]), counted, (16, 16), cache=LatentCache(tmp_path, "vae"))

    build(500)
    calls.clear()
    first = build(510)
    assert len(calls) == 10
    began = time.perf_counter()
    assert torch.equal(build(510).latents, first.latents) and len(calls) == 10
    assert time.perf_counter() - began < 3, "a third of a second; the bound leaves room for a busy machine"


def test_pictures_are_read_while_others_are_encoded():
    """A quarter of a second of reading and of encoding each: together they take little more than the encoding."""
    encoding = []

    def slow_read(picture):
        time.sleep(0.02)
        return picture

    def slow_encode(image):
        began = time.perf_counter()
        time.sleep(0.02)
        encoding.append(time.perf_counter() - began)
        return encode(image)

    plain = NegationSet.from_images(torch.rand(24, 32, 32, 3))
    slow = NegationSet(plain.names, plain.fingerprints, tuple(partial(slow_read, read()) for read in plain.readers))
    began = time.perf_counter()
    bank = encode_bank(slow, slow_encode, (32, 32))
    assert sum(encoding) > 0.7 * (time.perf_counter() - began)
    assert torch.equal(bank.latents, encode_bank(plain, encode, (32, 32)).latents), "and come out in order"


def test_an_unreadable_picture_stops_the_build_with_its_own_error(pictures):
    def broken():
        raise OSError("picture file is truncated")

    readers = (*pictures.readers[:3], broken, *pictures.readers[4:])
    with pytest.raises(OSError, match="truncated"):
        encode_bank(NegationSet(pictures.names, pictures.fingerprints, readers), encode, (32, 32))


def test_the_cache_keeps_to_its_limit_and_forgets_what_was_not_used_for_longest(tmp_path):
    def build(pixels, limit=math.inf):
        calls = []
        encode_bank(NegationSet.from_images(pixels), lambda image: calls.append(1) or encode(image), (32, 32),
                    cache=LatentCache(tmp_path, "vae", limit))
        return len(calls)

    old, new = torch.rand(2, 4, 32, 32, 3)
    assert build(old) == 4
    size = sum(file.stat().st_size for file in tmp_path.iterdir()) // 4
    for age, file in enumerate(tmp_path.iterdir()):
        os.utime(file, (1000 + age, 1000 + age))
    assert build(old[:1]) == 0, "used again: now the youngest"
    (tmp_path / "dead.tmp").write_bytes(b"left by a process that died")
    os.utime(tmp_path / "dead.tmp", (5, 5))
    (tmp_path / "young.tmp").write_bytes(b"being written")
    assert build(new, 5 * size) == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 5 and [file.name for file in tmp_path.glob("*.tmp")] == ["young.tmp"]
    assert build(old[:1]) == 0 and build(new) == 0 and build(old) == 3


WRITER = """
import sys, torch
from safe_denoiser import LatentCache, NegationSet, encode_bank
pixels = torch.rand(60, 16, 16, 3, generator=torch.Generator().manual_seed(0))
limit = float(sys.argv[2])
for _ in range(5):
    bank = encode_bank(NegationSet.from_images(pixels), lambda image: image.movedim(-1, 0)[:, ::8, ::8], (16, 16),
                       cache=LatentCache(sys.argv[1], "vae", limit))
    assert torch.equal(bank.latents, pixels.movedim(-1, 1)[:, :, ::8, ::8])
"""


def test_two_processes_share_a_cache(tmp_path):
    """One of them keeps the folder so small that both write and remove all the time; each gets its own pictures' latents."""
    root = Path(__file__).resolve().parent.parent.parent
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), limit], cwd=root, stderr=subprocess.PIPE, text=True)
            for limit in ("inf", "4000")]
    for process in both:
        assert process.communicate()[1] == "" and process.returncode == 0
    assert not list(tmp_path.glob("*.tmp"))


def test_it_builds_in_inference_mode_as_in_comfyui(pictures):
    with torch.inference_mode():
        assert encode_bank(NegationSet.from_images(torch.rand(3, 20, 20, 3)), encode, (32, 32)).latents.shape == (3, 4, 4, 4)


def test_a_warm_build_hands_nothing_to_threads(tmp_path, monkeypatch):
    """To read a latent that is there takes less than to hand it to one: that was a third of a warm build."""
    from safe_denoiser.bank import encoding

    pictures, told = NegationSet.from_images(torch.rand(5, 8, 8, 3, generator=torch.Generator().manual_seed(0))), []
    cold = encode_bank(pictures.take([0, 2]), lambda image: image.movedim(-1, 0), (8, 8), cache=LatentCache(tmp_path, "vae"))
    mixed = encode_bank(pictures, lambda image: image.movedim(-1, 0), (8, 8), "crop", lambda *now: told.append(now),
                        LatentCache(tmp_path, "vae"))
    assert told == [(i, 5) for i in range(1, 6)] and torch.equal(mixed.latents[[0, 2]], cold.latents)
    monkeypatch.setattr(encoding.ThreadPoolExecutor, "submit", lambda *_: pytest.fail("handed to a thread"))
    warm = encode_bank(pictures, None, (8, 8), cache=LatentCache(tmp_path, "vae"))
    assert torch.equal(warm.latents, mixed.latents) and warm.names == mixed.names
