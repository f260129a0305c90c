"""Wires that lead to the wrong input: refused where the banks say what they are, named where they do not."""
import dataclasses

import pytest
from test_runs import guider, sample


@pytest.fixture(scope="module")
def prompts(run):
    return [run("ClassCondition", class_index=i).result[0] for i in (10, -1)]


def nameless(bank):
    """As it was before files said what they hold."""
    return dataclasses.replace(bank, names=(), metadata={"space": bank.metadata["space"]})


@pytest.mark.parametrize("node", ["Apply", "KSampler"])
def test_the_tiny_template_with_two_wires_exchanged_is_refused(node, run, tiny, sample_with):
    with pytest.raises(ValueError, match="negation_bank is connected to a reference bank"):
        sample_with(node, negation_bank=tiny.reference, reference_bank=tiny.bank)
    with pytest.raises(ValueError, match="negation_bank is connected to a reference bank"):
        sample_with(node, negation_bank=tiny.reference)


@pytest.mark.parametrize("other", ["reference", "retain"])
@pytest.mark.parametrize("same", ["the same", "another size", "without a name"])
def test_what_must_not_come_out_is_nothing_to_steer_towards(other, same, run, tiny, sample_with):
    beside = {"the same": lambda: tiny.bank, "without a name": lambda: nameless(tiny.bank),
              "another size": lambda: run("BuildNegationBank", negation_set=tiny.negation_set, vae=tiny.vae, latent=tiny.latent(),
                                          fit="pad").result[0]}[same]()
    with pytest.raises(ValueError, match=f"negation_bank and {other}_bank are made of the same pictures"):
        sample_with("Apply", negation_bank=tiny.bank, **{f"{other}_bank": beside})


def test_a_bank_of_other_pictures_is_welcome(run, tiny, sample_with):
    keep = run("LoadNegationSet", folder="tiny_ones_and_fours", preview="off").result[0]
    keep = run("BuildNegationBank", negation_set=keep, vae=tiny.vae, latent=tiny.latent()).result[0]
    for name in ("retain_bank", "reference_bank"):
        sample_with("Apply", negation_bank=tiny.bank, **{name: keep})


@pytest.mark.parametrize("cfg", [2.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_nameless_banks_that_look_exchanged_are_named(cfg, seed, run, tiny, prompts, caplog):
    import torch

    start = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(seed))
    banks = dict(negation_bank=nameless(tiny.bank), reference_bank=nameless(tiny.reference))
    patched, report = run("Apply", model=tiny.model, **banks).result
    sample(guider(patched, prompts, cfg), start=start)
    assert not report.notes and report.summary["corrected_calls"] == 6
    patched, report = run("Apply", model=tiny.model, negation_bank=banks["reference_bank"], reference_bank=banks["negation_bank"]).result
    sample(guider(patched, prompts, cfg), start=start)
    assert "if the two wires are exchanged" in report.table() and "if the two wires are exchanged" in caplog.text


@pytest.fixture
def sample_with(run, sample):
    def call(node, **banks):
        more = dict(model=sample.arguments()["model"]) if node == "Apply" else sample.arguments()
        return run(node, **more, **banks)

    return call
