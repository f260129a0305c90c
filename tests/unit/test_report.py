import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from safe_denoiser import Bank, NegationSet, Report, SafeDenoiser
from safe_denoiser.pictures.contact_sheets import sheet
from safe_denoiser.setup_warnings import weaknesses


def run(sigmas, denoised=None, **settings):
    x = torch.ones(2, 4, 4, 4)
    denoiser = SafeDenoiser(Bank(torch.ones(3, 4, 4, 4)), **settings)
    return Report([denoiser.safe(x, x * 2 if denoised is None else denoised, sigma)[1] for sigma in sigmas])


def test_counts_follow_the_window():
    report = run([1.0, 0.8, 0.5, 0.2], sigma_start=0.9, sigma_end=0.2)
    assert report.summary["model_calls"] == 4 and report.summary["corrected_calls"] == 2
    assert report.verdict.startswith("corrected 2 of 4 model calls, posterior up to 1.00")
    assert len(report.table().splitlines()) == 4 + 4
    assert report.counts == "4 model calls, window open in calls 2 to 3 (sigma 0.800 to 0.500), 0 clamps, 0 fallbacks"


@pytest.mark.parametrize("settings, denoised, verdict", [
    (dict(sigma_start=0.1), None, "nothing was corrected: none of the 2 model calls lay in the window"),
    (dict(method="official", threshold=1e9), None, "nothing was corrected: the bank never came near, r < 0.01 at every step"),
    (dict(strength=1e-6), None, "nothing to see: r reached 1.00, but the largest correction was 5e-07 of the prediction; raise strength"),
    ({}, torch.full((2, 4, 4, 4), math.nan), "the model gave NaN or infinity 4 times"),
])
def test_a_run_that_did_nothing_says_why(settings, denoised, verdict):
    assert run([1.0, 0.5], denoised, **settings).verdict.startswith(verdict)


def test_no_steps():
    report = Report([])
    assert "no model call was recorded" in report.verdict
    assert json.loads(report.to_json())["summary"]["model_calls"] == 0
    assert np.asarray(report.plot()).shape == (480, 720, 3)


def test_json_holds_every_value():
    read = json.loads(run([1.0, 0.5]).to_json())
    assert np.asarray(read["steps"]["posterior"]).shape == (2, 2) and read["summary"]["corrected_calls"] == 2


def heard(near):
    """Two calls in which the prompt is `near` to the unwanted condition."""
    zero, unwanted, x = torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4), torch.ones(2, 4, 4, 4)
    asked = near * unwanted
    asked[..., 0] += 1
    denoiser = SafeDenoiser(None)
    return Report([denoiser.safe(x, asked, sigma, unconditional=zero, conditional=asked, unwanted=unwanted)[1] for sigma in (20.0, 15.0)])


def test_the_unwanted_condition_says_what_it_told():
    report = heard(0.5)
    t = 0.5 + 16 / 64
    assert report.verdict.startswith("corrected 2 of 2 model calls, posterior up to 0.7")
    assert report.verdict.endswith(f"as the unwanted condition tells (t {t:.2f} to {t:.2f})")
    assert "share t" in report.table() and f"+{t:.3f}" in report.table() and report.pushed_most() == []
    assert np.allclose(json.loads(report.to_json())["steps"]["projection"], t)
    assert "t at most -0.75" in heard(-1.0).verdict and "nothing was corrected: the prompt asks for nothing like" in heard(-1.0).verdict


def test_where_nobody_was_asked_there_is_no_t():
    report = run([1.0, 0.5])
    assert "share t" not in report.table() and json.loads(report.to_json())["steps"]["projection"] == [[None, None]] * 2


def test_plot_draws_the_values_and_the_pictures_that_pushed():
    report = run([1.0, 0.5, 0.2])
    assert report.pushed_most() == [0]
    plain, empty = np.asarray(report.plot()), np.asarray(Report([]).plot())
    assert (plain != empty).any()
    with_pictures = np.asarray(report.plot(negation_set=NegationSet.from_images(torch.rand(3, 8, 8, 3))))
    assert with_pictures.shape == (480, 870, 3) and (with_pictures[20:130, 740:850] != 255).any()


