"""What does it cost? `python -m benchmarks.step_cost` prints the cost of a step, all compared in one run.

Times are medians of interleaved calls, and what counts are the ratios within a row. Sections, all of them by default:

    kernel    the posterior of a bank of N items at one x (B = 1) or four (B = 4), against one pass over the bank (one `torch.mv`; for
              B = 4 the two matmuls alone, distances and weighted mean) and against the published rule as published. "one": one item
              holds the weight; "all": every item counts. Memory: what is allocated at the peak, in percent of the bank.
    step      one correction with a negation bank and 100 reference samples, and by windows; and what collecting the report takes of it.
    sampler   the sampler's step on the tiny model, and on SD 1.5 at full size with random weights at 512 x 512 (needs a ComfyUI, named by
              the environment variable SAFE_DENOISER_COMFYUI), and the part of it that the patch takes.
    condition the sampler's step with an unwanted condition against a plain step with guidance: three rows in a batch instead of two.
    guards    Guard Prompt with SD 1.5's text encoder at full size and random weights, list nudity: of a list that is new, and then of each
              prompt, in encodings of a prompt (needs a ComfyUI); and SLD's part of a step.
    disk      100,000 latents of 4 x 64 x 64 in half precision in a file (3.3 GB): time and resident memory of a step, and of one that
              searches. "its cluster": the weight is on the items around one centre.
    search    from how many items in memory on a search pays.
    smaller   unsafe rate of a bank of prototypes, in the tiny digit world.
    build     the cold and the warm build of a bank of 515 pictures.
"""
import argparse
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from safe_denoiser import Bank, LatentCache, NegationSet, SafeDenoiser, compress_bank, encode_bank, index_bank, load_bank, posterior
from safe_denoiser.prediction import Prediction, Step

