"""What the page may ask of the server about negation sets, asked by strangers: nothing lost, nothing overwritten, nothing outside."""
import io
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def sets(server):
    return Path(server.base) / "input/negation_sets"


def png(seed=0, size=32, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def ask(server, route, query, body=None, kind="application/octet-stream"):
    """(status, answer)"""
    request = urllib.request.Request(f"{server.url}/safe_denoiser/{route}?{urllib.parse.urlencode(query)}", body, {"Content-Type": kind})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def add(server, set, name, data):
    return ask(server, "picture", {"set": set, "name": name}, data)


def everything(server):
    """Every file of the server's directory but its log and databases, with its content."""
    return {path: path.read_bytes() for path in Path(server.base).rglob("*")
            if path.is_file() and path.suffix not in {".log", ".db", ".pyc"} and not {"user", "custom_nodes"} & {*path.parts}}


def test_a_new_set_is_empty_is_listed_and_says_so(server, sets):
    assert ask(server, "set", {"name": "mine"}, b"") == (200, {"set": "mine"}) and (sets / "mine").is_dir()
    there = server.get("/object_info/SafeDenoiserLoadNegationSet")["SafeDenoiserLoadNegationSet"]["input"]["required"]["folder"]
    options = there[1]["options"] if isinstance(there[0], str) else there[0]
    assert options[0] == there[1]["default"] == "choose a set" and "mine" in options
    _, told = ask(server, "set", {"name": "mine"})
    assert told == {"own": True, "info": "mine is empty: drop pictures here", "pictures": [], "problem": ""}
    status, told = ask(server, "set", {"name": "mine"}, b"")
    assert status == 400 and told["problem"] == "there is a set 'mine' already; choose it in the list, or take another name"


def test_pictures_go_in_and_are_seen_at_once(server, sets):
    ask(server, "set", {"name": "seen"}, b"")
    for i in range(3):
        assert add(server, "seen", f"{i}.png", png(i)) == (200, {"set": "seen", "added": f"{i}.png"})
    _, told = ask(server, "set", {"name": "seen"})
    assert told["info"].startswith("seen: 3 pictures, 0 skipped")
    assert [one["name"] for one in told["pictures"]] == ["0.png", "1.png", "2.png"]
    assert all(one["picture"].startswith("data:image/jpeg;base64,") for one in told["pictures"])
    assert len(ask(server, "set", {"name": "seen", "max": "1"})[1]["pictures"]) == 1
    assert ask(server, "set", {"name": "choose a set"})[1]["problem"] == ""


def test_nothing_is_overwritten_and_the_very_same_is_kept_once(server, sets):
    ask(server, "set", {"name": "twice"}, b"")
    names = [add(server, "twice", "a.png", png(seed))[1]["added"] for seed in (1, 2, 1, 2, 3)]
    assert names == ["a.png", "a_2.png", "", "", "a_3.png"]
    assert [(sets / "twice" / name).read_bytes() for name in ("a.png", "a_2.png", "a_3.png")] == [png(1), png(2), png(3)]


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "..\\..\\x.png", "C:\\x.png", "a/../../../x.png", "....//x.png"])
def test_no_name_leads_out(name, server, sets):
    ask(server, "set", {"name": "inside"}, b"")
    before = everything(server)
    status, told = add(server, "inside", name, png(hash(name) % 1000))
    new = set(everything(server)) - set(before)
    assert status == 200 and [path.parent for path in new] == [sets / "inside"] and "/" not in told["added"]


@pytest.mark.parametrize("name", ["..", ".", "", "../secret", "/tmp", "tiny_sevens", "people/../../x", "gone", "\0"])
def test_only_a_set_of_ones_own_takes_pictures(name, server, sets):
    (sets.parent / "secret").mkdir(exist_ok=True)
    before = everything(server)
    status, told = add(server, name, "x.png", png(5))
    assert status == 400 and "is no folder in input/negation_sets" in told["problem"] and everything(server) == before


def test_a_link_out_of_the_folder_takes_nothing(server, sets):
    outside = sets.parent / "outside"
    outside.mkdir()
    os.symlink(outside, sets / "linked")
    assert add(server, "linked", "x.png", png())[0] == 400 and not any(outside.iterdir())
    ask(server, "set", {"name": "holds"}, b"")
    os.symlink(outside / "y.png", sets / "holds/x.png")
    assert add(server, "holds", "x.png", png())[1]["added"] == "x_2.png" and not any(outside.iterdir())


@pytest.mark.parametrize("name, data, problem", [
    ("x.txt", b"words", "not a picture that can be read"), ("x.png", b"", "empty file"), ("x.png", b"no picture", "not a picture"),
    ("x.png", png()[:200], "damaged"), ("x.svg", b"<svg/>", "SVG: save it as PNG or JPEG"), ("x", png(), "not a picture"),
    ("x.zip", b"PK no zip", "not a readable zip file"), ("x.zip", zipped(a=b"text"), "no picture in it"),
    (" . ", png(), "it has no name")])
