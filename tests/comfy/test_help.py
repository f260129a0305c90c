"""The help page of each node says what the node really has, and explains messages that the code really gives."""
import ast
import re

import pytest
from PIL import Image

from dev import ROOT

DOCS = ROOT / "web/docs"
FOREIGN = {"Saving image outside the output folder is not allowed"}  # ComfyUI's own


@pytest.fixture(scope="module")
def schemas(pack):
    return {node_id: node.GET_SCHEMA() for node_id, node in pack.items()}


def page(node_id):
    return (DOCS / f"{node_id}.md").read_text(encoding="utf-8")


def rows(text, section):
    """Of each item under a heading: what it is about, its range in brackets, if it has one, and what is said of it."""
    part = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [[cell for cell in re.fullmatch(r"- `(.+?)`(?: \((.+?)\))?: (.+)", line).groups() if cell] for line in part.splitlines()
            if line.startswith("- ")]


def test_every_node_has_a_page_and_every_page_a_node(schemas):
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted(schemas)
    assert sorted(path.stem for path in (DOCS / "img").iterdir()) == sorted(schemas)


def test_pages_can_be_read_in_a_narrow_panel(schemas):
    """Short sections and lists: the panel is 272 pixels wide, in which a table has no room."""
    for node_id in schemas:
        assert not re.search(r"^\|", page(node_id), re.MULTILINE), node_id
        assert max(map(len, page(node_id).splitlines())) < 600, node_id
        words = re.findall(r"\S+", re.sub(r"!?\[(.*?)\]\(.*?\)", r"\1", page(node_id)))
        assert [word for word in words if len(word) > 32] == [], "what cannot be broken sticks out"


def test_pages_say_what_and_when_and_show_the_node(schemas):
    for node_id, schema in schemas.items():
        text = page(node_id)
        assert text.startswith(f"# {schema.display_name}\n") and len(text.partition("## When to use it\n")[2].partition("##")[0]) > 100
        picture = re.search(r"!\[.+\]\((.+)\)", text)[1]
        assert Image.open(DOCS / picture).width > 300 and (DOCS / picture).stat().st_size < 100_000


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
        for path in (ROOT / folder).glob("*.py"):
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
