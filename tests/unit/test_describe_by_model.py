"""The model names the pictures: in the tiny digit world, where each phrase is one of its prompts."""
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.digits import bank, data
from safe_denoiser.condition.describe_by_model import describe_by_model, rounds, rows_needed
from tiny_digits.train import WORDS
from tiny_digits.world import PROMPTS, TinyDigits, prompt, reference_bank
from tiny_photos.world import PROMPTS as PHOTO_PROMPTS
from tiny_photos.world import ROOT, TinyPhotos
from tiny_photos.world import prompt as photo_prompt

PHRASES = (*WORDS, "straight", "curly", "round")


@pytest.fixture(scope="module")
def world():
    return TinyDigits()


def encode(phrase):
    return [prompt(phrase if phrase in PROMPTS else str(WORDS.index(phrase)))]


def described(world, latents, **choices):
    return describe_by_model(world, latents, reference_bank().latents[:], PHRASES, encode, [prompt(None)], batch=200, **choices)


@pytest.mark.parametrize("digit", (0, 3, 7, 8))
def test_it_says_the_digit(world, digit):
    found = described(world, bank(digit).latents)
    assert found.text.split(", ")[0] == WORDS[digit], found.table


def test_it_says_the_class_of_photographs():
    """Of trucks that the model drew, among its classes and pairs; of what it draws without a prompt it says nothing."""
    photos = TinyPhotos()
    files = sorted((ROOT / "models/negation_sets/tiny_trucks").glob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) / 255 for file in files[:32]])
    trucks, others = photos.encode(pixels), photos.reference.latents

    def said(latents, contrast):
        return describe_by_model(photos, latents, contrast, [*PHOTO_PROMPTS], lambda name: [photo_prompt(name)], [photo_prompt(None)],
                                 batch=200)

    found = said(trucks, others[:60])
    assert found.text.split(", ")[0] == "truck", found.table
    assert said(others[60:92], others[92:]).text == ""


def test_two_kinds_are_both_said(world):
    mixed = torch.stack([bank(3).latents[:40], bank(7).latents[:40]], 1).flatten(0, 1)
    assert set(described(world, mixed).text.split(", ")) >= {"three", "seven"}


def test_of_a_mixed_folder_it_says_nothing(world):
    for seed in range(4):
        order = torch.randperm(len(data()[0]), generator=torch.Generator().manual_seed(seed))
        assert described(world, data()[0][order[:32]], seed=seed).text == ""


def test_the_cost_is_known_beforehand(world):
    asked, predict = [0], world.predict

    class Counted:
        noised = staticmethod(world.noised)

        @staticmethod
        def predict(x, sigma, conditions):
            asked[0] += len(x)
            return predict(x, sigma, conditions)

    told = []
    describe_by_model(Counted, bank(7).latents, reference_bank().latents[:], PHRASES, encode, [prompt(None)], batch=200,
                      tell=lambda *progress: told.append(progress))
    assert asked[0] == rows_needed(len(PHRASES), 150, 100) == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_rounds_halve_the_phrases_and_double_the_pictures():
    assert rounds(50, 150, 100) == [(50, 8), (25, 16), (13, 32)]
    assert rounds(3, 150, 100) == [(3, 32)] and rounds(50, 5, 4) == [(50, 5)]


def test_too_few_pictures_are_refused(world):
    with pytest.raises(ValueError, match="too few"):
        described(world, bank(7).latents[:1])


def test_one_picture_is_refused_before_the_model_is_asked():
    with pytest.raises(ValueError, match=r"the set has 1, the others are 60"):
        rows_needed(12, 1, 60)
