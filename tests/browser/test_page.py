"""What an artist does with the pack, in ComfyUI's own page."""
import base64
import copy
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev import ROOT
from tests.browser.conftest import BOTH, SEEDS
from tests.conftest import NEEDS, NOT_HERE

TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
PAGES = sorted(path.stem for path in (ROOT / "web/docs").glob("*.md"))
ON = {"SafeDenoiserLoadNegationSet", "SafeDenoiserBuildNegationBank", "SafeDenoiserKSampler", "VAEDecode", "ImageScaleBy", "SaveImage",
      "SafeDenoiserReport", "PreviewAny"}  # what follows the set in tiny_digits


def sharpness(picture):
    return np.abs(np.diff(picture[40:].astype(float), axis=1)).mean()


def test_every_template_opens(page):
    """From the Templates browser, under the pack's name and with a thumbnail: no missing node, no red link."""
    there = page.server.get("/object_info")
    marked = [*NOT_HERE] if "search_aliases" in there["SafeDenoiserApply"] else []  # newer pages mark their nodes too
    for name in TEMPLATES:
        if NEEDS.get(name, "SafeDenoiserApply") not in there:
            continue
        page.view.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.view.locator("[role=dialog]").get_by_text("comfyui-safe-denoiser", exact=True).first.click()
        card = page.view.get_by_test_id(f"template-workflow-{name}")
        page.view.locator("[data-testid^=template-workflow-]").first.hover()
        page.view.mouse.wheel(0, 5000)  # the page lists twelve, and the others when one scrolls on
        card.scroll_into_view_if_needed()
        page.view.wait_for_function("name => document.querySelector(`[data-testid='template-workflow-${name}'] img`)?.naturalWidth >= 320",
                                    arg=name)
        card.click()
        nodes = len(json.loads((ROOT / f"example_workflows/{name}.json").read_text(encoding="utf-8"))["nodes"])
        page.view.wait_for_function(f"app.graph.nodes.length === {nodes}")
        page.view.wait_for_timeout(300)
        found = page.view.evaluate("""marked => ({
            missing: app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]
                || n.has_errors && !(n.widgets ?? []).some(w => marked.includes(w.value))).map(n => n.type),
            links: [...app.graph.links.values()].filter(l => !app.graph.getNodeById(l.origin_id)?.outputs[l.origin_slot]
                                                          || !app.graph.getNodeById(l.target_id)?.inputs[l.target_slot]).length,
            slots: app.graph.nodes.flatMap(n => n.inputs ?? []).filter(i => i.link != null && !app.graph.links.get(i.link)).length,
            dialogs: [...document.querySelectorAll('[role=dialog]')].map(d => d.innerText),
        })""", marked)
        assert found["missing"] == [] and found["links"] == found["slots"] == 0, (name, found)
        assert not any("node" in text.lower() and "missing" in text.lower() for text in found["dialogs"]), (name, found)
        page.close_dialogs()


@BOTH
def test_no_two_nodes_overlap_in_any_template(page):
    """As they are drawn, which is larger than a file says: each renderer has its own heights and least widths."""
    for name in TEMPLATES:
        workflow = json.loads((ROOT / f"example_workflows/{name}.json").read_text(encoding="utf-8"))
        boxes, groups = page.view.evaluate("""async ([workflow, modern]) => {
            await app.loadGraphData(workflow);
            const nodes = app.graph.nodes, {ds, canvas} = app.canvas, title = LiteGraph.NODE_TITLE_HEIGHT;
            ds.scale = 0.3;
            for (const i of [0, 1]) ds.offset[i] = 100 - Math.min(...nodes.map(n => n.pos[i]));
            app.canvas.setDirty(true, true);
            const drawn = () => nodes.map(n => document.querySelector(`[data-node-id='${n.id}']`)?.getBoundingClientRect());
            for (let before = '', i = 0; modern && i < 50; i++, before = JSON.stringify(drawn())) {  // until they have their sizes
                await new Promise(done => setTimeout(done, 100));
                if (drawn().every(b => b?.height) && before === JSON.stringify(drawn())) break;
            }
            const {left, top} = canvas.getBoundingClientRect(), units = length => length / ds.scale;
            const shown = modern ? drawn().map(b => [units(b.left - left) - ds.offset[0], units(b.top - top) - ds.offset[1],
                                                     units(b.width), units(b.height)])
                : nodes.map(n => [n.pos[0], n.pos[1] - title, n.size[0], n.size[1] + title]);
            const box = ([x, y, width, height]) => [x, y, x + width, y + height];
            return [nodes.map((n, i) => [`${n.title} ${n.id}`, ...box(shown[i])]), app.graph.groups.map(g => box([...g.pos, ...g.size]))];
        }""", [workflow, page.modern])
        for i, (what, *a) in enumerate(boxes):
            for other, *b in boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (name, what, other, a, b)
            for g in groups:
                if g[0] < a[0] < g[2] and g[1] < a[1] < g[3]:
                    assert a[2] < g[2] and a[3] < g[3], (name, what, "sticks out of its group", a, g)
    page.close_dialogs()


