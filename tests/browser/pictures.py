"""All pictures of the pack, made anew: `python dev.py pictures`. `PICTURES` in dev.py lists them.

In ComfyUI's own page: of each template its thumbnail in example_workflows/, which is what came out, where it runs with the models that the
pack ships, else the nodes that tell what it does; of each node the picture of its help page in web/docs/img/, with what it shows after a
run. By commands of their own: the figures of the docs. Each picture gets a line:

    same  it looks as it did, and the file stays
    new   it looks different, and the file is written
    none  it was not made, and why

`python dev.py pictures Curate "Try it"` makes those that have one of these in their names.
"""
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from dev import PAGE, PICTURES, ROOT, Server
from tests.browser.conftest import BROWSER, SETTING, Page
from tests.conftest import CHROMIUM, NEEDS, runs_here

TEMPLATES, HELP = ROOT / "example_workflows", ROOT / "web/docs/img"
WINDOW = {"width": 1900, "height": 1000}
WIDTH, LARGEST = 640, 60 * 1024  # of a thumbnail, in pixels and bytes
SAME, BLOCK = 4.0, 16  # mean difference of two pictures, of 255, in any square of so many pixels that nobody sees
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


def alike(one, other):
    """Whether two pictures look the same everywhere: a digit that changed among a hundred moves the mean of all by nothing."""
    if one.size != other.size:
        return False
    apart = np.abs(np.subtract(one, other, dtype=float)).mean(2)
    apart = np.pad(apart, [(0, -side % BLOCK) for side in apart.shape])
    return apart.reshape(len(apart) // BLOCK, BLOCK, -1, BLOCK).mean((1, 3)).max() < SAME


def keep(path, made):
    """Write a picture unless the file looks the same already; whether it was written. Compared as the file would be, loss and all."""
    for quality in range(90, 20, -10):
        data = io.BytesIO()
        made.save(data, "JPEG" if path.suffix == ".jpg" else "PNG", quality=quality, optimize=True)
        if path.suffix == ".png" or data.tell() <= LARGEST:
            break
    if path.exists() and alike(Image.open(path).convert("RGB"), Image.open(data).convert("RGB")):
        return False
    path.write_bytes(data.getvalue())
    return True


def thumbnails(page, wanted):
    """Of each template that is wanted; with it the help pictures of nodes that show something after a run."""
    there = page.server.get("/object_info")
    for path in sorted(TEMPLATES.glob("*.json")):
        kinds = [kind for kind, template in AFTER_A_RUN.items() if template == path.stem]
        if not any(map(wanted, [path.stem, *kinds])):
            continue
        if NEEDS.get(path.stem, "SafeDenoiserApply") not in there:
            yield path.with_suffix(".jpg"), f"this ComfyUI has no {NEEDS[path.stem]}"
            continue
        page.load(path.stem)
        runs = runs_here(json.loads(path.read_text(encoding="utf-8")), there)
        if runs:
            page.run(seconds=600)
        made = picture(page, ids_of(page, SHOWS if runs else TELLS), ratio=1.2)
        yield path.with_suffix(".jpg"), made.resize((WIDTH, round(WIDTH * made.height / made.width)), Image.Resampling.LANCZOS)
        for kind in kinds:
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
    with tempfile.TemporaryDirectory() as base:
        listed = Path(base) / "models/unwanted_conditions/a_cigarette.safetensors"  # of an empty list the page says "undefined"
        listed.parent.mkdir(parents=True)
        listed.touch()
        with Server(comfyui, base) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=BROWSER)
            server.post("/settings", {SETTING: False})
            page = Page(browser.new_page(viewport=WINDOW), server, False)
            page.view.add_style_tag(content=BARE)
            yield page
            browser.close()


def figures(comfyui, wanted):
    """Pictures of the docs that commands of their own make; where one fails, its last line instead, which says what it lacks."""
    for name, command in PICTURES.items():
        if command in (None, PAGE) or not wanted(Path(name).stem):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "made.png"
            arguments = [part.format(comfyui=comfyui, to=made) for part in command.split()]
            done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            yield ROOT / name, Image.open(made).convert("RGB") if done.returncode == 0 else said[-1]


def main():
    names, comfyui, left = sys.argv[1:], os.environ["SAFE_DENOISER_COMFYUI"], set()

    def wanted(name):
        return not names or any(part in name for part in names)

    def tell(path, image):
        left.discard(path)
        state = f"none  {path.relative_to(ROOT)}: {image}" if isinstance(image, str) else \
            f"{'new ' if keep(path, image) else 'same'}  {path.relative_to(ROOT)}"
        print(state, flush=True)

    for pattern, command in PICTURES.items():
        for path in filter(lambda path: wanted(path.stem), sorted(ROOT.glob(pattern))):
            left.add(path) if command else tell(path, "drawn by hand")
    for path, image in figures(comfyui, wanted):
        tell(path, image)
    if not any(wanted(path.stem) for path in (*TEMPLATES.glob("*.json"), *HELP.parent.glob("*.md"))):
        return
    with canvas_of(comfyui) as page:
        for made in (thumbnails, help_pictures):
            for path, image in made(page, wanted):
                tell(path, image)
    for path in sorted(left):
        tell(path, "no template and no node is named so")


if __name__ == "__main__":
    main()
