"""Train the tiny world of photographs: `python -m tiny_photos.train --photos FOLDER` (an hour or more on two cores).

FOLDER holds train/<class>/*.jpg and test/<class>/*.jpg, as CIFAR-10's 60,000 photographs do. Writes the weights that `world.py` loads, the
negation sets and the reference bank, all of which the model draws itself: no photograph of the data set is shipped.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from tiny_digits.networks import LATENT_SCALE, LATENT_SHIFT, TAESD, ResBlock
from tiny_digits.train import arguments, fit, flow_loss, random_prompts, save, save_pictures, save_reference
from tiny_digits.world import World, load

from .data import CLASSES, JUDGE, MODEL, SIDE, TESTED, UNSEEN, cached, enlarged
from .world import FILES, GROUPS, LATENT, PAIRS, PROMPTS, REFERENCE, ROOT, Judge, TinyPhotos, Transformer, prompt

PARTS = ["vae", "model", "decoder", "judge", "sets", "report"]


def fresh_vae():
    """An autoencoder whose blocks do nothing at first (relu(0 + x)), so that no signal fades over its 23 layers."""
    model = TAESD()
    for layer in model.modules():
        if isinstance(layer, ResBlock):
            torch.nn.init.zeros_(layer.conv[-1].weight)
            torch.nn.init.zeros_(layer.conv[-1].bias)
    return model.to(memory_format=torch.channels_last)


def shallow(layers, x):
    """What such layers make of x, without what does nothing: a tenth of the work."""
    for layer in layers:
        x = F.relu(x) if isinstance(layer, ResBlock) else layer(x)
    return x


def train_vae(pictures, steps, batch=32, crop=32):
    """MSE + 1e-3 z^2 with latent noise 0.1; the blocks still do nothing, and the encoder's will stay so. Bytes (n, 3, 32, 32)."""
    model = fresh_vae()

    def drawn(count):
        return enlarged(pictures[torch.randint(len(pictures), (count,))]).contiguous(memory_format=torch.channels_last)

    def loss():
        top, left = (8 * torch.randint((SIDE - crop) // 8 + 1, (2,))).tolist()
        images = drawn(batch)[..., top:top + crop, left:left + crop].contiguous(memory_format=torch.channels_last)
        z = shallow(model.taesd_encoder, images)
        restored = shallow(model.taesd_decoder, z + 0.1 * torch.randn_like(z))
        return F.mse_loss(restored, images) + 1e-3 * z.square().mean()

    return by_energy(fit(model, loss, steps, 4e-3), pictures)


@torch.no_grad()
def by_energy(model, pictures, clear=0.25):
    """The same autoencoder with latents in other axes: those along which pictures change most first, and each as large as what it changes.

    Latents that an autoencoder likes are white, and a diffusion model then spends most of itself on what nobody sees: with
    z' = L^(1/2) U' (z - m), where U L U' is what the decoder's pictures change by a change of z, a unit is as much in each direction.
    clear: standard deviation of the largest channel, far from where the decoder clamps.
    """
    last, first = model.taesd_encoder[-1], model.taesd_decoder[1]
    z = shallow(model.taesd_encoder, enlarged(pictures[torch.randperm(len(pictures))[:200]]).contiguous(memory_format=torch.channels_last))
    plain = shallow(model.taesd_decoder, z)
    moves = []
    for channel in range(z.shape[1]):
        moved = z.clone()
        moved[:, channel, 4, 4] += 0.1
        moves.append((shallow(model.taesd_decoder, moved) - plain).flatten())
    change = torch.stack(moves)
    values, axes = torch.linalg.eigh(change @ change.T)
    forth = values.clamp_min(0).sqrt()[:, None] * axes.T  # z' = forth (z - m)
    forth *= clear / torch.einsum("ij,njhw->nihw", forth, z).std((0, 2, 3)).amax()
    m, back = z.mean((0, 2, 3)), torch.linalg.inv(forth)
    last.weight.copy_(torch.einsum("ij,jkhw->ikhw", forth, last.weight))
    last.bias.copy_(forth @ (last.bias - m))
    first.bias += torch.einsum("ojhw,j->o", first.weight, m)
    first.weight.copy_(torch.einsum("ojhw,ji->oihw", first.weight, back))
    raw = torch.einsum("ij,njhw->nihw", forth, z - m.view(1, -1, 1, 1))
    print("latents by energy, standard deviations:", [round(float(s), 3) for s in raw.std((0, 2, 3))], flush=True)
    model.vae_scale.fill_(LATENT_SCALE * raw.std())
    model.vae_shift.fill_(LATENT_SHIFT - raw.mean() / (LATENT_SCALE * raw.std()))
    return model


def train_decoder(model, pictures, latents, steps, batch=16, crop=4):
    """MSE of crops decoded from these latents by all layers; the encoder stays, and with it what the model has learned."""
    scale, shift = model.vae_scale.item(), model.vae_shift.item()

    def loss():
        rows, (top, left) = torch.randint(len(pictures), (batch,)), torch.randint(SIDE // 8 - crop + 1, (2,)).tolist()
        z = latents[rows, :, top:top + crop, left:left + crop]
        raw = (z / LATENT_SCALE + LATENT_SHIFT - shift) * scale
        images = enlarged(pictures[rows])[..., 8 * top:8 * (top + crop), 8 * left:8 * (left + crop)]
        restored = model.taesd_decoder((raw + 0.02 * raw.std() * torch.randn_like(raw)).contiguous(memory_format=torch.channels_last))
        return F.mse_loss(restored, images)

    model.taesd_encoder.requires_grad_(False)
    return fit(model, loss, steps, 1e-3)


def labels_of(pictures):
    """The class of each of (classes, n, ...) pictures, flat."""
    return torch.arange(len(pictures)).repeat_interleave(pictures.shape[1])


def train_judge(pictures, labels, steps, batch=128):
    """Cross-entropy on photographs (n, 3, 32, 32), mirrored, moved by up to 4 pixels and blurred at random: the model's are soft."""
    model = Judge().to(memory_format=torch.channels_last)

    def loss():
        rows = torch.randint(len(pictures), (batch,))
        images = F.pad(pictures[rows].float() / 255, (4, 4, 4, 4), mode="reflect")
        top, left = torch.randint(9, (2,)).tolist()
        images = images[..., top:top + 32, left:left + 32]
        images = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images, images.flip(-1))
        soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        images = torch.lerp(images, soft, 0.8 * torch.rand(batch, 1, 1, 1))
        return F.cross_entropy(model(images), labels[rows], label_smoothing=0.1)

    return fit(model, loss, steps, 6e-3)


def fresh_model():
    """A transformer whose blocks and answer are nothing at first, as in DiT (Peebles & Xie, arXiv:2212.09748, adaLN-Zero), and whose large
    products are computed in bfloat16: a third faster on a CPU that has it.
    """
    model = Transformer()
    for name, one in model.named_modules():
        if not isinstance(one, torch.nn.Linear):
            continue
        if "adaLN" in name or name == "final_layer.linear":
            torch.nn.init.zeros_(one.weight)
            torch.nn.init.zeros_(one.bias)
        elif "x_block" in name:
            one.forward = in_bfloat16.__get__(one)
    return model


def in_bfloat16(layer, x):
    """A linear layer of float32 weights."""
    return F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()


def train_model(latents, labels, steps, batch=128):
    """Flow matching, as the digit world's; compiled, a third faster. Its mean so far is saved on the way."""
    model = fresh_model()
    compiled = torch.compile(model, options={"cpp.simdlen": 256})  # with 512 bits torch 2.14 makes gradients that are not finite

    def loss():
        rows = torch.randint(len(latents), (batch,))
        return flow_loss(compiled, latents[rows].float(), random_prompts(labels[rows], GROUPS), centre=0.8)

    return fit(model, loss, steps, 1.5e-3, average=0.999, save=lambda mean: save(mean, FILES[Transformer]))


def encoded(vae, pictures):
    """Model-space latents (n, 16, 8, 8) of bytes (n, 3, 32, 32), in half precision."""
    raw = (shallow(vae.taesd_encoder, enlarged(part).contiguous(memory_format=torch.channels_last)) for part in pictures.split(250))
    return torch.cat([vae_to_model(vae, z).half() for z in raw]).contiguous()


def vae_to_model(vae, z):
    """What the encoder gives as ComfyUI's latents, and these as what SD3's model sees."""
    return ((z / vae.vae_scale + vae.vae_shift) - LATENT_SHIFT) * LATENT_SCALE


def draw_sets():
    """What the model makes without a prompt, and 60 trucks as it draws them, as a negation set: nobody's photographs."""
    world = World({key: path for key, path in FILES.items()})
    generator = torch.Generator().manual_seed(100)
    save_reference(world.sample(torch.randn(150, *LATENT, generator=generator), prompt(None), cfg=1), REFERENCE)
    trucks = world.decode(world.sample(torch.randn(150, *LATENT, generator=generator), prompt("truck"), cfg=1))  # guidance saturates
    right = world.judge(trucks).argmax(1) == PROMPTS["truck"]
    save_pictures(ROOT / "models/negation_sets/tiny_trucks", trucks[right][:60])


@torch.inference_mode()
def report(world, tested):
    """The figures that tiny_photos/README.md quotes. tested: bytes (classes, n, 3, 32, 32) that nothing has seen."""
    pictures, labels = enlarged(tested.flatten(0, 1)), labels_of(tested)
    restored = world.decode(world.encode(pictures))
    for name, one in (("photographs", pictures), ("photographs through the autoencoder", restored)):
        print(f"judge on unseen {name}: {(world.classes(one) == labels).float().mean():.1%}")
    print(f"autoencoder on unseen photographs: mse {F.mse_loss(restored, pictures):.4f}")
    noise = torch.randn(200, *LATENT, generator=torch.Generator().manual_seed(1))
    for cfg in (1, 2, 4):
        found = {name: (world.classes(world.decode(world.sample(noise, prompt(name), cfg))) == i).float().mean()
                 for i, name in enumerate(CLASSES)}
        print(f"class prompts recognised at cfg {cfg}: {sum(found.values()) / len(found):.1%}",
              {name: f"{share:.0%}" for name, share in found.items()})
    for pair in PAIRS:
        seen = world.classes(world.decode(world.sample(noise, prompt(" or ".join(pair)))))
        print(" or ".join(pair), {name: f"{(seen == PROMPTS[name]).float().mean():.0%}" for name in pair})
    seen = world.classes(world.decode(world.sample(noise, prompt(None), 1)))
    print("no prompt:", dict(zip(CLASSES, seen.bincount(minlength=len(CLASSES)).tolist())))


def main():
    parser = arguments(__doc__, PARTS, vae=2500, model=7000, decoder=1200, judge=2000)
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/<class>/ and test/<class>/")
    options = parser.parse_args()
    parts = options.only or PARTS
    torch.manual_seed(0)
    photos = cached(options.photos, "train")
    own = photos[:, :MODEL].flatten(0, 1)
    if "vae" in parts:
        save(train_vae(own, options.vae_steps), FILES[TAESD])
    if {"model", "decoder"} & {*parts}:
        vae = load(TAESD, FILES).to(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = torch.cat([encoded(vae, own), encoded(vae, own.flip(-1))])  # and mirrored
        print(f"latents: mean {latents.float().mean():.3f}, std {latents.float().std():.3f}", flush=True)
    if "model" in parts:
        save(train_model(latents, labels_of(photos[:, :MODEL]).repeat(2), options.model_steps), FILES[Transformer])
    if "decoder" in parts:
        save(train_decoder(vae.requires_grad_(True).train(), own, latents[:len(own)].float(), options.decoder_steps), FILES[TAESD])
    if "judge" in parts:
        judged = photos[:, MODEL:JUDGE]
        save(train_judge(judged.flatten(0, 1), labels_of(judged), options.judge_steps), FILES[Judge])
    if "sets" in parts:
        draw_sets()
    if "report" in parts:
        report(TinyPhotos(), cached(options.photos, "test")[:, UNSEEN:TESTED])


if __name__ == "__main__":
    main()
