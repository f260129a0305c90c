"""Train the tiny digit world: `python -m tiny_digits.train` (about 20 minutes on two cores).

Writes the weights that `world.py` loads, the negation set (150 sevens), the retain set (150 ones and fours), the
reference bank (100 of the model's own samples under the empty prompt) and a CLIP that knows the digits by their names.
"""
import argparse
import copy
import json
import time

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from safe_denoiser import Bank, save_bank

from .networks import LATENT_SCALE, LATENT_SHIFT, TAESD, Classifier, MMDiT, ResBlock
from .world import CLIP, FILES, LATENT, PROMPTS, REFERENCE, ROOT, SUPERCLASSES, TinyDigits, digits_data, load, prompt

SETS = ROOT / "models/negation_sets"
PARTS = ["classifier", "vae", "model", "sets", "clip", "report"]
WORDS = "zero one two three four five six seven eight nine".split()
GROUPS = torch.tensor([next(PROMPTS[name] for name, members in SUPERCLASSES.items() if digit in members) for digit in range(10)])


def fit(model, loss, steps, rate, average=None, save=None):
    """AdamW with a one-cycle schedule on `loss()`; with `average`, the exponential moving average of the weights. `save(mean)` is called
    each 1,000 steps of a long training.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    mean, began = copy.deepcopy(model), time.time()
    for step in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if average:
            for slow, fast in zip(mean.parameters(), model.parameters()):
                slow.data.lerp_(fast.data, 1 - min(average, (step + 1) / (step + 10)))
        if save and step and step % 1000 == 0:
            save(mean)
        if step % 100 == 0 or step == steps - 1:
            print(f"{type(model).__name__} step {step} loss {value.item():.4f} {time.time() - began:.0f} s", flush=True)
    return (mean if average else model).eval().requires_grad_(False)


def warp(images, angle, scale, shift):
    """Each picture under its own random rotation, scaling and shift, of these standard deviations."""
    n = len(images)
    a, s = angle * torch.randn(n), 1 + scale * torch.randn(n)
    theta = torch.stack([torch.stack([a.cos() * s, -a.sin(), shift * torch.randn(n)], -1),
                         torch.stack([a.sin(), a.cos() * s, shift * torch.randn(n)], -1)], 1)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)


def train_classifier(pixels, labels, steps):
    """Cross-entropy on digits under small random affine maps."""
    model = Classifier()

    def loss():
        rows = torch.randint(len(pixels), (128,))
        return F.cross_entropy(model(warp(pixels[rows], 0.25, 0.1, 0.1)), labels[rows], label_smoothing=0.05)

    return fit(model, loss, steps, 3e-3)


def train_vae(pixels, steps):
    """MSE + 1e-3 z^2 with latent noise 0.1: random 16 x 16 crops first, whole images at the end."""
    model = TAESD()
    for layer in model.modules():  # with torch's default init, the signal fades over 23 layers and training stalls
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, ResBlock):
            layer.conv[-1].weight.data.mul_(0.2)

    def loss(images):
        z = model.taesd_encoder(images)
        return F.mse_loss(model.taesd_decoder(z + 0.1 * torch.randn_like(z)), images) + 1e-3 * z.square().mean()

    def crops():
        top, left = torch.randint(17, (2,)).tolist()
        return loss(pixels[torch.randint(len(pixels), (24,)), :, top:top + 16, left:left + 16])

    fit(model, crops, steps, 1e-3)
    model.requires_grad_(True).train()
    fit(model, lambda: loss(pixels[torch.randint(len(pixels), (8,))]), steps // 4, 3e-4)
    with torch.no_grad():  # fold mean and spread into the file, so that SD3's process_in gives unit variance
        z = torch.cat([model.taesd_encoder(part) for part in pixels[:1000].split(250)])
        model.vae_scale.fill_(LATENT_SCALE * z.std())
        model.vae_shift.fill_(LATENT_SHIFT - z.mean() / (LATENT_SCALE * z.std()))
    return model


def random_prompts(labels, groups=GROUPS):
    """45 % the group that a class is of, 15 % empty, the rest the class itself; one-hot (B, 16). groups: prompt of each class's group."""
    u = torch.rand(len(labels))
    index = torch.where(u < 0.45, groups[labels], labels)
    return F.one_hot(index, 16).float() * (u < 0.85)[:, None]


