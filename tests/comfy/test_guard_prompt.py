"""Guard Prompt on ComfyUI's own CLIP classes, small and with random weights: each encoder in its own space, harmless prompts untouched."""
from types import SimpleNamespace

import pytest
import torch

from dev import ROOT

T5 = dict(d_model=64, d_ff=96, d_kv=16, num_heads=4, num_layers=2)
SMALL = {"clip_l_model_config": dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=3),
         "clip_g_model_config": dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=3, projection_dim=64),
         "t5xxl_model_config": T5,
         "qwen25_7b_model_config": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2)}
KINDS = ("SD 1.5", "SDXL", "SD 3", "Flux")  # and Qwen-Image, a language model
CONCEPTS = "nude\nblood"


def classes(kind):
    """Of ComfyUI: the text encoders' model and their tokenizer."""
    import comfy.sd1_clip
    import comfy.sdxl_clip
    from comfy.text_encoders import flux, qwen_image, sd3_clip

    return {"SD 1.5": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
            "SDXL": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
            "SD 3": (sd3_clip.SD3ClipModel, sd3_clip.SD3Tokenizer),
            "Flux": (flux.FluxClipModel, flux.FluxTokenizer),
            "Qwen-Image": (qwen_image.QwenImageTEModel, qwen_image.QwenImageTokenizer)}[kind]


def small(kind):
    import comfy.sd

    model, tokenizer = classes(kind)
    wide = {"t5xxl_model_config": {**T5, "d_model": 4096}} if kind == "SD 3" else {}  # to which it pads the others
    clip = comfy.sd.CLIP(SimpleNamespace(params={}, clip=model, tokenizer=tokenizer),
                         model_options={**SMALL, **wide, "dtype": torch.float32})
    generator = torch.Generator().manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        value = torch.randn(weight.shape, generator=generator) / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 1)
        weight.data = torch.ones_like(weight) if weight.ndim == 1 and name.endswith("weight") else value * (weight.ndim > 1)
    return clip


@pytest.fixture(scope="module")
def clips(comfy):
    made = {}
    return lambda kind: made[kind] if kind in made else made.setdefault(kind, small(kind))


@pytest.fixture(scope="module")
def fewer(pack):
    """Half of the harmless prompts, which are as many as 2 % needs."""
    from pack.nodes.words import guard as module

    every, real = module.harmless()[::2], module.harmless
    module.harmless = lambda: every
    yield
    module.harmless = real


@pytest.fixture(scope="module")
def guard(run, clips, fewer):
    def guarded(kind, text, method="surgery", **settings):
        settings = {"look_for": "own words", "concepts": CONCEPTS, "false_alarms": 0.02, **settings}
        entries, found = run("GuardPrompt", clip=clips(kind), text=text, method=method, **settings).result
        return entries, found

    return guarded


