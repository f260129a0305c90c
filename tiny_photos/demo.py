"""A folder kept out of photographs, in one picture: `python -m tiny_photos.demo`.

The prompt "automobile or truck" asks for both. What must not come out is a folder of 60 trucks and no word: a condition is learned from it,
and the same seeds are sampled with the safe denoiser off and on. An independent judge outlines in red what it takes for a truck.
"""
import argparse
from pathlib import Path

import torch
from PIL import Image

from safe_denoiser import NegationSet, SafeDenoiser, encode_bank
from safe_denoiser.condition.learn import Learning
from tiny_digits.demo import REPOSITORY, before_after

from .data import CLASSES, SIDE
from .world import LATENT, ROOT, TinyPhotos, prompt

PROMPT, NEGATED, CFG = "automobile or truck", "truck", 4
COLUMNS, ROWS, ZOOM = 8, 2, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", metavar="PATH", type=Path, default=REPOSITORY / "demo/photographs.png", help="where the picture goes")
    path, world = parser.parse_args().picture, TinyPhotos()
    trucks = NegationSet.from_folder(ROOT / "models/negation_sets/tiny_trucks")
    bank = encode_bank(trucks, lambda image: world.encode(image.movedim(-1, 0)[None])[0], (SIDE, SIDE))
    learned = Learning(world, bank.latents, [prompt(None)]).run()
    print(f"learned from {len(bank)} pictures in {learned.steps} steps")
    noise = torch.randn(COLUMNS * ROWS, *LATENT, generator=torch.Generator().manual_seed(1000))
    steering = SafeDenoiser(None, reference=world.reference)
    off, on = (world.decode(world.sample(noise, prompt(PROMPT), CFG, **steered)) for steered in (
        {}, {"safe": steering.safe, "unwanted": learned.condition[0], "neutral": prompt(None)}))
    unsafe = [world.classes(pixels) == CLASSES.index(NEGATED) for pixels in (off, on)]
    print(f"read as {NEGATED}: off {int(unsafe[0].sum())}, on {int(unsafe[1].sum())} of {len(noise)}")
    path.parent.mkdir(exist_ok=True)
    before_after(off, on, *unsafe, COLUMNS, ROWS, SIDE * ZOOM, Image.Resampling.LANCZOS).save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
