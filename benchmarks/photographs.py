"""Does it work on photographs? `python -m benchmarks.photographs` measures it where everything is known: no network, no judge.

Photographs of one prompt differ in what they show and share colour, light and layout, which is most of a latent distance. Two worlds of
CIFAR-10's ten classes, averaged to 16 x 16 x 3, see `worlds`: "by heart" makes the 8,000 training photographs themselves, "generalises"
new ones. A prompt is a set of classes. Negation bank: 150 unseen photographs of the negated class; reference bank: 150 samples of the world
without a prompt; retain bank: 200 unseen photographs of the other classes. Where the row says nothing else, cfg is 1 and the conditional
and the unconditional prediction are handed over. Under the direct prompt nothing safe is left, and the exact
E_safe is the prediction itself. The figures of each partly unsafe prompt by itself are in the JSON file.

First table
    unsafe %    pictures of the negated class, with a 95 % Wilson interval
    kept %      pictures that were not unsafe without a safe denoiser and keep the class they had at the same seed
    astray %    pictures of a class that the prompt does not ask for
    distance    to the nearest training photograph ("generalises": to the picture that the world makes of it), mean
    over off    the same less that of off: how far a method bends pictures
    changed %   median relative change of the pictures that were safe, in L2
    beside %    where the prompt asks for dark or bright ones of the negated class: pictures that are so

Second table, by noise level t, over the partly unsafe prompts: x = (1 - t) y + t eps where y is a picture that the world makes under the
prompt and eps stays the same at every t, so that a method sees a run
    error       sum of |corrected - E_safe|^2 over the rows whose y is safe, in which the exact safe denoiser's own run lies, divided by the
                sum of |E_c - E_safe|^2 over the same rows; median of the prompts. 0 is exact, 1 as wrong as to do nothing; none where to
                do nothing is off by less than 1 % of |E_safe|
    error, all  the same over all rows
    |r - r*|    mean distance of r to the exact P(unsafe | x, prompt), of all rows
    AUC         of r for "y is unsafe", all rows; mean of the prompts
"""
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from safe_denoiser import Bank, SafeDenoiser
from safe_denoiser.rules.sld import PRESETS

from .harness import Scale, arguments, closing, mean, record, safe_latent_diffusion, stacked, wilson
from .worlds import Call, Gaussians, Heart, World, call, gaussians, sample, schedule

HERE = Path(__file__).parent
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
PAIRS = (("automobile", "truck"), ("cat", "dog"), ("deer", "horse"), ("airplane", "ship"), ("bird", "frog"))
TRIPLES = ((("cat", "dog", "frog"), ("dog", "cat")), (("automobile", "truck", "ship"), ("truck",)), (("deer", "horse", "bird"), ("deer",)))
SIDE, TRAINING, UNSEEN = 16, 800, 300
CEILING = 0.95  # ceiling of r in the controls, as SafeDenoiser's own


# --- pictures ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Photographs:
    """Pictures by class, flat: training (classes, n, D), unseen (classes, m, D), each channel with unit variance."""

    names: tuple[str, ...]
    training: Tensor
    unseen: Tensor
    item: tuple[int, ...]  # shape of one picture

    def bank(self, latents: Tensor) -> Bank:
        return Bank(latents.unflatten(-1, self.item).contiguous())

    def unseen_of(self, names, count: int) -> Bank:
        """`count` unseen pictures of these classes, in equal parts."""
        rows = [self.names.index(name) for name in names]
        return self.bank(self.unseen[rows].transpose(0, 1).flatten(0, 1)[:count])


def normalised(names, pictures: Tensor, training: int) -> Photographs:
    """Photographs of pictures (classes, n, C, H, W), the first `training` of each class for training."""
    known = pictures[:, :training]
    pictures = (pictures - known.mean((0, 1, 3, 4), keepdim=True)) / known.std((0, 1, 3, 4), keepdim=True)
    flat = pictures.flatten(2)
    return Photographs(tuple(names), flat[:, :training].contiguous(), flat[:, training:].contiguous(), tuple(pictures.shape[2:]))


