"""vae.py: the f = 8 autoencoder, image <-> latent (SD3, arXiv:2403.03206v1).

Read with   Sec. 5.2.1 and Table 3 (4, 8 or 16 latent channels), App. B.2 (normalised latents);
            Rombach et al. 2022 for the losses
Not here    files (checkpoints.py), the measures of Table 3 (metrics.py)
Shapes      B batch   C latent channels   H W latent height, width   D channels inside the network
            image (B, 3, 8H, 8W) in [-1, 1]   latent (B, C, H, W)
            moments (B, 2C, H, W): the mean and the log-variance of the code
Names       Parameters are called as in the released SD3 files.
Run         python vae.py     shapes and losses of random autoencoders with 4, 8, 16 channels
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder (Sec. 5.2.1). The defaults are SD3's: 83.8 M parameters."""
    latent_channels: int = 16                          # the d of Sec. 5.2.1
    channels: tuple[int, ...] = (128, 256, 512, 512)   # one number for each resolution
    norm_groups: int = 32                              # groups of every norm
    vae_scale: float = 1.5305                          # latent = (code - vae_shift) * vae_scale
    vae_shift: float = 0.0609                          # released numbers; ours are measured

    @property
    def downsampling(self):                            # the f of Sec. 5.2.1: 8
        return 2 ** (len(self.channels) - 1)


def normalize(code, config):
    """Raw code -> latent of about unit variance, by one global mean and deviation (App. B.2)."""
    return (code - config.vae_shift) * config.vae_scale


def sample_code(mean, logvar, noise=None):
    """mean + std * noise, or the mean alone without noise. All are (B, C, H, W)."""
    if noise is None:
        return mean
    return mean + torch.exp(0.5 * logvar) * noise


# ---- Encoder and decoder -------------------------------------------------------------------------
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)   # keeps the resolution
group_norm = partial(nn.GroupNorm, eps=1e-6)           # the released epsilon, which is not torch's


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): norm, SiLU, convolution, twice, plus the input."""
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions. (B, D, H, W) -> (B, D, H, W)."""
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        """x (B, D, H, W) -> (B, D, H, W): one head over all positions."""
        h = self.norm(x)
        head = []
        for conv in (self.q, self.k, self.v):
            tokens = conv(h).flatten(2).transpose(1, 2)               # (B, HW, D)
            head.append(tokens.unsqueeze(1).contiguous())             # (B, 1, HW, D)
        h = F.scaled_dot_product_attention(*head)
        h = h.squeeze(1).transpose(1, 2)                              # (B, D, HW)
        return x + self.proj_out(h.unflatten(2, x.shape[2:]))         # (B, D, H, W)


def make_level(in_channels, out_channels, num_blocks, groups):
    """The residual blocks of one resolution. What changes the resolution is added after them."""
    blocks = []
    for _ in range(num_blocks):
        blocks.append(ResnetBlock(in_channels, out_channels, groups))
        in_channels = out_channels
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks)))


