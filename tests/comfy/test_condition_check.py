"""Whether `unwanted` means the pictures of the bank: found after runs, in a little of their time, and said; pictures stay the same."""
import re
import sys
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def module(pack, monkeypatch):
    """Nothing found so far, and time enough for the whole check after one run."""
    module = sys.modules["pack.nodes.steering.condition_check"]
    monkeypatch.setattr(module, "_found", type(module._found)())
    monkeypatch.setattr(module, "SHARE", 1000.0)
    return module


def label(run, index):
    return run("ClassCondition", class_index=index).result[0]


@pytest.fixture
def said(run, tiny, sample):
    def call(unwanted, bank=None, **choices):
        banks = dict(negation_bank=bank or tiny.bank, reference_bank=tiny.reference, unwanted=unwanted, neutral=tiny.empty, **choices)
        pictures, report = sample.safe(banks, steps=3, batch=1)
        return pictures, [note for note in report.notes if note.startswith("the condition explains")]
    return call


@pytest.mark.parametrize("what, index, words", [("right", 7, "yes, clearly"), ("unrelated", 3, ": no ("), ("unrelated", 0, ": no (")])
def test_it_says_whether_the_condition_means_the_bank(what, index, words, said, run, module):
    notes = said(label(run, index))[1]
    assert len(notes) == 1 and words in notes[0], notes


def test_a_condition_that_means_half_of_the_set_is_said_to(said, run, tiny, module):
    fours = run("LoadNegationSet", folder="tiny_ones_and_fours", max_images=0, preview="off").result[0]
    others = run("BuildNegationBank", negation_set=fours, vae=tiny.vae, latent=tiny.latent()).result[0]
    mixed = replace(tiny.bank, latents=torch.stack([tiny.bank.latents[:20], others.latents[-20:]], 1).flatten(0, 1), names=())
    notes = said(label(run, 7), mixed)[1]
    assert "a little (" in notes[0], notes


@pytest.mark.parametrize("given, why", [
    (lambda tiny: dict(negation_bank=replace(tiny.bank, latents=tiny.bank.latents[:15], names=())), "16 pictures are needed, .* has 15"),
    (lambda tiny: dict(neutral=None), "connect neutral"),
])
def test_what_is_not_checked_says_why(given, why, run, tiny, sample, module, monkeypatch):
    monkeypatch.setattr(module.ConditionCheck, "_neutral", lambda self, guider: self.given.get("neutral"))  # a guider without a negative
    banks = dict(negation_bank=tiny.bank, reference_bank=tiny.reference, unwanted=label(run, 7), neutral=tiny.empty) | given(tiny)
    notes = sample.safe(banks, steps=2, batch=1)[1].notes
    assert any(note.startswith(module.UNCHECKED) and re.search(why, note) for note in notes), notes


def test_pictures_are_the_same_with_and_without_it(said, run, tiny, module):
    on, off = said(label(run, 7)), said(label(run, 7), check=False)
    assert torch.equal(on[0], off[0]) and on[1] and not off[1]


def test_it_takes_a_little_of_the_time_of_many_runs_and_is_remembered(said, run, tiny, module, monkeypatch):
    monkeypatch.setattr(module, "SHARE", 0.05)
    clock, sizes = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])  # each row that the model is asked for takes one second
    predict = module.Asked.predict

    def counted(self, x, sigma, conditions):
        clock[0] += len(x) * len(conditions)
        sizes.append(len(x) * len(conditions))
        return predict(self, x, sigma, conditions)

    monkeypatch.setattr(module.Asked, "predict", counted)
    steer = sys.modules["pack.nodes.steering.steer"]
    monkeypatch.setattr(steer, "ConditionCheck", lambda *args: checks.append(module.ConditionCheck(*args)) or checks[-1])
    checks, runs = [], 0
    while not said(label(run, 7))[1]:
        runs += 1
        check = checks[-1]
        found = module._found[check.key]
        found.seconds += 0.05 * 100  # as if the run had taken 100 s
        assert sum(sizes) <= 0.05 * 100 * (runs + 1) + 4
        assert runs < 40
    assert runs > 3
    monkeypatch.setattr(module.Asked, "predict", None)  # another patched model, the same condition: it knows
    module._found[checks[-1].key].seconds = 0.0
    assert said(label(run, 7))[1]


def test_what_goes_wrong_in_it_costs_no_picture(said, run, module, monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(module.Asked, "predict", broken)
    pictures, notes = said(label(run, 7))
    assert pictures.isfinite().all() and not notes


def test_without_a_bank_there_is_nothing_to_check(sample, run, tiny, module, monkeypatch):
    monkeypatch.setattr(module.Asked, "predict", None)
    sample.safe(dict(unwanted=label(run, 7), neutral=tiny.empty), steps=2)