def flow_loss(model, x0, prompts, centre=0.3):
    """Flow matching: v = noise - x0 at a logit-normal sigma around sigmoid(centre); prompts one-hot (B, 16)."""
    noise, sigma = torch.randn_like(x0), torch.sigmoid(1.2 * torch.randn(len(x0)) + centre)
    s = sigma.view(-1, 1, 1, 1)
    return F.mse_loss(model((1 - s) * x0 + s * noise, sigma, prompts), noise - x0)


def train_model(latents, labels, steps):
    model = MMDiT()

    def loss():
        rows = torch.randint(len(latents), (96,))
        return flow_loss(model, latents[rows], random_prompts(labels[rows]))

    return fit(model, loss, steps, 1.5e-3, average=0.995)


def captions():
    """What may be said of a digit: texts (T,), of which digits each is true (T, 10), and how often it is said (T,)."""
    said = [(template.format(name), {digit}, 0.6 / 12) for digit, word in enumerate(WORDS) for name in (word, str(digit))
            for template in ("the digit {}", "a {}", "{}", "the number {}", "a picture of a {}", "a handwritten {}")]
    said += [(template.format(name), set(members), 0.25 / 3) for name, members in SUPERCLASSES.items()
             for template in ("{} digits", "a {} digit", "a picture of a {} digit")]
    said += [(text, set(range(10)), 0.15 / 5) for text in ("a digit", "a picture of a digit", "digits", "a number", "a picture")]
    texts, members, often = zip(*said)
    return texts, torch.tensor([[digit in true for digit in range(10)] for true in members]), torch.tensor(often)


def caption_loss(pictures, texts, scale, said):
    """CLIP's loss (arXiv:2103.00020, Fig. 3) where pictures share captions: equal captions of a batch are one. said: (B,) rows of texts."""
    logits, counts = scale * pictures @ texts.T, said.bincount(minlength=len(texts)).float()
    by_picture = F.cross_entropy(logits + counts.log(), said)
    by_text = -(logits.log_softmax(0)[torch.arange(len(said)), said]).mean()
    return (by_picture + by_text) / 2


def clip_pictures(pixels, labels, count=300):
    """What the CLIP sees, and the digits: the training pictures twice, through the autoencoder without and with noise on their latents,
    and `count` samples of the model for each digit, whose caption is their prompt.
    """
    world, generator = TinyDigits(), torch.Generator().manual_seed(7)
    z = world.encode(pixels)
    asked = torch.arange(10).repeat_interleave(count)
    own = torch.cat([world.sample(torch.randn(count, *LATENT, generator=generator), prompt(str(digit))) for digit in range(10)])
    noisy = z + 0.25 * z.std() * torch.randn(z.shape, generator=generator)
    images = torch.cat([pixels, pixels, *map(world.decode, (z, noisy, own))]).clone()
    return images, torch.cat([labels.repeat(4), asked])


