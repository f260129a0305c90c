"""Files that strangers made, or that changed while they were used: nothing runs, nothing is taken for another thing, nothing hangs."""
import io
import json
import os
import socket
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.fuzz_banks import fuzz
from safe_denoiser import (
    Bank,
    LatentCache,
    NegationSet,
    SafeDenoiser,
    compress_bank,
    encode_bank,
    index_bank,
    load_bank,
    merge_banks,
    save_bank,
)
from safe_denoiser.bank.encoding import fit_picture
from safe_denoiser.bank.lazy_latents import LazyLatents
from safe_denoiser.pictures.contact_sheets import contact_sheet, sheet
from safe_denoiser.pictures.files import LONGEST, printable
from safe_denoiser.pictures.negation_set import combine_sets

POSIX = pytest.mark.skipif(os.name == "nt", reason="files of this kind are POSIX's")


def picture(path, colour=100, size=(8, 8), **options):
    Image.new("RGB", size, (colour, 50, 50)).save(path, format="BMP" if path.suffix == ".bmp" else "PNG", **options)
    return path


def brightness(image):
    """An encoder that can be read back."""
    return image.mean((0, 1))[:, None, None].repeat(1, 2, 2)


# --- Banks


def test_mutated_banks_work_or_are_refused_by_one_message(tmp_path):
    """500 of the 20,000 files of `python -m benchmarks.fuzz_banks`."""
    found = fuzz(500, 0, tmp_path)
    assert set(found) == {"works", "refused"} and found["works"] > 50, found


def test_what_a_bank_file_says_of_its_calibration_is_not_heard(tmp_path):
    path, draw = tmp_path / "bank.safetensors", torch.Generator().manual_seed(0)
    bank, other = (Bank(torch.randn(20, 2, 4, 4, generator=draw)) for _ in range(2))
    save_bank(bank, path)
    tensors, x = load_file(path), torch.randn(2, 2, 4, 4, generator=draw)
    denoiser = SafeDenoiser(bank, reference=other)
    wanted, h = denoiser.safe(x, x / 2, 1.0)[0], denoiser.view.densities.bandwidth
    keys = [f"temperature at h {h:.5g}", f"temperature at h {h:.5g}, {bank.fingerprint}", f"temperature at h {h:.5g}, 20x2x4x4 32.02"]
    header = {"format": "safe_denoiser.bank", "version": "1", "names": "[]", "metadata": "{}",
              "calibration": json.dumps(dict.fromkeys(keys, 1e9))}
    save_file(tensors, path, header)
    assert torch.equal(SafeDenoiser(load_bank(path), reference=other).safe(x, x / 2, 1.0)[0], wanted)


def test_banks_that_differ_are_told_apart_by_their_fingerprint():
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(6, 2, 4, 4, generator=draw)
    nearly = y.clone()
    nearly[3, 1, 2, 2] += 1e-3
    unlike = [Bank(y), Bank(nearly), Bank(y.flip(-1)), Bank(y.flip(0)), Bank(-y), Bank(y[:5]), Bank(y, weights=torch.arange(1.0, 7)),
              Bank(y.flatten(1)), Bank(y.half())]
    assert len({bank.fingerprint for bank in unlike}) == len(unlike)
    assert Bank(y.clone(), names=tuple("abcdef")).fingerprint == unlike[0].fingerprint, "the same pictures under other names"


def test_calibrations_do_not_pile_up():
    from safe_denoiser.bank import bank as module

    one = Bank(torch.randn(3, 2, 2, 2))
    for i in range(module.RECALLED + 50):
        assert one.recall(f"number {i}", lambda i=i: i) == i
    assert len(module._recalled) == module.RECALLED and one.recall(f"number {module.RECALLED + 49}", lambda: "lost") != "lost"


STORED_PATHS = {
    "kernel": lambda bank, other: dict(bank=bank, reference=other),
    "as the other bank": lambda bank, other: dict(bank=other, reference=bank),
    "to keep": lambda bank, other: dict(bank=other, retain=bank), "gate": lambda bank, other: dict(bank=bank),
    "by parts": lambda bank, other: dict(bank=bank, reference=other, parts=2),
    "parts of the other": lambda bank, other: dict(bank=other, reference=bank, parts=2),
    "gaussian": lambda bank, other: dict(bank=bank, reference=other, weight="gaussian"),
    "tracked": lambda bank, other: dict(bank=bank, weight="tracked"), "triangle": lambda bank, other: dict(bank=bank, weight="triangle"),
    "spell": lambda bank, other: dict(bank=bank, method="spell"), "sgf": lambda bank, other: dict(bank=bank, method="sgf"),
    "official": lambda bank, other: dict(bank=bank, method="official"),
    "official_sd3": lambda bank, other: dict(bank=bank, method="official_sd3"),
    "masked": lambda bank, other: dict(bank=bank, reference=other),
    "witness": lambda bank, other: dict(bank=bank, reference=other),
}