ROOT = Path(__file__).parent.parent
LARGEST = 7e9  # bytes: what needs more is left out


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make, at their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {y.untyped_storage().data_ptr() for y in args if isinstance(y, torch.Tensor)}
        for y in made if isinstance(made, (tuple, list)) else (made,):
            place = y.untyped_storage().data_ptr() if isinstance(y, torch.Tensor) else None
            if place and place not in given and place not in self.alive:
                self.alive[place] = y.untyped_storage().nbytes()
                weakref.finalize(y.untyped_storage(), self.alive.pop, place, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


def peak_bytes(call: Callable[[], object]) -> int:
    with Allocations() as seen:
        call()
    return seen.peak


def medians(calls: dict[str, Callable[[], object]], seconds: float = 4.0) -> dict[str, float]:
    """Milliseconds of each call, all called in turns for about so many seconds, and at least 5 times."""
    times = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < 6:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def published_rule(denoised: torch.Tensor, bank: torch.Tensor, bandwidth: float = 3.15, strength: float = 0.33,
                   threshold: float = 1e-9) -> torch.Tensor:
    """The rule with the operations of the published code: each kernel value is repeated over all D + 1 columns before exp, and a column
    of ones beside the bank sums the kernel, so that several arrays as large as the bank are made at each step.

    denoised - strength sum_n k_n y_n / (sum_n k_n + 1e-8),  k_n = exp(-|denoised - y_n| / (2 bandwidth^2)), where the gate opens.
    Source: the authors' implementation of arXiv:2502.08011, restated. denoised (B, D), bank (N, D), normalised.
    """
    beside = torch.cat([bank, bank.new_ones(len(bank), 1)], 1)  # (N, D + 1)
    distances = torch.cdist(denoised, bank)[:, :, None].repeat(1, 1, beside.shape[1])  # (B, N, D + 1)
    sums = ((-distances / (2 * bandwidth**2)).exp() * beside).sum(1)
    total = sums[:, -1:] + 1e-8
    return torch.where(total > threshold, denoised - strength * sums[:, :-1] / total, denoised)


def draw(n: int, shape: tuple[int, ...], spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def kernel_row(n: int, shape: tuple[int, ...], b: int, seconds: float) -> dict[str, float]:
    """Times in ms and peak memory in percent of the bank, for one size of bank."""
    bank = Bank(draw(n, shape))
    flat, prior, norms = bank.latents.flatten(1), bank.log_weights, bank.squared_norms
    x = bank.latents[[i % n for i in range(b)]] + draw(b + 1, shape, 0.3)[:b]
    rows, weights, size = x.flatten(1), torch.rand(b, n), flat.shape[1]

    one, everything = (partial(posterior, x, bank.latents, sigma, 1.0, 0.4, t, prior, norms) for sigma, t in ((0.3, 1.0), (3.0, size / 32)))

    def matmuls():
        return torch.mv(flat, rows[0]) if b == 1 else (rows @ flat.T, weights @ flat)

    calls = {"pass": matmuls, "one": one, "all": everything}
    if (3 * b + 1) * flat.numel() * 4 < LARGEST:
        calls["published"] = lambda: published_rule(rows, flat)
    found = medians(calls, seconds)
    return found | {f"{name} %": 100 * peak_bytes(calls[name]) / (4 * flat.numel()) for name in calls if name != "pass"}


def kernel_table(counts: list[int], shapes: list[tuple[int, ...]], seconds: float = 4.0) -> list[tuple]:
    print("\n| D | N | B | pass, ms | one item, ms | / pass | all items, ms | / pass | published, ms | / ours "
          "| memory: one, all, published |\n|---|---|---|---|---|---|---|---|---|---|---|")
    table = []
    for shape in shapes:
        for n in counts:
            for b in (1, 4):
                size = torch.Size(shape).numel()
                if n * size * 4 > LARGEST:
                    print(f"| {size:,} | {n:,} | {b} | the bank alone takes {n * size * 4e-9:.0f} GB |||||||")
                    continue
                r = kernel_row(n, shape, b, seconds)
                table.append((shape, n, b, r))
                published = [f"{r['published']:.0f}", f"{r['published'] / r['one']:.0f}, {r['published'] / r['all']:.0f}"] \
                    if "published" in r else ["", ""]
                memory = ", ".join(f"{r[key]:.1f} %" for key in ("one %", "all %", "published %") if key in r)
                cells = [f"{r['pass']:.2f}", f"{r['one']:.2f}", f"{r['one'] / r['pass']:.2f}", f"{r['all']:.2f}",
                         f"{r['all'] / r['pass']:.2f}", *published, memory]
                print(f"| {size:,} | {n:,} | {b} | {' | '.join(cells)} |", flush=True)
    return table


def correction_row(n: int, shape: tuple[int, ...], seconds: float) -> dict[str, float]:
    """Times in ms of one correction against N items and 100 reference samples, whole and by nine windows, of one pass over both banks,
    and of collecting the report.
    """
    bank, reference = Bank(draw(n, shape)), Bank(draw(100, shape))
    x, denoised, sigma, steps = draw(1, shape, 2.0), draw(2, shape)[:1], torch.tensor([1.5]), []
    safe, parts = (SafeDenoiser(bank, reference=reference, parts=parts) for parts in (1, 2))
    always = torch.ones(1, dtype=torch.bool)
    prediction = Prediction(x.flatten(1), denoised.flatten(1), sigma, torch.ones(1), None)
    correction, flats = safe.correct(prediction), [one.latents.flatten(1) for one in (bank, reference)]

    def report():
        size = correction.direction.norm(dim=1) / prediction.denoised.norm(dim=1)
        steps.append(Step.of(correction, sigma, always, ~always, size))

    return medians({"pass": lambda: [torch.mv(flat, x.flatten()) for flat in flats], "step": lambda: safe.safe(x, denoised, sigma),
                    "parts": lambda: parts.safe(x, denoised, sigma), "report": report}, seconds)


def correction_table(counts: list[int], shape: tuple[int, ...], seconds: float = 4.0) -> None:
    print("\n| N + reference | one pass over both, ms | a correction, ms | / pass | of it for the report, ms "
          "| by 9 windows, ms |\n|---|---|---|---|---|---|")
    for n in counts:
        r = correction_row(n, shape, seconds)
        print(f"| {n:,} + 100 | {r['pass']:.2f} | {r['step']:.2f} | {r['step'] / r['pass']:.2f} | {r['report']:.3f} | "
              f"{r['parts']:.2f} |", flush=True)


class Timer:
    """Adds up the calls of a function, and the seconds they take."""

    def __init__(self, function: Callable):
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *args, **kwargs):
        began = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds, self.calls = self.seconds + time.perf_counter() - began, self.calls + 1


def tiny_rows() -> None:
    from tiny_digits.world import LATENT, TinyDigits, prompt, reference_bank

    world, noise = TinyDigits(), draw(1, LATENT)
    for n in (150, 515):
        safe, steps = SafeDenoiser(Bank(draw(n, LATENT)), reference=reference_bank()), 20
        shares, times = [], []
        for _ in range(12):
            timer = Timer(safe.safe)
            began = time.perf_counter()
            world.sample(noise, prompt("straight"), safe=timer)
            total = time.perf_counter() - began
            shares.append(timer.seconds / (total - timer.seconds))
            times.append(1e3 * (total - timer.seconds) / steps)
        print(f"| tiny model, 32 x 32 | {n} + 100 | {statistics.median(times):.1f} | "
              f"{statistics.median(times) * statistics.median(shares):.2f} | {100 * statistics.median(shares):.1f} % |", flush=True)


def load_pack(comfyui: str) -> dict:
    """The nodes of this pack in a ComfyUI on the CPU, by id."""
    import asyncio

    sys.path.insert(0, comfyui)
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, tempfile.mkdtemp()
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def sd15() -> object:
    """A MODEL with the architecture of SD 1.5 at full size, its weights drawn small and at random."""
    import comfy.model_patcher
    import comfy.supported_models

    unet = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4],
                transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3,
                context_dim=768, num_heads=8, num_head_channels=-1, use_spatial_transformer=True, use_linear_in_transformer=False,
                use_temporal_attention=False, legacy=False, adm_in_channels=None, dtype=torch.float32)
    cpu = torch.device("cpu")
    model = comfy.supported_models.SD15(unet).get_model({}, device=cpu)
    for weight in model.diffusion_model.state_dict().values():
        weight.normal_(0, 0.02)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def patched_with(nodes: dict, model, n: int, **conditions):
    """The model behind Apply Safe Denoiser at its defaults, with n negation pictures and 100 of reference."""
    apply = nodes["SafeDenoiserApply"]
    settings = {one.id: one.default for one in apply.GET_SCHEMA().inputs if getattr(one, "default", None) is not None}
    banks = {name: Bank(draw(count, (4, 64, 64)), metadata={"space": "vae"}) for name, count in
             (("negation_bank", n), ("reference_bank", 100))}
    return apply.EXECUTE_NORMALIZED(model=model, **banks, **conditions, **settings).args[0]


