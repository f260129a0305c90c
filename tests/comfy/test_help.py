"""The help page of each node says what the node really has, and explains messages that the code really gives; in each language the same.

A translation's last line says of which English text it is: where that has changed since, the test names the translations that are to be
renewed. `python -m tests.comfy.test_help web/docs/SafeDenoiserApply/fr.md ...` writes it, when they are.
"""
import ast
import re
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dev import ROOT
from tests.comfy.test_locales import LANGUAGES, OTHERS, words

DOCS = ROOT / "web/docs"
KINDS = re.compile(r"^(#+ |- |\d\. |```|!\[)", re.MULTILINE)  # headings, items, code, pictures
IDS, NUMBERS = re.compile(r"`[!-_a-~]+`"), re.compile(r"\d+(?:\.\d+)?")  # the same in every language
OF = "<!-- of {:08x} -->\n"
FOREIGN = {"Saving image outside the output folder is not allowed"}  # ComfyUI's own


@pytest.fixture(scope="module")
def schemas(pack):
    return {node_id: node.GET_SCHEMA() for node_id, node in pack.items()}


def page(node_id, language="en"):
    return (DOCS / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")).read_text(encoding="utf-8")


def last_line(node_id):
    return OF.format(zlib.crc32(page(node_id).encode()))


def links(text):
    return re.findall(r"\]\((.+?)\)", text)


def numbers(text):
    return NUMBERS.findall(re.sub(r"(?<=\d)[,\s](?=\d{3}(?!\d))", "", text))


def headings(text):
    return re.findall("^## (.+)$", text, re.MULTILINE)


def rows(text, section):
    """Of each item under a heading: what it is about, its range in brackets, if it has one, and what is said of it."""
    part = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [[cell for cell in re.fullmatch(r"- `(.+?)`(?: \((.+?)\))?: (.+)", line).groups() if cell] for line in part.splitlines()
            if line.startswith("- ")]


def test_every_node_has_a_page_and_every_page_a_node(schemas):
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted(schemas)
    assert sorted(path.stem for path in (DOCS / "img").iterdir()) == sorted(schemas)
    assert sorted(DOCS.glob("*/*.md")) == sorted(DOCS / node_id / f"{language}.md" for node_id in schemas for language in OTHERS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_can_be_read_in_a_narrow_panel(language, schemas):
    """Short sections and lists: the panel is 272 pixels wide, in which a table has no room."""
    for node_id in schemas:
        text = page(node_id, language)
        assert not re.search(r"^\|", text, re.MULTILINE), node_id
        assert max(map(len, text.splitlines())) < 600, node_id
        unbroken = r"[^\s\u2e80-\uffef]{33,}"  # Chinese, Japanese and Korean break anywhere
        assert not re.search(unbroken, re.sub(r"!?\[(.*?)\]\(.*?\)", r"\1", text)), "what cannot be broken sticks out"


def test_pages_say_what_and_when_and_show_the_node(schemas):
    for node_id, schema in schemas.items():
        text = page(node_id)
        assert text.startswith(f"# {schema.display_name}\n") and len(text.partition("## When to use it\n")[2].partition("##")[0]) > 100
        picture = re.search(r"!\[.+\]\((.+)\)", text)[1]
        assert Image.open(DOCS / picture).width > 300 and (DOCS / picture).stat().st_size < 100_000


@pytest.mark.parametrize("language", OTHERS)
def test_translations_say_the_same(language, schemas):
    """Headings, items, code and pictures in the same order, with the same ids and numbers, and the words that the node has."""
    for node_id, entry in words(language).items():
        ours, theirs = page(node_id), page(node_id, language)
        where = f"{node_id}/{language}.md"
        assert theirs.startswith(f"# {entry['display_name']}\n"), where
        assert KINDS.findall(theirs) == KINDS.findall(ours) and links(theirs) == links(ours), where
        assert set(IDS.findall(theirs)) == set(IDS.findall(ours)) and set(numbers(theirs)) >= set(numbers(ours)), where
        of = dict(zip(headings(ours), headings(theirs)))
        for section, said in (("Inputs", [*entry["inputs"].values()]), ("Outputs", [*entry["outputs"].values()])):
            pairs = list(zip(rows(ours, section), rows(theirs, of.get(section)), said, strict=True))
            for (name, *span, _), (same, *translated, what), word in pairs:
                assert same == name and word["tooltip"] in what, (where, name)
                for found in (IDS.findall, numbers):
                    assert [*map(found, translated)] == [*map(found, span)], (where, name)


def test_translations_are_of_the_english_text_that_is_there(schemas):
    stale = [f"{node_id}/{language}.md" for node_id in schemas for language in OTHERS
             if not page(node_id, language).endswith("\n" + last_line(node_id))]
    assert stale == [], "renew these, then python -m tests.comfy.test_help with them"


def number(text):
    return float(text.rstrip("."))


def test_each_input_has_its_range(schemas):
    for node_id, schema in schemas.items():
        found = {cells[0]: cells[1:] for cells in rows(page(node_id), "Inputs")}
        assert list(found) == [one.id for one in schema.inputs], node_id
        for one in schema.inputs:
            span, what = found[one.id]
            where = f"{node_id}.{one.id}: {span}"
            assert one.tooltip in what, where
            if one.io_type in ("INT", "FLOAT"):
                low, high, default = map(number, re.fullmatch(r"\w+, (\S+) to (\S+); default (\S+)", span).groups())
                assert (low, high, default) == (one.min, pytest.approx(one.max), one.default), where
            elif one.io_type == "COMBO" and span != "one of a list":
                options, _, default = span.partition("; default ")
                assert re.findall("`(.+?)`", options) == one.options, where
                assert not default or default.strip("`") == one.default, where
            elif one.io_type == "STRING" and "\n" in one.default:
                assert span == "text; default below" and f"\n```\n{one.default}\n```\n" in page(node_id), where
            elif one.io_type == "STRING":
                assert span == f"text; default `{one.default}`", where
            elif one.io_type != "COMBO":
                assert span == one.io_type, where


def test_each_output_is_there(schemas):
    for node_id, schema in schemas.items():
        assert rows(page(node_id), "Outputs") == [[one.display_name or one.io_type, one.tooltip] for one in schema.outputs]


def messages():
    """Every text in the code, with … for what is filled in."""
    for folder in ("nodes", "safe_denoiser"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_each_message_is_one_that_the_code_gives(schemas):
    given = list(messages())
    for node_id in schemas:
        found = rows(page(node_id), "Messages and their cures")
        assert found, node_id
        for message, cure in found:
            assert len(cure) > 20 and (message in FOREIGN or any(message in one for one in given)), (node_id, message)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8").rpartition("<!-- of ")
        path.write_text((text[0] or text[2]).rstrip() + "\n\n" + last_line(path.parent.name), encoding="utf-8")
