"""The tiny world of photographs without ComfyUI: prompts, files and the judge. Networks and sampler are those of the digit world.

>>> world = TinyPhotos()                                                  # doctest: +SKIP
>>> latents = world.sample(noise, prompt("automobile or truck"))          # doctest: +SKIP
>>> [CLASSES[i] for i in world.classes(world.decode(latents))]            # doctest: +SKIP
['truck', 'automobile', ...]
"""
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tiny_digits.world
from tiny_digits.networks import TAESD, MMDiT, conv
from tiny_digits.world import World, reference_bank

from .data import CLASSES

ROOT = Path(__file__).parent


class Judge(nn.Module):
    """Classifier of (B, 3, H, W) pixels, which it sees at 32 x 32; `features` (B, 128) is the space in which distributions are compared."""

    def __init__(self, widths=(32, 64, 128)):
        super().__init__()

        def stage(i, o):
            return nn.Sequential(conv(i, o, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                                 conv(o, o, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(*(stage(i, o) for i, o in zip((3, *widths), widths)), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                  nn.Linear(4 * widths[-1], 128), nn.ReLU())
        self.head = nn.Linear(128, len(CLASSES))

    def features(self, pixels):
        return self.body(F.interpolate(pixels, (32, 32), mode="area") * 4 - 2)

    def forward(self, pixels):
        return self.head(self.features(pixels))


class Transformer(MMDiT):
    """The digit world's, with a token for each place of the latents: photographs have more to say at each than digits."""

    def __init__(self):
        super().__init__(patch=1)


FILES = {
    Transformer: ROOT / "models/diffusion_models/tiny_photos.safetensors",
    TAESD: ROOT / "models/vae/tiny_photos_vae.safetensors",
    Judge: ROOT / "judge/classifier.safetensors",
}
PAIRS = (("automobile", "truck"), ("airplane", "ship"))
PROMPTS = {name: i for i, name in enumerate([*CLASSES, *map(" or ".join, PAIRS)])}
GROUPS = torch.tensor([next(PROMPTS[" or ".join(pair)] for pair in PAIRS if name in pair) for name in CLASSES])
REFERENCE = ROOT / "models/negation_banks/tiny_photos_reference.safetensors"
LATENT = (16, 8, 8)
prompt = partial(tiny_digits.world.prompt, prompts=PROMPTS)


class TinyPhotos(World):
    """The trained world on the CPU: `sample`, `encode`, `decode`, `classes`, `features`."""

    def __init__(self):
        super().__init__(FILES)
        self.reference = reference_bank(REFERENCE)

    @torch.inference_mode()
    def classes(self, pixels):
        """Index into CLASSES (B,) of what the judge sees."""
        return torch.cat([self.judge(part).argmax(-1) for part in pixels.split(256)])
