"""Banks as what ComfyUI loads: counted, shared, offloaded and freed by its model management."""
import dataclasses
import gc
import weakref

import pytest
import torch


@pytest.fixture
def loads(comfy, monkeypatch):
    """What is asked of ComfyUI's model management for each run: the modules, and their bytes."""
    import comfy.model_management

    asked, real = [], comfy.model_management.load_models_gpu

    def load(models, *args, **kwargs):
        models = list(models)
        asked.append({type(one.model).__name__: one.model_size() for one in models})
        return real(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    return asked


def own(bank):
    """The same bank, which nothing but the test holds."""
    return dataclasses.replace(bank, latents=bank.latents.clone())


def loaded():
    import comfy.model_management

    found = comfy.model_management.loaded_models()  # None for those that nobody holds any more
    return [one for one in found if one is not None and type(one.model).__name__ == "SafeDenoiserBank"]


def test_banks_are_loaded_and_counted_with_the_model(tiny, run, sample, loads):
    bank = own(tiny.bank)
    patched, report = run("Apply", model=tiny.model, negation_bank=bank).result
    wanted = sample.stock(model=patched)
    sizes, = (one for one in loads if "SafeDenoiserBank" in one)
    assert sizes["SafeDenoiserBank"] == 4 * bank.latents.numel() and len(sizes) == 2, "beside the model, in one call"
    before = loaded()
    assert torch.equal(sample.stock(model=patched), wanted) and report.summary["corrected_calls"] == 6
    assert {id(one.model) for one in loaded()} == {id(one.model) for one in before}, "and it stays loaded for the next run"


def test_patched_models_share_a_bank_and_another_model_has_its_own_form(tiny, run, sample):
    from pack.nodes.models.loading import FORMS, _held

    bank = own(tiny.bank)
    for strength in (0.5, 1.0):
        sample.stock(model=run("Apply", model=tiny.model, negation_bank=bank, reference_bank=tiny.reference, strength=strength).result[0])
    assert len(_held[bank]) == 1
    for size in (16, 24, 40):
        sample.stock(model=run("Apply", model=tiny.model, negation_bank=bank, bank_size="interpolate").result[0],
                     latent=tiny.latent(width=size, height=size))
    assert len(_held[bank]) == FORMS


def test_a_bank_that_is_gone_takes_its_memory_along(tiny, run, sample):
    from pack.nodes.models.loading import _held

    bank = own(tiny.bank)
    patched, _ = run("Apply", model=tiny.model, negation_bank=bank).result
    sample.stock(model=patched)
    module, = (weakref.ref(held.patcher.model) for held in _held[bank].values())
    assert module() is not None
    del patched, bank
    gc.collect()
    assert module() is None


def test_an_offloaded_bank_comes_back_and_a_moved_one_is_read_where_it_is(tiny, run, sample, comfy):
    """ComfyUI may move the module's weights between runs, or leave them where they are: the run reads them there."""
    import comfy.model_management
    from pack.nodes.models.loading import _held

    bank = own(tiny.bank)
    patched, _ = run("Apply", model=tiny.model, negation_bank=bank, reference_bank=tiny.reference).result
    wanted = sample.stock(model=patched)
    comfy.model_management.unload_all_models()
    assert not loaded() and torch.equal(sample.stock(model=patched), wanted) and len(loaded()) == 2
    held, = _held[bank].values()
    held.patcher.model.latents.data = held.patcher.model.latents.data.clone()  # as module.to(device) does
    place = held.bank.latents.data_ptr()
    assert place == held.patcher.model.latents.data_ptr() and torch.equal(sample.stock(model=patched), wanted)


def test_a_bank_larger_than_half_of_the_device_stays_where_it_is(tiny, run, sample, loads, monkeypatch, comfy):
    import comfy.model_management

    wanted = sample.stock(model=run("Apply", model=tiny.model, negation_bank=tiny.bank).result[0])
    loads.clear()
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *args, **kwargs: 4 * tiny.bank.latents.numel())
    large = own(tiny.bank)
    assert torch.equal(sample.stock(model=run("Apply", model=tiny.model, negation_bank=large).result[0]), wanted)
    assert not any("SafeDenoiserBank" in one for one in loads)


def test_two_nodes_in_a_row_load_their_banks(tiny, run, sample, loads):
    first, second = own(tiny.bank), own(tiny.bank)
    patched = tiny.model
    for bank in (first, second):
        patched, report = run("Apply", model=patched, negation_bank=bank, reference_bank=tiny.reference, strength=0.5).result
    sample.stock(model=patched)
    assert len(loaded()) >= 3 and len(report.steps) == 6
