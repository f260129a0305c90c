"""Does it un-memorise? `python -m benchmarks.memorisation`: the tiny model is fine-tuned until it reproduces 20 training pictures,
these are negated, and reproductions are counted, with the quality of what replaces them.

A sample is a reproduction when one of the 20 is nearer than 0.4 times the nearest of all other training pictures (latent L2): the latent
that the model made, and its picture, which is encoded anew and compared with training pictures that went the same way.
"""
import copy
from functools import cache

import torch

from safe_denoiser import Bank, SafeDenoiser
from tiny_digits.networks import MMDiT
from tiny_digits.train import fit, flow_loss, random_prompts
from tiny_digits.world import LATENT, prompt

from .digits import data, energy_distance, look, world
from .harness import Scale, arguments, closing, record

NEAR = 0.4


@cache
def split() -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of the 20 pictures (two of each digit) and of all others."""
    labels = data()[1]
    chosen = torch.cat([(labels == digit).nonzero()[:2, 0] for digit in range(10)])
    return chosen, torch.tensor([row for row in range(len(labels)) if row not in set(chosen.tolist())])


def memorised(steps: int) -> MMDiT:
    """The tiny model after `steps` more steps, nineteen pictures in twenty drawn from the 20."""
    latents, labels = data()[:2]
    chosen, others = split()
    model = copy.deepcopy(world().model).requires_grad_(True).train()

    def loss():
        rows = torch.where(torch.rand(96) < 0.95, chosen[torch.randint(20, (96,))], others[torch.randint(len(others), (96,))])
        return flow_loss(model, latents[rows].clone(), random_prompts(labels[rows]))

    torch.manual_seed(0)
    return fit(model, loss, steps, 5e-4, average=0.99)


def nearer(latents: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """How many times nearer the nearest of the 20 is than that of the other training pictures; 1 / NEAR or more is a reproduction."""
    near, far = (torch.cdist(latents.flatten(1), known[rows].flatten(1)).amin(1) for rows in split())
    return far / near


@cache
def returned() -> torch.Tensor:
    """Latents of the training pictures as the autoencoder gives them back: those themselves are as far from a perfect copy's picture as
    the autoencoder is inexact, and two reproductions in five were missed.
    """
    return world().encode(world().decode(data()[0]))


def measure(safes: list, count: int) -> dict:
    """`count` unconditional samples with each of `safes`: reproductions in percent, by latents, of these with each, and by pictures, energy
    distance to real pictures, classifier confidence, spread.
    """
    others = split()[1]
    noise = torch.randn(len(safes) * count, *LATENT, generator=torch.Generator().manual_seed(5))
    drawn = torch.cat([world().sample(part, prompt(None), cfg=1.0, safe=safe) for part, safe in zip(noise.split(count), safes)])
    pixels = world().decode(drawn)
    found, seen = (nearer(drawn, data()[0]), nearer(world().encode(pixels), returned())), look(pixels)
    by_latents, by_pictures = (100 * (one > 1 / NEAR).float().view(len(safes), -1).mean(1) for one in found)
    return {"reproductions": float(by_latents.mean()), "each": by_latents.tolist(), "pictures": float(by_pictures.mean()),
            "energy": energy_distance(seen.features, data()[2][others]), "sure": 100 * float(seen.sure.mean()),
            "spread": float(torch.pdist(seen.features).mean())}


def rows_of(retain: Bank, own: Bank, share: float) -> dict[str, dict]:
    """The settings of each row; `own` are samples of the model's own, of which `share` are reproductions."""
    return {
        "retain bank of 150 other pictures (default)": dict(retain=retain),
        "the same, T 1": dict(retain=retain, temperature=1.0),
        "reference bank (default)": dict(reference=own),
        "reference bank, prior as measured": dict(reference=own, prior=share),
        "reference bank, prior as measured, T 1": dict(reference=own, prior=share, temperature=1.0),
        "reference and retain bank": dict(reference=own, retain=retain),
        "no other bank (gate)": {},
        "spell": dict(method="spell"),
        "spell, radius 8": dict(method="spell", radius=8.0),
        "official, strength 0.33": dict(method="official", strength=0.33),
        "official, strength 0.9": dict(method="official", strength=0.9),
    }


def main():
    parser = arguments(__doc__, pictures=200, per="per seed", file="memorisation.json")
    parser.add_argument("--steps", type=int, default=1800, help="of fine-tuning")
    options = parser.parse_args()
    none = [None] * options.seeds
    rows = {"before fine-tuning": measure(none, options.pictures)}
    world().model = memorised(options.steps)
    rows["fine-tuned, off"] = measure(none, options.pictures)
    (chosen, others), latents = split(), data()[0]
    share = min(0.95, max(0.05, rows["fine-tuned, off"]["reproductions"] / 100))
    noises = [torch.randn(300, *LATENT, generator=torch.Generator().manual_seed(99 + seed)) for seed in range(options.seeds)]
    own = [Bank(world().sample(noise, prompt(None), cfg=1.0)) for noise in noises]  # one for each seed: much depends on which they are
    found = [rows_of(Bank(latents[others[:150]]), one, share) for one in own]
    rows |= {label: measure([SafeDenoiser(Bank(latents[chosen]), **one[label]).safe for one in found], options.pictures)
             for label in found[0] if options.only in label}
    print(f"{'':<44}reproductions %   of pictures   energy   sure %   spread   by seed")
    for label, r in rows.items():
        print(f"{label:<44}{r['reproductions']:15.1f}{r['pictures']:14.1f}{r['energy']:9.2f}{r['sure']:9.1f}{r['spread']:9.2f}   "
              + " ".join(f"{one:.1f}" for one in r["each"]))
    record(rows, options.json, bool(options.only))
    closing(Scale(options.seeds, options.pictures), options.began, "per seed")


if __name__ == "__main__":
    main()