def train_clip(pixels, labels, steps):
    """SLIP (arXiv:2112.12750): captions, and each picture beside a slightly changed one against all others, so that twins are found too."""
    import open_clip

    model = open_clip.CLIP(**json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    texts, true, often = captions()
    tokens = open_clip.SimpleTokenizer(context_length=model.context_length)(list(texts))
    images, digits = clip_pictures(pixels, labels)

    def embed(pictures):
        sized = F.interpolate(pictures, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(model.encode_image((sized - mean) / std), dim=1)

    def loss(batch=96):
        rows = torch.randint(len(images), (batch,))
        first = warp(images[rows], 0.2, 0.08, 0.08)
        second = (warp(first, 0.1, 0.08, 0.03) + 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(first)).clamp(0, 1)
        kinds, said = torch.multinomial(often * true.T[digits[rows]], 1)[:, 0].unique(return_inverse=True)
        seen, words = embed(torch.cat([first, second])), F.normalize(model.encode_text(tokens[kinds]), dim=1)
        ones, others = seen.chunk(2)
        alike, own = ones @ others.T / 0.07, torch.arange(batch)
        twins = (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2
        return caption_loss(seen, words, model.logit_scale.exp().clamp(max=100), said.repeat(2)) + 0.3 * twins

    model = fit(model, loss, steps, 3e-3)
    unsaid = torch.ones(len(model.token_embedding.weight), dtype=torch.bool).index_fill(0, tokens.unique(), False)
    model.token_embedding.weight[unsaid] = 0  # words that no caption has: nothing was learnt of them, and zeros pack well
    return model


def save(model, path):
    """Its weights in half precision, as `world.load` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() if value.is_floating_point() else value
               for key, value in model.state_dict().items()}, path)
    print(f"wrote {path.name}, {path.stat().st_size / 2**20:.1f} MiB", flush=True)


def save_pictures(folder, pixels):
    """Pictures (B, 1 or 3, H, W) as PNGs that bear the name of their folder and a number."""
    folder.mkdir(parents=True, exist_ok=True)
    name = folder.name
    for i, picture in enumerate((pixels.movedim(1, -1) * 255).round().byte().squeeze(-1).numpy()):
        Image.fromarray(picture).save(folder / f"{name}_{i:03d}.png", optimize=True)


def save_reference(latents, path):
    """The model's own samples as a bank of raw latents of the VAE."""
    save_bank(Bank((latents / LATENT_SCALE + LATENT_SHIFT).half(), metadata={"space": "vae", "source": "reference samples"}), path)


def report(world, held_out, labels):
    """The figures that tiny_digits/README.md quotes."""
    print(f"judge on held-out digits: {(world.digits(held_out) == labels).float().mean():.1%}")
    restored = world.decode(world.encode(held_out))
    print(f"autoencoder on held-out digits: mse {F.mse_loss(restored, held_out):.4f}, "
          f"judge after it {(world.digits(restored) == labels).float().mean():.1%}")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(200, *LATENT, generator=generator)
    right = [(world.digits(world.decode(world.sample(noise, prompt(str(d))))) == d).float().mean() for d in range(10)]
    print(f"class-conditional samples recognised at cfg 2: {torch.stack(right).mean():.1%}",
          [f"{value:.1%}" for value in right])
    for name, members in SUPERCLASSES.items():
        found = world.digits(world.decode(world.sample(torch.cat([noise, -noise]), prompt(name))))
        print(name, {member: f"{(found == member).float().mean():.1%}" for member in members})
    found = world.digits(world.decode(world.sample(noise, prompt(None), cfg=1)))
    print("unconditional:", found.bincount(minlength=10).tolist())


def arguments(text, parts, **steps):
    """A parser that knows how many steps each network is trained, and which parts are made."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for network, count in steps.items():
        parser.add_argument(f"--{network}-steps", type=int, default=count)
    parser.add_argument("--only", choices=parts, action="append",
                        help="make only this part, from the files of the others; may be repeated")
    return parser


def main():
    options = arguments(__doc__, PARTS, classifier=800, vae=2000, model=6000, clip=2500).parse_args()
    parts = options.only or PARTS
    torch.manual_seed(0)
    pixels, labels, held_out, held_out_labels = digits_data()
    if "classifier" in parts:
        save(train_classifier(pixels, labels, options.classifier_steps), FILES[Classifier])
    if "vae" in parts:
        save(train_vae(pixels, options.vae_steps), FILES[TAESD])
    if "model" in parts:
        vae = load(TAESD)
        with torch.inference_mode():
            latents = torch.cat([vae.encode(part) for part in pixels.split(256)]).clone()
        print(f"latents: mean {latents.mean():.3f}, std {latents.std():.3f}")
        save(train_model(latents, labels, options.model_steps), FILES[MMDiT])
    if "sets" in parts:
        save_pictures(SETS / "tiny_sevens", pixels[labels == 7][:150, :1])
        world, noise = TinyDigits(), torch.randn(100, *LATENT, generator=torch.Generator().manual_seed(100))
        save_reference(world.sample(noise, prompt(None), cfg=1), REFERENCE)
        save_pictures(SETS / "tiny_ones_and_fours", torch.cat([pixels[labels == 1][:75, :1], pixels[labels == 4][:75, :1]]))
    if "clip" in parts:
        save(train_clip(pixels, labels, options.clip_steps), CLIP / "open_clip_model.safetensors")
    if "report" in parts:
        report(TinyDigits(), held_out, held_out_labels)


if __name__ == "__main__":
    main()