def full_size_rows(comfyui: str, counts: list[int], steps: int = 4) -> None:
    """The patch timed inside the run, from outside its wrapper and from inside: the difference of two runs would be noise."""
    nodes = load_pack(comfyui)
    import comfy.patcher_extension
    import comfy.sample

    model, wrappers = sd15(), comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    prompt = [[draw(1, (77, 768)), {}]]
    print(f"(SD 1.5 has {sum(w.numel() for w in model.model.diffusion_model.parameters()):,} parameters)", flush=True)
    for n in counts:
        patched = patched_with(nodes, model, n)
        outer, inner = [], []
        patched.wrappers[wrappers] = {"outer": [timed(outer)], **patched.wrappers[wrappers], "inner": [timed(inner)]}
        noise = draw(3, (4, 64, 64))[:1]
        comfy.sample.sample(patched, noise, steps, 7.0, "euler", "normal", prompt, prompt, torch.zeros_like(noise), seed=1)
        extra = [1e3 * (a - b) for a, b in zip(outer, inner)]
        step, cost = 1e3 * statistics.median(inner), statistics.median(extra)
        print(f"| SD 1.5, 512 x 512, cfg 7 | {n:,} + 100 | {step:.0f} | {cost:.2f} | {100 * cost / step:.2f} % | "
              f"first step, calibration included: {extra[0]:.0f} ms", flush=True)


def timed(times: list[float]) -> Callable:
    """A wrapper that leaves how long each call took."""
    def wrapper(executor, *args, **kwargs):
        began = time.perf_counter()
        try:
            return executor(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - began)
    return wrapper


