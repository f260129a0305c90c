import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from safe_denoiser import NegationSet, combine_sets
from safe_denoiser.pictures.contact_sheets import contact_sheet, describe, thumbnail


def picture(mode="RGB", size=(20, 10)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def only(folder):
    negation_set = NegationSet.from_folder(folder)
    assert len(negation_set) == 1
    return next(iter(negation_set))


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="negation set folder 'nothing' does not exist; create .*nothing"):
        NegationSet.from_folder(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="has no readable picture; put PNG, JPEG or WebP files into"):
        NegationSet.from_folder(tmp_path)


def test_unreadable_files_are_skipped_counted_and_named(tmp_path):
    picture().save(tmp_path / "good.png")
    picture(size=(300, 300)).save(tmp_path / "whole.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    (tmp_path / "truncated.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "readme.md").write_text("ignored: its name is not a picture's")
    (tmp_path / "folder.png").mkdir()
    negation_set = NegationSet.from_folder(tmp_path)
    assert negation_set.names == ("good.png", "whole.jpg")
    skipped = dict(negation_set.skipped)
    assert set(skipped) == {"empty.png", "text.png", "truncated.jpg", "truncated.png"}
    assert skipped["empty.png"] == "empty file" and "truncated" in skipped["truncated.jpg"]
    for name in negation_set.names:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="no readable picture .4 unreadable.(.|\n)*empty.png: empty file"):
        NegationSet.from_folder(tmp_path)


@pytest.mark.parametrize("mode, name", [
    ("CMYK", "a.jpg"), ("P", "a.png"), ("L", "a.png"), ("1", "a.png"), ("RGBA", "a.webp"), ("RGB", "a.bmp")])
def test_every_colour_mode_becomes_rgb(tmp_path, mode, name):
    picture(mode).save(tmp_path / name)
    pixels = only(tmp_path)
    assert pixels.shape == (10, 20, 3) and pixels.dtype == torch.float32 and 0 <= pixels.min() <= pixels.max() <= 1
    assert pixels.max() > 0.5


def test_transparency_shows_on_white(tmp_path):
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.save(tmp_path / "a.png")
    pixels = only(tmp_path)
    assert pixels[0, 0].tolist() == [1, 0, 0] and pixels[1, 1].tolist() == [1, 1, 1]


def test_16_bit_keeps_its_levels(tmp_path):
    levels = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    torch.testing.assert_close(only(tmp_path)[0, :, 0], torch.from_numpy(levels[0].astype(np.float32) / 65535))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert only(tmp_path)[0, 0].tolist() == [1, 0, 0]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert only(tmp_path).shape == (20, 10, 3)


def test_natural_order_and_limit(tmp_path):
    for i in (10, 2, 1):
        picture().save(tmp_path / f"p{i}.png")
    assert NegationSet.from_folder(tmp_path).names == ("p1.png", "p2.png", "p10.png")
    assert NegationSet.from_folder(tmp_path, max_images=2).names == ("p1.png", "p2.png")


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    picture().save(tmp_path / "secret.png")
    picture().save(tmp_path / "set/own.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "set/link.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "set/broken.png")
    negation_set = NegationSet.from_folder(tmp_path / "set")
    assert negation_set.names == ("own.png",)
    assert dict(negation_set.skipped)["link.png"] == "link to a file outside the folder"
    assert "broken.png" in dict(negation_set.skipped)


def test_fingerprint_follows_the_content(tmp_path):
    picture().save(tmp_path / "a.png")
    first = NegationSet.from_folder(tmp_path)
    os.utime(tmp_path / "a.png", (1, 1))
    assert NegationSet.from_folder(tmp_path).fingerprint == first.fingerprint
    picture(size=(21, 10)).save(tmp_path / "a.png")
    changed = NegationSet.from_folder(tmp_path)
    assert changed.fingerprint != first.fingerprint
    picture().save(tmp_path / "b.png")
    assert NegationSet.from_folder(tmp_path).fingerprint != changed.fingerprint


def test_from_images():
    batch = torch.rand(3, 8, 6, 4)
    negation_set = NegationSet.from_images(batch)
    assert len(negation_set) == 3 and torch.equal(next(iter(negation_set)), batch[0, ..., :3])
    assert len(set(negation_set.fingerprints)) == 3
    assert NegationSet.from_images(batch).fingerprint == negation_set.fingerprint
    for wrong in (torch.rand(0, 8, 6, 3), torch.rand(2, 8, 6)):
        with pytest.raises(ValueError, match="need at least one, each .height, width, 3."):
            NegationSet.from_images(wrong)