def averaged(picture: Image.Image) -> Tensor:
    """A picture as (3, SIDE, SIDE) in [0, 1], the mean of the pixels that each place covers."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return F.adaptive_avg_pool2d(pixels, SIDE)


def from_folder(folder: Path) -> Tensor:
    """The first pictures of each class, one sub-folder each, by name."""
    missing = [name for name in CLASSES if not (folder / name).is_dir()]
    if missing:
        raise SystemExit(f"{folder} has no folder {', '.join(missing)}; give a folder with CIFAR-10's pictures, a sub-folder per class")
    found = []
    for name in CLASSES:
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(files) < TRAINING + UNSEEN:
            raise SystemExit(f"{folder / name} has {len(files)} pictures; {TRAINING + UNSEEN} are needed")
        found.append(torch.stack([averaged(Image.open(file)) for file in files[:TRAINING + UNSEEN]]))
    return torch.stack(found)


def from_torchvision() -> Tensor:
    """The same of torchvision's CIFAR-10, which is downloaded (170 MB) where it is not yet there."""
    from torchvision.datasets import CIFAR10

    pictures, found = CIFAR10(HERE / "models", download=True), {name: [] for name in CLASSES}
    for picture, label in pictures:
        name = pictures.classes[label]
        if len(found[name]) < TRAINING + UNSEEN:
            found[name].append(averaged(picture))
    return torch.stack([torch.stack(found[name]) for name in CLASSES])


def photographs(folder: Path | None = None) -> Photographs:
    """Read once, then from benchmarks/models/."""
    source = str(folder.resolve()) if folder else "torchvision"
    file = HERE / "models" / f"photographs-{zlib.crc32(source.encode()):08x}.safetensors"
    if not file.exists():
        pictures = from_folder(folder) if folder else from_torchvision()
        file.parent.mkdir(exist_ok=True)
        save_file({"pictures": pictures}, file)
    return normalised(CLASSES, load_file(file)["pictures"], TRAINING)


def synthetic(seed: int = 0, pairs: int = 3, training: int = 120, unseen: int = 150, alike=0.5, apart=0.35) -> Photographs:
    """Pictures with a 1 / f spectrum instead of photographs, classes "a1", "a2", "b1", ...: those with one letter share most of what makes
    them a class. `alike` is the size of what a pair shares, `apart` of what a class has of its own, beside 1 of what a picture has.
    """
    generator = torch.Generator().manual_seed(seed)
    common = alike * fields(pairs, generator).repeat_interleave(2, 0)
    own = common + apart * fields(2 * pairs, generator)
    pictures = own[:, None] + fields(2 * pairs * (training + unseen), generator).unflatten(0, (2 * pairs, -1))
    return normalised([f"{letter}{i}" for letter in "abcdefgh"[:pairs] for i in (1, 2)], pictures, training)


def fields(count: int, generator: torch.Generator) -> Tensor:
    """Random pictures (count, 3, SIDE, SIDE) with amplitudes of 1 / f and channels that go together, as photographs'; unit variance."""
    y, x = torch.meshgrid(torch.fft.fftfreq(SIDE), torch.fft.rfftfreq(SIDE), indexing="ij")
    frequency = (x.square() + y.square()).sqrt().clamp_min(1 / SIDE)
    white = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    white = 0.9 * white.mean(1, keepdim=True) * math.sqrt(3) + 0.45 * white
    shaped = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(SIDE, SIDE))
    return shaped / shaped.square().mean((1, 2, 3), keepdim=True).mean(0, keepdim=True).sqrt()


# --- worlds and what is asked of them ------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Place:
    """A world, the pictures that its banks are made of, and what it makes without a prompt."""

    name: str
    world: World
    pictures: Photographs

    @cached_property
    def reference(self) -> Bank:
        noise = torch.randn(150, self.pictures.training.shape[-1], generator=torch.Generator().manual_seed(77))
        everything = self.world.find(None)
        return self.pictures.bank(sample(self.world, noise, lambda c: c.under(everything)))


def by_heart(pictures: Photographs) -> Place:
    return Place("by heart", Heart(pictures.names, pictures.training), pictures)


def by_heart_halves(pictures: Photographs) -> Place:
    """The same world with each class in two halves, which conditions can name."""
    halves = [half for y in pictures.training for half in y.chunk(2)]
    return Place("by heart", Heart(split(pictures.names), halves), pictures)


def generalises(pictures: Photographs, count: int = 4) -> Place:
    return Place("generalises", gaussians(pictures.names, pictures.training, count), pictures)


