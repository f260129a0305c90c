"""What must never happen in a ComfyUI, see docs/reliability.md: the pack gone because of one file, work lost, a wrong thing used."""
import gc
import json
import logging
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.unit.test_registry import PROJECT

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
        (odd / "<b>.safetensors").write_bytes(b"x")
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
    odd = ("loop", "broken", "zero", "pipe", "socket", "\udcff", "folder", "back", "<")
    for names in lists.values():
        json.dumps(names, ensure_ascii=False).encode()
        assert not any(word in name for name in names for word in odd)
    assert "tiny_sevens" in lists["sets"] and "tiny_reference.safetensors" in lists["banks"] and "tiny_clip" in lists["clips"]
    told = [record.getMessage() for record in caplog.records if "is left out of the lists" in record.getMessage()]
    assert told and len(told) == len(set(told)), "each once"


@POSIX
@pytest.mark.parametrize("kind", ["negation_sets", "negation_banks", "open_clip"])
def test_a_linked_folder_is_left_out_with_a_line_that_says_what_to_do(kind, pack, comfy, tmp_path, caplog):
    import folder_paths
    from pack.nodes import folders

    root = Path(folder_paths.models_dir) / kind
    root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    link = root / "linked_elsewhere"
    link.symlink_to(tmp_path)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                listed = {"negation_sets": folders.list_sets, "negation_banks": folders.list_banks, "open_clip": folders.list_clips}[kind]()
    finally:
        link.unlink()
        folders._left_out.discard(link)
    told = [record.getMessage() for record in caplog.records if "linked_elsewhere" in record.getMessage()]
    assert not any("linked_elsewhere" in name for name in listed) and len(told) == 1
    assert "put the folder itself there, or name its place in extra_model_paths.yaml" in told[0]


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


# --- Other people's machines


def test_what_is_too_old_is_said_in_one_line_and_left_alone(pack, monkeypatch):
    import asyncio

    from pack.nodes import SafeDenoiserExtension, versions

    named = dict(one.split(">=") for one in PROJECT["project"]["dependencies"])
    assert versions.lowest() == named | PROJECT["tool"]["safe-denoiser"]["lowest"] and len(versions.lowest()) == 5
    assert versions.too_old() == ""
    here = {"pillow": "9.4.1", "torch": "2.14.1+cu130", "numpy": "1.26.0rc1", "open-clip-torch": "2.32.0"}

    def version(name):
        if name not in here:
            raise versions.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(versions, "version", version)
    assert versions.too_old() == ("safe denoiser: too old: open-clip-torch 2.32.0 (needs 3.0 or newer), pillow 9.4.1 (needs 9.5 or newer); "
                                  "nodes may fail until you upgrade them in ComfyUI's Python")
    told = []
    monkeypatch.setattr(logging, "warning", told.append)
    assert asyncio.run(SafeDenoiserExtension().get_node_list()) and told == [versions.too_old()]
    monkeypatch.setattr(versions, "PROJECT", Path("gone"))
    assert versions.too_old() == "", "a pack without its pyproject.toml loads too"


# --- Interrupts: what is done is kept, nothing is half-written, and the next run is as if nothing had happened


@pytest.fixture
def folder(comfy):
    """A negation set of twelve pictures, drawn anew so that nothing of it is known."""
    import folder_paths

    path = Path(folder_paths.get_input_directory()) / "negation_sets" / "twelve"
    path.mkdir(parents=True)
    for i, pixels in enumerate(torch.rand(12, 40, 40, 3)):
        Image.fromarray((pixels * 255).byte().numpy()).save(path / f"{i}.png")
    yield path
    shutil.rmtree(path.parent)  # which other tests want to make


@pytest.fixture
def stop(comfy, monkeypatch):
    """The user presses Stop when something was done so many times: `stop(owner, name, times)`."""
    import comfy.model_management as management

    def after(owner, name, times):
        real, done = getattr(owner, name), []

        def counted(*args, **kwargs):
            done.append(1)
            if len(done) == times:
                management.interrupt_current_processing()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return done

    yield after
    management.interrupt_current_processing(False)


def stopped():
    import comfy.model_management

    return pytest.raises(comfy.model_management.InterruptProcessingException)


def half_written(kind):
    from pack.nodes import folders

    return [path.name for path in folders.cache(kind).glob("*.tmp")]


