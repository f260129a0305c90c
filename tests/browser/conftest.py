"""The real front end in a real browser, against a real ComfyUI server with this pack."""
import base64
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev import ROOT, Server
from tests.conftest import CHROMIUM

READY = "!!(window.app?.graph && window.LiteGraph?.registered_node_types?.SafeDenoiserKSampler && document.querySelector('#graph-canvas'))"
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`SAFE_DENOISER_FRONT_END` names the folder of another front end than ComfyUI's own (the wheel's `static`)."""
    front_end = os.environ.get("SAFE_DENOISER_FRONT_END")
    arguments = ["--front-end-root", front_end] if front_end else []
    with Server(os.environ["SAFE_DENOISER_COMFYUI"], tmp_path_factory.mktemp("server"), *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    """Ends with its module: while it lives, its event loop runs in this thread, where other tests start their own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=BROWSER)
        yield browser.new_context(viewport={"width": 1900, "height": 1000})  # one for all pages: it keeps the front end's files
        browser.close()


SETTING, NO_HTML = "Comfy.VueNodes.Enabled", "this front end draws no nodes, or no widgets, as HTML (Nodes 2.0)"
SEEDS = itertools.count(1)
BOTH = pytest.mark.parametrize("page", ["canvas", "Nodes 2.0"], indirect=True)  # the page's two ways of drawing nodes


@pytest.fixture
def page(request, server, chromium):
    """A fresh page; afterwards the console must hold no error of the pack."""
    modern = getattr(request, "param", "canvas") == "Nodes 2.0"
    if modern and not getattr(server, "draws_html", True):
        pytest.skip(NO_HTML)
    server.post("/settings", {SETTING: modern})
    view = chromium.new_page()
    view.goto(f"{server.url}/system_stats")  # of the same origin, without the page
    view.evaluate("localStorage.clear()")
    page = Page(view, server, modern)
    if modern:
        server.draws_html = page.draws_html()
        if not server.draws_html:
            view.close()
            pytest.skip(NO_HTML)
    yield page
    complaints = page.complaints()
    view.close()
    assert not complaints


