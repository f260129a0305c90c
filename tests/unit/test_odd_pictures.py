"""Pictures with odd things in them and around them: what is loaded can be encoded, and what is not is named, with the cure."""
import io
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from safe_denoiser import NegationSet
from safe_denoiser.pictures.decoding import bare, decode

PIXELS = (np.arange(12 * 16 * 3).reshape(12, 16, 3) % 251).astype("uint8")


def file(kind="PNG", array=PIXELS, **more):
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **more)
    return data.getvalue()


def text(key, value, packed=False):
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value, zip=packed)
    return file(pnginfo=info)


ODD = {"exif that is none": file(exif=b"Exif\0\0rubbish!!"), "exif cut short": file(exif=b"II*\0"),
       "rubbish in a text that core reads as exif": text("Raw profile type exif", "\nexif\n      20\nzzzz"),
       "more than 1 MB of text": text("workflow", "a" * 3_000_000, True),
       "more than 1 MB of colour profile": file(icc_profile=b"\0" * 3_000_000),
       "webp with bad exif": file("WEBP", exif=b"Exif\0\0rubbish", lossless=True)}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_loaded_can_be_encoded(name, packed, tmp_path):
    """Load and Build ask the same function; damage beside the pixels costs the rotation at most."""
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            archive.writestr("odd.png", ODD[name])
            archive.writestr("plain.png", file())
        found = NegationSet.from_zip(tmp_path / "set.zip")
    else:
        (tmp_path / "odd.png").write_bytes(ODD[name])
        (tmp_path / "plain.png").write_bytes(file())
        found = NegationSet.from_folder(tmp_path)
    assert found.names == ("odd.png", "plain.png") and not found.skipped
    odd, plain = found
    torch.testing.assert_close(odd, plain, atol=0.02, rtol=0)


def test_a_picture_is_still_turned_and_a_cut_one_still_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(file(exif=exif)).shape == (16, 12, 3)
    (tmp_path / "cut.png").write_bytes(file()[:len(file()) // 2])
    (tmp_path / "plain.png").write_bytes(file())
    assert [name for name, _ in NegationSet.from_folder(tmp_path).skipped] == ["cut.png"]
    assert bare(b"\x89PNG\r\n\x1a\n" + b"\xff" * 9) and bare(b"JPEG") == b"JPEG"


@pytest.mark.parametrize("array", [np.float32, np.int32, np.uint16, np.uint8])
@pytest.mark.parametrize("white", [1.0, 255, 65535, 2**31 - 1])
def test_grey_tiffs_of_every_number_format(array, white):
    if array in (np.uint16, np.uint8) and white > np.iinfo(array).max or array != np.float32 and white == 1:
        pytest.skip("no such file")
    if array == np.uint16 and white == 255:
        pytest.skip("16 bit says what is white")
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    found = decode(file("TIFF", (ramp * white).astype(array)))
    torch.testing.assert_close(found[..., 0], torch.from_numpy(ramp).float(), atol=0.02, rtol=0)


def test_everything_that_is_no_picture_is_named(tmp_path):
    for name in ("a.jxl", "b.psd", "c.mp4", "d", "e.html", "f.png"):
        (tmp_path / name).write_bytes(b"none")
    for name in ("f.txt", "workflow.json", ".DS_Store", "Thumbs.db", "._f.png"):
        (tmp_path / name).write_bytes(b"beside")
    (tmp_path / "g").write_bytes(file())  # with no suffix
    found = NegationSet.from_folder(tmp_path)
    assert found.names == ("g",) and dict(found.skipped) == {
        "a.jxl": "JPEG XL: save it as PNG or JPEG", "b.psd": "Photoshop: save it as PNG or JPEG",
        "c.mp4": "a video: save it as PNG or JPEG",
        **dict.fromkeys(("d", "e.html", "f.png"), "not a picture that can be read")}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in tmp_path.iterdir():
            if path.suffix != ".zip":
                archive.write(path, path.name)
    assert dict(NegationSet.from_zip(tmp_path / "set.zip").skipped) == dict(found.skipped)


def test_heic_is_named_or_read_where_its_decoder_is_installed(tmp_path, monkeypatch):
    from safe_denoiser.pictures import decoding

    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
    (tmp_path / "plain.png").write_bytes(file())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding._with_heif.cache_clear()
    assert dict(NegationSet.from_folder(tmp_path).skipped) == {"a.heic": "HEIC: save it as PNG or JPEG"}
    asked = []
    there = types.SimpleNamespace(register_heif_opener=lambda **more: asked.append(more))
    monkeypatch.setitem(sys.modules, "pillow_heif", there)
    decoding._with_heif.cache_clear()
    NegationSet.from_folder(tmp_path)
    decode(file())
    assert len(asked) == 1, "once"
    decoding._with_heif.cache_clear()