@pytest.mark.parametrize("count", [12, 200])
@pytest.mark.parametrize("way", STORED_PATHS)
def test_a_bank_that_stays_in_its_file_is_as_good_as_one_in_memory(way, count, tmp_path):
    draw = torch.Generator().manual_seed(0)
    bank, other = Bank(torch.randn(count, 2, 8, 8, generator=draw)), Bank(torch.randn(30, 2, 8, 8, generator=draw) + 0.3)
    save_bank(bank, tmp_path / "bank.safetensors")
    stored = load_bank(tmp_path / "bank.safetensors", memory=0)
    assert isinstance(stored.latents, LazyLatents)
    x = torch.randn(2, 2, 8, 8, generator=draw)
    more = dict(mask=(torch.arange(8) > 3).float().expand(2, 1, 8, 8)) if way == "masked" else {}
    more |= dict(unwanted=x / 3, unconditional=x / 4, conditional=x / 2) if way == "witness" else {}
    found, wanted = (SafeDenoiser(**STORED_PATHS[way](one, other)).safe(x, x / 2, 1.0, **more)[0] for one in (stored, bank))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_everything_that_is_done_to_a_bank_can_be_done_to_one_in_its_file(tmp_path):
    draw = torch.Generator().manual_seed(0)
    bank = Bank(torch.randn(30, 2, 4, 4, generator=draw), tuple(f"{i}.png" for i in range(30)))
    save_bank(bank, tmp_path / "bank.safetensors")
    stored = load_bank(tmp_path / "bank.safetensors", memory=0)
    places = [(..., slice(0, 2)), (..., slice(2, 4))]
    doings = {
        "map": lambda b: b.map(lambda y: 2 * y), "sample": lambda b: b.sample(7), "sample all": lambda b: b.sample(99),
        "crops": lambda b: b.crops(places, [i % 2 for i in range(30)]), "normalised": lambda b: b.normalised(),
        "masked": lambda b: b.masked(torch.full((32,), 0.5)), "resized": lambda b: b.resized((8, 6)),
        "merged": lambda b: merge_banks([b, b]), "compressed": lambda b: compress_bank(b, 4), "indexed": lambda b: index_bank(b, 4),
        "to": lambda b: b.to(dtype=torch.float16), "a set of its own": lambda b: Bank(torch.stack(list(
            NegationSet.from_latents(b.latents[:], b.names).latents))),
    }
    for name, do in doings.items():
        found, wanted = do(stored), do(bank)
        torch.testing.assert_close(found.latents[:], wanted.latents[:], msg=name)
        torch.testing.assert_close(found.squared_norms, wanted.squared_norms, msg=name)
        assert found.fingerprint == wanted.fingerprint and found.metadata == wanted.metadata and len(found) == len(wanted), name


def test_a_bank_whose_file_became_shorter_says_so(tmp_path):
    path = tmp_path / "bank.safetensors"
    save_bank(Bank(torch.randn(30, 2, 4, 4)), path)
    stored = load_bank(path, memory=0)
    os.truncate(path, path.stat().st_size - 500)
    with pytest.raises(ValueError, match="'bank.safetensors' has become shorter since it was loaded"):
        stored.latents[:]


def test_merged_banks_forget_whose_pictures_the_prototypes_of_one_stood_for():
    parts = [compress_bank(Bank(torch.randn(20, 2, 4, 4)), 3), Bank(torch.randn(5, 2, 4, 4))]
    assert "origin" in parts[0].metadata and "origin" not in merge_banks(parts).metadata


def test_a_bank_with_an_index_takes_what_is_not_finite_as_any_other():
    bank = Bank(torch.randn(50, 2, 4, 4))
    x = torch.randn(2, 2, 4, 4)
    x[1] = torch.nan
    for one in (bank, index_bank(bank)):
        found, step = SafeDenoiser(one).safe(x, x, 1.0)
        assert step.fallback.tolist() == [False, True] and found[0].isfinite().all() and found[1].isnan().all()


# --- Pictures