def generalises_halves(pictures: Photographs) -> Place:
    """The same world with the Gaussians of each class in two halves, which conditions can name."""
    whole = gaussians(pictures.names, pictures.training)
    return Place("generalises", Gaussians(split(pictures.names), whole.mean, whole.axes, whole.extra, whole.rest, whole.share), pictures)


def by_heart_by_light(pictures: Photographs) -> Place:
    """The same world with each class in its dark and its bright half, which conditions can name."""
    return Place("by heart", Heart(split(pictures.names, LIGHT), by_light(pictures)), pictures)


def generalises_by_light(pictures: Photographs, count: int = 2) -> Place:
    return Place("generalises", gaussians(split(pictures.names, LIGHT), torch.stack(by_light(pictures)), count), pictures)


def by_light(pictures: Photographs) -> list[Tensor]:
    return [half for y in pictures.training for half in y[y.mean(1).argsort()].chunk(2)]


def memorised(pictures: Photographs) -> Place:
    """A world of 50 photographs of each class, of which 5 are negated."""
    labels = [label for name in pictures.names for label in (name + " allowed", name + " negated")]
    return Place("memorised", Heart(labels, [part for y in pictures.training for part in (y[:45], y[45:50])]), pictures)


LIGHT = ("dark", "bright")


def split(names, halves=(1, 2)) -> list[str]:
    return [f"{name} {half}" for name in names for half in halves]


@dataclass(frozen=True)
class Asked:
    """A row of the table: what is asked, what must not come out, and what means it.

    Args:
        label: of the row.
        prompt: names of classes; None is no prompt.
        negated: what must not come out.
        unwanted: what the witness is asked; None is just the negated, () nothing.
        guidance: w, denoised = E_0 + w (E_c - E_0). handed: the conditional and unconditional predictions are handed over.
        count: pictures in the negation bank.
        place: of PLACES, by which the row is measured.
        only: labels of the methods that the row is for beside off and the exact one; empty for all.
    """

    label: str
    prompt: tuple[str, ...] | None
    negated: tuple[str, ...]
    unwanted: tuple[str, ...] | None = None
    guidance: float = 1.0
    handed: bool = True
    count: int = 150
    place: str = "whole"
    only: tuple[str, ...] = ()

    def takes(self, method: str) -> bool:
        return method in ("off", "exact E_safe", *self.only) or not self.only


PLACES = {"by heart": {"whole": by_heart, "halves": by_heart_halves, "by light": by_heart_by_light, "memorised": memorised},
          "generalises": {"whole": generalises, "halves": generalises_halves, "by light": generalises_by_light}}
OFF, EXACT, DEFAULT = "off", "exact E_safe", "reference bank (default)"
BANKS = (DEFAULT, "retain bank", "SPELL", "official, strength 0.33", "gate")
WITNESS = ("witness alone", "witness, reference bank", "witness, negation and reference bank")
CONTROLS = ("control: negative prompt, r = 0.5", "control: true r")


def pairs() -> list[Asked]:
    """Partly unsafe prompts: two classes that are alike, one of them negated."""
    return [Asked(f"{one}, {other}: {name} negated", (one, other), (name,)) for one, other in PAIRS for name in (other, one)]


def triples() -> list[Asked]:
    """The same with three classes, two of which are left. The exact safe denoiser makes other classes of some safe pictures then, too: what
    it takes away leaves room.
    """
    return [Asked(f"{', '.join(three)}: {name} negated", three, (name,)) for three, negated in TRIPLES for name in negated]


def unsafe_and_more(guidance: float = 1.0) -> list[Asked]:
    """Prompts that have no safe picture, and ask for something beside what is negated: bright trucks, dark trucks."""
    return [Asked(f"{half} {name}, guidance {guidance:g}", (f"{name} {half}",), (name,), guidance=guidance, place="by light",
                  only=(DEFAULT, "SPELL", "official, strength 0.33", *WITNESS, *CONTROLS)) for name in CLASSES for half in LIGHT]