def test_an_interrupt_at_every_stage(run, tiny, folder, stop, pack, sample, monkeypatch):
    import comfy.model_management as management
    import comfy.sample
    import comfy.utils
    from pack.safe_denoiser import denoiser
    from pack.safe_denoiser.density import densities
    from pack.safe_denoiser.pictures import listing

    clip = run("LoadOpenCLIP", weights="tiny_clip").result[0]
    seen = stop(listing, "examine", 5)
    with stopped():
        run("LoadNegationSet", folder="twelve", preview="off")
    assert len(seen) == 5, "at once"
    loaded = run("LoadNegationSet", folder="twelve", preview="off").result[0]
    assert len(loaded) == 12

    encoded = stop(tiny.vae, "encode", 5)
    with stopped():
        run("BuildNegationBank", negation_set=loaded, vae=tiny.vae, latent=tiny.latent())
    assert len(encoded) == 5 and not half_written("latents")
    bank = run("BuildNegationBank", negation_set=loaded, vae=tiny.vae, latent=tiny.latent()).result[0]
    assert len(encoded) in (12, 13), "those that were encoded are kept; newer ComfyUI stops in the midst of the fifth"

    embedded = stop(type(clip), "pixels", 1)
    with stopped():
        run("SplitNegationSet", clip=clip, negation_set=loaded)
    monkeypatch.setattr(type(clip), "pixels", lambda *_: pytest.fail("embedded again"))
    clip.pictures(loaded)
    assert embedded and not half_written("embeddings")
    monkeypatch.undo()

    calls = stop(comfy.sample, "sample", 3)
    settings = dict(model=tiny.model, latent=tiny.latent(), conditioning=tiny.empty, count=10, batch_size=2, steps=3, seed=77)
    with stopped():
        run("SampleReferenceBank", **settings)
    assert len(calls) == 3 and not half_written("reference")
    reference = run("SampleReferenceBank", **settings).result[0]
    assert len(calls) == 3 + 3, "two batches of five are kept"
    assert torch.equal(reference.latents, run("SampleReferenceBank", **{**settings, "steps": 3}).result[0].latents) and len(calls) == 6

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: management.throw_exception_if_processing_interrupted())
    banks = dict(negation_bank=bank, reference_bank=reference)  # the hook is what ComfyUI's server sets
    wanted = sample.safe(banks)[0]
    for where, name in ((densities, "temperature_for"), (denoiser.SafeDenoiser, "safe")):
        done = stop(where, name, 1)
        with stopped():
            sample.safe({**banks, "negation_bank": type(bank)(bank.latents * 1.001, metadata=bank.metadata)})
        assert done
        assert torch.equal(sample.safe(banks)[0], wanted), name

    stop(type(clip), "pixels", 1)
    pictures = torch.rand(3, 32, 32, 3)
    unknown = run("NegationSetFromImages", images=torch.rand(4, 32, 32, 3), preview="off").result[0]
    with stopped():
        run("CheckImages", images=pictures, clip=clip, negation_set=unknown)
    assert run("CheckImages", images=pictures, clip=clip, negation_set=unknown).result


def test_a_calibration_stops_in_the_midst_and_moves_the_bar(tiny, sample, stop, monkeypatch):
    """It runs inside a step, and of a large bank for long; a sampler asks only between steps whether to go on."""
    import comfy.utils
    from pack.nodes.steering import run
    from pack.safe_denoiser.density import calibration

    moved = []
    monkeypatch.setattr(run, "SECONDS", 0)
    monkeypatch.setattr(calibration, "PART", 2**10)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: moved.append((value, total)))
    told = stop(calibration, "tell", 2)
    new = type(tiny.bank)(tiny.bank.latents * 1.002, metadata=tiny.bank.metadata)
    with stopped():
        sample.safe({"negation_bank": new})
    assert len(told) == 2 and moved and moved[0][0] == 1 < moved[0][1]
    assert sample.safe({"negation_bank": new})[1].steps


def test_a_reference_bank_in_pieces_is_the_same(run, tiny, stop, monkeypatch):
    """Interrupted after each batch in turn, and with one piece damaged and one removed: sampled again, and only that."""
    import comfy.sample
    from pack.nodes import folders

    settings = dict(model=tiny.model, latent=tiny.latent(), conditioning=tiny.empty, count=9, batch_size=2, steps=2, seed=78)
    before = set(folders.cache("reference").glob("*"))
    whole = run("SampleReferenceBank", **settings).result[0].latents
    pieces = sorted(set(folders.cache("reference").glob("*")) - before)
    assert len(pieces) == 5
    calls = stop(comfy.sample, "sample", 99)
    pieces[1].write_bytes(pieces[1].read_bytes()[:100])
    pieces[3].unlink()
    assert torch.equal(run("SampleReferenceBank", **settings).result[0].latents, whole) and len(calls) == 2
    for piece in pieces:
        piece.unlink()
    for _ in range(4):  # each time one batch is made, and the next is stopped
        stop(comfy.sample, "sample", 2)
        with stopped():
            run("SampleReferenceBank", **settings)
        monkeypatch.undo()
    assert torch.equal(run("SampleReferenceBank", **settings).result[0].latents, whole)


