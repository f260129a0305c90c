"""Bank files as a stranger may make them: each must load and work, or be refused by one message that says what is wrong.

`python -m benchmarks.fuzz_banks --count 20000`
"""
import argparse
import io
import json
import random
import resource
import struct
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import torch

from safe_denoiser import Bank, SafeDenoiser, compress_bank, index_bank, load_bank, merge_banks, save_bank

ODD = [None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "latents", "\ud800", "1" * 5000, "\n<b>", "2", 1.5, "vae", [], [[]],
       [-1], [1e9] * 3, {}, {"origin": 3}, "[" * 3000,
       "NaN", "[NaN]", '{"origin": "[9, 9, 9]"}', "F64", "I64", "BOOL", "F8_E4M3", [0, 0], [2**40, 2**20], [1], [3, 2, 4, 4]]


def originals(folder: Path) -> list[bytes]:
    """A plain bank, one with weights and names, a compressed one, one with an index, and one in half precision."""
    draw = torch.Generator().manual_seed(0)
    plain = Bank(torch.randn(12, 2, 4, 4, generator=draw), tuple(f"{i}.png" for i in range(12)), {"space": "vae", "size": "32x32"})
    made = [plain, merge_banks([plain, Bank(plain.latents * 2, weights=torch.ones(12), metadata={"space": "vae"})]),
            compress_bank(plain, 3), index_bank(plain, 3), plain.to(dtype=torch.float16)]
    files = []
    for i, bank in enumerate(made):
        save_bank(bank, folder / f"{i}.safetensors")
        files.append((folder / f"{i}.safetensors").read_bytes())
    return files


def _odd(value, draw: random.Random):
    """One place of nested JSON replaced."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.95:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if "__metadata__" in value and draw.random() < 0.6:
            key = "__metadata__"
        changed = value.copy()
        if draw.random() < 0.1:
            changed.pop(key)
        else:
            changed[key] = _odd(value[key], draw)
        return changed
    if isinstance(value, str) and value[:1] in "[{" and draw.random() < 0.7:
        return json.dumps(_odd(json.loads(value), draw))
    return draw.choice(ODD)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut or added anywhere; or, in three of four, the header or the numbers with the file still well-formed."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8:8 + length], data[8 + length:]
    kind = draw.randrange(8)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed) if draw.random() < 0.5 else 8 + length)] = draw.randrange(256)
        return bytes(changed)
    if kind == 1:
        return data[:draw.randrange(len(data))] if draw.random() < 0.5 else data + draw.randbytes(draw.randint(1, 64))
    if kind in (2, 3):  # extreme numbers, of any type
        changed = bytearray(tensors)
        for _ in range(draw.choice([1, 1, 2, 64])):
            place = draw.randrange(len(changed) // 4) * 4
            changed[place:place + 4] = struct.pack("<f", draw.choice([0.0, 1e-38, -1e18, 1e19, 3e38, float("inf"), float("nan")]))
            if draw.random() < 0.5:
                changed[place:place + 4] = draw.randbytes(4)
        return data[:8 + length] + bytes(changed)
    entry = _odd(json.loads(header), draw)
    told = json.dumps(entry).encode("utf-8", "surrogatepass")
    return len(told).to_bytes(8, "little") + told + tensors


def outcome(path: Path, memory: float) -> str:
    """What becomes of a file: "works", or the kind of message that refuses it. Raises where neither holds."""
    try:
        bank = load_bank(path, memory)
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) < 2000, error
        return "refused"
    draw = torch.Generator().manual_seed(1)
    other = Bank(torch.randn(10, *bank.latents.shape[1:], generator=draw).to(bank.latents.dtype))
    if bank.latents.shape[1:].numel() > 10_000 or bank.latents.ndim < 3:
        x = torch.zeros(1, *bank.latents.shape[1:])
    else:
        x = torch.randn(2, *bank.latents.shape[1:], generator=draw)
    for settings in (dict(), dict(reference=other), dict(retain=other), dict(reference=bank), dict(method="spell")):
        negation = bank if settings.get("reference") is not bank else other
        denoiser = SafeDenoiser(negation, **settings)
        for sigma in (10.0, 0.5):
            found, step = denoiser.safe(x, x / 2, sigma)
            assert found.isfinite().all() and step.posterior.isfinite().all(), settings
            assert (step.nearest < len(negation)).all()
    if "origin" in bank.metadata:
        assert torch.tensor(json.loads(bank.metadata["origin"]))[step.nearest.clamp_min(0)] is not None
    save_bank(bank, path)  # over the file that was read
    return "works"


def fuzz(count: int, seed: int, folder: Path) -> Counter:
    """Outcomes of `count` files, of which a third stays on disk while it is used; what neither works nor is refused counts by its error."""
    files, draw, found = originals(folder), random.Random(seed), Counter()
    for i in range(count):
        path = folder / "mutated.safetensors"
        path.write_bytes(mutated(draw.choice(files), draw))
        try:
            found[outcome(path, 0 if i % 3 == 0 else float("inf"))] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found[f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {str(error)[:100]} (file {i})"] += 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        found = fuzz(arguments.count, arguments.seed, Path(folder))
    print(*(f"{number:>6} {what}" for what, number in found.most_common()), sep="\n")
    print(f"memory grew by {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MB")


if __name__ == "__main__":
    main()