def tiny_condition_row() -> None:
    from tiny_digits.world import LATENT, TinyDigits, prompt, reference_bank

    world, noise, steps = TinyDigits(), draw(1, LATENT), 20
    safe = SafeDenoiser(Bank(draw(150, LATENT)), reference=reference_bank()).safe
    calls = {"plain": lambda: world.sample(noise, prompt("straight"), steps=steps),
             "heard": lambda: world.sample(noise, prompt("straight"), steps=steps, safe=safe, unwanted=prompt("7"))}
    found = {name: milliseconds / steps for name, milliseconds in medians(calls).items()}
    print(f"| tiny model, 32 x 32 | {found['plain']:.1f} | {found['heard']:.1f} | {found['heard'] / found['plain']:.2f} |", flush=True)


def full_size_condition_row(comfyui: str, steps: int = 4, rounds: int = 2) -> None:
    """Runs with and without in turn, so that a machine that slows down slows both."""
    nodes = load_pack(comfyui)
    import comfy.patcher_extension
    import comfy.sample

    model, wrappers = sd15(), comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    prompt, unwanted = ([[draw(1, (77, 768)), {}]] for _ in range(2))
    models, times = {"plain": model.clone(), "heard": patched_with(nodes, model, 515, unwanted=unwanted)}, {"plain": [], "heard": []}
    for name, patched in models.items():
        patched.wrappers[wrappers] = {"timed": [timed(times[name])], **patched.wrappers.get(wrappers, {})}
    noise = draw(3, (4, 64, 64))[:1]
    for _ in range(rounds):
        for patched in models.values():
            comfy.sample.sample(patched, noise, steps, 7.0, "euler", "normal", prompt, prompt, torch.zeros_like(noise), seed=1)
    plain, more = (1e3 * min(times[name]) for name in ("plain", "heard"))  # what else the machine does only adds
    print(f"| SD 1.5, 512 x 512, cfg 7, 515 + 100 | {plain:.0f} | {more:.0f} | {more / plain:.2f} |", flush=True)


def condition_table() -> None:
    print("\n| sampler's step | plain guidance, ms | with an unwanted condition and banks, ms | ratio |\n|---|---|---|---|")
    tiny_condition_row()
    comfyui = os.environ.get("SAFE_DENOISER_COMFYUI")
    if comfyui:
        full_size_condition_row(comfyui)
    else:
        print("SD 1.5 at full size: left out, SAFE_DENOISER_COMFYUI names no ComfyUI")


def guards_table(prompt: str = "a person reading in a cafe by the window, soft morning light, photo") -> None:
    x, denoised, c, u, s = torch.randn(5, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    guard, witness = SafeDenoiser(None, method="sld"), SafeDenoiser(None)
    calls = {label: partial(one.safe, x, denoised, 1.0, unconditional=u, conditional=c, unwanted=s)
             for label, one in (("SLD", guard), ("witness", witness))}
    found = medians(calls, 2.0)
    print(f"\na correction at 4 x 64 x 64: SLD {found['SLD']:.2f} ms, witness {found['witness']:.2f} ms")
    comfyui = os.environ.get("SAFE_DENOISER_COMFYUI")
    if not comfyui:
        return print("Guard Prompt: left out, SAFE_DENOISER_COMFYUI names no ComfyUI")
    nodes = load_pack(comfyui)
    import comfy.sd
    import comfy.sd1_clip

    clip = comfy.sd.CLIP(SimpleNamespace(params={}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer),
                         model_options={"dtype": torch.float32})
    for weight in clip.cond_stage_model.parameters():
        weight.data = torch.randn(weight.shape) / weight.shape[-1] ** 0.5 if weight.ndim > 1 else torch.ones_like(weight)
    encoding = medians({"encoding": lambda: clip.encode_from_tokens(clip.tokenize(prompt))}, 3.0)["encoding"]
    print(f"an encoding: {encoding:.0f} ms\n\n| encodings | a new list | then a harmless prompt | one that is changed |\n|---|---|---|---|")
    for method in ("surgery", "safree"):
        cells = []
        for text in (prompt, prompt, "nude"):
            began = time.perf_counter()
            entries, said = nodes["SafeDenoiserGuardPrompt"].execute(clip, text, method, "nudity", "", 0.01, 1.0).args
            cells.append(f"{1e3 * (time.perf_counter() - began) / encoding:.0f} ({said.partition(':')[0]})")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def sampler_table() -> None:
    print("\n| sampler's step | N + reference | without, ms | the patch, ms | overhead |\n|---|---|---|---|---|")
    tiny_rows()
    comfyui = os.environ.get("SAFE_DENOISER_COMFYUI")
    if comfyui:
        full_size_rows(comfyui, [515, 3000])
    else:
        print("SD 1.5 at full size: left out, SAFE_DENOISER_COMFYUI names no ComfyUI")


def resident() -> dict[str, int]:
    """Resident bytes of this process: all, and those that are its own and not a file's."""
    status = Path("/proc/self/status").read_text()
    return {key: 1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "RssAnon")}


