"""What must never happen in a ComfyUI, see docs/reliability.md: the pack gone because of one file, work lost, a wrong thing used."""
import json
import logging
import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

POSIX = pytest.mark.skipif(os.name == "nt", reason="files of this kind are POSIX's")


@pytest.fixture
def odd_folders(comfy, tmp_path, monkeypatch):
    """Every folder that a list reads, with odd entries in it: broken links, loops, pipes, sockets, names that are no UTF-8, locked ones."""
    import folder_paths

    roots = [Path(folder_paths.get_input_directory()) / "negation_sets", Path(folder_paths.get_output_directory()) / "negation_banks",
             *(Path(folder_paths.models_dir) / kind for kind in ("negation_sets", "negation_banks", "open_clip", "clip_vision"))]
    made, fresh, sockets = [], [], []
    monkeypatch.chdir(tmp_path)
    for root in roots:
        if not root.exists():
            root.mkdir(parents=True)
            fresh.append(root)
        odd = root / "odd"
        odd.mkdir()
        made.append(odd)
        for name in ("loop.safetensors", "loop.png"):
            os.symlink(name, odd / name)
        os.symlink("gone", odd / "broken.safetensors")
        os.symlink(root, odd / "back")  # a folder that holds itself
        os.symlink("/dev/zero", odd / "zero.safetensors")
        os.mkfifo(odd / "pipe.safetensors")
        os.mkfifo(odd / "pipe.png")
        for name in (b"not\xff\xfeutf8.safetensors", b"not\xffutf8.zip"):
            (Path(os.fsdecode(os.path.join(os.fsencode(odd), name)))).write_bytes(b"x")
        os.mkdir(os.path.join(os.fsencode(odd), b"\xff folder"))
        Image.new("RGB", (4, 4)).save(os.path.join(os.fsencode(odd), b"\xff folder", b"p.png"), "PNG")
        (odd / "open_clip_config.json").mkdir()
        (odd / "folder.safetensors").mkdir()
        (odd / "empty.safetensors").write_bytes(b"")
        (odd / "line\nbreak.safetensors").write_bytes(b"x")
        one = socket.socket(socket.AF_UNIX)
        os.chdir(odd)
        one.bind("socket.safetensors")
        os.chdir(tmp_path)
        sockets.append(one)
        shut = odd / "shut"
        shut.mkdir()
        shut.chmod(0)
    yield
    for one in sockets:
        one.close()
    for odd in made:
        (odd / "shut").chmod(0o700)
        shutil.rmtree(os.fsencode(odd))
    for root in fresh:
        root.rmdir()


@POSIX
def test_no_entry_of_a_folder_takes_the_pack_down(pack, odd_folders, caplog):
    from pack.nodes import folders

    folders._left_out.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            schemas = {name: node.GET_SCHEMA() for name, node in pack.items()}
            for node in pack.values():
                node.define_schema()
    assert len(schemas) == len(pack)
    lists = {"sets": folders.list_sets(), "banks": folders.list_banks(), "clips": folders.list_clips()}
    for names in lists.values():
        json.dumps(names, ensure_ascii=False).encode()
        assert not any(word in name for name in names for word in ("loop", "broken", "zero", "pipe", "socket", "\udcff", "folder", "back"))
    assert "tiny_sevens" in lists["sets"] and "tiny_reference.safetensors" in lists["banks"] and "tiny_clip" in lists["clips"]
    told = [record.getMessage() for record in caplog.records if "is left out of the lists" in record.getMessage()]
    assert told and len(told) == len(set(told)), "each once"


@POSIX
@pytest.mark.parametrize("kind", ["negation_sets", "negation_banks", "open_clip"])
@pytest.mark.parametrize("name", ["", ".", "..", "../..", "/etc/passwd", "a\0b", "x" * 5000, "\udcff", "odd/pipe.safetensors",
                                  "odd/loop.safetensors", "odd/zero.safetensors", "odd/shut",
                                  "odd/broken.safetensors", "con", None, 7, ["a"], {"a": 1}, True])
def test_whatever_a_workflow_names_is_answered(kind, name, pack, run, odd_folders):
    """A choice comes from somebody's JSON: the answer is a message, at once, and never a file outside the folders."""
    from pack.nodes import folders

    node, key = {"negation_sets": ("LoadNegationSet", "folder"), "negation_banks": ("LoadNegationBank", "bank"),
                 "open_clip": ("LoadOpenCLIP", "weights")}[kind]
    answer = folders.problem(kind, name)
    assert answer is True or isinstance(answer, str) and len(answer) < 1500 and answer.isprintable()
    if answer is True:
        more = dict(architecture="ViT-B-32") if kind == "open_clip" else {}
        with pytest.raises((ValueError, FileNotFoundError)):
            run(node, **{key: name}, **more)