class Page:
    """What the tests do in ComfyUI's page: with the mouse and the keyboard, except where a word of JavaScript reads the graph."""

    def __init__(self, view, server, modern):
        self.view, self.server, self.console, self.modern = view, server, [], modern
        view.on("console", lambda message: self.console.append((message.type, message.text, message.location.get("url", ""))))
        view.on("pageerror", lambda error: self.console.append(("error", str(error), error.stack or "")))
        self.open()

    def open(self):
        self.view.goto(self.server.url)
        self.view.wait_for_function(READY, timeout=60_000)
        self.view.wait_for_function("document.querySelector('[data-testid=queue-button]')", timeout=60_000)
        self.view.wait_for_timeout(1000)
        self.close_dialogs()
        self.view.evaluate("""() => {
            window.runs = [];
            window.picturesOf = kind => {
                const node = app.graph.nodes.find(n => n.type === kind);
                const html = document.querySelectorAll(`[data-node-id='${node.id}'] img`);
                return html.length ? [...html] : node.imgs ?? [];
            };
            for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
                app.api.addEventListener(kind, event => runs.push([kind, event.detail]));
        }""")

    def draws_html(self):
        """Whether this front end draws nodes, with their widgets, as HTML where it is asked to."""
        if self.setting(SETTING) is None:
            return False
        self.load("Tiny digits")
        return bool(self.view.locator("[data-testid=node-widgets]").count())

    def setting(self, name):
        return self.view.evaluate("name => app.extensionManager.setting.get(name) ?? null", name)

    def tab(self):
        return self.view.evaluate("app.extensionManager.workflow.activeWorkflow.path")

    def complaints(self):
        """Errors and warnings of the console that come from the pack. The page asks for a help page in its language first, and takes
        the one without a language when there is none; and it asks a registry about packs, which it is not let."""
        others = [entry for entry in self.console if entry[0] in ("error", "warning") and not entry[2].endswith("/en.md")]
        elsewhere = [entry for entry in others if entry[2].startswith("http") and not entry[2].startswith(self.server.url)]
        return [entry for entry in others if entry not in elsewhere and not entry[1].startswith("Connecting to")
                and any(word in " ".join(entry[1:]).lower() for word in ("safe-denoiser", "safedenoiser", "safe_denoiser.js"))]

    def close_dialogs(self):
        """Such as the list of templates at the first start, and that of models which a template needs."""
        self.view.keyboard.press("Escape")
        self.view.wait_for_timeout(200)
        self.view.evaluate("document.querySelectorAll('.p-dialog-close-button').forEach(button => button.click())")
        self.view.wait_for_function("!document.querySelector('.p-dialog, [role=dialog]')", timeout=10_000)

    def load(self, name):
        """Open an example workflow as the page opens any file."""
        workflow = json.loads((ROOT / f"example_workflows/{name}.json").read_text(encoding="utf-8"))
        self.view.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
        self.view.wait_for_timeout(500)
        self.close_dialogs()

    def workflow(self):
        return json.loads(self.view.evaluate("async () => JSON.stringify((await app.graphToPrompt()).workflow)"))

    def values(self, kind, which=0):
        """Widget values of a node by name."""
        return self.view.evaluate("""([kind, which]) => Object.fromEntries(app.graph.nodes.filter(n => n.type === kind)[which].widgets
            .map(w => [w.name, w.value]))""", [kind, which])

    def run(self, seconds=90):
        """Press Run and wait for the end; returns the history entry."""
        before = self.view.evaluate("runs.length")
        self.view.get_by_test_id("queue-button").click()
        self.view.wait_for_function(f"runs.length > {before}", timeout=1000 * seconds)
        kind, details = self.view.evaluate("runs.at(-1)")
        assert kind == "execution_success", details
        self.view.wait_for_timeout(500)
        key = details["prompt_id"]
        return self.server.wait_for(lambda: self.server.get(f"/history/{key}").get(key), 20)

    def executed(self, entry):
        """Types of the nodes that really ran, by the server's history."""
        prompt = entry["prompt"][2]
        cached = next(details["nodes"] for kind, details in entry["status"]["messages"] if kind == "execution_cached")
        return {node["class_type"] for key, node in prompt.items() if key not in cached}

    def new_seed(self):
        """So that the samplers run, whatever ran before on this server; sevens are among the pictures of each."""
        self.seed = next(SEEDS)
        self.view.evaluate("""seed => { for (const n of app.graph.nodes) if (n.type.endsWith('KSampler'))
            n.widgets.find(w => w.name === 'seed').value = seed }""", self.seed)

    def place(self, kind, widget=None):
        """Screen position of a node's title, or of one of its widgets, brought into view at scale 1."""
        return self.view.evaluate("""async ([kind, name]) => {
            const node = app.graph.nodes.find(n => n.type === kind), canvas = app.canvas;
            canvas.ds.scale = 1;
            canvas.ds.offset = [500 - node.pos[0], 250 - node.pos[1]];
            canvas.setDirty(true, true);
            await new Promise(done => setTimeout(done, 400));
            const widget = name && node.widgets.find(w => w.name === name), box = canvas.canvas.getBoundingClientRect();
            return [box.left + 500 + node.size[0] * (widget ? 0.5 : 0.3), box.top + 250 + (widget ? widget.last_y + 10 : -15)];
        }""", [kind, widget])

    def choose(self, kind, widget, choice):
        """Click a combo and the choice in its list."""
        if self.modern:
            self.place(kind)  # into view
            line = self.html(kind).locator(".lg-node-widget", has=self.view.get_by_text(widget, exact=True))
            line.locator("[role=combobox]").click()
            self.view.locator("[role=option]").get_by_text(choice, exact=True).click()
            self.view.wait_for_timeout(300)
            assert self.values(kind)[widget] == choice
            return
        self.view.mouse.click(*self.place(kind, widget))
        self.view.locator(".litecontextmenu .litemenu-entry", has_text=choice).filter(
            has=self.view.locator(f"xpath=self::*[normalize-space()='{choice}']")).first.click()
        self.view.wait_for_timeout(300)
        assert self.values(kind)[widget] == choice

    def unfold(self, kind):
        """Show the widgets that are folded away, where this front end folds them."""
        self.view.evaluate("kind => { for (const n of app.graph.nodes) if (n.type === kind) n.showAdvanced = true }", kind)

    def html(self, kind):
        """A node that is drawn as HTML."""
        return self.view.locator(f"[data-node-id='{self.view.evaluate('kind => app.graph.nodes.find(n => n.type === kind).id', kind)}']")

    def said(self, kind="SafeDenoiserKSampler"):
        """The text that the last run left on a node, as it is seen, or nothing."""
        text = self.view.evaluate("""kind => app.graph.nodes.find(n => n.type === kind).widgets
            .find(w => w.name === 'safe_denoiser_text')?.element""" + "?.textContent ?? null", kind)
        if text is not None:
            self.place(kind)
            place = self.view.locator(".safe-denoiser-text").first
            assert place.is_visible() and place.evaluate("one => one.scrollHeight <= one.clientHeight"), f"cut off: {text}"
        return text

    def press(self, *keys):
        """Keys for the canvas."""
        self.view.evaluate("app.canvas.canvas.focus()")
        for key in keys:
            self.view.keyboard.press(key)
            self.view.wait_for_timeout(400)

    def pictures(self, kind, entry):
        """What a node shows of this run, (H, W, 3) each, read from the page's own images."""
        key = next(key for key, node in entry["prompt"][2].items() if node["class_type"] == kind)
        names = [image["filename"] for image in entry["outputs"][key]["images"]]
        self.place(kind)  # the page loads pictures when it draws the node
        self.view.wait_for_function("""([kind, names]) => {
            const shown = picturesOf(kind);
            return shown.length === names.length && shown.every((x, i) => x.src.includes(names[i]) && x.complete && x.naturalWidth);
        }""", arg=[kind, names], timeout=20_000)
        found = self.view.evaluate("""kind => picturesOf(kind).map(image => {
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth, canvas.height = image.naturalHeight;
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL('image/png').split(',')[1];
        })""", kind)
        return [np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]

    def drop(self, data: bytes, name: str):
        """Drag a file into the canvas."""
        self.view.evaluate("""([data, name]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: 'image/png'}));
            const target = document.querySelector('#graph-canvas'), at = {clientX: 900, clientY: 600};
            for (const kind of ['dragenter', 'dragover', 'drop'])
                target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer, ...at}));
        }""", [base64.b64encode(data).decode(), name])
        self.view.wait_for_timeout(1500)
        self.close_dialogs()


@pytest.fixture
def own_set(server):
    """A negation set of the user's own, `mine`, which the test may delete."""
    folder = Path(server.base) / "input/negation_sets/mine"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    yield folder
    for file in folder.glob("*"):
        file.unlink()
    if folder.exists():
        folder.rmdir()
