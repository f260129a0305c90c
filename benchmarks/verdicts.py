"""Does the check of an unwanted condition say the right thing? `python -m benchmarks.verdicts --photos FOLDER`

Beside a negation bank the nodes measure by how much `unwanted` helps the model to denoise pictures of the bank, and of the reference bank
(`condition.gain`), and say in words whether the condition means the pictures. Here this is asked often, each time of other classes and
other pictures, where the answer is known.

Worlds
    digits      the tiny digit world, ten classes
    photographs the tiny world of photographs, four classes, pictures that the model has not seen (with --photos: CIFAR-10's folder)
    by heart, generalises   the exact worlds of `photographs.py`, ten classes

Set-ups, and the right answer
    right       the class of the pictures                                           clearly
    swapped     the same with the wires of the two banks exchanged                  no
    unrelated   another class                                                       no
    broad       a condition that means half of all classes or, in the digit world, three of ten      broadly
    half wrong  the class of half of the pictures; the others are of another class  partly

Columns
    right n     of how often it is asked, how often the right answer comes from n pictures of each bank; 16 is when the nodes first say
                something, 64 when they stop
    else        what else is said, and how often
"""
from collections import Counter
from pathlib import Path

import torch

from safe_denoiser.condition.gain import CHECKED, Check, Probe
from tiny_digits.world import SUPERCLASSES
from tiny_photos.data import CLASSES, UNSEEN, cached, enlarged
from tiny_photos.world import PAIRS, TinyPhotos
from tiny_photos.world import prompt as photo_prompt

from . import digits, photographs
from .harness import arguments, record
from .worlds import SHIFT, call

SIZES = (16, 64)
ANSWERS = {"right": "clearly", "swapped": "no", "unrelated": "no", "broad": "broadly", "half wrong": "partly"}


class Digits:
    """Pictures of a class, and conditions that mean some classes."""

    classes = tuple(range(10))

    def __init__(self):
        self.model, self.neutral, self.reference = digits.world(), [digits.prompt(None)], digits.reference().latents

    def pictures(self, digit):
        latents, labels = digits.data()[:2]
        return latents[labels == digit]

    def condition(self, digit):
        return [digits.prompt(str(digit))]

    def broad(self, digit):
        return [digits.prompt(next(name for name, members in SUPERCLASSES.items() if digit in members))]


class Photographs:
    classes = CLASSES

    def __init__(self, folder: Path):
        self.model, self.neutral = TinyPhotos(), [photo_prompt(None)]
        self.reference = self.model.reference.latents
        self.latents = {name: self.model.encode(enlarged(part[:160])) for name, part in zip(CLASSES, cached(folder, "test")[:, :UNSEEN])}

    def pictures(self, name):
        return self.latents[name]

    def condition(self, name):
        return [photo_prompt(name)]

    def broad(self, name):
        return [photo_prompt(" or ".join(next(pair for pair in PAIRS if name in pair)))]


class Exact:
    """A `gain.Model` of an exact world; a condition is a list of experts."""

    def __init__(self, place: photographs.Place):
        self.world, self.photographs, self.model = place.world, place.pictures, self
        self.classes, self.neutral, self.reference = place.pictures.names, place.world.find(None), place.reference.latents.flatten(1)

    def pictures(self, name):
        return self.photographs.unseen[self.photographs.names.index(name)]

    def condition(self, name):
        return self.world.find([name])

    def broad(self, name):
        first = self.classes.index(name)
        return self.world.find([self.classes[(first + i) % len(self.classes)] for i in range(len(self.classes) // 2)])

    def noised(self, y, noise, fraction):
        sigma = SHIFT * (1 - fraction) / (1 + (SHIFT - 1) * (1 - fraction))
        return (1 - sigma[:, None]) * y + sigma[:, None] * noise, sigma

    def predict(self, x, sigma, conditions):
        found = [torch.empty_like(x) for _ in conditions]
        for level in sigma.unique():
            rows = sigma == level
            known = call(self.world, x[rows], float(level))
            for one, condition in zip(found, conditions):
                one[rows] = known.under(condition)
        return found


def asked(world, kind: str, time: int, size: int) -> str:
    """What is said of a set-up; the class and the pictures are others each time."""
    generator = torch.Generator().manual_seed(time)

    def some(latents, count=size):
        return latents[torch.randperm(len(latents), generator=generator)[:count]]

    name, other = (world.classes[(time + i) % len(world.classes)] for i in (0, 1 + time % (len(world.classes) - 1)))
    condition = {"unrelated": world.condition(other), "broad": world.broad(name)}.get(kind, world.condition(name))
    bank, reference = some(world.pictures(name)), some(world.reference)
    if kind == "half wrong":
        bank = torch.cat([bank[:size // 2], some(world.pictures(other), size - size // 2)])
    if kind == "swapped":
        bank, reference = reference, bank
    gains = [Probe(world.model, part, world.neutral, CHECKED, batch=256, seed=time).gain(condition) for part in (bank, reference)]
    return Check(*gains).kind


def main():
    parser = arguments(__doc__, seeds=20, pictures=0, only="only worlds whose name contains this", file="verdicts.json")
    parser.add_argument("--photos", type=Path, help="CIFAR-10's pictures: test/<class>/*.jpg and train/<class>/*.jpg")
    options = parser.parse_args()
    worlds = {"digits": Digits}
    if options.photos:
        exact = photographs.photographs(options.photos / "train")
        worlds |= {"photographs": lambda: Photographs(options.photos), "by heart": lambda: Exact(photographs.by_heart(exact)),
                   "generalises": lambda: Exact(photographs.generalises(exact))}
    found = {}
    for label, make in worlds.items():
        if options.only not in label:
            continue
        world, found[label] = make(), {}
        for kind, right in ANSWERS.items():
            said = {size: Counter(asked(world, kind, time, size) for time in range(options.seeds)) for size in SIZES}
            found[label][kind] = {str(size): dict(counts) for size, counts in said.items()}
            others = "; ".join(f"{size}: {', '.join(f'{n} {one}' for one, n in counts.items() if one != right)}" for size, counts in
                               said.items() if set(counts) != {right})
            print(f"| {label} | {kind} | {right} | {' | '.join(str(said[size][right]) for size in SIZES)} | {others} |", flush=True)
            record(found, options.json, True)


if __name__ == "__main__":
    main()