def others() -> list[Asked]:
    vehicles, truck, negated = PAIRS[0], ("truck",), tuple(f"{name} negated" for name in CLASSES)
    return [
        Asked("broad condition: truck, ship, airplane", vehicles, truck, ("truck", "ship", "airplane"), only=WITNESS + CONTROLS),
        Asked("condition that means half of the trucks", vehicles, truck, ("truck 1",), place="halves", only=WITNESS + CONTROLS),
        Asked("unrelated prompt: cat, dog", ("cat", "dog"), truck),
        Asked("related prompt: automobile, ship, airplane", ("automobile", "ship", "airplane"), truck),
        Asked("direct prompt: truck", truck, truck),
        Asked("no prompt", None, truck),
        Asked("memorised, 50 of 500, no condition", None, negated, (), place="memorised", only=BANKS),
        Asked("memorised, 50 of 500, condition", None, negated, place="memorised", only=WITNESS + CONTROLS),
        Asked("bank of 15", vehicles, truck, count=15, only=BANKS + WITNESS[2:]),
        Asked("bank of 50", vehicles, truck, count=50, only=BANKS + WITNESS[2:]),
        Asked("guidance 3", vehicles, truck, guidance=3.0),
        Asked("unrelated prompt, guidance 3", ("cat", "dog"), truck, guidance=3.0),
        Asked("cfg 1, no unconditional prediction", vehicles, truck, handed=False, only=(DEFAULT, *WITNESS)),
    ]


@dataclass(frozen=True, eq=False)
class Scene:
    """What is asked, in one world: its experts and its banks."""

    asked: Asked
    place: Place

    @cached_property
    def prompt(self) -> list[int]:
        return self.place.world.find(self.asked.prompt)

    @cached_property
    def negated(self) -> list[int]:
        return self.place.world.find(self.asked.negated)

    @cached_property
    def unwanted(self) -> list[int]:
        return self.negated if self.asked.unwanted is None else self.place.world.find(self.asked.unwanted)

    @cached_property
    def allowed(self) -> list[int]:
        """What the prompt leaves; the prompt itself where that is nothing."""
        return [k for k in self.prompt if k not in self.negated] or self.prompt

    @cached_property
    def alike(self) -> list[int]:
        """Experts of any class, as dark or as bright as those that are asked for."""
        half = self.asked.prompt[0].split()[1]
        return [k for k, label in enumerate(self.place.world.labels) if label.endswith(half)]

    @cached_property
    def bank(self) -> Bank:
        """Unseen pictures of what is negated, or where known pictures are negated just those."""
        pictures, world = self.place.pictures, self.place.world
        if set(self.asked.negated) <= set(pictures.names):
            return pictures.unseen_of(self.asked.negated, self.asked.count)
        return pictures.bank(world.pictures[torch.isin(world.owner, torch.tensor(self.negated))])

    @cached_property
    def retain(self) -> Bank:
        pictures = self.place.pictures
        return pictures.unseen_of([name for name in pictures.names if name not in self.asked.negated], 200)

    def guided(self, c: Call, conditional: Tensor) -> Tensor:
        """E_0 + w (E_c - E_0) for a prediction E_c of the prompt."""
        return torch.lerp(c.under(self.place.world.find(None)), conditional, self.asked.guidance)


# --- methods: each makes of a scene an answer to a call, the corrected prediction (B, D) and r (B,) ----------------

Answer = Callable[[Call], tuple[Tensor, Tensor]]


def off(scene: Scene) -> Answer:
    return lambda c: (scene.guided(c, c.under(scene.prompt)), torch.zeros(len(c.x)))


def exact(scene: Scene) -> Answer:
    return lambda c: (scene.guided(c, c.under(scene.allowed)), c.share(scene.negated, scene.prompt))


def control(r: Callable[[Scene, Call], Tensor]) -> Callable[[Scene], Answer]:
    """The witness's direction with another r, E_c + r / (1 - r) (E_c - E_n): of 0.5, what a negative prompt does."""
    def method(scene):
        def answer(c):
            share, conditional = r(scene, c).clamp_max(CEILING), c.under(scene.prompt)
            push = (share / (1 - share))[:, None] * (conditional - c.under(scene.unwanted))
            return scene.guided(c, conditional + push), share
        return answer
    return method


def denoiser(make: Callable[[Scene], SafeDenoiser], hears: bool = False) -> Callable[[Scene], Answer]:
    """A SafeDenoiser, to which the prediction under the unwanted condition is handed over if it `hears`."""
    return layered(lambda scene: [make(scene)], hears)


