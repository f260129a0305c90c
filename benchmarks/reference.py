"""How many samples does a reference bank need? `python -m benchmarks.reference`, in both tiny worlds, each count with two draws of samples.

Digits: the default with 150 pictures of the negated digit, and the prompt for it as the unwanted condition in their place; columns as in
`digits.py`. Photographs: each class negated under its pair, by its own prompt, at cfg 2; columns as in `learned.py`. 0: no reference bank.
At the end how often distances are found to tell a bank of digits from the reference bank, as they do.
"""
from functools import cache
from types import SimpleNamespace

import torch

from safe_denoiser import Bank, SafeDenoiser
from safe_denoiser.density.separability import tells_apart
from tiny_photos.world import TinyPhotos

from . import digits, learned
from .harness import Scale, arguments, closing, mean
from .safety import heard

COUNTS, DRAWS = (0, 15, 25, 50, 100, 150), (0, 1)


@cache
def samples(world, shape: tuple[int, ...], draw: int) -> torch.Tensor:
    """What the model makes by itself, as Sample Reference Bank samples it."""
    noise = torch.randn(max(COUNTS), *shape, generator=torch.Generator().manual_seed(draw))
    return world.sample(noise, digits.prompt(None), cfg=1.0).clone()


def banks(world, shape):
    """Label and reference bank."""
    for count in COUNTS:
        for draw in DRAWS if count else DRAWS[:1]:
            yield f"reference of {count}, draw {draw}", Bank(samples(world, shape, draw)[:count]) if count else None


def digit_rows(scale):
    for label, reference in banks(digits.world(), digits.LATENT):
        by_condition = SafeDenoiser(None, reference=reference).safe
        yield f"negation bank, {label}", digits.row(digits.denoiser(reference=reference), scale)
        yield f"unwanted, {label}", digits.row(lambda *_, safe=by_condition: safe, scale, conditions=heard)


def photograph_rows(scale):
    place = SimpleNamespace(world=TinyPhotos())
    off = cache(lambda asked, cfg, seed, count: learned.draw(place, asked, "off", "", cfg, seed, count))
    for label, reference in banks(place.world, learned.LATENT):
        place.world.reference = reference
        cases = [learned.case(place, pair, name, 2, scale, ["label"], off) for pair, name in learned.CASES]
        yield label, learned.together(cases)["label"]


def trusted(draws: int = 4) -> dict[int, float]:
    """Of each count the share of draws and digits."""
    return {count: mean(tells_apart(digits.bank(negated), Bank(samples(digits.world(), digits.LATENT, draw)[:count]))
                        for draw in range(draws) for _, negated in digits.CASES) for count in COUNTS[1:]}


def main():
    parser = arguments(__doc__, seeds=2, pictures=60)
    parser.add_argument("--photographs", type=int, default=24, help="pictures per class of photographs, one seed")
    options = parser.parse_args()
    scale = Scale(options.seeds, options.pictures)
    print(digits.HEADER)
    for row in digit_rows(scale):
        print(digits.line(*row), flush=True)
    print(f"\n{learned.HEADER}")
    for row in photograph_rows(Scale(1, options.photographs)):
        print(learned.line(*row), flush=True)
    print(*(f"distances of {count}: trusted in {share:.0%}" for count, share in trusted().items()), sep="\n")
    closing(scale, options.began)


if __name__ == "__main__":
    main()
