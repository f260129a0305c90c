"""The three networks of the tiny digit world, in the key formats that ComfyUI's stock loaders recognise.

* `MMDiT`: the SD3 transformer (Esser et al., arXiv:2403.03206, §5), so that `UNETLoader` takes the file as an SD3 model.
* `TAESD`: the tiny autoencoder format, so that `VAELoader` takes the file as a VAE.
* `Classifier`: an independent judge. Only the measurements use it.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64  # SD3 fixes the head size; hidden size = 64 * depth, heads = depth
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609  # SD3's latent format: process_in(z) = (z - shift) * scale


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, dim, project):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.ln_q, self.ln_k = nn.RMSNorm(HEAD, eps=1e-6), nn.RMSNorm(HEAD, eps=1e-6)
        if project:
            self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).unbind(2)  # each (B, tokens, heads, 64)
        return self.ln_q(q), self.ln_k(k), v


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stream(nn.Module):
    """One of the two streams (image or context) of a joint block; the last context stream only feeds the attention."""

    def __init__(self, dim, last=False):
        super().__init__()
        self.attn = Attention(dim, project=not last)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if last else 6) * dim))
        if not last:
            self.mlp = Mlp(dim)

    def before(self, x, c):
        mods = self.adaLN_modulation(c).chunk(self.adaLN_modulation[1].out_features // c.shape[1], dim=1)
        return self.attn.heads(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), *mods[:2])), mods[2:]

    def after(self, x, attended, mods):
        gate, shift, scale, gate_mlp = mods
        x = x + gate[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class JointBlock(nn.Module):
    def __init__(self, dim, last=False):
        super().__init__()
        self.context_block, self.x_block = Stream(dim, last), Stream(dim)

    def forward(self, context, x, c):
        qkv_context, mods_context = self.context_block.before(context, c)
        qkv_x, mods_x = self.x_block.before(x, c)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(qkv_context, qkv_x))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        n = context.shape[1]
        if mods_context:
            context = self.context_block.after(context, attended[:, :n], mods_context)
        return context, self.x_block.after(x, attended[:, n:], mods_x)


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), *self.adaLN_modulation(c).chunk(2, dim=1)))


class Embedder(nn.Module):
    def __init__(self, inputs, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, v):
        return self.mlp(v)


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def timestep_features(t, dim=256):
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MMDiT(nn.Module):
    """Velocity `v = noise - x0` of a rectified flow, from `x = (1 - sigma) x0 + sigma noise`.

    Args of forward: x (B, C, H, W); sigma (B,) in [0, 1]; label (B, labels), one-hot, all zeros = no prompt.
    """

    def __init__(self, depth=3, channels=16, patch=2, labels=16, grid=8):
        super().__init__()
        dim = HEAD * depth
        self.patch, self.grid = patch, grid
        self.x_embedder = PatchEmbed(channels, patch, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid * grid, dim))
        self.t_embedder, self.y_embedder = Embedder(256, dim), Embedder(labels, dim)
        self.context_embedder = nn.Linear(labels, dim)
        self.joint_blocks = nn.ModuleList(JointBlock(dim, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(dim, patch * patch * channels)

    def positions(self, h, w):
        top, left = (self.grid - h) // 2, (self.grid - w) // 2
        return self.pos_embed.unflatten(1, (self.grid, self.grid))[:, top:top + h, left:left + w].flatten(1, 2)

    def forward(self, x, sigma, label):
        h, w = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        tokens = self.x_embedder(x) + self.positions(h, w)
        c = self.t_embedder(timestep_features(1000 * sigma).to(x)) + self.y_embedder(label)
        context = self.context_embedder(torch.zeros_like(label)[:, None])
        for block in self.joint_blocks:
            context, tokens = block(context, tokens, c)
        patches = self.final_layer(tokens, c).unflatten(1, (h, w)).unflatten(-1, (self.patch, self.patch, -1))
        return torch.einsum("bhwpqc->bchpwq", patches).flatten(4, 5).flatten(2, 3)


class ResBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))

    def forward(self, x):
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


def down():
    return [conv(64, 64, stride=2, bias=False), ResBlock(), ResBlock(), ResBlock()]


def up():
    return [ResBlock(), ResBlock(), ResBlock(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]


class TAESD(nn.Module):
    """Autoencoder: pixels (B, 3, 8h, 8w) in [0, 1] <-> model-space latents (B, 16, h, w) of about unit variance.

    The file keeps ComfyUI's convention (raw latents, then SD3's process_in); `encode` and `decode` here do both steps.
    """

    def __init__(self, channels=16):
        super().__init__()
        self.taesd_encoder = nn.Sequential(conv(3, 64), ResBlock(), *down(), *down(), *down(), conv(64, channels))
        self.taesd_decoder = nn.Sequential(
            Clamp(), conv(channels, 64), nn.ReLU(), *up(), *up(), *up(), ResBlock(), conv(64, 3))
        self.vae_scale, self.vae_shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def encode(self, pixels):
        raw = self.taesd_encoder(pixels) / self.vae_scale + self.vae_shift
        return (raw - LATENT_SHIFT) * LATENT_SCALE

    def decode(self, latents):
        raw = latents / LATENT_SCALE + LATENT_SHIFT
        return self.taesd_decoder((raw - self.vae_shift) * self.vae_scale).clamp(0, 1)


class Classifier(nn.Module):
    """Digit classifier on (B, 3, 32, 32) pixels; `features` (B, 128) is the space in which distributions are compared."""

    def __init__(self):
        super().__init__()
        def stage(i, o):
            return nn.Sequential(conv(i, o, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                                 conv(o, o, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(stage(1, 24), stage(24, 48), stage(48, 64), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def features(self, pixels):
        return self.body(pixels.mean(1, keepdim=True))

    def forward(self, pixels):
        return self.head(self.features(pixels))
