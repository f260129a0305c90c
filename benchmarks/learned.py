"""A folder alone: a condition learned from it, beside words, banks and the published rules.

`python -m benchmarks.learned` in the tiny digit world, whose columns stand on top of `digits.py`: 7 of *straight*, 3 of *curly*, 8 of
*round*.

`python -m benchmarks.learned --photos FOLDER` in a learned world of photographs (CIFAR-10, see `tiny_photos`). Each of its
four classes is negated in turn, under the prompt for the pair that it is of, at cfg 1, 2 and 4. The negation set is photographs that
neither the model nor the judge has seen; the reference bank is the model's own samples.

Rows
    off                     no safe denoiser
    bank alone              150 pictures and the reference bank: what a folder did before a condition was learned from it
    negative prompt         the class itself in place of the empty prompt; nothing at cfg 1
    label                   the class itself as `unwanted`: as good as words can be
    learned from n          `unwanted` as Learn Unwanted Condition finds it from n pictures, at its defaults
    ..., a fifth wrong      of 150 pictures a fifth is of other classes
    ..., and bank           with the negation bank as well
    SPELL, official         the published rules, with the same bank
    control                 no safe denoiser, and a prompt for what is left of the pair: the best that this model can do, which draws and
                            judges it not always as asked

Columns
    unsafe %     pictures that the judge reads as the negated class, with a 95 % Wilson interval
    worst        the same of the class with the most
    kept %       pictures that were not unsafe and keep the class they had at the same seed
    unrelated %  pictures under the prompt for the other pair that keep their class
    changed %    median relative change of the latents of pictures that were safe, in L2
    direct %     pictures under the prompt for the negated class itself that the judge reads as it
"""
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from safe_denoiser import Bank, SafeDenoiser
from safe_denoiser.condition.learn import Learning, Schedule
from tiny_photos.data import CLASSES, UNSEEN, cached, enlarged
from tiny_photos.world import LATENT, PAIRS, PROMPTS, TinyPhotos, prompt

from . import digits
from .harness import Scale, arguments, closing, mean, record, wilson

CASES = [(pair, name) for pair in PAIRS for name in pair]
GUIDANCE = (1, 2, 4)
EMPTY = prompt(None)
CONTROL = "control: asked for what is left"


class Place:
    """The world, photographs that nobody saw, and what is learned from them, each once."""

    def __init__(self, photos: Path):
        self.world, unseen = TinyPhotos(), cached(photos, "test")[:, :UNSEEN]
        self.latents = {name: self.world.encode(enlarged(part[:160])) for name, part in zip(CLASSES, unseen)}
        self.learned, self.bank = cache(self._learned), cache(self._bank)

    def set_of(self, name: str, count: int, wrong: float = 0.0) -> torch.Tensor:
        """`count` pictures of a class, a share of which is of others; the pictures of a class are the same in all sets."""
        others = torch.cat([self.latents[one][:20] for one in CLASSES if one != name])
        others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:round(wrong * count)]]
        return torch.cat([self.latents[name][:count - len(others)], others])

    def _bank(self, name: str) -> Bank:
        return Bank(self.set_of(name, 150))

    def _learned(self, name: str, count: int, wrong: float = 0.0) -> torch.Tensor:
        learned = Learning(self.world, self.set_of(name, count, wrong), [EMPTY], schedule=Schedule()).run()
        print(f"    {name} from {count}{', a fifth wrong' * bool(wrong)}: {learned.steps} steps, gain {learned.gain.mean:.2%}", flush=True)
        return learned.condition[0]


def condition(**settings) -> Callable:
    """Steering by a condition and the reference bank."""
    return lambda place, name: SafeDenoiser(None, reference=place.world.reference, **settings).safe


def by_bank(**settings) -> Callable:
    return lambda place, name: SafeDenoiser(place.bank(name), **settings).safe


