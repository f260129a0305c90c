"""Every node, input and output has its words in every language, and so has what the page says; the schemas are the measure."""
import json
import re

import numpy as np
import pytest
import torch

from dev import ROOT

LANGUAGES = ("en", "zh", "ja", "ko", "fr", "es")
SCRIPT = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]"}


def words(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def plain(text):
    """What the page shows. Some front ends read | as a plural, @ as a link and braces as a value, and others show what would quote them."""
    assert not re.search(r"[|@{}]", text), text
    return text


OTHERS = [language for language in LANGUAGES if language != "en"]


def main(language):
    return json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))


def sentences(language):
    """What web/words.js translates: English -> theirs."""
    return main(language)["safeDenoiser"]


@pytest.fixture(scope="module")
def schemas(pack):
    return {node_id: node.GET_SCHEMA() for node_id, node in pack.items()}


def test_these_languages_are_there():
    assert sorted(path.name for path in (ROOT / "locales").iterdir()) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_id_input_and_output_has_an_entry(language, schemas):
    found = words(language)
    assert sorted(found) == sorted(schemas)
    for node_id, schema in schemas.items():
        entry = found[node_id]
        assert set(entry) == {"display_name", "description", "inputs", "outputs"}, node_id
        assert list(entry["inputs"]) == [one.id for one in schema.inputs], node_id
        assert set(entry["outputs"]) == {str(i) for i in range(len(schema.outputs))}, node_id
        for thing in [*entry["inputs"].values(), *entry["outputs"].values()]:
            assert set(thing) == {"name", "tooltip"} and thing["name"] and thing["tooltip"], (node_id, thing)


def test_english_is_what_the_nodes_say(schemas):
    for node_id, entry in words("en").items():
        schema = schemas[node_id]
        assert (entry["display_name"], plain(entry["description"])) == (schema.display_name, schema.description)
        for one in schema.inputs:
            assert (entry["inputs"][one.id]["name"], plain(entry["inputs"][one.id]["tooltip"])) == (one.id, one.tooltip)
        for i, one in enumerate(schema.outputs):
            assert (entry["outputs"][str(i)]["name"], plain(entry["outputs"][str(i)]["tooltip"])) == \
                (one.display_name or one.io_type, one.tooltip)


@pytest.mark.parametrize("language", OTHERS)
def test_the_others_are_translated(language):
    english = words("en")
    for node_id, entry in words(language).items():
        pairs = [(entry["description"], english[node_id]["description"])]
        pairs += [(entry[part][key]["tooltip"], english[node_id][part][key]["tooltip"]) for part in ("inputs", "outputs")
                  for key in entry[part]]
        assert entry["display_name"] != english[node_id]["display_name"]
        for theirs, ours in pairs:
            plain(theirs)
            assert theirs != ours, (node_id, theirs)
            assert re.search(SCRIPT.get(language, "."), theirs), (node_id, theirs)
            numbers = [re.findall(r"\d+(?:\.\d+)?", re.sub(r"\w*_\d|pooled", "", text)) for text in (theirs, ours)]
            assert set(numbers[0]) >= set(numbers[1]), (node_id, theirs, ours)


@pytest.mark.parametrize("language", OTHERS)
def test_categories_are_translated(language, schemas):
    """Below the pack's name; the page shows them in its list of nodes."""
    below = {schema.category.partition("/")[2] for schema in schemas.values()} - {""}
    assert below and set(main(language)["nodeCategories"]) == below


@pytest.mark.parametrize("language", OTHERS)
def test_what_the_page_says_is_translated(language):
    """All that web/*.js writes itself, and the same sentences in each language, with the same things filled in."""
    found, code = sentences(language), "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web").glob("*.js"))
    written = re.findall(r'words\((?:shown \? )?"([^"]+)"', code)
    assert len(written) > 8 and set(written) <= set(found)
    assert list(found) == list(sentences(OTHERS[0]))
    for english, theirs in found.items():
        assert theirs != english and not (language in SCRIPT and theirs.isascii()), english
        assert sorted(re.findall(r"\{\d\}", theirs)) == sorted(re.findall(r"\{\d\}", english)), english
        assert set(re.findall(r"\d+(?:\.\d+)?", theirs)) == set(re.findall(r"\d+(?:\.\d+)?", english)), english


