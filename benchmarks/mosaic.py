"""A world of 64 x 64 pictures, D = 1,024, where the unwanted thing is a part of the picture.

`python -m benchmarks.mosaic --train` makes its model, in about 20 minutes on one core (weights are not shipped), and
`python -m benchmarks.mosaic` measures. A picture is a mosaic of four digits; to negate 7 is to negate a quadrant that may stand anywhere.
The bank is 300 pictures with exactly one 7 each, nobody has marked where; the reference bank 200 samples of the model, of any digits; the
retain bank 200 pictures without a 7.

    unsafe %    quadrants that the classifier reads as a 7
    others %    quadrants that were no 7 without the safe denoiser and keep their digit, at the same seed
    sure %      classifier confidence over all quadrants, mean
"""
import copy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from safe_denoiser import Bank, SafeDenoiser
from tiny_digits.demo import before_after
from tiny_digits.train import fit, flow_loss
from tiny_digits.world import PROMPTS, SUPERCLASSES, TinyDigits, digits_data, prompt

from .harness import Scale, arguments, closing, mean, record, wilson

FILE = Path(__file__).parent / "models" / "mosaic.safetensors"
LATENT, NEGATED = (16, 8, 8), 7
PROMPTED = ((None, 1.0), ("straight", 2.0), ("round", 2.0))  # prompt and cfg