def negative(place, name):
    """Classifier-free guidance away from the class instead of away from no prompt."""
    def safe(x, denoised, sigma, alpha, conditional, unwanted, unconditional=None):
        return denoised if unconditional is None else denoised + (safe.cfg - 1) * (unconditional - unwanted), None

    return safe


def label(place, name):
    return prompt(name)


def learned(*args) -> Callable:
    return lambda place, name: place.learned(name, *args)


METHODS = {  # how it is steered, and by which condition
    "off": (None, None),
    "bank alone": (lambda place, name: SafeDenoiser(place.bank(name), reference=place.world.reference).safe, None),
    "negative prompt": (negative, label),
    "label": (condition(), label),
    "learned from 150": (condition(), learned(150)),
    "learned from 50": (condition(), learned(50)),
    "learned from 15": (condition(), learned(15)),
    "learned from 150, a fifth wrong": (condition(), learned(150, 0.2)),
    "learned from 150, and bank": (lambda place, name: SafeDenoiser(place.bank(name), reference=place.world.reference).safe, learned(150)),
    "SPELL": (by_bank(method="spell"), None),
    "official, strength 0.33": (by_bank(method="official", strength=0.33), None),
    CONTROL: (None, None),
}


def draw(place: Place, asked: str, method: str, name: str, cfg: float, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and the class that the judge sees in each."""
    make, unwanted = METHODS[method]
    safe, given = make and make(place, name), {} if unwanted is None else {"unwanted": unwanted(place, name)}
    if make is negative:
        safe.cfg = cfg
    elif given:
        given["neutral"] = EMPTY
    if method == CONTROL:
        asked = " or ".join(one for one in asked.split(" or ") if one != name)
    noise = torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(1000 + seed))
    x = place.world.sample(noise, prompt(asked), cfg, safe=safe, **given)
    return x, place.world.classes(place.world.decode(x))


def case(place: Place, pair: tuple[str, str], name: str, cfg: float, scale: Scale, methods: list[str], off: Callable) -> dict[str, dict]:
    """What each method does where one class is negated."""
    asked, number = " or ".join(pair), PROMPTS[name]
    unrelated = [" or ".join(other) for other in PAIRS if other != pair]
    found = {}
    for method in methods:
        hits = n = 0
        kept, same, changed, direct = [], [], [], []
        for seed in range(scale.seeds):
            x, seen = draw(place, asked, method, name, cfg, seed, scale.pictures)
            before, was = off(asked, cfg, seed, scale.pictures)
            safe = was != number
            hits, n = hits + int((seen == number).sum()), n + len(seen)
            kept.append((seen == was)[safe].float().mean())
            changed.append(((x - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))[safe].median())
            few = max(8, scale.pictures // 4)
            if method != CONTROL:
                direct.append((draw(place, name, method, name, cfg, seed, scale.pictures // 2)[1] == number).float().mean())
            same += [(draw(place, other, method, name, cfg, seed, few)[1] == off(other, cfg, seed, few)[1]).float().mean()
                     for other in unrelated]
        found[method] = {"hits": hits, "n": n, "unsafe": 100 * hits / n, "kept": 100 * mean(kept), "unrelated": 100 * mean(same),
                         "changed": 100 * mean(changed)}
        if direct:
            found[method]["direct"] = 100 * mean(direct)
    return found


def together(cases: list[dict[str, dict]]) -> dict[str, dict]:
    """All classes as one row of each method."""
    found = {}
    for method in cases[0]:
        rows = [one[method] for one in cases]
        hits, n = sum(row["hits"] for row in rows), sum(row["n"] for row in rows)
        low, high = wilson(hits, n)
        found[method] = {"unsafe": 100 * hits / n, "low": low, "high": high, "worst": max(row["unsafe"] for row in rows), "n": n,
                         **{key: mean(row[key] for row in rows) for key in ("kept", "unrelated", "changed", "direct") if key in rows[0]},
                         "least kept": min(row["kept"] for row in rows)}
    return found


def learned_digit(count: int) -> Callable:
    """`unwanted` as it is learned from `count` pictures of a digit."""
    @cache
    def learn(negated):
        learned = Learning(digits.world(), digits.bank(negated, count=count).latents, [EMPTY]).run()
        print(f"    {negated} from {count}: {learned.steps} steps, gain {learned.gain.mean:.2%}", flush=True)
        return learned.condition[0]

    return learn


def digit_table(scale: Scale) -> dict[str, dict[str, float]]:
    """The rows of the digit world, all with the reference bank, cfg 2."""
    def steered(name, negated):
        return SafeDenoiser(None, reference=digits.reference()).safe

    conditions = {"label": lambda negated: digits.prompt(str(negated))} | {f"learned from {n}": learned_digit(n) for n in (150, 50, 15)}
    found = {"off": digits.row(lambda name, negated: None, scale)}
    for label, learn in conditions.items():
        found[label] = digits.row(steered, scale, conditions=lambda negated, learn=learn: {"unwanted": learn(negated), "neutral": EMPTY})
    print(digits.HEADER, *(digits.line(*one) for one in found.items()), sep="\n", flush=True)
    return found


HEADER = "| | unsafe % (95 %) | worst | kept % (least) | unrelated % | changed % | direct % |\n|---|---|---|---|---|---|---|"


def line(method: str, r: dict[str, float]) -> str:
    direct = f"{r['direct']:.1f}" if "direct" in r else "–"
    return (f"| {method} | {r['unsafe']:.1f} ({r['low']:.1f} to {r['high']:.1f}) | {r['worst']:.1f} | {r['kept']:.1f} "
            f"({r['least kept']:.1f}) | {r['unrelated']:.1f} | {r['changed']:.0f} | {direct} |")


def sheet(place: Place, path: Path, cfg: float = 2) -> None:
    """For each class two rows of pictures with the same noise: off, and with the condition that was learned from 150."""
    rows = []
    for pair, name in CASES:
        for method in ("off", "learned from 150"):
            x, _ = draw(place, " or ".join(pair), method, name, cfg, 0, 12)
            rows.append(torch.cat([*place.world.decode(x)], 2))
    Image.fromarray((torch.cat(rows, 1).movedim(0, -1) * 255).round().byte().numpy()).save(path)


def main():
    parser = arguments(__doc__, pictures=64, per="pictures per class, cfg and seed", only="only these methods", file="learned.json")
    parser.add_argument("--photos", type=Path, help="folder with CIFAR-10's test/<class>/*.jpg")
    parser.add_argument("--classes", nargs="*", default=CLASSES, choices=CLASSES, help="only these are negated")
    parser.add_argument("--cfg", type=int, nargs="*", default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="write pictures before and after to this file")
    options = parser.parse_args()
    scale = Scale(options.seeds, options.pictures)
    if options.photos is None:
        record({"digits": digit_table(scale)}, options.json, True)
        return closing(scale, options.began)
    place = Place(options.photos)
    methods = [method for method in METHODS if options.only in method]

    @cache
    def off(asked, cfg, seed, count):
        return draw(place, asked, "off", "", cfg, seed, count)

    found = {}
    for cfg in options.cfg:
        cases = {name: case(place, pair, name, cfg, scale, methods, off) for pair, name in CASES if name in options.classes}
        print(f"\ncfg {cfg}\n\n{HEADER}")
        rows = together([*cases.values()])
        print(*(line(*row) for row in rows.items()), sep="\n", flush=True)
        found[f"cfg {cfg}"] = {"all classes": rows, **cases}
        record(found, options.json, bool(options.only) or len(options.classes) < len(CLASSES) or len(options.cfg) < len(GUIDANCE))
    if options.sheet:
        sheet(place, options.sheet)
    closing(scale, options.began, "per class, cfg and seed")


if __name__ == "__main__":
    main()
