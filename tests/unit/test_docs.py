"""What people read: a README of one screen per question, links that lead somewhere, and no picture that nothing shows."""
import re
from urllib.parse import unquote

import pytest

from dev import PICTURES, ROOT

PAGES = [path.relative_to(ROOT).as_posix() for pages in ("*.md", "docs/*.md", "benchmarks/*.md", "tiny_*/*.md")
         for path in sorted(ROOT.glob(pages))]
CODE = re.compile(r"^```.*?^```$|^    .*?$", re.MULTILINE | re.DOTALL)
LINKS = re.compile(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)|^\[[^\]]+\]: <?([^>\n]+?)>?$", re.MULTILINE)  # [text](to), and [name]: to


def prose(page):
    """Its text without code, in which brackets are no links."""
    text = CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", " ", code[0]), text)


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def targets(page):
    """Files of this repository that a page links to, each with its anchor."""
    for found in LINKS.finditer(prose(page)):
        link = found[1] or found[2]
        if not re.match(r"https?:|mailto:", link):
            path, _, anchor = link.partition("#")
            yield link, (ROOT / page).parent / unquote(path) if path else ROOT / page, anchor


def test_readme_has_at_most_120_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_file_and_a_heading_that_exist(page):
    for link, path, anchor in targets(page):
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES)
def test_each_name_of_a_link_is_explained(page):
    text = prose(page)
    names = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert names == set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))


def pictures():
    """All of the repository but those that are data: negation sets, and what tests and runs leave."""
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix in (".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp") and parts[0] not in ("demo", "tables", "build", "dist") \
                and not any(part.startswith(".") or part == "negation_sets" for part in parts):
            yield path


def test_each_picture_is_shown_somewhere():
    """By a page, by a help page, beside its template, or by the registry."""
    helps = [path.relative_to(ROOT).as_posix() for path in (ROOT / "web/docs").glob("**/*.md")]
    shown = {path.resolve() for page in (*PAGES, *helps) for _, path, _ in targets(page)}
    registry = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not [path for path in pictures() if path.resolve() not in shown and not (ROOT / f"example_workflows/{path.stem}.json").exists()
                and path.relative_to(ROOT).as_posix() not in registry]


def test_one_command_makes_each_picture_and_knows_how():
    makers = {pattern: [*ROOT.glob(pattern)] for pattern in PICTURES}
    assert all(makers.values()) and sorted(path for made in makers.values() for path in made) == sorted(pictures())
    for command in filter(None, PICTURES.values()):
        module, *arguments = command.split()
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert all(f'"{argument}"' in source for argument in arguments if argument.startswith("--")), command
