"""Pictures of the pack, made anew in ComfyUI's own page: `python dev.py pictures`.

Of each template its thumbnail in example_workflows/: what came out, where it runs with the models that the pack ships, else the nodes that
tell what it does. Of each node the picture of its help page in web/docs/img/, with what it shows after a run. What looks as it did stays;
the other files are written, and named. `python dev.py pictures Curate "Try it"` makes those that have one of these in their names.
"""
import io
import json
import os
import sys
import tempfile
from contextlib import contextmanager

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from dev import ROOT, Server
from tests.browser.conftest import BROWSER, SETTING, Page
from tests.conftest import CHROMIUM, NEEDS, runs_here

TEMPLATES, HELP = ROOT / "example_workflows", ROOT / "web/docs/img"
WINDOW = {"width": 1900, "height": 1000}
WIDTH, LARGEST = 640, 60 * 1024  # of a thumbnail, in pixels and bytes
SAME = 1.0  # mean difference of two pictures, of 255, that is nobody's doing
SHOWS = ["SaveImage", "PreviewImage"]
TELLS = ["KSampler", "CLIPTextEncode", "SafeDenoiserKSampler", "SafeDenoiserKeepOut", "SafeDenoiserLearnUnwantedCondition"]  # others
AFTER_A_RUN = {"SafeDenoiserNegationSetFromImages": "Tiny digits, set drawn by the model", "SafeDenoiserReport": "Tiny digits",
               "SafeDenoiserCheckImages": "Tiny digits, check and sample again"}

BARE = ".bare * { visibility: hidden } .bare :is(#graph-canvas, .dom-widget, .dom-widget *) { visibility: visible }"
FRAME = """async ([ids, ratio, scale]) => {
    const nodes = app.graph.nodes.filter(n => ids.includes(n.id)), {ds} = app.canvas, title = LiteGraph.NODE_TITLE_HEIGHT;
    const least = i => Math.min(...nodes.map(n => n.pos[i] - i * (title + 26)));  // over a node is its pack's name
    const most = i => Math.max(...nodes.map(n => n.pos[i] + n.size[i]));
    let [left, top, right, bottom] = [least(0) - 14, least(1) - 8, most(0) + 14, most(1) + 14];
    if (ratio) {  // what is around it makes the picture wide or high enough
        left = Math.min(left, right - (bottom - top) / ratio);
        top = Math.min(top, bottom - (right - left) / ratio);
    }
    app.canvas.show_info = false;
    for (const n of app.graph.nodes) n.has_errors = false;  // a model of the user's that is not here
    ds.scale = scale;
    ds.offset = [-left, -top];
    return [(right - left) * scale, (bottom - top) * scale].map(Math.ceil);
}"""


def ids_of(page, kinds):
    """Nodes of these types that are neither muted nor bypassed."""
    return page.view.evaluate("kinds => app.graph.nodes.filter(n => kinds.includes(n.type) && !n.mode).map(n => n.id)", kinds)


def picture(page, ids, ratio=None, scale=1.0):
    """These nodes as they are drawn, nothing of the page over them; `ratio`: the largest of width to height, and of height to width."""
    width, height = page.view.evaluate(FRAME, [ids, ratio, scale])
    page.view.set_viewport_size({"width": width + 80, "height": height + 80})
    page.view.evaluate(FRAME, [ids, ratio, scale])  # the page moves what it shows when its size changes
    page.view.evaluate("document.body.classList.add('bare'), app.canvas.setDirty(true, true)")
    page.view.wait_for_timeout(1000)
    left, top = page.view.evaluate("(({left, top}) => [left, top])(app.canvas.canvas.getBoundingClientRect())")
    data = page.view.screenshot(clip={"x": left, "y": top, "width": width, "height": height})
    page.view.evaluate("document.body.classList.remove('bare')")
    page.view.set_viewport_size(WINDOW)
    return Image.open(io.BytesIO(data)).convert("RGB")


def keep(path, made):
    """Write a picture unless the file looks the same already; whether it was written."""
    if path.exists():
        there = Image.open(path).convert("RGB")
        if there.size == made.size and np.abs(np.subtract(there, made, dtype=float)).mean() < SAME:
            return False
    for quality in range(90, 20, -10):
        data = io.BytesIO()
        made.save(data, "JPEG" if path.suffix == ".jpg" else "PNG", quality=quality, optimize=True)
        if data.tell() <= LARGEST:
            break
    path.write_bytes(data.getvalue())
    return True