def stock(clips, kind, text):
    return clips(kind).encode_from_tokens_scheduled(clips(kind).tokenize(text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_part_of_each_encoder_is_found(clips, kind, pack):
    from pack.nodes.models.text_encoders import Encoders

    encoders = Encoders(clips(kind))
    long = "a cat and a dog in the garden of a house by the sea, " * 8  # two chunks of CLIP, 113 tokens of T5
    for text in ("", "a cat", long):
        tokens = clips(kind).tokenize(text)
        boxes = {name: (box.rows and (box.rows.start, box.rows.stop), (box.columns.start, box.columns.stop))
                 for name, box in encoders.boxes(tokens).items()}
        clip, t5 = (154, len(tokens["t5xxl"][0]) if "t5xxl" in tokens else 0) if text is long else (77, {"SD 3": 77, "Flux": 256}.get(kind))
        assert boxes == {
            "SD 1.5": {"l": ((0, clip), (0, 48)), "l, pooled": (None, (0, 48))},
            "SDXL": {"l": ((0, clip), (0, 48)), "g": ((0, clip), (48, 112)), "g, pooled": (None, (0, 64))},
            "SD 3": {"l": ((0, clip), (0, 48)), "g": ((0, clip), (48, 112)), "t5xxl": ((clip, clip + (t5 or 0)), (0, 4096)),
                     "l, pooled": (None, (0, 48)), "g, pooled": (None, (48, 112))},
            "Flux": {"t5xxl": ((0, t5), (0, 64)), "l, pooled": (None, (0, 48))}}[kind]
    assert encoders.causal == {"l", "g"} & set(encoders.keys) - ({"l"} if kind == "Flux" else set()), "T5 looks ahead"


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_found_between_begin_and_end(clips, kind, pack):
    from pack.nodes.models.text_encoders import Encoders

    encoders, text = Encoders(clips(kind)), "a photo of two cats"
    tokens = clips(kind).tokenize(text)
    for key in encoders.keys:
        start, stop = encoders.content(key, tokens[key][0])
        words = [encoders.word(key, token[0]) for token in tokens[key][0][start:stop]]
        assert "".join(words) == text.replace(" ", ""), key
        assert encoders.content(key, encoders.empty[key][0])[0] >= encoders.content(key, encoders.empty[key][0])[1] - 1


@pytest.mark.parametrize("method", ["surgery", "safree"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_for_it_is_changed_and_harmless_ones_come_back_bit_for_bit(guard, clips, kind, method):
    entries, found = guard(kind, "nude", method)
    before = stock(clips, kind, "nude")
    assert found.startswith("changed") and not torch.equal(entries[0][0], before[0][0]), found
    assert entries[0][0].shape == before[0][0].shape and torch.isfinite(entries[0][0]).all() and entries[0][0].dtype == before[0][0].dtype
    untouched = 0
    from pack.safe_denoiser.words.alarm import harmless

    for text in harmless()[::6]:
        entries, found = guard(kind, text, method)
        untouched += found.startswith("unchanged")
        if found.startswith("unchanged"):
            (cond, extra), = entries
            wanted, more = stock(clips, kind, text)[0]
            assert torch.equal(cond, wanted) and torch.equal(extra["pooled_output"], more["pooled_output"])
    assert untouched >= 17, "of 18"


@pytest.mark.parametrize("kind", KINDS)
def test_surgery_takes_what_one_encoder_hears_out_of_all(guard, clips, kind):
    """e - rho (phi(c) - phi("")) in the rows of every encoder and in the pooled vector, of one chunk and of two."""
    empty, named = (stock(clips, kind, text)[0] for text in ("", "nude"))
    (cond, extra), = guard(kind, "nude", concepts="nude")[0]
    delta, change = named[0] - empty[0], named[0] - cond
    rho = float((change * delta).sum() / delta.square().sum())
    assert 0.5 < rho <= 1
    torch.testing.assert_close(change, rho * delta, rtol=1e-3, atol=1e-4)
    pooled = named[1]["pooled_output"] - empty[1]["pooled_output"]
    torch.testing.assert_close(named[1]["pooled_output"] - extra["pooled_output"], rho * pooled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["surgery", "safree"])
def test_two_chunks_and_weights(guard, clips, method):
    """Each chunk by itself: where the second asks for it, it is changed, as it is alone; a weight is in the rows that are changed."""
    harmless = "a cat and a dog in the garden of a house by the sea " * 6
    words = harmless.split()[:75]
    entries, found = guard("SD 1.5", " ".join([*words, "nude"]), method, concepts="nude", false_alarms=0.5)  # by rows alone
    assert found.startswith("changed") and entries[0][0].shape[1] == 154
    alone, _ = guard("SD 1.5", "nude", method, concepts="nude")
    before = stock(clips, "SD 1.5", " ".join([*words, "nude"]))[0][0]
    if method == "surgery":
        first, second = (before - entries[0][0]).split(77, 1)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)  # what is taken out of all
        assert torch.nn.functional.cosine_similarity(first.flatten(), (before[:, 77:] - alone[0][0]).flatten(), dim=0) > 0.999
    else:
        torch.testing.assert_close(entries[0][0][:, 77:], alone[0][0], rtol=1e-3, atol=1e-3)
        assert torch.equal(entries[0][0][:, :77], stock(clips, "SD 1.5", " ".join(words))[0][0]), "the first chunk does not"
    weighted, found = guard("SD 1.5", "(nude:1.2)", method)
    assert found.startswith("changed") and not torch.equal(weighted[0][0], alone[0][0])


def test_safree_is_a_schedule_of_two(guard, clips):
    """The first part of the schedule has the filtered rows, the rest the prompt's own; only rows of flagged tokens differ."""
    entries, found = guard("SD 1.5", "nude nude cat", "safree")
    (filtered, first), (own, rest) = entries
    before, _ = stock(clips, "SD 1.5", "nude nude cat")[0]
    assert torch.equal(own, before) and (first["start_percent"], rest["end_percent"]) == (0.0, 1.0)
    assert 0 < first["end_percent"] == rest["start_percent"] <= 0.22
    rows = (filtered != before).any(2)[0].nonzero()[:, 0].tolist()
    assert rows and set(rows) <= {1, 2, 3} and "nude" in found, (rows, found)
    assert not torch.equal(first["pooled_output"], rest["pooled_output"])


def test_a_conditioning_of_the_same_clip_will_do_for_surgery(guard, clips, run):
    entries = stock(clips, "SDXL", "nude")
    again, found = run("GuardPrompt", clip=clips("SDXL"), text="", look_for="own words", concepts=CONCEPTS, false_alarms=0.02,
                       conditioning=entries).result
    assert torch.equal(again[0][0], guard("SDXL", "nude")[0][0][0]) and found.startswith("changed")
    with pytest.raises(ValueError, match="this CLIP makes 77 rows"):
        run("GuardPrompt", clip=clips("SDXL"), text="", look_for="own words", concepts=CONCEPTS,
            conditioning=[[torch.zeros(1, 80, 112), {}]])
    with pytest.raises(ValueError, match="method safree leaves out each token"):
        run("GuardPrompt", clip=clips("SDXL"), text="", method="safree", look_for="own words", concepts=CONCEPTS, conditioning=entries)


def test_a_language_model_is_guarded_by_safree_and_refused_by_surgery(guard, clips, pack):
    """Its rows are as many as the text has tokens, those of the template are dropped, and each has seen what is before it only."""
    from pack.nodes.models.text_encoders import Encoders

    encoders, text = Encoders(clips("Qwen-Image")), "a photo of two cats"
    tokens = clips("Qwen-Image").tokenize(text)
    chunk, box = tokens["qwen25_7b"][0], encoders.boxes(tokens)["qwen25_7b"]
    start, stop = encoders.content("qwen25_7b", chunk)
    assert stop - start == 5 and box.rows.stop < len(chunk) and encoders.causal == {"qwen25_7b"}
    rows = [encoders.row("qwen25_7b", tokens, box, place) for place in range(start, stop)]
    before = encoders.encode(tokens)[0]
    for place, row in zip(range(start, stop), rows):
        changed = [(5, 1.0) if i == place else token for i, token in enumerate(chunk)]
        differ = (encoders.encode({"qwen25_7b": [changed]})[0] - before).abs().amax(1) > 1e-4
        assert differ[row] and not differ[:row].any(), "the row of this token"
    with pytest.raises(ValueError, match="as many rows as a text has tokens; choose method safree"):
        guard("Qwen-Image", "nude", "surgery")
    entries, found = guard("Qwen-Image", "nude nude", "safree", concepts="nude", false_alarms=0.5)
    assert torch.isfinite(entries[0][0]).all() and (len(entries) == 2) == found.startswith("changed"), found


def test_every_row_of_a_batch_is_guarded_with_or_without_a_pooled_vector(guard, clips, run):
    (cond, extra), = stock(clips, "SD 1.5", "nude")
    harmless = stock(clips, "SD 1.5", "a lighthouse in a storm, dramatic clouds, oil painting")[0][0]
    settings = dict(clip=clips("SD 1.5"), text="", look_for="own words", concepts="nude", false_alarms=0.5)
    batch = [[torch.cat([harmless, cond, cond]), {"pooled_output": extra["pooled_output"].repeat(3, 1)}]]
    found, said = run("GuardPrompt", conditioning=batch, **settings).result
    assert said.startswith("changed") and torch.equal(found[0][0][1], found[0][0][2]) and not torch.equal(found[0][0][1], cond[0])
    found, said = run("GuardPrompt", conditioning=[[cond, {"strength": 0.5}]], **settings).result
    assert said.startswith("changed") and found[0][1] == {"strength": 0.5}


def test_what_an_encoder_writes_elsewhere_is_not_left_unguarded(run, clips, monkeypatch):
    """HiDream's language model hands the rows of its layers over beside the conditioning."""
    clip = clips("SDXL").clone()
    real = clip.encode_from_tokens
    monkeypatch.setattr(clip, "encode_from_tokens", lambda tokens, **options: {
        **real(tokens, **options), "conditioning_llama3": torch.full((1, 2, 3, 4), float(tokens["g"][0][1][0]))})
    with pytest.raises(ValueError, match="the text encoder 'g' cannot be told"):
        run("GuardPrompt", clip=clip, text="a cat", concepts="nude")


def test_off_is_bit_for_bit_and_what_is_missing_is_said(guard, clips, run):
    entries, found = guard("SD 1.5", "nude", strength=0.0)
    assert torch.equal(entries[0][0], stock(clips, "SD 1.5", "nude")[0][0]) and found.startswith("off")
    for concepts, message in ((" \n", "there is nothing to look for"), ("word " * 90, "too long for the text encoder 'l'")):
        with pytest.raises(ValueError, match=message):
            guard("SD 1.5", "nude", concepts=concepts)
    with pytest.raises(ValueError, match="has no text encoder"):
        run("GuardPrompt", clip=None, text="")


def test_the_harmless_prompts_are_encoded_once(guard, clips, monkeypatch):
    from pack.nodes.models.text_encoders import Encoders

    calls = []
    real = Encoders.encode
    monkeypatch.setattr(Encoders, "encode", lambda self, tokens: calls.append(0) or real(self, tokens))
    guard("SD 1.5", "a cat", concepts="a word of its own")
    first = len(calls)
    guard("SD 1.5", "a dog", concepts="a word of its own")
    assert first > 100 > 4 > len(calls) - first


def test_after_a_restart_the_scores_of_harmless_prompts_are_read_from_disk(guard, clips, monkeypatch):
    """As long as the list, the encoder and what is looked for are the same."""
    from pack.nodes import folders
    from pack.nodes.words import guard as module

    monkeypatch.setattr(module, "_known", type(module._known)())
    before = guard("SD 1.5", "nude", concepts="two words")
    real, measured = module.Guard.measured, []
    monkeypatch.setattr(module.Guard, "measured", lambda self: measured.append(0) or real(self))

    def restarted(**settings):
        module._known.clear()
        return guard("SD 1.5", "nude", **{"concepts": "two words", **settings})

    again = restarted()
    assert not measured and again[1] == before[1] and torch.equal(again[0][0][0], before[0][0][0])
    restarted(concepts="other words"), restarted(method="safree")
    assert len(measured) == 2
    for path in folders.cache("guards").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert restarted()[1] == before[1] and len(measured) == 3
    fewer = module.harmless()[:-1]
    monkeypatch.setattr(module, "harmless", lambda: fewer)
    restarted()
    assert len(measured) == 4, "another list"


def test_names_are_looked_for_in_what_is_said_of_them(pack):
    from pack.nodes.words.guard_prompt import concepts_of

    assert concepts_of("names", "Ann Example\n") == ["Ann Example", "a portrait of Ann Example", "in the style of Ann Example",
                                                     "art by Ann Example"]
    assert concepts_of("nudity", "swimwear\nnude")[-1] == "swimwear" and len(set(concepts_of("violence", ""))) >= 9
    lines = (ROOT / "safe_denoiser/words/harmless.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 207 and all(line == line.strip() and line for line in lines), "1 % needs 99, and a margin"