def test_calls_of_more_and_fewer_rows_are_told_together():
    """A sampler that goes through a video by blocks, or through a batch in halves."""
    denoiser = SafeDenoiser(Bank(torch.ones(3, 4, 4, 4)))
    steps = [denoiser.safe(torch.ones(rows, 4, 4, 4), 2 * torch.ones(rows, 4, 4, 4), 1.0)[1] for rows in (2, 1, 3)]
    report = Report(steps)
    assert report.summary["model_calls"] == report.summary["corrected_calls"] == 3
    assert [line.split()[-1] for line in report.table().splitlines()[-3:]] == ["2/2", "1/1", "3/3"]
    assert json.loads(report.to_json())["steps"]["posterior"][1][1:] == [None, None] and report.pushed_most()
    whole, even = np.asarray(report.plot()), np.asarray(Report([steps[2]] * 3).plot())
    assert whole.shape == even.shape and not np.array_equal(whole, even)


def test_pillow_of_other_packs_has_one_small_font(monkeypatch):
    """Before Pillow 10.1, which some packs hold fast: it knows no sizes, no anchors, and Latin letters only."""
    from PIL import ImageFont

    old = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()

    def load_default(*size):
        if size:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")
        return old

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    names = ("\u4e03.png", "\U0001f986.png", "a" * 300)
    pictures = NegationSet(names, names, (lambda: torch.zeros(8, 8, 3),) * 3)
    plot = np.asarray(run([1.0, 0.5]).plot(negation_set=pictures))
    assert plot.shape == (480, 870, 3) and (plot[:40] < 128).any() and (plot[-25:, :400] < 140).any(), "verdict and counts are written"
    assert (np.asarray(sheet(pictures, range(3), names, captions=names)) > 128).any()


@pytest.mark.parametrize("near, sentence", [
    (0.5, "all pictures steered away from “seven”"),
    (-1.0, "nothing was steered: the prompt does not come near “seven”"),
])
def test_the_sentence_is_in_the_users_words(near, sentence):
    assert replace(heard(near), what="“seven”").sentence == sentence


def test_the_sentence_counts_pictures_and_names_what_pushed_most():
    report = run([1.0, 0.5])
    small = [replace(step, correction=step.correction * torch.tensor([1.0, 0.0])) for step in report.steps]
    assert Report(small, names={0: "a.png"}).sentence == "1 of 2 pictures steered away, most by a.png"
    assert run([1.0], strength=1e-6).sentence == "next to nothing was steered: the corrections were too small to see"
    assert run([1.0], sigma_start=0.1).sentence == "nothing was steered: no step lies between start and end"
    assert Report(small, ["stopped after 2 model calls of a schedule of 9 steps"]).sentence.startswith("stopped after 2 model calls of a")


def test_a_reference_bank_that_distances_cannot_tell_apart_is_a_weak_set_up():
    draw = torch.Generator().manual_seed(0)
    alike, apart, reference = (Bank(torch.randn(20, 4, 4, 4, generator=draw) + shift) for shift in (0, 9, 0))
    assert weaknesses(SafeDenoiser(apart, reference=reference), False) == []
    assert "Learn Unwanted Condition" in weaknesses(SafeDenoiser(alike, reference=reference), False)[0]
    assert weaknesses(SafeDenoiser(alike, reference=reference), True) == []


def test_words_alone_are_no_weak_set_up():
    assert weaknesses(SafeDenoiser(None), True) == []


@pytest.mark.parametrize("settings, by_words, count, weak", [
    ({}, False, 15, "these pictures alone do little; connect unwanted"), ({}, True, 1, "1 negation picture;"),
    (dict(strength=2.5), True, 15, "strength above 2"), (dict(method="official"), False, 15, "was published with strength 0.33"),
    (dict(method="official", strength=0.33), False, 15, None), ({}, True, 15, None),
])
def test_weak_set_ups_are_named(settings, by_words, count, weak):
    found = weaknesses(SafeDenoiser(Bank(torch.ones(count, 4, 4, 4)), **settings), by_words)
    assert len(found) == (weak is not None) and all(weak in one and one.startswith("weak set-up: ") for one in found)