def test_only_pictures_are_opened_whatever_a_file_is_called(tmp_path, monkeypatch):
    """PostScript would start Ghostscript."""
    import subprocess

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *args, **_: pytest.fail(f"started {args}"))
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    (tmp_path / "font.png").write_bytes(b"%PDF-1.4\n")
    with Image.new("RGB", (8, 8)) as image:
        for kind in ("EPS", "PDF", "PCX", "SGI", "IM", "MSP", "XBM"):
            try:
                image.convert("1" if kind in ("MSP", "XBM") else "RGB").save(tmp_path / f"{kind}.png", kind)
            except (KeyError, OSError, ValueError):
                pass
    picture(tmp_path / "right.png")
    found = NegationSet.from_folder(tmp_path)
    assert found.names == ("right.png",) and len(found.skipped) >= 4
    assert all(reason == "not a picture that can be read" for _, reason in found.skipped), found.skipped


@POSIX
def test_what_is_no_file_is_named_and_never_read(tmp_path, monkeypatch):
    """A pipe would block for ever; so would a socket, a device or a loop of links."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    os.symlink("loop.png", "loop.png")
    os.symlink("gone", "broken.png")
    os.symlink("/dev/zero", "device.png")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket.png")
    picture(tmp_path / "right.png")
    picture(tmp_path / "secret.png").chmod(0)
    readable_all_the_same = os.access("secret.png", os.R_OK)
    result = []
    reader = threading.Thread(target=lambda: result.append(NegationSet.from_folder(tmp_path)), daemon=True)
    reader.start()
    reader.join(20)
    listening.close()
    assert result, "it hangs"
    found = dict(result[0].skipped)
    assert result[0].names == (("right.png", "secret.png") if readable_all_the_same else ("right.png",))
    assert found["pipe.png"] == found["socket.png"] == "not a file" and found["broken.png"] == "broken link"
    assert "outside the folder" in found["device.png"] and "loop.png" in found


ODD_NAMES = ["²", "x²y³", "line\nbreak", "tab\there", "\x1b[31mred", "\u202egnp.exe", "١٢", "a" * 200, "🦆", "<img src=x onerror=alert(1)>",
             "0" * 180, " ", "'", '"', "%s{x}", "..."]


def test_names_of_every_kind(tmp_path):
    for name in ODD_NAMES:
        picture(tmp_path / f"{name}.png")
    found = NegationSet.from_folder(tmp_path)
    assert len(found) == len(ODD_NAMES) and not found.skipped
    assert all(name.isprintable() and len(name) <= LONGEST + 1 for name in found.names)
    page = sheet(found, range(len(found)), ["a\nb", *found.names[:3]], captions=found.names)
    assert page.size[0] == 512 and len(list(found)) == len(found)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as made:
        for i, name in enumerate([*ODD_NAMES, "9" * 5000, "long" * 1000]):
            made.writestr(f"{name}.png", (tmp_path / f"{ODD_NAMES[i % len(ODD_NAMES)]}.png").read_bytes())
    zipped = NegationSet.from_zip(tmp_path / "set.zip")
    assert len(zipped) == len(ODD_NAMES) + 2 and all(name.isprintable() and len(name) <= LONGEST + 1 for name in zipped.names)
    assert contact_sheet(zipped, "title\nof two lines").size[0] == 512


def test_numbers_in_names_count_as_numbers(tmp_path):
    for name in ("p10", "p9", "p009b", "p2", "p1" + "0" * 100):
        picture(tmp_path / f"{name}.png")
    assert [name.removesuffix(".png") for name in NegationSet.from_folder(tmp_path).names] == ["p2", "p9", "p009b", "p10", "p1" + "0" * 100]
    assert printable("a\nb\u202ec") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"


def bomb(width, height):
    """A PNG of that size in a few kilobytes: one chunk of zeros."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + (width + 7) // 8)
    compressor = zlib.compressobj(9)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", data) \
        + chunk(b"IEND", b"")