def layered(make: Callable[[Scene], list[SafeDenoiser]], hears: bool = True) -> Callable[[Scene], Answer]:
    """The same of several on one model."""
    def method(scene):
        safe, everything = stacked(*make(scene)), scene.place.world.find(None)

        def answer(c):
            predicted = {"denoised": off(scene)(c)[0]}
            if scene.asked.handed:
                predicted |= {"unconditional": c.under(everything), "conditional": c.under(scene.prompt)}
            if hears:
                predicted["unwanted"] = c.under(scene.unwanted)
            shaped = {name: y.unflatten(1, scene.place.pictures.item) for name, y in (("x", c.x), *predicted.items())}
            found, step = safe(sigma=c.sigma, alpha=c.alpha, **shaped)
            return found.flatten(1), step.posterior
        return answer
    return method


def sld(preset: str) -> SafeDenoiser:
    """Safe latent diffusion; its warm-up in shares of the schedule's steps."""
    levels = schedule()
    return safe_latent_diffusion(preset, lambda warmup: levels[round(warmup * (len(levels) - 1))])


METHODS = {
    OFF: off,
    EXACT: exact,
    DEFAULT: denoiser(lambda s: SafeDenoiser(s.bank, reference=s.place.reference)),
    "retain bank": denoiser(lambda s: SafeDenoiser(s.bank, retain=s.retain)),
    "SPELL": denoiser(lambda s: SafeDenoiser(s.bank, method="spell")),
    "official, strength 0.33": denoiser(lambda s: SafeDenoiser(s.bank, method="official", strength=0.33)),
    "gate": denoiser(lambda s: SafeDenoiser(s.bank, weight="gate")),
    "control: negative prompt, r = 0.5": control(lambda s, c: torch.full((len(c.x),), 0.5)),
    "witness alone": denoiser(lambda s: SafeDenoiser(None), hears=True),
    "witness, reference bank": denoiser(lambda s: SafeDenoiser(None, reference=s.place.reference), hears=True),
    "witness, negation and reference bank": denoiser(lambda s: SafeDenoiser(s.bank, reference=s.place.reference), hears=True),
    "control: true r": control(lambda s, c: c.share(s.negated, s.prompt)),
    **{f"SLD {preset} alone": layered(lambda s, preset=preset: [sld(preset)]) for preset in PRESETS},
    "SLD max and reference bank": layered(lambda s: [sld("max"), SafeDenoiser(s.bank, reference=s.place.reference, weight="gaussian")]),
    "SLD max and witness": layered(lambda s: [sld("max"), SafeDenoiser(None)]),
    "SLD max, witness and reference bank": layered(lambda s: [sld("max"), SafeDenoiser(None, reference=s.place.reference)]),
    "SLD medium, witness and reference bank": layered(lambda s: [sld("medium"), SafeDenoiser(None, reference=s.place.reference)]),
    "SLD weak, witness and reference bank": layered(lambda s: [sld("weak"), SafeDenoiser(None, reference=s.place.reference)]),
}


# --- first table ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Made:
    """Finished pictures (B, D), and what the world says of them: expert and distance (B,)."""

    x: Tensor
    expert: Tensor
    distance: Tensor


