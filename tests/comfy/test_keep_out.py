"""Keep Out: what the separate nodes do, in one; its lines beside each other; and what the node says."""
import sys
from types import SimpleNamespace

import pytest
import torch
from test_conditions import counted
from test_guard_prompt import KINDS, small
from test_guiders import GUIDERS, guided, setting
from test_guiders import sample as sampled
from test_nodes import DigitWords


@pytest.fixture(scope="module")
def clip(run):
    return DigitWords(run)


def separately(run, model, clip, lines, banks=({},), **settings):
    """The graph without the node: encoders, and an Apply Safe Denoiser for each line."""
    neutral = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    for line, more in zip(lines, [*banks, *[{}] * len(lines)]):
        unwanted = clip.encode_from_tokens_scheduled(clip.tokenize(line))
        model = run("Apply", model=model, unwanted=unwanted, neutral=neutral, **more, **settings).result[0]
    return model


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("text", ["seven", "seven\n\n  one\n"])
def test_it_is_the_separate_nodes_whatever_guider_samples(kind, text, run, tiny, clip):
    shape, prompts, *_ = setting("SD 3", tiny.model, tiny)
    kept, rows = counted(run("KeepOut", model=tiny.model, clip=clip, text=text).result[0])
    found = sampled(guided(kind, kept, prompts), shape)[1]
    apart, wanted_rows = counted(separately(run, tiny.model, clip, text.split()))
    assert torch.equal(found, sampled(guided(kind, apart, prompts), shape)[1])
    assert not torch.equal(found, sampled(guided(kind, tiny.model, prompts), shape)[1]) and torch.isfinite(found).all()
    steps = 4 if kind != "DualModelGuider" else 8
    assert rows == wanted_rows and len(rows) == steps, "one batch for each step, however many lines"


def test_each_line_is_one_row_more_and_neutral_is_shared(run, tiny, clip):
    shape, prompts, *_ = setting("SD 3", tiny.model, tiny)
    for count, lines in enumerate(("seven", "seven\none", "seven\none\nfour"), 1):
        kept, rows = counted(run("KeepOut", model=tiny.model, clip=clip, text=lines).result[0])
        sampled(guided("CFGGuider", kept, prompts), shape)
        assert rows == [shape[0] * (2 + count + 1)] * 4


def test_banks(run, tiny, clip, sample):
    """The negation bank is of the first line, the reference bank of all; the bank alone does without words."""
    both = dict(negation_bank=tiny.bank, reference_bank=tiny.reference)
    kept = run("KeepOut", model=tiny.model, clip=clip, text="seven\none", **both).result[0]
    apart = separately(run, tiny.model, clip, ("seven", "one"), (both, dict(reference_bank=tiny.reference)))
    assert torch.equal(sample.stock(model=kept), sample.stock(model=apart))
    alone = run("KeepOut", model=tiny.model, clip=clip, text="  ", **both).result[0]
    assert torch.equal(sample.stock(model=alone), sample.stock(model=run("Apply", model=tiny.model, **both).result[0]))


def test_strength_0_is_the_stock_sampler(run, tiny, clip, sample):
    off = run("KeepOut", model=tiny.model, clip=clip, text="seven\none", strength=0.0).result[0]
    assert torch.equal(sample.stock(model=off), sample.stock(model=tiny.model))


def test_sevens_are_gone_with_guidance_and_without(run, tiny, clip, comfy):
    from tiny_digits.world import TinyDigits

    kept = run("KeepOut", model=tiny.model, clip=clip, text="seven").result[0]
    for cfg in (2.0, 1.0):
        off, on = (TinyDigits().digits(comfy.VAEDecode().decode(tiny.vae, comfy.KSampler().sample(
            model=model, seed=5, steps=20, cfg=cfg, sampler_name="euler", scheduler="simple", positive=tiny.straight, negative=tiny.empty,
            denoise=1.0, latent_image=tiny.latent(24))[0])[0].movedim(-1, 1)) for model in (tiny.model, kept))
        assert (off == 7).sum() >= 5 and (on == 7).sum() <= 1, cfg


def test_what_cannot_work_is_refused(run, tiny, clip):
    with pytest.raises(ValueError, match="nothing says what must not appear; write it into text, one thing per line, or connect"):
        run("KeepOut", model=tiny.model, clip=clip, text=" \n ", reference_bank=tiny.reference)
    with pytest.raises(ValueError, match="clip is empty: this checkpoint has no text encoder"):
        run("KeepOut", model=tiny.model, clip=None, text="seven")


def test_its_text_is_a_sentence_for_each_line_on_the_node_itself(run, tiny, clip, sample, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext

    sent = []
    server = SimpleNamespace(send_sync=lambda event, data, client: sent.append((data["node"], data["text"])), client_id="page")
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    monkeypatch.setattr("pack.nodes.progress.SECONDS", 0)
    with CurrentNodeContext("prompt", "3"):
        kept = run("KeepOut", model=tiny.model, clip=clip, text="seven\nround").result[0]
    with CurrentNodeContext("prompt", "9"):
        sample.stock(model=kept, steps=8)
    assert {node for node, _ in sent} == {"3"}, "the sampler's node has nothing to say"
    assert sent[0][1].startswith("steering all pictures away from “")
    assert sent[-1][1].splitlines() == ["all pictures steered away from “seven”",
                                        "nothing was steered: the prompt does not come near “round”"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_encodes_as_clip_text_encode_does(kind, run, comfy, monkeypatch):
    """With ComfyUI's own text encoders."""
    asked, clip = [], small(kind)
    monkeypatch.setattr("pack.nodes.steering.keep_out.patch", lambda model, *args, **settings: (asked.append(settings), (model, None))[1])
    run("KeepOut", model=None, clip=clip, text="blood\n guns ")
    assert len(asked) == 2 and asked[0]["neutral"] is asked[1]["neutral"]
    for given, text in ((asked[0]["unwanted"], "blood"), (asked[1]["unwanted"], "guns"), (asked[0]["neutral"], "")):
        (found, more), = given
        (wanted, others), = comfy.CLIPTextEncode().encode(clip, text)[0]
        assert torch.equal(found, wanted) and more.keys() == others.keys()
        assert more.get("pooled_output") is None or torch.equal(more["pooled_output"], others["pooled_output"])
