"""What the pack does, in one picture: `python -m tiny_digits.demo [--comfyui PATH]`.

The prompt "straight" asks for ones, fours and sevens; sevens are negated by 150 pictures of them. The same seeds are
sampled with the safe denoiser off and on, and an independent classifier reads all of them. With a ComfyUI, its server
draws the pictures; without, the short sampler of `world.py` does.
"""
import argparse
import io
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dev import ROOT as REPOSITORY
from dev import Server
from safe_denoiser import NegationSet, SafeDenoiser, encode_bank

from .world import LATENT, PROMPTS, ROOT, TinyDigits, prompt, reference_bank

PROMPT, NEGATED = "straight", 7
SEEDS, BATCH = (1, 2), 96
COLUMNS, ROWS, ZOOM = 24, 4, 3


def workflow(seed, strength):
    """The tiny example workflow in ComfyUI's API format."""
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "world": node("SafeDenoiserLoadTinyWorld", world="digits"),
        "latent": node("EmptySD3LatentImage", width=32, height=32, batch_size=BATCH),
        "positive": node("SafeDenoiserClassCondition", class_index=PROMPTS[PROMPT], classes=16),
        "negative": node("SafeDenoiserClassCondition", class_index=-1, classes=16),
        "set": node("SafeDenoiserLoadNegationSet", folder="tiny_sevens", max_images=0, preview="off"),
        "bank": node("SafeDenoiserBuildNegationBank", negation_set=["set", 0], vae=["world", 1], latent=["latent", 0],
                     fit="crop"),
        "reference": node("SafeDenoiserLoadNegationBank", bank="tiny_reference.safetensors"),
        "sample": node("SafeDenoiserKSampler", model=["world", 0], positive=["positive", 0], negative=["negative", 0],
                       latent_image=["latent", 0], negation_bank=["bank", 0], reference_bank=["reference", 0],
                       seed=seed, steps=20, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                       method="safe_denoiser", strength=strength, start=0.0, end=1.0, bank_size="exact"),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["world", 1]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="tiny_digits"),
    }


@contextmanager
def in_comfyui(comfyui):
    """`draw(seed, strength, **sampling)` -> pixels (BATCH, 3, 32, 32) in [0, 1], drawn by a real ComfyUI server; `sampling` changes
    inputs of Safe KSampler.
    """
    with tempfile.TemporaryDirectory() as base, Server(comfyui, base) as server:
        def draw(seed, strength, **sampling):
            graph = workflow(seed, strength)
            graph["sample"]["inputs"] |= sampling
            images = server.run(graph)["outputs"]["save"]["images"]
            pictures = [np.array(Image.open(io.BytesIO(server.view(image))).convert("RGB")) for image in images]
            return torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255

        yield draw


@contextmanager
def standalone(world):
    """The same `draw(seed, strength)` without ComfyUI, from the same noise."""
    pictures = NegationSet.from_folder(ROOT / "models/negation_sets/tiny_sevens")
    bank = encode_bank(pictures, lambda image: world.encode(image.movedim(-1, 0)[None])[0], (32, 32))
    reference = reference_bank()

    def draw(seed, strength):
        noise = torch.randn(BATCH, *LATENT, generator=torch.Generator().manual_seed(seed))
        denoiser = SafeDenoiser(bank, reference=reference, strength=strength)
        return world.decode(world.sample(noise, prompt(PROMPT), safe=denoiser.safe))

    yield draw


def before_after(off, on, unsafe_off, unsafe_on, columns=COLUMNS, rows=ROWS, cell=32 * ZOOM, enlarge=Image.Resampling.NEAREST):
    """Picture of pairs of rows, off above on, one seed per column; what is negated is outlined in red."""
    margin, gap = 70, 24
    height = rows * (2 * cell + gap)
    sheet = Image.new("RGB", (margin + columns * cell, height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(28)
    for line, (label, pixels, unsafe) in enumerate([("off", off, unsafe_off), ("on", on, unsafe_on)]):
        for i in range(rows * columns):
            left, top = margin + i % columns * cell, i // columns * (2 * cell + gap) + line * cell
            picture = Image.fromarray((pixels[i] * 255).round().byte().movedim(0, -1).numpy())
            sheet.paste(picture.resize((cell, cell), enlarge), (left, top))
            if unsafe[i]:
                canvas.rectangle((left, top, left + cell - 1, top + cell - 1), outline="red", width=4)
            if i % columns == 0:
                canvas.text((margin // 2, top + cell // 2), label, fill="black", font=font, anchor="mm")
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="PATH", help="a ComfyUI's folder; without it, no ComfyUI is used")
    parser.add_argument("--picture", metavar="PATH", type=Path, default=REPOSITORY / "demo/before_after.png", help="where the picture goes")
    options = parser.parse_args()
    comfyui, path = options.comfyui, options.picture
    began, world = time.time(), TinyDigits()
    with in_comfyui(comfyui) if comfyui else standalone(world) as draw:
        off, on = (torch.cat([draw(seed, strength) for seed in SEEDS]) for strength in (0.0, 1.0))
    before, after = world.digits(off), world.digits(on)
    unsafe_before, unsafe_after, safe = before == NEGATED, after == NEGATED, before != NEGATED
    print(f'{len(off)} pictures under the prompt "{PROMPT}", {NEGATED} negated, drawn by '
          f'{"a ComfyUI server" if comfyui else "the standalone sampler"} in {time.time() - began:.0f} s')
    print(f"unsafe rate (pictures that the classifier reads as {NEGATED}): "
          f"off {unsafe_before.float().mean():.1%}, on {unsafe_after.float().mean():.1%}")
    became = after[unsafe_before].bincount(minlength=10)
    print(f"the {unsafe_before.sum()} unsafe ones became: "
          + ", ".join(f"{count} × {digit}" for digit, count in enumerate(became.tolist()) if count))
    print(f"the {safe.sum()} others kept their digit: {(after == before)[safe].float().mean():.1%}")
    path.parent.mkdir(exist_ok=True)
    before_after(off, on, unsafe_before, unsafe_after).save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