def mosaic(digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) of four training digits each, digits (N, 4) in reading order."""
    pixels, labels = digits_data()[:2]
    rows = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
    chosen = torch.stack([rows[d][torch.randint(len(rows[d]), (1,), generator=generator)[0]] for d in digits.flatten().tolist()])
    tiles = pixels[chosen].unflatten(0, (-1, 2, 2))  # (N, 2, 2, 3, 32, 32)
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def train(pictures: int, steps: int) -> None:
    """Go on training the tiny model on mosaics: half of any digits under the empty prompt, half under the prompt that all four obey."""
    world, generator = TinyDigits(), torch.Generator().manual_seed(0)
    groups = {**SUPERCLASSES, **{str(digit): (digit,) for digit in range(10)}}
    shares = {name: pictures // 8 if name in SUPERCLASSES else pictures // 80 for name in groups}
    digits = [torch.randint(10, (pictures // 2, 4), generator=generator)]
    prompts = [torch.full((pictures // 2,), -1)]
    for name, members in groups.items():
        digits.append(torch.tensor(members)[torch.randint(len(members), (shares[name], 4), generator=generator)])
        prompts.append(torch.full((shares[name],), PROMPTS[name]))
    latents = torch.cat([world.encode(mosaic(part, generator)) for part in torch.cat(digits).split(500)]).clone()
    prompts = torch.cat(prompts)
    print(f"{len(latents)} latents, mean {latents.mean():.3f}, std {latents.std():.3f}", flush=True)
    model = copy.deepcopy(world.model).requires_grad_(True).train()
    with torch.no_grad():  # each quadrant starts as the tiny model's whole picture, told apart by a little noise
        grid, place = model.pos_embed.unflatten(1, (model.grid, model.grid)), 0.1 * torch.randn(1, 2, 2, model.pos_embed.shape[-1])
        grid[:, 2:6, 2:6] += grid[:, 3:5, 3:5].clone().tile(1, 2, 2, 1) + place.repeat_interleave(2, 1).repeat_interleave(2, 2)

    def loss():
        rows = torch.randint(len(latents), (64,))
        label = torch.zeros(64, 16)
        asked = prompts[rows]
        label[asked >= 0, asked[asked >= 0]] = 1
        return flow_loss(model, latents[rows], label)

    torch.manual_seed(0)
    model = fit(model, loss, steps, 1e-3, average=0.995)
    FILE.parent.mkdir(exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, FILE)


@cache
def world() -> TinyDigits:
    mosaics = TinyDigits()
    mosaics.model.load_state_dict({key: value.float() for key, value in load_file(FILE).items()})
    return mosaics


@torch.inference_mode()
def draw(name: str | None, cfg: float, seed: int, count: int, safe: Callable | None = None) -> torch.Tensor:
    noise = torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(1000 + seed))
    return world().sample(noise, prompt(name), cfg=cfg, safe=safe)


def read(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit and confidence of each quadrant, (4 B,)."""
    tiles = world().decode(latents).unflatten(2, (2, 32)).unflatten(4, (2, 32)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    logits = world().judge(tiles)
    return logits.argmax(1), logits.softmax(1).amax(1)


@cache
def off(name: str | None, cfg: float, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return read(draw(name, cfg, seed, count))


@cache
def banks() -> tuple[Bank, Bank, Bank]:
    """Negation, reference and retain bank."""
    generator, keep = torch.Generator().manual_seed(3), torch.tensor([digit for digit in range(10) if digit != NEGATED])
    digits = keep[torch.randint(9, (500, 4), generator=generator)]
    digits[torch.arange(300), torch.randint(4, (300,), generator=generator)] = NEGATED
    latents = torch.cat([world().encode(part) for part in mosaic(digits, generator).split(100)])
    return Bank(latents[:300]), Bank(draw(None, 1.0, 77, 200)), Bank(latents[300:])


def row(safe: Callable | None, scale: Scale) -> dict[str, dict[str, float]]:
    """One line of the table: figures by prompt."""
    found = {}
    for name, cfg in PROMPTED:
        hits, others, sure = [], [], []
        for seed in range(scale.seeds):
            before, (after, confidence) = off(name, cfg, seed, scale.pictures)[0], read(draw(name, cfg, seed, scale.pictures, safe))
            hits.append((after == NEGATED).float().mean())
            others.append((after == before)[before != NEGATED].float().mean())
            sure.append(confidence.mean())
        n = 4 * scale.seeds * scale.pictures
        found[name or "unconditional"] = {"unsafe": 100 * mean(hits), "interval": wilson(n * mean(hits), n),
                                          "others": 100 * mean(others), "sure": 100 * mean(sure)}
    return found


def methods() -> dict[str, Callable | None]:
    bank, reference, retain = banks()
    few, noise = (Bank(bank.latents[:n]) for n in (50, 15)), Bank(torch.randn(300, *LATENT, generator=torch.Generator().manual_seed(0)))
    settings = {
        "reference bank (default: finds that parts are meant)": dict(reference=reference),
        "retain bank (default)": dict(retain=retain),
        "reference and retain bank": dict(reference=reference, retain=retain),
        "reference bank, strength 1.5": dict(reference=reference, strength=1.5),
        "reference bank, windows of a third": dict(reference=reference, parts=3),
        "reference bank, whole pictures": dict(reference=reference, parts=1),
        "reference bank, whole, prior 0.1, evidence 6": dict(reference=reference, parts=1, prior=0.1, evidence=6.0),
        "retain bank, whole pictures": dict(retain=retain, parts=1),
        "no other bank": {},
        **{f"SPELL, radius {radius:g}": dict(method="spell", radius=radius) for radius in (20.0, 24.0, 28.0)},
        **{f"official, strength {c}": dict(method="official", strength=c) for c in (0.33, 1.0)},
    }
    rows = {"off": None} | {label: SafeDenoiser(bank, **options).safe for label, options in settings.items()}
    rows |= {f"{len(some)} negation pictures, reference bank": SafeDenoiser(some, reference=reference).safe for some in few}
    return rows | {"control: bank of noise": SafeDenoiser(noise, reference=reference).safe}


def picture(path: Path) -> None:
    """The same seeds under "straight" without and with the safe denoiser and a retain bank; what holds a 7 is outlined."""
    bank, _, retain = banks()
    pairs = [draw("straight", 2.0, 0, 96, safe) for safe in (None, SafeDenoiser(bank, retain=retain).safe)]
    shown = [(read(latents)[0].view(-1, 4) == NEGATED).any(1) for latents in pairs]
    before_after(*(world().decode(latents).clamp(0, 1) for latents in pairs), *shown).save(path)


def main():
    parser = arguments(__doc__, per="per prompt and seed, of four quadrants each", file="mosaic.json")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--training-pictures", type=int, default=14_000)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--picture", type=Path, help="draw pictures before and after, and measure nothing")
    options = parser.parse_args()
    scale = Scale(options.seeds, options.pictures)
    if options.train:
        return train(options.training_pictures, options.steps)
    if not FILE.is_file():
        sys.exit("there is no model of mosaics; make it with `python -m benchmarks.mosaic --train`, in about 20 minutes on one core")
    if options.picture:
        return picture(options.picture)
    rows = {}
    print(f"{'':<54}{'unconditional':<31}{'straight':<31}round\n{'':<54}" + "unsafe %        others  sure   " * 3)
    for label, safe in methods().items():
        if options.only in label:
            rows[label] = row(safe, scale)
            cells = (f"{r['unsafe']:5.1f} ({r['interval'][0]:4.1f} to {r['interval'][1]:4.1f}) {r['others']:5.1f} {r['sure']:5.1f}"
                     for r in rows[label].values())
            print(f"{label:<54}" + "  ".join(cells), flush=True)
    record(rows, options.json, bool(options.only))
    closing(scale, options.began, "per prompt and seed")


if __name__ == "__main__":
    main()