def test_what_is_no_picture_is_refused(name, data, problem, server, sets):
    ask(server, "set", {"name": "strict"}, b"")
    before = everything(server)
    status, told = add(server, "strict", name, data)
    assert status == 400 and problem in told["problem"] and everything(server) == before


def test_what_is_too_large_is_refused(server, sets):
    ask(server, "set", {"name": "large"}, b"")
    status, told = add(server, "large", "x.png", bytes(2**28 + 5))
    assert status == 400 and told["problem"] == "larger than 256 MB" and not any((sets / "large").iterdir())


@pytest.mark.parametrize("name, kept", [("猫と犬 🐈.png", "猫と犬 🐈.png"), ("CON.png", "_CON.png"), ("a<b>.png", "a_b_.png"),
                                        ("\u202egnp.png", "_gnp.png"), ("x" * 400 + ".png", "x" * 150 + ".png"), ("a\nb.png", "a_b.png")])
def test_odd_names_are_made_harmless(name, kept, server, sets):
    ask(server, "set", {"name": "odd"}, b"")
    assert add(server, "odd", name, png(len(name)))[1]["added"] == kept and (sets / "odd" / kept).is_file()
    assert kept in [one["name"] for one in ask(server, "set", {"name": "odd"})[1]["pictures"]]


@pytest.mark.parametrize("name, kept", [("../up", "_up"), ("七", "七"), ("nul", "_nul"), ("a/b", "a_b"),
                                        ("choose a set", "choose a set_"), ("b.zip", "b.zip_")])
def test_names_of_sets_are_made_harmless(name, kept, server, sets):
    assert ask(server, "set", {"name": name}, b"")[1] == {"set": kept} and (sets / kept).is_dir()


def test_a_zip_is_a_set_and_another_of_its_name_is_another(server, sets):
    first, second = zipped(**{"in/a.png": png(1), "b.png": png(2)}), zipped(**{"c.png": png(3)})
    assert add(server, "choose a set", "pack.zip", first)[1] == {"set": "pack.zip"}
    assert add(server, "", "pack.zip", second)[1] == {"set": "pack_2.zip"} and add(server, "", "pack.zip", first)[1]["set"] == "pack.zip"
    _, told = ask(server, "set", {"name": "pack.zip"})
    assert len(told["pictures"]) == 2 and not told["own"] and (sets / "pack.zip").read_bytes() == first


def test_a_saved_bank_is_named_and_not_read(server, sets):
    (sets / "bank.safetensors").write_bytes(b"not even one")
    _, told = ask(server, "set", {"name": "bank.safetensors"})
    assert told == {"own": False, "info": "bank.safetensors: a saved bank, which holds no pictures to show", "pictures": [], "problem": ""}
    assert ask(server, "set", {"name": "gone"})[1]["problem"].startswith("negation set 'gone' is not on this machine")


def test_500_files_at_once(server, sets):
    ask(server, "set", {"name": "many"}, b"")
    answers = []
    threads = [threading.Thread(target=lambda part: answers.extend(add(server, "many", "same.png", png(i, 8))[0] for i in part),
                                args=(range(k, 500, 4),)) for k in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert answers == [200] * 500 and len({path.read_bytes() for path in (sets / "many").iterdir()}) == 500
    _, told = ask(server, "set", {"name": "many"})
    assert told["info"].startswith("many: 500 pictures, 0 skipped") and len(told["pictures"]) == 16


def test_another_sites_page_cannot_send_unasked(server, sets):
    """A body that no browser sends to another origin without asking first."""
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert ask(server, "set", {"name": "forged"}, b"", kind)[0] == 415
        assert ask(server, "picture", {"set": "mine", "name": "x.png"}, png(), kind)[0] == 415
    assert not (sets / "forged").exists()


@pytest.mark.parametrize("code, status, words", [("ENOSPC", 507, "the disk is full"), ("EACCES", 403, "no right to write there")])
def test_a_full_disk_and_no_rights_leave_nothing(code, status, words, pack, monkeypatch, tmp_path):
    """In this process, where a disk can be made full."""
    import asyncio
    import errno
    import sys

    page = sys.modules["pack.nodes.pictures.routes"]

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(getattr(errno, code), "as it is")

    monkeypatch.setattr(page.folders, "roots", lambda kind: [tmp_path])
    monkeypatch.setattr(page.folders, "searched", lambda kind: [tmp_path])
    page.make("mine")
    opened = Path.open

    def full(path, mode="r", *args, **kwargs):
        if mode != "xb":
            return opened(path, mode, *args, **kwargs)
        opened(path, "xb").close()
        return Full()

    monkeypatch.setattr(Path, "open", full)
    answer = asyncio.run(page._answered(page.add, "mine", "a.png", png()))
    assert answer.status == status and words in json.loads(answer.text)["problem"] and not any((tmp_path / "mine").iterdir())


def test_a_run_with_nothing_chosen_is_refused_at_once(pack, run):
    message = "no set is chosen; choose one in the list, or drop pictures onto the node"
    assert pack["SafeDenoiserLoadNegationSet"].validate_inputs(folder="choose a set") == message