def make_middle(channels, groups):
    """Residual block, attention, residual block at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels, groups),
                                     attn_1=AttnBlock(channels, groups),
                                     block_2=ResnetBlock(channels, channels, groups)))


class Encoder(nn.Module):
    """image (B, 3, 8H, 8W) -> moments (B, 2C, H, W). A level has two residual blocks. All but
    the last then halve the size: zeros to the right and below, then a convolution of stride 2."""
    def __init__(self, config):
        super().__init__()
        groups = config.norm_groups
        width = config.channels[0]
        self.conv_in = conv3(3, width)
        self.down = nn.Sequential()
        for i, channels in enumerate(config.channels):
            level = make_level(width, channels, 2, groups)
            if i < len(config.channels) - 1:
                pad = nn.ZeroPad2d((0, 1, 0, 1))
                conv = nn.Conv2d(channels, channels, 3, stride=2)
                level.add_module("downsample", nn.Sequential(OrderedDict(pad=pad, conv=conv)))
            self.down.append(level)
            width = channels
        self.mid = make_middle(width, groups)
        self.norm_out = group_norm(groups, width)
        self.conv_out = conv3(width, 2 * config.latent_channels)

    def forward(self, image):
        x = self.mid(self.down(self.conv_in(image)))                  # (B, D, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """code (B, C, H, W) -> image (B, 3, 8H, 8W), not clamped. A level has three residual blocks.
    Then each pixel is repeated, 2x2, and a convolution follows. up[0] is the full resolution, so
    the levels run from the last to the first."""
    def __init__(self, config):
        super().__init__()
        groups = config.norm_groups
        width = config.channels[-1]
        self.conv_in = conv3(config.latent_channels, width)
        self.mid = make_middle(width, groups)
        self.up = nn.ModuleList()
        for i in reversed(range(len(config.channels))):
            level = make_level(width, config.channels[i], 3, groups)
            width = config.channels[i]
            if i > 0:
                repeat = nn.Upsample(scale_factor=2, mode="nearest")
                conv = conv3(width, width)
                level.add_module("upsample", nn.Sequential(OrderedDict(repeat=repeat, conv=conv)))
            self.up.insert(0, level)
        self.norm_out = group_norm(groups, width)
        self.conv_out = conv3(width, 3)

    def forward(self, code):
        x = self.mid(self.conv_in(code))                              # (B, D, H, W)
        for level in reversed(self.up):
            x = level(x)                                              # at last (B, D, 8H, 8W)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The autoencoder: x = E(X) and X = D(x) of Sec. 5.2.1, with a Gaussian code."""
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, image):
        """image (B, 3, 8H, 8W) in [-1, 1] -> mean and logvar, (B, C, H, W) each."""
        f = self.config.downsampling
        height, width = image.shape[-2:]
        if height % f or width % f:
            raise ValueError(f"image is {height}x{width} px but the autoencoder works in steps of "
                             f"{f}; resize or crop both sides to multiples of {f}")
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image):
        """image -> latent (B, C, H, W), without noise."""
        mean, _ = self.encode_moments(image)
        return normalize(mean, self.config)

    def decode(self, latent):
        """latent (B, C, H, W) -> image (B, 3, 8H, 8W), in about [-1, 1], not clamped."""
        code = latent / self.config.vae_scale + self.config.vae_shift         # undoes `normalize`
        return self.decoder(code)


# ---- Training losses (Rombach et al. 2022, App. G). Each is a mean: a scalar ---------------------
def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) per number of the code."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction_loss(image, reconstruction):
    """Mean absolute difference."""
    return (reconstruction - image).abs().mean()


def perceptual_loss(image, reconstruction, features):
    """Distance of deep features, in the way of LPIPS (Zhang et al. 2018).
    features maps images (B, 3, H, W) to a list of maps (B, D, h, w) or sequences (B, n, D). Each
    feature vector is scaled to unit length, so that every layer counts alike."""
    total = 0.0
    for real, fake in zip(features(image), features(reconstruction)):
        axis = 1 if real.dim() == 4 else -1
        difference = F.normalize(real, dim=axis) - F.normalize(fake, dim=axis)
        total = total + difference.square().sum(axis).mean()
    return total


def vae_loss(vae, image, noise, kl_weight=2e-4):
    """The objective on one batch. image (B, 3, 8H, 8W); noise (B, C, H, W), standard normal.
    Returns (loss, terms, reconstruction). terms has a scalar for each name. An adversary can be
    added to the terms: experiments/table3_fig10_autoencoders.py."""
    mean, logvar = vae.encode_moments(image)
    reconstruction = vae.decoder(sample_code(mean, logvar, noise))
    terms = {"reconstruction": reconstruction_loss(image, reconstruction),
             "kl": kl_loss(mean.float(), logvar.float())}
    return terms["reconstruction"] + kl_weight * terms["kl"], terms, reconstruction


def main():
    """Print the latents of Table 3's three sizes, their reconstructions, and the losses."""
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    for latent_channels in (4, 8, 16):
        vae = VAE(VAEConfig(latent_channels, channels=(32, 32, 32, 32)))      # random weights
        with torch.no_grad():
            mean, logvar = vae.encode_moments(image)
            reconstruction = vae.decode(normalize(mean, vae.config))
        times = image.numel() / mean.numel()
        absolute = reconstruction_loss(image, reconstruction)
        print(f"{tuple(image.shape)} -> {tuple(mean.shape)}, {times:.0f} times fewer numbers -> "
              f"{tuple(reconstruction.shape)}; L1 {absolute:.2f}, KL {kl_loss(mean, logvar):.2f}")


if __name__ == "__main__":
    main()