@pytest.mark.parametrize("limit", [None, 2**27])
def test_bombs_are_not_unpacked(limit, tmp_path, monkeypatch):
    """Whatever another node pack did to Pillow's own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "bomb.png").write_bytes(bomb(100_000, 20_000))
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("bomb.png", bomb(60_000, 60_000))
        made.writestr("right.png", picture(tmp_path / "right.png").read_bytes())
        made.writestr("zeros.png", b"\0" * (2**28 + 1))
    began = time.monotonic()
    found, zipped = NegationSet.from_folder(tmp_path), NegationSet.from_zip(tmp_path / "set.zip")
    assert time.monotonic() - began < 5 and found.names == zipped.names == ("right.png",)
    assert "pixels, more than 128 million" in found.skipped[0][1] or "Decompression" in found.skipped[0][1]
    assert "larger than 256 MB" in dict(zipped.skipped)["zeros.png"]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (3, 5000)])
def test_a_picture_one_pixel_high(fit, shape):
    """Under "crop" it would have grown to 512 x 15 million pixels before it was cut."""
    strip = torch.linspace(0, 1, max(shape)).view(*[-1 if side == max(shape) else 1 for side in shape], 1).expand(*shape, 3)
    fitted = fit_picture(strip, (512, 512), fit)
    assert fitted.shape == (512, 512, 3) and fitted.isfinite().all()
    if fit == "crop":
        assert (fitted - 0.5).abs().max() < 0.01, "its middle"


def test_cutting_before_resizing_changes_no_picture_of_usual_shape():
    for shape in ((64, 96), (100, 30), (48, 48), (30, 240)):
        pixels = torch.rand(*shape, 3, generator=torch.Generator().manual_seed(1))
        h, w = shape
        scale = max(32 / h, 32 / w)
        whole = torch.nn.functional.interpolate(pixels.movedim(-1, 0)[None], (round(h * scale), round(w * scale)), mode="bicubic",
                                                antialias=True).clamp(0, 1)
        top, left = (whole.shape[-2] - 32) // 2, (whole.shape[-1] - 32) // 2
        assert torch.equal(fit_picture(pixels, (32, 32), "crop"), whole[0, :, top:top + 32, left:left + 32].movedim(0, -1))


def test_members_of_zip_files_that_are_left_alone(tmp_path):
    data = picture(tmp_path / "p.png").read_bytes()
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as made:
        for name in ("right.png", "../../climbs.png", "/absolute.png", "a/../../b.png", "..\\windows.png", "inner.zip", "short.png"):
            made.writestr(name, data[:40] if name == "short.png" else data)
    found = NegationSet.from_zip(path)
    told = dict(found.skipped)
    assert found.names == ("right.png",) and told["inner.zip"] == "a zip file in a zip file; unpack it" and "short.png" in told
    assert all(told[name] == "leads out of the zip file" for name in ("../../climbs.png", "/absolute.png", "a/../../b.png"))
    encrypted = bytearray(path.read_bytes())
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = encrypted.find(sign)
        encrypted[place + offset] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(ValueError, match="encrypted; make the zip file without a password"):
        NegationSet.from_zip(path)


def test_a_zip_file_of_many_pictures_is_listed_once_and_can_be_replaced(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as made:
        for i in range(2000):
            made.writestr(f"{i}.png", buffer.getvalue())
    opened = []
    real = zipfile.ZipFile._RealGetContents
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", lambda self: (opened.append(1), real(self))[1])
    found = NegationSet.from_zip(tmp_path / "set.zip")
    encode_bank(found, brightness, (8, 8))
    assert len(found) == 2000 and len(opened) == 1
    handles = Path("/proc/self/fd")
    if handles.is_dir():
        targets = [os.readlink(one) for one in handles.iterdir() if one.exists()]
        assert not any(target.endswith("set.zip") for target in targets)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as made:
        made.writestr("0.png", picture(tmp_path / "p.png", 250).read_bytes())
    os.replace(tmp_path / "other.zip", tmp_path / "set.zip")
    assert len(NegationSet.from_zip(tmp_path / "set.zip")) == 1
    assert abs(float(found.readers[0]()[0, 0, 0]) - 250 / 255) < 0.01, "what is there now"
    with pytest.raises(ValueError, match="5.png: KeyError: .*it could be read when the set was loaded: load it again"):
        found.read(5)


# --- What changes while it is used


@pytest.mark.parametrize("times", ["new", "kept"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_picture_that_was_replaced_is_stored_under_its_own_hash(times, zipped, tmp_path):
    """Between Load and Build; "kept": by one of the same size and time."""
    folder, cache = tmp_path / "set", LatentCache(tmp_path / "cache", "vae")
    folder.mkdir()

    def put(colour):
        path = picture(folder / "p.bmp", colour)  # of one size, whatever the colour
        if zipped:
            with zipfile.ZipFile(folder / "set.zip", "w") as made:
                made.write(path, "p.bmp")
            path.unlink()
            path = folder / "set.zip"
        os.utime(path, ns=(10**18, 10**18))
        return NegationSet.from_zip(path) if zipped else NegationSet.from_folder(folder)

    def encoded(negation_set):
        return float(encode_bank(negation_set, brightness, (8, 8), cache=cache).latents[0, 0, 0, 0] * 255)

    dark = put(10)
    light = put(200)
    if times == "new":
        os.utime(folder / ("set.zip" if zipped else "p.bmp"))
        assert round(encoded(dark)) == 200, "what is there now"
    assert dark.fingerprint != light.fingerprint and round(encoded(light)) == 200
    assert round(encoded(put(10))) == 10, "and nothing of the other is stored under its name"
    assert round(encoded(light)) == 10 and round(encoded(put(200))) == 200


def test_what_the_vae_cannot_encode_is_named_and_not_stored(tmp_path):
    for i, colour in enumerate((10, 200, 90)):
        picture(tmp_path / f"p{i}.png", colour)
    found, cache = NegationSet.from_folder(tmp_path), LatentCache(tmp_path / "cache", "vae")

    def overflows(image):
        return brightness(image) / (image[0, 0, 0] < 0.5)  # infinity for the light one

    with pytest.raises(ValueError, match="the VAE gives NaN or infinity for p1.png; run it in higher precision"):
        encode_bank(found, overflows, (8, 8), cache=cache)
    assert encode_bank(found, brightness, (8, 8), cache=cache).latents.isfinite().all(), "nothing of it was stored"


def test_a_picture_that_is_gone_is_named(tmp_path):
    picture(tmp_path / "p.png")
    found = NegationSet.from_folder(tmp_path)
    (tmp_path / "p.png").unlink()
    with pytest.raises(ValueError, match=r"p.png: FileNotFoundError: .*it could be read when the set was loaded: load it again"):
        encode_bank(combine_sets([found, NegationSet.from_images(torch.zeros(1, 8, 8, 3))]), brightness, (8, 8))


def test_weights_and_clusters_that_do_not_fit_are_refused():
    y = torch.randn(4, 2, 3, 3)
    for weights in (torch.tensor([1.0, 1, 1, torch.inf]), torch.tensor([1.0, 1, 1, torch.nan]), torch.ones(3), torch.zeros(4)):
        with pytest.raises(ValueError, match="bank weights are"):
            Bank(y, weights=weights)
    good = index_bank(Bank(y), 2).clusters
    for bad in (dict(labels=good.labels + 2), dict(labels=good.labels - 1), dict(labels=good.labels[:3]), dict(labels=good.labels.float()),
                dict(centres=good.centres[:, :1]), dict(centres=good.centres * torch.nan), dict(centres=good.centres[:0])):
        with pytest.raises(ValueError, match="bank clusters are"):
            Bank(y, clusters=replace(good, **bad))


def test_pixels_in_floating_point_tiffs_that_are_no_number(tmp_path):
    Image.fromarray(np.array([[np.nan, np.inf, 0.5]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert next(iter(NegationSet.from_folder(tmp_path)))[0, :, 0].tolist() == [0, 1, 0.5]


# --- Two processes on one cache, one of which is killed at any time


def _fill(folder, seed):
    """Puts, gets and trims for as long as it lives; each latent is told by its name."""
    import random

    draw, cache = random.Random(seed), LatentCache(folder, "vae", limit=60_000)
    while True:
        number = draw.randrange(40)
        path = cache.path(str(number), (8, 8), "crop")
        if draw.random() < 0.5:
            cache.put(path, torch.full((4, 8, 8), float(number)))
        else:
            cache.get(path)
        if draw.random() < 0.1:
            cache.trim()


@POSIX
def test_a_process_that_is_killed_leaves_no_wrong_latent(tmp_path):
    """200 rounds: what the other reads is right or not there, and nothing half-written stays."""
    import multiprocessing
    import random
    import signal

    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    folder, cache = tmp_path / "cache", LatentCache(tmp_path / "cache", "vae", limit=60_000)
    found = 0
    for seed in range(200):
        other = context.Process(target=_fill, args=(folder, seed), daemon=True)
        other.start()
        deadline = time.monotonic() + draw.uniform(0.005, 0.03)
        while time.monotonic() < deadline:
            number = draw.randrange(40)
            latent = cache.get(cache.path(str(number), (8, 8), "crop"))
            if latent is not None:
                found += 1
                assert torch.equal(latent, torch.full((4, 8, 8), float(number)))
            cache.put(cache.path(str(number + 1), (8, 8), "crop"), torch.full((4, 8, 8), float(number + 1)))
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert found > 200
    old = time.time() - 7200
    for path in folder.glob("*.tmp"):  # what the killed ones left
        os.utime(path, (old, old))
    (folder / "somebodys.txt").write_text("not ours")
    cache.trim()
    left = [path.name for path in folder.iterdir()]
    assert not [name for name in left if name.endswith(".tmp")] and "somebodys.txt" in left
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 60_000
