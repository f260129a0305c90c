"""The example workflows, held against a real server's /object_info; those of the tiny model really run there."""
import copy
import io
import json
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from dev import ROOT
from tests.conftest import NEEDS, NOT_HERE
from tiny_digits.world import TinyDigits
from tiny_photos.data import CLASSES
from tiny_photos.world import TinyPhotos

FOLDER = ROOT / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
PAGE_ONLY = {"MarkdownNote", "Note", "PrimitiveNode", "Reroute"}  # the page draws these, the server never sees them
TITLE = 30  # height of the bar above a node's position
ANY = {"*", "COMFY_MATCHTYPE_V3"}  # types that take the other end's
CONTROL = ("control_after_generate", "COMBO", {"options": ["fixed", "increment", "decrement", "randomize"]})


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def load(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# --- what the page makes of a node's /object_info ------------------------------------------------------------------

def sockets(info):
    """Name -> (type, options, required) of all inputs, in the page's order."""
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}, group == "required")
            for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()}


def widgets(info):
    """(name, type, options) of each widget; the page itself puts one more behind a seed."""
    found = []
    for name, (kind, options, _) in sockets(info).items():
        if isinstance(kind, list):  # how nodes of the older schema list their choices
            kind, options = "COMBO", {**options, "options": kind}
        if kind in {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"} and not options.get("forceInput"):
            found.append((name, kind, options))
            if options.get("control_after_generate", name in {"seed", "noise_seed"}):
                found.append(CONTROL)
    return found


def is_valid(kind, options, value):
    if kind == "COMBO":
        return value in options["options"] or value in NOT_HERE
    if kind in {"STRING", "BOOLEAN"}:
        return isinstance(value, str if kind == "STRING" else bool)
    number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
    return number and options.get("min", value) <= value <= options.get("max", value)


# --- what can be wrong with a workflow -----------------------------------------------------------------------------

def node_problems(node, info):
    expected, slots = sockets(info), {slot["name"]: slot for slot in node["inputs"]}
    inner = {name for name, _, _ in widgets(info)} & set(expected)
    if not set(expected) - inner <= set(slots) <= set(expected):  # the page leaves out widgets that are not linked
        yield f"its inputs are {sorted(slots)}, not {sorted(set(expected) - inner)}"
    if {name for name, slot in slots.items() if "widget" in slot} != inner & set(slots):
        yield "other inputs are widgets"
    outputs, wanted = [slot["name"] for slot in node["outputs"]], info["output_name"]
    if outputs != (wanted if node["type"].startswith("SafeDenoiser") else wanted[:len(outputs)]):  # later ComfyUI's own nodes have more
        yield f"its outputs are not {wanted}"
    for name, (_, _, required) in expected.items():
        if required and name in slots and "widget" not in slots[name] and slots[name]["link"] is None:
            yield f"{name} is required and not linked"
    if len(node["widgets_values"]) != len(widgets(info)):
        yield f"{len(node['widgets_values'])} widget values for {len(widgets(info))} widgets"
        return
    for (name, kind, options), value in zip(widgets(info), node["widgets_values"]):
        if not is_valid(kind, options, value):
            yield f"{name} cannot be {value!r}"


def link_problems(link, nodes, object_info):
    number, source, source_slot, target, target_slot, kind = link
    if source not in nodes or target not in nodes:
        yield "leads to no node"
        return
    outputs, inputs = nodes[source]["outputs"], nodes[target]["inputs"]
    if source_slot >= len(outputs) or target_slot >= len(inputs):
        yield "leads to no slot"
        return
    if number not in (outputs[source_slot]["links"] or []) or inputs[target_slot]["link"] != number:
        yield "is unknown to its slots"
    given = object_info[nodes[source]["type"]]["output"][source_slot]
    wanted = sockets(object_info[nodes[target]["type"]]).get(inputs[target_slot]["name"], ("nothing",))[0]
    if kind not in {given, wanted} or wanted != given and not {given, wanted} & ANY:
        yield f"is {kind}, from {given} to {wanted}"


def problems(workflow, object_info):
    """Everything that would keep this workflow from running, one line each."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    numbers = [link[0] for link in workflow["links"]]
    found = [f"{node['type']}: no such node" for node in nodes.values()
             if node["type"] not in PAGE_ONLY and node["type"] not in object_info]
    if found:
        return found
    if len(nodes) < len(workflow["nodes"]) or len(set(numbers)) < len(numbers):
        found.append("an id is used twice")
    if max(nodes) > workflow["last_node_id"] or max(numbers) > workflow["last_link_id"]:
        found.append("the page would give out an id that is in use")
    used = {number for node in nodes.values() for slot in node["outputs"] for number in slot["links"] or []}
    used |= {slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None}
    if used != set(numbers):
        found.append(f"slots and links disagree about {sorted(used ^ set(numbers))}")
    for node in nodes.values():
        if node["type"] not in PAGE_ONLY:
            found += [f"{node['type']}: {problem}" for problem in node_problems(node, object_info[node["type"]])]
    for link in workflow["links"]:
        found += [f"link {link[0]} {problem}" for problem in link_problems(link, nodes, object_info)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_fits_the_real_nodes(name, object_info):
    missing = {NEEDS[name]} - set(object_info) if name in NEEDS else set()
    assert problems(load(name), object_info) == [f"{kind}: no such node" for kind in missing]


def node_of(workflow, kind):
    return next(node for node in workflow["nodes"] if node["type"] == kind)


def slot_of(node, name):
    return next(slot for slot in node["inputs"] if slot["name"] == name)


def unlink(workflow):
    slot_of(node_of(workflow, "SafeDenoiserKSampler"), "positive")["link"] = None


def cross(workflow):
    """Lead the vae of the decoder from the model loader."""
    link = next(link for link in workflow["links"] if link[0] == slot_of(node_of(workflow, "VAEDecode"), "vae")["link"])
    link[2] = 0


BREAKAGES = {
    "no such node": lambda w: node_of(w, "SafeDenoiserReport").update(type="SafeDenoiserGone"),
    "12 widget values for 13": lambda w: node_of(w, "SafeDenoiserKSampler")["widgets_values"].pop(1),
    "strength cannot be -1": lambda w: node_of(w, "SafeDenoiserKSampler")["widgets_values"].__setitem__(8, -1),
    "seed cannot be '1'": lambda w: node_of(w, "KSampler")["widgets_values"].__setitem__(0, "1"),
    "method cannot be 'gone'": lambda w: node_of(w, "SafeDenoiserKSampler")["widgets_values"].__setitem__(7, "gone"),
    "its inputs are": lambda w: slot_of(node_of(w, "SafeDenoiserKSampler"), "retain_bank").update(name="keep"),
    "its outputs are not": lambda w: node_of(w, "SafeDenoiserReport")["outputs"].pop(),
    "other inputs are widgets": lambda w: slot_of(node_of(w, "VAEDecode"), "vae").update(widget={"name": "vae"}),
    "positive is required and not linked": unlink,
    "slots and links disagree": lambda w: w["links"].pop(),
    "is unknown to its slots": cross,
    "from MODEL to VAE": cross,
    "leads to no node": lambda w: w["links"][0].__setitem__(3, 999),
    "leads to no slot": lambda w: w["links"][0].__setitem__(2, 9),
    "is LATENT, from": lambda w: next(link for link in w["links"] if link[5] == "VAE").__setitem__(5, "LATENT"),
    "an id is used twice": lambda w: w["nodes"].append(copy.deepcopy(w["nodes"][0])),
    "id that is in use": lambda w: w.update(last_node_id=1),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_what_is_broken_is_noticed(what, object_info):
    workflow = load("Tiny digits")
    BREAKAGES[what](workflow)
    assert [problem for problem in problems(workflow, object_info) if what in problem]


def test_keep_out_is_the_default_workflow_with_one_node_and_three_wires():
    """Beside it stand the sampler without that node, and its picture."""
    workflow = load("2 Keep something out by words")
    number = node_of(workflow, "SafeDenoiserKeepOut")["id"]
    assert [link[5] for link in workflow["links"] if number in (link[1], link[3])] == ["MODEL", "CLIP", "MODEL"]
    others = sorted(node["type"] for node in workflow["nodes"] if node["id"] != number and node["type"] not in PAGE_ONLY)
    assert others == sorted(["CheckpointLoaderSimple", "CLIPTextEncode", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode",
                             "SaveImage", "KSampler", "VAEDecode", "PreviewImage"])


# --- what a person sees --------------------------------------------------------------------------------------------

def test_the_page_lists_them_with_thumbnails(server):
    assert sorted(server.get("/workflow_templates")["comfyui-safe-denoiser"]) == NAMES
    for name in NAMES:
        data = server.request(f"/api/workflow_templates/comfyui-safe-denoiser/{quote(name)}.jpg")
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "JPEG" and 0.8 < picture.width / picture.height < 1.25 and len(data) <= 60 * 1024, name


OWN = {"unwanted.png", "unwanted.safetensors", "my_negation_set"}  # what nobody can download
FOLDERS = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models", "vae_name": "vae", "style_model_name": "style_models",
           "clip_name": "text_encoders", "clip_name1": "text_encoders", "clip_name2": "text_encoders"}


@pytest.mark.parametrize("name", NAMES)
def test_the_note_says_which_files_go_where(name, object_info):
    """And the page offers them for download: each widget's file has its entry, with the same link."""
    workflow = load(name)
    text = node_of(workflow, "MarkdownNote")["widgets_values"][0]
    for node in workflow["nodes"]:
        if node["type"] not in object_info:
            continue
        keys = [key for key, _, _ in widgets(object_info[node["type"]])]
        kinds = {value: "clip_vision" if node["type"] == "CLIPVisionLoader" else FOLDERS.get(key)
                 for key, value in zip(keys, node["widgets_values"]) if value in NOT_HERE}
        entries = {entry["name"]: entry for entry in node["properties"].get("models", [])}
        assert set(entries) == set(kinds) - OWN
        for file, entry in entries.items():
            assert entry["directory"] == kinds[file] and entry["url"].endswith(f"/{file}")
            assert f"[**{file}**]({entry['url']})" in text and f"ComfyUI/models/{kinds[file]}/" in text
        assert [file for file in kinds if file not in text] == []
        assert "my_negation_set" not in kinds or "**ComfyUI/input/negation_sets/my_negation_set/**" in text
    assert "0 is off" in text and "can be decoded back into pictures" in text and "`" not in text


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_run_twice_and_read(name, object_info):
    """Seeds stay, so that off and on are of one; what is opened first is small, and nothing is under what the page has at the top left."""
    workflow = load(name)
    for node in workflow["nodes"]:
        if node["type"] in object_info and len(found := widgets(object_info[node["type"]])) == len(node["widgets_values"]):
            assert {value for one, value in zip(found, node["widgets_values"]) if one == CONTROL} <= {"fixed"}
    scale, offset = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    corners = [group["bounding"][:2] for group in workflow["groups"]]
    corners += [(x, y - TITLE) for x, y in (node["pos"] for node in workflow["nodes"])]
    left, top = ((min(corner[i] for corner in corners) + offset[i]) * scale for i in (0, 1))
    assert left > 70 and top > 90
    assert scale >= 0.6, "below, the page draws nodes without their names and texts"
    if name[0] in "12345":
        assert len(workflow["nodes"]) <= 15 and scale > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_no_two_nodes_overlap(name):
    boxes = [(x, y - TITLE, x + width, y + height)
             for node in load(name)["nodes"] for (x, y), (width, height) in [(node["pos"], node["size"])]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


# --- what comes out ------------------------------------------------------------------------------------------------

def to_prompt(workflow, object_info, **changes):
    """The graph in API format, as the page posts it; `changes` are values of widgets, wherever they occur."""
    off = {node["id"] for node in workflow["nodes"] if node["mode"] in (2, 4)}  # muted, or bypassed with nothing to pass on
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"] if link[1] not in off}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in PAGE_ONLY or node["id"] in off:
            continue
        names = [name for name, _, _ in widgets(object_info[node["type"]])]
        inputs = {name: changes.get(name, value) for name, value in zip(names, node["widgets_values"])}
        inputs.pop(CONTROL[0], None)
        inputs |= {slot["name"]: origin[slot["link"]] for slot in node["inputs"] if slot["link"] in origin}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("name", [name for name in NAMES if any(f"'{file}'" in str(load(name)) for file in NOT_HERE)])
def test_the_server_misses_nothing_but_the_users_own_files(name, server, object_info):
    workflow = load(name)
    with pytest.raises(RuntimeError, match="with 400") as refusal:
        server.post("/prompt", {"prompt": to_prompt(workflow, object_info)})
    answer = json.loads(str(refusal.value).partition("with 400: ")[2])
    missing = {(node["class_type"], error["extra_info"]["input_name"])
               for node in answer["node_errors"].values() for error in node["errors"]}
    theirs = {(node["type"], key) for node in workflow["nodes"] if node["type"] not in PAGE_ONLY and node["mode"] == 0
              for (key, _, _), value in zip(widgets(object_info[node["type"]]), node["widgets_values"]) if value in NOT_HERE}
    loads_a_set = any(node["type"] == "SafeDenoiserLoadNegationSet" and node["mode"] == 0 for node in workflow["nodes"])
    assert missing == theirs and theirs and (("SafeDenoiserLoadNegationSet", "folder") in theirs) == loads_a_set


@pytest.fixture(scope="module")
def draw(server, object_info):
    """Run a workflow: its pictures by the type of the node that holds them (16, 128, 128, 3), and its report's text."""
    def pixels(images):
        return np.stack([np.array(Image.open(io.BytesIO(server.view(image))).convert("RGB")) for image in images])

    def run(name, **changes):
        prompt = to_prompt(load(name), object_info, **changes)
        ran = [*server.run(prompt)["outputs"].items()]
        outputs = {prompt[key]["class_type"]: value for key, value in ran if prompt[key]["class_type"] != "SafeDenoiserSaveNegationBank"}
        pictures = {kind: pixels(outputs[kind]["images"]) for kind in ("SaveImage", "PreviewImage") if kind in outputs}
        if "SafeDenoiserReport" not in outputs:
            return pictures, "".join(outputs.get("PreviewAny", {}).get("text", ""))
        assert outputs["SafeDenoiserReport"]["text"] in [value["text"] for key, value in ran if prompt[key]["class_type"] == "PreviewAny"]
        return pictures, outputs["SafeDenoiserReport"]["text"][0]
    return run


@pytest.fixture(scope="module")
def digits():
    """What an independent classifier reads in pictures that a workflow enlarged four times."""
    world = TinyDigits()
    return lambda pictures: world.digits(torch.from_numpy(pictures[:, ::4, ::4]).movedim(-1, 1) / 255)


def test_tiny_digits_runs(draw, digits):
    pictures, report = draw("Tiny digits")
    off, on = digits(pictures["PreviewImage"]), digits(pictures["SaveImage"])
    assert len(off) == len(on) == 16
    assert (off == 7).any() and not (on == 7).any(), "sevens are negated"
    assert (on == off)[off != 7].all(), "the others stay as they were"
    assert "corrected 20 of 20 model calls" in report


def test_the_unwanted_condition_runs(draw, digits):
    """Sevens go, nothing is a digit that was not asked for, and most others stay."""
    pictures, _ = draw("1 Try it")
    off, on = digits(pictures["PreviewImage"]), digits(pictures["SaveImage"])
    assert (off == 7).any() and torch.isin(on, torch.tensor([1, 4])).all()
    assert (on == off)[off != 7].float().mean() > 0.8


def test_a_folder_alone_is_enough(draw, digits):
    """Sevens go, by a condition that was learned from a folder of them, and the others stay."""
    pictures, report = draw("Tiny digits, learned from a folder")
    off, on = digits(pictures["PreviewImage"]), digits(pictures["SaveImage"])
    assert (off == 7).any() and not (on == 7).any()
    assert (on == off)[off != 7].float().mean() > 0.8
    assert "as the unwanted condition tells" in report


def test_a_folder_of_photographs_is_enough_as_well(draw):
    pictures, report = draw("Tiny photographs, learned from a folder")
    world = TinyPhotos()
    off, on = (world.classes(torch.from_numpy(pictures[kind]).movedim(-1, 1) / 255) for kind in ("PreviewImage", "SaveImage"))
    truck = CLASSES.index("truck")
    assert (off == truck).sum() > 3 and (on == truck).sum() <= 1, "1 to 5 % of all pictures are left, see tiny_photos"
    assert (on == off)[off != truck].float().mean() > 0.6, "some automobiles are airplanes to the judge, before and after"
    assert "as the unwanted condition tells" in report


def test_layers_catch_what_the_ones_before_let_through(draw, digits):
    """With the sampler off the check alone blocks the sevens; with it on hardly anything is left to block."""
    pictures, report = draw("Tiny digits, layers")
    assert torch.isin(digits(pictures["SaveImage"]), torch.tensor([1, 4])).all() and report.startswith("16 passed, 0 refused\n")
    stock = digits(draw("1 Try it")[0]["PreviewImage"])
    pictures, report = draw("Tiny digits, layers", strength=0)
    assert (stock == 7).sum() > (digits(pictures["SaveImage"]) == 7).sum() and "; again: " in report


@pytest.mark.parametrize("name", ["Tiny digits", "1 Try it"])
def test_strength_0_is_the_stock_sampler(name, draw):
    pictures, report = draw(name, strength=0)
    assert np.array_equal(pictures["SaveImage"], pictures["PreviewImage"])
    assert name == "1 Try it" or "strength is 0" in report


def test_apply_with_a_custom_sampler_runs_and_equals_the_safe_ksampler(draw, digits):
    pictures, report = draw("Tiny digits, custom sampler")
    assert "corrected 20 of 20 model calls" in report, "read after sampling"
    assert not (digits(pictures["SaveImage"]) == 7).any()
    for strength in (0, 1):
        custom, _ = draw("Tiny digits, custom sampler", noise_seed=1, strength=strength)
        safe, _ = draw("Tiny digits", seed=1, strength=strength)
        assert np.array_equal(custom["SaveImage"], safe["SaveImage"]), strength


def cells(sheets, rows, columns, zoom=4):
    """The pictures of sheets that a workflow stitched with lines of 2, enlarged and set in a margin of 16; four times as large as drawn."""
    inner = sheets[:, 16:-16, 16:-16][:, ::zoom // 4, ::zoom // 4]
    assert inner.shape[1:3] == (4 * (34 * rows - 2), 4 * (34 * columns - 2))
    return [[inner[:, 136 * row:136 * row + 128, 136 * column:136 * column + 128] for column in range(columns)] for row in range(rows)]


def test_compare_shows_off_beside_on(draw, digits):
    pictures, report = draw("Tiny digits, pairs of off and on")
    (off, on), = cells(pictures["SaveImage"], 1, 2)
    alone, _ = draw("Tiny digits", seed=7)
    assert np.array_equal(off, alone["PreviewImage"]) and np.array_equal(on, alone["SaveImage"])
    assert (digits(off) == 7).any() and not (digits(on) == 7).any()
    assert "corrected 20 of 20 model calls" in report


def test_the_sheet_has_strength_by_window(draw, digits):
    pictures, _ = draw("Tiny digits, strength by window")
    sheet = cells(pictures["SaveImage"], 3, 3, zoom=8)
    for row, strength in enumerate((0.5, 1, 2)):
        for column, end in enumerate((0.1, 0.2, 1)):
            alone, _ = draw("Tiny digits", seed=4, batch_size=1, strength=strength, end=end)
            assert np.array_equal(sheet[row][column], alone["SaveImage"]), (strength, end)
    assert [[int(digits(cell)) for cell in row] for row in sheet] == [[7, 7, 1], [7, 7, 1], [7, 1, 1]], "something changes along both axes"


def test_a_set_that_the_model_made_itself_negates(draw, digits, server):
    pictures, report = draw("Tiny digits, set drawn by the model")
    off, on = (digits(pictures[kind]) for kind in ("PreviewImage", "SaveImage"))
    assert (off == 7).sum() >= 4 and (on == 7).sum() <= 1
    assert "corrected 20 of 20 model calls" in report
    folders = server.get("/object_info/SafeDenoiserLoadNegationSet")["SafeDenoiserLoadNegationSet"]["input"]["required"]["folder"]
    assert "generated_00001_.safetensors" in folders[1]["options"], "the bank that it saved is a set of the next run"


def test_what_is_blocked_is_sampled_again(draw, digits):
    """Sevens, which the first sampler draws since it is off, are blocked, sampled again alone, and put in their places."""
    first = draw("Tiny digits")[0]["PreviewImage"]
    sevens = digits(first) == 7
    pictures, report = draw("Tiny digits, check and sample again")
    kept = [i for i, line in enumerate(report.splitlines()[1:]) if "again" not in line]
    assert sevens.any() and not sevens[kept].any() and sevens.sum() + 2 >= 16 - len(kept) == len(pictures["PreviewImage"])
    assert np.array_equal(pictures["SaveImage"][kept], first[kept])
    found = digits(pictures["SaveImage"])
    assert report.startswith("16 passed, 0 refused\n") and not (found == 7).any() and torch.isin(found, torch.tensor([1, 4])).all()


def test_where_nothing_is_blocked_nothing_is_sampled_again(server, object_info):
    prompt = to_prompt(load("Tiny digits, check and sample again"), object_info, strength=1.0, seed=3, batch_size=2)
    ran = server.run(prompt)
    outputs = {prompt[key]["class_type"]: value for key, value in ran["outputs"].items()}
    assert outputs["PreviewAny"]["text"][0].startswith("2 passed, 0 refused\n") and "PreviewImage" not in outputs
    assert "again" not in outputs["PreviewAny"]["text"][0] and len(outputs["SaveImage"]["images"]) == 2


def test_a_workflow_branches_by_what_passed(server, object_info):
    """The other branch is sampled where one picture is blocked, and not where all pass."""
    if NEEDS["Tiny digits, check and branch"] not in object_info:
        pytest.skip("this ComfyUI has no If/Else Switch")
    workflow = load("Tiny digits, check and branch")
    safe = str(next(node["id"] for node in workflow["nodes"] if "safe, strength 1" in node.get("title", "") and "KSampler" in node["type"]))
    ran = {}
    for changes in ({}, {"strength": 1.0, "batch_size": 2, "seed": 3}):
        prompt = to_prompt(workflow, object_info, **changes)
        prompt[safe]["inputs"]["seed"] = 4  # else it would be the first sampler over again
        outputs = {prompt[key]["class_type"]: value for key, value in server.run(prompt)["outputs"].items()}
        again = dict(server.run(prompt)["status"]["messages"])["execution_cached"]["nodes"]  # all that had run
        ran[outputs["PreviewAny"]["text"][0].partition(" refused")[0]] = len(outputs["SaveImage"]["images"]), safe in again
    (whole, both), (part, one) = ran["2 passed, 0"], next(found for text, found in ran.items() if not text.endswith(" 0"))
    assert (whole, both, part, one) == (2, False, 16, True)