def write_bank(path: Path, n: int, shape: tuple[int, ...], clusters: int = 500) -> None:
    """A bank file in half precision written piece by piece: `clusters` centres of unit variance, items around them at 0.3."""
    item, generator = torch.Size(shape).numel(), torch.Generator().manual_seed(0)
    entry = {"latents": {"dtype": "F16", "shape": [n, *shape], "data_offsets": [0, 2 * n * item]},
             "__metadata__": {"format": "safe_denoiser.bank", "version": "1", "names": "[]", "metadata": "{}"}}
    header = json.dumps(entry).encode()
    header += b" " * (-len(header) % 8)
    noise, step = 0.3 * torch.randn(512 * item, generator=generator), n // clusters
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, n, step):
            count = min(step, n - start)
            centre = torch.randn(item, generator=generator)
            rolled = noise.roll(int(torch.randint(len(noise), (1,), generator=generator)))  # other noise, without drawing it
            file.write((centre + rolled.view(512, item)[:count]).half().numpy().tobytes())


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mass that two sets of weights have in common: a lower bound of the share of the weight that a search found."""
    return float(torch.minimum(a, b).sum(1).min())


def disk_table(n: int = 100_000, shape: tuple[int, ...] = (4, 64, 64), seconds: float = 15.0) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.safetensors"
        write_bank(path, n, shape)
        size, before = path.stat().st_size, resident()
        bank, item = load_bank(path, memory=0), torch.Size(shape).numel()
        print(f"\nA bank of {n:,} x {item:,} in half precision, {size / 1e9:.1f} GB on disk, never in memory, 500 clusters.")
        began = time.perf_counter()
        indexed = index_bank(bank)
        print(f"The index, {len(indexed.clusters.centres)} centres, took {time.perf_counter() - began:.0f} s to build.")
        table = []
        print("\n| the weight is on | scan, ms | search, ms | / scan | mass found |\n|---|---|---|---|---|")
        for name, sigma, t in (("one item", 0.3, 1.0), ("its cluster", 1.0, item / 160), ("everything", 3.0, item / 32)):
            x = bank.latents[n // 2:n // 2 + 1].float() + sigma * draw(1, shape)

            scan, search = (partial(posterior, x, bank.latents, sigma, 1.0, 0.4, t, bank.log_weights, bank.squared_norms, search=search)
                            for search in (None, indexed.clusters))
            r = medians({"scan": scan, "search": search}, seconds)
            r["mass"] = overlap(scan().weights, search().weights)
            table.append(r)
            print(f"| {name} | {r['scan']:.0f} | {r['search']:.0f} | {100 * r['search'] / r['scan']:.1f} % | {100 * r['mass']:.4f} % |",
                  flush=True)
        grown = {key: value - before[key] for key, value in resident().items()}
        print(f"\nResident memory grew by {grown['VmRSS'] / 1e6:.0f} MB, of which the process's own {grown['RssAnon'] / 1e6:.0f} MB.")
        return table


def crossover_table(counts: list[int], shape: tuple[int, ...], seconds: float = 4.0) -> None:
    """Banks in memory, clustered: from how many items on a search pays."""
    print("\n| N in memory | one item: scan, ms | search / scan | everything: scan, ms | search / scan |\n|---|---|---|---|---|")
    for n in counts:
        centres = draw(n // 50, shape).repeat_interleave(50, 0)
        bank = index_bank(Bank(centres.add_(draw(200, shape, 0.3).repeat(n // 200, 1, 1, 1))))
        x, cells = bank.latents[:1] + 0.3 * draw(1, shape), []
        for sigma, t in ((0.3, 1.0), (3.0, 512.0)):
            scan, search = (partial(posterior, x, bank.latents, sigma, 1.0, 0.4, t, bank.log_weights, bank.squared_norms, search=search)
                            for search in (None, bank.clusters))
            r = medians({"scan": scan, "search": search}, seconds)
            cells += [f"{r['scan']:.2f}", f"{r['search'] / r['scan']:.2f}"]
        print(f"| {n:,} | {' | '.join(cells)} |", flush=True)


def prototype_table(counts: list[int], pictures: int = 100) -> None:
    """Unsafe rate in the tiny digit world, as `benchmarks.safety` measures it, against the number of prototypes."""
    from benchmarks.safety import Scale, bank, reference, row

    print("\n| prototypes of 400 negation pictures | unsafe % (95 %) | energy | benign kept % |\n|---|---|---|---|")
    for k in counts:
        r = row(lambda name, negated, k=k: SafeDenoiser(compress_bank(bank(negated, count=400), k), reference=reference()).safe,
                Scale(2, pictures))
        print(f"| {k if k < 400 else 'all 400'} | {r['unsafe']:.1f} ({r['low']:.1f} to {r['high']:.1f}) | {r['energy']:.2f} | "
              f"{r['kept']:.1f} |", flush=True)


def build_table(count: int = 515) -> None:
    """PNG pictures of 512 x 512, resized and encoded by the tiny VAE; at the smaller size it is as quick as a large VAE on a GPU."""
    import numpy as np
    from PIL import Image

    from tiny_digits.world import TinyDigits

    world = TinyDigits()
    print("\n| pictures, encoded at | cold build, s | of it in encode | warm build, s | encoded again |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            smooth = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(smooth).resize((512, 512), Image.Resampling.BICUBIC).save(Path(folder) / f"{i}.png", compress_level=1)
        negation_set = NegationSet.from_folder(folder)
        for size in (64, 256):
            encode, times, calls = Timer(lambda image: world.encode(image.movedim(-1, 0)[None])[0]), [], []
            for _ in range(2):
                began = time.perf_counter()
                encode_bank(negation_set, encode, (size, size), cache=LatentCache(Path(folder) / "cache", "vae"))
                times.append(time.perf_counter() - began)
                calls.append(encode.calls)
            share = 100 * encode.seconds / times[0]
            print(f"| {size} x {size} | {times[0]:.1f} | {share:.1f} % | {times[1]:.2f} | {calls[1] - calls[0]} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="some of the above; none: all")
    parser.add_argument("--quick", action="store_true", help="small sizes; checks that ours is the faster and the smaller")
    options = parser.parse_args()
    if options.quick:
        check(kernel_table([515], [(4, 64, 64)], 1.0))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, single precision")
    shapes = [(4, 64, 64), (16, 128, 128)]
    sections = {"kernel": lambda: kernel_table([15, 515, 3000, 20_000], shapes), "sampler": sampler_table,
                "condition": condition_table, "guards": guards_table, "disk": disk_table,
                "step": lambda: correction_table([15, 515, 3000, 20_000], shapes[0]), "build": build_table,
                "search": lambda: crossover_table([1000, 3000, 10_000, 20_000], shapes[0]),
                "smaller": lambda: prototype_table([5, 10, 25, 50, 100, 200, 400])}
    for name in options.sections or sections:
        sections[name]()


def check(table: list[tuple]) -> None:
    """What must hold on any machine; figures are for the full run."""
    for _, _, _, r in table:
        assert r["published"] > 3 * max(r["one"], r["all"]), "ours must be far faster than the published rule"
        assert r["published %"] > 200 and max(r["one %"], r["all %"]) < 10, "and take no memory to speak of"
    print("ordering as expected")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