@BOTH
def test_the_tiny_workflow_runs_and_another_set_reruns_only_what_follows(page):
    page.load("Tiny digits")
    page.new_seed()
    first = page.run()
    assert ON <= page.executed(first)
    off, on = page.pictures("PreviewImage", first), page.pictures("SaveImage", first)
    assert len(off) == len(on) == 16 and all(picture.shape == (128, 128, 3) for picture in on)
    assert any((a != b).any() for a, b in zip(off, on))
    assert " pictures steered away, most by tiny_" in page.said()

    page.choose("SafeDenoiserLoadNegationSet", "folder", "tiny_ones_and_fours")
    second = page.run()
    assert page.executed(second) == ON
    ran = [node["class_type"] for key, node in second["prompt"][2].items()
           if key not in dict(second["status"]["messages"])["execution_cached"]["nodes"]]
    assert ran.count("VAEDecode") == ran.count("ImageScaleBy") == 1, "those of the stock sampler did not run again"
    assert any((a != b).any() for a, b in zip(on, page.pictures("SaveImage", second)))
    third = page.run()
    assert page.executed(third) <= {"SaveImage", "PreviewImage", "SafeDenoiserReport", "PreviewAny"}, "nothing changed, nothing is sampled"


@BOTH
def test_what_was_done_stays_on_the_node_and_out_of_the_workflow(page):
    """After the end of the run, in another tab and back, and when the page is opened again; and it is nobody's HTML."""
    page.load("Tiny digits")
    before = {node["id"]: node.get("widgets_values") for node in page.workflow()["nodes"]}
    page.view.evaluate("app.graph.nodes.find(n => n.type === 'SafeDenoiserKSampler').widgets.find(w => w.name === 'strength').value = 0.7")
    page.new_seed()
    page.run()
    said, tab = page.said(), page.tab()
    assert " pictures steered away, most by tiny_" in said
    for node in page.workflow()["nodes"]:
        if node["type"] == "SafeDenoiserKSampler":
            assert node["widgets_values"] == [{0: page.seed, 8: 0.7}.get(i, value) for i, value in enumerate(before[node["id"]])]
    page.view.evaluate("void app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.view.wait_for_function("app.graph.nodes.length === 0")
    page.view.wait_for_timeout(500)
    page.view.evaluate("void app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.view.wait_for_function("app.graph.nodes.length > 0")
    page.view.wait_for_timeout(2000)
    assert page.said() == said
    page.open()
    page.view.wait_for_timeout(2000)
    if page.view.evaluate("app.graph.nodes.some(n => n.type === 'SafeDenoiserKSampler')"):  # the page brings back what was open
        assert page.said() == said
    page.load("Tiny digits")
    page.view.wait_for_timeout(2000)
    assert page.said() is None or page.tab() == tab, "another tab has had no run"
    page.view.evaluate("""() => app.api.dispatchCustomEvent('safe_denoiser.text', {prompt_id: 'x', text: '<img src=x onerror=window.bad=1>',
        node: String(app.graph.nodes.find(n => n.type === 'SafeDenoiserKSampler').id)})""")
    assert page.said() == "<img src=x onerror=window.bad=1>" and not page.view.evaluate("window.bad ?? 0")


SET = "SafeDenoiserLoadNegationSet"


class Sheet:
    """What Load Negation Set shows of its set, in the page."""

    def __init__(self, page):
        self.page, self.place = page, page.view.locator(".safe-denoiser-set-grid").first
        page.place(SET)  # into view

    def wait(self, pictures):
        self.page.view.wait_for_function("n => document.querySelectorAll('.safe-denoiser-set-grid img').length === n", arg=pictures,
                                         timeout=20_000)
        return self

    @property
    def captions(self):
        return self.place.locator("> div").evaluate_all("tiles => tiles.map(tile => tile.textContent)")

    @property
    def blurred(self):
        """Of each picture, whether it is beyond recognition: by an eighth of its width at least, as it is drawn."""
        return set(self.place.locator("img").evaluate_all("""all => all.map(one =>
            parseFloat(getComputedStyle(one).filter.replace('blur(', '')) >= one.clientWidth / 8)"""))

    @property
    def said(self):
        return self.page.view.locator(".safe-denoiser-set-line").first.inner_text()


@BOTH
def test_the_sheet_is_seen_before_any_run_and_to_show_it_runs_nothing(page):
    page.load("Tiny digits")
    sheet = Sheet(page).wait(16)
    assert sheet.blurred == {True} and sheet.said.startswith("tiny_sevens: 150 pictures")
    page.new_seed()
    page.run()
    sheet.place.click()
    assert sheet.blurred == {False}
    assert SET not in page.executed(page.run())
    for style, pictures in (("shown", 16), ("off", 0), ("blurred", 16)):
        page.choose(SET, "preview", style)
        sheet.wait(pictures)
        assert pictures == 0 or sheet.blurred == {style == "blurred"}
        again = page.executed(page.run())
        assert again <= {"SaveImage", "PreviewImage", "SafeDenoiserReport", "PreviewAny"}, (style, again)
    assert page.values(SET)["preview"] == "blurred"


def test_a_report_is_blurred_until_asked(page):
    page.load("Tiny digits")
    page.view.evaluate("app.graph.nodes.find(n => n.type === 'SafeDenoiserLoadNegationSet').widgets[1].value = 24")
    pushed = {}
    for style in ("blurred", "shown"):
        page.choose("SafeDenoiserReport", "preview", style)
        pushed[style] = page.pictures("SafeDenoiserReport", page.run())[0][:, 740:850]
    assert sharpness(pushed["shown"]) > 1.1 * sharpness(pushed["blurred"]) > 0


@BOTH
def test_to_show_the_pictures_of_a_set_runs_nothing(page, server):
    """Nor to blur them again: the page has both, and which one is seen is nobody else's business."""
    kind = "SafeDenoiserNegationSetFromImages"
    page.load("Tiny digits, set drawn by the model")
    page.view.evaluate("""() => { for (const n of app.graph.nodes) if (n.type === 'EmptySD3LatentImage')
        n.widgets.find(w => w.name === 'batch_size').value = 4 }""")
    page.new_seed()
    entry = page.run()
    output = next(entry["outputs"][key] for key, node in entry["prompt"][2].items() if node["class_type"] == kind)
    files = {"blurred": output["images"][0], "shown": output["safe_denoiser_sharp"][0]}
    blurred, shown = (sharpness(np.array(Image.open(io.BytesIO(server.view(file))).convert("L"))) for file in files.values())
    assert shown > 1.5 * blurred > 0
    page.pictures(kind, entry)
    for style in ("shown", "blurred"):
        page.choose(kind, "preview", style)
        page.view.wait_for_function("([kind, name]) => picturesOf(kind).map(one => one.src.includes(name)).join() === 'true'",
                                    arg=[kind, files[style]["filename"]], timeout=10_000)
        again = page.executed(page.run())
        assert again <= {"SaveImage", "PreviewImage", "SafeDenoiserReport", "PreviewAny", "SafeDenoiserSaveNegationBank"}, (style, again)
    page.choose(kind, "preview", "off")
    page.view.wait_for_function("kind => !picturesOf(kind).length", arg=kind, timeout=10_000)


def picture(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


GIVE = """([kind, files, modern]) => {
    const transfer = new DataTransfer(), node = app.graph.nodes.find(n => n.type === 'SafeDenoiserLoadNegationSet');
    for (const [name, data, type] of files)
        transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type}));
    if (kind === 'paste') {
        app.canvas.selectNode(node);
        return void document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true}));
    }
    const html = document.querySelector(`[data-node-id='${node.id}']`), box = app.canvas.canvas.getBoundingClientRect(), {ds} = app.canvas;
    const at = {clientX: box.left + (node.pos[0] + ds.offset[0] + 40) * ds.scale,
                clientY: box.top + (node.pos[1] + ds.offset[1] - 10) * ds.scale, bubbles: true, cancelable: true, dataTransfer: transfer};
    for (const step of ['dragenter', 'dragover', 'drop']) (modern ? html : app.canvas.canvas).dispatchEvent(new DragEvent(step, at));
}"""


def give(page, kind, *files):
    """Drop files on Load Negation Set, or paste them while it is selected."""
    page.place(SET)
    sent = [[name, base64.b64encode(data).decode(), "application/zip" if name.endswith("zip") else "image/png"] for name, data in files]
    page.view.evaluate(GIVE, [kind, sent, page.modern])
    page.view.wait_for_timeout(500)


def answer(page, name):
    """The dialog that asks for a name."""
    page.view.locator("[role=dialog] input").fill(name)
    page.view.keyboard.press("Enter")


@BOTH
def test_each_kind_of_wire_has_a_colour_whatever_scheme_is_chosen(page):
    """On the canvas by its own table, in Nodes 2.0 by what its slots really show."""
    page.load("Tiny digits")
    for palette in ("dark", "light", "dark"):
        page.view.evaluate("async name => { await app.extensionManager.setting.set('Comfy.ColorPalette', name) }", palette)
        page.view.wait_for_timeout(700)
        links = page.view.evaluate("""() => ['NEGATION_SET', 'NEGATION_BANK', 'SAFE_DENOISER_REPORT', 'OPEN_CLIP', 'CHECKED_IMAGES',
            'SEMANTIC_POSTERIOR', 'IMAGE', 'MODEL', 'VAE'].map(kind => LGraphCanvas.link_type_colors[kind])""")
        assert all(links) and len(set(links)) == len(links), (palette, links)
        if page.modern:
            slots = page.view.evaluate("""() => { const id = app.graph.nodes.find(n => n.type === 'SafeDenoiserLoadNegationSet').id;
                return [...document.querySelectorAll(`[data-node-id='${id}'] [style*=color-datatype-NEGATION_SET]`)].map(slot =>
                    getComputedStyle(slot).backgroundColor) }""")
            assert slots and set(slots) == {"rgb(232, 163, 61)"}, slots


@BOTH
def test_pictures_get_in_by_the_page(page, server):
    """Into a new set that is asked for, by dropping, pasting and the button; a zip is a set itself; nothing else lands in the graph."""
    root = Path(server.base) / "input/negation_sets"
    name = f"猫 {'html' if page.modern else 'canvas'}"
    page.view.evaluate("""() => { app.graph.clear(); const node = LiteGraph.createNode('SafeDenoiserLoadNegationSet'); app.graph.add(node);
        node.pos = [0, 0]; node.setSize([300, 420]) }""")
    page.view.wait_for_timeout(500)
    sheet = Sheet(page)
    assert page.values(SET)["folder"] == "choose a set" and "drop pictures here" in sheet.said
    give(page, "drop", ("三.png", picture(1)), ("b.png", picture(2)), ("c.png", picture(3)))
    answer(page, name)
    sheet.wait(3)
    assert page.values(SET)["folder"] == name and sheet.captions == ["b.png", "c.png", "三.png"] and sheet.blurred == {True}
    assert sorted(path.name for path in (root / name).iterdir()) == ["b.png", "c.png", "三.png"]
    give(page, "paste", ("image.png", picture(4)))
    sheet.wait(4)
    give(page, "drop", ("image.png", picture(4)), ("damaged.png", b"no picture"), ("image.png", picture(5)))
    sheet.wait(5)
    page.view.wait_for_function("document.querySelector('.safe-denoiser-set-line').textContent.startsWith('added')")
    assert sheet.said.splitlines() == ["added 1", "1 already there", "damaged.png: not a picture that can be read"]
    with page.view.expect_file_chooser() as chooser:
        page.view.locator("button", has_text="add pictures").first.click()
    chooser.value.set_files([{"name": "<img src=x onerror=window.hacked=1>.png", "mimeType": "image/png", "buffer": picture(6)}])
    sheet.wait(6)
    assert page.view.evaluate("window.hacked ?? 0") == 0 and "_img src=x onerror=window.hacked=1_.png" in sheet.captions
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.png", picture(7))
    give(page, "drop", (f"{name}.zip", packed.getvalue()))
    sheet.wait(1)
    assert page.values(SET)["folder"] == f"{name}.zip" and (root / f"{name}.zip").read_bytes() == packed.getvalue()
    page.view.locator("button", has_text="new set").first.click()
    answer(page, f"{name} empty")
    page.view.wait_for_function("document.querySelector('.safe-denoiser-set-line').textContent.includes('is empty')")
    assert (root / f"{name} empty").is_dir() and page.values(SET)["folder"] == f"{name} empty"
    assert page.view.evaluate("app.graph.nodes.length") == 1, "no Load Image nodes"
    assert page.workflow()["nodes"][0]["widgets_values"] == [f"{name} empty", 0, "blurred"]
    for folder in (root / name, root / f"{name} empty"):
        shutil.rmtree(folder)
    (root / f"{name}.zip").unlink()


def help_panel(page, node_id, file):
    """Opened, with all that is in a node's page, and nothing cut off."""
    page.view.evaluate("""node_id => { app.graph.clear(); const node = LiteGraph.createNode(node_id); app.graph.add(node);
        node.pos = [0, 0]; app.canvas.ds.offset = [700, 300]; app.canvas.ds.scale = 1; app.canvas.selectNode(node) }""", node_id)
    page.view.mouse.click(*page.place(node_id))
    page.view.get_by_test_id("info-button").click()
    panel, text = page.view.locator(".node-help-content"), (ROOT / "web/docs" / file).read_text(encoding="utf-8")
    panel.get_by_text(re.findall("^## (.+)$", text, re.MULTILINE)[-1]).wait_for(timeout=10_000)
    assert panel.locator("h1").inner_text() == text.splitlines()[0].removeprefix("# ")
    page.view.wait_for_function("document.querySelector('.node-help-content img')?.naturalWidth > 300")
    assert panel.locator("li").count() > 3 and panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth"), "nothing is cut off"
    assert "<!--" not in panel.inner_text()
    page.press("Escape")


def test_each_node_has_its_help_panel(page):
    for node_id in PAGES:
        help_panel(page, node_id, f"{node_id}.md")


def test_undo_redo_and_copies_keep_the_values(page):
    page.load("Tiny digits, custom sampler")
    original = page.values("SafeDenoiserApply")
    page.unfold("SafeDenoiserApply")
    page.choose("SafeDenoiserApply", "method", "spell")
    page.press("Control+z")
    assert page.values("SafeDenoiserApply") == original
    page.press("Control+y")
    changed = page.values("SafeDenoiserApply")
    assert changed == {**original, "method": "spell"}
    for kind in ("SafeDenoiserApply", "SafeDenoiserLoadNegationSet", "SafeDenoiserClassCondition", "SafeDenoiserReport"):
        values = page.values(kind)
        count = page.view.evaluate("kind => app.graph.nodes.filter(n => n.type === kind).length", kind)
        page.view.mouse.click(*page.place(kind))
        page.press("Control+c", "Control+v")
        assert page.values(kind, count) == values, kind
        page.press("Control+z")
        assert page.view.evaluate("kind => app.graph.nodes.filter(n => n.type === kind).length", kind) == count


def graph(workflow):
    """Nodes and links: without the sizes that pictures and texts give to a node, and without what only one way of saving writes."""
    nodes = copy.deepcopy(workflow["nodes"])
    for node in nodes:
        node["inputs"] = [slot for slot in node.get("inputs", []) if "widget" not in slot or slot["link"] is not None]
        for slot in [*node["inputs"], *node["outputs"]]:
            slot.pop("localized_name", None)
        node.pop("size"), node.pop("flags", None), node.pop("widgets_values_named", None)
        node["widgets_values"] = node.get("widgets_values") or []
    return nodes, workflow["links"]


def test_a_saved_workflow_and_its_picture_bring_everything_back(page, server):
    page.load("Tiny digits")
    page.view.evaluate("""() => { for (const n of app.graph.nodes) if (n.type.endsWith('KSampler'))
        n.widgets.find(w => w.name === 'seed').value = 4321 }""")
    entry = page.run()
    key = next(key for key, node in entry["prompt"][2].items() if node["class_type"] == "SaveImage")
    picture = server.view(entry["outputs"][key]["images"][3])
    before = page.workflow()

    page.view.evaluate("void app.extensionManager.command.execute('Comfy.SaveWorkflow')")
    page.view.locator("[role=dialog] input").fill("kept")
    page.view.keyboard.press("Enter")
    saved = Path(server.base) / "user/default/workflows/kept.json"
    server.wait_for(saved.is_file, 20)
    assert graph(json.loads(saved.read_text(encoding="utf-8"))) == graph(before)

    page.open()
    page.view.evaluate("app.graph.clear()")
    page.drop(picture, "picture.png")
    assert graph(page.workflow()) == graph(before)
    assert page.values("SafeDenoiserKSampler")["seed"] == 4321
    server.post("/free", {"free_memory": True})  # forget results, so that the picture is drawn again
    page.view.wait_for_timeout(1500)
    again = page.run()
    assert "SafeDenoiserKSampler" in page.executed(again)
    redrawn = server.view(again["outputs"][key]["images"][3])
    assert np.array_equal(*(np.array(Image.open(io.BytesIO(data)).convert("RGB")) for data in (picture, redrawn)))


def test_a_set_that_is_gone_is_named_on_the_node(page, own_set):
    page.load("Tiny digits")
    page.press("r")
    page.view.wait_for_timeout(1500)
    page.choose("SafeDenoiserLoadNegationSet", "folder", "mine")
    page.run()
    shutil.rmtree(own_set)
    page.press("r")
    page.view.wait_for_timeout(1500)
    options = page.view.evaluate("app.graph.nodes.find(n => n.type === 'SafeDenoiserLoadNegationSet').widgets[0].options.values")
    assert "mine" not in options and "tiny_sevens" in options
    assert page.values("SafeDenoiserLoadNegationSet")["folder"] == "mine", "the workflow keeps its choice"
    page.view.get_by_test_id("queue-button").click()
    page.view.wait_for_function("app.lastNodeErrors && Object.keys(app.lastNodeErrors).length")
    errors = page.view.evaluate("""() => Object.entries(app.lastNodeErrors).map(([id, e]) => [app.graph.getNodeById(Number(id)).type,
        e.errors.map(x => x.details)])""")
    assert [kind for kind, _ in errors] == ["SafeDenoiserLoadNegationSet"] and len(errors[0][1]) == 1, errors
    place = "ComfyUI/input/negation_sets/mine"
    assert f"negation set 'mine' is not on this machine; create {place} and put the pictures into it, then press R" in errors[0][1][0]
    page.view.wait_for_timeout(1500)
    toast, overlay = page.view.locator(".p-toast-message-error"), page.view.get_by_test_id("error-overlay")
    if overlay.count():  # newer pages say it themselves, and nobody else does
        assert not toast.count() and "Load Negation Set" in overlay.inner_text()
    else:
        assert place in toast.inner_text() and "Load Negation Set" in toast.inner_text(), "part of the workflow still runs"
    page.view.evaluate("""() => { for (const n of [...app.graph.nodes]) if (['PreviewImage', 'KSampler'].includes(n.type))
        app.graph.remove(n) }""")
    page.view.get_by_test_id("queue-button").click()
    told = page.view.locator("[role=dialog], [data-testid=error-overlay]").first
    told.wait_for(timeout=5000)
    if overlay.count():
        assert "Load Negation Set" in overlay.inner_text(), "nothing can run"
    else:
        assert place in told.inner_text() and "SafeDenoiserLoadNegationSet" in told.inner_text(), "nothing can run"
    page.console.clear()  # the page logs the refused prompt, as it must


HTML = "<img src=x onerror=window.hacked=1>"


@BOTH
def test_names_from_strangers_are_never_html(page, server):
    """Of a set, of its files, of a bank: in the list, on the nodes, in the texts, the report and the message."""
    sets, banks = Path(server.base) / "input/negation_sets", Path(server.base) / "output/negation_banks"
    bank = banks / f"{HTML}.safetensors"
    banks.mkdir(parents=True, exist_ok=True)
    for folder in (sets / "strange", sets / HTML):
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(12):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{HTML}{i}.png")
        (folder / f"{HTML}damaged.png").write_bytes(b"no picture")
    shutil.copy(ROOT / "tiny_digits/models/negation_banks/tiny_reference.safetensors", bank)

    def nothing_became_html():
        page.view.wait_for_timeout(700)
        assert page.view.evaluate("[window.hacked ?? 0, document.querySelectorAll('img[src=x]').length]") == [0, 0]

    page.load("Tiny digits")
    page.press("r")
    page.view.wait_for_timeout(1500)
    if not page.modern:
        page.view.mouse.click(*page.place("SafeDenoiserLoadNegationSet", "folder"))
        nothing_became_html()
        page.view.keyboard.press("Escape")
    for name in ("strange", HTML):
        page.view.evaluate("""name => { for (const n of app.graph.nodes) if (n.type === 'SafeDenoiserLoadNegationSet')
            n.widgets[0].value = name }""", name)
        page.new_seed()
        entry = page.run()
        nothing_became_html()
    told = json.dumps(entry["outputs"])
    assert "damaged" in told or page.said()
    page.view.evaluate("""html => app.api.dispatchCustomEvent('safe_denoiser.text', {node: String(app.graph.nodes.find(
        n => n.type === 'SafeDenoiserKSampler').id), prompt_id: 'another', text: html})""", HTML)
    nothing_became_html()
    assert page.said() == HTML
    for gone in (sets / "strange", sets / HTML):
        shutil.rmtree(gone)
    bank.unlink()
    page.view.get_by_test_id("queue-button").click()
    page.view.wait_for_function("app.lastNodeErrors && Object.keys(app.lastNodeErrors).length")
    nothing_became_html()
    page.view.wait_for_timeout(1500)
    nothing_became_html()
    page.console.clear()  # the page logs the refused prompt, as it must


@pytest.fixture
def japanese(page):
    def switch(language):
        page.view.evaluate("async language => { await app.extensionManager.setting.set('Comfy.Locale', language) }", language)
        page.view.wait_for_timeout(500)

    switch("ja")
    page.open()
    yield page
    switch("en")


def test_help_follows_the_language(japanese):
    for node_id in PAGES:
        help_panel(japanese, node_id, f"{node_id}/ja.md")


def test_names_tooltips_and_texts_follow_the_language(japanese):
    page, words = japanese, json.loads((ROOT / "locales/ja/nodeDefs.json").read_text(encoding="utf-8"))["SafeDenoiserApply"]
    page.view.evaluate("() => { app.graph.clear(); const node = LiteGraph.createNode('SafeDenoiserApply'); app.graph.add(node) }")
    page.unfold("SafeDenoiserApply")
    labels = page.view.evaluate("app.graph.nodes[0].widgets.map(w => w.label)")
    assert labels == [words["inputs"][name]["name"] for name in page.values("SafeDenoiserApply")]
    main = json.loads((ROOT / "locales/ja/main.json").read_text(encoding="utf-8"))
    category = page.view.evaluate("LiteGraph.registered_node_types.SafeDenoiserLoadOpenCLIP.category")
    assert category == "safe denoiser/" + main["nodeCategories"]["meaning"]
    x, y = page.place("SafeDenoiserApply", "weight")
    page.view.mouse.move(x - 60, y - 2)
    page.view.mouse.move(x - 60, y)
    tooltip = page.view.locator(".node-tooltip")
    tooltip.wait_for(timeout=5000)
    assert tooltip.inner_text() == words["inputs"]["weight"]["tooltip"]
    says = main["safeDenoiser"]
    page.view.evaluate("""() => app.api.dispatchCustomEvent('safe_denoiser.text', {prompt_id: 'x', node: String(app.graph.nodes[0].id),
        text: '7 of 16 pictures steered away, most by 猫 of mine.png\\nnot in the table'})""")
    assert page.said("SafeDenoiserApply").splitlines() == [says["{0} steered away, most by {1}"].format(
        says["{0} of {1} pictures"].format(7, 16), "猫 of mine.png"), "not in the table"]
    page.load("Tiny digits")
    assert Sheet(page).wait(16).said == says["{0}: {1} pictures, {2} skipped, {3}"].format("tiny_sevens", 150, 0, "37.6 KB")


@BOTH
def test_the_unwanted_condition_runs_and_the_node_says_what_it_told(page):
    page.load("1 Try it")
    page.new_seed()
    entry = page.run()
    off, on = page.pictures("PreviewImage", entry), page.pictures("SaveImage", entry)
    assert len(on) == 16 and any((a != b).any() for a, b in zip(off, on))
    assert " pictures steered away" in page.said().splitlines()[0]


WISHES = ("unwanted", "unsafe", "nsfw", "nsfw filter", "nudity", "censor", "exclude", "remove", "avoid", "block", "filter",
          "content filter", "prevent", "suppress", "blocklist", "trademark", "celebrity", "negative prompt flux",
          "不想要", "裸体", "屏蔽", "ヌード", "除外", "누드", "차단", "nudité", "éviter", "desnudez", "bloquear")


def search(page, words, enter=False):
    """Type into the search for nodes; the text of what it lists."""
    page.view.evaluate("void app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.view.wait_for_timeout(800)
    page.view.keyboard.type(words)
    page.view.wait_for_timeout(1500)
    found = page.view.locator("[role=dialog]").first.inner_text()
    page.view.keyboard.press("Enter" if enter else "Escape")
    page.view.wait_for_timeout(1000)
    return found


def test_the_search_finds_the_nodes_by_what_people_call_them(page):
    if "search_aliases" not in page.server.get("/object_info/SafeDenoiserApply")["SafeDenoiserApply"]:
        pytest.skip("this ComfyUI knows no search aliases")
    for words, node in (("unlearn", "Load Negation Set"), ("nsfw detector", "Check Images")):
        assert node in search(page, words), words
    page.view.evaluate("void app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.view.wait_for_timeout(800)
    for words in WISHES:
        page.view.keyboard.press("Control+a")
        page.view.keyboard.type(words)
        page.view.wait_for_timeout(600)
        assert "\nKeep Out\n" in page.view.locator("[role=dialog]").first.inner_text(), words
    page.press("Escape")


@BOTH
@pytest.mark.parametrize("name", ["Sample safely", "Keep a folder out"])
def test_a_blueprint_is_there_with_its_knobs_and_runs(page, name):
    """Its sampler is in a subgraph, and says what it did on both."""
    if page.view.evaluate("async () => (await app.api.fetchApi('/global_subgraphs')).status") != 200:
        pytest.skip("this ComfyUI knows no blueprints of packs")
    page.load("Tiny digits")
    search(page, name, enter=True)
    knobs = page.view.evaluate("""seed => {
        const node = app.graph.nodes.find(n => n.subgraph), find = kind => app.graph.nodes.find(n => n.type === kind);
        const slot = name => node.inputs.findIndex(one => one.name === name), old = find('SafeDenoiserKSampler');
        for (const name of ['model', 'positive', 'negative', 'latent_image']) {
            const link = app.graph.links.get(old.inputs.find(one => one.name === name).link);
            app.graph.getNodeById(link.origin_id).connect(link.origin_slot, node, slot(name));
        }
        find('SafeDenoiserLoadTinyWorld').connect(1, node, slot('vae'));
        find('SafeDenoiserLoadNegationSet').connect(0, node, slot('negation_set'));
        const learn = node.subgraph.nodes.find(n => n.type === 'SafeDenoiserLearnUnwantedCondition');
        if (learn) {
            const empty = app.graph.links.get(old.inputs.find(one => one.name === 'negative').link);
            app.graph.getNodeById(empty.origin_id).connect(empty.origin_slot, node, slot('neutral'));
            learn.widgets.find(w => w.name === 'steps').value = 4;
        }
        node.connect(0, app.graph.nodes.find(n => n.type === 'VAEDecode' && n.title.includes('on')), 0);
        for (const [name, value] of Object.entries({count: 4, cfg: 2, seed})) node.widgets.find(w => w.name === name).value = value;
        return node.widgets.map(w => w.name);
    }""", next(SEEDS))
    assert {"seed", "steps", "cfg", "sampler_name", "scheduler", "strength", "count"} <= set(knobs)
    warned = page.view.evaluate("""app.graph.nodes.find(n => n.subgraph).widgets
        .find(w => w.name === 'safe_denoiser_text').element.textContent""")
    assert warned.startswith("the first run draws as many pictures as count says")
    entry = page.run()
    ran = {node["class_type"]: node["inputs"] for node in entry["prompt"][2].values()}
    assert "SafeDenoiserSampleReferenceBank" in ran
    assert ("unwanted" in ran["SafeDenoiserKSampler"]) == ("SafeDenoiserLearnUnwantedCondition" in ran) == (name == "Keep a folder out")
    told = page.view.evaluate("""() => { const node = app.graph.nodes.find(n => n.subgraph);
        return [node, node.subgraph.nodes.find(n => n.type === 'SafeDenoiserKSampler')].map(
            n => n.widgets.find(w => w.name === 'safe_denoiser_text')?.element?.textContent) }""")
    assert told[0] == told[1] and " pictures steered away" in told[0]


def test_bypass_and_mute(page):
    """A bypassed Apply Safe Denoiser is not there: the stock sampler's pictures; a muted sampler draws none."""
    page.load("Tiny digits, custom sampler")
    page.view.evaluate("""() => { for (const n of [...app.graph.nodes]) if (/Report|PreviewAny/.test(n.type)) app.graph.remove(n);
        app.graph.nodes.find(n => n.type === 'RandomNoise').widgets[0].value = 4242 }""")
    pictures = []
    for mode in (0, 4):
        page.view.evaluate("mode => { app.graph.nodes.find(n => n.type === 'SafeDenoiserApply').mode = mode }", mode)
        entry = page.run()
        pictures.append(page.pictures("SaveImage", entry))
        assert ("SafeDenoiserApply" in {node["class_type"] for node in entry["prompt"][2].values()}) == (mode == 0)
    assert any((a != b).any() for a, b in zip(*pictures))
    page.load("Tiny digits")
    page.view.evaluate("app.graph.nodes.find(n => n.type === 'SafeDenoiserKSampler').mode = 2")
    page.new_seed()
    assert "SafeDenoiserKSampler" not in {node["class_type"] for node in page.run()["prompt"][2].values()}