def texts(entry):
    """All strings of a nested table."""
    return [entry] if isinstance(entry, str) else [text for one in entry.values() for text in texts(one)]


@pytest.mark.parametrize("language", OTHERS)
def test_our_nodes_are_called_by_the_names_that_they_have_there(language):
    """In tooltips, live texts and help pages; messages, which are English, are in backquotes there."""
    ours, theirs = words("en"), words(language)
    pages = [re.sub("`.+?`", "", path.read_text(encoding="utf-8")) for path in (ROOT / "web/docs").glob(f"*/{language}.md")]
    assert len(pages) == len(ours)
    for node_id, entry in ours.items():
        name, here = entry["display_name"], theirs[node_id]["display_name"]
        assert here != name and not [text for text in [*texts(theirs), *texts(main(language)), *pages] if name in text], (name, here)


@pytest.mark.parametrize("language, label", {"zh": "运行", "ja": "実行する", "ko": "실행", "fr": "Exécuter", "es": "Ejecutar"}.items())
def test_the_button_is_called_what_the_page_calls_it(language, label):
    """`menu.run` of comfyui-frontend-package 1.27.10 and 1.49.6."""
    pressed = [theirs for english, theirs in sentences(language).items() if "press Run" in english]
    pages = [(ROOT / f"web/docs/{node_id}/{language}.md").read_text(encoding="utf-8")
             for node_id in ("SafeDenoiserKeepOut", "SafeDenoiserLearnUnwantedCondition")]
    assert pressed and all(label in text and not re.search(r"\bRun\b", text) for text in pressed + pages)


def test_what_a_run_says_has_a_sentence():
    """Each sentence on a node fits one of the table, so that it is not in English only."""
    from pack.safe_denoiser import sentence
    from pack.safe_denoiser.condition.gain import VERDICT
    from pack.safe_denoiser.meaning.describe import Description, _verdict

    patterns = [re.compile(re.sub(r"\\{\d\\}", "(.+?)", re.escape(english))) for english in sentences("zh")]
    summary = {"model_calls": 20, "fallbacks": 0, "corrected_calls": 20, "posterior": 0.0, "correction": 0.0}
    far, near = np.full((20, 4), 0.2), np.zeros((20, 4))
    said = [sentence.afterwards(summary, far, True, what, most) for what in ("", "“blood”") for most in ("", "a.png")]
    said += [sentence.afterwards(summary | changed, near, True, what) for what in ("", "“blood”") for changed in (
        {}, {"posterior": 0.2, "correction": 0.01}, {"posterior": 0.9, "correction": 0.01}, {"corrected_calls": 0})]
    said += [sentence.left(3, 9, seconds) for seconds in (20, 200)] + [f"{VERDICT}: no (30%); connect one that asks for what they show"]
    verdicts = [_verdict(chosen, sizes, 9) for chosen in (0, 2) for sizes in ((40,), (40, 40), (2,), (2, 2))]
    told = ("chosen", "not among the best 3", "no clear difference", "fits too few (10% needed)")
    for shares in (torch.full((1, 4), 0.5), torch.full((2, 4), 0.5)):
        verdicts.append(Description(tuple("abcd"), torch.zeros(4), shares, told, (0,), None, None, "").table.strip())
    verdicts += [*told, "a prompt, not measured", "unwanted_00001_.safetensors: 3.1 KB; not saved: area, mask"]
    for line in said + [line for text in verdicts for line in text.splitlines()] + [line.partition(": ")[2] for line in verdicts[:8]]:
        assert line and any(pattern.fullmatch(line) for pattern in patterns), line
