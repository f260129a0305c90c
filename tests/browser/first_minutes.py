"""An artist's first minutes in figures, for docs/evidence.md: `SAFE_DENOISER_COMFYUI=PATH python -m tests.browser.first_minutes`
(with parts of the names of mistakes behind it, only these are tried).

Nodes and wires of the smallest graph, words of the README, seconds from an empty browser to the first pictures off and on, and after how
many clicks the cure of a common mistake is read.
"""
import json
import os
import re
import sys
import tempfile
import time

from playwright.sync_api import sync_playwright

from dev import ROOT, Server
from tests.browser.conftest import BROWSER, Page
from tests.browser.pictures import WINDOW
from tests.conftest import CHROMIUM

SET, WITHOUT = "choose(widget('{0}', '{1}'), {2})", "node('SafeDenoiserKSampler').disconnectInput(input('{0}'))"
SAMPLER, FOLDER, SIZE = "SafeDenoiserKSampler", "SafeDenoiserLoadNegationSet", "EmptySD3LatentImage"
MISTAKES = {  # what is done to a template, and what the cure says
    "no set is chosen": ("Tiny digits", [SET.format(FOLDER, "folder", "'choose a set'")], "or choose a set"),
    "the set is not on this machine": ("Tiny digits", [SET.format(FOLDER, "folder", "'elsewhere'")], "put the pictures into it"),
    "nothing says what must not come out": ("Tiny digits", [WITHOUT.format("negation_bank"), WITHOUT.format("reference_bank")], "connect"),
    "a bank of another size": ("Tiny digits", [SET.format(SIZE, "width", 64)], "build both with the same VAE at the same size"),
    "cfg 1 without neutral": ("1 Try it", [SET.format(SAMPLER, "cfg", 1)], "connect an empty prompt to neutral"),
    "strength 5": ("Tiny digits", [SET.format(SAMPLER, "strength", 5)], "strength above 2 spoils pictures"),
    "the paper's rule at strength 1": ("Tiny digits", [SET.format(SAMPLER, "method", "'official'")], "strength 0.33 and end 0.22"),
    "one picture in the folder": ("Tiny digits", [SET.format(FOLDER, "max_images", 1)], "15 or more are better"),
}
GRAPH = """const node = kind => app.graph.nodes.find(n => n.type === kind);
    const widget = (kind, name) => node(kind).widgets.find(w => w.name === name);
    const choose = (w, value) => { w.value = value; w.callback?.(value) };  // as a person does
    const input = name => node('SafeDenoiserKSampler').inputs.findIndex(i => i.name === name);"""


def smallest():
    """Nodes and wires of what draws a picture with Keep Out: the template without its note and without what draws Off."""
    workflow = json.loads((ROOT / "example_workflows/2 Keep something out by words.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    needed, left = set(), [key for key, node in nodes.items() if node["type"] == "SaveImage"]
    while left:
        needed.add(key := left.pop())
        left += [link[1] for link in workflow["links"] if link[3] == key and link[1] not in needed]
    return len(needed), sum(link[3] in needed for link in workflow["links"])


def words():
    """Of the README, without addresses and commands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return len(re.findall(r"[A-Za-z][\w'-]*", re.sub(r"\]\([^)]*\)|^\[[^\]]+\]: .*$|^    .*$", "", text, flags=re.MULTILINE)))


def first_pair(browser, server):
    """Seconds from an empty browser to the pictures off and on: the page, Browse Templates, the first template, Run."""
    began = time.monotonic()
    page = Page(browser.new_context(viewport=WINDOW).new_page(), server, False)
    page.view.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.view.locator("[role=dialog]").get_by_text("comfyui-safe-denoiser", exact=True).first.click()
    page.view.get_by_test_id("template-workflow-1 Try it").click()
    page.view.wait_for_function("app.graph.nodes.some(n => n.type === 'SafeDenoiserKSampler')")
    page.close_dialogs()
    entry = page.run()
    assert len(page.pictures("PreviewImage", entry)) == len(page.pictures("SaveImage", entry)) == 16
    seconds = time.monotonic() - began
    page.view.close()
    return seconds


def clicks(page, template, changes, cure):
    """Run what is set up wrongly; how many clicks later its cure can be read."""
    page.load(template)
    page.view.evaluate(f"() => {{ {GRAPH} {'; '.join(changes)} }}")
    page.view.get_by_test_id("queue-button").click()
    for count in range(4):
        for _ in range(60 if count == 0 else 5):
            if cure in page.view.locator("body").inner_text():
                page.close_dialogs()
                return count
            page.view.wait_for_timeout(500)
        more = page.view.get_by_role("button", name=re.compile("details|errors", re.IGNORECASE))
        if not more.count():
            break
        more.first.click()
    return "never"


def main():
    nodes, wires = smallest()
    print(f"the smallest graph: {nodes} nodes, {wires} wires; README: {words():,} words", flush=True)
    comfyui = os.environ["SAFE_DENOISER_COMFYUI"]
    with tempfile.TemporaryDirectory() as base, Server(comfyui, base) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=BROWSER)
        if not sys.argv[1:]:
            print(f"from an empty browser to the first pair: {first_pair(browser, server):.0f} s", flush=True)
        for what, (template, changes, cure) in MISTAKES.items():
            if sys.argv[1:] and not any(part in what for part in sys.argv[1:]):
                continue
            page = Page(browser.new_page(viewport=WINDOW), server, False)
            print(f"{what}: the cure is read after {clicks(page, template, changes, cure)} clicks", flush=True)
            page.view.close()
        browser.close()


if __name__ == "__main__":
    main()