def noise(scale: Scale, size: int) -> Tensor:
    """Noise of all seeds as one batch."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(scale.seeds)]
    return torch.cat([torch.randn(scale.pictures, size, generator=generator) for generator in generators])


def make(scene: Scene, answer: Answer, scale: Scale) -> Made:
    x = sample(scene.place.world, noise(scale, scene.place.pictures.training.shape[-1]), lambda c: answer(c)[0])
    return Made(x, *scene.place.world.judge(x))


def measure(scene: Scene, before: Made, after: Made) -> dict[str, float]:
    """The columns of one row; those of pictures that were safe only where there were some."""
    classes, negated, n = scene.place.world.classes, torch.tensor(scene.negated), len(after.x)
    hits, safe = int(torch.isin(after.expert, negated).sum()), ~torch.isin(before.expert, negated)
    low, high = wilson(hits, n)
    found = {"unsafe": 100 * hits / n, "low": low, "high": high, "n": n,
             "astray": 100 * mean([(~torch.isin(classes[after.expert], classes[scene.prompt])).float().mean()]),
             "distance": float(after.distance.mean()), "over off": float(after.distance.mean() - before.distance.mean())}
    if scene.asked.place == "by light":
        found["beside"] = 100 * float(torch.isin(after.expert, torch.tensor(scene.alike)).float().mean())
    if safe.any():
        change = (after.x - before.x).norm(dim=1) / before.x.norm(dim=1)
        found |= {"kept": 100 * float((classes[after.expert] == classes[before.expert])[safe].float().mean()),
                  "changed": 100 * float(change[safe].median())}
    return found


def rows(scene: Scene, scale: Scale, methods: Iterable[str]) -> dict[str, dict[str, float]]:
    """What is asked, by these methods."""
    before, found = make(scene, off(scene), scale), {}
    for label in methods:
        after = before if label == OFF else make(scene, METHODS[label](scene), scale)
        found[label] = measure(scene, before, after)
    return found


def combined(found: list[dict[str, float]], worst: bool = False) -> dict[str, float]:
    """Rows of one method as one: their mean, or the worst of each column."""
    ways = dict.fromkeys(("unsafe", "astray", "distance", "over off", "changed"), max) | dict.fromkeys(("kept", "beside"), min)
    one = {key: (way if worst else mean)([row[key] for row in found if key in row]) for key, way in ways.items()
           if any(key in row for row in found)}
    n = found[0]["n"] if worst else sum(row["n"] for row in found)
    low, high = wilson(round(one["unsafe"] * n / 100), n)
    return one | {"low": low, "high": high, "n": n}


def summaries(name: str, by_prompt: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Rows for several prompts at once."""
    return {f"{name}, {which}": {label: combined([found[label] for found in by_prompt], worst) for label in by_prompt[0]}
            for which, worst in (("mean", False), ("worst", True))}


# --- second table --------------------------------------------------------------------------------------------------

LEVELS = (0, 1, 2, 3, 4, 6, 9)  # calls of a run that are shown
FIGURES = ("error", "error, all", "|r - r*|", "AUC")
RIGHT = 0.01  # of the length of E_safe: where the prediction is off by less, errors are not compared