def test_contact_sheet_is_blurred_unless_asked():
    stripes = (torch.arange(64) % 2).float().view(1, 1, -1, 1).expand(20, 64, 64, 3)
    negation_set = NegationSet.from_images(stripes)
    blurred, shown = (np.asarray(contact_sheet(negation_set, "stripes", blurred=b), float)[30:] for b in (True, False))
    assert blurred.shape == shown.shape
    assert np.abs(np.diff(shown, axis=1)).mean() > 20 * np.abs(np.diff(blurred, axis=1)).mean()


def test_blurred_thumbnails_and_latents_without_a_picture():
    stripes = NegationSet.from_images((torch.arange(64) % 2).float().view(1, 1, -1, 1).expand(1, 64, 64, 3))
    assert len(thumbnail(stripes, 0, 64, blurred=False).getcolors(10_000)) == 2
    latents = NegationSet.from_latents(torch.rand(3, 4, 2, 2))
    assert thumbnail(latents, 1, 64).getcolors() == [(64 * 64, (128, 128, 128))]
    assert describe(latents, "saved") == "saved: 3 latents, 0 skipped, 192 B"
    with pytest.raises(ValueError, match="holds latents and no picture; build the set from pictures instead"):
        next(iter(latents))


# --- zip files -----------------------------------------------------------------------------------------------------

@pytest.fixture
def zipped(tmp_path):
    """A zip file with pictures at two depths, a damaged one, what macOS adds, and a text."""
    for i in (10, 2):
        picture(size=(20 + i, 10)).save(tmp_path / f"p{i}.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "p10.png", "top/p10.png")
        archive.write(tmp_path / "p2.png", "top/p2.png")
        archive.writestr("top/damaged.png", (tmp_path / "p2.png").read_bytes()[:200])
        archive.writestr("__MACOSX/top/._p2.png", b"resource fork")
        archive.writestr("top/notes.txt", b"no picture")
    return tmp_path / "set.zip"


def test_a_zip_file_reads_as_its_folder_does(zipped):
    negation_set = NegationSet.from_zip(zipped)
    assert negation_set.names == ("top/p2.png", "top/p10.png")
    assert [name for name, _ in negation_set.skipped] == ["top/damaged.png"]
    folder = NegationSet.from_folder(zipped.parent)
    assert negation_set.fingerprints == folder.fingerprints, "the same pictures share the cache of latents"
    assert all(torch.equal(a, b) for a, b in zip(negation_set, folder))
    assert negation_set.size == folder.size > 0
    assert NegationSet.from_zip(zipped, max_images=1).names == ("top/p2.png",)


def test_zip_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="'gone.zip' does not exist; put a zip file of pictures at"):
        NegationSet.from_zip(tmp_path / "gone.zip")
    (tmp_path / "text.zip").write_text("no zip file")
    with pytest.raises(ValueError, match="'text.zip' is not a readable zip file"):
        NegationSet.from_zip(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="zip file 'empty.zip' has no readable picture; put PNG, JPEG or WebP files into"):
        NegationSet.from_zip(tmp_path / "empty.zip")


def test_a_member_too_large_is_never_unpacked(zipped, monkeypatch):
    monkeypatch.setattr("safe_denoiser.pictures.listing.LARGEST", 10)
    with pytest.raises(ValueError, match="has no readable picture .3 unreadable.(.|\n)*larger than 0 MB"):
        NegationSet.from_zip(zipped)


# --- combined sets -------------------------------------------------------------------------------------------------

def test_combined_sets_weigh_each_picture():
    one, two = NegationSet.from_images(torch.rand(2, 8, 8, 3)), NegationSet.from_images(torch.rand(3, 8, 8, 3))
    plain = combine_sets([one, two])
    assert len(plain) == 5 and plain.weights == () and plain.fingerprints == one.fingerprints + two.fingerprints
    weighed = combine_sets([one, two], [1, 0.5])
    assert weighed.weights == (1, 1, 0.5, 0.5, 0.5) and weighed.fingerprint != plain.fingerprint
    assert combine_sets([weighed, one], [2, 3]).weights == (2, 2, 1, 1, 1, 3, 3), "weights multiply"
    assert combine_sets([one, two], [0, 3]).fingerprint == two.fingerprint, "0 leaves a set out, and one weight alone changes nothing"
    assert torch.equal(list(weighed)[3], list(two)[1])
    for wrong in ([0, 0], [1, -1]):
        with pytest.raises(ValueError, match="need numbers of 0 or more, and at least one above 0"):
            combine_sets([one, two], wrong)