# --- The disk is full, the folder is gone, may not be written, or holds other people's files


@pytest.mark.parametrize("fault", ["full", "a file is in the way", "not to be written", "gone in the meantime"])
def test_without_a_cache_everything_goes_on(fault, run, tiny, folder, pack, monkeypatch, caplog):
    import errno

    from pack.nodes import folders
    from pack.safe_denoiser.bank import cache
    from pack.safe_denoiser.bank import file_format as module

    cache._unwritable.clear()
    place = folders.cache("latents").parent
    moved = place.with_name("moved")
    if place.exists():
        place.rename(moved)
    real, trouble = module.save_file, {"full": errno.ENOSPC, "not to be written": errno.EACCES}.get(fault)

    def save_file(tensors, path, metadata=None):
        if trouble:
            Path(path).write_bytes(b"half")  # as far as the disk goes
            raise OSError(trouble, os.strerror(trouble))
        real(tensors, path, metadata)
        if fault == "gone in the meantime":
            shutil.rmtree(place)

    monkeypatch.setattr(module, "save_file", save_file)
    if fault == "a file is in the way":
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("somebody's")
    try:
        with caplog.at_level(logging.WARNING):
            loaded = run("LoadNegationSet", folder="twelve", preview="off").result[0]
            banks = [run("BuildNegationBank", negation_set=loaded, vae=tiny.vae, latent=tiny.latent()).result[0] for _ in range(2)]
            reference = run("SampleReferenceBank", model=tiny.model, latent=tiny.latent(), conditioning=tiny.empty, count=4, steps=2,
                            seed=79).result[0]
        assert len(banks[0]) == 12 and torch.equal(banks[0].latents, banks[1].latents) and reference.latents.isfinite().all()
        told = [record.getMessage() for record in caplog.records if "nothing can be stored in" in record.getMessage()]
        assert sorted(Path(line.split(" in ")[1].split(" (")[0]).name for line in told) == ["latents", "reference"], "one line for each"
        assert not half_written("latents") and not half_written("reference")
        if fault == "a file is in the way":
            assert place.read_text() == "somebody's"
    finally:
        monkeypatch.undo()
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if moved.exists():
            moved.rename(place)


def test_a_bank_that_cannot_be_saved_says_so_and_leaves_nothing(run, tiny, monkeypatch):
    import errno

    import folder_paths
    from pack.safe_denoiser.bank import file_format as module

    def save_file(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        run("SaveNegationBank", negation_bank=tiny.bank, filename_prefix="no_space")
    assert not list((Path(folder_paths.get_output_directory()) / "negation_banks").glob("no_space*"))


# --- Many runs


def resources() -> tuple[float, int, int]:
    """(MB of memory, open files, entries of the pack's own caches)."""
    from pack.nodes.models import loading
    from pack.nodes.steering import remembered_runs
    from pack.safe_denoiser.bank import bank

    gc.collect()
    status = Path("/proc/self/status")
    memory = int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024 if status.exists() else 0
    files = len(os.listdir("/proc/self/fd")) if status.exists() else 0
    return memory, files, len(remembered_runs._runs) + len(bank._recalled) + sum(map(len, loading._held.values()))


def test_many_runs_in_one_process_take_no_more_than_a_few(run, tiny, request, comfy):
    """300 with --slow: sets, banks and runs that come and go; memory, files and caches level off."""
    count = 300 if request.config.getoption("--slow") else 60
    straight, seven = (run("ClassCondition", class_index=i).result[0] for i in (10, 7))
    trace = []
    for i in range(count):
        pixels = torch.rand(6, 32, 32, 3, generator=torch.Generator().manual_seed(i))
        pictures = run("NegationSetFromImages", images=pixels, preview="off").result[0]
        bank = run("BuildNegationBank", negation_set=pictures, vae=tiny.vae, latent=tiny.latent()).result[0]
        more = [dict(reference_bank=tiny.reference), dict(unwanted=seven), dict(retain_bank=tiny.reference), {}][i % 4]
        latent, report = run("KSampler", model=tiny.model, seed=i, steps=3, cfg=2.0, positive=straight, negative=tiny.empty,
                             latent_image=tiny.latent(), negation_bank=bank, **more).result
        run("Report", report=report, samples=latent)
        if i in (count // 3, count - 1):
            trace.append(resources())
    (early, few, _), (late, many, entries) = trace
    print(f"{count} runs: {early:.0f} MB after a third, {late:.0f} MB at the end; {few} and {many} open files; {entries} entries")
    assert late - early < 20 + 0.1 * count and many <= few + 2 and entries < 700