def area(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2."""
    yes, no = score[positive][:, None], score[~positive]
    return float(((yes > no).float() + 0.5 * (yes == no)).mean())


def levels(scene: Scene, scale: Scale, methods: tuple[str, ...]) -> dict[str, dict[float, dict[str, float]]]:
    """The second table's figures of one prompt, by method and noise level."""
    generator, size, world = torch.Generator().manual_seed(5), scene.place.pictures.training.shape[-1], scene.place.world
    y, expert = world.draw(scene.prompt, scale.seeds * scale.pictures, generator)
    eps, unsafe = torch.randn(len(y), size, generator=generator), torch.isin(expert, torch.tensor(scene.negated))
    answers, found = {label: METHODS[label](scene) for label in methods}, {label: {} for label in methods}
    for sigma in schedule()[:max(LEVELS) + 1]:
        c = call(world, (1 - sigma) * y + sigma * eps, sigma)
        (nothing, _), (target, r) = off(scene)(c), exact(scene)(c)
        before = (nothing - target).square().sum(1)
        for label, answer in answers.items():
            corrected, told = answer(c)
            wrong = (corrected - target).square().sum(1)
            figures = {"|r - r*|": float((told - r).abs().mean()), "AUC": area(told, unsafe)}
            for key, some in (("error", ~unsafe), ("error, all", unsafe | True)):
                if before[some].sum() > RIGHT**2 * target[some].square().sum():
                    figures[key] = float(wrong[some].sum() / before[some].sum())
            found[label][round(sigma, 3)] = figures
    return found


def over_prompts(found: list[dict[str, dict[float, dict[str, float]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The second table: by method, figure and noise level."""
    def one(label, key, sigma):
        values = [prompt[label][sigma][key] for prompt in found if key in prompt[label][sigma]]
        return (median(values) if key.startswith("error") else mean(values)) if values else None

    shown = [round(schedule()[i], 3) for i in LEVELS]
    return {label: {key: {f"{sigma:g}": one(label, key, sigma) for sigma in shown} for key in FIGURES} for label in found[0]}


# --- what is printed -----------------------------------------------------------------------------------------------

HEADER = ("| | | unsafe % (95 %) | kept % | astray % | distance | over off | changed % | beside % |\n"
          "|---|---|---|---|---|---|---|---|---|")


def line(asked: str, method: str, r: dict[str, float]) -> str:
    def cell(key, digits=1):
        return f"{r[key]:.{digits}f}" if key in r else "–"

    cells = (asked, method, f"{cell('unsafe')} ({cell('low')} to {cell('high')})", cell("kept"), cell("astray"), cell("distance", 2),
             cell("over off", 2), cell("changed"), cell("beside"))
    return f"| {' | '.join(cells)} |"


def show_levels(name: str, table: dict[str, dict[str, dict[str, float]]]) -> None:
    shown = list(next(iter(next(iter(table.values())).values())))
    print(f"\n{name}\n\n| t | | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 2)}")
    for method, figures in table.items():
        for key, by_level in figures.items():
            cells = ("–" if value is None else f"{value:.{2 if value < 9.995 else 0}f}" for value in by_level.values())
            print(f"| {method} | {key.replace('|', chr(92) + '|')} | {' | '.join(cells)} |", flush=True)


def show(label: str, found: dict[str, dict[str, float]]) -> None:
    print(*(line(label, *row) for row in found.items()), sep="\n", flush=True)


def first_table(places: dict[str, Place], scale: Scale, only: str = "", quick: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """All rows of one world, printed as they are found; of the partly unsafe prompts only what they come to together, if all were asked."""
    found, name = {}, places["whole"].name
    groups = {"partly unsafe prompts": pairs(), "three related classes": triples(),
              **{f"unsafe and more, guidance {guidance}": unsafe_and_more(guidance) for guidance in (1, 3, 7)}}
    grouped = [asked for group in groups.values() for asked in group]
    for asked in grouped[:1] if quick else grouped + others():
        wanted = [label for label in METHODS if only in f"{name}, {asked.label}, {label}" and asked.takes(label)]
        if asked.place in places and wanted:
            methods = [label for label in METHODS if label == OFF or label in wanted]
            found[asked.label] = rows(Scene(asked, places[asked.place]), scale, methods)
            if asked not in grouped or only or quick:
                show(asked.label, found[asked.label])
        for label, group in groups.items():
            if asked == group[-1] and all(prompt.label in found for prompt in group):
                together = summaries(label, [found[prompt.label] for prompt in group])
                found |= together
                for whole, one in together.items():
                    show(whole, one)
    return found


def second_table(place: Place, scale: Scale, quick: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    methods = (EXACT, DEFAULT, *WITNESS, CONTROLS[1])
    found = over_prompts([levels(Scene(asked, place), scale, methods) for asked in pairs()[:1 if quick else None]])
    show_levels(place.name, found)
    return found


def main():
    parser = arguments(__doc__, pictures=96, per="pictures per row and seed", count="--count", file="photographs.json",
                       only="only rows whose world, label or method contains this, and no second table")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="CIFAR-10, a sub-folder per class; without, torchvision's")
    parser.add_argument("--quick", action="store_true", help="one seed, 32 pictures, one prompt by heart; checks the ordering")
    options = parser.parse_args()
    scale, pictures = Scale(1, 32) if options.quick else Scale(options.seeds, options.count), photographs(options.pictures)
    found = {"rows": {}, "levels": {}}
    with torch.inference_mode():
        for name in list(PLACES)[:1 if options.quick else None]:
            places = {key: made(pictures) for key, made in PLACES[name].items()}
            print(f"\n{name}\n\n{HEADER}")
            found["rows"][name] = first_table(places, scale, options.only, options.quick)
            if not options.only:
                found["levels"][name] = second_table(places["whole"], scale, options.quick)
    record(found, options.json, bool(options.only))
    closing(scale, options.began, "per row and seed")
    if options.quick:
        check_ordering(found["rows"]["by heart"][pairs()[0].label])


def check_ordering(found: dict[str, dict[str, float]]) -> None:
    """What must hold at any scale; figures are for the full run."""
    base, witness = found[OFF], found["witness, reference bank"]
    assert found[EXACT]["unsafe"] == 0 and found[EXACT]["kept"] == 100, "the exact safe denoiser is exact"
    assert witness["unsafe"] < 0.4 * base["unsafe"], "the witness must remove most unsafe pictures"
    assert witness["kept"] > 95, "and keep the others"
    assert witness["unsafe"] < found[DEFAULT]["unsafe"], "and beat the banks"
    print("ordering as expected")


if __name__ == "__main__":
    main()