def thumbnails(page, wanted):
    """Of each template that is wanted and has all its nodes here; with it the help pictures of nodes that show something after a run."""
    there = page.server.get("/object_info")
    for path in sorted(TEMPLATES.glob("*.json")):
        if not wanted(path.stem) or NEEDS.get(path.stem, "SafeDenoiserApply") not in there:
            continue
        page.load(path.stem)
        runs = runs_here(json.loads(path.read_text(encoding="utf-8")), there)
        if runs:
            page.run(seconds=600)
        made = picture(page, ids_of(page, SHOWS if runs else TELLS), ratio=1.2)
        yield path.with_suffix(".jpg"), made.resize((WIDTH, round(WIDTH * made.height / made.width)), Image.Resampling.LANCZOS)
        for kind in (kind for kind, template in AFTER_A_RUN.items() if template == path.stem):
            yield HELP / f"{kind}.png", picture(page, ids_of(page, [kind])[:1], scale=1.2)


def choosing(kind, **inputs):
    """A graph in API format in which a node of this kind chooses among shipped ones and fours."""
    return {"1": {"class_type": "SafeDenoiserLoadNegationSet", "inputs": {
                "folder": "tiny_ones_and_fours", "max_images": 0, "preview": "off"}},
            "2": {"class_type": "SafeDenoiserLoadOpenCLIP", "inputs": {
                "weights": "tiny_clip", "architecture": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "allow_download": False}},
            "3": {"class_type": kind, "inputs": {"clip": ["2", 0], "negation_set": ["1", 0], "preview": "shown", **inputs}},
            "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2 if "wanted" in inputs else 1]}}}


CHOOSING = {
    "SafeDenoiserCurateNegationSet": dict(text="a four", against="a one", threshold=0.5, duplicates=0.96, top_k=0, diverse_k=0),
    "SafeDenoiserSplitNegationSet": dict(unwanted="a four", wanted="a one", sure=0.9),
}


def help_pictures(page, wanted):
    """Of each node that is wanted, as it is put down, with all its widgets; Curate and Split with what they choose."""
    for kind in filter(wanted, sorted(path.stem for path in HELP.parent.glob("*.md"))):
        if kind in CHOOSING:
            page.view.evaluate("graph => app.loadApiJson(graph, 'choosing')", choosing(kind, **CHOOSING[kind]))
            page.view.wait_for_timeout(500)
            page.run()
            page.place(kind)
            page.view.wait_for_function("kind => picturesOf(kind)[0]?.naturalWidth", arg=kind)
            page.view.wait_for_timeout(1000)  # the page makes room for it
            page.view.evaluate("""kind => { const node = app.graph.nodes.find(n => n.type === kind);
                node.setSize([320, node.computeSize()[1] + 100]) }""", kind)
        elif kind not in AFTER_A_RUN:
            page.view.evaluate("""kind => { const last = app.graph.last_node_id ?? app.graph.state.lastNodeId; app.graph.clear();
                const node = LiteGraph.createNode(kind); node.id = last + 1;  // the page remembers widgets by the number of a node
                app.graph.add(node);
                const folder = node.widgets?.find(w => w.name === 'folder'), height = () => node.computeSize()[1] + (folder ? 220 : 0);
                if (folder) { folder.value = 'tiny_sevens'; folder.callback('tiny_sevens') }
                node.showAdvanced = true; node.setSize([Math.max(300, node.size[0]), height()]) }""", kind)
        else:
            continue
        yield HELP / f"{kind}.png", picture(page, ids_of(page, [kind]), scale=1.2)


@contextmanager
def canvas_of(comfyui):
    """The page of a ComfyUI of its own, drawn as a canvas."""
    with tempfile.TemporaryDirectory() as base, Server(comfyui, base) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=BROWSER)
        server.post("/settings", {SETTING: False})
        page = Page(browser.new_page(viewport=WINDOW), server, False)
        page.view.add_style_tag(content=BARE)
        yield page
        browser.close()


def main():
    names = sys.argv[1:]
    with canvas_of(os.environ["SAFE_DENOISER_COMFYUI"]) as page:
        for made in (thumbnails, help_pictures):
            for path, image in made(page, lambda name: not names or any(part in name for part in names)):
                print(f"{'new ' if keep(path, image) else 'same'}  {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
