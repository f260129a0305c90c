"""A world of 64 x 64 pictures, D = 1,024, where the unwanted thing is a part of the picture: `python -m benchmarks.mosaic` trains it.

A picture is a mosaic of four digits; to negate 7 is to negate a quadrant that may stand anywhere. The model is the tiny one, trained on,
in about 20 minutes on one core; its weights are not shipped. Nothing is measured in this world yet.
"""
import argparse
import copy
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from tiny_digits.train import fit, flow_loss
from tiny_digits.world import PROMPTS, SUPERCLASSES, TinyDigits, digits_data

FILE = Path(__file__).parent / "models" / "mosaic.safetensors"


data = cache(digits_data)


def mosaic(digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) of four training digits each, digits (N, 4) in reading order."""
    pixels, labels = data()[:2]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=14_000)
    parser.add_argument("--steps", type=int, default=4_000)
    options = parser.parse_args()
    train(options.pictures, options.steps)


if __name__ == "__main__":
    main()
